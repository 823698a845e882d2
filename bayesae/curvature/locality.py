r"""Which positions of a layer an output pixel can depend on, by stride and kernel arithmetic.

A field is a box: per axis, for every output coordinate, the first and last coordinate that it sees. Boxes are hulls:
too wide is still exact, only dearer. Outputs whose boxes do not meet can share a row (Jacobian colouring).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bayesae.curvature.linear import ConvStep
from bayesae.curvature.steps import AddStep, AffineStep, ReshapeStep, SlopeStep, Step

__all__ = ["Field", "colour_masks", "fields_of", "n_colours"]

_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)


@dataclass(frozen=True)
class Field:
    """Fields of all outputs at one step, per axis first and last coordinates, each as long as the output's axis.

    Args:
        positions: Size of each axis at the step.
        low: One list an axis.
        high: Likewise.
    """

    positions: tuple[int, ...]
    low: tuple[tuple[int, ...], ...]
    high: tuple[tuple[int, ...], ...]

    @property
    def reach(self) -> tuple[int, ...]:
        """Largest distance, per axis, between two positions of one field."""
        return tuple(
            max(h - x for x, h in zip(low, high, strict=True)) for low, high in zip(self.low, self.high, strict=True)
        )

    def join(self, other: Field) -> Field:
        """The hull of both."""
        low = tuple(tuple(map(min, a, b)) for a, b in zip(self.low, other.low, strict=True))
        high = tuple(tuple(map(max, a, b)) for a, b in zip(self.high, other.high, strict=True))
        return Field(self.positions, low, high)

    def periods(self, gap: Sequence[int]) -> tuple[int, ...]:
        """Per axis, how far apart outputs must be so that their fields lie more than ``gap`` apart."""
        result = []
        for low, high, margin in zip(self.low, self.high, gap, strict=True):
            n, period = len(low), 1
            while any(low[o + period] <= high[o] + margin for o in range(n - period)):
                period += 1
            result.append(period)
        return tuple(result)


def fields_of(steps: Sequence[Step], layers: dict[str, nn.Module]) -> list[Field | None]:
    r"""The outputs' fields at every step; None where there are no positions or anything may depend on anything.

    Args:
        steps: A trace whose outputs are (B, C, \*positions).
        layers: The network's modules by name.

    Returns:
        One entry a step.
    """
    outputs = steps[-1].value
    result: list[Field | None] = [None] * len(steps)
    reached = [False] * len(steps)
    n_axes = outputs.dim() - 2
    if n_axes < 1:
        return result
    identity = tuple(tuple(range(n)) for n in outputs.shape[2:])
    result[-1], reached[-1] = Field(tuple(outputs.shape[2:]), identity, identity), True
    for i in range(len(steps) - 1, 0, -1):
        step, field = steps[i], result[i]
        for j in step.sources:
            before = None if field is None else _before(field, step, steps[j], layers.get(step.name))
            known = result[j]
            if reached[j]:  # two paths: known only if both are
                before = (
                    None
                    if before is None or known is None or known.positions != before.positions
                    else known.join(before)
                )
            result[j], reached[j] = before, True
    return result


def _before(field: Field, step: Step, source: Step, layer: nn.Module | None) -> Field | None:
    if isinstance(step, (SlopeStep, AffineStep, AddStep)):
        return field
    if isinstance(step, ReshapeStep):
        # the same numbers in the same order: disjoint stays disjoint, in this shape's coordinates
        return field
    n_axes, shape = len(field.low), source.value.shape[2:]
    if len(shape) != n_axes or tuple(step.value.shape[2:]) != field.positions:
        return None
    if isinstance(step, ConvStep):
        taps = [d * (k - 1) for d, k in zip(step.dilation, step.kernel, strict=True)]
        if step.layout.is_transposed:
            rule = [
                lambda a, b, s=s, p=p, t=t: (-(-(a + p - t) // s), (b + p) // s)
                for s, p, t in zip(step.stride, step.padding, taps, strict=True)
            ]
        else:
            rule = [
                lambda a, b, s=s, p=p, t=t: (a * s - p, b * s - p + t)
                for s, p, t in zip(step.stride, step.padding, taps, strict=True)
            ]
    elif isinstance(layer, _POOLS):
        rule = []
        for axis in range(n_axes):
            k, s, p, d = (
                _one(getattr(layer, name, 1), axis) for name in ("kernel_size", "stride", "padding", "dilation")
            )
            rule.append(lambda a, b, k=k, s=s, p=p, d=d: (a * s - p, b * s - p + d * (k - 1)))
    elif isinstance(layer, nn.Upsample):
        rule = [_upsampling(layer, n, step.value.shape[2 + axis], axis) for axis, n in enumerate(shape)]
    else:
        return None
    low, high = [], []
    for axis, (n, one) in enumerate(zip(shape, rule, strict=True)):
        pairs = [one(a, b) for a, b in zip(field.low[axis], field.high[axis], strict=True)]
        # a field that misses the layer altogether shrinks to its nearest position
        low.append(tuple(min(max(a, 0), n - 1) for a, _ in pairs))
        high.append(tuple(max(min(max(b, 0), n - 1), lo) for (_, b), lo in zip(pairs, low[-1], strict=True)))
    return Field(tuple(shape), tuple(low), tuple(high))


def _one(value: int | Sequence[int], axis: int) -> int:
    return value if isinstance(value, int) else value[axis]


def _upsampling(layer: nn.Upsample, n_in: int, n_out: int, axis: int) -> Callable[[int, int], tuple[int, int]]:
    given = layer.scale_factor
    factor = given[axis] if isinstance(given, tuple) else given
    if layer.mode in {"nearest", "nearest-exact"}:
        ramp, size = torch.arange(n_in, dtype=torch.float64).reshape(1, 1, -1), n_out if factor is None else None
        index = F.interpolate(
            ramp, size, factor, layer.mode, recompute_scale_factor=layer.recompute_scale_factor
        )  # fmt: skip
        places = [round(i) for i in index.flatten().tolist()]
        return lambda a, b: (places[a], places[b])
    margin = 2 if layer.mode == "bicubic" else 1
    if layer.align_corners:
        rate = (n_in - 1) / max(n_out - 1, 1)
        return lambda a, b: (math.floor(a * rate) - margin + 1, math.ceil(b * rate) + margin - 1)
    # a factor that was given is used as it is, even where the sizes stand in another ratio
    rate = n_in / n_out if factor is None or layer.recompute_scale_factor else 1 / factor
    return lambda a, b: (
        math.floor((a + 0.5) * rate - 0.5) - margin + 1,
        math.ceil((b + 0.5) * rate - 0.5) + margin - 1,
    )


def n_colours(field: Field, gap: Sequence[int], n_channels: int) -> int:
    """Rows that a coloured sweep needs."""
    return math.prod(min(p, len(low)) for p, low in zip(field.periods(gap), field.low, strict=True)) * n_channels


def colour_masks(field: Field, gap: Sequence[int], outputs: Tensor, group_axis: int | None) -> Tensor:
    r"""Masks over outputs whose fields lie more than ``gap`` apart at a step, which may share a row.

    Args:
        field: The outputs' fields at the step.
        gap: Per axis.
        outputs: (B, C, \*positions).
        group_axis: The axis of outputs that curve together, which has size 1 in the masks; None if there is none.

    Returns:
        (T, C or 1, \*positions).
    """
    periods = field.periods(gap)
    phases = outputs.new_ones(1, 1, *[1] * len(periods))
    for axis, (period, low) in enumerate(zip(periods, field.low, strict=True)):
        n = len(low)
        comb = (
            torch.arange(n, device=outputs.device)[None] % period
            == torch.arange(min(period, n), device=outputs.device)[:, None]
        )
        shape = [len(comb), 1, *[1] * len(periods)]
        shape[2 + axis] = n
        phases = (phases[:, None] * comb.reshape(shape).to(outputs.dtype)[None]).flatten(0, 1)
    if group_axis == 1:
        return phases
    channels = torch.eye(outputs.shape[1], dtype=outputs.dtype, device=outputs.device)
    channels = channels.reshape(outputs.shape[1], -1, *[1] * len(periods))
    return (phases[:, None] * channels[None]).flatten(0, 1)
