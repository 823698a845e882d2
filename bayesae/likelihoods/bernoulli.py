"""The Bernoulli likelihood; the network gives logits."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from torch import Tensor

from bayesae.likelihoods.base import Head, check_range, softplus

__all__ = ["Bernoulli"]


# Monahan & Stefanski (1992): logistic(x) = sum_k weight_k Phi(rate_k x) to 3e-9 (checked in the tests)
_PROBIT_WEIGHTS = (
    0.003246343272134, 0.051517477033972, 0.195077912673858, 0.315569823632818,
    0.274149576158423, 0.131076880695470, 0.027912418727972, 0.001449567805354,
)  # fmt: skip
_PROBIT_RATES = (
    1.365340806296348, 1.059523971016916, 0.830791313765644, 0.650732166639391,
    0.508135425366489, 0.396313345166341, 0.308904252267995, 0.238212616409306,
)  # fmt: skip
_NARROW = 6.0  # variance of a logit up to which 48 nodes are the better of the two


@cache
def _hermite() -> tuple[list[float], list[float]]:
    """Nodes and normalised weights of a Gauss-Hermite rule for a standard Normal."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(48)
    return nodes.tolist(), (weights / weights.sum()).tolist()


class Bernoulli(Head):
    r"""Independent Bernoulli outputs; the network gives logits.

    .. math:: \log p(x \mid f) = \sum_o x_o f_o - \log(1 + e^{f_o}), \qquad
              H = \operatorname{diag}(p (1 - p)),\; p = \operatorname{logistic}(f)

    Targets between 0 and 1 are scored by the same formula (the cross-entropy of grey levels read as
    probabilities); it is a density only for targets of 0 and 1, and its largest attainable value then
    depends on x.

    Exact when: pixels are 0 or 1 and independent given the code.

    Raises:
        DataError: If a target lies outside [0, 1].
    """

    def check(self, target: Tensor) -> None:
        r"""Raise unless all of ``target`` (B, \*D) lies in [0, 1]."""
        check_range(target, "Bernoulli")

    def log_density(self, outputs: Tensor, target: Tensor) -> Tensor:
        r"""Log-probability of every number, nats, (..., B, \*D)."""
        return target * outputs - softplus(outputs)

    def attainable(self, target: Tensor) -> Tensor:
        r"""Minus the entropy of a probability of x, (B, \*D): 0 for x of 0 and 1."""
        return torch.xlogy(target, target) + torch.xlogy(1 - target, 1 - target)

    def distribution(self, outputs: Tensor) -> torch.distributions.Bernoulli:
        """Bernoulli."""
        return torch.distributions.Bernoulli(logits=outputs, validate_args=False)

    def mean(self, outputs: Tensor) -> Tensor:
        """Probabilities."""
        return outputs.sigmoid()

    def variance(self, outputs: Tensor) -> Tensor:
        """P (1 - p)."""
        return outputs.sigmoid() * (-outputs).sigmoid()

    def output_hessian(self, outputs: Tensor) -> Tensor:
        """P (1 - p), one entry per output."""
        return self.variance(outputs)

    def normal_moments(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r"""Moments of p when the logit is Normal.

        Up to a logit variance of 6 by Gauss-Hermite quadrature, of deviations from the mean's own p, so that a small
        variance does not drown in rounding. Above, where quadrature fails, in closed form: the logistic function is
        a sum of eight Normal distribution functions to 3e-9, a Normal distribution function has a closed-form
        expectation under a Normal, and :math:`p^2 = p - p'` gives the second moment.

        Args:
            mean: Means of the logits, (..., B, \*O).
            var: Their variances, the same shape.

        Returns:
            Mean of p, expectation of p (1 - p), variance of p; the last two add up to mean (1 - mean). The variance is
            exact to 2e-5 of itself at worst, where the two meet, and to rounding below 1.
        """
        centre, scale = mean.sigmoid(), var.sqrt()
        first, second = torch.zeros_like(mean), torch.zeros_like(mean)
        for node, weight in zip(*_hermite(), strict=True):
            shift = (mean + node * scale).sigmoid() - centre
            first, second = first + weight * shift, second + weight * shift**2

        probability, slope = torch.zeros_like(mean), torch.zeros_like(mean)
        for weight, rate in zip(_PROBIT_WEIGHTS, _PROBIT_RATES, strict=True):
            width = torch.sqrt(var + 1 / rate**2)
            probability = probability + weight * torch.special.ndtr(mean / width)
            slope = slope + weight * torch.exp(-0.5 * (mean / width) ** 2) / (width * math.sqrt(2 * math.pi))

        is_narrow = var <= _NARROW
        probability = torch.where(is_narrow, centre + first, probability)
        spread = torch.where(is_narrow, second - first**2, probability * (1 - probability) - slope).clamp(min=0)
        return probability, probability * (1 - probability) - spread, spread

    def log_predictive(self, mean: Tensor, var: Tensor, target: Tensor) -> Tensor:
        """Log Bernoulli(target; mean), pixel by pixel; a binary pixel's law has no second parameter."""
        tiny = torch.finfo(mean.dtype).eps
        mean = mean.clamp(tiny, 1 - tiny)
        return target * mean.log() + (1 - target) * torch.log1p(-mean)
