"""Missing entries drawn by a Markov chain between codes and completions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bayesae import random
from bayesae.codes import CodeModel, CodePosterior, Law, encode, law_of
from bayesae.codes.base import score_outputs
from bayesae.data import Data, as_rows, check_counts
from bayesae.errors import DataError, UnsupportedError
from bayesae.functional import check_finite, select_draws
from bayesae.predictive import Predictive
from bayesae.types import Batch

__all__ = ["Chain", "Completions", "impute_by_chain"]


@dataclass(frozen=True)
class Completions:
    r"""Rows with their missing entries drawn, several times over.

    Args:
        draws: Completed rows, (T, C, N, \*data), T steps that were kept of C chains; what was observed is as given.
        mask: True where x was observed, (N, \*data).
        acceptance: Share of proposed codes that each chain took for each row, (C, N); 1 throughout without Metropolis.
    """

    draws: Tensor
    mask: Tensor
    acceptance: Tensor

    @property
    def mean(self) -> Tensor:
        r"""Mean of the completions, (N, \*data)."""
        return self.draws.mean((0, 1))

    @property
    def variance(self) -> Tensor:
        r"""Variance of the completions, 0 where x was observed, (N, \*data)."""
        return self.draws.var((0, 1), correction=0)


@torch.no_grad()
def impute_by_chain(
    predictive: Predictive,
    x: Data,
    mask: Tensor | None = None,
    *,
    n_steps: int = 200,
    n_burn_in: int = 50,
    n_chains: int = 1,
    thinning: int = 1,
    metropolis: bool = True,
    seed: int | None = None,
) -> Completions:
    r"""Draw the missing entries by turns with the code.

    .. math:: z \sim q(z \mid x_o, x_m), \qquad x_m \sim p(x_m \mid z)

    With ``metropolis`` a code z' that q proposes takes the place of z with probability

    .. math:: \min\Big(1, \frac{p(x, z')\, q(z \mid x)}{p(x, z)\, q(z' \mid x)}\Big), \quad x = (x_o, x_m)

    which leaves :math:`p(z, x_m \mid x_o, \theta)` invariant whatever q is. Without it every proposal is taken, as in
    the plain chain, whose stationary law is that of q's errors too.

    Args:
        predictive: Model, weights and codes; every chain has a draw of the weights to itself, so that completions are
            spread over q(theta) as well (particles come as evenly as they can).
        x: Rows (N, \*data).
        mask: True where x is observed, (N, \*data); other entries may be NaN. None takes the mask of a `Batch`.
        n_steps: Steps after the burn-in.
        n_burn_in: Steps before the first that is kept. Chains start at 0 in the missing entries.
        n_chains: C.
        thinning: Keep every so many-th step.
        metropolis: Correct for q not being the posterior.
        seed: As of a `Predictive`'s call.

    Returns:
        The completions.

    Exact when: in the limit of many steps, with ``metropolis``; without it if q is the posterior.
    Biased when: chains are short; a plain chain with a q that is too narrow or too wide.
    Cost: n_chains passes through encoder and decoder a step; memory of all kept completions.

    Raises:
        DataError: If there is no mask, or a count is none.
        ShapeError: If rows or mask do not fit.
        NonFiniteError: If an observed entry or a completion is not finite.
        UnsupportedError: If the codes have no Normal, the weights are to be linearised, or rows have a target of
            their own.

    References:
        | Stochastic Backpropagation and Approximate Inference in Deep Generative Models (Rezende, Mohamed, Wierstra,
          2014, https://arxiv.org/abs/1401.4082)
        | Leveraging the Exact Likelihood of Deep Latent Variable Models (Mattei, Frellsen, 2018,
          https://arxiv.org/abs/1802.04826): ``metropolis``
    """
    check_counts(n_steps=n_steps, n_chains=n_chains, thinning=thinning, n_burn_in=n_burn_in + 1)
    if predictive.is_linearised:
        fix = "Use Predictive(..., linearised=False): the chain runs networks."
        raise UnsupportedError("weights at which networks are run", "a linearised predictive", fix)
    rows = as_rows(x, predictive.model.reference, mask)
    if rows.mask is None:
        raise DataError("a mask that says what is missing", "none", "Give mask=, True where x is observed.")
    if rows.target is not None:
        raise UnsupportedError("rows that explain themselves", "a target of their own", "Leave it out of the Batch.")
    predictive.model.likelihood.check(rows.x)
    codes = encode if predictive.codes is None else predictive.codes
    kept, accepted = [], []
    with random.scope(seed, rows.x.device):
        # of a mixture every component has its own noise
        shares = [(own.model, own.weights.sample(n), n) for own, n in predictive._shares(n_chains)]
        singles = [(own, select_draws(params, slice(s, s + 1))) for own, params, n in shares for s in range(n)]
        for own, params in singles:
            model = own.at(params)
            state, path = Chain(model, codes, rows, metropolis), []
            for step in range(n_burn_in + n_steps):
                state.step()
                if step >= n_burn_in and (step - n_burn_in) % thinning == 0:
                    path.append(state.rows.x)
            kept.append(torch.stack(path))
            accepted.append(state.n_accepted / (n_burn_in + n_steps))
    draws = torch.stack(kept, 1)
    check_finite({"completions": draws}, "completions", "Is the noise of the likelihood fitted?")
    return Completions(draws, rows.mask, torch.stack(accepted))


class Chain:
    """One chain for every row, under one draw of the weights.

    Args:
        model: At S = 1.
        codes: Has a Normal.
        rows: With a mask.
        metropolis: Whether proposals may be refused.
    """

    def __init__(self, model: CodeModel, codes: CodePosterior, rows: Batch, metropolis: bool) -> None:
        assert rows.mask is not None
        self.model, self.codes, self.metropolis, self.observed = model, codes, metropolis, rows.mask
        self.rows = rows._replace(mask=None)  # a completion has nothing missing
        self.n_accepted = torch.zeros(len(rows.x), device=rows.x.device)
        self.latents, self.outputs = self._propose(law_of(codes, model, self.rows))
        self._complete()

    def step(self) -> None:
        """A code for the present completion, and the completion that it makes."""
        law = law_of(self.codes, self.model, self.rows)
        latents, outputs = self._propose(law)
        if self.metropolis:
            log_ratio = self._log_weight(law, latents, outputs) - self._log_weight(law, self.latents, self.outputs)
            taken = torch.rand_like(log_ratio).log() < log_ratio
        else:
            taken = torch.ones_like(latents[..., 0], dtype=torch.bool)
        self.latents = torch.where(taken[..., None], latents, self.latents)
        self.outputs = torch.where(taken.reshape(*taken.shape, *[1] * (outputs.dim() - 3)), outputs, self.outputs)
        self.n_accepted = self.n_accepted + taken[0, 0]
        self._complete()

    def _propose(self, law: Law) -> tuple[Tensor, Tensor]:
        latents = law.push(torch.randn_like(law.loc)[None])
        return latents, self.model.decode(latents, self.rows.context)

    def _log_weight(self, law: Law, latents: Tensor, outputs: Tensor) -> Tensor:
        """Log p(x, z) - log q(z | x) at the present completion, (1, 1, N)."""
        log_likelihood = score_outputs(self.model.likelihood, outputs, self.rows)
        return log_likelihood + self.model.log_prior(latents) - law.log_prob(latents)

    def _complete(self) -> None:
        drawn = self.model.likelihood.distribution(self.outputs[0, 0]).sample().reshape(self.rows.x.shape)
        self.rows = self.rows._replace(x=torch.where(self.observed, self.rows.x, drawn.to(self.rows.x)))
