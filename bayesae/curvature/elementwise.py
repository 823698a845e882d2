"""Element-wise layers and functions: which they are, and their slopes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bayesae.curvature.steps import SlopeStep

__all__ = ["ELEMENTWISE", "ELEMENTWISE_FUNCTIONS", "elementwise_step"]

ELEMENTWISE = (
    nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU, nn.LogSigmoid,
    nn.Mish, nn.ReLU, nn.ReLU6, nn.RReLU, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softshrink, nn.Softsign,
    nn.Tanh, nn.Tanhshrink, nn.Threshold,
)  # fmt: skip
ELEMENTWISE_FUNCTIONS = frozenset(
    "relu relu_ relu6 tanh tanh_ sigmoid sigmoid_ logsigmoid gelu silu mish elu elu_ celu selu leaky_relu leaky_relu_ "
    "hardtanh hardswish hardsigmoid hardshrink softshrink tanhshrink softsign softplus threshold exp log log1p expm1 "
    "sqrt rsqrt sin cos tan sinh cosh asinh atan erf square abs neg reciprocal pow clamp mul truediv div float double "
    "to contiguous clone".split()
)
# from the value itself, where it gives them; of the others by autograd
_SLOPES: dict[type[nn.Module], Callable[[Tensor], Tensor]] = {
    nn.Tanh: lambda y: 1 - y * y,
    nn.Sigmoid: lambda y: y * (1 - y),
    nn.ReLU: lambda y: (y > 0).to(y.dtype),
}


def elementwise_step(name: str, function: Callable[[Tensor], Tensor], x: Tensor, indices: tuple[int, ...]) -> SlopeStep:
    """An element-wise function at x, which is not overwritten.

    Args:
        name: Of the layer.
        function: Of x; may write in place.
        x: (B, *shape).
        indices: Of the step that x came from.

    Returns:
        The step.
    """
    if (slope_of := _SLOPES.get(type(function))) is not None:  # pyright: ignore[reportArgumentType] - a layer's type
        value = function(x.clone() if getattr(function, "inplace", False) else x)
        return SlopeStep(name, indices, value, slope_of(value))
    with torch.inference_mode(False), torch.enable_grad():
        at = x.detach().clone().requires_grad_()
        y = function(at.clone())
        (slope,) = torch.autograd.grad(y.sum(), at)
    return SlopeStep(name, indices, y.detach(), slope)
