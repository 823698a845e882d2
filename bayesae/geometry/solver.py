"""Levenberg-Marquardt steps on many curves at once, whose Hessians are block-tridiagonal."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bayesae.geometry.metrics import SegmentEnergy
from bayesae.geometry.tridiagonal import BlockTridiagonal

__all__ = ["Solver", "reach"]

_GAUSS_NEWTON_UNTIL = 0.03  # predicted share of the energy below which the full Hessian is worth its price
_HIGHEST_DAMPING = 1e8


@dataclass(frozen=True)
class Solver:
    """Levenberg-Marquardt steps on one level, each pair with a damping of its own."""

    metric: SegmentEnergy
    tolerance: float
    max_iterations: int

    def __call__(self, points: Tensor, is_near: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Better points.

        Args:
            points: (P, n + 1, Z).
            is_near: Whether the whole Hessian pays at once, (P,).

        Returns:
            Points, residuals (P,), how many steps were tried (P,), and their `reach` (P,).
        """
        points = points.clone()
        squared = self.metric.segments(points).sum(1)
        damping = torch.zeros_like(squared)
        residual, reached = torch.full_like(squared, torch.inf), torch.zeros_like(squared)
        spent = torch.zeros(len(points), dtype=torch.long, device=points.device)
        wants_all = is_near.clone()
        active = torch.arange(len(points), device=points.device)
        for _ in range(self.max_iterations):
            steps, gain, found, reached[active] = self.steps(
                points[active], squared[active], damping[active], wants_all[active]
            )
            residual[active] = found
            is_done = found <= self.tolerance
            if is_done.all():
                break
            active, steps, gain = active[~is_done], steps[~is_done], gain[~is_done]
            spent[active] += 1
            trial = points[active].clone()
            trial[:, 1:-1] += steps.to(points.dtype)
            segments = self.metric.segments(trial)
            now = segments.sum(1)
            ratio = (squared[active] - now) / gain
            # a segment below 0 is one where the metric is not positive definite
            is_better = torch.isfinite(now) & (segments >= 0).all(1) & (gain > 0) & (ratio > 1e-4)
            taken = active[is_better]
            points[taken], squared[taken] = trial[is_better], now[is_better]
            wants_all[active] |= gain <= _GAUSS_NEWTON_UNTIL * squared[active]
            lower = torch.where(ratio > 0.5, damping[active] / 8, damping[active])
            lower = torch.where(lower < 1e-3, 0.0, lower)
            damping[active] = torch.where(is_better, lower, (4 * damping[active]).clamp(min=0.03))
            active = active[damping[active] < _HIGHEST_DAMPING]
            if not len(active):
                break
        else:  # out of steps: the residuals are those of the points before the last one
            residual[active], reached[active] = self.residual(points[active])
        return points, residual, spent, reached

    def residual(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Residuals and `reach` of curves as they are, (P,) each."""
        squared = self.metric.segments(points).sum(1)
        none = torch.zeros_like(squared)
        return self.steps(points, squared, none, torch.ones_like(squared, dtype=torch.bool))[2:]

    def steps(
        self, points: Tensor, squared: Tensor, damping: Tensor, wants_all: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Damped steps of a Newton method.

        Args:
            points: (P, n + 1, Z).
            squared: Sums of their squared segments, (P,).
            damping: Share of the positive part that is added to the Hessian, (P,).
            wants_all: Whether the whole Hessian is asked for, (P,), or its positive part.

        Returns:
            Steps (P, n - 1, Z), the decrease that each predicts, residuals, infinite without the whole Hessian, and
            `reach`, (P,) each.
        """
        gradient = torch.empty_like(points[:, 1:-1], dtype=torch.float64)
        steps, gain, reached = torch.zeros_like(gradient), torch.zeros_like(squared), torch.zeros_like(squared)
        residual = torch.full_like(squared, torch.inf)
        for has_all in (False, True):
            chosen = (wants_all == has_all).nonzero()[:, 0]
            if not len(chosen):
                continue
            found = self.metric.expansion(points[chosen], has_curvature=has_all)
            reached[chosen] = reach(points[chosen], found.stiffness)
            held = _regular(found.stiffness)
            hessian = held if found.curvature is None else held + found.curvature
            step, is_definite = (hessian + held.scaled(damping[chosen])).solve(-found.gradient)
            predicted = -(found.gradient * step).sum((1, 2)) / 2
            if has_all:
                full, is_full = hessian.solve(-found.gradient)
                decrement = -(found.gradient * full).sum((1, 2)) / 2
                share = decrement / squared[chosen]
                residual[chosen] = torch.where(is_full & (share >= 0), share, torch.inf)
            steps[chosen], gain[chosen] = step, torch.where(is_definite, predicted, 0.0)
        return steps, gain, residual, reached


def reach(points: Tensor, stiffness: BlockTridiagonal) -> Tensor:
    r"""Lengths of curves by the derivatives at their inner nodes: :math:`\sum_i \sqrt{\delta_i^\top G(c_i) \delta_i}`.

    Args:
        points: (P, n + 1, Z); :math:`\delta_i` is half of what lies between the neighbours of a node.
        stiffness: The positive part of their `Expansion`, which is 4 G on its diagonal (of a metric that is no
            pull-back if G is smooth).

    Returns:
        (P,): from the middle of the first segment to that of the last.
    """
    steps = (points[:, 2:] - points[:, :-2]).double() / 2
    squared = torch.einsum("pni,pnij,pnj->pn", steps, stiffness.diagonal / 4, steps)
    return squared.clamp(min=0).sqrt().sum(1)


def _regular(stiffness: BlockTridiagonal) -> BlockTridiagonal:
    """With a diagonal raised by its rounding: a node where the decoder is flat would make it singular."""
    size = stiffness.diagonal.shape[-1]
    trace = stiffness.diagonal.diagonal(dim1=-2, dim2=-1).mean((1, 2))
    ridge = 1e-10 * trace[:, None, None, None] * torch.eye(size).to(stiffness.diagonal)
    return BlockTridiagonal(stiffness.diagonal + ridge, stiffness.upper)
