"""How far lengths and curves are known: their law over draws of the decoder's weights."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bayesae.errors import DataError
from bayesae.geometry.derivatives import Decoder, flat_outputs
from bayesae.geometry.geodesics import Geodesics, checked_pairs, solved, warn_of_failures
from bayesae.geometry.graph import CodeGraph
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
        """Standard deviation over draws (divisor S - 1) as a share of the mean, (P,).

        Returns:
            The shares.

        Raises:
            DataError: If there is one draw only.
        """
        if len(self.lengths) < 2:
            raise DataError("two weight draws or more", f"{len(self.lengths)}", "Ask the decoder for more.")
        return self.lengths.std(0) / self.lengths.mean(0)

    def interval(self, level: float = 0.9) -> tuple[Tensor, Tensor]:
        """Central interval, from quantiles of the draws at places p (S + 1) of their order.

        Args:
            level: 0 to 1.

        Returns:
            Lower and upper ends, (P,).

        Exact when: (1 - level) / 2 * (S + 1) is whole: it covers, on average, a share ``level`` of distances under
            other draws, however few there are.
        Biased when: it is not whole, as it then lies between two draws.

        Raises:
            DataError: If the level is not between 0 and 1, or there are too few draws for it: 19 for 0.9.
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
        """Band of the draws' curves: quantiles as of `DistanceDraws.interval`, in every code dimension at every time.

        Args:
            level: 0 to 1.

        Returns:
            Lower and upper ends, (P, n + 1, Z).

        Raises:
            DataError: If the level is not between 0 and 1, or there are too few draws for it: 19 for 0.9.
        """
        return _central(self.points, level)


def distance_draws(
    decoder: Decoder,
    starts: Tensor,
    ends: Tensor,
    *,
    curves: Literal["own", "expected"] = "own",
    n_segments: int = 32,
    initial: Tensor | None = None,
    graph: CodeGraph | None = None,
    tolerance: float = 1e-6,
    max_iterations: int = 100,
) -> DistanceDraws:
    r"""Distances between codes under every draw of the decoder's weights.

    Args:
        decoder: Codes (B, Z) to outputs (S, B, \*D); one with ``singles``, such as `Predictive.decoder` and
            `DecoderDraws`, is asked for one draw at a time where that is all it takes.
        starts: (P, Z); gradients do not pass.
        ends: (P, Z).
        curves: Whose curves are measured under a draw: its "own" geodesics, which makes them its distances, or those of
            the "expected" metric, which are the same for all, cost less, and are longer where draws bend differently.
        n_segments: Of the curves.
        initial: As in `geodesics`, for the curves of all draws.
        graph: As in `geodesics`, for the curves of all draws: `neighbour_graph` under the expected metric will do.
        tolerance: Of `geodesics`.
        max_iterations: Of `geodesics`.

    Returns:
        Lengths (S, P), from which mean, interval and variation come.

    Exact when: the outputs are linear in the code: :math:`\|W_s (b - a)\|`.
    Biased when: the codes themselves move with the weights: they are held here. Or as `geodesics` is.
    Cost: "expected": one `geodesics`. "own": S of them, of one draw each: about as much in all, and S times that where
        the decoder has no ``singles``, so that each decodes under all draws.

    Raises:
        ShapeError: If the pairs do not fit each other, or ``initial`` does not fit them.
        DataError: If two ends are equal, or ``curves`` is another word.
        NonFiniteError: If a code or an energy is not finite.
        UnsupportedError: If outputs do not change along a straight line, or have no derivative.
    """
    starts, ends = checked_pairs(starts, ends)
    if curves not in ("own", "expected"):
        raise DataError("curves of 'own' or 'expected'", f"{curves!r}", "'own' gives distances.")
    given = _Given(n_segments, initial, graph, tolerance, max_iterations)
    if curves == "own":
        return _own(decoder, starts, ends, given)[0]
    found = given.solve(decoder, starts, ends)
    warn_of_failures(found, stacklevel=3)
    with torch.no_grad():
        outputs = flat_outputs(decoder, found.points.flatten(0, 1)).unflatten(1, found.points.shape[:2])
    lengths = (outputs[:, :, 1:] - outputs[:, :, :-1]).double().norm(dim=-1).sum(-1)
    return DistanceDraws(lengths, found.has_converged.expand(len(lengths), -1))


