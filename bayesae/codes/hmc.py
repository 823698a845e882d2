"""Hamiltonian Monte Carlo over codes: chains for every row under every weight draw, for any decoder and likelihood."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bayesae import random
from bayesae.codes.arguments import check_number
from bayesae.codes.base import CodeModel, CodePosterior, differentiating, law_of, score_outputs
from bayesae.codes.laplace import Laplace
from bayesae.codes.laws import DiagonalLaw, Law
from bayesae.data import check_counts
from bayesae.errors import NonFiniteError
from bayesae.types import Batch

__all__ = ["HMC", "Chains", "HMCState", "leapfrog"]

_JITTER = 0.2  # share of the step size, either way
_SHRINKAGE, _DELAY, _DECAY = 0.05, 10, 0.75  # gamma, t_0 and kappa of the paper
_WIDE = 2.0  # where chains start, in deviations of the whitening law
_DIVERGENCE = 1000.0  # nats

Slopes = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Positions (C, S, B, Z) to their log-densities (C, S, B) and the gradients of these (C, S, B, Z)."""


@dataclass(frozen=True)
class Chains:
    r"""What chains over codes went through.

    Args:
        latents: Codes after every step that was kept, (C, M, S, B, Z).
        acceptance: Mean acceptance probability of these steps, (S, B).
        n_divergent: How many of these steps, over all chains, lost track of the energy, (S, B).
        step_size: Of the leapfrog steps, in deviations of the whitening law, (S, B).
    """

    latents: Tensor
    acceptance: Tensor
    n_divergent: Tensor
    step_size: Tensor


@dataclass(frozen=True)
class HMCState:
    """Where chains stand.

    Args:
        law: Codes are what it makes of positions.
        position: (C, S, B, Z).
        value: Log p(x_observed, z) there, nats, (C, S, B).
        slope: Its gradient in the position.
        log_step: Log of the step size in use, (S, B).
        log_average: Its average over adapting steps, of later ones most.
        shortfall: Running mean of the acceptance that is lacking, (S, B).
        n_adapted: Steps that adapted.
        acceptance: Of the last step, (S, B).
        is_divergent: Whether the last step was, (C, S, B).
    """

    law: Law
    position: Tensor
    value: Tensor
    slope: Tensor
    log_step: Tensor
    log_average: Tensor
    shortfall: Tensor
    n_adapted: int
    acceptance: Tensor
    is_divergent: Tensor

    @property
    def latents(self) -> Tensor:
        """Codes, (C, S, B, Z)."""
        return self.law.push(self.position)


