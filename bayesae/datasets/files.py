"""Where files of data sets are: under ``$BAYESAE_DATA``, in the cache folder, or downloaded there once."""

from __future__ import annotations

import hashlib
import os
import tempfile
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from bayesae.errors import DataError

__all__ = ["find", "look"]


def look(places: Sequence[str]) -> Path | None:
    """The path of a file that is here: under ``$BAYESAE_DATA``, or in the cache folder.

    Args:
        places: Paths below a data root where it may lie.

    Returns:
        The first there is, or None.
    """
    roots = [Path(root) for root in (os.environ.get("BAYESAE_DATA"), _cache()) if root]
    found = (root / place for root in roots for place in places if (root / place).exists())
    return next(found, None)


def find(url: str, md5: str, places: Sequence[str]) -> Path:
    """The path of a file, downloaded where it is nowhere yet.

    Looked for under ``$BAYESAE_DATA`` (never written to) and in the cache folder (``$BAYESAE_CACHE``, or
    ``~/.cache/bayesae``), else downloaded to the cache.

    Args:
        url: Where it is downloaded from.
        md5: Checksum that a download must have.
        places: Paths below a data root where it may lie; a download goes to the first.

    Returns:
        The path.

    Raises:
        DataError: If the file is nowhere and cannot be downloaded, or the download is damaged.
    """
    return look(places) or _download(url, md5, places[0], _cache() / places[0])


def _cache() -> Path:
    return Path(os.environ.get("BAYESAE_CACHE", Path.home() / ".cache" / "bayesae"))


def _download(url: str, md5: str, place: str, path: Path) -> Path:
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            content = response.read()
    except (urllib.error.URLError, OSError) as error:
        raise DataError(
            f"{place} under $BAYESAE_DATA or a connection to download it",
            f"neither ({error})",
            f"Offline, put the original file there and set BAYESAE_DATA to the folder above {place.split('/')[0]}.",
        ) from error
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != md5:
        raise DataError(f"{path.name} with md5 {md5}", found, "The download is damaged: try again.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    # atomic: two processes may download at once
    Path(file.name).replace(path)
    return path
