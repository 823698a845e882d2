"""A `Predictive` as a tree that a file can hold, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bayesae import families, likelihoods
from bayesae.errors import BayesAEError, FileError, ShapeError, UnsupportedError
from bayesae.families import IndependentNormals, Mixture, Particles
from bayesae.files.codes import check_codes, code_tree, codes_of
from bayesae.files.networks import DAMAGED, PART, REFUSALS, build, expect, fill, network_of, network_tree
from bayesae.functional import dtype_of
from bayesae.models import Autoencoder
from bayesae.predictive import Predictive
from bayesae.types import Likelihood, WeightPosterior

__all__ = ["DTYPES", "check_tree", "likelihood_of", "likelihood_tree", "predictive_of", "tree_of"]

DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
}
_HEAD = {"name": (str,), "arguments": (dict,), "state": (dict,)}
_TREE = {
    "encoder": (dict,),
    "decoder": (dict,),
    "likelihood": (dict,),
    "data_shape": (tuple, type(None)),
    "dtype": (str,),
    "training": (list,),
    "weights": tuple(getattr(families, name) for name in families.__all__),
    "codes": (str, dict, type(None)),
    "linearised": (bool, type(None)),
}
_LARGEST = 2**48  # numbers in a row, as in every shape of a file


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
    encoder, decoder = network_tree(model.encoder), network_tree(model.decoder)
    _check_sizes(encoder["recipe"], decoder["recipe"], model.likelihood, model.data_shape)
    return {
        "encoder": encoder,
        "decoder": decoder,
        "likelihood": likelihood_tree(model.likelihood),
        "data_shape": model.data_shape,
        "dtype": str(dtype_of(model)).removeprefix("torch."),
        "training": [name for name, module in model.named_modules() if module.training],
        "weights": predictive.weights,
        "codes": code_tree(predictive.codes),
        "linearised": predictive.linearised,
    }


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
        expect(tree[name], PART, name)
    likelihood_of(tree["likelihood"])
    weights, shape = tree["weights"], tree["data_shape"]
    if isinstance(weights, IndependentNormals) and not weights.parts:
        raise FileError("parts of a posterior", "none", DAMAGED)
    if weights.n_atoms is not None and tree["linearised"]:
        raise FileError("a continuous posterior to linearise", "particles", DAMAGED)
    if shape is not None and not (shape and all(type(n) is int and n > 0 for n in shape) and _fits(shape)):
        raise FileError("a shape of rows", repr(shape)[:80], DAMAGED)
    if tree["dtype"] not in DTYPES:
        raise FileError(f"dtype among {list(DTYPES)}", repr(tree["dtype"])[:80], DAMAGED)
    check_codes(tree["codes"])
    if not all(type(name) is str for name in tree["training"]):
        raise FileError("names of modules in training mode", "others", DAMAGED)


def _fits(shape: Sequence[int]) -> bool:
    return math.prod(shape) <= _LARGEST


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
    modules = {name: network_of(tree[name], module, name, own) for name, module in given.items()}
    try:
        likelihood = likelihood_of(tree["likelihood"])
        recipes = {name: tree[name]["recipe"] if module is None else None for name, module in given.items()}
        _check_sizes(recipes["encoder"], recipes["decoder"], likelihood, tree["data_shape"])
        model = Autoencoder(**modules, likelihood=likelihood, data_shape=tree["data_shape"])
        for name, module in model.named_modules():
            module.training = name in tree["training"]
        model = model.to(device=device, dtype=dtype)
        weights = tree["weights"] if dtype is None else _in_dtype(tree["weights"], dtype, {})
        codes = codes_of(tree["codes"], own, lambda module: module.to(device=device, dtype=dtype))
        return Predictive(model, weights, codes, tree["linearised"])
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
            likelihood.data_shape(build(inner, "meta")(codes).shape[1:])
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
        fill(likelihood, tree["state"], "likelihood")
    except REFUSALS as error:
        raise FileError("a likelihood that can be", f"{type(error).__name__}: {str(error)[:400]}", DAMAGED) from error
    return likelihood


def _in_dtype(weights: WeightPosterior, dtype: torch.dtype, known: dict[int, Tensor]) -> WeightPosterior:
    """The posterior around a mean of another dtype; leaves that parts share stay shared."""
    if isinstance(weights, IndependentNormals):
        parts: list[Any] = [_in_dtype(part, dtype, known) for part in weights.parts]  # pyright: ignore[reportArgumentType]
        return replace(weights, parts=parts)
    if isinstance(weights, Mixture):
        return replace(weights, components=[_in_dtype(one, dtype, known) for one in weights.components])
    name = "atoms" if isinstance(weights, Particles) else "mean"
    leaves = getattr(weights, name)
    for leaf in leaves.values():
        known.setdefault(id(leaf), leaf.to(dtype))
    return replace(weights, **{name: {key: known[id(leaf)] for key, leaf in leaves.items()}})  # pyright: ignore
