"""Values of the library as a skeleton of JSON and tensors by name; nothing that a skeleton says is ever run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from types import ModuleType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from bayesae import calibration, families, ood, weights
from bayesae.curvature import KroneckerCurvature, KroneckerFactors, Layout, RotatedBlock
from bayesae.errors import FileError, UnsupportedError
from bayesae.families.base import Normal
from bayesae.families.independent import NormalPart
from bayesae.joint import IndependentNormal, IsotropicNormal, ScaleMixture
from bayesae.objectives import WarmUp
from bayesae.subset import Subset
from bayesae.types import WeightPosterior
from bayesae.weights import structures
from bayesae.weights.structures.kronecker import _Corrected
from bayesae.weights.structures.low_rank import _Sketch

__all__ = ["CALIBRATIONS", "DTYPES", "flatten", "short", "unflatten"]

_MAX_DEPTH = 32  # of values in values; a posterior with parts takes 6
_MAX_INT = 2**64
_KEYS = {str, int, type(None)}  # of dicts; JSON has all three
_MAX_COMPACT = 2**28  # entries of masks that are stored by their shapes alone: what a small file can make us allocate
DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip
_DAMAGED = "Copy the file again from where it was written."


@dataclass(frozen=True)
class _Kind:
    """What a field of a dataclass may hold."""

    what: str
    fits: Callable[[Any], bool]


def _instance(*types: type) -> _Kind:
    # exact types: True is no number, and a Subset that came as a list is none
    return _Kind(" or ".join(t.__name__ for t in types), lambda value: type(value) in types)


def _by_name(of: _Kind, keys: tuple[type, ...] = (str,)) -> _Kind:
    by = "name" if keys == (str,) else " or ".join(key.__name__ for key in keys)
    return _Kind(
        f"a dict of {of.what} by {by}",
        lambda value: type(value) is dict and all(type(k) in keys and of.fits(v) for k, v in value.items()),
    )


def _several(of: _Kind) -> _Kind:
    return _Kind(
        f"a list of {of.what}", lambda value: type(value) in {list, tuple} and all(of.fits(entry) for entry in value)
    )


_BOOL, _COUNT, _NUMBER = _instance(bool), _instance(int), _instance(int, float)
_NAME, _SIZE = _instance(str), _instance(torch.Size)
_TENSOR = _Kind("a tensor of floats", lambda value: isinstance(value, Tensor) and value.is_floating_point())
_PRECISION = _Kind("a number or a tensor of floats", lambda value: _NUMBER.fits(value) or _TENSOR.fits(value))
_MASK = _Kind("a boolean mask", lambda value: isinstance(value, Tensor) and value.dtype == torch.bool)
_PARAMS, _INFO = _by_name(_TENSOR), _Kind("a dict", lambda value: type(value) is dict)
_BLOCK = _instance(RotatedBlock)
# everything that a file may name: its class and what each field may be; any other name is damage
_CLASSES: dict[str, tuple[type, dict[str, _Kind]]] = {
    "Subset": (Subset, {"masks": _by_name(_MASK)}),
    "Layout": (
        Layout,
        {
            "weight": _NAME,
            "bias": _instance(str, type(None)),
            "shape": _SIZE,
            "groups": _COUNT,
            "is_transposed": _BOOL,
        },
    ),
    "RotatedBlock": (
        RotatedBlock,
        {"layout": _instance(Layout), "outputs": _TENSOR, "inputs": _TENSOR, "values": _TENSOR},
    ),
    "KroneckerFactors": (
        KroneckerFactors,
        {"layout": _instance(Layout), "inputs": _TENSOR, "outputs": _TENSOR, "count": _NUMBER},
    ),
    "KroneckerCurvature": (KroneckerCurvature, {"blocks": _by_name(_instance(KroneckerFactors)), "rest": _PARAMS}),
    "Corrected": (_Corrected, {"bases": _by_name(_BLOCK), "rest": _PARAMS}),
    "Sketch": (
        _Sketch,
        {"probes": _TENSOR, "products": _TENSOR, "diagonal": _TENSOR, "n_passes_left": _COUNT, "rounding": _NUMBER},
    ),
}


def _public(module: ModuleType) -> list[type]:
    return [cls for name in module.__all__ if is_dataclass(cls := getattr(module, name)) and isinstance(cls, type)]


# families, methods, structures, priors, warm-ups and calibrations: their own annotations say what a field may be
_FAMILIES, _METHODS, _STRUCTURES = (_public(module) for module in (families, weights, structures))
_OTHERS = [IsotropicNormal, IndependentNormal, ScaleMixture, WarmUp]
CALIBRATIONS = (*_public(calibration), ood.CombinedCalibration, ood.ConformalCalibration)
_OPEN = {cls.__name__: cls for cls in [*_OTHERS, *_FAMILIES, *_METHODS, *_STRUCTURES, *CALIBRATIONS]}
_NAMES: dict[type, str] = {cls: name for name, (cls, _) in _CLASSES.items()} | {
    cls: name for name, cls in _OPEN.items()
}


def _kind(hint: Any) -> _Kind:  # noqa: ANN401 - an annotation
    """What a field of this annotation may hold."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint in _PLAIN:
        return _PLAIN[hint]
    if origin in {Union, UnionType}:
        kinds = [_kind(one) for one in arguments]
        return _Kind(" or ".join(kind.what for kind in kinds), lambda value: any(kind.fits(value) for kind in kinds))
    if origin is Literal:
        return _Kind(f"one of {list(arguments)}", lambda value: type(value) is str and value in arguments)
    if origin in {Mapping, dict}:
        keys = get_args(arguments[0]) or (arguments[0],)
        return _INFO if arguments[1] is float else _by_name(_kind(arguments[1]), keys)
    if origin in {Sequence, tuple, list}:
        return _several(_kind(arguments[0]))
    if origin is Callable:
        return _Kind("a name, as functions have none in a file", lambda value: False)
    if hint in _PROTOCOLS:
        return _instance(*_PROTOCOLS[hint])
    if isinstance(hint, type) and is_dataclass(hint):
        return _instance(*[cls for cls in _NAMES if hint in cls.__mro__])
    raise TypeError(f"no rule for fields of {hint}")  # of the library's own classes: a test reads them all


