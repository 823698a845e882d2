from __future__ import annotations

import pytest
import torch

import bayesae as bae
from bayesae import encoding, files, ood
from bayesae.errors import FileError, UnsupportedError
from tests.calibration.worlds import normal
from tests.test_encoding import calibrations, check_same


def test_every_calibration_comes_back(tmp_path):
    for value in calibrations():
        files.save(value, tmp_path / "file")
        check_same(value, files.load(tmp_path / "file"))
        assert files.describe(tmp_path / "file")["calibration"]["type"] == type(value).__name__


def test_it_decides_the_same(tmp_path):
    moments, x = normal(40)
    fitted, scores = bae.calibration.SplitConformal("position").fit(moments, x), torch.randn(99)
    for value in (fitted, ood.ConformalCalibration.fit(scores)):
        files.save(value, tmp_path / f"{type(value).__name__}.safetensors")
    low, high = files.load(tmp_path / "ConformalQuantiles.safetensors").interval(moments, 0.9)
    assert torch.equal(low, fitted.interval(moments, 0.9)[0]) and torch.equal(high, fitted.interval(moments, 0.9)[1])
    loaded = files.load(tmp_path / "ConformalCalibration.safetensors")
    assert torch.equal(loaded.p_values(scores), ood.ConformalCalibration.fit(scores).p_values(scores))


def test_what_is_none_is_refused(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(UnsupportedError, match="an estimator or a calibration; got WarmUp"):
        files.save(bae.objectives.WarmUp(0.3), path)
    files.save(ood.ConformalCalibration.fit(torch.randn(9)), path)
    for options in ({"device": "cpu"}, {"dtype": torch.float32}, {"encoder": torch.nn.Linear(1, 1)}):
        with pytest.raises(UnsupportedError, match="a path alone, as the file has no predictive but a calibration"):
            files.load(path, **options)
    metadata, _ = encoding.read(path)
    for tree, match in (
        ({"calibration": bae.objectives.WarmUp(0.3)}, "a calibration; got WarmUp"),
        ({"calibrations": []}, "a file"),
    ):
        skeleton, _ = encoding.flatten(tree)
        encoding.write(path, {}, metadata | {"value": skeleton})
        with pytest.raises(FileError, match=match):
            files.load(path)
