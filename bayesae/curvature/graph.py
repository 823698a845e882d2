"""The graph of layers of a network, read once by torch.fx, and how each kind of layer makes its step."""

from __future__ import annotations

import inspect
import operator
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate, map_arg
from torch.nn import functional as F

from bayesae.curvature.elementwise import ELEMENTWISE, elementwise_step
from bayesae.curvature.fixed import FIXED, fixed_step
from bayesae.curvature.functions import Given, NotAStepError, Ref, call, check_overwrites, function_step, given_value
from bayesae.curvature.layout import Layout
from bayesae.curvature.linear import ConvStep, LinearStep, channels_last
from bayesae.curvature.normalised import NORMALISED, norm_step
from bayesae.curvature.steps import (
    AffineStep,
    InputStep,
    OpaqueStep,
    ReshapeStep,
    Step,
    module_function,
)
from bayesae.errors import ShapeError, UnsupportedError
from bayesae.functional import check_is_evaluable
from bayesae.types import Params

__all__ = ["Graph", "read"]

_CONVOLUTIONS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
_SAME = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


class _Tracer(fx.Tracer):
    """Reads a module's own forward; leaves are torch's layers, and what cannot be read."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if super().is_leaf_module(m, module_qualified_name):
            return True
        try:
            _Tracer().trace(m)
        except Exception:  # noqa: BLE001 - control flow on data raises whatever it likes
            return True
        return False


@dataclass(frozen=True)
class Graph:
    """A network as a list of operations.

    Args:
        network: The module itself.
        nodes: Operations in order, or None where the network as a whole cannot be read.
        names: Parameters of each leaf by its dotted name: {own name: name in the network}.
        shared: Names of parameters that are used in more than one place, or outside a layer.
        constants: Tensors that the forward makes anew, by the name that torch.fx gave them.
    """

    network: nn.Module
    nodes: list[fx.Node] | None
    names: Mapping[str, dict[str, str]]
    shared: frozenset[str]
    constants: Mapping[str, Tensor] = field(default_factory=dict)

    def run(self, params: Params, x: Tensor) -> list[Step]:
        r"""Every step of one batch, the input first and the outputs last.

        Args:
            params: Every parameter in its own shape.
            x: (B, \*data).

        Returns:
            The steps.
        """
        if self.nodes is not None:
            try:
                return self._run(self.nodes, params, x)
            except NotAStepError:
                pass
        names = dict(self.network.named_parameters())
        whole = _opaque_module(_WHOLE, self.network, {name: name for name in names}, params, (0,), (x,))
        return [InputStep("input", (), x), whole]

    def _run(self, nodes: list[fx.Node], params: Params, x: Tensor) -> list[Step]:
        steps: list[Step] = [InputStep("input", (), x)]
        env: dict[fx.Node, Any] = {}
        for node in nodes:
            if node.op == "placeholder":
                # further arguments were given their defaults when the graph was read, and are only asserted
                env[node] = None if env else Given(x)
            elif node.target is torch._assert:
                continue
            elif node.op == "get_attr":
                constant = self.constants.get(str(node.target))
                value = operator.attrgetter(str(node.target))(self.network) if constant is None else constant
                env[node] = _attribute(self.network, value, params, x.dtype)
            elif node.op == "output":
                (result,) = node.args
                if not isinstance(result, fx.Node) or not isinstance(env[result], (Ref, Given)):
                    raise NotAStepError
                return steps[: _as_ref(env[result], steps).index + 1]
            else:
                args, kwargs = map_arg((node.args, node.kwargs), lambda n: env[n])
                env[node] = self._apply(node, args, kwargs, params, steps)
        raise NotAStepError

    def _apply(self, node: fx.Node, args: Any, kwargs: Any, params: Params, steps: list[Step]) -> Any:  # noqa: ANN401
        found: list[Ref | Given] = []
        map_aggregate((args, kwargs), lambda a: found.append(a) if isinstance(a, (Ref, Given)) else None)
        refs = [a for a in found if isinstance(a, Ref)]
        if node.op == "call_module":
            assert isinstance(node.target, str)
            if (
                len(found) != len(args)
                or kwargs
                or any(isinstance(a, Given) and not isinstance(a.value, Tensor) for a in found)
            ):
                raise NotAStepError
            layer, own = self.network.get_submodule(node.target), self.names[node.target]
            check_overwrites(node, layer)
            if not refs and not own:
                # upstream of every parameter nothing is carried, so that only values are wanted
                values = tuple(a.value.clone() for a in found if isinstance(a, Given))
                same = type(layer) in _SAME
                return found[0] if same else Given(_opaque_module(node.target, layer, own, params, (), values).value)
            step = _module_step(node.target, layer, own, params, steps, [_as_ref(a, steps) for a in found])
        else:
            if found:
                check_overwrites(node, None)
            if not refs:
                return given_value(node, args, kwargs, len(steps[0].value)) if found else call(node, args, kwargs)
            step = function_step(node, args, kwargs, steps, refs)
        if not isinstance(step, Step):
            return step
        steps.append(step)
        return Ref(len(steps) - 1)


def _as_ref(a: Ref | Given, steps: list[Step]) -> Ref:
    """The step that an argument comes from; of the data, one put right before its use, so that cuts stay cuts."""
    if isinstance(a, Ref):
        return a
    if a.value is steps[0].value and len(steps) == 1:
        return Ref(0)
    steps.append(InputStep(f"input {len(steps)}", (), a.value))
    return Ref(len(steps) - 1)


_WHOLE = "network"  # name of the one step of a network that cannot be read


def _graph(network: nn.Module) -> fx.Graph:
    if not fx.Tracer().is_leaf_module(network, ""):
        # a default is a constant: an argument left free would take the branch of one that is given
        arguments = list(inspect.signature(network.forward).parameters.values())[1:]
        defaults = {a.name: a.default for a in arguments if a.default is not a.empty}
        return _Tracer().trace(network, concrete_args=defaults)
    graph = fx.Graph()  # a single layer: traced, it would be functions of its parameters, which no step owns
    graph.output(graph.create_node("call_module", "", (graph.placeholder("x"),)))
    return graph


def read(network: nn.Module) -> Graph:
    """Read a network's operations and who owns each parameter.

    Args:
        network: Any module that maps one tensor to one tensor.

    Returns:
        The graph.

    Raises:
        UnsupportedError: If a layer has hooks, or is not in evaluation mode where that matters.
    """
    check_is_evaluable(network)
    for name, layer in network.named_modules():
        if layer._forward_hooks or layer._forward_pre_hooks:
            raise UnsupportedError("layers without hooks", f"{type(layer).__name__} {name!r} with one", "Remove it.")
    canonical = {id(parameter): name for name, parameter in network.named_parameters()}
    kept = [(module, dict(vars(module)), dict(module._buffers)) for module in network.modules()]
    values = [(buffer, buffer.clone()) for buffer in network.buffers()]
    try:
        nodes: list[fx.Node] | None = list(_graph(network).nodes)
        read_of = {str(n.target): operator.attrgetter(str(n.target))(network) for n in nodes if n.op == "get_attr"}
    except Exception:  # noqa: BLE001 - control flow on data raises whatever it likes
        return Graph(network, None, {}, frozenset())
    finally:
        for module, attributes, buffers in kept:  # a forward that stores something would have stored a proxy
            vars(module).clear()
            vars(module).update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)
        for buffer, value in values:
            buffer.data.copy_(value)
    names, uses = {}, Counter[str]()
    for node in nodes:
        if node.op == "call_module":
            assert isinstance(node.target, str)
            layer = network.get_submodule(node.target)
            own = {mine: canonical[id(p)] for mine, p in layer.named_parameters(remove_duplicate=False)}
            names[node.target] = own
            uses.update(own.values())
        elif node.op == "get_attr" and (name := canonical.get(id(read_of[str(node.target)]))) is not None:
            uses[name] += 2  # a function of a parameter: no step owns it
    # what torch.fx had put on the network is no longer there
    constants = {name: value for name, value in read_of.items() if name.startswith("_tensor_constant")}
    return Graph(network, nodes, names, frozenset(name for name, n in uses.items() if n > 1), constants)


def _attribute(network: nn.Module, value: Any, params: Params, dtype: torch.dtype) -> Any:  # noqa: ANN401
    for name, parameter in network.named_parameters():
        if parameter is value:
            return params[name]
    return _copy(value, dtype) if isinstance(value, Tensor) else value


def _copy(buffer: Tensor, dtype: torch.dtype) -> Tensor:
    """A buffer that a forward may write to, in the network's precision."""
    return buffer.to(dtype, copy=True) if buffer.is_floating_point() else buffer.clone()


