"""The harness of the benchmarks, on a network of a few weights; no timing is judged."""

import json
import math
from dataclasses import replace

import pytest
import torch

from benchmarks import measure, peers, records
from benchmarks.contenders import OURS, Contender, as_is
from benchmarks.nets import mlp
from benchmarks.questions import QUESTIONS, Question


def _broken(problem, setting):
    raise ImportError("No module named 'peer'")


@pytest.fixture
def question():
    general = Contender("torch.func, chunked", peers.torch_func_diagonal, as_is, (3, 6), (2, None))
    broken = Contender("broken", _broken, as_is)
    return Question(
        "tiny", lambda: mlp((6, 4, 2)), (6,), OURS["diagonal"], (general, broken), {"ratio": 1e9, "peak_mb": 1e9}, 4
    )


def test_times_give_records_with_ratios_and_reasons(question):
    found = measure.times(question, "cpu", is_quick=True, rounds=2)
    general, broken = records.question_records(question, "cpu", found, {"bayesae": 3.0})
    assert general["relative_error"] < 1e-5
    assert general["ratio"] == pytest.approx(general["peer_s"] / general["ours_s"])
    assert general["peer_images"] == 2 and "2 images" in general["note"]
    assert general["reached"] == {"ratio": False, "peak_mb": True}
    assert broken["peer_s"] is None and "ImportError" in broken["reason"]
    json.dumps([general, broken])
    assert "MISSED" in records.table([general, broken])


def test_memory_of_a_contender(question):
    assert measure.memory(question, "cpu", question.ours, 0, 4)["peak_mb"] >= 0


def test_largest_error_is_relative_to_the_entry():
    a = {"w": torch.tensor([1.0, 100.0]), "b": torch.tensor([2.0])}
    b = {"w": torch.tensor([2.0, 100.0]), "b": torch.tensor([2.0])}
    assert measure.largest_error(a, b) == pytest.approx(0.01)
    with pytest.raises(ValueError, match="names or shapes"):
        measure.largest_error(a, {"w": b["w"]})
    with pytest.raises(ValueError, match="finite"):
        measure.largest_error({"b": torch.tensor([math.nan])}, {"b": torch.ones(1)})


def test_growth_is_an_exponent():
    common = {"device": "cpu", "question": "growth"}
    rows = [{**common, "pixels": n, "ours_s": n**0.5, "ours_peak_mb": 2.0 * n} for n in (10, 100, 1000)]
    found = records.growth(rows, "cpu")
    assert found is not None
    assert found["time_exponent"] == pytest.approx(0.5) and found["memory_exponent"] == pytest.approx(1.0)
    assert records.growth(rows[:1], "cpu") is None


def test_every_question_has_a_network_of_its_rows():
    for question in QUESTIONS.values():
        small = replace(question, batch=1)
        problem = small.problem("cpu")
        assert problem.network(problem.batches[0]).shape == (1, *question.row)
