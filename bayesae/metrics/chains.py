"""How far Markov chains have come: split R-hat and effective sample size."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bayesae.errors import ShapeError
from bayesae.functional import check_finite
from bayesae.metrics._checks import Numbers, tensor_of

__all__ = ["ess", "split_rhat"]


def split_rhat(values: Numbers) -> Tensor:
    r"""Potential scale reduction of each number, its chains cut in halves: 1 if all of them tell the same story.

    .. math:: \hat R = \sqrt{\tfrac{n - 1}{n} + \tfrac{B}{n W}}, \qquad
              B = n \operatorname{Var}_c \bar x_c, \quad W = \operatorname{mean}_c s_c^2

    over 2 C half-chains of n draws, with unbiased variances.

    Args:
        values: (C, M, \*shape), C chains of M draws each, M >= 4; a middle draw of an odd number is left out.

    Returns:
        (\*shape), float64; NaN where a number never moves, infinite where each chain stands still in another place.

    Exact when: chains of independent draws of one law: it goes to 1 as they grow, at a distance of order 1 / n.
    Biased when: all chains miss the same part of the posterior: it is then 1 as well. Start them wide apart.
    Cost: two passes over the values.

    Raises:
        ShapeError: If there are fewer than four draws, no chains, or no numbers.
        NonFiniteError: If a value is not finite.

    References:
        | Bayesian Data Analysis, third edition, 11.4 (Gelman et al., 2013)
    """
    halves = _halves(values)
    n = halves.shape[1]
    within, between = halves.var(1).mean(0), halves.mean(1).var(0)
    ratio = torch.sqrt((n - 1) / n + between / within)
    return torch.where(_moves(halves), ratio, torch.nan)


def ess(values: Numbers) -> Tensor:
    r"""Effective sample size of each number's mean, from the autocorrelation of half-chains.

    .. math:: \hat n = \frac{2 C n}{\tau}, \quad \tau = -1 + 2 \sum_{k=0}^{K} \hat P_k, \quad
              \hat P_k = \hat\rho_{2k} + \hat\rho_{2k+1}, \quad \hat\rho_t = 1 - \frac{W - \operatorname{mean}_c
              \hat\gamma_{c,t}}{\widehat{\operatorname{Var}}^+}

    Pairs :math:`\hat P_k` are summed up to the first that is not positive, each no larger than those before it: Geyer's
    initial monotone sequence. Var+ = (n - 1) / n W + B / n as in `split_rhat`, so that chains apart from one another
    count as few draws.

    Args:
        values: (C, M, \*shape), as of `split_rhat`.

    Returns:
        (\*shape), float64, at most 2 C n log10(2 C n) (where draws are negatively correlated); NaN where a number
        never moves.

    Exact when: never; its error is some tens of percent where M is under ten correlation times.
    Cost: a Fourier transform along the chains.

    Raises:
        ShapeError: If there are fewer than four draws, no chains, or no numbers.
        NonFiniteError: If a value is not finite.

    References:
        | Practical Markov Chain Monte Carlo (Geyer, 1992)
        | Bayesian Data Analysis, third edition, 11.5 (Gelman et al., 2013), with autocovariances in place of variograms
    """
    halves = _halves(values)
    n, total = halves.shape[1], halves.shape[0] * halves.shape[1]
    centred = halves - halves.mean(1, keepdim=True)
    spectrum = torch.fft.rfft(centred, n=2 * n, dim=1)
    covariance = torch.fft.irfft(spectrum.abs().square(), n=2 * n, dim=1)[:, :n].mean(0) / n
    within = covariance[0] * n / (n - 1)
    spread = covariance[0] + halves.mean(1).var(0)
    correlation = 1 - (within - covariance) / spread
    correlation[0] = 1
    pairs = correlation[: n - n % 2].unflatten(0, (-1, 2)).sum(1)
    pairs = pairs.cummin(0).values
    tau = -1 + 2 * torch.where(pairs > 0, pairs, 0.0).sum(0)
    return torch.where(_moves(halves), total / tau.clamp(min=1 / math.log10(total)), torch.nan)


def _halves(values: Numbers) -> Tensor:
    """(C, M, ...) to (2 C, M // 2, ...) in float64."""
    values = tensor_of(values).detach()
    if values.dim() < 2 or values.numel() == 0 or values.shape[1] < 4:
        fix = "Keep more draws; posterior.by_chain puts them in this shape."
        raise ShapeError("values (C, M, ...) with M >= 4 draws of each chain", f"{tuple(values.shape)}", fix)
    check_finite({"values": values}, "values of the draws", "Has a chain diverged?")
    n = values.shape[1] // 2
    return torch.cat([values[:, :n], values[:, -n:]]).double()


def _moves(halves: Tensor) -> Tensor:
    return (halves != halves[:1, :1]).flatten(0, 1).any(0)
