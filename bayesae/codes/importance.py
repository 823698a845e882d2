"""A code posterior improved by its own importance weights: sampling, then resampling."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bayesae import random
from bayesae.codes.base import CodeModel, CodePosterior, noise
from bayesae.data import check_counts
from bayesae.draws import Draws, logmeanexp_over_latents
from bayesae.types import Batch

__all__ = ["Importance"]


@dataclass(frozen=True)
class Importance:
    r"""Each code is chosen from n codes of another posterior, by their importance weights.

    .. math:: z_1, \dots, z_n \sim q, \quad w_i = \frac{p(x, z_i)}{q(z_i \mid x)}, \quad
              P(z = z_i) = \frac{w_i}{\sum_j w_j}, \quad \log q_n := \log p(x, z) - \log \tfrac1n \sum_i w_i

    So ``log_ratio`` of a code is the n-sample estimate of log p(x): `objectives.elbo` of the draws is the
    importance-weighted bound of n, `objectives.iwae` and ``log_evidence()`` of K draws are those of K n. ``log_q`` is a
    density given all n codes, not the marginal density of the chosen one, and so belongs to no law.

    Args:
        inner: q, a code posterior with a density.
        n: Codes of q for each one that is kept.

    Exact when: q is the true posterior, or n goes to infinity.
    Biased when: n is finite: the chosen code's law lies between q and the posterior, its error of order 1 / n.
        Gradients of ``log_ratio`` are those of the bound; the chosen code's own leave out that another one would have
        been chosen. Of an inner posterior with gradient "path" they are the biased path gradients of the bound.
    Cost: n times the inner posterior's passes and memory.

    Raises:
        DataError: If n is no whole number of at least 1.
        UnsupportedError: When called, if the inner posterior has no density.

    References:
        | Importance Weighted Autoencoders (Burda, Grosse, Salakhutdinov, 2016, https://arxiv.org/abs/1509.00519)
        | Reinterpreting Importance-Weighted Autoencoders (Cremer, Morris, Duvenaud, 2017,
          https://arxiv.org/abs/1704.02916)
    """

    inner: CodePosterior
    n: int = 10

    def __post_init__(self) -> None:
        check_counts(n=self.n)

    def __call__(self, model: CodeModel, batch: Batch, *, n_latent_draws: int = 1) -> Draws:
        """Draw K n codes for every row under every weight draw and keep K.

        Args:
            model: The model at S weight draws.
            batch: Rows to encode.
            n_latent_draws: K.

        Returns:
            `Draws` with the outputs of the codes that are kept.
        """
        draws = self.inner(model, batch, n_latent_draws=n_latent_draws * self.n)
        log_ratio = draws.log_ratio.unflatten(0, (n_latent_draws, self.n)).transpose(0, 1)
        # torch.multinomial is not keyed on the row
        level = torch.special.ndtr(self._noise(model, batch, n_latent_draws, draws.latents))
        share = log_ratio.detach().softmax(0).cumsum(0)
        chosen = (share < level).sum(0).clamp(max=self.n - 1)
        index = chosen + self.n * torch.arange(n_latent_draws, device=chosen.device)[:, None, None]

        def take(values: Tensor) -> Tensor:
            where = index.reshape(*index.shape, *[1] * (values.dim() - 3)).expand(*index.shape, *values.shape[3:])
            return values.gather(0, where)

        log_likelihood, log_prior = take(draws.log_likelihood), take(draws.log_prior)
        return replace(
            draws,
            latents=take(draws.latents),
            log_likelihood=log_likelihood,
            log_prior=log_prior,
            log_q=log_likelihood + log_prior - logmeanexp_over_latents(log_ratio),
            kl=None,
            outputs=None if draws.outputs is None else take(draws.outputs),
            is_path_gradient=False,
        )

    @property
    def _depth(self) -> int:
        return 1 + (self.inner._depth if isinstance(self.inner, Importance) else 0)

    def _noise(self, model: CodeModel, batch: Batch, n_latent_draws: int, latents: Tensor) -> Tensor:
        """(K, S or 1, B), independent of all that the inner posterior draws."""
        like = latents[0]
        if model.is_fitting:
            return noise(model, batch, n_latent_draws, 1, like)[..., 0]
        with random.scope(random.derived_seed(self._depth)):
            return noise(model, batch, n_latent_draws, 1, like)[..., 0]
