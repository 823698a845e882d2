"""How good Normal predictives are: likelihood, ranked probability, sharpness."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bayesae.errors import DataError
from bayesae.functional import check_finite
from bayesae.metrics._checks import Numbers, law_of, tensor_of

__all__ = ["gaussian_crps", "gaussian_nll", "sharpness"]


def gaussian_nll(mean: Numbers, var: Numbers | float, x: Numbers) -> Tensor:
    """Minus log N(x; mean, var), element-wise, in nats (units of x: a density).

    Args:
        mean: Predictive means, units of x.
        var: Predictive variances, units of x squared, of the same shape or ().
        x: What came, of the same shape.

    Returns:
        Of that shape; gradients flow. Infinite or NaN where a variance is not positive; `CalibrationSums` refuses them.

    Exact when: always, as a statistic. The score is proper.

    Raises:
        ShapeError: If shapes differ.
    """
    mean, var, x = law_of(mean, var, x)
    return 0.5 * ((x - mean) ** 2 / var + torch.log(2 * math.pi * var))


def gaussian_crps(mean: Numbers, var: Numbers | float, x: Numbers) -> Tensor:
    r"""Continuous ranked probability score of N(mean, var), element-wise, units of x, smaller is better.

    .. math:: \sigma \Big[ u (2\Phi(u) - 1) + 2\varphi(u) - \tfrac{1}{\sqrt\pi} \Big], \qquad u = (x - \mu)/\sigma

    Args:
        mean: Predictive means, units of x.
        var: Predictive variances, units of x squared, of the same shape or ().
        x: What came, of the same shape.

    Returns:
        Of that shape; gradients flow. NaN where a variance is not positive.

    Exact when: always, as a statistic. The score is proper.

    Raises:
        ShapeError: If shapes differ.

    References:
        | Strictly Proper Scoring Rules, Prediction, and Estimation (Gneiting, Raftery, 2007)
    """
    mean, var, x = law_of(mean, var, x)
    scale = var.sqrt()
    u = (x - mean) / scale
    density = torch.exp(-0.5 * u**2) / math.sqrt(2 * math.pi)
    return scale * (u * (2 * torch.special.ndtr(u) - 1) + 2 * density - 1 / math.sqrt(math.pi))


def sharpness(var: Numbers) -> float:
    """Root of the mean predictive variance, units of x; among calibrated predictives the smaller one is better.

    Args:
        var: Predictive variances, units of x squared, of any shape.

    Returns:
        One number.

    Exact when: always, as a statistic.

    Raises:
        DataError: If there are no variances.
        NonFiniteError: If one is negative or not finite.
    """
    deviations = tensor_of(var).detach().double().sqrt()
    if deviations.numel() == 0:
        raise DataError("at least one variance", "none", "Give rows.")
    check_finite({"deviations": deviations}, "roots of variances", "Is a variance NaN or below 0?")
    return math.sqrt(float((deviations**2).mean()))
