"""A `Predictive` as a tree that a file can hold, and back."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bayesae import likelihoods, nets, random
from bayesae.codes import CodePosterior, encode
from bayesae.errors import BayesAEError, FileError, ParameterError, ShapeError, UnsupportedError
from bayesae.families import (
    DenseNormal,
    DiagonalNormal,
    IndependentNormals,
    KroneckerNormal,
    LowRankNormal,
    Particles,
)
from bayesae.functional import dtype_of
from bayesae.models import Autoencoder
from bayesae.predictive import Predictive
from bayesae.types import Likelihood, WeightPosterior

__all__ = [
    "DAMAGED",
    "DTYPES",
    "REFUSALS",
    "check_tree",
    "expect",
    "likelihood_of",
    "likelihood_tree",
    "predictive_of",
    "tree_of",
]


_CODES: dict[str | None, CodePosterior | None] = {None: None, "encode": encode}
DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
}
_PART = {"recipe": (dict, type(None)), "type": (str,), "state": (dict,), "requires_grad": (dict,)}
_HEAD = {"name": (str,), "arguments": (dict,), "state": (dict,)}
_TREE = {
    "encoder": (dict,),
    "decoder": (dict,),
    "likelihood": (dict,),
    "data_shape": (tuple, type(None)),
    "dtype": (str,),
    "training": (list,),
    "weights": (DiagonalNormal, KroneckerNormal, DenseNormal, LowRankNormal, IndependentNormals, Particles),
    "codes": (str, type(None)),
    "linearised": (bool, type(None)),
}
_LARGEST = 2**48  # numbers in a row, as in every shape of a file
DAMAGED = "Copy the file again from where it was written."

# what constructors, torch among them, say of arguments that a file made up
REFUSALS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def tree_of(predictive: Predictive) -> dict[str, Any]:
    """Everything that `predictive_of` needs.

    Args:
        predictive: The model with its posterior.

    Returns:
        What `encoding.flatten` takes.

    Raises:
        UnsupportedError: If a part has no name in a file.
        ShapeError: If ``data_shape`` or the likelihood does not go with the networks.
    """
    model = predictive.model
    if type(model) is not Autoencoder:
        raise UnsupportedError("an Autoencoder", type(model).__name__, "Save its state_dict() yourself.")
    codes = [name for name, code in _CODES.items() if code is predictive.codes]
    if not codes:
        got = getattr(predictive.codes, "__name__", type(predictive.codes).__name__)
        raise UnsupportedError("codes.encode or None as codes", f"{got!r}", "A code of your own has no name in a file.")
    encoder, decoder = _network_tree(model.encoder), _network_tree(model.decoder)
    _check_sizes(encoder["recipe"], decoder["recipe"], model.likelihood, model.data_shape)
    return {
        "encoder": encoder,
        "decoder": decoder,
        "likelihood": likelihood_tree(model.likelihood),
        "data_shape": model.data_shape,
        "dtype": str(dtype_of(model)).removeprefix("torch."),
        "training": [name for name, module in model.named_modules() if module.training],
        "weights": predictive.weights,
        "codes": codes[0],
        "linearised": predictive.linearised,
    }


def _network_tree(module: nn.Module) -> dict[str, Any]:
    return {
        "recipe": _recipe_of(module),
        "type": type(module).__name__,
        "state": dict(module.state_dict()),
        "requires_grad": {name: parameter.requires_grad for name, parameter in module.named_parameters()},
    }


def _recipe_of(module: nn.Module) -> dict[str, Any] | None:
    """The recipe of a network that is still what its recipe makes; None for any other."""
    recipe = getattr(module, "recipe", None)
    if recipe is None:
        return None
    try:
        twin = _build(recipe, "meta")
        _check_state(twin, module.state_dict(), "network")
    except BayesAEError:  # a layer was replaced since
        return None
    has_context = [getattr(network, "takes_context", False) for network in (twin, module)]
    return recipe if repr(twin) == repr(module) and has_context[0] == has_context[1] else None


def likelihood_tree(likelihood: Any) -> dict[str, Any]:  # noqa: ANN401 - whatever the model was given
    """Name, arguments and noise of a likelihood.

    Args:
        likelihood: One of `likelihoods.NAMES`.

    Returns:
        What `encoding.flatten` takes.

    Raises:
        UnsupportedError: If it is somebody else's.
    """
    name = type(likelihood).__name__
    if name not in likelihoods.NAMES or type(likelihood) is not getattr(likelihoods, name):
        expected = f"a likelihood among {', '.join(likelihoods.NAMES)}"
        raise UnsupportedError(expected, type(likelihood).__name__, "A likelihood of your own has no name in a file.")
    return {"name": name, "arguments": likelihood.arguments, "state": dict(likelihood.state_dict())}


def check_tree(tree: Any) -> None:  # noqa: ANN401 - from a file
    """Raise `FileError` unless the tree of a file has the parts of a predictive."""
    expect(tree, _TREE, "a predictive")
    for name in ("encoder", "decoder"):
        expect(tree[name], _PART, name)
    likelihood_of(tree["likelihood"])
    weights, shape = tree["weights"], tree["data_shape"]
    if isinstance(weights, IndependentNormals) and not weights.parts:
        raise FileError("parts of a posterior", "none", DAMAGED)
    if isinstance(weights, Particles) and tree["linearised"]:
        raise FileError("a continuous posterior to linearise", "particles", DAMAGED)
    if shape is not None and not (shape and all(type(n) is int and n > 0 for n in shape) and _fits(shape)):
        raise FileError("a shape of rows", repr(shape)[:80], DAMAGED)
    for name, known in (("dtype", DTYPES), ("codes", _CODES)):
        if tree[name] not in known:
            raise FileError(f"{name} among {list(known)}", repr(tree[name])[:80], DAMAGED)
    if not all(type(name) is str for name in tree["training"]):
        raise FileError("names of modules in training mode", "others", DAMAGED)


def _fits(shape: Sequence[int]) -> bool:
    return math.prod(shape) <= _LARGEST


def expect(tree: Any, kinds: Mapping[str, tuple[type, ...]], what: str) -> dict[str, Any]:  # noqa: ANN401
    """A dict with exactly these names, each of one of its types."""
    if type(tree) is not dict or tree.keys() != kinds.keys():
        raise FileError(f"{', '.join(kinds)} of {what}", type(tree).__name__, DAMAGED)
    for name, types in kinds.items():
        if not isinstance(tree[name], types):
            raise FileError(f"{name} of {what}", type(tree[name]).__name__, DAMAGED)
    return tree


def predictive_of(
    tree: dict[str, Any], given: Mapping[str, nn.Module | None], device: torch.device, dtype: torch.dtype | None
) -> Predictive:
    """A predictive, from a tree that was checked.

    Args:
        tree: Of `tree_of`.
        given: Modules to use as "encoder" and "decoder" instead of recipes.
        device: Where the model goes.
        dtype: Of the networks and the posterior's mean; None keeps it.

    Returns:
        The predictive.

    Raises:
        FileError: If its parts do not go together.
        BayesAEError: If a module, or the dtype, does not go with them.
    """
    own = DTYPES[tree["dtype"]]
    modules = {name: _network_of(tree[name], module, name, own) for name, module in given.items()}
    try:
        likelihood = likelihood_of(tree["likelihood"])
        recipes = {name: tree[name]["recipe"] if module is None else None for name, module in given.items()}
        _check_sizes(recipes["encoder"], recipes["decoder"], likelihood, tree["data_shape"])
        model = Autoencoder(**modules, likelihood=likelihood, data_shape=tree["data_shape"])
        for name, module in model.named_modules():
            module.training = name in tree["training"]
        model = model.to(device=device, dtype=dtype)
        weights = tree["weights"] if dtype is None else _in_dtype(tree["weights"], dtype, {})
        return Predictive(model, weights, _CODES[tree["codes"]], tree["linearised"])
    except BayesAEError as error:
        # the fault may be of somebody's module, or of a dtype too small for the file's numbers
        if isinstance(error, FileError) or dtype is not None or any(module is not None for module in given.values()):
            raise
        raise FileError("parts that go together", str(error)[:400], DAMAGED) from error


def _check_sizes(
    encoder: dict[str, Any] | None,
    decoder: dict[str, Any] | None,
    likelihood: Likelihood,
    data_shape: tuple[int, ...] | None,
) -> None:
    """Raise `ShapeError` if rows are not what the encoder's recipe takes, or outputs not what the likelihood takes."""
    if decoder is not None:
        inner = _plain_recipe(decoder)
        if "n_in" in inner["arguments"]:
            codes = torch.empty(1, inner["arguments"]["n_in"], device="meta")
            likelihood.data_shape(_build(inner, "meta")(codes).shape[1:])
    if encoder is not None and data_shape is not None:
        inner = _plain_recipe(encoder)
        arguments = inner["arguments"]
        n_in = arguments.get("n_in") or arguments.get("length") or math.prod(arguments["shape"])
        n_row = math.prod(data_shape)
        # a context stands beside the row
        if n_row > n_in or (n_row < n_in and inner is encoder):
            fix = "Give Autoencoder(..., data_shape=) the shape of a row of x."
            raise ShapeError(f"a data_shape of {n_in} numbers, as the encoder takes", f"{data_shape}", fix)


