"""Deep ensembles, and their members with perturbed data and priors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from bayesae import random
from bayesae.distributed import add_over_ranks, gather_members
from bayesae.errors import DataError, DivergedError, UnsupportedError
from bayesae.families import Particles
from bayesae.joint import LogJoint
from bayesae.likelihoods import Gaussian
from bayesae.subset import Subset
from bayesae.types import Batch, Params
from bayesae.weights.base import Info, info_of
from bayesae.weights.flat import Chosen, Members, resume

__all__ = ["Ensemble", "EnsembleState", "Starts"]

Starts = Literal["fresh", "trained"]


@dataclass
class EnsembleState:
    """Members of this rank and their optimiser; both owned by the state and updated in place.

    Args:
        chosen: The weights that move.
        theta: They, (M, P).
        optimiser: Adam over them, element-wise and so independent per member.
        seeds: One for each member: of its start and its perturbations.
        centres: Means of the members' priors, (M, P); None where they are 0.
    """

    chosen: Chosen
    theta: Tensor
    optimiser: torch.optim.Adam = field(repr=False)
    seeds: list[int]
    centres: Tensor | None


@dataclass(frozen=True)
class Ensemble:
    r"""Networks trained apart, equally weighted.

    .. math:: q(\theta) = \tfrac1M \sum_{m=1}^{M} \delta(\theta - \theta_m), \qquad
              \theta_m = \text{a mode of } \log p(D, \theta) \text{ reached from a start of its own}

    With ``is_randomised`` (randomised MAP sampling) each member has a data set and a prior of its own as well,

    .. math:: \theta_m = \operatorname{argmax}_\theta \sum_i \log p(y_i + \epsilon_{mi} \mid \theta)
              - \tfrac12 (\theta - \theta_{0m})^\top \Lambda (\theta - \theta_{0m}), \quad
              \epsilon_{mi} \sim \mathcal{N}(0, T s^2), \quad \theta_{0m} \sim \mathcal{N}(0, T \Lambda^{-1}),

    with s the noise scale, :math:`\Lambda` the prior precisions and T the temperature. A perturbation belongs to a
    member and a row for the whole run. What the encoder sees stays as it is.

    Args:
        n_members: M. Five is the field's habit: most of the gain, at five trainings.
        epochs: Passes over the data.
        learning_rate: Of Adam.
        subset: The uncertain weights: a `Subset`, or name patterns as in `Subset.of`; the others stay as trained.
        starts: "fresh" weights from the layers' own initialisation, or the network as it was "trained", which makes
            members of one mode that differ by their perturbations alone.
        is_randomised: Whether members have perturbed data and priors.

    All members see the same batches, each has random numbers of its own, and ranks train some of the members each.

    Exact when: ``is_randomised``, the outputs are linear in theta and the likelihood is Gaussian: members are then
        independent draws of the posterior, at every temperature. Else no case; with one member it is MAP.
    Biased when: not randomised and the log-joint has one mode: every member finds it and the spread is 0, whatever the
        data. Or members have not converged.
    Cost: M trainings, as one mapped pass a step, or one after the other where ``is_randomised`` (and a generator for
        every member and row, about 10 microseconds each); memory 4 M P while it trains (weights, gradients, Adam's two
        moments).

    Raises:
        DataError: If there is no member or no epoch, a step is not positive, or ``is_randomised`` gets batches without
            row numbers (those of a loader).
        DivergedError: If the log-joint of a member or its gradient is no longer finite; ``posterior`` has the other
            members as they were before that step.
        UnsupportedError: If a layer cannot be re-initialised or has running statistics, members would not differ, or
            ``is_randomised`` meets another likelihood than a `Gaussian` or a prior that is not Normal.

    References:
        | Simple and Scalable Predictive Uncertainty Estimation using Deep Ensembles (Lakshminarayanan et al., 2017)
        | A Randomized Maximum A Posteriori Method for Posterior Sampling of High Dimensional Nonlinear Bayesian
          Inverse Problems (Wang, Bui-Thanh, Ghattas, 2018)
        | Uncertainty in Neural Networks: Approximately Bayesian Ensembling (Pearce, Leibfried, Brintrup, 2020): with
          the prior's mean perturbed alone
        | Departure: no adversarial training.
    """

    n_members: int = 5
    epochs: int = 20
    learning_rate: float = 1e-3
    subset: Subset | Sequence[str] = ("**",)
    starts: Starts = "fresh"
    is_randomised: bool = False

    def __post_init__(self) -> None:
        if self.n_members < 1 or self.epochs < 1:
            raise DataError(
                "n_members >= 1 and epochs >= 1", f"{self.n_members} and {self.epochs}", "The defaults are 5 and 20."
            )
        if not 0 < self.learning_rate < math.inf:
            raise DataError("a positive learning_rate", f"{self.learning_rate}", "1e-3 is the default.")
        if self.starts not in (known := get_args(Starts)):
            raise UnsupportedError(f"starts, one of {list(known)}", repr(self.starts), "'fresh' is the default.")
        if self.starts == "trained" and not self.is_randomised and self.n_members > 1:
            fix = "Use is_randomised=True, or fresh starts."
            raise UnsupportedError("members that differ", "the same start and data for each", fix)

    def init(self, params: Params, joint: LogJoint) -> EnsembleState:
        """Members at their starts, with their priors."""
        chosen = Chosen.of(params, joint, self.subset)
        start, scale = chosen.start, self._prior_scale(chosen, joint)
        seeds = [one.initial_seed() for one in Members(self.n_members, start.device).generators]
        theta, centres = start.repeat(len(seeds), 1), torch.zeros_like(start.expand(len(seeds), -1))
        for place, seed in enumerate(seeds):
            with random.scope(seed, start.device):
                if self.starts == "fresh":
                    theta[place] = chosen.fresh(joint)
                if scale is not None:
                    centres[place] = scale * torch.randn_like(start)
        return self._state(chosen, theta, seeds, None if scale is None else centres)

    def update(self, state: EnsembleState, batch: Batch, joint: LogJoint) -> tuple[EnsembleState, Info]:
        """One step of Adam for every member."""
        theta = state.theta.detach()
        if state.centres is None:
            values, gradients = _of_some(state.chosen, joint, theta, batch)
        else:
            parts = [_of_some(state.chosen, joint, theta[:0], batch)]
            for place, seed in enumerate(state.seeds):
                own = _perturbed(batch, joint, seed)
                parts.append(_of_some(state.chosen, joint, theta[place : place + 1], own))
            values, gradients = (torch.cat(each) for each in zip(*parts, strict=True))
            # the quadratic around 0 is in the joint: what is left is linear in the weights
            precision = _precisions(state.chosen, joint).to(theta)
            pull = precision * state.centres / joint.temperature
            values = values + (pull * (theta - state.centres / 2)).sum(1)
            gradients = gradients + pull
        is_sound = values.isfinite() & gradients.isfinite().all(1)
        (sums,) = add_over_ranks([torch.stack([values.double().sum(), is_sound.sum().double()])])
        total, n_sound = sums.tolist()
        if n_sound < self.n_members:
            raise DivergedError(
                "a finite log-joint and gradient of every member",
                f"others in {self.n_members - int(n_sound)} of {self.n_members} members",
                "Lower learning_rate or scale the data; `posterior` of this error has the members that are left.",
                self._left(state, is_sound, joint),
            )
        # divided by N, so that the learning rate does not depend on the size of the data set
        state.theta.grad = -gradients / joint.n_data
        state.optimiser.step()
        return state, Info(total / self.n_members)

    def posterior(self, state: EnsembleState, joint: LogJoint) -> Particles:
        """One particle a member."""
        theta = gather_members(state.theta.detach().clone(), self.n_members)
        return Particles(state.chosen.params(theta), info=info_of(joint))

    def pack(self, state: EnsembleState) -> dict[str, Any]:
        """Members, their seeds and priors, and Adam's moments."""
        optimiser = state.optimiser.state_dict()
        return {"theta": state.theta, "optimiser": optimiser, "seeds": state.seeds, "centres": state.centres}

    def unpack(self, packed: dict[str, Any], params: Params, joint: LogJoint) -> EnsembleState:
        """The members on the network's device, and Adam where it stood."""
        chosen = Chosen.of(params, joint, self.subset)
        centres = packed["centres"]
        centres = None if centres is None else centres.to(chosen.start, copy=True)
        state = self._state(chosen, packed["theta"].detach().to(chosen.start, copy=True), packed["seeds"], centres)
        resume(state.optimiser, packed["optimiser"])
        return state

    def _state(self, chosen: Chosen, theta: Tensor, seeds: list[int], centres: Tensor | None) -> EnsembleState:
        leaf = theta.requires_grad_()
        return EnsembleState(chosen, leaf, torch.optim.Adam([leaf], lr=self.learning_rate), seeds, centres)

    def _left(self, state: EnsembleState, is_sound: Tensor, joint: LogJoint) -> Particles | None:
        """Members of all ranks that have not diverged; None without any."""
        theta = state.theta.detach()
        is_left = gather_members(is_sound.to(theta), self.n_members) > 0
        left = gather_members(theta, self.n_members)[is_left]
        return Particles(state.chosen.params(left), info=info_of(joint)) if len(left) else None

    def _prior_scale(self, chosen: Chosen, joint: LogJoint) -> Tensor | None:
        """Standard deviation of the chosen weights' prior means, (P,); None where nothing is perturbed."""
        if not self.is_randomised:
            return None
        if not isinstance(joint.likelihood, Gaussian):
            fix = "Use is_randomised=False."
            raise UnsupportedError("a Gaussian likelihood to perturb data of", type(joint.likelihood).__name__, fix)
        return (joint.temperature / _precisions(chosen, joint)).sqrt().to(chosen.start)


