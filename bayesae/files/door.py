"""`save` and `load`, and what a file holds in words."""

from __future__ import annotations

import importlib.metadata
import os
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bayesae import encoding
from bayesae.errors import BayesAEError, FileError, UnsupportedError
from bayesae.files import tables
from bayesae.files.networks import DAMAGED, REFUSALS, expect
from bayesae.files.predictives import DTYPES, check_tree, predictive_of, tree_of
from bayesae.predictive import Predictive

__all__ = ["describe", "load", "save"]


def _check_calibration(tree: dict[str, Any]) -> None:
    if type(expect(tree, {"calibration": (object,)}, "a file")["calibration"]) not in encoding.CALIBRATIONS:
        raise FileError("a calibration", type(tree["calibration"]).__name__, DAMAGED)


_KINDS = {"predictive": check_tree, "estimator": tables.check_tree, "calibration": _check_calibration}


def save(fitted: Any, path: str | os.PathLike[str]) -> None:  # noqa: ANN401 - sklearn is not imported for its types
    """Write a `Predictive`, a fitted estimator of `estimators`, or a calibration, to one safetensors file.

    A calibration is what `ood.ConformalCalibration`, `ood.CombinedCalibration` and the methods of `calibration` fit,
    or such a method. Of a model the file holds the networks' parameters and buffers, the posterior (with its
    ``info``, the prior precision of a Laplace posterior among it), the likelihood with its noise, flags, an
    estimator's arguments and attributes, and the versions that wrote it. A network of `nets` is rebuilt from the file
    alone. Of any other network the file holds the numbers, and `load` is given the module; buffers that are not
    persistent are the module's own.

    Args:
        fitted: What is saved.
        path: Where to, ``"posterior.safetensors"`` say; an existing file is replaced, and never by half of one.

    Exact when: always: what `load` gives back predicts the same bits.
    Cost: memory of three times the file.

    Raises:
        UnsupportedError: If the likelihood, the code, the posterior or a network's state is none of this library's;
            the message names it.
        ShapeError: If the model's ``data_shape`` or likelihood does not go with its networks.
        NotFittedError: If an estimator was not fitted.
        FileError: If the folder does not exist.
    """
    if isinstance(fitted, Predictive):
        kind, tree = "predictive", tree_of(fitted)
    elif tables.is_estimator(fitted):
        kind, tree = "estimator", tables.tree_of(fitted)
    elif type(fitted) in encoding.CALIBRATIONS:
        kind, tree = "calibration", {"calibration": fitted}
    else:
        fix = "Wrap the model and its posterior: bae.save(bae.Predictive(model, weights), path)."
        raise UnsupportedError("a Predictive, an estimator or a calibration", type(fitted).__name__, fix)
    skeleton, tensors = encoding.flatten(tree)
    versions = {"bayesae": _version(), "torch": str(torch.__version__)}
    encoding.write(path, tensors, {"kind": kind, "versions": versions, "value": skeleton})