_PROTOCOLS: dict[Any, list[type]] = {
    WeightPosterior: _FAMILIES,
    NormalPart: [cls for cls in _FAMILIES if issubclass(cls, Normal)],
    weights.WeightInference: [cls for cls in _METHODS if hasattr(cls, "posterior")],
    structures.Structure: _STRUCTURES,
}
_PLAIN: dict[Any, _Kind] = {
    bool: _BOOL, int: _COUNT, float: _NUMBER, str: _NAME, Tensor: _TENSOR, torch.Size: _SIZE,
    type(None): _instance(type(None)),
}  # fmt: skip


@cache
def _kinds(name: str) -> dict[str, _Kind]:
    """What each field of a class may hold; raises `TypeError` if an annotation has no rule."""
    if name in _CLASSES:
        return _CLASSES[name][1]
    cls = _OPEN[name]
    hints = get_type_hints(cls)
    return {one.name: _kind(hints[one.name]) for one in fields(cls) if one.init}


def _class_of(name: str) -> type:
    return _CLASSES[name][0] if name in _CLASSES else _OPEN[name]


def flatten(value: Any) -> tuple[Any, dict[str, Tensor]]:  # noqa: ANN401 - any tree of the kinds below
    """Take a value apart into a skeleton that JSON can hold and the tensors that it names.

    Args:
        value: None, bool, int, float, str, Tensor, ``torch.Size``; lists, tuples and dicts (keys str, int or None) of
            them; `Subset`, priors, methods and posteriors over weights, the sums of `Laplace`'s structures, and
            recalibrations and conformal calibrations of scores, before and after their fit.

    Returns:
        Skeleton and tensors. Tensors share memory with the value: write them, or clone them, before it changes. One
        that stands in several places is named once; a mask that is True throughout is only its shape.

    Exact when: always: `unflatten` gives the same numbers, dtypes, shapes and order; a mapping comes back as a dict,
        an expanded or cut tensor contiguous, a transposed one transposed.
    Cost: none but the walk.

    Raises:
        UnsupportedError: If something of another type is inside; the message says where.
    """
    writer = _Flattening()
    return writer.encode(value, "", 0), writer.tensors