def geodesic_band(
    decoder: Decoder,
    starts: Tensor,
    ends: Tensor,
    *,
    n_segments: int = 32,
    initial: Tensor | None = None,
    graph: CodeGraph | None = None,
    tolerance: float = 1e-6,
    max_iterations: int = 100,
) -> GeodesicBand:
    r"""Geodesics of the expected metric with the spread of the draws' own around them.

    Args:
        decoder: Codes (B, Z) to outputs (S, B, \*D), as in `distance_draws`.
        starts: (P, Z); gradients do not pass.
        ends: (P, Z).
        n_segments: Of the curves.
        initial: As in `geodesics`, for all curves.
        graph: As in `geodesics`, for all curves.
        tolerance: Of `geodesics`.
        max_iterations: Of `geodesics`.

    Returns:
        The curves.

    Exact when: the outputs are linear in the code: all curves are straight, and the band has no width.
    Biased when: the codes themselves move with the weights: they are held here. Draws that take different ways around
        a hill make a wide band with none of them in its middle.
    Cost: as `distance_draws` with "own" curves, and one `geodesics` more.

    Raises:
        ShapeError: If the pairs do not fit each other, or ``initial`` does not fit them.
        DataError: If two ends are equal.
        NonFiniteError: If a code or an energy is not finite.
        UnsupportedError: If outputs do not change along a straight line, or have no derivative.
    """
    starts, ends = checked_pairs(starts, ends)
    given = _Given(n_segments, initial, graph, tolerance, max_iterations)
    expected = given.solve(decoder, starts, ends)
    warn_of_failures(expected, stacklevel=3)
    distances, points = _own(decoder, starts, ends, given)
    return GeodesicBand(expected, points, distances)


@dataclass(frozen=True)
class _OneDraw:
    """One draw of a decoder that gives all at once only."""

    decoder: Decoder
    number: int

    def __call__(self, z: Tensor) -> Tensor:
        return self.decoder(z)[self.number : self.number + 1]


def _singles(decoder: Decoder, code: Tensor) -> Sequence[Decoder]:
    """Decoders of one draw each; a code (1, Z) finds out how many there are."""
    singles = getattr(decoder, "singles", None)
    if singles is not None:
        return singles
    with torch.no_grad():
        n_draws = len(flat_outputs(decoder, code))
    return [_OneDraw(decoder, number) for number in range(n_draws)]


@dataclass(frozen=True)
class _Given:
    """What the caller says of the solver."""

    n_segments: int
    initial: Tensor | None
    graph: CodeGraph | None
    tolerance: float
    max_iterations: int

    def solve(self, decoder: Decoder, starts: Tensor, ends: Tensor) -> Geodesics:
        """Geodesics of a decoder's expected metric."""
        return solved(
            Pullback(decoder), starts, ends, n_segments=self.n_segments, initial=self.initial, graph=self.graph,
            tolerance=self.tolerance, max_iterations=self.max_iterations,
        )  # fmt: skip


def _own(decoder: Decoder, starts: Tensor, ends: Tensor, given: _Given) -> tuple[DistanceDraws, Tensor]:
    """Lengths and points of each draw's geodesics; one warning for all of them."""
    found = [given.solve(single, starts, ends) for single in _singles(decoder, starts[:1])]
    distances = DistanceDraws(
        torch.stack([one.length for one in found]), torch.stack([one.has_converged for one in found])
    )
    n_failed = int((~distances.has_converged).sum())
    if n_failed:
        text = f"{n_failed} of {distances.has_converged.numel()} geodesics of single draws have not converged"
        warnings.warn(f"{text}. See .has_converged; allow more iterations or segments.", RuntimeWarning, stacklevel=3)
    return distances, torch.stack([one.points for one in found])


def _central(values: Tensor, level: float) -> tuple[Tensor, Tensor]:
    if not 0 < level < 1:
        raise DataError("a level between 0 and 1", f"{level}", "0.9 leaves 5 % on either side.")
    n = len(values)
    place = 0.5 * (1 - level) * (n + 1)
    if place < 1 - 1e-9:
        least = math.ceil(2 / (1 - level) - 1 - 1e-9)
        widest = f" or a level of at most {math.floor(1000 * (n - 1) / (n + 1)) / 1000:g}" if n > 1 else ""
        fix = f"Ask the decoder for more draws{widest}."
        raise DataError(f"{least} weight draws or more for intervals of {level:g}", f"{n}", fix)
    ordered = values.sort(0).values
    below = min(max(math.floor(place + 1e-9), 1), n - 1)
    share, above = max(place - below, 0.0), min(below, n - 1)
    low = torch.lerp(ordered[below - 1], ordered[above], share)
    return low, torch.lerp(ordered[n - below], ordered[n - 1 - above], share)
