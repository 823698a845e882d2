"""How far lengths and curves are known: their law over draws of the decoder's weights."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bayesae.errors import DataError
from bayesae.geometry.derivatives import Decoder, flat_outputs
from bayesae.geometry.geodesics import Geodesics, checked_pairs, geodesics
from bayesae.geometry.pullback import Pullback

__all__ = ["DistanceDraws", "GeodesicBand", "distance_draws", "geodesic_band"]


@dataclass(frozen=True)
class DistanceDraws:
    """Distances of P pairs under S weight draws.

    Args:
        lengths: (S, P), float64, units of the outputs.
        has_converged: Whether each curve's solver converged, (S, P).
    """

    lengths: Tensor
    has_converged: Tensor

    def mean(self) -> Tensor:
        """Mean over draws, (P,)."""
        return self.lengths.mean(0)

    def variation(self) -> Tensor:
        """Standard deviation over draws (divisor S - 1) as a share of the mean, (P,)."""
        return self.lengths.std(0) / self.lengths.mean(0)

    def interval(self, level: float = 0.9) -> tuple[Tensor, Tensor]:
        """Central interval: quantiles of the draws.

        Args:
            level: Share of the draws within, 0 to 1.

        Returns:
            Lower and upper ends, (P,).

        Raises:
            DataError: If the level is not between 0 and 1.
        """
        return _central(self.lengths, level)


@dataclass(frozen=True)
class GeodesicBand:
    """Geodesics of the expected metric, and those of every weight draw around them.

    Args:
        expected: Of the expected metric, P curves.
        points: Of each draw, (S, P, n + 1, Z), at the same times.
        distances: Lengths of each draw's own geodesics.
    """

    expected: Geodesics
    points: Tensor
    distances: DistanceDraws

    def interval(self, level: float = 0.9) -> tuple[Tensor, Tensor]:
        """Band of the draws' curves: quantiles in every code dimension at every time.

        Args:
            level: Share of the draws within, 0 to 1.

        Returns:
            Lower and upper ends, (P, n + 1, Z).

        Raises:
            DataError: If the level is not between 0 and 1.
        """
        return _central(self.points, level)


def distance_draws(
    decoder: Decoder,
    starts: Tensor,
    ends: Tensor,
    *,
    curves: Literal["own", "expected"] = "own",
    n_segments: int = 32,
    tolerance: float = 1e-6,
) -> DistanceDraws:
    r"""Distances between codes under every draw of the decoder's weights.

    Args:
        decoder: Codes (B, Z) to outputs (S, B, \*D).
        starts: (P, Z).
        ends: (P, Z).
        curves: Whose curves are measured under a draw: its "own" geodesics, which makes them its distances, or those of
            the "expected" metric, which are the same for all and never shorter.
        n_segments: Of the curves.
        tolerance: Of `geodesics`.

    Returns:
        Lengths (S, P), from which mean, interval and variation come.

    Exact when: the outputs are linear in the code: :math:`\|W_s (b - a)\|`.
    Biased when: the codes themselves move with the weights: they are held here.
    Cost: "expected": one `geodesics`. "own": S of them, each of which decodes under all S draws.

    Raises:
        DataError: If two ends are equal.
        NonFiniteError: If a code or an energy is not finite.
    """
    starts, ends = checked_pairs(starts, ends)
    if curves == "own":
        each = _own(decoder, starts, ends, n_segments, tolerance)
        return DistanceDraws(
            torch.stack([one.length for one in each]), torch.stack([one.has_converged for one in each])
        )
    found = geodesics(Pullback(decoder), starts, ends, n_segments=n_segments, tolerance=tolerance)
    with torch.no_grad():
        outputs = flat_outputs(decoder, found.points.flatten(0, 1)).unflatten(1, found.points.shape[:2])
    lengths = (outputs[:, :, 1:] - outputs[:, :, :-1]).double().norm(dim=-1).sum(-1)
    return DistanceDraws(lengths, found.has_converged.expand(len(lengths), -1))


def geodesic_band(
    decoder: Decoder, starts: Tensor, ends: Tensor, *, n_segments: int = 32, tolerance: float = 1e-6
) -> GeodesicBand:
    r"""Geodesics of the expected metric with the spread of the draws' own around them.

    Args:
        decoder: Codes (B, Z) to outputs (S, B, \*D).
        starts: (P, Z).
        ends: (P, Z).
        n_segments: Of the curves.
        tolerance: Of `geodesics`.

    Returns:
        The curves.

    Exact when: the outputs are linear in the code: all curves are straight, and the band has no width.
    Biased when: the codes themselves move with the weights: they are held here.
    Cost: as `distance_draws` with "own" curves, and one `geodesics` more.

    Raises:
        DataError: If two ends are equal.
        NonFiniteError: If a code or an energy is not finite.
    """
    starts, ends = checked_pairs(starts, ends)
    expected = geodesics(Pullback(decoder), starts, ends, n_segments=n_segments, tolerance=tolerance)
    each = _own(decoder, starts, ends, n_segments, tolerance)
    distances = DistanceDraws(
        torch.stack([one.length for one in each]), torch.stack([one.has_converged for one in each])
    )
    return GeodesicBand(expected, torch.stack([one.points for one in each]), distances)


@dataclass(frozen=True)
class _OneDraw:
    decoder: Decoder
    number: int

    def __call__(self, z: Tensor) -> Tensor:
        return self.decoder(z)[self.number : self.number + 1]


def _own(decoder: Decoder, starts: Tensor, ends: Tensor, n_segments: int, tolerance: float) -> list[Geodesics]:
    """Each draw's geodesics; one warning for all of them."""
    with torch.no_grad():
        n_draws = len(decoder(starts[:1]))
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        for number in range(n_draws):
            metric = Pullback(_OneDraw(decoder, number))
            found.append(geodesics(metric, starts, ends, n_segments=n_segments, tolerance=tolerance))
    n_failed = sum(int((~one.has_converged).sum()) for one in found)
    if n_failed:
        text = f"{n_failed} of {n_draws * len(starts)} geodesics of single draws have not converged"
        warnings.warn(f"{text}. See .has_converged; allow more segments.", RuntimeWarning, stacklevel=3)
    return found


def _central(values: Tensor, level: float) -> tuple[Tensor, Tensor]:
    if not 0 < level < 1:
        raise DataError("a level between 0 and 1", f"{level}", "0.9 leaves 5 % on either side.")
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2]).to(values)
    low, high = torch.quantile(values, tails, dim=0)
    return low, high
