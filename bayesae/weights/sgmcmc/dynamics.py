"""Samplers with gradients of batches: Langevin, Hamiltonian with friction, and with a thermostat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bayesae.distributed import gather_members
from bayesae.errors import DataError, UnsupportedError
from bayesae.joint import LogJoint
from bayesae.types import Batch
from bayesae.weights.sgmcmc.base import ChainState
from bayesae.weights.sgmcmc.schedules import Cyclical, Phase
from bayesae.weights.sgmcmc.stochastic import StochasticGradient

__all__ = ["SGHMC", "SGLD", "SGNHT"]


@dataclass(frozen=True)
class SGLD(StochasticGradient):
    r"""Stochastic gradient Langevin dynamics: gradient ascent with noise.

    .. math:: \theta \leftarrow \theta - \tfrac{\epsilon}{2} G \nabla \hat U(\theta) + \mathcal{N}(0, \epsilon G),
              \qquad \hat U = -\tfrac1T \Big[\tfrac NB \sum_{b=1}^{B} \log p(x_b \mid \theta) + \log p(\theta)\Big]

    U is summed over all N rows, never averaged; the joint has divided it by the temperature T, and the noise needs
    none. G is 1 or the diagonal of the preconditioner: ``SGLD(preconditioner=RMSProp())`` is pSGLD.

    For U quadratic with precision Lambda and noise-free gradients the **discretised** chain is an AR(1) process of
    stationary covariance :math:`\Lambda^{-1} (1 - \tfrac\epsilon4 \Lambda)^{-1}` (G = 1), which is
    :math:`\epsilon / (1 - (1 - \epsilon \lambda / 2)^2)` along an eigenvector, and diverges beyond
    :math:`\epsilon \lambda = 4`. Gradient noise of variance s2 multiplies it by :math:`1 + \epsilon s^2 / 4`.

    Args:
        step_size: epsilon, units of theta squared (times G): small beside 4 over the largest curvature of U, which
            grows with N. ``info["discretisation_error"]`` of the posterior estimates
            :math:`\epsilon (\lambda + s^2) / 4` where it is worst (99th percentile over weights); above 0.1 it warns.
        schedule: `Decay` or `Cyclical` steps; None keeps them.
        preconditioner: `RMSProp` or `ScaleAdaptation`; None is 1 for all.
        clip: Largest norm of the gradient of U; it biases the chain, with a warning.
        epochs: Passes over the data, burn-in included.
        n_chains: C, in one mapped gradient a step.
        burn_in: Share of the run that is not kept.
        thinning: One of so many sampling steps is kept.
        start: "trained" or "fresh" weights.
        scale: Standard deviation of what is added to each start.
        subset: Weights that move.

    Returns:
        From `fit_weights`: `families.Chains` with the log-joint at each draw. See `evaluation.convergence`.

    Exact when: the step goes to 0 while the chain's length times it goes to infinity.
    Biased when: otherwise, as above; too wide.
    Cost: C gradients of a batch a step; memory of 3 C weights, and of the draws.

    Raises:
        DataError: If a number is out of range, or no draw would be left after burn-in and thinning.
        DivergedError: If an energy is no longer finite, or more than 100 (abs(U_0) + P) above U_0 at the start; its
            ``.posterior`` holds what all chains have kept.

    References:
        | Bayesian Learning via Stochastic Gradient Langevin Dynamics (Welling, Teh, 2011)
        | Preconditioned Stochastic Gradient Langevin Dynamics for Deep Neural Networks (Li et al., 2016)
    """

    def _coefficients(self, step_size: float) -> tuple[float, float]:
        return step_size / 2, step_size

    def _step(self, state: ChainState, push: Tensor, noise: Tensor | None, step_size: float) -> None:
        state.theta.add_(push)
        if noise is not None:
            state.theta.add_(noise)

    def _errors(self, moving: dict[str, Tensor], n_kept: int) -> dict[str, Tensor]:
        return {"discretisation_error": moving["squares"] * moving.get("scales", 1.0) * (self.step_size / 4 / n_kept)}


@dataclass(frozen=True)
class _Momentum(StochasticGradient):
    """Samplers with momenta v (C, P), and the gradient's own noise told from its size by successive gradients."""

    friction: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.friction <= 1:
            raise DataError("0 < friction <= 1", repr(self.friction), "0.05 is the default, 1 is Langevin.")

    def _moving(self, theta: Tensor) -> dict[str, Tensor]:
        names = ("momentum", "last_gradient", "differences")
        return super()._moving(theta) | {name: torch.zeros_like(theta) for name in names}

    def _coefficients(self, step_size: float) -> tuple[float, float]:
        return step_size, 2 * self.friction * step_size

    def _measure(self, state: ChainState, gradient: Tensor, factor: float, taken: Tensor | None) -> None:
        super()._measure(state, gradient, factor, taken)
        if state.n_steps:
            noise = (gradient - state.moving["last_gradient"]).square_().mul_(0.5)
            state.moving["differences"].add_(noise if taken is None else noise.sub_(taken), alpha=factor)

    def _move(
        self, state: ChainState, gradient: Tensor, phase: Phase, is_kept: bool, batch: Batch, joint: LogJoint
    ) -> None:
        super()._move(state, gradient, phase, is_kept, batch, joint)
        state.moving["last_gradient"] = gradient

    def _curvature_error(self, moving: dict[str, Tensor], n_kept: int, friction: float) -> Tensor:
        curvature = (moving["squares"] - moving["differences"]).clamp(min=0)
        return curvature * moving.get("scales", 1.0) * (self.step_size / (2 * (2 - friction) * n_kept))


