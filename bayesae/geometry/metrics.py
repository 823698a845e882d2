"""Metrics of a code space: what a small step of the code is long, in the units of what it changes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesae.errors import DataError, ShapeError, UnsupportedError
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

__all__ = [
    "Euclidean",
    "Expansion",
    "FisherPullback",
    "Metric",
    "MetricFunction",
    "SegmentEnergy",
    "check_energy",
    "check_matrices",
    "check_metric",
    "check_symmetric",
]

_ROUNDING = 1e-5  # share of a matrix' largest number by which it may fail to be symmetric and positive


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

    def gaps(self, points: Tensor) -> tuple[Tensor, Tensor] | None:
        """By how much derivatives miss the changes that they stand for.

        Args:
            points: (P, n + 1, Z).

        Returns:
            The gap of every segment and the larger of its change and its derivative, (P, n) each; None where segments
            come from the metric alone, so that there are no changes.
        """
        return None


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

    def check_positive(self, z: Tensor, where: str) -> None:
        """Whether G is symmetric and has no eigenvalue below 0; values that are not finite pass.

        Args:
            z: Codes (B, Z).
            where: What they are, for a message.

        Raises:
            DataError: If it is not, at a code.
        """
        with torch.no_grad():
            for part in z.split(self._rows_at_once(z[:1], 1 + z.shape[1])):
                check_matrices(self(part), where)

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


def check_energy(metric: object) -> None:
    """Whether something measures segments.

    Args:
        metric: What was given.

    Raises:
        UnsupportedError: If it does not.
    """
    if not isinstance(metric, SegmentEnergy):
        fix = "Put a decoder into Pullback, a function of matrices into MetricFunction."
        raise UnsupportedError("a metric of bayesae.geometry", f"a {type(metric).__name__}", fix)


def check_metric(metric: object) -> None:
    """Whether something is a metric, and no energy whose segments are longer than zero however small.

    Args:
        metric: What was given.

    Raises:
        UnsupportedError: If it is not.
    """
    check_energy(metric)
    if not isinstance(metric, Metric):
        got = f"{type(metric).__name__}, whose lengths depend on the number of segments"
        raise UnsupportedError("a metric", got, "Use its as_metric(): the pull-back of the same decoder.")


def check_matrices(matrices: Tensor, where: str) -> None:
    """Whether matrices are symmetric and have no eigenvalue below 0 by more than rounding; non-finite ones pass.

    Args:
        matrices: (B, Z, Z).
        where: What they belong to, for a message.

    Raises:
        DataError: If one is not.
    """
    check_symmetric(matrices, where)
    matrices = matrices.detach().double()
    matrices = matrices[torch.isfinite(matrices).flatten(1).all(1)]
    slack = _ROUNDING * matrices.abs().amax((1, 2)).clamp(min=1e-200)
    raised = matrices + slack[:, None, None] * torch.eye(matrices.shape[-1]).to(matrices)
    is_negative = torch.linalg.cholesky_ex(raised)[1] > 0
    if is_negative.any():
        got = f"{int(is_negative.sum())} of {len(matrices)} with an eigenvalue below 0, {where}"
        raise DataError("a positive definite metric", got, "Is it defined at these codes?")


def check_symmetric(matrices: Tensor, where: str) -> None:
    """Whether matrices are symmetric but for rounding; non-finite ones pass.

    Args:
        matrices: (B, Z, Z).
        where: What they belong to, for a message.

    Raises:
        DataError: If one is not.
    """
    matrices = matrices.detach()
    is_skew = (matrices - matrices.mT).abs().amax((1, 2)) > _ROUNDING * matrices.abs().amax((1, 2))
    if is_skew.any():
        got = f"{int(is_skew.sum())} of {len(matrices)} that are not, {where}"
        raise DataError("a symmetric metric", got, "Use (G + G.mT) / 2 if that is what is meant.")


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
        function: Codes (B, Z) to symmetric positive definite matrices (B, Z, Z), in torch operations row by row; what
            measures with them looks whether they are (DataError).

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
