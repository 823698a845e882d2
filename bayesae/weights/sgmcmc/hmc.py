"""Two references with all rows in every step, exact whatever the step: Hamiltonian Monte Carlo and MALA."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import KW_ONLY, dataclass, field

import torch
from torch import Tensor

from bayesae.distributed import gather_members
from bayesae.errors import DataError, UnsupportedError
from bayesae.joint import LogJoint
from bayesae.types import Batch
from bayesae.weights.flat import Chosen
from bayesae.weights.sgmcmc.base import ChainState, MarkovChains, check_positive
from bayesae.weights.sgmcmc.schedules import Phase

__all__ = ["HMC", "MALA", "leapfrog"]

_SHRINKAGE, _DELAY, _FORGETTING = 0.05, 10.0, 0.75  # gamma, t0 and kappa of Hoffman and Gelman


def leapfrog(
    chosen: Chosen, joint: LogJoint, batch: Batch, theta: Tensor, momentum: Tensor, gradient: Tensor, h: Tensor, n: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Follow H(theta, p) = U(theta) + p^T p / 2 for n steps of h: volume kept, reversible, energy to O(h^2).

    .. math:: p \leftarrow p - \tfrac h2 \nabla U(\theta), \quad \theta \leftarrow \theta + h p, \quad
              p \leftarrow p - \tfrac h2 \nabla U(\theta)

    Args:
        chosen: The weights that move.
        joint: -U.
        batch: All rows.
        theta: Where chains are, (C, P).
        momentum: p, (C, P).
        gradient: Of log p(D, theta) / T at theta, (C, P).
        h: Step of each chain, (C, 1).
        n: Steps.

    Returns:
        Theta, momentum, log-joint (C,) and its gradient at the end.
    """
    momentum, values = momentum + 0.5 * h * gradient, theta.new_zeros(len(theta))
    for left in reversed(range(n)):
        theta = theta + h * momentum
        values, gradient = chosen.gradient(joint, theta, batch)
        momentum = momentum + (h if left else 0.5 * h) * gradient
    return theta, momentum, values, gradient


@dataclass(frozen=True)
class _Metropolis(MarkovChains):
    """Leapfrog proposals from fresh momenta, taken or refused on the exact log-joint."""

    step_size: float = 1e-2
    _: KW_ONLY
    adapts: bool = True
    acceptance: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(step_size=self.step_size)
        if self.adapts and self.burn_in == 0:
            raise DataError("a burn-in in which the step adapts", "burn_in = 0", "Give burn_in, or adapts=False.")
        if not 0 < self.acceptance < 1:
            raise DataError("0 < acceptance < 1", repr(self.acceptance), "0.8 is usual for HMC, 0.57 for MALA.")

    @property
    @abstractmethod
    def _h(self) -> float:
        """Step of the leapfrog at the start."""

    @property
    @abstractmethod
    def _n(self) -> int:
        """Leapfrog steps of a proposal."""

    @abstractmethod
    def _size(self, h: float) -> float:
        """A step of the leapfrog in the convention of ``step_size``."""

    def _phase(self, n_steps: int, share: float) -> Phase:
        is_burnt_in = share >= self.burn_in
        return Phase(1.0, True, is_burnt_in, self.adapts and not is_burnt_in)

    def _moving(self, theta: Tensor) -> dict[str, Tensor]:
        size = (len(theta), 1)
        log_h = theta.new_full(size, math.log(self._h))
        zeros = {name: theta.new_zeros(size) for name in ("shortfall", "accepted")}
        return {"log_h": log_h, "log_h_mean": log_h.clone(), **zeros, "n_adapted": theta.new_zeros(())}

    def _look(self, state: ChainState, batch: Batch, joint: LogJoint) -> tuple[Tensor, Tensor]:
        if not joint.is_deterministic:
            got, fix = "one that draws codes", "Give codes=codes.encode, or use SGHMC."
            raise UnsupportedError("a log-joint that gives the same value twice", got, fix)
        if len(batch.x) != joint.n_data:
            fix = "Give batch_size=len(data), or use SGHMC."
            raise UnsupportedError(f"batches of all {joint.n_data} rows", f"{len(batch.x)}", fix)
        if "gradient" not in state.moving:
            values, gradient = super()._look(state, batch, joint)
            state.moving |= {"value": values, "gradient": gradient}
        return state.moving["value"], state.moving["gradient"]

    def _move(
        self, state: ChainState, gradient: Tensor, phase: Phase, is_kept: bool, batch: Batch, joint: LogJoint
    ) -> None:
        moving = state.moving
        if self.adapts and not phase.is_adapting:
            moving["log_h"] = moving["log_h_mean"]
        numbers = state.members.normal(state.theta.shape[1] + 1, state.theta)
        momentum, coin = numbers[:, :-1], torch.special.log_ndtr(numbers[:, -1])  # log of a uniform number
        value, h = moving["value"], moving["log_h"].exp()
        end = leapfrog(state.chosen, joint, batch, state.theta, momentum, gradient, h, self._n)
        theta, end_momentum, end_value, end_gradient = end
        energies = value - 0.5 * momentum.square().sum(1), end_value - 0.5 * end_momentum.square().sum(1)
        log_ratio = (energies[1] - energies[0]).nan_to_num(-math.inf, posinf=-math.inf, neginf=-math.inf).clamp(max=0)
        taken = coin < log_ratio
        state.theta = torch.where(taken[:, None], theta, state.theta)
        moving["value"] = torch.where(taken, end_value, value)
        moving["gradient"] = torch.where(taken[:, None], end_gradient, gradient)
        if phase.is_adapting:
            self._adapt(moving, log_ratio.exp()[:, None])
            return
        moving["accepted"] = moving["accepted"] + log_ratio.exp()[:, None] * phase.is_sampling

    def _adapt(self, moving: dict[str, Tensor], accepted: Tensor) -> None:
        """Dual averaging of the steps, towards the wanted acceptance."""
        moving["n_adapted"] = moving["n_adapted"] + 1
        n = float(moving["n_adapted"])
        weight = 1 / (n + _DELAY)
        moving["shortfall"] = torch.lerp(moving["shortfall"], self.acceptance - accepted, weight)
        start = math.log(10 * self._h)
        moving["log_h"] = start - math.sqrt(n) / _SHRINKAGE * moving["shortfall"]
        moving["log_h_mean"] = torch.lerp(moving["log_h_mean"], moving["log_h"], n**-_FORGETTING)

    def _judge(self, state: ChainState, joint: LogJoint) -> tuple[dict[str, float], list[str]]:
        accepted = gather_members(state.moving["accepted"][:, 0], self.n_chains) / state.n_sampled
        h = gather_members(state.moving["log_h"][:, 0].exp(), self.n_chains)
        least = float(accepted.min())
        numbers = {"acceptance": float(accepted.mean()), "step_size": self._size(float(h.mean()))}
        if least > self.acceptance / 2:
            return numbers, []
        fix = "Lower step_size" if not self.adapts else "Give a longer burn_in, or a smaller step_size to start from"
        return numbers, [f"a chain took {least:.0%} of its proposals: it may have stood still. {fix}."]


