"""Metrics of a code space: what a small step of the code is long, in the units of what it changes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesae.errors import ShapeError
from bayesae.geometry.derivatives import (
    Decoder,
    by_parts,
    check_outputs,
    gradient_and_hessian,
    rows_at_once,
    with_columns,
)
from bayesae.geometry.fisher import Fisher
from bayesae.geometry.tridiagonal import BlockTridiagonal

__all__ = ["Euclidean", "Expansion", "FisherPullback", "Metric", "MetricFunction", "SegmentEnergy"]


@dataclass(frozen=True)
class Expansion:
    r"""The sum of a curve's squared segment lengths to second order in its interior nodes.

    Args:
        gradient: (P, n - 1, Z).
        stiffness: Positive semi-definite part of the Hessian: that of the curve with the metric held.
        curvature: The rest of the Hessian; None where it was not asked for.
    """

    gradient: Tensor
    stiffness: BlockTridiagonal
    curvature: BlockTridiagonal | None


class SegmentEnergy(ABC):
    """Squared lengths between neighbouring points of a curve: all that `geodesics` needs."""

    @abstractmethod
    def as_metric(self) -> Metric:
        """The metric that segments come from, without what does not vanish with their size."""

    @abstractmethod
    def segments(self, points: Tensor) -> Tensor:
        """Squared length of every segment.

        Args:
            points: (P, n + 1, Z).

        Returns:
            (P, n), float64.
        """

    @abstractmethod
    def expansion(self, points: Tensor, *, has_curvature: bool) -> Expansion:
        """Their sum to second order in the interior nodes.

        Args:
            points: (P, n + 1, Z), n >= 2.
            has_curvature: Whether the full Hessian is wanted, or its positive part only, which is cheaper.

        Returns:
            The expansion, float64.
        """


class Metric(SegmentEnergy):
    r"""A metric tensor G(z); a segment is measured with the one in its middle.

    .. math:: d^2(a, b) = (b - a)^\top G\big(\tfrac{a + b}{2}\big) (b - a)

    A subclass gives ``__call__``; one that has outputs may measure by their differences (`Pullback`).
    """

    @abstractmethod
    def __call__(self, z: Tensor) -> Tensor:
        """G at codes (B, Z): symmetric positive definite matrices (B, Z, Z)."""

    def as_metric(self) -> Metric:
        """Itself."""
        return self

    def segments(self, points: Tensor) -> Tensor:
        """Squared length of every segment by the metric in its middle, (P, n), float64."""
        ends = torch.cat([points[:, :-1], points[:, 1:]], -1).flatten(0, 1)
        rows = self._rows_at_once(points[0, :1], 1 + points.shape[2])
        with torch.no_grad():
            squared = torch.cat([self._squared(part) for part in ends.split(rows)])
        return squared.double().reshape(len(points), -1)

    def expansion(self, points: Tensor, *, has_curvature: bool) -> Expansion:
        """Gradient and Hessian by forward over reverse in the 2 Z coordinates of a segment's ends."""
        n_curves, n_segments, n_latents = len(points), points.shape[1] - 1, points.shape[2]
        ends = torch.cat([points[:, :-1], points[:, 1:]], -1).flatten(0, 1)
        parts = ends.split(self._rows_at_once(points[0, :1], 4 * n_latents * (1 + n_latents)))
        middles = (ends[:, :n_latents] + ends[:, n_latents:]) / 2
        with torch.no_grad():  # none of the decoder's own parameters
            found = [gradient_and_hessian(lambda e: self._squared(e).sum(), part) for part in parts]
            held = 2 * torch.cat([self(part) for part in middles.split(len(parts[0]))]).double()
        first, second = (torch.cat(each) for each in zip(*found, strict=True))
        first = first.double().reshape(n_curves, n_segments, 2, n_latents)
        second = second.double().reshape(n_curves, n_segments, 2, n_latents, 2, n_latents).transpose(3, 4)
        hessian = BlockTridiagonal(second[:, 1:, 0, 0] + second[:, :-1, 1, 1], second[:, 1:-1, 0, 1])
        held = held.reshape(n_curves, n_segments, n_latents, n_latents)
        stiffness = BlockTridiagonal(held[:, 1:] + held[:, :-1], -held[:, 1:-1])
        rest = BlockTridiagonal(hessian.diagonal - stiffness.diagonal, hessian.upper - stiffness.upper)
        return Expansion(first[:, 1:, 0] + first[:, :-1, 1], stiffness, rest if has_curvature else None)

    def _rows_at_once(self, code: Tensor, n_passes: int) -> int:
        """How many segments fit in memory, from a code (1, Z) and the passes of the decoder that each costs."""
        return 2**20

    def _squared(self, ends: Tensor) -> Tensor:
        """Of ends (B, 2 Z): (B,)."""
        a, b = ends.chunk(2, -1)
        return torch.einsum("bi,bij,bj->b", b - a, self((a + b) / 2), b - a)


