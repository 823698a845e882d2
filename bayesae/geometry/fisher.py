"""Fisher information of likelihoods in their natural parameters, as products with tangents."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bayesae.errors import ShapeError

__all__ = ["Fisher", "bernoulli_fisher", "categorical_fisher", "gaussian_fisher"]

Fisher = Callable[[Tensor, Tensor], Tensor]
r"""Outputs (S, B, \*D) and a tangent of their shape to the product of the Fisher information with it."""


def gaussian_fisher(outputs: Tensor, tangent: Tensor) -> Tensor:
    r"""Fisher information of independent Gaussian numbers in mean and log-scale, times a tangent.

    .. math:: F = \begin{pmatrix} e^{-2 s} & 0 \\ 0 & 2 \end{pmatrix} \text{ for each } (m, s)

    Args:
        outputs: (..., 2): mean, units of x, and the logarithm of the standard deviation.
        tangent: Of the same shape.

    Returns:
        F times the tangent, of the same shape.

    Exact when: numbers are independent given the code.
    Biased when: the likelihood adds a floor to the variance, as `HeteroscedasticGaussian` does, and s is near it.

    Raises:
        ShapeError: If the last axis has not two numbers.
    """
    if outputs.shape[-1] != 2:
        fix = "Stack means and log-scales along a last axis."
        raise ShapeError("outputs (..., 2) of mean and log-scale", f"{tuple(outputs.shape)}", fix)
    weights = torch.stack([torch.exp(-2 * outputs[..., 1]), 2 * torch.ones_like(outputs[..., 1])], -1)
    return weights * tangent


def bernoulli_fisher(outputs: Tensor, tangent: Tensor) -> Tensor:
    r"""Fisher information of independent binary numbers in their logits, times a tangent: p (1 - p) each.

    Args:
        outputs: Logits, any shape.
        tangent: Of the same shape.

    Returns:
        F times the tangent, of the same shape.

    Exact when: pixels are independent given the code.
    """
    return torch.sigmoid(outputs) * torch.sigmoid(-outputs) * tangent


def categorical_fisher(outputs: Tensor, tangent: Tensor) -> Tensor:
    r"""Fisher information of categories in their logits, times a tangent: (diag p - p p^T) each.

    Args:
        outputs: Logits, (..., C), C classes along the last axis.
        tangent: Of the same shape.

    Returns:
        F times the tangent, of the same shape.

    Exact when: numbers are independent given the code.
    """
    p = torch.softmax(outputs, -1)
    return p * (tangent - (p * tangent).sum(-1, keepdim=True))
