"""Omniglot: the converted copy and the original archives give the same images."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

import bayesae as bae


@pytest.mark.data
@pytest.mark.slow
def test_archives_and_their_converted_copy_agree(tmp_path, monkeypatch):
    source = Path(os.environ["BAYESAE_DATA"]) / "omniglot"
    both = bae.datasets.load("omniglot", split=("train", "test"), labels=True)
    assert [tuple(x.shape) for x, _ in both] == [(3872, 1, 28, 28), (968, 1, 28, 28)]
    assert all(labels.unique().tolist() == list(range(242)) for _, labels in both)
    (tmp_path / "omniglot").mkdir()
    for archive in source.glob("images_background_small*.zip"):
        shutil.copy(archive, tmp_path / "omniglot")
    monkeypatch.setenv("BAYESAE_DATA", str(tmp_path))
    again = bae.datasets.load("omniglot", split=("train", "test"), labels=True)
    for (x, labels), (y, others) in zip(both, again, strict=True):
        assert torch.equal(labels, others)
        assert torch.equal(x, y)


def test_offline_says_which_file_to_put_where(tmp_path, monkeypatch):
    def offline(url, timeout):
        raise OSError("no network in this test")

    monkeypatch.setenv("BAYESAE_DATA", str(tmp_path))
    monkeypatch.setenv("BAYESAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("urllib.request.urlopen", offline)
    with pytest.raises(bae.errors.DataError, match=r"omniglot/images_background_small1\.zip under"):
        bae.datasets.load("omniglot")
    (tmp_path / "omniglot").mkdir()
    (tmp_path / "omniglot" / "images_background_small1.zip").write_bytes(b"nothing")
    with pytest.raises(bae.errors.DataError, match="a zip archive"):
        bae.datasets.load("omniglot")
