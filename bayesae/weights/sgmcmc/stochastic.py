"""What samplers with gradients of batches share: schedule, preconditioner, clipping, and what they warn of."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from bayesae.distributed import gather_members
from bayesae.errors import DataError, UnsupportedError
from bayesae.joint import LogJoint
from bayesae.types import Batch
from bayesae.weights.sgmcmc.base import ChainState, MarkovChains, check_positive
from bayesae.weights.sgmcmc.preconditioners import RMSProp, ScaleAdaptation
from bayesae.weights.sgmcmc.schedules import Cyclical, Decay, Phase

__all__ = ["StochasticGradient"]

_SHOWS = 0.1  # relative error of a variance that is worth a warning
_QUANTILE = 0.99  # over weights, of means over chains: squares of few gradients scatter


@dataclass(frozen=True)
class StochasticGradient(MarkovChains):
    """A sampler of fixed steps: no draw is ever refused, and its stationary law depends on the step.

    Args:
        step_size: As in the sampler's equations.
        schedule: How it changes; None keeps it.
        preconditioner: Scales of the weights, learned in burn-in; None is 1 for all.
        clip: Largest norm of the gradient of U over a chain's weights; None does not clip. It biases the chain, which
            is said at the end if it was active.
    """

    step_size: float
    _: KW_ONLY
    schedule: Decay | Cyclical | None = None
    preconditioner: RMSProp | ScaleAdaptation | None = None
    clip: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(step_size=self.step_size)
        if self.clip is not None:
            check_positive(clip=self.clip)
        if self.schedule is not None and not isinstance(self.schedule, Decay | Cyclical):
            raise UnsupportedError("a schedule Decay(), Cyclical() or None", repr(self.schedule), "None is constant.")
        if self.preconditioner is not None and not isinstance(self.preconditioner, RMSProp | ScaleAdaptation):
            got = repr(self.preconditioner)
            raise UnsupportedError("a preconditioner RMSProp(), ScaleAdaptation() or None", got, "None is none.")
        if self.preconditioner is not None and self.preconditioner.is_frozen and self.burn_in == 0:
            fix = "Give burn_in, or RMSProp(is_frozen=False)."
            raise DataError("a burn-in in which the preconditioner adapts", "burn_in = 0", fix)

    def _phase(self, n_steps: int, share: float) -> Phase:
        factor, samples = (1.0, True) if self.schedule is None else self.schedule.at(n_steps, share)
        is_burnt_in = share >= self.burn_in
        return Phase(factor, samples, samples and is_burnt_in, not is_burnt_in)

    def _moving(self, theta: Tensor) -> dict[str, Tensor]:
        moving = {"squares": torch.zeros_like(theta), "n_clipped": theta.new_zeros(len(theta))}
        if self.preconditioner is not None:
            moving |= self.preconditioner.start(theta)
        return moving

    def _move(
        self, state: ChainState, gradient: Tensor, phase: Phase, is_kept: bool, batch: Batch, joint: LogJoint
    ) -> None:
        moving = state.moving
        if self.clip is not None:
            share = (self.clip / torch.linalg.vector_norm(gradient, dim=1)).nan_to_num(1.0).clamp_(max=1)
            moving["n_clipped"] += share < 1
            gradient = gradient.mul_(share[:, None])
        if (own := self.preconditioner) is not None and (phase.is_adapting or not own.is_frozen):
            own.adapt(moving, -gradient, joint.n_data)
        drift, variance = self._coefficients(self.step_size * phase.factor)
        scales = moving.get("scales")
        taken = self._taken_out(moving, drift, variance)
        if is_kept:
            self._measure(state, gradient, phase.factor, taken)
        push = gradient * drift if scales is None else (gradient * scales).mul_(drift)
        noise = None
        if phase.is_noisy:
            noise = state.members.normal(state.theta.shape[1], state.theta)
            spread = variance if taken is None else variance - drift**2 * moving["scales"] * taken
            spread = spread if scales is None else scales * spread
            noise.mul_(spread.clamp(min=0).sqrt() if isinstance(spread, Tensor) else math.sqrt(spread))
        self._step(state, push, noise, self.step_size * phase.factor)

    def _taken_out(self, moving: dict[str, Tensor], drift: float, variance: float) -> Tensor | None:
        """Variance (C, P) of the gradient's noise that is taken out of what is injected: at most all of that."""
        known = None if self.preconditioner is None else self.preconditioner.noise_taken_out(moving)
        return None if known is None else known.minimum(variance / (drift**2 * moving["scales"]))

    def _measure(self, state: ChainState, gradient: Tensor, factor: float, taken: Tensor | None) -> None:
        """At kept draws: sum squares of the gradient beyond what is taken out, weighted by the step's factor."""
        square = gradient.square() if taken is None else gradient.square().sub_(taken)
        state.moving["squares"].add_(square, alpha=factor)

    @abstractmethod
    def _coefficients(self, step_size: float) -> tuple[float, float]:
        """What multiplies G times the gradient, and what variance over G is injected."""

    @abstractmethod
    def _step(self, state: ChainState, push: Tensor, noise: Tensor | None, step_size: float) -> None:
        """Theta and momenta in place, by both terms (C, P); no noise in exploration."""

    @abstractmethod
    def _errors(self, moving: dict[str, Tensor], n_kept: int) -> dict[str, Tensor]:
        """Relative errors (C, P) of the weights' variances, to first order in the step, by name."""

    def _judge(self, state: ChainState, joint: LogJoint) -> tuple[dict[str, float], list[str]]:
        numbers = {"step_size": self.step_size}
        for name, values in self._errors(state.moving, len(state.draws)).items():
            pooled = gather_members(values, self.n_chains).mean(0)
            numbers[name] = float(pooled.kthvalue(math.ceil(_QUANTILE * len(pooled))).values)
        texts = []
        if numbers["discretisation_error"] > _SHOWS:
            texts.append(
                f"the step is long: variances of some weights are off by about {numbers['discretisation_error']:.0%}. "
                "Lower step_size."
            )
        if numbers.get("gradient_noise_error", 0.0) > _SHOWS:
            texts.append(
                "friction is too small for the noise of the batches' gradients: it changes variances of some weights "
                f"by about {numbers['gradient_noise_error']:.0%}. Raise friction or the batch size, or lower step_size."
            )
        if self.clip is not None:
            n_clipped = sum(gather_members(state.moving["n_clipped"], self.n_chains).tolist())
            numbers["clipped"] = n_clipped / (self.n_chains * state.n_steps)
            if n_clipped:
                texts.append(f"{numbers['clipped']:.1%} of the gradients were clipped: draws are biased. Raise clip.")
        return numbers, texts