@dataclass(frozen=True)
class SGHMC(_Momentum):
    r"""Stochastic gradient Hamiltonian Monte Carlo: momenta, with friction against the noise of the gradients.

    .. math:: v \leftarrow (1 - a) v - \eta G \nabla \hat U(\theta) + \mathcal{N}(0, 2 a \eta G), \qquad
              \theta \leftarrow \theta + v

    with U as in `SGLD`, summed over all N rows and divided by the temperature. ``preconditioner=ScaleAdaptation()``
    is Springenberg's scale-adapted sampler: eta is the square of its step, and an estimate of the gradient's noise is
    taken out of what is injected. a = 1 is `SGLD` with epsilon = 2 eta.

    For U quadratic with precision Lambda and noise-free gradients the **discretised** chain has (G = 1) the stationary
    covariance :math:`\Lambda^{-1} (1 - \tfrac{\eta}{2 (2 - a)} \Lambda)^{-1}` of theta. Gradient noise of variance
    s2 multiplies it by :math:`1 + \eta s^2 / 2a`: friction must dominate it.

    Args:
        step_size: eta, units of theta squared (times G).
        friction: a, in (0, 1].
        schedule: As in `SGLD`; in a cycle's exploration this is gradient ascent with momentum 1 - a.
        preconditioner: As in `SGLD`.
        clip: As in `SGLD`.
        epochs: As in `SGLD`, and so are the others.
        n_chains: C.
        burn_in: Share of the run that is not kept.
        thinning: One of so many sampling steps is kept.
        start: "trained" or "fresh" weights; momenta start at 0.
        scale: Standard deviation of what is added to each start.
        subset: Weights that move.

    Returns:
        As `SGLD`. ``info`` estimates both errors where they are worst: "discretisation_error" and
        "gradient_noise_error" (s2, less what is taken out, by half the mean square of successive gradients'
        differences); above 0.1 each warns.

    Exact when: as `SGLD`, with friction large beside the gradients' noise.
    Biased when: otherwise, as above; too wide.
    Cost: C gradients of a batch a step; memory of 7 C weights, and of the draws.

    Raises:
        DataError: As `SGLD`.
        DivergedError: As `SGLD`.

    References:
        | Stochastic Gradient Hamiltonian Monte Carlo (Chen, Fox, Guestrin, 2014)
        | Bayesian Optimization with Robust Bayesian Neural Networks (Springenberg et al., 2016)
        | Departure: momenta are never resampled.
    """

    def _step(self, state: ChainState, push: Tensor, noise: Tensor | None, step_size: float) -> None:
        momentum = state.moving["momentum"].mul_(1 - self.friction).add_(push)
        if noise is not None:
            momentum.add_(noise)
        state.theta.add_(momentum)

    def _errors(self, moving: dict[str, Tensor], n_kept: int) -> dict[str, Tensor]:
        share = moving.get("scales", 1.0) * (self.step_size / (2 * self.friction * n_kept))
        curvature = self._curvature_error(moving, n_kept, self.friction)
        return {"discretisation_error": curvature, "gradient_noise_error": moving["differences"].abs() * share}


