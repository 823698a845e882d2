"""A point estimate as the simplest posterior."""

from __future__ import annotations

from dataclasses import dataclass

from bayesae.families import Particles
from bayesae.joint import LogJoint
from bayesae.types import Batch, Params
from bayesae.weights.base import Info, info_of

__all__ = ["MAP"]


@dataclass(frozen=True)
class MAP:
    r"""The network as it was trained: one particle.

    .. math:: q(\theta) = \delta(\theta - \theta_*)

    `fit_model` has maximised the log-joint already, so nothing is left to fit; this makes the plain network a
    posterior like any other, the baseline of every comparison.

    Exact when: the posterior is a point, as N grows without bound.
    Biased when: always; the weights' part of every variance is 0.
    Cost: none.
    """

    @property
    def epochs(self) -> int:
        """0."""
        return 0

    def init(self, params: Params, joint: LogJoint) -> Params:
        """The weights themselves."""
        return params

    def update(self, state: Params, batch: Batch, joint: LogJoint) -> tuple[Params, Info]:
        """Nothing moves; the log-joint is evaluated."""
        value = joint.estimate({name: leaf[None] for name, leaf in state.items()}, batch)
        return state, Info(float(value))

    def posterior(self, state: Params, joint: LogJoint) -> Particles:
        """One particle."""
        return Particles({name: leaf[None] for name, leaf in state.items()}, info=info_of(joint))

    def pack(self, state: Params) -> None:
        """Nothing: the state is what `init` is given."""

    def unpack(self, packed: None, params: Params, joint: LogJoint) -> Params:
        """The weights themselves."""
        return params