def _module_step(
    name: str, layer: nn.Module, own: dict[str, str], params: Params, steps: list[Step], refs: list[Ref]
) -> Step | Ref:
    kind, indices = type(layer), tuple(ref.index for ref in refs)
    source = steps[indices[0]]
    x = source.value
    if kind in _SAME:
        return refs[0]
    if isinstance(layer, nn.Linear) and kind is nn.Linear:
        return _linear_step(name, layer, own, params, x, indices)
    if isinstance(layer, _CONVOLUTIONS) and kind in _CONVOLUTIONS:
        step = _conv_step(name, layer, own, params, x, indices)
        if step is not None:
            return step
    if kind in ELEMENTWISE:
        return elementwise_step(name, layer, x, indices)
    if kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
        return _affine_step(name, layer, own, params, x, indices)
    if kind is nn.PReLU:
        weight = params[own["weight"]]
        shape = (1, -1, *[1] * (x.dim() - 2))
        slope = torch.where(x > 0, 1.0, weight.reshape(shape) if len(weight) > 1 else weight)
        return AffineStep(name, indices, x * slope, slope, own["weight"], None, x.clamp(max=0), len(weight))
    if kind in FIXED:
        return fixed_step(name, layer, x, indices)
    if kind in NORMALISED:
        step = norm_step(name, layer, own, params, x, indices)
        if step is not None:
            return step
    if kind in (nn.Flatten, nn.Unflatten):
        value = layer(x)
        if value.shape[0] == len(x):
            return ReshapeStep(name, indices, value, x.shape[1:])
    return _opaque_module(name, layer, own, params, indices, tuple(steps[i].value for i in indices))