def unflatten(skeleton: Any, tensors: Mapping[str, Tensor]) -> Any:  # noqa: ANN401 - the inverse of flatten
    """Put a value together again; no name in a skeleton leads to code that `flatten` does not know.

    Args:
        skeleton: From `flatten`, or what a file gave for it.
        tensors: Exactly those that it names.

    Returns:
        The value; tensors are the given ones, not copies.

    Exact when: always.
    Cost: none but the walk, and the checks of each class; `DenseNormal` factorises its precision.

    Raises:
        FileError: If the skeleton is none, names other tensors than were given, or describes a value that its class
            refuses.
    """
    reader = _Unflattening(tensors)
    value = reader.decode(skeleton, 0)
    unused = tensors.keys() - reader.used
    if unused:
        raise FileError("tensors that the skeleton names", f"others: {sorted(unused)[:5]}", _DAMAGED)
    return value


class _Flattening:
    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.names: dict[tuple[Any, ...], str] = {}
        self.n_compact = 0

    def encode(self, value: Any, at: str, depth: int) -> Any:  # noqa: ANN401
        if depth > _MAX_DEPTH:
            raise UnsupportedError(f"values {_MAX_DEPTH} deep at most", f"deeper ones at {at!r}", "Is there a cycle?")
        if value is None or type(value) in {bool, str} or (type(value) is int and abs(value) < _MAX_INT):
            return value
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else {"float": str(float(value))}
        if isinstance(value, Tensor):
            return self._tensor(value, at)
        if type(value) is torch.Size:
            return {"size": list(value)}
        if isinstance(value, list | tuple) and type(value) in {list, tuple}:
            entries = [self.encode(entry, _join(at, i), depth + 1) for i, entry in enumerate(value)]
            return entries if type(value) is list else {"tuple": entries}
        if isinstance(value, Mapping) and all(type(key) in _KEYS for key in value):
            return {"dict": [[key, self.encode(entry, _join(at, key), depth + 1)] for key, entry in value.items()]}
        if type(value) in _NAMES:
            name = _NAMES[type(value)]
            parts = {key: self.encode(getattr(value, key), _join(at, key), depth + 1) for key in _kinds(name)}
            return {"class": name, "fields": parts}
        expected = f"numbers, strings, tensors, lists, dicts, or one of {', '.join(_NAMES.values())}"
        raise UnsupportedError(expected, f"{type(value).__name__} at {at!r}", "It cannot go into a file.")

    def _tensor(self, value: Tensor, at: str) -> dict[str, Any]:
        if value.dtype not in DTYPES or value.layout != torch.strided or value.is_meta or value.is_quantized:
            got = f"{value.dtype}, {value.layout}, on {value.device} at {at!r}"
            raise UnsupportedError("dense tensors of floats, integers or booleans", got, "Convert it first.")
        value = value.detach()
        if value.dtype == torch.bool and self.n_compact + value.numel() <= _MAX_COMPACT and bool(value.all()):
            self.n_compact += value.numel()
            return {"true": list(value.shape)}
        order = sorted(range(value.dim()), key=value.stride, reverse=True)
        is_permuted = not value.is_contiguous() and value.permute(order).is_contiguous()
        stored = value.permute(order) if is_permuted else value
        key = (stored.device, stored.data_ptr(), stored.dtype, stored.shape, stored.stride())
        if key not in self.names:
            name = unused = at or "value"
            while name in self.tensors:
                name = f"{unused}~{len(self.tensors)}"
            self.names[key], self.tensors[name] = name, stored
        # products of matrices read from memory in another order differ in their last bits
        return {"tensor": self.names[key]} | ({"order": order} if is_permuted else {})