@dataclass(frozen=True)
class HMC(_Metropolis):
    r"""Hamiltonian Monte Carlo on the exact log-joint: the reference for small networks and data.

    .. math:: p \sim \mathcal{N}(0, I), \quad (\theta', p') = \text{leapfrog}_{h}^{L}(\theta, p), \quad
              \Pr(\text{take}) = \min\big(1, e^{H(\theta, p) - H(\theta', p')}\big), \quad
              H = U(\theta) + \tfrac12 p^\top p

    with U = -log p(D, theta) / T, summed over all N rows. An update is a proposal, so that ``epochs`` counts them.

    Args:
        step_size: h at the start, units of theta; stable below 2 over the root of the largest curvature of U.
        n_leapfrog: L. L h should be about half the period of the widest direction.
        adapts: Whether each chain's step is adapted in burn-in by dual averaging, then held.
        acceptance: What it is adapted to.
        epochs: Proposals, burn-in included.
        n_chains: C, in one mapped gradient a step.
        burn_in: Share of the run that is not kept.
        thinning: One of so many proposals is kept.
        start: "trained" or "fresh" weights.
        scale: Standard deviation of what is added to each start.
        subset: Weights that move.

    Returns:
        From `fit_weights`: `families.Chains`; ``info`` has the mean "acceptance" of the sampling part and the mean
        "step_size" in it.

    Exact when: always, as the chain goes on, whatever the step: detailed balance holds.
    Biased when: the chain is short beside its correlation; L h near half a period of a direction takes it to its mirror
        image again and again.
    Cost: C L gradients over all rows a proposal.

    Raises:
        UnsupportedError: If the log-joint is not deterministic (a code that is drawn), or a batch lacks rows.
        DataError: If a number is out of range, or no draw would be left.
        DivergedError: If the start is not finite. Proposals that are not are refused.

    References:
        | MCMC Using Hamiltonian Dynamics (Neal, 2011)
        | The No-U-Turn Sampler (Hoffman, Gelman, 2014): the step's adaptation; no doubling of trajectories here
    """

    n_leapfrog: int = 20
    acceptance: float = field(default=0.8, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_leapfrog < 1:
            raise DataError("n_leapfrog >= 1", repr(self.n_leapfrog), "20 is the default.")

    @property
    def _h(self) -> float:
        return self.step_size

    @property
    def _n(self) -> int:
        return self.n_leapfrog

    def _size(self, h: float) -> float:
        return h


@dataclass(frozen=True)
class MALA(_Metropolis):
    r"""Langevin proposals, taken or refused on the exact log-joint: `SGLD` with all rows, without its bias.

    .. math:: \theta' = \theta - \tfrac\epsilon2 \nabla U(\theta) + \mathcal{N}(0, \epsilon I)

    with U = -log p(D, theta) / T, summed over all N rows: one leapfrog step of h = sqrt(epsilon). An update is a
    proposal, so that ``epochs`` counts them.

    Args:
        step_size: epsilon at the start, as of `SGLD`: units of theta squared.
        adapts: As in `HMC`, and so are the others.
        acceptance: What the step is adapted to.
        epochs: Proposals, burn-in included.
        n_chains: C.
        burn_in: Share of the run that is not kept.
        thinning: One of so many proposals is kept.
        start: "trained" or "fresh" weights.
        scale: Standard deviation of what is added to each start.
        subset: Weights that move.

    Returns:
        As `HMC`.

    Exact when: as `HMC`.
    Biased when: as `HMC`; it moves by diffusion, and wants chains longer by the ratio of widths.
    Cost: C gradients over all rows a proposal.

    Raises:
        UnsupportedError: As `HMC`.
        DataError: As `HMC`.
        DivergedError: As `HMC`.

    References:
        | Optimal Scaling of Discrete Approximations to Langevin Diffusions (Roberts, Rosenthal, 1998)
    """

    acceptance: float = field(default=0.574, kw_only=True)

    @property
    def _h(self) -> float:
        return math.sqrt(self.step_size)

    @property
    def _n(self) -> int:
        return 1

    def _size(self, h: float) -> float:
        return h**2
