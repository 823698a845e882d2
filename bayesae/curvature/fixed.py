"""Layers that are linear and have no parameters: up-sampling, average pooling, padding, shuffles."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bayesae.curvature.steps import FixedLinearStep

__all__ = ["FIXED", "fixed_step"]

FIXED = (
    nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d,
    nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle,
)  # fmt: skip


def fixed_step(name: str, layer: nn.Module, x: Tensor, indices: tuple[int, ...]) -> FixedLinearStep:
    """The step of one of these layers.

    Args:
        name: Of the layer.
        layer: Itself.
        x: (B, *in).
        indices: Of the step that x came from.

    Returns:
        The step.
    """
    return FixedLinearStep(name, indices, layer(x), layer, _transpose(layer, x))


def _transpose(layer: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """The transpose of a fixed linear layer, from rows (N, *out) to (N, *in)."""
    shape = x.shape[1:]
    is_nearest = isinstance(layer, nn.Upsample) and layer.mode == "nearest" and x.dim() == 4
    # of a scale that is no whole number torch does not read the positions off the sizes
    if is_nearest and all(out % n == 0 for out, n in zip(layer(x[:1]).shape[2:], x.shape[2:], strict=True)):
        backward = torch.ops.aten.upsample_nearest2d_backward
        return lambda rows: backward(rows, rows.shape[2:], (len(rows), *shape))
    return lambda rows: torch.func.vjp(layer, rows.new_zeros(len(rows), *shape))[1](rows)[0]
