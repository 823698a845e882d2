"""How good Normal predictives are: likelihood, ranked probability, sharpness."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["gaussian_crps", "gaussian_nll", "sharpness"]


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


def sharpness(var: Tensor) -> float:
    """Root of the mean predictive variance, units of x; among calibrated predictives the smaller one is better."""
    return float(var.mean().sqrt())