def _plain_recipe(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe of the network inside those that add a context."""
    while "net" in recipe["arguments"]:
        recipe = recipe["arguments"]["net"]
    return recipe


def likelihood_of(tree: dict[str, Any]) -> Any:  # noqa: ANN401 - a module and a Likelihood
    """A likelihood with its noise.

    Args:
        tree: Of `likelihood_tree`.

    Returns:
        The likelihood.

    Raises:
        FileError: If it is none.
    """
    expect(tree, _HEAD, "likelihood")
    for name, noise in tree["state"].items():
        # unknown noise is NaN
        if not isinstance(noise, Tensor) or not bool((noise.isnan() | ((noise > 0) & noise.isfinite())).all()):
            raise FileError(f"positive, finite noise as {name!r} of the likelihood", "others", DAMAGED)
    try:
        likelihood = likelihoods.build(tree["name"], tree["arguments"])
        _fill(likelihood, tree["state"], "likelihood")
    except REFUSALS as error:
        raise FileError("a likelihood that can be", f"{type(error).__name__}: {str(error)[:400]}", DAMAGED) from error
    return likelihood


def _network_of(part: dict[str, Any], given: nn.Module | None, name: str, dtype: torch.dtype) -> nn.Module:
    """A network with the file's numbers and flags."""
    if given is not None:
        module = copy.deepcopy(given)
        module.zero_grad(set_to_none=True)
    elif part["recipe"] is None:
        raise UnsupportedError(
            f"{name}=, because the file's {name} is none of bayesae.nets",
            "None",
            f"Give the module: bae.load(path, {name}=net), a {part['type'][:80]} with parameters "
            f"{', '.join(part['requires_grad'])[:400]}.",
        )
    else:
        # counted first, then made on the meta device: a recipe for more than the file has takes no time and no memory
        try:
            _check_size(part["recipe"], len(part["state"]))
            _check_state(_build(part["recipe"], "meta"), part["state"], name)
        except BayesAEError as error:
            raise FileError(f"a recipe for the {name}'s parameters", str(error)[:400], DAMAGED) from error
        module = _build(part["recipe"], "cpu")
    _fill(module.to(dtype=dtype), part["state"], name)
    flags = part["requires_grad"]
    if flags.keys() != dict(module.named_parameters()).keys():
        kind, fix = (FileError, DAMAGED) if given is None else (ParameterError, f"Are weights of the {name} shared?")
        raise kind(f"parameters {list(flags)[:5]} ...", "others", fix)
    for key, parameter in module.named_parameters():
        parameter.requires_grad_(bool(flags[key]))
    return module


def _build(recipe: dict[str, Any], device: str) -> nn.Module:
    with random.scope(0), torch.device(device):
        return nets.build(recipe)


def _check_size(recipe: dict[str, Any], n_tensors: int) -> None:
    """Raise if a recipe has more layers and residual blocks than the file has tensors."""
    arguments = recipe["arguments"]
    if "net" in arguments:
        _check_size(arguments["net"], n_tensors)
    n_layers = max(len(arguments.get(name) or ()) for name in ("hidden", "channels"))
    if n_layers * (1 + arguments.get("n_residual", 0)) > n_tensors:
        raise FileError(f"at most {n_tensors} layers", f"{n_layers} and residual blocks", DAMAGED)


def _check_state(module: nn.Module, state: Mapping[str, Any], name: str) -> None:
    """Raise unless a module has the file's parameters and buffers."""
    expected = module.state_dict()
    missing, unknown = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or unknown:
        got = f"parameters or buffers {missing[:5]} more and {unknown[:5]} less"
        raise ParameterError(f"the {name} that was saved", got, f"Give a module of the same layers as {name}=.")
    for key, leaf in expected.items():
        value = state[key]
        if not isinstance(leaf, Tensor) or key.endswith("_extra_state"):
            continue
        if not isinstance(value, Tensor) or leaf.shape != value.shape or _rank(leaf) != _rank(value):
            what = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            got = f"{leaf.dtype} {tuple(leaf.shape)}"
            raise ShapeError(f"{key!r} of the {name} as saved, {what}", got, "Give a module of the same sizes.")


def _rank(leaf: Tensor) -> torch.dtype | None:
    """The dtype, where it is not one of floats among others."""
    return None if leaf.is_floating_point() else leaf.dtype


def _fill(module: nn.Module, state: Mapping[str, Any], name: str) -> None:
    """Put the file's numbers into a module: shapes, dtypes, order in memory and shared parameters as they were."""
    _check_state(module, state, name)
    own = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    for key, value in state.items():
        if key in own:
            own[key].data = value.clone(memory_format=torch.preserve_format)
    module.load_state_dict(state)


def _in_dtype(weights: WeightPosterior, dtype: torch.dtype, known: dict[int, Tensor]) -> WeightPosterior:
    """The posterior around a mean of another dtype; leaves that parts share stay shared."""
    if isinstance(weights, IndependentNormals):
        parts: list[Any] = [_in_dtype(part, dtype, known) for part in weights.parts]  # pyright: ignore[reportArgumentType]
        return replace(weights, parts=parts)
    name = "atoms" if isinstance(weights, Particles) else "mean"
    leaves = getattr(weights, name)
    for leaf in leaves.values():
        known.setdefault(id(leaf), leaf.to(dtype))
    return replace(weights, **{name: {key: known[id(leaf)] for key, leaf in leaves.items()}})  # pyright: ignore
