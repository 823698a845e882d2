"""Generators that data and callables bring along: found, read and set, so that a resumed run draws the same."""

from __future__ import annotations

import json
import random
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["attributes_of", "find_generators", "get_state", "set_state"]

_N_LOOKED_AT = 1000  # entries of one list or dict: a list of a million file names costs nothing


def find_generators(**roots: object) -> dict[str, Any]:
    """Generators of torch, NumPy and the standard library that can be reached from some objects, each once.

    Looked into are attributes, slots, the first 1000 entries of lists, tuples and dicts, arguments of `partial`, what
    methods are bound to, and closures and defaults of functions; so data sets that wrap others, their transforms,
    loaders and samplers. Not found are global generators, and those inside extension types and running iterators.

    Args:
        **roots: Where to look, by name.

    Returns:
        By the path of attributes that leads there first.
    """
    found: dict[str, Any] = {}
    held: dict[int, object] = {}  # also keeps what was made on the way alive, so that no id comes twice
    left = deque(roots.items())
    while left:
        path, value = left.popleft()  # near ones first
        if isinstance(value, _LEAVES) or id(value) in held:
            continue
        held[id(value)] = value
        if isinstance(value, _GENERATORS):
            if not isinstance(value, random.SystemRandom):
                found[path] = value
            continue
        left.extend((f"{path}.{name}", part) for name, part in _parts(value))
    return found


def get_state(generator: Any) -> Tensor | str:  # noqa: ANN401 - three libraries' generators
    """The state of a generator that `find_generators` found, as `encoding.flatten` takes it."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return json.dumps(generator.getstate())
    is_old = isinstance(generator, np.random.RandomState)
    state = generator.get_state(legacy=False) if is_old else generator.bit_generator.state
    return json.dumps(state, default=lambda value: value.tolist())  # as text: PCG64 counts in 128 bits


def set_state(generator: Any, state: Tensor | str) -> None:  # noqa: ANN401
    """Set a generator to a state of `get_state`."""
    if isinstance(state, Tensor):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        version, numbers, gauss = json.loads(state)
        generator.setstate((version, tuple(numbers), gauss))
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(_with_arrays(json.loads(state)))
    else:
        generator.bit_generator.state = _with_arrays(json.loads(state))


_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_LEAVES = (type(None), bool, int, float, str, bytes, Tensor, np.ndarray, type, ModuleType)
_NOT_OWN = ("_iterator",)  # a loader's workers of the moment


def attributes_of(value: object) -> dict[str, object]:
    """What an object holds, in slots and in its ``__dict__``, by name."""
    slots = [name for kind in type(value).__mro__ for name in _as_names(vars(kind).get("__slots__", ()))]
    held = {name: getattr(value, name) for name in slots if not name.startswith("__") and hasattr(value, name)}
    return held | dict(getattr(value, "__dict__", {}))


def _parts(value: object) -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping):
        yield from ((str(name), part) for name, part in islice(value.items(), _N_LOOKED_AT))
    elif isinstance(value, (list, tuple)):
        yield from _numbered(islice(value, _N_LOOKED_AT))
    elif isinstance(value, partial):
        yield from (("func", value.func), ("args", value.args), ("keywords", value.keywords))
    elif isinstance(value, MethodType):
        yield "self", value.__self__
    elif isinstance(value, FunctionType):
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        yield from ((name, cell.cell_contents) for name, cell in cells if _is_filled(cell))
        yield from (("defaults", value.__defaults__), ("kwdefaults", value.__kwdefaults__))
    yield from ((name, part) for name, part in attributes_of(value).items() if name not in _NOT_OWN)


def _numbered(values: Iterable[object]) -> Iterator[tuple[str, object]]:
    return ((str(at), value) for at, value in enumerate(values))


def _as_names(slots: str | Iterable[str]) -> Iterable[str]:
    return (slots,) if isinstance(slots, str) else slots


def _is_filled(cell: Any) -> bool:  # noqa: ANN401 - a cell of a closure
    try:
        cell.cell_contents  # noqa: B018 - reading it is the question
    except ValueError:
        return False
    return True


def _with_arrays(state: Any) -> Any:  # noqa: ANN401
    """A NumPy state with arrays where JSON has lists."""
    if isinstance(state, Mapping):
        return {name: _with_arrays(value) for name, value in state.items()}
    return np.array(state, np.uint64) if isinstance(state, list) else state
