"""Code posteriors and methods of imputation in a file: a name and fields, which may be codes, flows and networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from bayesae import codes, imputation
from bayesae.codes import CodePosterior
from bayesae.errors import BayesAEError, FileError, UnsupportedError
from bayesae.files.networks import DAMAGED, PART, REFUSALS, expect, network_of, network_tree, sketch
from bayesae.imputation import Method

__all__ = ["check_codes", "check_method", "code_tree", "codes_of", "method_of", "method_tree"]

_Kinds = tuple[type, ...]
_NUMBER, _COUNT, _NAME, _BOOL, _NONE = (int, float), (int,), (str,), (bool,), (type(None),)
_CODE: _Kinds = (CodePosterior,)  # stands for everything in the first table, and for `encode`
_BASE: _Kinds = (codes.Amortised,)

# everything that a file may name: its class and the exact types of each field; any other name is damage
_POSTERIORS: dict[type, dict[str, _Kinds]] = {
    codes.Amortised: {"family": _NAME, "gradient": _NAME, "layers": (tuple, list, *_NONE)},
    codes.Flowed: {"base": _BASE, "flow": (codes.Planar, codes.Radial, codes.AutoregressiveFlow)},
    codes.Hamiltonian: {"base": _BASE, "leapfrog": (codes.Leapfrog,)},
    codes.Importance: {"inner": _CODE, "n": _COUNT},
    codes.Laplace: {"n_steps": _COUNT, "step": (*_NAME, *_NONE)},
    codes.Perturbed: {"inner": _CODE, "scale": _NUMBER},
    codes.Refined: {
        "start": _CODE,
        "n_steps": _COUNT,
        "learning_rate": _NUMBER,
        "momentum": _NUMBER,
        "second_order": _BOOL,
        "n_directions": (*_COUNT, *_NONE),
        "clip_norm": _NUMBER,
    },
}
_FLOWS: dict[type, dict[str, _Kinds]] = {codes.Planar: {"n_steps": _COUNT}, codes.Radial: {"n_steps": _COUNT}}
_CHAINS: dict[str, _Kinds] = {"n_burn_in": _COUNT, "n_steps": _COUNT, "n_chains": _COUNT}
_METHODS: dict[type, dict[str, _Kinds]] = {
    imputation.FixedPoint: {"n_iterations": _COUNT, "tolerance": _NUMBER, "noise": _BOOL},
    imputation.PseudoGibbs: _CHAINS,
    imputation.MetropolisGibbs: _CHAINS,
    imputation.ImportanceResampling: {"n": _COUNT, "proposal": (*_CODE, *_NONE)},
    imputation.CodeLaplace: {"n_steps": _COUNT},
    imputation.CodeHMC: _CHAINS | {"hmc": (codes.HMC,)},
}
_SAMPLERS: dict[type, dict[str, _Kinds]] = {
    codes.HMC: {
        "n_leapfrog": _COUNT,
        "target_acceptance": _NUMBER,
        "step_size": _NUMBER,
        "whitening": (*_CODE, *_NONE),
    },
}
_ALL = _POSTERIORS | _FLOWS | _METHODS | _SAMPLERS
_CLASSES = {cls.__name__: (cls, kinds) for cls, kinds in _ALL.items()}
# what a file cannot hold, and what to do about it
_REPLACE = "Save it with codes=None, and give the code again: dataclasses.replace(bae.load(path), codes=...)."
_REFUSED: dict[type, str] = {
    codes.Consistent: "Its transform is a function: save it with codes=codes.inner, which predicts the same.",
    codes.Zuko: f"Its flow is another library's. {_REPLACE}",
}
_AFTERWARDS = "Call set_params(method=None) first, and give the method again to what was loaded."
_NETWORK = PART | {"recipe": (dict,), "training": (list,)}


def code_tree(code: CodePosterior | None) -> Any:  # noqa: ANN401 - JSON and tensors
    """Name, fields and networks of a code posterior.

    Args:
        code: One of `bayesae.codes`; None is the plain encoder.

    Returns:
        What `encoding.flatten` takes.

    Raises:
        UnsupportedError: If it, or a part of it, has no name in a file.
    """
    return None if code is None else _tree(code, _CODE, "codes")


def check_codes(tree: Any) -> None:  # noqa: ANN401 - from a file
    """Raise `FileError` unless the tree of a file is that of a code posterior; makes no network but sketches."""
    _read(tree, _CODE, "codes", lambda part: sketch(part, "code's network"))


def codes_of(
    tree: Any,  # noqa: ANN401
    dtype: torch.dtype,
    move: Callable[[nn.Module], nn.Module],
) -> CodePosterior | None:
    """A code posterior, from a tree that was checked.

    Args:
        tree: Of `code_tree`.
        dtype: Of the model that it was saved with.
        move: Puts a network where the model is.

    Returns:
        The code posterior, networks of its own.

    Raises:
        FileError: If its parts do not go together.
    """

    def make(part: dict[str, Any]) -> nn.Module:
        return move(_network(part, "code's network", dtype))

    return _read(tree, _CODE, "codes", make)


def method_tree(method: Method) -> Any:  # noqa: ANN401 - JSON and tensors
    """Name, fields and networks of a method of imputation, as `code_tree` of a code posterior.

    Args:
        method: One of `bayesae.imputation`.

    Returns:
        What `encoding.flatten` takes.

    Raises:
        UnsupportedError: If it, or a part of it, has no name in a file.
    """
    return _tree(method, tuple(_METHODS), "method")


def check_method(tree: Any) -> None:  # noqa: ANN401 - from a file
    """Raise `FileError` unless the tree of a file is that of a method; makes no network but sketches."""
    _read(tree, tuple(_METHODS), "method", lambda part: sketch(part, "method's network"))


def method_of(tree: Any, dtype: torch.dtype) -> Method:  # noqa: ANN401
    """A method of imputation, from a tree that was checked.

    Args:
        tree: Of `method_tree`.
        dtype: Of the estimator's networks.

    Returns:
        The method, networks of its own.

    Raises:
        FileError: If its parts do not go together.
    """
    return _read(tree, tuple(_METHODS), "method", lambda part: _network(part, "method's network", dtype))


def _network(part: dict[str, Any], name: str, dtype: torch.dtype) -> nn.Module:
    network = network_of(part, None, name, dtype)
    for key, module in network.named_modules():
        module.training = key in part["training"]
    return network


def _tree(value: Any, kinds: _Kinds, at: str) -> Any:  # noqa: ANN401
    value = value.item() if isinstance(value, np.generic) else value
    if not _fits(value, kinds):
        name = str(getattr(value, "__name__", type(value).__name__))
        expected = f"codes.encode, None or a code posterior of {', '.join(one.__name__ for one in _POSTERIORS)}"
        if CodePosterior not in kinds:
            expected = " or ".join(kind.__name__ for kind in kinds)
        fix = _AFTERWARDS if at.startswith("method") else _REFUSED.get(type(value), _REPLACE)
        raise UnsupportedError(f"{expected} as {at}", name, fix)
    if value is codes.encode:
        return "encode"
    if type(value) in _ALL:
        name = type(value).__name__
        fields = {key: _tree(getattr(value, key), kinds, f"{at}.{key}") for key, kinds in _CLASSES[name][1].items()}
        return {"name": name, "fields": fields}
    if isinstance(value, nn.Module):
        part = network_tree(value)
        if part["recipe"] is None:
            expected = f"a network of bayesae as it was made, with one of torch's activations, as {at}"
            fix = _AFTERWARDS if at.startswith("method") else _REPLACE
            raise UnsupportedError(expected, f"a changed {type(value).__name__}", fix)
        return part | {"training": [name for name, module in value.named_modules() if module.training]}
    return value


def _read(tree: Any, kinds: _Kinds, at: str, make: Callable[[dict[str, Any]], nn.Module]) -> Any:  # noqa: ANN401
    try:
        return None if tree is None else _value(tree, kinds, at, make)
    except REFUSALS as error:
        if isinstance(error, FileError):
            raise
        got = str(error) if isinstance(error, BayesAEError) else f"{type(error).__name__}: {error}"
        raise FileError(f"{at} that can be", got[:400], DAMAGED) from error


def _value(node: Any, kinds: _Kinds, at: str, make: Callable[[dict[str, Any]], nn.Module]) -> Any:  # noqa: ANN401
    if CodePosterior in kinds and type(node) is str and node == "encode":
        value = codes.encode
    elif type(node) is dict and node.keys() == {"name", "fields"}:
        cls, wanted = _CLASSES[node["name"]]
        fields = expect(node["fields"], dict.fromkeys(wanted, (object,)), node["name"])
        value = cls(**{key: _value(fields[key], wanted[key], f"{at}.{key}", make) for key in wanted})
    elif type(node) is dict:
        part = expect(node, _NETWORK, at)
        if not all(type(name) is str for name in part["training"]):
            raise FileError("names of modules in training mode", "others", DAMAGED)
        value = make(part)
    else:
        value = node
    if not _fits(value, kinds):
        raise FileError(f"{' or '.join(kind.__name__ for kind in kinds)} as {at}", type(value).__name__, DAMAGED)
    return value


def _fits(value: Any, kinds: _Kinds) -> bool:  # noqa: ANN401
    # exact types: True is no number
    is_code = CodePosterior in kinds and (value is codes.encode or type(value) in _POSTERIORS)
    return is_code or type(value) in kinds
