"""Steps that put numbers elsewhere: axes in another order, tensors side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesae.curvature.steps import Step

__all__ = ["CONCATENATIONS", "PERMUTATIONS", "ConcatStep", "PermuteStep", "concat_step", "permute_step"]

PERMUTATIONS = frozenset("permute transpose movedim moveaxis swapaxes swapdims".split())
CONCATENATIONS = frozenset("cat concat concatenate".split())


@dataclass(frozen=True)
class PermuteStep(Step):
    r"""The same numbers with axes in another order, the batch first.

    Args:
        order: Axis of the source, the batch counted, that stands at each place.
    """

    order: tuple[int, ...]

    def pull(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Back into the source's order."""
        back = [self.order.index(axis) for axis in range(1, len(self.order))]
        return (rows.permute(0, 1, *(axis + 1 for axis in back)),)

    def push(self, tangents: Sequence[Tensor | None]) -> Tensor:
        """Into the new order."""
        (tangent,) = tangents
        assert tangent is not None
        return tangent.permute(0, 1, *(axis + 1 for axis in self.order[1:]))


def permute_step(
    name: str, function: Callable[[Tensor], Tensor], x: Tensor, value: Tensor, indices: tuple[int, ...]
) -> PermuteStep | None:
    r"""The step of a function that permutes axes.

    Args:
        name: Of the operation.
        function: Of x.
        x: (B, \*in).
        value: What it gave.
        indices: Of the step that x came from.

    Returns:
        The step; None if the batch does not stay first.
    """
    sizes = range(2, x.dim() + 2)  # all different, so that they tell where each axis went
    order = tuple(size - 2 for size in function(torch.empty(tuple(sizes), device="meta")).shape)
    return PermuteStep(name, indices, value, order) if order[0] == 0 else None


@dataclass(frozen=True)
class ConcatStep(Step):
    r"""Tensors side by side, some of which do not depend on the parameters.

    Args:
        axis: The batch counted; at least 1.
        sizes: Of all tensors along it.
        places: Which of them the sources are, in order.
    """

    axis: int
    sizes: tuple[int, ...]
    places: tuple[int, ...]

    def pull(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Slices."""
        parts = rows.split(self.sizes, self.axis + 1)
        return tuple(parts[place] for place in self.places)

    def push(self, tangents: Sequence[Tensor | None]) -> Tensor:
        """Side by side, 0 for what does not move."""
        given = {place: t for place, t in zip(self.places, tangents, strict=True) if t is not None}
        n, k = max(len(t) for t in given.values()), next(iter(given.values())).shape[1]
        parts = []
        for place, size in enumerate(self.sizes):
            shape = [n, k, *self.value.shape[1:]]
            shape[self.axis + 1] = size
            parts.append(given[place].expand(shape) if place in given else self.value.new_zeros(shape))
        return torch.cat(parts, self.axis + 1)


def concat_step(
    name: str, value: Tensor, parts: Sequence[Tensor], axis: int, sources: dict[int, int]
) -> ConcatStep | None:
    r"""The step of a concatenation.

    Args:
        name: Of the operation.
        value: What it gave, (B, \*out).
        parts: All tensors.
        axis: Along which, negative from the end.
        sources: For the tensors that came from steps, the index of the step by place.

    Returns:
        The step; None along the batch, or of tensors of different numbers of axes.
    """
    axis = axis % value.dim()
    if axis == 0 or any(part.dim() != value.dim() for part in parts):
        return None
    sizes = tuple(part.shape[axis] for part in parts)
    return ConcatStep(name, tuple(sources.values()), value, axis, sizes, tuple(sources))
