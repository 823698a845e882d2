"""How good probabilities of binary pixels are: the Brier score and the expected calibration error."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bayesae.data import check_counts
from bayesae.errors import DataError, ShapeError

__all__ = ["BinaryCalibration", "brier_score", "ece"]


def brier_score(mean: Tensor, x: Tensor) -> Tensor:
    r"""Squared error of a probability, :math:`(p - x)^2`, element-wise; smaller is better.

    Args:
        mean: Probability of a 1, in [0, 1].
        x: 0 or 1, of the same shape.

    Returns:
        Of that shape; its mean is the Brier score.

    Exact when: always, as a statistic. The score is proper: its expectation is least at the true probability.

    Raises:
        ShapeError: If shapes differ.
        DataError: If a probability is not in [0, 1], or x is not 0 or 1.

    References:
        | Verification of Forecasts Expressed in Terms of Probability (Brier, 1950)
    """
    _check(mean, x)
    return (mean - x) ** 2


class BinaryCalibration(NamedTuple):
    """Probabilities in bins, and how often a 1 came.

    Args:
        predicted: Mean probability of each bin with pixels, (E',).
        observed: Share of ones, (E',).
        n_pixels: In each bin, (E',).
        error: Mean absolute difference of the two, each bin by its pixels.
    """

    predicted: Tensor
    observed: Tensor
    n_pixels: Tensor
    error: float


def ece(mean: Tensor, x: Tensor, *, n_bins: int = 10) -> BinaryCalibration:
    r"""Expected calibration error of probabilities of binary pixels, pooled, in bins of equal width.

    .. math:: ECE = \sum_e \frac{n_e}{n} \Big| \bar p_e - \bar x_e \Big|

    Args:
        mean: Probability of a 1, in [0, 1].
        x: 0 or 1, of the same shape.
        n_bins: E; a probability on an edge is in the bin below, as in scikit-learn.

    Returns:
        `BinaryCalibration`, float64, of the bins that have pixels.

    Exact when: as a statistic, always; it goes to 0 as pixels are added if each is 1 with the probability given.
    Biased when: bins hold few pixels: the spread of a share comes on top.

    Raises:
        ShapeError: If shapes differ.
        DataError: If a probability is not in [0, 1], x is not 0 or 1, or ``n_bins`` is below 1.

    References:
        | Obtaining Well Calibrated Probabilities Using Bayesian Binning (Pakdaman Naeini, Cooper, Hauskrecht, 2015)
    """
    check_counts(n_bins=n_bins)
    _check(mean, x)
    p, x = mean.detach().double().flatten(), x.double().flatten()
    edges = torch.linspace(0, 1, n_bins + 1, dtype=p.dtype, device=p.device)[1:-1]
    place = torch.bucketize(p, edges)
    count, ones, sums = (torch.bincount(place, part, n_bins) for part in (torch.ones_like(p), x, p))
    full = count > 0
    count, predicted, observed = count[full], (sums[full] / count[full]), (ones[full] / count[full])
    return BinaryCalibration(predicted, observed, count, float((count * (predicted - observed).abs()).sum() / len(p)))


def _check(mean: Tensor, x: Tensor) -> None:
    if mean.shape != x.shape or x.numel() == 0:
        raise ShapeError("probabilities and pixels of one shape", f"{tuple(mean.shape)}, {tuple(x.shape)}", "Reshape.")
    if not bool(((mean >= 0) & (mean <= 1)).all()) or not bool(((x == 0) | (x == 1)).all()):
        raise DataError("probabilities in [0, 1] and pixels 0 or 1", "others", "Moments of a Bernoulli have them.")