@dataclass(frozen=True)
class HMC:
    r"""Chains that leave :math:`p(z \mid x_o, \theta)` invariant, in coordinates that a Normal law whitens.

    .. math:: z = m + R u, \qquad \log \pi(u) = \log p(x_o, m + R u \mid \theta), \qquad
              u' = \text{leapfrog}(u, \rho), \quad \rho \sim \mathcal{N}(0, I), \qquad
              a = \min\big(1, e^{H(u, \rho) - H(u', \rho')}\big)

    with :math:`H = -\log \pi(u) + \tfrac12 \lVert \rho \rVert^2`. Every step takes a random number of leapfrog steps,
    1 to ``n_leapfrog``, of a size that is jittered by a fifth: a trajectory of one length could be half a period of
    the target and come back to its mirror image for ever. Sizes are adapted while chains burn in, by dual averaging,
    one for each row and weight draw, and stand still afterwards.

    Args:
        n_leapfrog: Leapfrog steps of one step, at most.
        target_acceptance: Mean acceptance that adaptation aims at, in (0, 1).
        step_size: First size, in deviations of the whitening law.
        whitening: A code posterior with a Normal: m and R, which make steps alike in all directions. They change how
            fast chains mix, not what they converge to. None: R = I around the encoder's code.

    Exact when: in the limit of many steps, for log-densities that are differentiable almost everywhere.
    Biased when: chains are short, or never come to another mode: R-hat of chains from one start does not tell.
    Cost: on average (n_leapfrog + 1) / 2 gradients of log p(x, z) a step and chain, all chains in one call.

    Raises:
        DataError: If a count is none, or a number out of its range.
        UnsupportedError: When called, if the whitening code posterior has no Normal.
        NonFiniteError: When called, if log p(x, z) or its gradient is not finite where chains start.

    References:
        | MCMC using Hamiltonian dynamics (Neal, 2011, https://arxiv.org/abs/1206.1901)
        | The No-U-Turn Sampler (Hoffman, Gelman, 2014, https://arxiv.org/abs/1111.4246): dual averaging
    """

    n_leapfrog: int = 8
    target_acceptance: float = 0.8
    step_size: float = 0.5
    whitening: CodePosterior | None = Laplace(step="line_search")

    def __post_init__(self) -> None:
        check_counts(n_leapfrog=self.n_leapfrog)
        check_number("target_acceptance", self.target_acceptance, below=1.0)
        check_number("step_size", self.step_size)

    def init(self, model: CodeModel, batch: Batch, *, n_chains: int = 1) -> HMCState:
        """Start chains at draws of the whitening law, twice as wide.

        Args:
            model: The model at S weight draws.
            batch: The rows; of a masked one the observed entries count.
            n_chains: C.

        Returns:
            The state, nothing adapted yet.

        Raises:
            NonFiniteError: If log p(x, z) or its gradient is not finite there.
        """
        check_counts(n_chains=n_chains)
        if self.whitening is None:
            loc = model.encode(batch.x, batch.context)
            law: Law = DiagonalLaw(loc, torch.zeros_like(loc))
        else:
            law = law_of(self.whitening, model, batch)
        position = _WIDE * torch.randn(n_chains, *law.loc.shape, dtype=law.loc.dtype, device=law.loc.device)
        value, slope = _slopes(model, batch, law)(position)
        if not bool(value.isfinite().all() and slope.isfinite().all()):
            fix = "Are rows, or the decoder's weights, far outside the training range?"
            raise NonFiniteError("a finite log p(x, z) where chains start", "NaN or infinite values", fix)
        log_step = torch.full_like(value[0], self.step_size).log()
        zero = torch.zeros_like(log_step)
        none = torch.zeros_like(value, dtype=torch.bool)
        return HMCState(law, position, value, slope, log_step, log_step, zero, 0, zero, none)

    def step(self, state: HMCState, model: CodeModel, batch: Batch, *, adapts: bool = False) -> HMCState:
        """One trajectory of every chain, taken or refused.

        Args:
            state: Where chains stand.
            model: As for `init`.
            batch: As for `init`.
            adapts: Move the step size; what is drawn while it moves is no draw of the target.

        Returns:
            The new state.
        """
        momentum = torch.randn_like(state.position)
        jitter = 1 + _JITTER * (2 * torch.rand_like(state.value) - 1)
        n_steps = int(torch.randint(1, self.n_leapfrog + 1, ()))
        size = (state.log_step.exp() * jitter)[..., None]
        slopes = _slopes(model, batch, state.law)
        position, moved, value, slope = leapfrog(slopes, state.position, momentum, state.slope, size, n_steps)
        gain = value - state.value - 0.5 * (moved.square() - momentum.square()).sum(-1)
        # a trajectory that left the finite numbers is refused
        chance = gain.clamp(max=0).exp().nan_to_num(0.0)
        is_taken = torch.rand_like(chance) < chance
        new = replace(
            state,
            position=torch.where(is_taken[..., None], position, state.position),
            value=torch.where(is_taken, value, state.value),
            slope=torch.where(is_taken[..., None], slope, state.slope),
            acceptance=chance.mean(0),
            is_divergent=~(gain > -_DIVERGENCE),
        )
        return self._adapted(new) if adapts else new

    def run(
        self,
        model: CodeModel,
        batch: Batch,
        *,
        n_chains: int = 4,
        n_burn_in: int = 100,
        n_steps: int = 100,
        seed: int | None = None,
    ) -> Chains:
        """Burn in, adapting, then keep every step.

        Args:
            model: The model at S weight draws.
            batch: The rows; of a masked one the observed entries count.
            n_chains: C.
            n_burn_in: Steps that adapt and are not kept, at least 0.
            n_steps: M.
            seed: Of everything drawn; None takes one from the caller's generator.

        Returns:
            The chains.

        Raises:
            DataError: If a count is none.
            NonFiniteError: As `init`.
        """
        check_counts(n_burn_in=n_burn_in + 1, n_steps=n_steps)
        with torch.no_grad(), random.scope(seed, batch.x.device):
            state = self.init(model, batch, n_chains=n_chains)
            for _ in range(n_burn_in):
                state = self.step(state, model, batch, adapts=True)
            state = replace(state, log_step=state.log_average)
            path, acceptance, n_divergent = [], torch.zeros_like(state.acceptance), 0
            for _ in range(n_steps):
                state = self.step(state, model, batch)
                path.append(state.latents)
                acceptance = acceptance + state.acceptance / n_steps
                n_divergent = n_divergent + state.is_divergent.sum(0)
        assert isinstance(n_divergent, Tensor)
        return Chains(torch.stack(path, 1), acceptance, n_divergent, state.log_step.exp())

    def _adapted(self, state: HMCState) -> HMCState:
        """Dual averaging: section 3.2 of the paper, towards ten times the first size."""
        t = state.n_adapted + 1
        share = 1 / (t + _DELAY)
        shortfall = (1 - share) * state.shortfall + share * (self.target_acceptance - state.acceptance)
        log_first = torch.full_like(shortfall, 10 * self.step_size).log()
        log_step = log_first - t**0.5 / _SHRINKAGE * shortfall
        weight = t**-_DECAY
        log_average = weight * log_step + (1 - weight) * state.log_average
        return replace(state, log_step=log_step, log_average=log_average, shortfall=shortfall, n_adapted=t)


