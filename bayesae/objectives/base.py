"""What an objective is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

from torch import Tensor

from bayesae.draws import Draws
from bayesae.errors import UnsupportedError

__all__ = ["Grouped", "Objective", "Values", "at_progress", "climbed", "log_q_of"]

Grouped: TypeAlias = Mapping[Literal["decoder", "encoder"], Tensor]
"""Two bounds, (S, B) each: the decoder climbs its own, which is the one that is reported, encoder and flows theirs."""

Values: TypeAlias = Tensor | Grouped
Objective: TypeAlias = Callable[[Draws], Values]
"""Draws to nats a row (S, B), larger is better."""


@runtime_checkable
class _Changes(Protocol):
    def at(self, progress: float) -> Objective: ...


def at_progress(objective: Objective, progress: float) -> Objective:
    """The objective at a share of training, for those that change while training goes on.

    Args:
        objective: Any; one that changes has a method ``at(progress)``, and called as it is it is what it ends as.
        progress: Share of training that is done, in [0, 1].

    Returns:
        The objective to climb now.
    """
    return objective.at(progress) if isinstance(objective, _Changes) else objective


def climbed(objective: Objective, draws: Draws) -> dict[str, Tensor]:
    """What is climbed: the objective less the draws' penalty, by group of parameters.

    Args:
        objective: Reduction of draws.
        draws: The draws.

    Returns:
        (S, B) for "decoder" (the value that is reported) and, where it is another one, for "encoder".
    """
    values = objective(draws)
    grouped: Mapping[Any, Tensor] = {"decoder": values} if isinstance(values, Tensor) else values
    penalty = 0.0 if draws.penalty is None else draws.penalty
    return {name: value - penalty for name, value in grouped.items()}


def log_q_of(draws: Draws) -> Tensor:
    """Log q(z | x, theta) of draws that have one.

    Args:
        draws: Draws of a stochastic code.

    Returns:
        (K, S, B), in nats.

    Raises:
        UnsupportedError: If the code is deterministic.
    """
    if draws.log_q is None:
        expected, got = "codes drawn from a distribution", "a deterministic encoder, whose q(z | x) has no density"
        raise UnsupportedError(expected, got, "Use objectives.reconstruction, or a code posterior with a density.")
    return draws.log_q
