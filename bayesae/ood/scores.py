"""Scores as reductions of `Moments` to (B,); higher = stranger, always."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from bayesae.data import as_tensor
from bayesae.draws import Moments, fitted_rows
from bayesae.errors import UnsupportedError
from bayesae.ood.contributions import contributions, observed_only

__all__ = [
    "negative_log_density",
    "reconstruction_error",
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


def weight_variance(moments: Moments) -> Tensor:
    r"""Variance due to the weights, summed over outputs: :math:`\sum_o \operatorname{Var}_\theta \mathbb{E}[x_o]`.

    Args:
        moments: Moments of the predictive at x.

    Returns:
        (B,), units of x squared.

    Exact when: always, as a function of the moments.
    Biased when: read as a score of how unfamiliar x is: it knows nothing of how well x is explained, and it is
        *inverted* where unfamiliar data move fewer weights than familiar data do (dark images under a bright
        training set). Moments of one network (MAP, a single draw) have a weight variance of 0 for every row and cannot
        say that they are of one: 0 throughout means that no weights were uncertain, not that rows are familiar.
    """
    return _summed(moments.weights)


def reconstruction_error(moments: Moments, x: Tensor | np.ndarray, mask: Tensor | np.ndarray | None = None) -> Tensor:
    r"""Squared error of the predictive mean, :math:`\sum_o (x_o - \mathbb{E}[x_o])^2`: the baseline.

    Args:
        moments: Moments of the predictive at x.
        x: (B, \*data).
        mask: As for `negative_log_density`.

    Returns:
        (B,), units of x squared.

    Exact when: as minus a log-density (up to a constant and a factor), for Gaussian noise of one variance and weights
        that are known.

    Raises:
        ShapeError: If x or mask do not fit the moments.
        UnsupportedError: If x are classes without an order, which have no difference.
    """
    if moments.likelihood.is_nominal:
        raise UnsupportedError("numbers to subtract", "classes without an order", "Use negative_log_density.")
    square = (fitted_rows(as_tensor(x), moments.mean.shape, moments.mean) - moments.mean) ** 2
    return _summed(observed_only(square, mask))


def _summed(parts: Tensor) -> Tensor:
    r"""Sum (B, \*data) over the numbers of a row; (B,) has one number each."""
    return parts.reshape(len(parts), -1).sum(1)
