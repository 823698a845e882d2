"""Recipes: what a network of this folder was built from, as JSON, and building one again."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from bayesae.errors import BayesAEError, DataError
from bayesae.nets.parts import ACTIVATIONS

__all__ = ["build", "can_be_built", "names", "remember"]

Make = TypeVar("Make", bound=Callable[..., nn.Module])

Net = TypeVar("Net", bound=nn.Module)

_NETS: dict[str, Callable[..., nn.Module]] = {}
_LARGEST = 2**31  # parameters that `build` makes
_DEPTH = 4  # of networks within networks


def can_be_built(make: Make) -> Make:
    """Let `build` call a function or class.

    Args:
        make: Whose networks carry a recipe of its name, by `remember`.

    Returns:
        Itself.
    """
    _NETS[make.__name__] = make
    return make


def remember(net: Net, name: str, arguments: Mapping[str, object]) -> Net:
    """Write the recipe on a network, unless an argument has no name, such as an activation that is not torch's.

    Args:
        net: Written to.
        name: What makes it.
        arguments: All of them, defaults that depend on others resolved: JSON, activations, networks with a recipe.

    Returns:
        The network.
    """
    try:
        recipe = {"net": name, "arguments": {key: _plain(value) for key, value in arguments.items()}}
    except TypeError:
        return net
    vars(net)["recipe"] = recipe
    return net


def _plain(value: object) -> Any:  # noqa: ANN401 - JSON
    if isinstance(value, nn.Module):
        if (recipe := getattr(value, "recipe", None)) is None:
            raise TypeError
        return recipe
    if isinstance(value, type):
        if ACTIVATIONS.get(value.__name__) is not value:
            raise TypeError
        return value.__name__
    if isinstance(value, (tuple, list)):
        return [_plain(part) for part in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError


def names() -> tuple[str, ...]:
    """Networks that `build` makes."""
    return tuple(sorted(_NETS))


def build(recipe: object) -> nn.Module:
    """A fresh network from a recipe: the same layers, shapes and names, weights initialised anew.

    A recipe may come from a file that somebody else wrote: only networks of this folder are made, only from numbers,
    names and lists, and nothing is allocated before all parameters were counted (on torch's "meta" device).

    Args:
        recipe: ``module.recipe`` of a network of this folder: {"net": name, "arguments": {...}}.

    Returns:
        The network.

    Raises:
        DataError: If the name or an argument is unknown, an argument has a wrong type or size (2^24 for a width or
            axis, 64 for layers and residual blocks), or there were more than 2^31 parameters.
    """
    with torch.device("meta"):
        sketch = _build(recipe, _DEPTH)
    n_numbers = sum(leaf.numel() for leaf in [*sketch.parameters(), *sketch.buffers()])
    if n_numbers > _LARGEST:
        raise DataError(f"at most {_LARGEST} parameters", f"a recipe for {n_numbers}", "Is the file damaged?")
    return _build(recipe, _DEPTH)


def _build(recipe: object, depth: int) -> nn.Module:
    fix = "Pass module.recipe of a network of bayesae.nets, unchanged."
    if not isinstance(recipe, dict) or set(recipe) != {"net", "arguments"} or depth == 0:
        raise DataError('a recipe {"net": ..., "arguments": {...}}', _short(recipe), fix)
    name, given = recipe["net"], recipe["arguments"]
    if not isinstance(name, str) or name not in _NETS:
        raise DataError(f"one of the networks {', '.join(names())}", _short(name), fix)
    make = _NETS[name]
    signature = inspect.signature(make)
    if not isinstance(given, dict) or not set(given) <= set(signature.parameters):
        raise DataError(f"arguments of {name} among {', '.join(signature.parameters)}", _short(given), fix)
    arguments = {}
    for key, value in given.items():
        if key == "net":
            value = _build(value, depth - 1)
        elif key == "activation":
            if not isinstance(value, str) or value not in ACTIVATIONS:
                raise DataError(f"an activation among {', '.join(ACTIVATIONS)}", _short(value), fix)
            value = ACTIVATIONS[value]
        arguments[key] = tuple(value) if isinstance(value, list) else value
    try:
        return make(**arguments)
    except BayesAEError:
        raise
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise DataError(f"arguments that {name} takes", f"{_short(given)} ({error})", fix) from error


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:80]}..."