def load(
    path: str | os.PathLike[str],
    *,
    encoder: nn.Module | None = None,
    decoder: nn.Module | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Any:  # noqa: ANN401 - a Predictive, or an estimator of scikit-learn's, which is not imported for its type
    """Read what `save` wrote.

    Args:
        path: The file.
        encoder: The encoder, where it is none of `nets`: any module with the same parameters and buffers. It is copied;
            its own numbers do not matter.
        decoder: Likewise.
        device: Where tensors go; the CPU if None, wherever they were saved from.
        dtype: Of networks and of the posterior's mean: float64, float32, bfloat16 or float16; as saved if None. Numbers
            move by rounding. Variances, precisions and bases keep theirs, because a posterior's algebra is float64.

    Returns:
        The `Predictive`, with training mode, ``requires_grad`` and the dtype as saved; or the estimator or
        calibration, for which the four keywords are not.

    Exact when: dtype and device are those of the saved one: the same bits in every prediction.
    Cost: memory of four times the file; the factorisation of a dense posterior.

    Raises:
        FileError: If the file is missing, damaged, of another kind, or written by a later version.
        UnsupportedError: If the file has a network that is none of `nets`, and no module was given for it.
        ParameterError: If a module's parameters or buffers have other names than the file's.
        ShapeError: If they have other shapes.
    """
    place = _device(device)
    if dtype is not None and dtype not in DTYPES.values():
        raise UnsupportedError(f"a dtype among {', '.join(DTYPES)}", str(dtype), "None keeps that of the file.")
    kind, _, tree = _read(path, place)
    if kind != "predictive" and any(option is not None for option in (encoder, decoder, device, dtype)):
        fix = "Estimators are float64 on the CPU, and calibrations go where the moments are."
        raise UnsupportedError(f"a path alone, as the file has no predictive but a {kind}", "more", fix)
    if kind == "calibration":
        return tree["calibration"]
    return _assembled(path, kind, tree, {"encoder": encoder, "decoder": decoder}, place, dtype)


def describe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a file of `save` holds, for people: everything but the numbers in its tensors.

    Args:
        path: The file.

    Returns:
        Dicts and lists in which a tensor is a text such as "float32 (6, 7)".

    Exact when: always: the file is checked as for `load`, but for what only the networks can tell.
    Cost: that of reading the file.

    Raises:
        FileError: As for `load`.
    """
    kind, versions, tree = _read(path, torch.device("cpu"))
    return {"kind": kind, "versions": versions} | _outline(tree)


def _read(path: str | os.PathLike[str], device: torch.device) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Kind, versions and tree of a file."""
    metadata, tensors = encoding.read(path)
    kind = metadata.get("kind") if isinstance(metadata, dict) else None
    if not isinstance(kind, str) or kind not in _KINDS:
        what = repr(kind)[:80] if isinstance(kind, str) else "something else"
        raise FileError("a file of bae.save", f"{str(path)!r}: {what}", "Checkpoints are for checkpoint=.")
    expect(metadata, {"kind": (str,), "versions": (dict,), "value": (dict,)}, "a file")
    # masks stay where all masks are
    tensors = {name: leaf if leaf.dtype == torch.bool else leaf.to(device) for name, leaf in tensors.items()}
    tree = encoding.unflatten(metadata["value"], tensors)
    _KINDS[kind](tree)
    return kind, metadata["versions"], tree


def _assembled(
    path: str | os.PathLike[str],
    kind: str,
    tree: dict[str, Any],
    given: dict[str, nn.Module | None],
    device: torch.device,
    dtype: torch.dtype | None,
) -> Any:  # noqa: ANN401
    """The parts put together; parts that do not go together are the file's fault, in whatever words they say so."""
    try:
        return tables.estimator_of(tree) if kind == "estimator" else predictive_of(tree, given, device, dtype)
    except REFUSALS as error:
        if isinstance(error, BayesAEError):
            raise
        raise FileError(f"a {kind}", f"{str(path)!r}: {type(error).__name__}: {str(error)[:400]}", DAMAGED) from error


def _version() -> str:
    try:
        return importlib.metadata.version("bayesae")
    except importlib.metadata.PackageNotFoundError:  # imported from a folder that nobody installed
        return "unknown"


def _device(device: torch.device | str | None) -> torch.device:
    try:
        result = torch.device("cpu" if device is None else device)
    except RuntimeError as error:
        raise UnsupportedError("a device", f"{device!r} ({error})", "Give 'cpu' or 'cuda'.") from error
    if result.type == "meta":
        raise UnsupportedError("a device that holds numbers", "'meta'", "Give 'cpu' or 'cuda'.")
    return result


def _outline(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, dict):
        return {key: _outline(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_outline(entry) for entry in value]
    if is_dataclass(value):
        parts = {field.name: _outline(getattr(value, field.name)) for field in fields(value) if field.init}
        return {"type": type(value).__name__, **parts}
    return value
