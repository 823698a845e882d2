"""`annealed_importance`: log p(x) by annealing from a Normal to the code's own posterior."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesae import random
from bayesae.codes import CodePosterior, DiagonalLaw, Law, law_of
from bayesae.codes.hmc import leapfrog
from bayesae.codes.laws import without_gradient
from bayesae.data import Data, check_counts
from bayesae.draws import Draws
from bayesae.evaluation.evidence import as_predictive, check_one_noise, network_at
from bayesae.evaluation.ratios import log_ratio
from bayesae.evaluation.sums import Annealed, LogEvidence, LogWeights, warn_of_low_ess
from bayesae.models import Autoencoder, Bound
from bayesae.predictive import Predictive
from bayesae.random import row_normal
from bayesae.types import Batch, Params

__all__ = ["Annealing", "annealed_importance"]

_TARGET, _RATE, _FIRST_STEP = 0.65, 0.3, 0.5  # of the acceptance; of the adaptation; step size
_SHARPNESS = 4.0  # of the sigmoid that the temperatures follow
_JITTER = 0.1  # of the log step size: a trajectory of a whole period goes nowhere


def annealed_importance(
    model: Predictive | Autoencoder,
    x: Data,
    mask: Tensor | None = None,
    *,
    start: CodePosterior | None = None,
    n_steps: int = 500,
    n_leapfrog: int = 10,
    n_chains: int = 16,
    n_weight_draws: int | None = None,
    chunk_size: int | None = None,
    seed: int | None = None,
    progress: bool | None = None,
) -> LogEvidence:
    r"""Log p(x | theta) by annealed importance sampling with Hamiltonian transitions.

    .. math:: f_t(z) = p_0(z)^{1 - \beta_t}\, p(x, z)^{\beta_t}, \quad 0 = \beta_0 < \dots < \beta_T = 1, \quad
              \log w = \sum_{t=1}^{T} (\beta_t - \beta_{t-1}) \log \frac{p(x, z_{t-1})}{p_0(z_{t-1})}

    with :math:`z_0 \sim p_0`, :math:`z_t` a Metropolis-adjusted Hamiltonian move from :math:`z_{t-1}` that leaves
    :math:`f_t` as it is, and :math:`\beta_t` along a sigmoid. Then E[w] = p(x). Chains move in the noise of
    :math:`p_0 = \mathcal{N}(m, R R^\top)`, :math:`z = m + R \varepsilon`. Step sizes of every row and temperature come
    from a preliminary run that aims at an acceptance of 0.65 and whose chains are thrown away: they do not depend on
    the chains that count.

    Args:
        model: A predictive, or an autoencoder at its own weights; its code posterior is not read.
        x: Rows (N, \*data).
        mask: True where x is observed; other entries are not scored.
        start: p_0: a Normal code posterior, such as ``codes.amortised`` or ``codes.Laplace()``; None: N(0, I).
        n_steps: T; 1 is plain importance sampling from p_0.
        n_leapfrog: Steps of each move.
        n_chains: K, weights of a row.
        n_weight_draws: S; None takes all particles once, or 32 draws of a continuous posterior.
        chunk_size: Network rows in one call, 4096 if None; changes memory, and numbers by rounding only.
        seed: The same seed gives the same estimates; None advances the caller's generator.
        progress: Show a progress bar; None shows it on a terminal only.

    Returns:
        `LogEvidence`, (S, N), whose ``elbo`` is the mean log weight. It warns as `log_evidence` does.

    Exact when: p_0 is the true posterior; in the limit of many steps.
    Biased when: K or T are finite: ``log_evidence`` is low in expectation. Chains that do not pass between modes leave
        weights that agree with one another and are all too low.
    Cost: 2 S K T n_leapfrog passes forward and backward through the decoder a row.

    Raises:
        UnsupportedError: If ``start`` has no Normal law, the predictive is linearised, or components of a mixture have
            noise of their own.
        DataError: If a count is none, or the rows do not fit the likelihood.
        NonFiniteError: If a weight is not finite.

    References:
        | Annealed Importance Sampling (Neal, 2001, https://arxiv.org/abs/physics/9803008)
        | On the Quantitative Analysis of Decoder-Based Generative Models (Wu, Burda, Salakhutdinov, Grosse, 2017,
          https://arxiv.org/abs/1611.04273)
        | Departures: the noise of p_0 as coordinates; one step size a row and temperature.
    """
    check_counts(n_chains=n_chains)
    annealing = Annealing(n_steps, n_leapfrog)
    predictive = as_predictive(model, None, is_stochastic=False)
    check_one_noise(predictive)

    def measure(params: Params, batch: Batch, draw: Callable[[int], Draws]) -> tuple[Tensor, ...]:
        bound = network_at(predictive, params)
        law = _standard_law(bound, batch) if start is None else law_of(start, bound, batch)
        weights, annealed = annealing(bound, batch, law, n_chains)
        return (*weights.results(), annealed.acceptance, annealed.step_size)

    *fields, acceptance, step_size = predictive.over_chunks(
        measure,
        x,
        mask,
        n_weight_draws=n_weight_draws,
        n_latent_draws=n_chains,
        chunk_size=chunk_size,
        seed=seed,
        progress=progress,
    )
    warn_of_low_ess(fields[1], n_chains, "Take more n_steps, or another start.")
    return LogEvidence(*fields, n_draws=n_chains, annealed=Annealed(acceptance, step_size))  # pyright: ignore[reportArgumentType]


def _standard_law(model: Bound, batch: Batch) -> Law:
    zeros = torch.zeros_like(model.encode(batch.x, batch.context))
    return DiagonalLaw(zeros, zeros)


@dataclass(frozen=True)
class Annealing:
    """Chains from a Normal to the code's posterior; see `annealed_importance`."""

    n_steps: int
    n_leapfrog: int

    def __post_init__(self) -> None:
        check_counts(n_steps=self.n_steps, n_leapfrog=self.n_leapfrog)

    def __call__(self, model: Bound, batch: Batch, law: Law, n_chains: int) -> tuple[LogWeights, Annealed]:
        """Run chains for every row.

        Args:
            model: The model at S weight draws.
            batch: The rows.
            law: Where chains start, of batch shape (S, B).
            n_chains: K.

        Returns:
            Their log weights, and how it went.
        """
        law = without_gradient(law)  # pyright: ignore[reportArgumentType]
        slopes = _Slopes(model, batch, law)
        _, steps, _ = self._run(slopes, n_chains, None)
        log_weights, steps, acceptance = self._run(slopes, n_chains, steps)
        weights = LogWeights()
        weights.add(log_weights)
        if not steps:
            unknown = torch.full_like(log_weights[0], torch.nan)
            return weights, Annealed(unknown, unknown)
        return weights, Annealed(torch.stack(acceptance).mean(0), torch.stack(steps).log().mean(0).exp())

    def _run(
        self, slopes: _Slopes, n_chains: int, steps: list[Tensor] | None
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Log weights (K, S, B), step sizes and mean acceptances (S, B) of every move; adapts where none are given."""
        at_start = slopes.law.loc
        size, is_final = at_start.shape[-1], steps is not None
        step, used, acceptances = torch.full_like(at_start[..., 0], _FIRST_STEP), [], []
        betas = torch.linspace(-1, 1, self.n_steps + 1, dtype=torch.float64).mul(_SHARPNESS).sigmoid()
        betas = ((betas - betas[0]) / (betas[-1] - betas[0])).tolist()
        noise = self._noise(slopes.batch, n_chains, size, at_start, number=int(is_final))
        state = slopes(noise.expand(n_chains, *at_start.shape))
        log_weights = betas[1] * state[1]
        for t in range(1, self.n_steps):
            step = step if steps is None else steps[t - 1]
            noise = self._noise(slopes.batch, n_chains, size + 2, at_start, number=2 * t + int(is_final))
            state, accepted = self._move(slopes, state, betas[t], step, noise)
            log_weights = log_weights + (betas[t + 1] - betas[t]) * state[1]
            used.append(step)
            acceptances.append(accepted.mean(0))
            if steps is None:
                step = step * torch.exp(_RATE * (acceptances[-1] - _TARGET))
        return log_weights, used, acceptances

    def _noise(self, batch: Batch, n_chains: int, size: int, like: Tensor, number: int) -> Tensor:
        """(K, 1, B, size), another one for every number."""
        assert batch.index is not None
        with random.scope(random.derived_seed(number)):
            return row_normal(batch.index, (n_chains, 1), size, like)

    def _move(self, slopes: _Slopes, state: State, beta: float, step: Tensor, noise: Tensor) -> tuple[State, Tensor]:
        """One Hamiltonian trajectory and its acceptance probability, (K, S, B)."""
        at, value, slope = state
        first, jitter, level = noise[..., :-2], noise[..., -2:-1], torch.special.ndtr(noise[..., -1])
        step = step[..., None] * torch.exp(_JITTER * jitter)
        last = state

        def annealed(position: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal last
            last = slopes(position)
            return beta * last[1] - 0.5 * (position**2).sum(-1), beta * last[2] - position

        _, momentum, *_ = leapfrog(annealed, at, first, beta * slope - at, step, self.n_leapfrog)
        moved, moved_value, moved_slope = last
        kinetic, potential = (momentum**2 - first**2).sum(-1), (moved**2 - at**2).sum(-1)
        log_ratio = beta * (moved_value - value) - 0.5 * (kinetic + potential)
        accepted = log_ratio.clamp(max=0).exp().nan_to_num(0.0)  # a trajectory that left the finite numbers is refused
        is_taken = level < accepted
        chosen = (
            torch.where(is_taken[..., None], moved, at),
            torch.where(is_taken, moved_value, value),
            torch.where(is_taken[..., None], moved_slope, slope),
        )
        return chosen, accepted


State = tuple[Tensor, Tensor, Tensor]
"""Noise of codes (K, S, B, Z), the log-ratio there (K, S, B), and its gradient (K, S, B, Z)."""


@dataclass(frozen=True)
class _Slopes:
    """The log-ratio and its gradient in the noise: constants drop out, so that its base measure is N(0, I)."""

    model: Bound
    batch: Batch
    law: Law

    def __call__(self, noise: Tensor) -> State:
        with torch.enable_grad():
            at = noise.detach().requires_grad_()
            value = log_ratio(self.model, self.batch, self.law, at)
            (slope,) = torch.autograd.grad(value.sum(), at)
        return at.detach(), value.detach(), slope
