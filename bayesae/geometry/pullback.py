"""Pull-back metrics of decoders under weight draws; segments are measured by differences of outputs."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesae.forward_mode import jvp
from bayesae.geometry.derivatives import (
    Decoder,
    by_parts,
    columns_and_bending,
    flat_outputs,
    rows_at_once,
    with_columns,
)
from bayesae.geometry.metrics import Expansion, Metric, SegmentEnergy
from bayesae.geometry.tridiagonal import BlockTridiagonal

__all__ = ["IndependentDraws", "Pullback"]


@dataclass(frozen=True)
class _OfOutputs(SegmentEnergy):
    r"""What the energies of outputs share: nodes are decoded once, Jacobians by forward mode.

    Args:
        decoder: Codes (B, Z) to outputs (S, B, \*D).
    """

    decoder: Decoder

    @abstractmethod
    def _coupled(self, outputs: Tensor) -> Tensor:
        """What neighbours see of outputs (S, ...): each draw's own, or their mean (1, ...)."""

    def segments(self, points: Tensor) -> Tensor:
        """Squared length of every segment from outputs alone, (P, n), float64."""
        with torch.no_grad():
            return torch.cat([self._squared_steps(self._decode(part)) for part in self._parts(points, 1)])

    def gaps(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs' changes along segments against their derivative in the middle: one tangent, three passes in all."""
        ends = torch.cat([points[:, :-1], points[:, 1:]], -1).flatten(0, 1)
        with torch.no_grad():
            parts = ends.split(rows_at_once(self.decoder, points[0, :1], 4))
            found = [self._gaps(*part.chunk(2, -1)) for part in parts]
        gap, change = (torch.cat(each).reshape(len(points), -1) for each in zip(*found, strict=True))
        return gap, change

    def _gaps(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        change = self._flat(b) - self._flat(a)
        along = jvp(self._flat, ((a + b) / 2,), (b - a,))[1]
        gap, size = (part.square().sum(-1, dtype=torch.float64).mean(0) for part in (change - along, change))
        return gap.sqrt(), torch.maximum(size, along.square().sum(-1, dtype=torch.float64).mean(0)).sqrt()

    def _squared_steps(self, outputs: Tensor) -> Tensor:
        """Of outputs (S, P, n + 1, D): (P, n)."""
        seen = self._coupled(outputs)
        return (seen[:, :, 1:] - seen[:, :, :-1]).square().sum(-1, dtype=torch.float64).mean(0)

    def expansion(self, points: Tensor, *, has_curvature: bool) -> Expansion:
        """Gradient and Hessian: some 2 + Z passes a node for the positive part, twice that for all."""
        with torch.no_grad():  # none of the decoder's own parameters
            parts = [self._expansion(part, has_curvature) for part in self._parts(points, 1 + points.shape[2])]
        diagonal = torch.cat([part.stiffness.diagonal for part in parts])
        stiffness = BlockTridiagonal(diagonal, torch.cat([part.stiffness.upper for part in parts]))
        curvature = [part.curvature.diagonal for part in parts if part.curvature is not None]
        rest = BlockTridiagonal(torch.cat(curvature), torch.zeros_like(stiffness.upper)) if curvature else None
        return Expansion(torch.cat([part.gradient for part in parts]), stiffness, rest)

    def _expansion(self, points: Tensor, has_curvature: bool) -> Expansion:
        inner, shape = points[:, 1:-1].flatten(0, 1), (points.shape[0], points.shape[1] - 2)
        nodes = self._decode(points)
        n_draws, seen = len(nodes), self._coupled(nodes)
        pull = (2 * nodes[:, :, 1:-1] - seen[:, :, :-2] - seen[:, :, 2:]) * (2 / n_draws)
        bending = None
        if has_curvature:
            columns, bending = columns_and_bending(self._flat, inner, pull.flatten(1, 2))
        else:
            columns = with_columns(self._flat, inner)[1]
        columns = columns.unflatten(2, shape)
        gradient = torch.einsum("zspnd,spnd->pnz", columns, pull)
        diagonal = torch.einsum("yspnd,zspnd->pnyz", columns, columns) * (4 / n_draws)
        between = torch.stack([self._coupled(column) for column in columns])
        upper = torch.einsum("yspnd,zspnd->pnyz", between[:, :, :, :-1], between[:, :, :, 1:])
        stiffness = BlockTridiagonal(diagonal.double(), (-2 / between.shape[1] * upper).double())
        curvature = None
        if bending is not None:
            curvature = BlockTridiagonal(bending.double().unflatten(0, shape), torch.zeros_like(stiffness.upper))
        return Expansion(gradient.double(), stiffness, curvature)

    def _flat(self, z: Tensor) -> Tensor:
        return flat_outputs(self.decoder, z)

    def _decode(self, points: Tensor) -> Tensor:
        """(S, P, n + 1, D)."""
        return flat_outputs(self.decoder, points.flatten(0, 1)).unflatten(1, points.shape[:2])

    def _parts(self, points: Tensor, n_passes: int) -> tuple[Tensor, ...]:
        """Some curves at a time, so that memory stays bounded."""
        return points.split(max(1, rows_at_once(self.decoder, points[0, :1], n_passes) // points.shape[1]))


@dataclass(frozen=True)
class Pullback(_OfOutputs, Metric):
    r"""Pull-back metric of a decoder, in expectation over its weight draws.

    .. math:: G(z) = \frac{1}{S} \sum_s J_s(z)^\top J_s(z), \qquad
              d^2(a, b) = \frac{1}{S} \sum_s \| f_s(b) - f_s(a) \|^2

    with J (D, Z). A step is as long as the change of the outputs that it makes, in quadratic mean over the draws; with
    one draw this is the metric of that decoder. Segments are chords of the outputs and need no Jacobian.

    Args:
        decoder: Codes (B, Z) to outputs (S, B, \*D), flattened inside; `Predictive.decoder` makes one.

    Exact when: always, given the draws; of random linear decoders W with mean M and variance s^2 a weight,
        E[G] = M^T M + D s^2 I.
    Biased when: a curve has few segments, whose chords cut corners: a length is then low by a share of order 1 / n^2.
    Cost: 1 + Z forward passes of S rows a code.
    Raises: UnsupportedError if torch cannot differentiate the decoder forwards.

    References:
        | Metrics for Probabilistic Geometries (Tosi et al., 2014)
        | Latent Space Oddity: on the Curvature of Deep Generative Models (Arvanitidis et al., 2018)
    """

    def __call__(self, z: Tensor) -> Tensor:
        """G (B, Z, Z)."""
        return by_parts(self._matrices, self.decoder, z)

    def check_positive(self, z: Tensor, where: str) -> None:
        """Nothing to do: Gram matrices have no eigenvalue below 0."""

    def _matrices(self, z: Tensor) -> Tensor:
        outputs, columns = with_columns(self._flat, z)
        return torch.einsum("isbd,jsbd->bij", columns, columns) / len(outputs)

    def _coupled(self, outputs: Tensor) -> Tensor:
        return outputs


@dataclass(frozen=True)
class IndependentDraws(_OfOutputs):
    r"""Energy of curves whose neighbouring points are decoded under independent weight draws.

    .. math:: d^2(a, b) = \mathbb{E} \| f_{\theta}(b) - f_{\theta'}(a) \|^2
              = \| \bar f(b) - \bar f(a) \|^2 + \operatorname{tr} \operatorname{Var} f(a)
              + \operatorname{tr} \operatorname{Var} f(b)

    over pairs of the S draws (divisor S, as in `Moments`). The spread of the outputs makes every segment longer:
    curves through regions that the decoders do not agree on are long, and shortest ones stay where data were.

    Args:
        decoder: Codes (B, Z) to outputs (S, B, \*D), S of 2 or more to differ from `Pullback`.

    Exact when: always, given the draws and the number of segments.
    Biased when: read as a metric: d(a, a) is not 0, and with n segments the spread counts n times in an energy that
        grows as n^2. Compare curves of one number of segments only. Points gather where decoders agree and leave
        long segments elsewhere, whatever n is (`Geodesics.coarseness` shows it).
    Cost: as `Pullback`; no Jacobian is needed for an energy.

    References:
        | Decoder ensembling for learned latent geometries (Syrota et al., 2024)
    """

    def as_metric(self) -> Metric:
        """The pull-back metric of the same decoder."""
        return Pullback(self.decoder)

    def _coupled(self, outputs: Tensor) -> Tensor:
        return outputs.mean(0, keepdim=True)

    def _squared_steps(self, outputs: Tensor) -> Tensor:
        spread = (outputs - outputs.mean(0)).square().sum(-1, dtype=torch.float64).mean(0)
        return super()._squared_steps(outputs) + spread[:, 1:] + spread[:, :-1]
