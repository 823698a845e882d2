"""Deep ensembles."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch

from bayesae.errors import DataError, NonFiniteError
from bayesae.families import Particles
from bayesae.functional import stack_draws
from bayesae.joint import LogJoint
from bayesae.types import Batch, Params
from bayesae.weights.base import Info, info_of

__all__ = ["Ensemble", "EnsembleState"]


@dataclass
class EnsembleState:
    r"""Members and their optimiser; both owned by the state and updated in place.

    Args:
        members: Leaves (M, \*shape); trainable ones require gradients.
        optimiser: Adam over them, element-wise and so independent per member.
    """

    members: Params
    optimiser: torch.optim.Adam


@dataclass(frozen=True)
class Ensemble:
    r"""Networks trained from independent initialisations, equally weighted.

    .. math:: q(\theta) = \tfrac1M \sum_{m=1}^{M} \delta(\theta - \theta_m), \qquad
              \theta_m = \text{a mode of } \log p(D, \theta) \text{ reached from a fresh start}

    All members see the same batches in one mapped pass; they differ by their start.

    Args:
        n_members: M. Five is the field's habit: most of the gain, at five trainings.
        epochs: Passes over the data.
        learning_rate: Of Adam.

    Exact when: no case; with one member it is MAP.
    Biased when: the log-joint has one mode: every member finds it and the spread is 0, whatever the data.
    Cost: M trainings; memory 4 M P while it trains (weights, gradients, Adam's two moments).

    Raises:
        DataError: If there is no member or no epoch.
        NonFiniteError: If the log-joint of a member is no longer finite.
        UnsupportedError: If a layer cannot be re-initialised, or has running statistics.

    References:
        | Simple and Scalable Predictive Uncertainty Estimation using Deep Ensembles (Lakshminarayanan et al., 2017)
        | Departure: no adversarial training.
    """

    n_members: int = 5
    epochs: int = 20
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        if self.n_members < 1 or self.epochs < 1:
            raise DataError(
                "n_members >= 1 and epochs >= 1", f"{self.n_members} and {self.epochs}", "The defaults are 5 and 20."
            )

    def init(self, params: Params, joint: LogJoint) -> EnsembleState:
        """Fresh members; frozen parameters keep the network's own values."""
        trainable = _trainable(joint)
        starts = [joint.initialise() for _ in range(self.n_members)]
        members = stack_draws([{name: s[name] if name in trainable else params[name] for name in s} for s in starts])
        return self._state(members, trainable)

    def update(self, state: EnsembleState, batch: Batch, joint: LogJoint) -> tuple[EnsembleState, Info]:
        """One step of Adam for every member."""
        state.optimiser.zero_grad(set_to_none=True)
        values = joint.estimate(state.members, batch)
        if not bool(torch.isfinite(values).all()):
            raise NonFiniteError(
                "a finite log-joint", f"{values.tolist()} for the members", "Lower learning_rate or scale the data."
            )
        # divided by N, so that the learning rate does not depend on the size of the data set
        (-values.sum() / joint.n_data).backward()
        state.optimiser.step()
        return state, Info(float(values.detach().mean()))

    def posterior(self, state: EnsembleState, joint: LogJoint) -> Particles:
        """One particle a member."""
        atoms = {name: leaf.detach().clone() for name, leaf in state.members.items()}
        return Particles(atoms, info=info_of(joint))

    def pack(self, state: EnsembleState) -> dict[str, Any]:
        """Members and Adam's moments."""
        return {"members": state.members, "optimiser": state.optimiser.state_dict()}

    def unpack(self, packed: dict[str, Any], params: Params, joint: LogJoint) -> EnsembleState:
        """The members on the network's device, and Adam where it stood."""
        members = {name: leaf.detach().to(params[name], copy=True) for name, leaf in packed["members"].items()}
        state = self._state(members, _trainable(joint))
        # a copy: Adam writes into the moments that it is given
        state.optimiser.load_state_dict(copy.deepcopy(packed["optimiser"]))
        return state

    def _state(self, members: Params, trainable: set[str]) -> EnsembleState:
        leaves = [leaf.requires_grad_() for name, leaf in members.items() if name in trainable]
        return EnsembleState(members, torch.optim.Adam(leaves, lr=self.learning_rate))


def _trainable(joint: LogJoint) -> set[str]:
    return {name for name, value in joint.network.named_parameters() if value.requires_grad}
