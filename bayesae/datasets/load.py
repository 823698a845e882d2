"""`load`: a data set by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias, overload

import numpy as np
import torch
from torch import Tensor

from bayesae.datasets.adbench import TABLES, split_rows
from bayesae.datasets.idx import IdxSource
from bayesae.datasets.omniglot import read_omniglot
from bayesae.datasets.uci import UCI_TABLES
from bayesae.errors import DataError

__all__ = ["NAMES", "load"]

Split: TypeAlias = Literal["train", "test"]

_IDX = {
    "mnist": IdxSource(
        "MNIST",
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        {
            "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
            "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
            "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
        },
    ),
    "fashion-mnist": IdxSource(
        "FashionMNIST",
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        {
            "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
            "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
            "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
        },
    ),
    "kmnist": IdxSource(
        "KMNIST",
        "http://codh.rois.ac.jp/kmnist/dataset/kmnist/",
        {
            "train-images-idx3-ubyte.gz": "bdb82020997e1d708af4cf47b453dcf7",
            "train-labels-idx1-ubyte.gz": "e144d726b3acfaa3e44228e80efcd344",
            "t10k-images-idx3-ubyte.gz": "5c965bf0a639b31b8f53240b1b52f4d7",
            "t10k-labels-idx1-ubyte.gz": "7320c461ea6c1c855c0b718fb2a4b134",
        },
    ),
}
NAMES = ("digits", *_IDX, "omniglot", *TABLES, *UCI_TABLES)
"""Names that `load` knows."""


@overload
def load(name: str = ..., *, split: Split = ..., labels: Literal[False] = ..., seed: int | None = ...) -> Tensor: ...
@overload
def load(
    name: str = ..., *, split: Split = ..., labels: Literal[True], seed: int | None = ...
) -> tuple[Tensor, Tensor]: ...
@overload
def load(
    name: str = ..., *, split: tuple[Split, ...] | list[Split], labels: Literal[False] = ..., seed: int | None = ...
) -> tuple[Tensor, ...]: ...
@overload
def load(
    name: str = ..., *, split: tuple[Split, ...] | list[Split], labels: Literal[True], seed: int | None = ...
) -> tuple[tuple[Tensor, Tensor], ...]: ...
def load(
    name: str = "digits",
    *,
    split: Split | Sequence[Split] = "train",
    labels: bool = False,
    seed: int | None = None,
) -> Tensor | tuple[Tensor, ...] | tuple[tuple[Tensor, Tensor], ...]:
    """Load a data set by name: images as float32 in [0, 1], tables as float64 in their own units.

    ``digits`` comes with scikit-learn: 1,797 images of 8 x 8, of which a fixed random fifth (359) is the test
    split. The MNIST family is 60,000 + 10,000 images of 28 x 28, read from gzip'd idx files under ``$BAYESAE_DATA`` as
    they are, or downloaded once to a cache folder. ``omniglot`` is eight alphabets of handwritten characters (the small
    background sets), 28 x 28 by averages over areas, bright ink: 3,872 images of drawers 1 to 16, and 968 of the others
    as the test split; labels are characters (0 to 241). It is not the 28 x 28 version of the importance-weighted
    autoencoder papers: likelihoods do not compare with theirs.

    The tables ``adbench/...`` have labelled anomalies and no official split: a random half of the normal rows is
    the training split (labels all 0), and the other half with all anomalies (label 1) is the test split. Rows with
    equal values fall on one side together, on the test side if one of them is an anomaly.

    The tables ``uci/...`` (of features; labels are the regression targets, float64) are read from ``$BAYESAE_DATA`` and
    never downloaded. Concrete, kin8nm, power-plant, protein, wine-red and yacht have the standard 90/10 splits of the
    Bayesian regression benchmark, and ``seed`` is the number of one; letter, spambase and wine-white are split at
    random, a tenth for the test, equal rows together. The first two of these have no target, nor has miniboone, of
    which only the published validation part (here "train") and test part are there.

    Args:
        name: One of `NAMES`.
        split: "train", "test", or a sequence of them.
        labels: Give (rows, labels) for every split in place of rows.
        seed: Of a table's split, or its number; None is 0. Images have one split.

    Returns:
        Images (N, 1, height, width) or a table's rows (N, D), or (rows, labels) with labels (N,) int64, or
        float64 targets; a tuple of these if ``split`` is a sequence.

    Raises:
        DataError: If the name or split is unknown, a file is neither here nor can be downloaded, a seed is given
            for images or is no split's number, or a table has no labels.

    Example:
        >>> train, test = load("digits", split=("train", "test"))
        >>> tuple(train.shape), tuple(test.shape)
        ((1438, 1, 8, 8), (359, 1, 8, 8))
    """
    if not isinstance(split, str):
        return tuple(load(name, split=one, labels=labels, seed=seed) for one in split)  # pyright: ignore[reportReturnType]
    if name not in NAMES or split not in ("train", "test"):
        raise DataError(f"a name of {NAMES} and a split 'train' or 'test'", f"{name!r}, {split!r}", "See load().")
    if name in TABLES:
        values, anomalies = TABLES[name].read()
        chosen = split_rows(values, anomalies, split, 0 if seed is None else seed)
        rows = torch.from_numpy(values[chosen])
        return (rows, torch.from_numpy(anomalies[chosen])) if labels else rows
    if name in UCI_TABLES:
        values, goals = UCI_TABLES[name].read(split, seed)
        if not labels:
            return torch.from_numpy(values)
        if goals is None:
            raise DataError("a table with a target", f"labels of {name!r}, which has none", "Leave labels= out.")
        return torch.from_numpy(values), torch.from_numpy(goals)
    if seed is not None:
        raise DataError("no seed for images", f"seed={seed} for {name!r}", "Their split is fixed; leave it out.")
    if name == "digits":
        images, targets = _digits(split)
    elif name == "omniglot":
        values, characters = read_omniglot(split)
        images, targets = torch.from_numpy(values).float().div_(255), torch.from_numpy(characters)
    else:
        images = torch.from_numpy(_IDX[name].read(split, "images").copy()).float().div_(255)
        targets = torch.from_numpy(_IDX[name].read(split, "labels").astype(np.int64)) if labels else None
    images = images[:, None]
    return images if targets is None or not labels else (images, targets)


def _digits(split: Split) -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits  # slow to import

    pixels, targets = load_digits(return_X_y=True)
    images = np.asarray(pixels).reshape(-1, 8, 8)
    targets = np.asarray(targets)
    # a fixed permutation, as the file's order goes by writer
    order = np.random.RandomState(0).permutation(len(images))
    n_test = len(images) // 5
    chosen = order[n_test:] if split == "train" else order[:n_test]
    return torch.as_tensor(images[chosen] / 16, dtype=torch.float32), torch.as_tensor(targets[chosen].astype(np.int64))