class _Unflattening:
    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.used: set[str] = set()
        self.n_compact = 0

    def decode(self, node: Any, depth: int) -> Any:  # noqa: ANN401
        if depth > _MAX_DEPTH:
            raise FileError(f"values {_MAX_DEPTH} deep at most", "deeper ones", _DAMAGED)
        if node is None or type(node) in {bool, str} or (type(node) is int and abs(node) < _MAX_INT):
            return node
        if type(node) is float and math.isfinite(node):
            return node
        if type(node) is list:
            return [self.decode(entry, depth + 1) for entry in node]
        if type(node) is dict:
            match list(node.items()):
                case [("float", "inf" | "-inf" | "nan" as text)]:
                    return float(text)
                case [("tensor", str(name))] if name in self.tensors:
                    self.used.add(name)
                    return self.tensors[name]
                case [("tensor", str(name)), ("order", list(order))] if name in self.tensors:
                    self.used.add(name)
                    return _unpermute(self.tensors[name], order)
                case [("true", list(shape))]:
                    return self._true(_size(shape))
                case [("size", list(shape))]:
                    return _size(shape)
                case [("tuple", list(entries))]:
                    return tuple(self.decode(entry, depth + 1) for entry in entries)
                case [("dict", list(pairs))]:
                    return self._dict(pairs, depth)
                case [("class", str(name)), ("fields", dict(parts))] if name in _CLASSES or name in _OPEN:
                    return self._instance(name, parts, depth)
        raise FileError("a value that `flatten` writes", short(node), _DAMAGED)

    def _true(self, shape: torch.Size) -> Tensor:
        self.n_compact += math.prod(shape)
        if self.n_compact > _MAX_COMPACT:
            raise FileError(f"masks of at most {_MAX_COMPACT} entries in all", f"one of {tuple(shape)}", _DAMAGED)
        return torch.ones(shape, dtype=torch.bool)

    def _dict(self, pairs: list[Any], depth: int) -> dict[str | int | None, Any]:
        result: dict[str | int | None, Any] = {}
        for pair in pairs:
            if type(pair) is not list or len(pair) != 2 or type(pair[0]) not in _KEYS or pair[0] in result:
                raise FileError("pairs of a name and a value, each name once", short(pair), _DAMAGED)
            result[pair[0]] = self.decode(pair[1], depth + 1)
        return result

    def _instance(self, name: str, parts: dict[str, Any], depth: int) -> Any:  # noqa: ANN401
        cls, kinds = _class_of(name), _kinds(name)
        if parts.keys() != kinds.keys():
            raise FileError(f"fields {list(kinds)} of {name}", f"{short(list(parts))}", _DAMAGED)
        values = {key: self.decode(part, depth + 1) for key, part in parts.items()}
        for key, kind in kinds.items():
            if not kind.fits(values[key]):
                raise FileError(f"{kind.what} as {key} of {name}", short(values[key]), _DAMAGED)
        try:
            return cls(**values)
        except Exception as error:  # whatever a constructor says of what a file holds, the file is wrong
            raise FileError(f"a {name} that can be", f"{type(error).__name__}: {error}", _DAMAGED) from error


def _unpermute(stored: Tensor, order: list[Any]) -> Tensor:
    if any(type(i) is not int for i in order) or sorted(order) != list(range(stored.dim())):
        raise FileError(f"an order of {stored.dim()} axes", short(order), _DAMAGED)
    return stored.permute([order.index(i) for i in range(stored.dim())])


def _size(shape: list[Any]) -> torch.Size:
    if len(shape) > 64 or any(type(n) is not int or not 0 <= n < 2**48 for n in shape):
        raise FileError("a shape", short(shape), _DAMAGED)
    return torch.Size(shape)


def _join(at: str, key: str | int | None) -> str:
    return f"{at}/{key}" if at else str(key)


def short(value: Any) -> str:  # noqa: ANN401
    """A few words about a value that came from a file: never all of it."""
    text = repr(value) if type(value) in {str, int, float, bool, type(None)} else type(value).__name__
    if type(value) in {list, dict} and len(value) < 9:
        text = f"{text} of {[entry if type(entry) in {str, int} else type(entry).__name__ for entry in value]}"
    return text if len(text) < 200 else f"{text[:200]}..."
