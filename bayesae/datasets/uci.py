"""Tables of numbers from the UCI repository and its kin, with the splits that regression benchmarks use."""

from __future__ import annotations

import hashlib
from typing import Literal, NamedTuple

import numpy as np

from bayesae.datasets.files import look
from bayesae.errors import DataError

__all__ = ["UCI_TABLES", "UciTable"]

_TEST_SHARE = 0.1


class UciTable(NamedTuple):
    """One table's file.

    Args:
        name: Of the file, below ``uci/`` under a data root, without its ending.
        md5: Its checksum.
    """

    name: str
    md5: str

    def read(self, split: Literal["train", "test"], seed: int | None) -> tuple[np.ndarray, np.ndarray | None]:
        """Read the rows of a split.

        Args:
            split: "train" or "test".
            seed: Number of one of the standard splits where the table has such, else the seed of a random one, in
                which equal rows stay together; None is 0.

        Returns:
            Values (N, D) in their own units, and targets (N,) or None where the table has none, float64.

        Raises:
            DataError: If the file is nowhere or not the original, there is no such split, or a seed is given for a
                table that is split once and for all.
        """
        content = self._content()
        if "X_test" in content:
            if seed is not None:
                fix = "Its split is fixed; leave it out."
                raise DataError(f"no seed for uci/{self.name}", f"seed={seed}", fix)
            return content["X_test" if split == "test" else "X_val"].astype(np.float64), None
        values, number = content["X"].astype(np.float64), 0 if seed is None else seed
        if "test_index" not in content:
            test = _random_split(values, number)
        elif 0 <= number < len(content["test_index"]):
            test = content["test_index"][number]
        else:
            n_splits = len(content["test_index"])
            raise DataError(f"a split 0 to {n_splits - 1} as seed", f"{seed}", "Its splits are the standard ones.")
        is_test = np.zeros(len(values), dtype=bool)
        is_test[test] = True
        chosen = is_test if split == "test" else ~is_test
        return values[chosen], content["y"].astype(np.float64)[chosen] if "y" in content else None

    def _content(self) -> dict[str, np.ndarray]:
        place = f"uci/{self.name}.npz"
        path = look([place])
        if path is None:
            fix = "It is not downloaded: put the file there and set BAYESAE_DATA to the folder above uci."
            raise DataError(f"{place} under $BAYESAE_DATA", "no such file", fix)
        found = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
        if found != self.md5:
            raise DataError(f"{place} with md5 {self.md5}", found, "It is not the original: put it there again.")
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}


def _random_split(values: np.ndarray, seed: int) -> np.ndarray:
    """Row numbers of a random tenth, whole groups of equal rows until it is reached."""
    _, group = np.unique(values, axis=0, return_inverse=True)
    group = group.ravel()
    size = np.bincount(group)
    order = np.random.RandomState(seed).permutation(len(size))
    n_before = np.cumsum(size[order]) - size[order]
    return np.flatnonzero(np.isin(group, order[n_before < _TEST_SHARE * len(values)]))


UCI_TABLES = {
    "uci/concrete": UciTable("concrete", "57349fe510e877b56f5fece54b01d62e"),
    "uci/kin8nm": UciTable("kin8nm", "cd4a81602cba8c25a24bc75198cda07a"),
    "uci/letter": UciTable("letter", "ae06f5f134fab02270356262f3557088"),
    "uci/miniboone": UciTable("miniboone_maf_subset", "047f58f11b9713f1f3c68a01c95c79b3"),
    "uci/power-plant": UciTable("power_plant", "174eb5f202132a42c3e4f34665bb9ed4"),
    "uci/protein": UciTable("protein", "50d514ac3ab4c1cea19007dead538a59"),
    "uci/spambase": UciTable("spambase", "fd54fa94c090605e5c2a5c766d511f91"),
    "uci/wine-red": UciTable("wine_red", "0a19902c0d7a91f32c59ea312984ccb1"),
    "uci/wine-white": UciTable("wine_white", "20f6d9d1b8fb50f688a623f4a05e1858"),
    "uci/yacht": UciTable("yacht", "60bd56d218906af17d23c89ffd68dc27"),
}
"""Tables by the name that `load` knows."""
