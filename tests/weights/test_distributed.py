"""Two gloo ranks give what one process gives: chains and members spread, rows divided."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from tests.cases import WEIGHT_CASES
from tests.weights.ranks import all_rows, numbers, posterior_of

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    words = [sys.executable, "-m", "tests.weights.ranks"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    runs = [
        subprocess.Popen([*words, str(rank), "2", str(folder)], cwd=ROOT, env=environment, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    said = []
    for run in runs:
        said.append(run.communicate(timeout=280)[1].decode()[-2000:])
    assert [run.returncode for run in runs] == [0, 0], "\n".join(said)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("case", WEIGHT_CASES, ids=str)
def test_two_ranks_are_one_process(case, on_two_ranks):
    alone = numbers(posterior_of(case, all_rows()))
    for of_rank in on_two_ranks:
        found = of_rank[str(case)]
        for kind in ("mean", "spread"):
            assert_close(found[kind], alone[kind], rtol=1e-8, atol=1e-9)


@pytest.mark.slow
def test_both_ranks_have_the_same_bits(on_two_ranks):
    first, second = on_two_ranks
    for name in first.keys() - {"other weights"}:
        for kind in ("mean", "spread"):
            assert all(torch.equal(first[name][kind][k], second[name][kind][k]) for k in first[name][kind])


@pytest.mark.slow
def test_each_rank_goes_on_from_its_own_checkpoint(on_two_ranks):
    for found in on_two_ranks:
        assert_close(found["from its checkpoint"], found["without a seed"], rtol=0, atol=0)


@pytest.mark.slow
def test_ranks_with_other_weights_are_refused(on_two_ranks):
    assert all("the same weights on every rank" in found["other weights"] for found in on_two_ranks)
