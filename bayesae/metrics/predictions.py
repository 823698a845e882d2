"""How good predictive distributions are: likelihood, calibration, sharpness."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from bayesae.functional import check_finite

__all__ = ["QuantileCalibration", "gaussian_crps", "gaussian_nll", "quantile_calibration", "sharpness"]


def gaussian_nll(mean: Tensor, var: Tensor, x: Tensor) -> Tensor:
    """Minus log N(x; mean, var), element-wise, in nats (units of x: a density)."""
    return 0.5 * ((x - mean) ** 2 / var + torch.log(2 * math.pi * var))


def gaussian_crps(mean: Tensor, var: Tensor, x: Tensor) -> Tensor:
    r"""Continuous ranked probability score of N(mean, var), element-wise, units of x, smaller is better.

    .. math:: \sigma \Big[ u (2\Phi(u) - 1) + 2\varphi(u) - \tfrac{1}{\sqrt\pi} \Big], \qquad u = (x - \mu)/\sigma

    Args:
        mean: Predictive means.
        var: Predictive variances.
        x: What came.

    Returns:
        Of their common shape.

    References:
        | Strictly Proper Scoring Rules, Prediction, and Estimation (Gneiting, Raftery, 2007)
    """
    scale = var.sqrt()
    u = (x - mean) / scale
    density = torch.exp(-0.5 * u**2) / math.sqrt(2 * math.pi)
    return scale * (u * (2 * torch.special.ndtr(u) - 1) + 2 * density - 1 / math.sqrt(math.pi))


class QuantileCalibration(NamedTuple):
    """Shares of the data below each predictive quantile.

    Args:
        levels: Nominal levels, (L,).
        observed: Share of values below the predictive quantile of that level, (L,).
        error: Mean absolute difference of the two.
    """

    levels: Tensor
    observed: Tensor
    error: float


def quantile_calibration(mean: Tensor, var: Tensor, x: Tensor, *, n_levels: int = 19) -> QuantileCalibration:
    r"""Calibration of Gaussian predictive quantiles, pooled over all entries.

    The probability integral transform :math:`u = \Phi((x - \mu)/\sigma)` is uniform if and only if the predictive
    is calibrated on average; its distribution function is what is returned.

    Args:
        mean: Predictive means.
        var: Predictive variances.
        x: What came.
        n_levels: Levels 1/(n+1) .. n/(n+1).

    Returns:
        Levels, observed shares and the mean absolute error: 0 is calibrated, 0.25 the most for a symmetric
        predictive that is much too wide or much too narrow.

    Exact when: x is drawn from the predictive: the error then goes to 0 as entries are added.
    Biased when: x has atoms (pixels that are exactly 0): one value then cannot be spread over levels.

    References:
        | Accurate Uncertainties for Deep Learning Using Calibrated Regression (Kuleshov, Fenner, Ermon, 2018)
    """
    transform = torch.special.ndtr((x - mean) / var.sqrt()).flatten()
    check_finite({"(x - mean) / sd": transform}, "standardised errors", "Is a variance 0, or a mean NaN?")
    levels = torch.arange(1, n_levels + 1, dtype=mean.dtype, device=mean.device) / (n_levels + 1)
    observed = torch.stack([(transform <= level).to(mean.dtype).mean() for level in levels])
    return QuantileCalibration(levels, observed, float((observed - levels).abs().mean()))


def sharpness(var: Tensor) -> float:
    """Root of the mean predictive variance, units of x; among calibrated predictives the smaller one is better."""
    return float(var.mean().sqrt())
