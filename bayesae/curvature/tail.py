"""The reshapings after the last layer, and H seen from before them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bayesae.curvature.hessian import Hessian
from bayesae.curvature.shapes import PermuteStep
from bayesae.curvature.steps import ReshapeStep, Step

__all__ = ["hessian_at", "last_layer"]


def last_layer(steps: Sequence[Step]) -> int:
    """Index of the last step that is more than its numbers in another shape or order."""
    i = len(steps) - 1
    while isinstance(steps[i], (ReshapeStep, PermuteStep)):
        (i,) = steps[i].sources
    return i


def hessian_at(hessian: Hessian, steps: Sequence[Step]) -> Hessian | None:
    r"""H without its dense rows in the shape of the last layer, before the outputs were reshaped.

    Args:
        hessian: Of the outputs.
        steps: A trace.

    Returns:
        A diagonal, or blocks: over the channels (B, C, \*positions) of the last layer where the outputs moved, with
        zeros between groups that share a position. None if a group does not stand at one position.
    """
    end = last_layer(steps)
    shape = torch.Size((hessian.shape[0], *steps[end].value.shape[1:]))
    if end == len(steps) - 1:
        return Hessian(hessian.shape, hessian.diagonal, hessian.blocks, hessian.axis)
    if hessian.blocks is None:
        diagonal = hessian.diagonal
        if diagonal is not None and diagonal.dim():
            diagonal = _before(diagonal[:, None], steps, end)[:, 0]
        return Hessian(shape, diagonal)
    if len(shape) < 3:
        return None  # no positions that rows could share
    lower, axis = hessian.blocks, hessian.axis
    n_groups = lower.shape[1:-2].numel()
    # on the CPU: where numbers stand is settled there, without waiting for a device
    group = torch.arange(n_groups).reshape(1, 1, *lower.shape[1:-2], 1).movedim(-1, axis + 1)
    group = _before(group.expand(1, 1, *hessian.shape[1:]), steps, end).flatten(3)[0, 0]  # (C, T)
    is_same = group[:, None] == group[None]
    is_fixed = bool((is_same == is_same[:, :, :1]).all())
    if not is_fixed or bool((is_same.sum(1) != lower.shape[-1]).any()):
        return None
    # row k of a group is column k of its Cholesky factor; a group's columns stand beside those of the others
    rows = _before(lower.movedim(-2, axis).movedim(-1, 1), steps, end)  # (B, g, C, *positions)
    members = is_same[:, :, 0].unique(dim=0).to(lower)  # (groups at a position, C)
    wide = (rows[:, None] * members.reshape(1, len(members), 1, -1, *[1] * (len(shape) - 2))).flatten(1, 2)
    return Hessian(shape, None, wide.movedim(2, -1).movedim(1, -1), 1)


def _before(rows: Tensor, steps: Sequence[Step], end: int) -> Tensor:
    """Rows (B, R, *outputs) as they stood at a step, nothing but reshapings after it."""
    i = len(steps) - 1
    while i > end:
        (rows,), (i,) = steps[i].pull(rows), steps[i].sources
    return rows
