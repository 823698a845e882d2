"""The idx files of MNIST and its successors: read gzip'd as they are, downloaded with pinned checksums."""

from __future__ import annotations

import gzip
import hashlib
import os
import tempfile
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import numpy as np

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

        Looked for under ``$BAYESAE_DATA`` (never written to) and in the cache folder (``$BAYESAE_CACHE``, or
        ``~/.cache/bayesae``), else downloaded to the cache.

        Args:
            split: "train" or "test".
            what: "images" or "labels".

        Returns:
            uint8.

        Raises:
            DataError: If the file is nowhere and cannot be downloaded.
        """
        name = _FILES[split, what]
        cache = Path(os.environ.get("BAYESAE_CACHE", Path.home() / ".cache" / "bayesae"))
        roots = [Path(root) for root in (os.environ.get("BAYESAE_DATA"), cache) if root]
        for root in roots:
            for path in (root / self.folder / "raw" / name, root / self.folder / name):
                if path.exists():
                    return read_idx(path)
        return read_idx(self._download(name, cache / self.folder / "raw" / name))

    def _download(self, name: str, path: Path) -> Path:
        try:
            with urllib.request.urlopen(self.url + name, timeout=30) as response:
                content = response.read()
        except (urllib.error.URLError, OSError) as error:
            raise DataError(
                f"{self.folder}/raw/{name} under $BAYESAE_DATA or a connection to download it",
                f"neither ({error})",
                f"Offline, put the original file there and set BAYESAE_DATA to the folder above {self.folder}.",
            ) from error
        found = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if found != self.md5[name]:
            raise DataError(f"{name} with md5 {self.md5[name]}", found, "The download is damaged: try again.")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(content)
        # atomic: two processes may download at once
        Path(file.name).replace(path)
        return path