@dataclass(frozen=True)
class SGNHT(_Momentum):
    r"""Stochastic gradient Nose-Hoover thermostat: friction that finds out how noisy the gradients are.

    .. math:: v \leftarrow (1 - \xi) v - \eta G \nabla \hat U(\theta) + \mathcal{N}(0, 2 a \eta G), \quad
              \theta \leftarrow \theta + v, \quad
              \xi \leftarrow \xi + \tfrac1P \sum_{i=1}^P v_i^2 / G_i - \eta

    with U as in `SGLD`, summed over all N rows and divided by the temperature; xi, one number a chain, starts at a. As
    the step shrinks with a in proportion to its root, (theta, v, xi) go to independence of exp(-U), N(0, eta G), and
    N(a + b, eta / P) with b what isotropic gradient noise asks for: noise s2 is absorbed by
    :math:`b = \eta s^2 / 2`.

    The **discretised** chain keeps :math:`\mathbb{E} v^\top G^{-1} v = \eta P` at every step size. For U quadratic with
    Lambda a multiple of 1 and P large the covariance of theta is :math:`(1 - \bar\xi / 2) \Lambda^{-1}`.

    Args:
        step_size: eta, units of theta squared (times G).
        friction: a, in (0, 1]: what is injected.
        schedule: `Decay`; None keeps the step.
        preconditioner: As in `SGLD`; the thermostat takes up what noise `ScaleAdaptation` leaves.
        clip: As in `SGLD`.
        epochs: As in `SGLD`, and so are the others.
        n_chains: C.
        burn_in: Share of the run that is not kept.
        thinning: One of so many sampling steps is kept.
        start: "trained" or "fresh" weights; momenta start at 0.
        scale: Standard deviation of what is added to each start.
        subset: Weights that move.

    Returns:
        As `SGLD`, and ``info["friction"]``, the mean of xi over chains at the end.

    Exact when: as `SGLD`, with gradient noise of one variance for all weights (divided by G) and directions.
    Biased when: that noise differs between weights: the thermostat knows their mean alone, and momenta of chains with
        few weights fluctuate.
    Cost: C gradients of a batch a step; memory of 7 C weights, and of the draws.

    Raises:
        DataError: As `SGLD`.
        UnsupportedError: If the schedule is `Cyclical`: without noise a thermostat heats what it should let cool.
        DivergedError: As `SGLD`.

    References:
        | Bayesian Sampling Using Stochastic Gradient Thermostats (Ding et al., 2014)
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.schedule, Cyclical):
            got, fix = "Cyclical, whose exploration has no noise to balance", "Use SGLD or SGHMC."
            raise UnsupportedError("a schedule Decay() or None", got, fix)

    def _moving(self, theta: Tensor) -> dict[str, Tensor]:
        return super()._moving(theta) | {"thermostat": theta.new_full((len(theta), 1), self.friction)}

    def _step(self, state: ChainState, push: Tensor, noise: Tensor | None, step_size: float) -> None:
        momentum, thermostat = state.moving["momentum"], state.moving["thermostat"]
        momentum.mul_(1 - thermostat).add_(push)
        if noise is not None:
            momentum.add_(noise)
        state.theta.add_(momentum)
        energy = momentum.square()
        if (scales := state.moving.get("scales")) is not None:
            energy.div_(scales)
        thermostat.add_(energy.mean(1, keepdim=True) - step_size)

    def _errors(self, moving: dict[str, Tensor], n_kept: int) -> dict[str, Tensor]:
        xi = moving["thermostat"].clamp(0, 1)
        by_step = self._curvature_error(moving, n_kept, 0.0)
        return {"discretisation_error": torch.maximum(by_step, xi / 2)}

    def _judge(self, state: ChainState, joint: LogJoint) -> tuple[dict[str, float], list[str]]:
        numbers, texts = super()._judge(state, joint)
        friction = gather_members(state.moving["thermostat"], self.n_chains)
        return numbers | {"friction": float(friction.mean())}, texts