@dataclass(frozen=True)
class Euclidean(Metric):
    """The code space as it lies: straight lines are shortest.

    Exact when: always.
    """

    def __call__(self, z: Tensor) -> Tensor:
        """Identity matrices (B, Z, Z)."""
        return torch.eye(z.shape[1], dtype=z.dtype, device=z.device).expand(len(z), -1, -1)


@dataclass(frozen=True)
class MetricFunction(Metric):
    """A metric of the user's own.

    Args:
        function: Codes (B, Z) to symmetric positive definite matrices (B, Z, Z), in torch operations row by row.

    Exact when: always, up to segments: their lengths are off by a share of order 1 / n^2.
    Raises: ShapeError if the function gives another shape.
    """

    function: Callable[[Tensor], Tensor]

    def __call__(self, z: Tensor) -> Tensor:
        """The function's values (B, Z, Z)."""
        found = self.function(z)
        if found.shape != (*z.shape, z.shape[1]):
            fix = "Give one matrix for every code."
            raise ShapeError(f"a metric {(*z.shape, z.shape[1])}", f"{tuple(found.shape)}", fix)
        return found


@dataclass(frozen=True)
class FisherPullback(Metric):
    r"""Pull-back of a likelihood's Fisher information, averaged over weight draws.

    .. math:: G(z) = \frac{1}{S} \sum_s J_s(z)^\top F(f_s(z))\, J_s(z)

    with J (D, Z) of the natural parameters: lengths count how well data tell one code from another.

    Args:
        decoder: Codes (B, Z) to natural parameters (S, B, \*D), such as
            ``lambda z: bound.decode(z.expand(n_draws, *z.shape))`` with ``bound = model.at(params)``;
            `Predictive.decoder` gives means, which are natural for a Gaussian of fixed scale only.
        fisher: Outputs and a tangent of their shape to F times the tangent, such as `bernoulli_fisher`.

    Exact when: always, given the draws; segments are measured in their middles.
    Biased when: read as the metric of the predictive, whose mixture over weights has less information than its parts.
    Cost: 1 + Z forward passes of S rows a code.
    Raises: ShapeError if the outputs are not (S, B, \*D), UnsupportedError if torch cannot differentiate the decoder
        forwards.

    References:
        | Pulling Back Information Geometry (Arvanitidis et al., 2022)
    """

    decoder: Decoder
    fisher: Fisher

    def __call__(self, z: Tensor) -> Tensor:
        """G (B, Z, Z)."""
        return by_parts(self._matrices, self.decoder, z)

    def _matrices(self, z: Tensor) -> Tensor:
        outputs, columns = with_columns(self.decoder, z)
        check_outputs(outputs, len(z))
        weighted = torch.stack([self.fisher(outputs, column) for column in columns])
        products = torch.einsum("isbd,jsbd->bij", columns.flatten(3), weighted.flatten(3)) / len(outputs)
        return (products + products.mT) / 2

    def _rows_at_once(self, code: Tensor, n_passes: int) -> int:
        return rows_at_once(self.decoder, code, n_passes)