def leapfrog(
    slopes: Slopes, position: Tensor, momentum: Tensor, slope: Tensor, size: Tensor | float, n_steps: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Hamiltonian dynamics of a unit mass, a bijection with determinant 1.

    .. math:: \rho' = \rho + \tfrac{\epsilon}{2} \nabla \log \pi(u), \quad u' = u + \epsilon \rho', \quad
              \rho'' = \rho' + \tfrac{\epsilon}{2} \nabla \log \pi(u')

    Args:
        slopes: Of the log-density.
        position: u, (C, S, B, Z).
        momentum: rho, likewise.
        slope: Gradient at u.
        size: epsilon, (C, S, B, 1) or a number.
        n_steps: At least 1.

    Returns:
        New position, momentum, log-density there, and its gradient.

    Exact when: run back from where it ended with the momentum turned round, it ends where it began, to rounding.
    Cost: a gradient a step.
    """
    momentum = momentum + 0.5 * size * slope
    for _ in range(n_steps - 1):
        position = position + size * momentum
        momentum = momentum + size * slopes(position)[1]
    position = position + size * momentum
    value, slope = slopes(position)
    return position, momentum + 0.5 * size * slope, value, slope


def _slopes(model: CodeModel, batch: Batch, law: Law) -> Slopes:
    """Log p(x_observed, z) of the codes that a law makes of positions; the constant determinant is left out."""

    def total(position: Tensor) -> tuple[Tensor, Tensor]:
        latents = law.push(position)
        outputs = model.decode(latents, batch.context)
        value = score_outputs(model.likelihood, outputs, batch) + model.log_prior(latents)
        return value.sum(), value

    def slopes(position: Tensor) -> tuple[Tensor, Tensor]:
        with differentiating():
            slope, (_, value) = torch.func.grad_and_value(total, has_aux=True)(position)
        return value, slope

    return slopes
