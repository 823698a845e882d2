"""How the step of a sampler changes over a run, and when it draws."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from bayesae.errors import DataError

__all__ = ["Cyclical", "Decay", "Phase"]


class Phase(NamedTuple):
    """Where a step stands in a run.

    Args:
        factor: The step size is ``step_size`` times this.
        is_noisy: Whether noise is injected.
        is_sampling: Whether its draw may be kept.
        is_adapting: Whether it is burn-in, in which samplers adapt.
    """

    factor: float
    is_noisy: bool
    is_sampling: bool
    is_adapting: bool


@dataclass(frozen=True)
class Decay:
    r"""Polynomial decay of the step.

    .. math:: \epsilon_t = \epsilon_0 (1 + t / b)^{-\gamma} = a (b + t)^{-\gamma}, \qquad a = \epsilon_0 b^\gamma

    Args:
        offset: b, in steps: after so many the step has begun to fall.
        power: gamma, in (0.5, 1]: the steps then add up to infinity, and their squares do not.

    Exact when: the run goes on for ever.
    Biased when: it is cut, by the steps that it was made of. Draws count equally, where Welling and Teh weight them by
        their step: late ones are closer together, and count too much.
    Cost: none.

    Raises:
        DataError: If the offset is not positive, or the power outside (0.5, 1].

    References:
        | Bayesian Learning via Stochastic Gradient Langevin Dynamics (Welling, Teh, 2011)
    """

    offset: float = 1000.0
    power: float = 0.55

    def __post_init__(self) -> None:
        if not (0 < self.offset < math.inf and 0.5 < self.power <= 1):
            got = f"offset = {self.offset!r}, power = {self.power!r}"
            raise DataError("offset > 0 and 0.5 < power <= 1", got, "The defaults are 1000 and 0.55.")

    def at(self, n_steps: int, progress: float) -> tuple[float, bool]:
        """Factor of the step after ``n_steps``, and True: every step samples."""
        return (1 + n_steps / self.offset) ** -self.power, True


@dataclass(frozen=True)
class Cyclical:
    r"""Steps along half a cosine, again and again: long ones find another mode, short ones sample it.

    .. math:: \epsilon(r) = \tfrac{\epsilon_0}{2} (1 + \cos \pi r), \qquad r \in [0, 1) \text{ within a cycle}

    No noise is injected for r below ``exploration`` (the sampler is then plain gradient ascent, with or without
    momentum), and nothing is kept; above it the chain samples. Exploration is each cycle's own burn-in: a sampler's
    ``burn_in`` drops whole cycles beside it, and wants to be 0 where all of them are to count.

    Args:
        n_cycles: M, over the whole run.
        exploration: Share of each cycle without noise, in [0, 1).

    Biased when: always: a mode weighs as often as it was found, not as its mass, and the last steps of a cycle are
        too short to move far.
    Cost: draws of the sampling share alone are kept.

    Raises:
        DataError: If there is no cycle, or nothing of it is left for sampling.

    References:
        | Cyclical Stochastic Gradient MCMC for Bayesian Deep Learning (Zhang et al., 2020)
        | Departure: cycles go by the share of rows seen, so that a run's length need not be a multiple of theirs.
    """

    n_cycles: int = 4
    exploration: float = 0.75

    def __post_init__(self) -> None:
        if self.n_cycles < 1 or not 0 <= self.exploration < 1:
            got = f"n_cycles = {self.n_cycles!r}, exploration = {self.exploration!r}"
            raise DataError("n_cycles >= 1 and 0 <= exploration < 1", got, "The defaults are 4 and 0.75.")

    def at(self, n_steps: int, progress: float) -> tuple[float, bool]:
        """Factor of the step at this share of the run, and whether it samples."""
        # rounded, so that the first step of a cycle is not the last one of the cycle before
        place = round(round(progress * self.n_cycles, 9) % 1.0, 9)
        return 0.5 * (1 + math.cos(math.pi * place)), place >= self.exploration
