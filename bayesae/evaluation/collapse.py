"""Posterior collapse: code dimensions that tell nothing of x, and how much the others tell."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesae.codes import CodePosterior, HasLaw, Law, encode
from bayesae.codes.base import score_outputs
from bayesae.data import Data, check_counts
from bayesae.draws import Draws
from bayesae.evaluation.evidence import as_predictive
from bayesae.evaluation.information import MutualInformation, check_rows, gathered, information
from bayesae.models import Autoencoder, Bound
from bayesae.predictive import Predictive
from bayesae.types import Batch, Params

__all__ = ["CollapseReport", "active_units", "collapse_report"]


@dataclass(frozen=True)
class CollapseReport:
    """What each code dimension does; ``str()`` of it is a table.

    Args:
        mean_variance: Variance over rows of the code's mean, (S, Z).
        kl: Mean over rows of KL(q(z_j | x) || p(z_j)) of each dimension's own law, nats, (S, Z).
        total_kl: Mean KL of the whole code, nats, (S,).
        information: Between x and z; ``total_kl`` less it is KL(q(z) || p(z)).
        log_likelihood: Of the rows at their own codes, nats, (S, N).
        swapped: At codes drawn from the prior, whatever the row, (S, N).
        threshold: A dimension with a lower ``mean_variance`` has collapsed.
    """

    mean_variance: Tensor
    kl: Tensor
    total_kl: Tensor
    information: MutualInformation
    log_likelihood: Tensor
    swapped: Tensor
    threshold: float

    @property
    def is_active(self) -> Tensor:
        """Which dimensions vary with x, (S, Z)."""
        return self.mean_variance > self.threshold

    @property
    def collapsed(self) -> list[int]:
        """Dimensions that are active under no weight draw."""
        return (~self.is_active.any(0)).nonzero()[:, 0].tolist()

    def __str__(self) -> str:
        rows = [f"{'dimension':>9}  {'Var E[z|x]':>10}  {'KL, nats':>8}"]
        gone = self.collapsed
        for j, (variance, kl) in enumerate(zip(self.mean_variance.mean(0), self.kl.mean(0), strict=True)):
            rows.append(f"{j:>9}  {float(variance):>10.2e}  {float(kl):>8.3f}" + ("  collapsed" if j in gone else ""))
        n, n_latents = float(self.is_active.double().sum(1).mean()), self.kl.shape[1]
        information, total = self.information, float(self.total_kl.mean())
        low, high = float(information.lower.mean()), float(information.upper.mean())
        own, swapped = float(self.log_likelihood.mean()), float(self.swapped.mean())
        named = f"; collapsed: {', '.join(map(str, gone))}" if gone else ""
        return "\n".join([
            *rows,
            f"{n:g} of {n_latents} dimensions active (Var E[z|x] > {self.threshold:g}){named}",
            f"mean KL {total:.3f} nats = information {low:.3f} (at most {high:.3f}; log N = "
            f"{math.log(information.n_rows):.3f}) + KL of the mixture to the prior {total - low:.3f}",
            f"log-likelihood {own:.3f} nats at the rows' own codes, {swapped:.3f} at codes from the prior",
        ])


def active_units(
    model: Predictive | Autoencoder,
    x: Data,
    mask: Tensor | None = None,
    *,
    codes: CodePosterior | None = None,
    threshold: float = 1e-2,
    n_latent_draws: int = 64,
    n_weight_draws: int | None = None,
    chunk_size: int | None = None,
    seed: int | None = None,
    progress: bool | None = None,
) -> Tensor:
    r"""Which code dimensions vary with x: :math:`\operatorname{Var}_x \mathbb{E}_{q(z \mid x)} z_j > \epsilon`.

    Args:
        model: A predictive, or an autoencoder at its own weights; a plain code will do.
        x: Rows (N, \*data), two at least.
        mask: True where x is observed.
        codes: q(z | x, theta), in place of the predictive's own.
        threshold: epsilon, units of z squared.
        n_latent_draws: Draws of a stochastic code without a Normal law, whose mean is not known.
        n_weight_draws: S.
        chunk_size: Network rows in one call.
        seed: Of all draws.
        progress: Show a progress bar.

    Returns:
        (S, Z), bool; ``active_units(...).sum(1)`` counts.

    Exact when: the code is deterministic, or Normal and the predictive not linearised; else from draws, and the share
        of their own variance is taken off.
    Biased when: few rows are given: the variance is theirs.
    Cost: one encoding of every row; K passes through the decoder too where the mean comes from draws.

    Raises:
        DataError: If there are fewer than two rows, or a count is none.

    References:
        | Importance Weighted Autoencoders (Burda, Grosse, Salakhutdinov, 2016, https://arxiv.org/abs/1509.00519)
    """
    predictive = as_predictive(model, codes, is_stochastic=False)
    check_counts(n_latent_draws=n_latent_draws)
    given = predictive.codes
    normal = given if isinstance(given, HasLaw) and not predictive.is_linearised else None
    n = 1 if normal is not None or given is None or given is encode else n_latent_draws

    def measure(params: Params, batch: Batch, draw: Callable[[int], Draws]) -> tuple[Tensor, ...]:
        if normal is not None:
            mean = normal.law(predictive.model.at(params), batch).loc
            return mean, torch.zeros_like(mean)
        latents = draw(n).latents
        return latents.mean(0), latents.var(0) / n if n > 1 else torch.zeros_like(latents[0])

    mean, noise = predictive.over_chunks(
        measure,
        x,
        mask,
        n_weight_draws=n_weight_draws,
        n_latent_draws=n,
        chunk_size=chunk_size,
        seed=seed,
        progress=progress,
    )
    return _variance(mean) - noise.mean(1) > threshold


def collapse_report(
    model: Predictive | Autoencoder,
    x: Data,
    mask: Tensor | None = None,
    *,
    codes: CodePosterior | None = None,
    threshold: float = 1e-2,
    n_latent_draws: int = 1,
    n_weight_draws: int | None = None,
    chunk_size: int | None = None,
    seed: int | None = None,
    progress: bool | None = None,
) -> CollapseReport:
    r"""Which code dimensions have collapsed onto the prior, and whether the decoder listens to the others.

    Args:
        model: A predictive, or an autoencoder at its own weights.
        x: Rows (N, \*data), two at least.
        mask: True where x is observed.
        codes: A code posterior with a Normal law, in place of the predictive's own.
        threshold: As of `active_units`.
        n_latent_draws: K codes of each row, its own and from the prior N(0, I), and of `mutual_information`.
        n_weight_draws: S.
        chunk_size: Network rows in one call.
        seed: Of all draws.
        progress: Show a progress bar.

    Returns:
        `CollapseReport`; print it. A decoder that does as well at codes from the prior does not listen.

    Exact when: active units and KL are in closed form; the rest as `mutual_information` and a mean of K draws.
    Cost: 2 K passes a row through the decoder, and K N^2 densities of a code.

    Raises:
        UnsupportedError: If the code posterior has no Normal law, or the predictive is linearised.
        DataError: If there are fewer than two rows.
    """
    predictive = as_predictive(model, codes)
    check_counts(n_latent_draws=n_latent_draws)
    options = {"n_weight_draws": n_weight_draws, "chunk_size": chunk_size, "seed": seed, "progress": progress}
    law, latents, more = gathered(predictive, _scores, n_latent_draws, x, mask, **options)
    variance, total, own, swapped = more
    kl = 0.5 * (law.loc**2 + variance - 1 - variance.log())
    found = information(law, latents)
    return CollapseReport(_variance(law.loc), kl.mean(1), total.mean(1), found, own, swapped, threshold)


def _scores(model: Bound, batch: Batch, law: Law, latents: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
    """Variances and KL of a law; log-likelihoods at its codes, and at noise as codes."""
    variance = law.covariance().diagonal(dim1=-2, dim2=-1)
    likelihoods = [
        score_outputs(model.likelihood, model.decode(codes, batch.context), batch).mean(0)
        for codes in (latents, noise.expand_as(latents))
    ]
    return variance, law.kl().sum(-1), *likelihoods


def _variance(mean: Tensor) -> Tensor:
    """Over rows, (S, N, Z) to (S, Z)."""
    check_rows(mean.shape[1])
    return mean.var(1)
