"""Networks of other libraries: copies without their hooks, and the place where an autoencoder's code is."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch.fx
from torch import Tensor, nn

from bayesae.errors import ParameterError, UnsupportedError
from bayesae.types import Params

__all__ = ["clean_copy", "cut_network"]

_THEIRS = {"laplace", "backpack"}  # packages that hang hooks on the networks they are given
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def clean_copy(network: nn.Module, params: Params) -> nn.Module:
    """A copy in evaluation mode, at given weights, without the hooks of laplace-torch and BackPACK.

    Args:
        network: Stays untouched.
        params: The weights, every parameter in its own shape.

    Returns:
        The copy, which shares no memory with ``network``; hooks of others are still on it.
    """
    memo: dict[int, Any] = {}
    for module in network.modules():
        for value in vars(module).values():
            # what BackPACK's hooks leave on a layer is part of a graph, which deepcopy refuses
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach()
    result = copy.deepcopy(network, memo)
    for module in result.modules():
        for kind in _HOOKS:
            hooks = getattr(module, kind)
            for key in [key for key, hook in hooks.items() if hook.__module__.split(".")[0] in _THEIRS]:
                del hooks[key]
    for name, parameter in result.named_parameters():
        parameter.data = params[name].detach().clone()
        parameter.grad = None
    return result.eval()


def cut_network(network: nn.Module, cut: int | str | None) -> tuple[nn.Module, nn.Module, dict[str, str]]:
    """Encoder and decoder of a network.

    Args:
        network: A module whose forward is ``decoder(encoder(x))`` with attributes of these names, or an
            `nn.Sequential`.
        cut: Of a Sequential, index or name of the module at which the decoder starts; None: after the first module
            with the fewest outputs, read off the linear layers.

    Returns:
        Encoder, decoder, and for each parameter's name its name in an `Autoencoder` of the two.

    Raises:
        UnsupportedError: If the network is no autoencoder for all that can be seen; the message says why.
        ParameterError: If ``cut`` names no place between two modules.
    """
    if all(isinstance(getattr(network, part, None), nn.Module) for part in ("encoder", "decoder")):
        if cut is not None:
            raise ParameterError("no cut", f"cut={cut!r} of a network that has an encoder and a decoder", "Drop it.")
        _check_forward(network)
        return (
            network.get_submodule("encoder"),
            network.get_submodule("decoder"),
            {name: name for name, _ in network.named_parameters()},
        )
    if not isinstance(network, nn.Sequential) or type(network).forward is not nn.Sequential.forward:
        raise UnsupportedError(
            "attributes encoder and decoder, or an nn.Sequential",
            f"{type(network).__name__}, which has neither",
            "Give laplace-torch a module with the two as attributes.",
        )
    children = OrderedDict(network.named_children())
    at = _narrowest(children) if cut is None else _position(children, cut)
    items = list(children.items())
    halves = [nn.Sequential(OrderedDict(items[:at])), nn.Sequential(OrderedDict(items[at:]))]
    first = {name for name, _ in items[:at]}
    names = {
        name: f"{'encoder' if name.split('.')[0] in first else 'decoder'}.{name}"
        for name, _ in network.named_parameters()
    }
    return halves[0], halves[1], names


def _position(children: OrderedDict[str, nn.Module], cut: int | str) -> int:
    names = list(children)
    at = names.index(cut) if cut in names else cut
    if not isinstance(at, int) or not 0 < at < len(names):
        raise ParameterError(
            f"an index from 1 to {len(names) - 1} or a name of {names[1:]}", f"cut={cut!r}", "The decoder starts there."
        )
    return at


def _narrowest(children: OrderedDict[str, nn.Module]) -> int:
    """Where a Sequential has the fewest outputs, as far as linear layers tell."""
    layers = [[m for m in child.modules() if isinstance(m, nn.Linear)] for child in children.values()]
    ends = [
        m for child in children.values() for m in child.modules() if next(m.parameters(recurse=False), None) is not None
    ]
    widths = {at + 1: found[-1].out_features for at, found in enumerate(layers[:-1]) if found}
    fix = "Say where the decoder starts by from_laplace(la, cut=...)."
    if not widths:
        raise UnsupportedError("a linear layer whose output is the code", "none before the last module", fix)
    if (
        isinstance(ends[0], nn.Linear)
        and isinstance(ends[-1], nn.Linear)
        and (ends[0].in_features != ends[-1].out_features)
    ):
        got = f"{ends[0].in_features} inputs and {ends[-1].out_features} outputs"
        raise UnsupportedError("as many outputs as inputs", got, fix)
    return min(widths, key=lambda at: widths[at])


class _Tracer(torch.fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in {"encoder", "decoder"}


def _check_forward(network: nn.Module) -> None:
    """Raise unless forward is decoder(encoder(x)) and nothing else, by its graph: there are no data to try it on."""
    fix = "Move what else it does into the encoder or the decoder."
    try:
        nodes = list(_Tracer().trace(network).nodes)
    except Exception as error:  # a forward can fail on a proxy in any way
        got = f"a forward of {type(network).__name__} that cannot be traced ({error})"
        raise UnsupportedError("a forward that is decoder(encoder(x))", got, fix) from error
    steps = [node for node in nodes if node.op != "placeholder"]
    chain = [nodes[0], *steps]
    follows = all(node.args == (before,) and not node.kwargs for before, node in zip(chain, steps, strict=False))
    if [(node.op, node.target) for node in steps[:-1]] != [("call_module", "encoder"), ("call_module", "decoder")] or (
        not follows
    ):
        got = " -> ".join(str(node.target) for node in steps[:-1]) or "nothing"
        raise UnsupportedError("a forward that is decoder(encoder(x))", got, fix)
