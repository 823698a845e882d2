"""Recipes run end to end with ``--fast`` and write what they promise."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bayesae.report import Records

RECIPES = Path(__file__).parents[1] / "recipes"


def run(name, tmp_path):
    command = [sys.executable, str(RECIPES / name), "--fast", "--seeds", "0"]
    command += ["--json", str(tmp_path / "r.json"), "--figures", str(tmp_path / "figures")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "figures" / name.replace(".py", ".png")).stat().st_size > 10_000
    assert "| MAP" in done.stdout
    return Records.load(tmp_path / "r.json")


@pytest.mark.slow
def test_ood_digits(tmp_path):
    records = run("ood_digits.py", tmp_path)
    assert {row.method for row in records.rows} == {"MAP", "ensemble", "Laplace"}
    assert 0.5 < records.mean(method="Laplace", metric="AUROC mirrored") <= 1


@pytest.mark.slow
@pytest.mark.data
def test_ood_fashion(tmp_path):
    records = run("ood_fashion.py", tmp_path)
    inverted = {"data": "fashion-mnist / mnist", "method": "Laplace: weight variance", "metric": "AUROC"}
    assert records.mean(**inverted) < 0.5
