"""Tables with labelled anomalies from ADBench, split so that equal rows stay together."""

from __future__ import annotations

import hashlib
from typing import Literal, NamedTuple

import numpy as np

from bayesae.datasets.files import find
from bayesae.errors import DataError

__all__ = ["TABLES", "Table", "split_rows"]

_URL = (
    "https://raw.githubusercontent.com/Minqi824/ADBench/3dac8221081e190f157d78e93bfa8867f90d0965"
    "/adbench/datasets/Classical/"
)


class Table(NamedTuple):
    """One table's file.

    Args:
        file: Its name, below ``adbench/`` under a data root.
        md5: Its checksum.
    """

    file: str
    md5: str

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Read the whole table.

        Returns:
            Values (N, D) as float64, in their own units, and labels (N,) as int64, 1 for an anomaly.

        Raises:
            DataError: If the file is nowhere and cannot be downloaded, or is not the original.
        """
        path = find(_URL + self.file, self.md5, (f"adbench/{self.file}",))
        found = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
        if found != self.md5:
            raise DataError(f"{self.file} with md5 {self.md5}", found, "It is not the original: load it again.")
        with np.load(path, allow_pickle=False) as content:
            return content["X"].astype(np.float64), content["y"].astype(np.int64).ravel()


TABLES = {
    "adbench/annthyroid": Table("2_annthyroid.npz", "74ef1a81e5ea99f8f4301955ac098dcb"),
    "adbench/breastw": Table("4_breastw.npz", "96e58457dfc23008bed3c92aa588508f"),
    "adbench/cardio": Table("6_cardio.npz", "3724aeab845964e929fd8d3d95475490"),
    "adbench/fault": Table("12_fault.npz", "c86d624d8e1d20ed5a1de05fb5d20731"),
    "adbench/ionosphere": Table("18_Ionosphere.npz", "94f5d86d158c4d7b22d980c0e0960a5f"),
    "adbench/mammography": Table("23_mammography.npz", "9334c15017223999eb2cbd0458ec1874"),
    "adbench/musk": Table("25_musk.npz", "758440ea2aa4cdc8050cfcfd28e08679"),
    "adbench/pendigits": Table("28_pendigits.npz", "fbb543e7858febad363f41067c2e68d2"),
    "adbench/satellite": Table("30_satellite.npz", "8a6ac72b1cdc1174f255af1400ac6f2f"),
    "adbench/shuttle": Table("32_shuttle.npz", "e9a3feba52aae57bfa914accf65a049a"),
    "adbench/thyroid": Table("38_thyroid.npz", "92ecac40ecc0e8a721a7f22aea27968a"),
    "adbench/wdbc": Table("43_WDBC.npz", "00be8f7a21c461d68152a9db0b16875c"),
    "adbench/wilt": Table("44_Wilt.npz", "87b6945a02fd23a290365606105333df"),
}
"""Tables by the name that `load` knows."""


def split_rows(values: np.ndarray, labels: np.ndarray, split: Literal["train", "test"], seed: int) -> np.ndarray:
    """Row numbers of a split: half of the normal rows train, all others test.

    Rows with equal values fall on one side together, and on the test side if one of them is an anomaly: a copy
    of a test row in the training set would be no test. Whole groups are drawn until half of the normal rows are
    reached, so that tables with many copies train on a few more than half.

    Args:
        values: (N, D).
        labels: (N,), 1 for an anomaly.
        split: "train" or "test".
        seed: Of the draw.

    Returns:
        Row numbers in their order in the file, int64.
    """
    _, group = np.unique(values, axis=0, return_inverse=True)
    group = group.ravel()
    size = np.bincount(group)
    is_clean = np.bincount(group, weights=labels) == 0
    order = np.random.RandomState(seed).permutation(np.flatnonzero(is_clean))
    n_before = np.cumsum(size[order]) - size[order]
    drawn = order[n_before < (labels == 0).sum() / 2]
    is_train = np.isin(group, drawn)
    return np.flatnonzero(is_train if split == "train" else ~is_train)
