"""From the laws that a method found to `Imputations`: draws, moments in three parts, figures of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import torch
from torch import Tensor
from torch.nn import functional as F

from bayesae.draws import Moments, concatenate_rows
from bayesae.imputation.base import Found, joined, shares
from bayesae.imputation.record import Imputations
from bayesae.types import Batch, Likelihood

__all__ = ["assembled", "concatenated", "merged", "split_variance"]

# of a row that was drawn from the prior, beside chains of others
_AT_REST = {"rhat": 1.0, "acceptance": 1.0, "n_divergent": 0.0, "residual": 0.0}


def merged(found: Found | None, prior: Found | None, observed: Tensor) -> Found:
    """What was found for rows with observed entries, and what the prior gives for the others, in the rows' order.

    Args:
        found: Of the rows where ``observed`` is True; None if there are none.
        prior: Of the others; None if there are none.
        observed: (B,).

    Returns:
        Of all rows.
    """
    if found is None or prior is None:
        only = prior if found is None else found
        assert only is not None
        return only
    order = torch.argsort((~observed).long(), stable=True).argsort()
    named: dict[str, Tensor | None] = {}
    for one in fields(Found):
        mine, others = getattr(found, one.name), getattr(prior, one.name)
        if mine is not None and others is None:
            others = torch.full_like(prior.ess, _AT_REST[one.name]).to(mine)
        axis = 2 if one.name == "outputs" else 1
        named[one.name] = None if mine is None else torch.cat([mine, others], axis).index_select(axis, order)
    return Found(**named)  # pyright: ignore[reportArgumentType]


def assembled(
    pieces: Sequence[tuple[Likelihood, Found]], rows: Batch, has_noise: bool, n_atoms: int | None, n_draws: int
) -> Imputations:
    """Draws, moments and figures of some rows.

    Args:
        pieces: What was found under consecutive weight draws, each with its likelihood, whose noise may differ.
        rows: The rows, with a mask.
        has_noise: Whether missing entries are drawn, or set to their means.
        n_atoms: Number of particles that the weights have, or None.
        n_draws: M, at most S K: how many draws are kept. Moments and figures are of all S K codes.

    Returns:
        The record.
    """
    x, mask = rows.x, rows.mask
    assert mask is not None
    likelihood, draws, means, variances = pieces[0][0], [], [], []
    for own, found in pieces:
        lead = found.outputs.shape[:2]
        mean = own.mean(found.outputs)
        shape = (*lead, *x.shape, *(mean.shape[-1:] if own.is_nominal else ()))
        means.append(mean.reshape(shape))
        variances.append(own.variance(found.outputs).reshape(shape))
        if has_noise:
            draws.append(own.distribution(found.outputs).sample().reshape(*lead, *x.shape).to(x))
        else:
            draws.append(means[-1].to(x))
    found = joined([one for _, one in pieces])
    n_codes, n_weights = found.outputs.shape[:2]
    drawn = torch.where(mask, x, torch.cat(draws, 1)).transpose(0, 1)
    if n_draws < n_codes * n_weights:
        drawn = torch.cat([some[:n] for some, n in zip(drawn, shares(n_draws, n_weights), strict=True)])
    else:
        drawn = drawn.flatten(0, 1)
    mean, code, weights = split_variance(torch.cat(means, 1))
    noise = torch.cat(variances, 1).mean((0, 1)) * float(has_noise)
    ess = found.ess.sum(0).to(x)
    known, where = x.to(mean), mask
    if likelihood.is_nominal:
        known, where = F.one_hot(x.long(), mean.shape[-1]).to(mean), mask[..., None]
    noise, code, weights = (torch.where(where, 0.0, part) for part in (noise, code, weights))
    of_weights = weights / (n_weights - 1) if n_weights > 1 else torch.where(where, 0.0, torch.inf)
    if n_atoms is not None and n_weights % n_atoms == 0:
        of_weights = torch.zeros_like(weights)
    error = (code / ess.reshape(-1, *[1] * (code.dim() - 1)) + of_weights).sqrt()
    moments = Moments(torch.where(where, known, mean), noise, code, weights, likelihood, error)
    figures = {
        "rhat": None if found.rhat is None else found.rhat.amax(0),
        "acceptance": None if found.acceptance is None else found.acceptance.mean(0),
        "n_divergent": None if found.n_divergent is None else found.n_divergent.sum(0),
        "residual": None if found.residual is None else found.residual.amax(0),
    }
    return Imputations(drawn, mask, moments, n_weights, ess, **figures)


def split_variance(means: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""The law of total variance over codes nested in weight draws, of the means of p(x | z, theta).

    .. math:: V_K = \tfrac1S \sum_s \operatorname{Var}_k m_{sk}, \quad V_S = \operatorname{Var}_s \bar m_s, \qquad
              weights = \max\big(V_S - \tfrac{S - 1}{S} \tfrac{V_K}{K - 1}, 0\big), \quad code = V_K + V_S - weights

    with divisors K and S. The mean of K codes varies by a share of the code's variance, which is taken off; the sum is
    the variance of all K S means whatever is.

    Args:
        means: (K, S, \*shape).

    Returns:
        Mean, variance due to codes and variance due to weights, (\*shape) each.

    Exact when: in expectation, for codes that are drawn independently and before the maximum: the weights' part is
        theirs times (S - 1) / S, whatever the codes' part is.
    Biased when: codes of one weight draw are correlated, as those of short chains: towards the weights. With K = 1 all
        of it goes to the weights.
    """
    n_codes, n_weights = means.shape[:2]
    within = means.var(0, correction=0).mean(0)
    between = means.mean(0).var(0, correction=0)
    shared = 0.0 if n_codes == 1 else (n_weights - 1) / n_weights / (n_codes - 1)
    weights = (between - shared * within).clamp(min=0)
    return means.mean((0, 1)), within + between - weights, weights


def concatenated(parts: Sequence[Imputations]) -> Imputations:
    """Join `Imputations` of consecutive rows.

    Args:
        parts: Of the same method and number of draws.

    Returns:
        One record; what a part without observed entries has no figure of, is at rest there.
    """
    figures: dict[str, Tensor | None] = {}
    for name, at_rest in _AT_REST.items():
        values = [getattr(part, name) for part in parts]
        known = next((value for value in values if value is not None), None)
        filled = [
            torch.full_like(part.ess, at_rest) if value is None else value
            for part, value in zip(parts, values, strict=True)
        ]
        figures[name] = None if known is None else torch.cat([value.to(known) for value in filled])
    return Imputations(
        torch.cat([part.draws for part in parts], 1),
        torch.cat([part.mask for part in parts]),
        concatenate_rows([part.moments for part in parts]),
        parts[0].n_weight_draws,
        torch.cat([part.ess for part in parts]),
        **figures,
    )
