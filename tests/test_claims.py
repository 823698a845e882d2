"""What recipes claim, held against their recorded runs, and against records that break each promise."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bayesae.errors import DataError
from bayesae.report import Records

ROOT = Path(__file__).parents[1]


def recipe(name):
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", ROOT / "recipes" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
        spec.loader.exec_module(module)
    return module


def recorded(name):
    return Records.load(ROOT / "benchmarks" / "results" / f"{name}.json")


def changed(records, value, **where):
    """The records, those with these fields set to another value."""
    return Records(
        replace(row, value=value) if all(getattr(row, key) == want for key, want in where.items()) else row
        for row in records.rows
    )


@pytest.mark.parametrize("name", ["drift", "calibration"])
def test_recorded_runs_keep_every_promise(name):
    recipe(name).judge(recorded(name))


@pytest.mark.parametrize(
    ("method", "value"),
    [("each row alone", 0.68), ("each row alone", 0.82), ("typicality, permutation", 0.0)]
    + [("typicality, permutation", 0.03), ("martingale, jumper", 0.03), ("CUSUM, jumper", 0.03)],
)
def test_false_alarms_outside_the_interval_of_their_level_are_found(method, value):
    records = changed(recorded("drift"), value, data="digits", setting="no drift", method=method)
    with pytest.raises(DataError, match=f"no drift, .*{value:g}"):
        recipe("drift").judge(records)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_monitors_that_find_nothing_or_everything_are_found(value):
    drift = recipe("drift")
    for data, setting, method, metric, *_ in drift.CLAIMS:
        if metric == "found":
            with pytest.raises(DataError, match=f"{setting}, {method}"):
                drift.judge(changed(recorded("drift"), value, data=data, setting=setting, method=method, metric=metric))


@pytest.mark.parametrize("level", [0.5, 0.8, 0.9, 0.95])
@pytest.mark.parametrize("kind", ["isotonic", "conformal", "conformal by position"])
@pytest.mark.parametrize("off", [-0.021, 0.021])
def test_intervals_that_miss_their_level_on_either_side_are_found(level, kind, off):
    metric = f"coverage {100 * level:g}"
    records = changed(recorded("calibration"), level + off, data="mnist", setting=kind, method="SWAG", metric=metric)
    with pytest.raises(DataError, match=f"for mnist, {kind}, SWAG, {metric}"):
        recipe("calibration").judge(records)


def test_the_chance_of_a_row_alone_is_that_of_ranks():
    """By drawing ranks: in how many orders of 200 + 200 rows is a stream row beyond the second largest of the first."""
    import torch

    drift = recipe("drift")
    ranks = torch.rand(20_000, 400, generator=torch.Generator().manual_seed(0)).argsort(1)
    found = (ranks[:, 200:] > ranks[:, :200].topk(2).values[:, -1:]).any(1).double().mean()
    low, high = drift.promised(drift.DIGITS, 20_000)[drift.EACH_ROW]
    assert low < float(found) < high and high - low < 0.02
