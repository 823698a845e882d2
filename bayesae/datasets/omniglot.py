"""Omniglot's eight small-set alphabets at 28 x 28, from the original archives or a converted copy of them."""

from __future__ import annotations

import io
import zipfile

import numpy as np

from bayesae.datasets.files import find, look
from bayesae.errors import DataError

__all__ = ["read_omniglot"]

_URL = "https://raw.githubusercontent.com/brendenlake/omniglot/057f034baf2ecb8530bc5710e5a23584d2a519cc/python/"
_ARCHIVES = {
    "images_background_small1.zip": "e704a628b5459e08445c13499850abc4",
    "images_background_small2.zip": "b75a71a51d3b13f821f212756fe481fd",
}
_CONVERTED = "omniglot/omniglot_subset_28x28.npz"
_SIDE, _FULL = 28, 105
_FIRST_TEST_DRAWER = 17


def read_omniglot(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images and characters of a split: drawers 1 to 16 train, 17 to 20 test.

    Args:
        split: "train" or "test".

    Returns:
        uint8 images (N, 28, 28), ink bright, and character numbers (N,) int64, 0 to 241, ordered by alphabet.

    Raises:
        DataError: If the archives are nowhere and cannot be downloaded, or are not the originals.
    """
    converted = look([_CONVERTED])
    if converted is None:
        images, characters, drawers = _convert()
    else:
        with np.load(converted, allow_pickle=False) as content:
            images, characters, drawers = content["images"], content["character"], content["drawer"]
    chosen = (drawers >= _FIRST_TEST_DRAWER) == (split == "test")
    return images[chosen], characters[chosen].astype(np.int64)


def _convert() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images, characters and drawers of both archives, each character once, in the order of their names."""
    files: dict[str, bytes] = {}
    for name, md5 in _ARCHIVES.items():
        path = find(_URL + name, md5, (f"omniglot/{name}",))
        try:
            with zipfile.ZipFile(path) as archive:
                for member in archive.namelist():
                    if member.endswith(".png") and not member.startswith("__MACOSX"):
                        files[member.split("/", 1)[1]] = archive.read(member)
        except zipfile.BadZipFile as error:
            raise DataError("a zip archive", f"{name}: {error}", "Delete it and load again.") from error
    names = sorted(files, key=lambda name: (name.rsplit("/", 1)[0], _drawer(name)))
    kinds = sorted({name.rsplit("/", 1)[0] for name in names})
    characters = np.array([kinds.index(name.rsplit("/", 1)[0]) for name in names])
    images = np.stack([_shrunk(files[name]) for name in names])
    return images, characters, np.array([_drawer(name) for name in names])


def _drawer(name: str) -> int:
    return int(name.rsplit("_", 1)[1].removesuffix(".png"))


def _shrunk(png: bytes) -> np.ndarray:
    """Black ink on white, 105 x 105, to bright ink, 28 x 28, by exact averages over areas."""
    from matplotlib.image import imread  # slow to import

    ink = 1 - np.asarray(imread(io.BytesIO(png)), dtype=np.float64)
    edges = np.linspace(0, _FULL, _SIDE + 1)
    low, high = edges[:-1, None], edges[1:, None]
    pixels = np.arange(_FULL)
    share = np.clip(np.minimum(high, pixels + 1) - np.maximum(low, pixels), 0, None) / (high - low)
    return np.rint(share @ ink @ share.T * 255).astype(np.uint8)
