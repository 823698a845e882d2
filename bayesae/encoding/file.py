"""The file that values go into: one safetensors file with metadata and a checksum."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor

from bayesae.encoding.values import DTYPES, short
from bayesae.errors import FileError, UnsupportedError

__all__ = ["read", "write"]

_VERSION = 1
_MAX_HEADER = 2**26  # bytes; a network of 100 000 tensors takes 20 MB
_DIGEST = re.compile(rb'"sha256":"([0-9a-f]{64})"')  # inside a JSON string its quotes would be escaped
_DAMAGED = "Copy the file again from where it was written."


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors and metadata as one safetensors file, whole or not at all.

    The file's header holds the format, its version, the metadata as JSON and a SHA-256 of every other byte. It is
    written beside ``path`` under a temporary name, flushed to the disk, and moved there.

    Args:
        path: Where to; an existing file is replaced, through a link if there is one.
        tensors: By name, on any device.
        metadata: What ``json.dumps`` takes; its numbers finite.

    Exact when: always: tensors come back bit by bit.
    Cost: memory of three times the tensors.

    Raises:
        FileError: If the folder does not exist, or ``path`` is one.
        UnsupportedError: If JSON cannot hold the metadata, or they are more than 64 MB.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir() or not target.parent.is_dir():
        what = "a folder of that name" if target.is_dir() else f"no folder {str(target.parent)!r}"
        raise FileError("a file name in an existing folder", f"{str(path)!r}: {what}", "Make the folder first.")
    try:
        text = json.dumps(metadata, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise UnsupportedError("metadata that JSON can hold", str(error), "Use bayesae.encoding.flatten.") from error
    header = {"format": "bayesae", "version": str(_VERSION), "metadata": text, "sha256": "0" * 64}
    # copies, because safetensors refuses views of one storage
    own = {name: leaf.detach().cpu().clone(memory_format=torch.contiguous_format) for name, leaf in tensors.items()}
    data = safetensors.save(own, metadata=header)
    if int.from_bytes(data[:8], "little") > _MAX_HEADER:
        raise UnsupportedError(f"names and metadata of {_MAX_HEADER} bytes", "more", "Save less in one file.")
    start, stop = _digest_span(data, path)
    digest = _digest(data, start, stop)
    temporary = target.with_name(f".{target.name[:100]}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.writelines((memoryview(data)[:start], digest, memoryview(data)[stop:]))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def read(path: str | os.PathLike[str]) -> tuple[Any, dict[str, Tensor]]:
    """Read what `write` wrote, and nothing else.

    Args:
        path: The file.

    Returns:
        Metadata, as JSON gives them, and tensors on the CPU.

    Exact when: always: a file of which one bit has changed raises.
    Cost: memory of three times the file.

    Raises:
        FileError: If there is no such file, it was cut or changed, has another format, or a later version.
    """
    if not Path(path).is_file():
        what = "a folder" if Path(path).is_dir() else "no file of that name"
        raise FileError("a file that bayesae wrote", f"{str(path)!r}: {what}", "Check the path.")
    data = Path(path).read_bytes()
    size = int.from_bytes(data[:8], "little")
    if len(data) < 10 or not 2 <= size <= min(_MAX_HEADER, len(data) - 8):
        got = f"{str(path)!r}: {len(data)} bytes with a header of {size}"
        raise FileError("a file that bayesae wrote", got, f"Is it another format, or was it cut? {_DAMAGED}")
    header = _parse(data[8 : 8 + size], path).get("__metadata__")
    if not isinstance(header, dict) or header.get("format") != "bayesae":
        fix = "Weights of other programs are loaded by safetensors.torch.load_file."
        raise FileError("a file that bayesae wrote", f"{str(path)!r}: another format", fix)
    if header.get("version") != str(_VERSION):
        got = f"{str(path)!r}: unknown version {short(header.get('version'))}"
        raise FileError(f"version {_VERSION}, the last that this library reads", got, "Update bayesae.")
    start, stop = _digest_span(data, path)
    if _digest(data, start, stop) != data[start:stop] or not isinstance(header.get("metadata"), str):
        raise FileError("a file as it was written", f"{str(path)!r}: its checksum is another", _DAMAGED)
    try:
        tensors = safetensors.load(data)
    except (SafetensorError, ValueError, RuntimeError, KeyError, TypeError, OverflowError) as error:
        raise FileError("tensors", f"{str(path)!r}: {error}", _DAMAGED) from error
    for name, leaf in tensors.items():
        if leaf.dtype not in DTYPES:
            raise FileError("tensors of floats, integers or booleans", f"{leaf.dtype} of {name!r}", _DAMAGED)
    # into torch's own memory, which starts at multiples of 64 bytes: MKL promises the same bits only there
    return _parse(header["metadata"], path, is_object=False), {name: leaf.clone() for name, leaf in tensors.items()}


def _digest_span(data: bytes, path: str | os.PathLike[str]) -> tuple[int, int]:
    """Where the header's checksum stands."""
    found = list(_DIGEST.finditer(data, 8, 8 + int.from_bytes(data[:8], "little")))
    if len(found) != 1:
        raise FileError("a file as it was written", f"{str(path)!r}: {len(found)} checksums", _DAMAGED)
    return found[0].span(1)


def _digest(data: bytes, start: int, stop: int) -> bytes:
    """SHA-256 in hexadecimal of everything, with zeros where it stands itself."""
    digest, view = hashlib.sha256(), memoryview(data)
    for part in (view[:start], b"0" * (stop - start), view[stop:]):
        digest.update(part)
    return digest.hexdigest().encode()


def _parse(text: str | bytes, path: str | os.PathLike[str], *, is_object: bool = True) -> Any:  # noqa: ANN401
    """JSON with each name once and finite numbers."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name for name, _ in pairs}) != len(pairs):
            raise ValueError("a name twice")
        return dict(pairs)

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    try:
        value = json.loads(text, object_pairs_hook=once, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        got = f"{str(path)!r}: {short(str(error))}"
        raise FileError("a file that bayesae wrote", got, f"Is it another format? {_DAMAGED}") from error
    if is_object and not isinstance(value, dict):
        raise FileError("a file that bayesae wrote", f"{str(path)!r}: another format", _DAMAGED)
    return value
