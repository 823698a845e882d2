"""Networks in a file: a recipe and the numbers that go into what it makes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bayesae import nets, random
from bayesae.errors import BayesAEError, FileError, ParameterError, ShapeError, UnsupportedError

__all__ = ["DAMAGED", "PART", "REFUSALS", "build", "expect", "fill", "network_of", "network_tree", "sketch"]

DAMAGED = "Copy the file again from where it was written."
PART = {"recipe": (dict, type(None)), "type": (str,), "state": (dict,), "requires_grad": (dict,)}

# what constructors, torch among them, say of arguments that a file made up
REFUSALS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def network_tree(module: nn.Module) -> dict[str, Any]:
    """Recipe, numbers and flags of a network, as `PART` says; the recipe is None where it would make another one."""
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
        twin = build(recipe, "meta")
        _check_state(twin, module.state_dict(), "network")
    except BayesAEError:  # a layer was replaced since
        return None
    has_context = [getattr(network, "takes_context", False) for network in (twin, module)]
    return recipe if repr(twin) == repr(module) and has_context[0] == has_context[1] else None


def expect(tree: Any, kinds: Mapping[str, tuple[type, ...]], what: str) -> dict[str, Any]:  # noqa: ANN401
    """A dict with exactly these names, each of one of its types."""
    if type(tree) is not dict or tree.keys() != kinds.keys():
        raise FileError(f"{', '.join(kinds)} of {what}", type(tree).__name__, DAMAGED)
    for name, types in kinds.items():
        if not isinstance(tree[name], types):
            raise FileError(f"{name} of {what}", type(tree[name]).__name__, DAMAGED)
    return tree


def network_of(part: dict[str, Any], given: nn.Module | None, name: str, dtype: torch.dtype) -> nn.Module:
    """A network with the file's numbers and flags.

    Args:
        part: Of `network_tree`.
        given: A module to copy instead of following the recipe.
        name: What errors call it.
        dtype: Of the model that it was saved with.

    Returns:
        A module of its own.

    Raises:
        UnsupportedError: If there is neither a recipe nor a module.
        FileError: If the recipe is for other parameters.
        ParameterError: If the module has other parameters.
    """
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
        sketch(part, name)
        module = build(part["recipe"], "cpu")
    fill(module.to(dtype=dtype), part["state"], name)
    flags = part["requires_grad"]
    if flags.keys() != dict(module.named_parameters()).keys():
        kind, fix = (FileError, DAMAGED) if given is None else (ParameterError, f"Are weights of the {name} shared?")
        raise kind(f"parameters {list(flags)[:5]} ...", "others", fix)
    for key, parameter in module.named_parameters():
        parameter.requires_grad_(bool(flags[key]))
    return module


def sketch(part: dict[str, Any], name: str) -> nn.Module:
    """The network of a recipe, without numbers, if the recipe is for those that the file has.

    Args:
        part: Of `network_tree`, with a recipe.
        name: What errors call it.

    Returns:
        A module on the meta device.

    Raises:
        FileError: If it is not.
    """
    # counted first, then made on the meta device: a recipe for more than the file has takes no time and no memory
    try:
        _check_size(part["recipe"], len(part["state"]))
        module = build(part["recipe"], "meta")
        _check_state(module, part["state"], name)
    except BayesAEError as error:
        raise FileError(f"a recipe for the {name}'s parameters", str(error)[:400], DAMAGED) from error
    return module


def build(recipe: dict[str, Any], device: str) -> nn.Module:
    """The network of a recipe, its numbers those of seed 0; the caller's generators stay."""
    with random.scope(0), torch.device(device):
        return nets.build(recipe)


def _check_size(recipe: dict[str, Any], n_tensors: int) -> None:
    """Raise if a recipe has more layers and residual blocks than the file has tensors."""
    arguments = recipe["arguments"]
    if "net" in arguments:
        _check_size(arguments["net"], n_tensors)
    n_layers = max(len(arguments.get(name) or ()) for name in ("hidden", "channels"))
    if n_layers * (1 + arguments.get("n_residual", 0)) * arguments.get("n_steps", 1) > n_tensors:
        raise FileError(f"at most {n_tensors} layers", f"{n_layers}, residual blocks and steps", DAMAGED)


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


def fill(module: nn.Module, state: Mapping[str, Any], name: str) -> None:
    """Put the file's numbers into a module: shapes, dtypes, order in memory and shared parameters as they were."""
    _check_state(module, state, name)
    own = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    for key, value in state.items():
        if key in own:
            own[key].data = value.clone(memory_format=torch.preserve_format)
    module.load_state_dict(state)
