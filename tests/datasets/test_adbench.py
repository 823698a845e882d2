from __future__ import annotations

import hashlib
import io

import numpy as np
import pytest
import torch

import bayesae as bae
from bayesae.datasets import adbench
from bayesae.datasets.adbench import TABLES, Table, split_rows

NAME = "adbench/thyroid"


@pytest.fixture
def table():
    """Forty rows: copies among the normal ones, and one anomaly that equals two normal rows."""
    generator = np.random.default_rng(0)
    values = generator.integers(0, 9, (40, 3)).astype(np.float64)
    values[10:16] = values[0]
    values[30:32], labels = values[39], np.r_[np.zeros(34, int), np.ones(6, int)]
    return values, labels


@pytest.fixture
def root(tmp_path, table, monkeypatch):
    buffer = io.BytesIO()
    np.savez(buffer, X=table[0], y=table[1])
    content = buffer.getvalue()
    monkeypatch.setitem(
        adbench.TABLES, NAME, Table("38_thyroid.npz", hashlib.md5(content, usedforsecurity=False).hexdigest())
    )
    (tmp_path / "data" / "adbench").mkdir(parents=True)
    (tmp_path / "data" / "adbench" / "38_thyroid.npz").write_bytes(content)
    monkeypatch.setenv("BAYESAE_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("BAYESAE_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_splits_share_no_row_and_lose_none(root, table):
    values, labels = table
    (train, zeros), (test, found) = bae.datasets.load(NAME, split=("train", "test"), labels=True)
    assert train.dtype == torch.float64 and found.dtype == torch.int64 and not zeros.any()
    assert len(train) + len(test) == len(values) and found.sum() == labels.sum()
    assert not {tuple(row) for row in train.tolist()} & {tuple(row) for row in test.tolist()}
    both = np.concatenate([train.numpy(), test.numpy()])
    np.testing.assert_array_equal(both[np.lexsort(both.T)], values[np.lexsort(values.T)])
    assert torch.equal(train, bae.datasets.load(NAME, seed=0))
    assert not torch.equal(bae.datasets.load(NAME, seed=1), bae.datasets.load(NAME, seed=2))


@pytest.mark.parametrize("seed", range(5))
def test_half_of_the_normal_rows_train(seed):
    generator = np.random.default_rng(seed)
    values, labels = generator.normal(size=(101, 2)), np.r_[np.zeros(90, int), np.ones(11, int)]
    train, test = (split_rows(values, labels, split, seed) for split in ("train", "test"))
    assert len(train) == 45 and not labels[train].any()
    assert sorted([*train, *test]) == list(range(101))
    assert (np.diff(train) > 0).all()


def test_a_file_that_is_not_the_original_is_refused(root):
    path = root / "data" / "adbench" / "38_thyroid.npz"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(bae.errors.DataError, match=r"38_thyroid.npz with md5.*not the original"):
        bae.datasets.load(NAME)


def test_downloads_from_the_named_commit(root, monkeypatch):
    path = root / "data" / "adbench" / "38_thyroid.npz"
    content, calls = path.read_bytes(), []
    path.unlink()

    def fetch(url, timeout):
        calls.append(url)
        return io.BytesIO(content)

    monkeypatch.setattr("urllib.request.urlopen", fetch)
    first, second = (bae.datasets.load(NAME) for _ in range(2))
    assert torch.equal(first, second)
    (url,) = calls
    assert "/3dac8221081e190f157d78e93bfa8867f90d0965/adbench/datasets/Classical/38_thyroid.npz" in url
    assert (root / "cache" / "adbench" / "38_thyroid.npz").exists()


def test_offline_says_what_to_do(root, monkeypatch):
    def offline(url, timeout):
        raise OSError("no network in this test")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    with pytest.raises(bae.errors.DataError, match=r"adbench/44_Wilt.npz.*folder above adbench"):
        bae.datasets.load("adbench/wilt")


def test_images_have_one_split():
    with pytest.raises(bae.errors.DataError, match="no seed for images"):
        bae.datasets.load("digits", seed=1)


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "n", "n_columns", "n_anomalies"),
    [
        ("annthyroid", 7200, 6, 534), ("breastw", 683, 9, 239), ("cardio", 1831, 21, 176), ("fault", 1941, 27, 673),
        ("ionosphere", 351, 32, 126), ("mammography", 11183, 6, 260), ("musk", 3062, 166, 97),
        ("pendigits", 6870, 16, 156), ("satellite", 6435, 36, 2036), ("shuttle", 49097, 9, 3511),
        ("thyroid", 3772, 6, 93), ("wdbc", 367, 30, 10), ("wilt", 4819, 5, 257),
    ],
)  # fmt: skip
def test_real_tables(name, n, n_columns, n_anomalies):
    (train, _), (test, labels) = bae.datasets.load(f"adbench/{name}", split=("train", "test"), labels=True)
    assert len(train) + len(test) == n and train.shape[1] == n_columns and labels.sum() == n_anomalies
    # whole groups of equal rows are drawn: a few rows more than half
    assert 0 <= len(train) - (n - n_anomalies) / 2 <= 0.02 * n
    assert len(TABLES) == 13
