"""Layer, group and instance normalisation, whose numbers of a row depend on one another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from bayesae.curvature.steps import Step
from bayesae.types import Params

__all__ = ["NORMALISED", "NormStep", "norm_step"]

NORMALISED = (nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


@dataclass(frozen=True)
class NormStep(Step):
    r"""Numbers of a group less their mean, over their standard deviation, then scaled and shifted by channel.

    .. math:: y = \gamma \hat x + \beta, \qquad
              \frac{\partial \hat x}{\partial x} = \frac1s \Big(I - \frac{1 1^\top + \hat x \hat x^\top}{n}\Big)

    within a group of n numbers: symmetric, and the identity but for two directions.

    Args:
        weight: Name of the scale, or None.
        bias: Name of the shift, or None.
        scale: Gamma as it multiplies a row, (1, \*broadcast).
        standardised: x hat, (B, \*out).
        rate: 1 / s, (B, G, 1).
        n_channels: Length of scale and shift.
    """

    weight: str | None
    bias: str | None
    scale: Tensor
    standardised: Tensor
    rate: Tensor
    n_channels: int

    @property
    def per_row(self) -> Sequence[str]:
        """Value, what is scaled, and the rates."""
        return ("value", "standardised", "rate")

    @property
    def names(self) -> Sequence[str]:
        """Scale and shift."""
        return [name for name in (self.weight, self.bias) if name is not None]

    def _standardise(self, rows: Tensor) -> Tensor:
        r"""The derivative of x hat times rows (B or 1, R, \*out), or its transpose: they are the same."""
        grouped = rows.reshape(*rows.shape[:2], self.rate.shape[1], -1)
        at = self.standardised.reshape(len(self.value), 1, self.rate.shape[1], -1)
        centred = grouped - grouped.mean(-1, keepdim=True) - at * (grouped * at).mean(-1, keepdim=True)
        return (centred * self.rate[:, None]).reshape(-1, *rows.shape[1:])

    def pull(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Scaled, then through the derivative of x hat."""
        return (self._standardise(rows * self.scale),)

    def push(self, tangents: Sequence[Tensor | None]) -> Tensor:
        """Through the derivative of x hat, then scaled."""
        (tangent,) = tangents
        assert tangent is not None
        return self._standardise(tangent) * self.scale

    def _by_channel(self, values: Tensor) -> Tensor:
        values = values.expand(len(self.value), *values.shape[1:])
        axes = [i + 1 for i in range(1, self.scale.dim()) if self.scale.shape[i] == 1 and values.shape[i + 1] > 1]
        return (values.sum(axes) if axes else values).flatten(2)

    def gradients(self, rows: Tensor) -> Params:
        """Sums over positions."""
        result = {}
        if self.weight is not None:
            result[self.weight] = self._by_channel(rows * self.standardised[:, None])
        if self.bias is not None:
            result[self.bias] = self._by_channel(rows)
        return result

    def push_parameters(self, tangents: Params) -> Tensor:
        """By channel."""
        total = self.value.new_zeros(1, 1, *self.value.shape[1:])
        if self.weight is not None and self.weight in tangents:
            total = total + tangents[self.weight].reshape(1, -1, *self.scale.shape[1:]) * self.standardised[:, None]
        if self.bias is not None and self.bias in tangents:
            total = total + tangents[self.bias].reshape(1, -1, *self.scale.shape[1:])
        return total


def norm_step(
    name: str, layer: nn.Module, own: dict[str, str], params: Params, x: Tensor, indices: tuple[int, ...]
) -> NormStep | None:
    r"""The step of a normalisation that needs nothing but the row.

    Args:
        name: Of the layer.
        layer: Itself.
        own: Names in the network of its parameters.
        params: Of the network.
        x: (B, \*in).
        indices: Of the step that x came from.

    Returns:
        The step, or None for one with running statistics, or over several axes with a scale each.
    """
    if isinstance(layer, nn.LayerNorm):
        if len(layer.normalized_shape) != 1 or x.shape[-1:] != layer.normalized_shape:
            return None
        n_groups, shape = x[0].numel() // x.shape[-1], (1, *[1] * (x.dim() - 2), -1)
    elif isinstance(layer, nn.GroupNorm):
        n_groups, shape = layer.num_groups, (1, -1, *[1] * (x.dim() - 2))
    else:
        assert isinstance(layer, (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d))
        # without an axis of channels torch takes the batch for it
        if layer.running_mean is not None or x.dim() != {nn.InstanceNorm1d: 3, nn.InstanceNorm2d: 4}.get(
            type(layer), 5
        ):
            return None
        n_groups, shape = x.shape[1], (1, -1, *[1] * (x.dim() - 2))
    grouped = x.reshape(len(x), n_groups, -1)
    rate = (grouped.var(-1, correction=0, keepdim=True) + layer.eps).rsqrt()
    standardised = ((grouped - grouped.mean(-1, keepdim=True)) * rate).reshape(x.shape)
    ones = x.new_ones(x.shape[-1] if isinstance(layer, nn.LayerNorm) else x.shape[1])
    scale = (params[own["weight"]] if "weight" in own else ones).reshape(shape)
    value = standardised * scale
    value = value + params[own["bias"]].reshape(shape) if "bias" in own else value
    return NormStep(name, indices, value, own.get("weight"), own.get("bias"), scale, standardised, rate, len(ones))
