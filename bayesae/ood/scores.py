"""Scores as reductions of `Draws` or `Moments` to (B,); higher = stranger, always."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from bayesae.draws import Draws, Moments, fitted_rows, logmeanexp_over_weights, mean_over_weights
from bayesae.errors import UnsupportedError
from bayesae.ood.contributions import contributions

__all__ = [
    "disagreement",
    "negative_log_density",
    "negative_log_predictive",
    "reconstruction_error",
    "waic",
    "weight_variance",
]


def negative_log_density(moments: Moments, x: Tensor | np.ndarray, mask: Tensor | np.ndarray | None = None) -> Tensor:
    r"""Minus the log predictive density with the full variance of every pixel.

    .. math:: -\sum_o \log p(x_o \mid \mathbb{E}[x_o], \operatorname{Var}[x_o]), \qquad
              \operatorname{Var} = noise + code + weights

    Both ways of being strange count: an error that the variance does not explain, and (through the
    log-determinant) a variance that familiar data do not have. Neither part alone does: the summed variance of
    a dark image is small because dark pixels move few weights, however badly it is reconstructed.
    `contributions` are its parts, pixel by pixel.

    Args:
        moments: Moments of the predictive at x.
        x: (B, \*data).
        mask: True where x was observed, (B, \*data); other entries, which may be NaN, count 0.

    Returns:
        (B,), in nats.

    Exact when: pixels are independent given x's moments, and Gaussian (or binary).
    Biased when: errors are correlated across pixels: their evidence is counted once per pixel.
    """
    return _summed(contributions(moments, x, mask))


def negative_log_predictive(draws: Draws) -> Tensor:
    r"""Minus the log of the posterior's mean density, :math:`-\log \frac1S \sum_s p(x \mid \theta_s)`.

    Args:
        draws: Draws of the predictive at x.

    Returns:
        (B,), in nats.

    Exact when: the draws are the whole posterior (an ensemble, one particle).
    Biased when: S is finite: by Jensen's inequality it is too large in expectation, the more so the more the
        log-densities vary; with hundreds of outputs one draw dominates.

    References:
        | Bayesian Variational Autoencoders for Unsupervised Out-of-Distribution Detection
          (Daxberger, Hernandez-Lobato, 2019)
    """
    return -logmeanexp_over_weights(draws.log_density())


def waic(draws: Draws) -> Tensor:
    r"""Minus the Watanabe-Akaike information criterion of a row.

    .. math:: -\big(\operatorname{mean}_s \ell_s - \operatorname{var}_s \ell_s\big), \qquad
              \ell_s = \log p(x \mid \theta_s)

    The variance over draws has divisor S, so that one particle gives minus its log-likelihood.

    Args:
        draws: Draws of the predictive at x.

    Returns:
        (B,), in nats (the variance in nats squared, as published).

    Exact when: all draws are equal: it is minus their log-likelihood.

    References:
        | WAIC, but Why? Generative Ensembles for Robust Anomaly Detection (Choi, Jang, Alemi, 2018)
    """
    values = draws.log_density()
    return -mean_over_weights(values) + ((values - mean_over_weights(values)) ** 2).mean(0)


def disagreement(draws: Draws) -> Tensor:
    r"""How much the row would narrow the weight posterior: log S minus the log effective sample size.

    .. math:: \log S - \log \frac{1}{\sum_s w_s^2}, \qquad w_s = \frac{p(x \mid \theta_s)}{\sum_t p(x \mid \theta_t)}

    Args:
        draws: Draws of the predictive at x, S > 1.

    Returns:
        (B,), from 0 (draws agree) to log S (one draw explains the row). With hundreds of outputs most rows sit
        at log S: report how many before believing a ranking.

    Raises:
        UnsupportedError: If there is one draw only.

    Exact when: always, as a function of the draws.

    References:
        | Bayesian Variational Autoencoders for Unsupervised Out-of-Distribution Detection
          (Daxberger, Hernandez-Lobato, 2019)
    """
    values = draws.log_density()
    if len(values) < 2:
        raise UnsupportedError("at least two weight draws", "one", "One network cannot disagree with itself.")
    log_ess = 2 * values.logsumexp(0) - (2 * values).logsumexp(0)
    return math.log(len(values)) - log_ess


def weight_variance(moments: Moments) -> Tensor:
    r"""Variance due to the weights, summed over outputs: :math:`\sum_o \operatorname{Var}_\theta \mathbb{E}[x_o]`.

    Args:
        moments: Moments of the predictive at x.

    Returns:
        (B,), units of x squared.

    Exact when: always, as a function of the moments.
    Biased when: read as a score of how unfamiliar x is: it knows nothing of how well x is explained, and it is
        *inverted* where unfamiliar data move fewer weights than familiar data do (dark images under a bright
        training set).
    """
    return _summed(moments.weights)


def reconstruction_error(moments: Moments, x: Tensor | np.ndarray) -> Tensor:
    r"""Squared error of the predictive mean, :math:`\sum_o (x_o - \mathbb{E}[x_o])^2`: the baseline.

    Args:
        moments: Moments of the predictive at x.
        x: (B, \*data).

    Returns:
        (B,), units of x squared.

    Exact when: as minus a log-density (up to a constant and a factor), for Gaussian noise of one variance and weights
        that are known.

    Raises:
        ShapeError: If x is not the rows of the moments.
        UnsupportedError: If x are classes without an order, which have no difference.
    """
    if moments.likelihood.is_nominal:
        raise UnsupportedError("numbers to subtract", "classes without an order", "Use negative_log_density.")
    return _summed((fitted_rows(x, moments.mean.shape, moments.mean) - moments.mean) ** 2)


def _summed(parts: Tensor) -> Tensor:
    r"""Sum (B, \*data) over the numbers of a row; (B,) has one number each."""
    return parts.reshape(len(parts), -1).sum(1)
