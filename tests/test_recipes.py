"""Recipes run end to end with ``--fast`` and write what they promise."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bayesae.report import Records

RECIPES = Path(__file__).parents[1] / "recipes"


def run(name, tmp_path, row="| MAP"):
    command = [sys.executable, str(RECIPES / name), "--fast", "--seeds", "0"]
    command += ["--json", str(tmp_path / "r.json"), "--figures", str(tmp_path / "figures")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "figures" / name.replace(".py", ".png")).stat().st_size > 10_000
    assert row in done.stdout
    return Records.load(tmp_path / "r.json")


@pytest.mark.slow
def test_ood_digits(tmp_path):
    records = run("ood_digits.py", tmp_path)
    assert {row.method for row in records.rows} == {"MAP", "ensemble", "Laplace"}
    assert 0.5 < records.mean(method="Laplace", metric="AUROC mirrored") <= 1


@pytest.mark.slow
def test_subnetwork_gap(tmp_path):
    records = run("subnetwork_gap.py", tmp_path)
    assert records.mean(method="dense, all", metric="gap sd") == pytest.approx(1)
    kept = {"data": "digits", "setting": "5%", "metric": "share kept"}
    assert records.mean(method="largest variance", **kept) < 0.1 * records.mean(method="random", **kept)


@pytest.mark.slow
@pytest.mark.data
def test_ood_fashion(tmp_path):
    records = run("ood_fashion.py", tmp_path)
    inverted = {"data": "fashion-mnist / mnist", "method": "Laplace: weight variance", "metric": "AUROC"}
    assert records.mean(**inverted) < 0.5


@pytest.mark.slow
def test_evidence_choice(tmp_path):
    records = run("evidence_choice.py", tmp_path, row="| tuned by layer")
    settings = {row.setting for row in records.rows if row.metric == "rank correlation"}
    assert settings == {"all models", "Gaussian models"}
    assert records.mean(setting="all models", metric="rank correlation") > 0.5


@pytest.mark.slow
def test_defects(tmp_path):
    records = run("defects.py", tmp_path)
    scratch = {"setting": "scratch", "metric": "pixel AUROC"}
    assert records.mean(method="MAP: squared error", **scratch) > records.mean(method="position alone", **scratch) + 0.1
    assert records.mean(method="MAP: squared error", setting="scratch", metric="PRO-0.3") > 0.5
    assert 0 < records.mean(method="Laplace", setting="clean images", metric="sd over the ensemble's (medians)") < 10


@pytest.mark.slow
def test_code_size(tmp_path):
    records = run("code_size.py", tmp_path, row="| dense")
    linear = {"data": "probabilistic PCA", "metric": "code size"}
    assert records.mean(method="dense", **linear) == 4
    assert records.mean(method="training rows", **linear) == 5  # the largest that was tried
    assert {row.setting for row in records.rows if row.data == "digits"} >= {"code 1", "code 16", "all sizes", "choice"}


@pytest.mark.slow
def test_few_labels(tmp_path):
    records = run("few_labels.py", tmp_path, row="| M2, all rows")
    assert {row.setting for row in records.rows} == {"code 2, neighbours", "code 2, probe", "code 2, Bayes"}
    assert records.mean(method="pixels", setting="code 2, neighbours", metric="accuracy 1") > 0.4


@pytest.mark.slow
def test_posterior_families(tmp_path):
    records = run("posterior_families.py", tmp_path, row="| VAE")
    where = {"data": "digits", "setting": "test", "seed": 0}
    bounds = {row.method: row.value for row in records.rows if row.metric == "bound"}
    assert len(bounds) == 20
    after = records.mean(method="VAE, Laplace after the fact", metric="bound", **where)
    assert after > bounds["VAE"] + 1
    assert records.mean(method="IWAE 16", metric="gap", **where) > records.mean(method="VAE", metric="gap", **where)


@pytest.mark.slow
def test_laplacian_autoencoder(tmp_path):
    records = run("laplacian_autoencoder.py", tmp_path, row="| online: average, running noise")
    assert {row.setting for row in records.rows} == {"all pixels", "without dead pixels"}
    online = {"method": "online: average, running noise", "setting": "all pixels"}
    assert records.mean(metric="median weight sd", **online) > records.mean(
        metric="median weight sd", method="online: leaky sum, noise 1", setting="all pixels"
    )
    assert records.mean(metric="AUROC permuted: code sd", **online) > 0.8


@pytest.mark.slow
def test_weight_posteriors(tmp_path):
    records = run("weight_posteriors.py", tmp_path)
    methods = {row.method for row in records.rows}
    assert {"SWAG", "SGHMC", "online Laplace", "mean field, Flipout", "dropout", "SWAG over an ensemble"} <= methods
    assert all(records.mean(method=method, metric="cost") > 0 for method in methods)


@pytest.mark.slow
def test_calibration(tmp_path):
    records = run("calibration.py", tmp_path)
    assert {row.method for row in records.rows} == {"MAP", "Laplace", "SWAG", "ensemble"}
    for kind in ("isotonic", "conformal"):
        assert records.mean(setting=kind, metric="largest miss") < records.mean(setting="none", metric="largest miss")
    assert records.mean(method="MAP", setting="rotation 5", metric="NLL, none") > records.mean(
        method="MAP", setting="none", metric="NLL"
    )


@pytest.mark.slow
def test_drift(tmp_path):
    records = run("drift.py", tmp_path, row="| no drift")
    assert {row.setting for row in records.rows} == {"no drift", "strangers come", "noise grows", "classes go"}
    alarms = {"setting": "no drift", "metric": "any false alarm"}
    assert records.mean(method="martingale, jumper", **alarms) < records.mean(method="each row alone", **alarms)


@pytest.mark.slow
def test_active_learning(tmp_path):
    records = run("active_learning.py", tmp_path, row="| joint gain, ensemble")
    errors = [records.mean(setting=f"{n} images", metric="squared error") for n in (20, 40)]
    assert errors[1] < errors[0]
    areas = {row.method: row.value for row in records.rows if row.metric == "area"}
    assert areas["weight draws' labels"] < areas["information gain"]


@pytest.mark.slow
@pytest.mark.data
def test_bayesian_vae_ood(tmp_path):
    records = run("bayesian_vae_ood.py", tmp_path, row="recommended, by fashion-mnist / omniglot")
    posteriors = {"MAP", "SGHMC", "Bayes by backprop", "SWAG", "Laplace", "ensemble"}
    assert {row.method.split(": ")[0].split(",")[0] for row in records.rows if row.setting != "published"} == posteriors
    pairs = {row.data for row in records.rows if " / " in row.data}
    assert pairs == {
        f"{a} / {b}"
        for a in ("fashion-mnist", "mnist")
        for b in ("fashion-mnist", "mnist", "kmnist", "omniglot")
        if a != b
    }
    for output in ("Bernoulli", "Gaussian"):
        assert any(row.setting == f"{output}, matched brightness" for row in records.rows)
        assert any(row.setting == f"{output}, border zeroed" for row in records.rows)
    assert all(0 <= row.value <= 1 for row in records.rows if row.metric in ("AUROC", "AUPR", "share saturated"))


@pytest.mark.slow
def test_geodesics_digits(tmp_path):
    records = run("geodesics_digits.py", tmp_path, row="| straight line")
    lengths = {row.method: row.value for row in records.rows if row.metric == "length"}
    assert lengths["expected metric"] <= lengths["straight line"] == pytest.approx(1)
    assert records.mean(method="one decoder", metric="variation") > 0
