"""The idx files of MNIST and its successors: read gzip'd as they are, downloaded with pinned checksums."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bayesae.datasets.files import find
from bayesae.errors import DataError

__all__ = ["IdxSource", "read_idx"]

_FILES = {
    ("train", "images"): "train-images-idx3-ubyte.gz",
    ("train", "labels"): "train-labels-idx1-ubyte.gz",
    ("test", "images"): "t10k-images-idx3-ubyte.gz",
    ("test", "labels"): "t10k-labels-idx1-ubyte.gz",
}


def read_idx(path: Path) -> np.ndarray:
    """Read one gzip'd idx file of bytes.

    Args:
        path: The ``.gz`` file.

    Returns:
        uint8, of the shape that its header gives.

    Raises:
        DataError: If it is no idx file of bytes, or is cut short.
    """
    try:
        with gzip.open(path) as file:
            content = file.read()
    except (OSError, EOFError) as error:
        raise DataError("a gzip'd idx file", f"{path.name}: {error}", "Delete it and load again.") from error
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise DataError("an idx file of bytes", f"{path.name} beginning {content[:4]!r}", "Is it the original?")
    n_axes = content[3]
    shape = np.frombuffer(content, ">u4", n_axes, 4).astype(int)
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * n_axes)
    if len(values) != shape.prod():
        raise DataError(f"{shape.prod()} bytes in {path.name}", f"{len(values)}", "The file is cut short.")
    return values.reshape(shape)


@dataclass(frozen=True)
class IdxSource:
    """Where one data set's four files are.

    Args:
        folder: Its folder's name below a data root; files lie in ``folder/raw`` or ``folder``.
        url: Where they are downloaded from.
        md5: Checksum of each downloaded file, by file name, as its publisher's users pin it.
    """

    folder: str
    url: str
    md5: dict[str, str]

    def read(self, split: str, what: str) -> np.ndarray:
        """Read ``images`` or ``labels`` of a split.

        Args:
            split: "train" or "test".
            what: "images" or "labels".

        Returns:
            uint8.

        Raises:
            DataError: If the file is nowhere and cannot be downloaded.
        """
        name = _FILES[split, what]
        return read_idx(find(self.url + name, self.md5[name], (f"{self.folder}/raw/{name}", f"{self.folder}/{name}")))
