"""UCI tables: their splits, and files that are not there or not the original."""

from __future__ import annotations

import hashlib
import io

import numpy as np
import pytest
import torch

import bayesae as bae
from bayesae.datasets import uci


@pytest.fixture
def put(tmp_path, monkeypatch):
    """Write a table as a file of the given name, and take its checksum as the original's."""
    monkeypatch.setenv("BAYESAE_DATA", str(tmp_path))
    monkeypatch.setenv("BAYESAE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "uci").mkdir()

    def write(name, **arrays):
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        md5 = hashlib.md5(buffer.getvalue(), usedforsecurity=False).hexdigest()
        monkeypatch.setitem(uci.UCI_TABLES, f"uci/{name}", uci.UciTable(name, md5))
        (tmp_path / "uci" / f"{name}.npz").write_bytes(buffer.getvalue())
        return tmp_path / "uci" / f"{name}.npz"

    return write


def test_standard_splits_by_their_number(put):
    x, y = np.arange(20).reshape(10, 2), np.arange(10)
    put("yacht", X=x, y=y, test_index=np.array([[1, 4], [0, 9]]))
    (train, goals), (test, others) = bae.datasets.load("uci/yacht", split=("train", "test"), labels=True, seed=1)
    assert test.tolist() == x[[0, 9]].tolist() and others.tolist() == [0, 9]
    assert train.dtype == goals.dtype == torch.float64 and goals.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert bae.datasets.load("uci/yacht", split="test").tolist() == x[[1, 4]].tolist()
    with pytest.raises(bae.errors.DataError, match="a split 0 to 1 as seed; got 2"):
        bae.datasets.load("uci/yacht", seed=2)


def test_random_splits_keep_equal_rows_together(put):
    x = np.random.RandomState(0).randint(0, 40, (300, 1))
    put("letter", X=x.astype(np.uint8))
    train, test = bae.datasets.load("uci/letter", split=("train", "test"), seed=3)
    assert not set(train.flatten().tolist()) & set(test.flatten().tolist())
    assert len(train) + len(test) == 300 and 30 <= len(test) < 60
    assert not torch.equal(test, bae.datasets.load("uci/letter", split="test", seed=4))
    with pytest.raises(bae.errors.DataError, match="a table with a target"):
        bae.datasets.load("uci/letter", labels=True)


def test_a_fixed_split(put):
    put("miniboone", X_val=np.zeros((3, 2), np.float32), X_test=np.ones((2, 2), np.float32))
    train, test = bae.datasets.load("uci/miniboone", split=("train", "test"))
    assert train.tolist() == [[0, 0]] * 3 and test.tolist() == [[1, 1]] * 2 and train.dtype == torch.float64
    with pytest.raises(bae.errors.DataError, match="no seed for uci/miniboone"):
        bae.datasets.load("uci/miniboone", seed=0)


def test_files_that_are_not_there_or_not_the_original(put):
    with pytest.raises(bae.errors.DataError, match=r"uci/kin8nm.npz under .BAYESAE_DATA.*folder above uci"):
        bae.datasets.load("uci/kin8nm")
    path = put("yacht", X=np.zeros((4, 2)))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(bae.errors.DataError, match=r"uci/yacht.npz with md5.*not the original"):
        bae.datasets.load("uci/yacht")


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "n_train", "n_test", "n_columns"),
    [
        ("concrete", 927, 103, 8), ("kin8nm", 7373, 819, 8), ("letter", None, None, 16), ("miniboone", 3284, 3648, 43),
        ("power-plant", 8611, 957, 4), ("protein", 41157, 4573, 9), ("spambase", None, None, 57),
        ("wine-red", 1439, 160, 11), ("wine-white", None, None, 11), ("yacht", 277, 31, 6),
    ],
)  # fmt: skip
def test_real_tables(name, n_train, n_test, n_columns):
    train, test = bae.datasets.load(f"uci/{name}", split=("train", "test"))
    assert train.shape[1] == test.shape[1] == n_columns
    if n_train is None:
        assert abs(len(test) / (len(train) + len(test)) - 0.1) < 0.01
    else:
        assert (len(train), len(test)) == (n_train, n_test)
    assert bool(train.isfinite().all())