def _precisions(chosen: Chosen, joint: LogJoint) -> Tensor:
    """Prior precisions of the chosen weights, float64, () or (P,)."""
    if (precisions := chosen.prior_precision(joint)) is None:
        expected = "an IsotropicNormal or IndependentNormal prior"
        raise UnsupportedError(expected, type(joint.prior).__name__, "Use is_randomised=False.")
    return precisions


def _of_some(chosen: Chosen, joint: LogJoint, theta: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-joint and gradient of members, of which a rank may have none."""
    return chosen.gradient(joint, theta, batch) if len(theta) else (theta.new_zeros(0), theta)


def _perturbed(batch: Batch, joint: LogJoint, seed: int) -> Batch:
    """A member's own data: noise of the likelihood's scale on what outputs are to explain, the same in each pass."""
    if batch.index is None:
        fix = "Give a tensor, an array, a data set or one Batch; a loader's collation may set Batch.index."
        raise DataError("batches with row numbers, which the perturbations belong to", "none", fix)
    given = batch.explained
    with random.scope(seed):
        noise = random.row_normal(batch.index, (), given[0].numel(), given)
    scale = torch.as_tensor(joint.likelihood.scale).to(noise) * math.sqrt(joint.temperature)  # pyright: ignore
    return batch._replace(target=given + (scale * noise).reshape(given.shape))
