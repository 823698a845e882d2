from __future__ import annotations

import gzip
import hashlib
import struct

import numpy as np
import pytest
import torch

import bayesae as bae
from bayesae.datasets.idx import IdxSource, read_idx

FILES = {
    "train-images-idx3-ubyte.gz": (6, 28, 28),
    "train-labels-idx1-ubyte.gz": (6,),
    "t10k-images-idx3-ubyte.gz": (4, 28, 28),
    "t10k-labels-idx1-ubyte.gz": (4,),
}


def write_idx(path, array):
    header = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wb") as file:
        file.write(header + array.tobytes())


@pytest.fixture
def files():
    generator = np.random.default_rng(0)
    return {
        name: generator.integers(0, 256 if len(shape) == 3 else 10, shape, np.uint8) for name, shape in FILES.items()
    }


@pytest.fixture
def root(tmp_path, files, monkeypatch):
    for name, array in files.items():
        write_idx(tmp_path / "data" / "MNIST" / "raw" / name, array)
    monkeypatch.setenv("BAYESAE_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("BAYESAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("urllib.request.urlopen", offline)
    return tmp_path


def offline(url, timeout):
    raise OSError("no network in this test")


def test_reads_gzipped_files_as_they_are(root, files):
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    (images, labels), (test, _) = bae.datasets.load("mnist", split=("train", "test"), labels=True)
    assert images.shape == (6, 1, 28, 28) and test.shape == (4, 1, 28, 28) and images.dtype == torch.float32
    assert np.array_equal((images[:, 0] * 255).round().numpy(), files["train-images-idx3-ubyte.gz"])
    assert np.array_equal(labels.numpy(), files["train-labels-idx1-ubyte.gz"]) and labels.dtype == torch.int64
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before  # nothing unpacked or touched


def test_offline_says_what_to_do(root):
    with pytest.raises(
        bae.errors.DataError, match=r"KMNIST/raw/train-images.*set BAYESAE_DATA to the folder above KMNIST"
    ):
        bae.datasets.load("kmnist", split="train")
    assert not (root / "cache").exists()


def test_downloads_once_and_checks(root, files, monkeypatch):
    name = "train-images-idx3-ubyte.gz"
    content = (root / "data" / "MNIST" / "raw" / name).read_bytes()
    calls = []

    class Response:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def read(self):
            return content

    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: calls.append(url) or Response())
    source = IdxSource("NEW", "https://example.org/", {name: hashlib.md5(content).hexdigest()})
    for _ in range(2):
        assert np.array_equal(source.read("train", "images"), files[name])
    assert calls == [f"https://example.org/{name}"]
    assert [path.name for path in (root / "cache" / "NEW" / "raw").iterdir()] == [name]
    damaged = IdxSource("OTHER", "https://example.org/", {name: "0" * 32})
    with pytest.raises(bae.errors.DataError, match="md5 0000"):
        damaged.read("train", "images")
    assert not (root / "cache" / "OTHER").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not gzip", "gzip'd idx file"),
        (gzip.compress(b"\1\2\3\4rest"), "idx file of bytes"),
        (gzip.compress(b"\0\0\x08\1" + struct.pack(">I", 9) + b"abc"), "9 bytes"),
    ],
    ids=["no gzip", "other type", "too short"],  # not the bytes: they hold the time
)
def test_damaged_files(tmp_path, content, message):
    path = tmp_path / "x.gz"
    path.write_bytes(content)
    with pytest.raises(bae.errors.DataError, match=message):
        read_idx(path)


def test_digits_are_the_default_and_split_once():
    train, test = bae.datasets.load(split=("train", "test"))
    assert len(train) + len(test) == 1797
    assert float(train.min()) == 0 and float(train.max()) == 1
    both = torch.cat([train, test]).flatten(1)
    assert len(torch.unique(both, dim=0)) == len(both)  # no image is in both
    assert torch.equal(train, bae.datasets.load("digits", split="train"))
    images, labels = bae.datasets.load("digits", split="test", labels=True)
    assert torch.equal(images, test) and labels.shape == (359,)


@pytest.mark.parametrize(("name", "split"), [("cifar", "train"), ("digits", "valid")])
def test_unknown_names(name, split):
    with pytest.raises(bae.errors.DataError, match="a name of"):
        bae.datasets.load(name, split=split)


@pytest.mark.data
class TestRealFiles:
    @pytest.mark.parametrize(
        ("name", "split", "n", "mean"),
        [
            ("mnist", "train", 60_000, 0.1307),
            ("mnist", "test", 10_000, 0.1325),
            ("fashion-mnist", "train", 60_000, 0.2860),
            ("fashion-mnist", "test", 10_000, 0.2868),
            ("kmnist", "test", 10_000, 0.1846),
        ],
    )
    def test_loads(self, name, split, n, mean):
        images, labels = bae.datasets.load(name, split=split, labels=True)
        assert images.shape == (n, 1, 28, 28) and len(labels) == n
        assert float(images.mean()) == pytest.approx(mean, abs=2e-3)

    def test_kmnist_train_is_said_to_be_missing(self, tmp_path, monkeypatch):
        monkeypatch.setenv("BAYESAE_CACHE", str(tmp_path))
        monkeypatch.setattr("urllib.request.urlopen", offline)
        with pytest.raises(bae.errors.DataError, match="KMNIST/raw/train-images"):
            bae.datasets.load("kmnist", split="train")
