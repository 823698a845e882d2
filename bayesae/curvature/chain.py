"""One forward pass through a chain of layers that keeps what curvature needs: inputs and slopes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bayesae.errors import ShapeError, UnsupportedError
from bayesae.functional import at_least_float32, check_is_evaluable
from bayesae.types import Params

__all__ = ["LinearStep", "SlopeStep", "Trace", "push", "rows_per_chunk", "trace"]

ELEMENTWISE = (
    nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU, nn.LogSigmoid,
    nn.Mish, nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softshrink, nn.Softsign, nn.Tanh,
    nn.Tanhshrink, nn.Threshold,
)  # fmt: skip
_TRANSPARENT = (nn.Identity, nn.Flatten, nn.Unflatten, nn.Dropout)  # in flat coordinates, in evaluation mode
_MAX_ELEMENTS = 2**26  # of the largest temporary, 256 MB in float32


@dataclass(frozen=True)
class LinearStep:
    """Pre-activations = inputs @ weight.T + bias.

    Args:
        weight_name: Name of the weight among the network's parameters.
        bias_name: Name of the bias, or None if there is none.
        weight: (out, in).
        inputs: (B, in).
    """

    weight_name: str
    bias_name: str | None
    weight: Tensor
    inputs: Tensor


@dataclass(frozen=True)
class SlopeStep:
    """An element-wise layer; ``slope`` (B, width) is its derivative."""

    slope: Tensor


@dataclass(frozen=True)
class Trace:
    r"""A forward pass: its steps, input first, and its outputs (B, \*O)."""

    steps: list[LinearStep | SlopeStep]
    outputs: Tensor


def leaves(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Layers of nested ``nn.Sequential`` in the order in which they run.

    Args:
        module: A layer or a sequence.
        name: Its dotted name.

    Yields:
        Dotted name and layer.
    """
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        # not named_children: that leaves out the second place of a module that stands in two
        for child_name, child in module._modules.items():
            assert child is not None
            yield from leaves(child, f"{name}.{child_name}" if name else child_name)
    else:
        yield name, module


def trace(network: nn.Module, params: Params, x: Tensor) -> Trace:
    r"""Run a chain of Linear and element-wise layers at ``params`` and keep inputs and slopes.

    Half-precision parameters are computed with in float32: curvature is a sum over a data set.

    Args:
        network: Nested ``nn.Sequential``; gives structure and names, its own weights do not enter.
        params: Every parameter in its own shape.
        x: (B, \*data).

    Returns:
        The trace.

    Raises:
        UnsupportedError: If a layer has no rule or has hooks, if parameters are shared, or if dropout is on.
        ShapeError: If a Linear layer is applied to anything but (B, in).
    """
    check_is_evaluable(network)
    params = {name: at_least_float32(leaf) for name, leaf in params.items()}
    h = x.to(next(iter(params.values())).dtype)
    steps: list[LinearStep | SlopeStep] = []
    seen: set[int] = set()
    for name, layer in leaves(network):
        if layer._forward_hooks or layer._forward_pre_hooks:
            raise UnsupportedError("layers without hooks", f"{type(layer).__name__} {name!r} with one", "Remove it.")
        if type(layer) is nn.Linear:
            if h.dim() != 2:
                raise ShapeError(
                    f"inputs of shape (B, {layer.in_features}) for {name!r}",
                    f"{tuple(h.shape)}",
                    "Put nn.Flatten() before it.",
                )
            if h.shape[1] != layer.in_features:
                raise ShapeError(
                    f"rows of {layer.in_features} numbers for {name!r}",
                    f"{h.shape[1]}",
                    "Match the data's row to the first layer.",
                )
            own = {id(parameter) for parameter in layer.parameters()}
            if own & seen:
                raise UnsupportedError("each weight used once", f"{name!r} with tied weights", "Untie them.")
            seen |= own
            weight_name, bias_name = (f"{name}.{part}".removeprefix(".") for part in ("weight", "bias"))
            weight, bias = params[weight_name], params.get(bias_name)
            steps.append(LinearStep(weight_name, None if bias is None else bias_name, weight, h))
            h = F.linear(h, weight, bias)
        elif type(layer) in ELEMENTWISE:
            with torch.inference_mode(False), torch.enable_grad():
                at = h.detach().clone().requires_grad_()
                # an in-place activation would overwrite the inputs that the step before has kept
                y = layer(at.clone())
                (slope,) = torch.autograd.grad(y.sum(), at)
            h = y.detach()
            steps.append(SlopeStep(slope.flatten(1)))
        elif type(layer) in _TRANSPARENT:
            h = layer(h)
        else:
            raise UnsupportedError(
                "a chain of Linear and element-wise layers in nn.Sequential",
                f"no rule for {type(layer).__name__} {name!r}",
                "Use such layers, or a sampled posterior (Ensemble) for this network.",
            )
    return Trace(steps, h)


def push(factor: Tensor | None, slope: Tensor | None, weight: Tensor) -> Tensor:
    """Carry rows back through a linear layer and the slope above it: factor @ diag(slope) @ weight.

    Args:
        factor: (R, width), (B, R, width), or None for the identity.
        slope: (B, width), or None for ones.
        weight: (width, in).

    Returns:
        (R, in) if nothing depends on the row, else (B, R, in).
    """
    if slope is None:
        return weight if factor is None else factor @ weight
    if factor is not None and factor.dim() == 3:
        return (factor * slope[:, None]) @ weight
    scaled = slope[:, :, None] * weight
    return scaled if factor is None else factor @ scaled


def rows_per_chunk(network: nn.Module, n_outputs: int) -> int:
    """Rows whose largest temporary, (B, outputs, widest input), stays within a quarter of a gigabyte."""
    widths = [layer.in_features for _, layer in leaves(network) if type(layer) is nn.Linear]
    hidden = widths[1:] or [1]  # nothing is carried past the first layer
    return max(1, _MAX_ELEMENTS // (n_outputs * max(hidden)))
