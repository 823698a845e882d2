"""What tells one run from another: arguments, data and networks in words that are the same in the next process."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import partial
from pathlib import PurePath
from types import CodeType, FunctionType, MethodType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

from bayesae.data import Data, as_tensor
from bayesae.models import Autoencoder
from bayesae.training.generators import attributes_of
from bayesae.types import Batch

__all__ = ["describe", "describe_data", "describe_model", "digest"]

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_KEPT = 1000  # characters of a description: the checksum speaks for the rest
_MAX_DEPTH = 20


def describe(argument: object) -> str:
    """An argument in words; what differs in any value that is looked at has other words.

    Looked at are numbers, strings, tensors and arrays (by checksum), tuples, lists, dicts and sets of them, fields of
    dataclasses, arguments of `partial`, attributes of objects that are an argument, a field or can be called, and the
    code, closure, defaults and plain globals of functions without a name of their own. Functions with one and classes
    are their names; networks are their layers, what they were made with, and the shapes of their weights; other objects
    their class. What such a function or object counts or
    collects while it runs makes it another argument too.

    Args:
        argument: Anything.

    Returns:
        A line; long ones are cut and end with a checksum of the whole.
    """
    return _cut(_words(argument, ()))


def describe_data(data: Data | None) -> str:
    """Data in words: those in memory by a checksum of all rows, others by their kind and length alone.

    Args:
        data: Anything of `Data`, or None. The tensors behind a `TensorDataset`, a `Subset`, a `ConcatDataset` or a
            loader of them count as in memory. Nothing is drawn from a generator and no row of others is read.

    Returns:
        A line.
    """
    return _cut(_words_of_data(data))


def describe_model(model: Autoencoder) -> dict[str, str]:
    """Networks, likelihood and the shape of every weight, in words."""
    likelihood = model.likelihood
    words = {
        "encoder": _cut(_ADDRESS.sub("", repr(model.encoder))),
        "decoder": _cut(_ADDRESS.sub("", repr(model.decoder))),
        "likelihood": f"{type(likelihood).__name__} {describe(getattr(likelihood, 'arguments', {}))}",
    }
    for name, leaf in model.named_parameters():
        words[name] = _words_of_weight(leaf)
    return words


def digest(named: Mapping[str, Any]) -> str:
    """A checksum of the tensors' names and bits."""
    sums = hashlib.sha256()
    for name, leaf in named.items():
        if isinstance(leaf, Tensor):
            sums.update(name.encode())
            sums.update(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sums.hexdigest()


def _words(value: Any, above: tuple[object, ...]) -> str:  # noqa: ANN401 - anything
    """The words of one value; ``above`` are those that it is part of."""
    if any(value is part for part in above) or len(above) > _MAX_DEPTH:
        return f"a {type(value).__name__} again"
    above += (value,)
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, Enum, range, PurePath)):
        return repr(value)
    if isinstance(value, (torch.dtype, torch.device)):
        return str(value)
    if isinstance(value, (Tensor, np.ndarray)):
        return _words_of_array(value, above)
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_words(name, above)}: {_words(part, above)}' for name, part in value.items())}}}"
    if isinstance(value, (list, tuple)):
        return f"({', '.join(_words(part, above) for part in value)})"
    if isinstance(value, (set, frozenset)):
        return f"{{{', '.join(sorted(_words(part, above) for part in value))}}}"
    if isinstance(value, partial):
        return f"partial({', '.join(_words(part, above) for part in (value.func, value.args, value.keywords))})"
    if isinstance(value, MethodType):
        return f"{_words(value.__self__, above)}.{value.__name__}"
    if isinstance(value, FunctionType) and "<" in value.__qualname__:  # a lambda, or made in another function
        return _words_of_function(value, above)
    if isinstance(value, (Dataset, DataLoader)):
        return _words_of_data(value)
    if isinstance(value, nn.Module):
        return _words_of_network(value, above)
    return _words_of_object(value, above)


