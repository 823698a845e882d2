"""What an objective is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, Protocol, TypeAlias, runtime_checkable

from torch import Tensor

from bayesae.draws import Draws

__all__ = ["Grouped", "Objective", "Values", "at_progress"]

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