def _linear_step(
    name: str, layer: nn.Linear, own: dict[str, str], params: Params, x: Tensor, indices: tuple[int, ...]
) -> Step:
    if x.shape[-1] != layer.in_features or x.dim() < 2:
        raise ShapeError(
            f"rows of {layer.in_features} numbers for {name!r}",
            f"{x.shape[-1]}, in inputs of shape {tuple(x.shape)}",
            "Match the data's row to the first layer, or put nn.Flatten() before it.",
        )
    weight, bias = params[own["weight"]], params[own["bias"]] if "bias" in own else None
    layout = Layout(own["weight"], own.get("bias"), weight.shape)
    return LinearStep(name, indices, F.linear(x, weight, bias), layout, weight, bias, x)


def _conv_step(
    name: str,
    layer: Any,  # noqa: ANN401 - one of six classes
    own: dict[str, str],
    params: Params,
    x: Tensor,
    indices: tuple[int, ...],
) -> Step | None:
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str) or x.dim() != len(layer.kernel_size) + 2:
        return None  # correct, if slower, as an opaque step
    if x.shape[1] != layer.in_channels:
        raise ShapeError(
            f"{layer.in_channels} channels for {name!r}",
            f"inputs of shape {tuple(x.shape)}",
            "Match the data's shape to the first layer.",
        )
    weight, bias = params[own["weight"]], params[own["bias"]] if "bias" in own else None
    layout = Layout(own["weight"], own.get("bias"), weight.shape, layer.groups, layer.transposed)
    x = channels_last(x)
    value = torch.convolution(
        x, channels_last(weight), bias, layer.stride, layer.padding, layer.dilation, layer.transposed,
        layer.output_padding, layer.groups,
    )  # fmt: skip
    return ConvStep(
        name, indices, channels_last(value), layout, weight, bias, x, layer.stride, layer.padding, layer.dilation,
        layer.output_padding,
    )  # fmt: skip


def _affine_step(
    name: str,
    layer: Any,  # noqa: ANN401 - batch normalisation of any number of axes
    own: dict[str, str],
    params: Params,
    x: Tensor,
    indices: tuple[int, ...],
) -> Step:
    shape = (1, -1, *[1] * (x.dim() - 2))
    mean, var = layer.running_mean.to(x.dtype).reshape(shape), layer.running_var.to(x.dtype).reshape(shape)
    rate = (var + layer.eps).rsqrt()
    standardised = (x - mean) * rate
    scale = params[own["weight"]].reshape(shape) if "weight" in own else torch.ones_like(rate)
    value = standardised * scale + (params[own["bias"]].reshape(shape) if "bias" in own else 0)
    slope = rate * scale
    return AffineStep(name, indices, value, slope, own.get("weight"), own.get("bias"), standardised, x.shape[1])


def _opaque_module(
    name: str,
    layer: nn.Module,
    own: dict[str, str],
    params: Params,
    indices: tuple[int, ...],
    inputs: tuple[Tensor, ...],
) -> Step:
    buffers = {key: _copy(value, inputs[0].dtype) for key, value in layer.named_buffers()}
    function = module_function(layer, own, buffers)
    mine = {full: params[full] for full in own.values()}
    value = function(mine, *inputs)
    if not isinstance(value, Tensor) and name != _WHOLE:
        raise NotAStepError  # the network may still make one tensor of it
    if not isinstance(value, Tensor) or value.shape[:1] != inputs[0].shape[:1]:
        what = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise UnsupportedError(
            "layers that give one tensor with a row for every datum",
            f"{type(layer).__name__} {name!r} giving {what}",
            "Wrap it in a module that does.",
        )
    return OpaqueStep(name, indices, value, function, inputs, mine)