def _words_of_array(value: Tensor | np.ndarray, above: tuple[object, ...]) -> str:
    if isinstance(value, np.ndarray) and value.dtype.kind not in "biuf":
        return f"array {_words(value.tolist(), above)}"
    tensor = as_tensor(value)
    return f"{tensor.dtype} {tuple(tensor.shape)} {digest({'': tensor})[:16]}"


def _words_of_network(value: nn.Module, above: tuple[object, ...]) -> str:
    weights = {name: _words_of_weight(leaf) for name, leaf in value.named_parameters()}  # numbers change in training
    parts = (getattr(value, "recipe", None), weights)
    return f"{_ADDRESS.sub('', repr(value))} {' '.join(_words(part, above) for part in parts if part)}"


def _words_of_weight(leaf: Tensor) -> str:
    return f"{tuple(leaf.shape)} {leaf.dtype}{'' if leaf.requires_grad else ', frozen'}"


def _words_of_function(value: FunctionType, above: tuple[object, ...]) -> str:
    cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
    held = {name: getattr(cell, "cell_contents", None) for name, cell in cells}
    used = {name: value.__globals__.get(name) for name in value.__code__.co_names}
    held |= {name: part for name, part in used.items() if isinstance(part, _PLAIN)}
    parts = (held, value.__defaults__, value.__kwdefaults__)
    words = "; ".join(_words(part, above) for part in parts if part)
    return f"{_name(value)}{' with ' if words else ''}{words}, code {_checksum(_words_of_code(value.__code__))}"


def _words_of_code(code: CodeType) -> str:
    constants = [_words_of_code(part) if isinstance(part, CodeType) else _words(part, ()) for part in code.co_consts]
    return f"{code.co_code.hex()} {code.co_names} {code.co_varnames} {constants}"


def _words_of_object(value: Any, above: tuple[object, ...]) -> str:  # noqa: ANN401
    if hasattr(value, "__qualname__"):
        return _name(value)
    if is_dataclass(value):
        held = {one.name: getattr(value, one.name) for one in fields(value)}
        parts = (f"{name}={_words(part, above)}" for name, part in held.items())
        return f"{type(value).__qualname__}({', '.join(parts)})"
    is_argument = len(above) == 1 or is_dataclass(above[-2])
    if is_argument or callable(value) or isinstance(value, SimpleNamespace):  # a log file, say, is not an argument
        held = attributes_of(value)
        return f"{_name(type(value))}{_words(held, above) if held else ''}"
    return _name(type(value))


def _words_of_data(data: Any) -> str:  # noqa: ANN401 - `Data` or parts of it
    if isinstance(data, Batch):
        held = {name: as_tensor(part) for name, part in data._asdict().items() if part is not None}
        return f"Batch{_words(held, ())}"
    if isinstance(data, TensorDataset):
        return f"TensorDataset{_words(data.tensors, ())}"
    if isinstance(data, Subset):
        return f"Subset({_words_of_data(data.dataset)}, {_words(data.indices, ())})"
    if isinstance(data, ConcatDataset):
        return f"ConcatDataset({', '.join(map(_words_of_data, data.datasets))})"
    if isinstance(data, DataLoader):
        how = (data.batch_size, data.drop_last, type(data.sampler), type(data.batch_sampler))
        return f"DataLoader({_words_of_data(data.dataset)}, {_words(how, ())})"
    if data is None or isinstance(data, (Tensor, np.ndarray)) or not isinstance(data, Dataset):
        return _words(data if data is None else as_tensor(data), ())
    sized: Any = data
    try:
        return f"{_name(type(data))} of {len(sized)}"
    except TypeError:  # a stream
        return _name(type(data))


def _name(value: Any) -> str:  # noqa: ANN401
    return f"{value.__module__}.{value.__qualname__}"


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _cut(text: str) -> str:
    return text if len(text) <= _KEPT else f"{text[:_KEPT]}... and on, sha256 {_checksum(text)}"


_PLAIN = (bool, int, float, complex, str, bytes, Tensor, np.ndarray, np.generic, tuple)
