"""Information between rows and codes, by comparing every code with the laws of all rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from bayesae.codes import CodePosterior, Law, law_of
from bayesae.data import Data, check_counts
from bayesae.draws import Draws
from bayesae.errors import DataError
from bayesae.evaluation.evidence import as_predictive, network_at
from bayesae.models import Autoencoder, Bound
from bayesae.predictive import Predictive
from bayesae.random import row_normal
from bayesae.types import Batch, Params

__all__ = ["MutualInformation", "check_rows", "gathered", "information", "mutual_information"]

_NUMBERS = 2**22  # of laws that codes are compared with at once


@dataclass(frozen=True)
class MutualInformation:
    r"""Bounds of the information between x and z under q, in nats, for every weight draw, (S,) each.

    Args:
        lower: With the row itself among those that make up q(z). At most log N.
        upper: Without it; noisy and far off where N is small against exp(information).
        standard_error: Of ``lower``, over rows.
        n_rows: N.
    """

    lower: Tensor
    upper: Tensor
    standard_error: Tensor
    n_rows: int


def mutual_information(
    model: Predictive | Autoencoder,
    x: Data,
    mask: Tensor | None = None,
    *,
    codes: CodePosterior | None = None,
    n_latent_draws: int = 1,
    n_weight_draws: int | None = None,
    chunk_size: int | None = None,
    seed: int | None = None,
    progress: bool | None = None,
) -> MutualInformation:
    r"""Information between x and z under q(z | x) p(x), by the rows' own mixture.

    .. math:: I = \mathbb{E}\, \log \frac{q(z \mid x)}{q(z)}
              = \mathbb{E}_x \operatorname{KL}(q(z \mid x) \| p(z)) - \operatorname{KL}(q(z) \| p(z)), \quad
              q(z) \approx \tfrac1N \sum_i q(z \mid x_i)

    Args:
        model: A predictive, or an autoencoder at its own weights.
        x: Rows (N, \*data), two at least.
        mask: True where x is observed.
        codes: A code posterior with a Normal law, in place of the predictive's own.
        n_latent_draws: K codes of each row.
        n_weight_draws: S.
        chunk_size: Network rows in one call.
        seed: Of all draws.
        progress: Show a progress bar.

    Returns:
        `MutualInformation`: bounds of I that enclose it in expectation and meet as N grows.

    Biased when: N is finite: ``lower`` cannot pass log N, ``upper`` has no bound. They are near one another only where
        N is many times exp(I).
    Cost: an encoding of every row, and K N^2 densities of a code.

    Raises:
        UnsupportedError: If the code posterior has no Normal law, or the predictive is linearised.
        DataError: If there are fewer than two rows.

    References:
        | ELBO Surgery (Hoffman, Johnson, 2016)
        | On Variational Bounds of Mutual Information (Poole et al., 2019, https://arxiv.org/abs/1905.06922)
    """
    predictive = as_predictive(model, codes)
    check_counts(n_latent_draws=n_latent_draws)
    options = {"n_weight_draws": n_weight_draws, "chunk_size": chunk_size, "seed": seed, "progress": progress}
    law, latents, _ = gathered(predictive, lambda *_: (), n_latent_draws, x, mask, **options)
    return information(law, latents)


def gathered(
    predictive: Predictive,
    measure: Callable[[Bound, Batch, Law, Tensor, Tensor], tuple[Tensor, ...]],
    n_latent_draws: int,
    x: Data,
    mask: Tensor | None,
    **options: Any,  # noqa: ANN401 - handed on as they are
) -> tuple[Law, Tensor, tuple[Tensor, ...]]:
    """Laws of all rows under all weight draws, codes drawn from them, and what else is measured.

    Args:
        predictive: With a Normal code posterior.
        measure: Of model, rows, their laws, their codes (K, S', B', Z) and the noise of these.
        n_latent_draws: K.
        x: Rows.
        mask: True where x is observed.
        **options: Of `Predictive.over_chunks`.

    Returns:
        One law of batch shape (S, N), codes (S, N, K, Z), and what was measured.
    """
    kinds: list[Any] = []  # of the first rows: it gives what is no tensor

    def each(params: Params, batch: Batch, draw: Callable[[int], Draws]) -> tuple[Tensor, ...]:
        assert predictive.codes is not None and batch.index is not None
        bound = network_at(predictive, params)
        law = law_of(predictive.codes, bound, batch)
        noise = row_normal(batch.index, (n_latent_draws, 1), law.loc.shape[-1], law.loc)
        latents = law.push(noise)
        kinds.append(law)
        del kinds[1:]
        own = [value for _, value in _tensors(law)]
        return (latents.movedim(0, 2), *measure(bound, batch, law, latents, noise), *own)

    latents, *rest = predictive.over_chunks(each, x, mask, n_latent_draws=n_latent_draws, **options)
    names = [name for name, _ in _tensors(kinds[0])]
    more, own = rest[: -len(names)], rest[-len(names) :]
    return replace(kinds[0], **dict(zip(names, own, strict=True))), latents, tuple(more)


def information(law: Law, latents: Tensor) -> MutualInformation:
    """Bounds of the information between rows and codes.

    Args:
        law: Of batch shape (S, N).
        latents: Codes of each row, (S, N, K, Z).

    Returns:
        The bounds.

    Raises:
        DataError: If there are fewer than two rows.
    """
    _, n_rows, n_latent_draws, _ = latents.shape
    check_rows(n_rows)
    step = max(1, _NUMBERS // sum(value.numel() for _, value in _tensors(law)))
    rows, values = torch.arange(n_rows, device=latents.device), []
    for k in range(n_latent_draws):
        for index in rows.split(step):
            densities = law.log_prob(latents[:, index, k].transpose(0, 1)[:, :, None])
            own = densities[rows[: len(index)], :, index]
            is_own = (index[:, None] == rows)[:, None]
            others = densities.masked_fill(is_own, -torch.inf)
            lower = own - densities.logsumexp(-1) + math.log(n_rows)
            values.append(torch.stack([lower, own - others.logsumexp(-1) + math.log(n_rows - 1)]))
    lower, upper = torch.cat(values, 1).unflatten(1, (n_latent_draws, n_rows)).mean(1)
    return MutualInformation(lower.mean(0), upper.mean(0), lower.std(0) / n_rows**0.5, n_rows)


def check_rows(n_rows: int) -> None:
    """Raise unless rows can differ.

    Raises:
        DataError: If there are fewer than two.
    """
    if n_rows < 2:
        raise DataError("at least two rows to compare", f"{n_rows}", "Give a set of rows.")


def _tensors(law: Any) -> list[tuple[str, Tensor]]:  # noqa: ANN401 - a dataclass
    values = [(one.name, getattr(law, one.name)) for one in fields(law)]
    return [(name, value) for name, value in values if isinstance(value, Tensor)]
