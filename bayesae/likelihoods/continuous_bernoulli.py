"""The continuous Bernoulli likelihood: a density on the unit interval; the network gives logits."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from torch import Tensor

from bayesae.likelihoods.base import Head, check_range

__all__ = ["ContinuousBernoulli"]

# coth(h) - 1/h = sum_k c_k h^(2k + 1); at h = 0.5 what is left out is below 1e-17
_COTH = (
    1 / 3, -1 / 45, 2 / 945, -1 / 4725, 2 / 93555, -1382 / 638512875, 4 / 18243225, -3617 / 162820783125,
    87734 / 38979295480125, -349222 / 1531329465290625, 310732 / 13447856940643125,
)  # fmt: skip
_NEAR = 0.5  # |h| below which the series is read
_NARROW = 4.0  # scale of a logit up to which the trapezoidal rule resolves the mean's poles at +-2 pi i
_REMOTE = 8.0  # scales from 0 beyond which it need not: the logit is never near 0


class ContinuousBernoulli(Head):
    r"""Independent numbers in [0, 1] with a log-density linear in them; the network gives logits.

    .. math:: p(x \mid f) = \frac{f e^{f x}}{e^f - 1}, \qquad
              m(f) = \frac{1}{1 - e^{-f}} - \frac1f, \qquad
              H = \operatorname{Var}[x \mid f] = m'(f) = \frac{1}{f^2} - \frac{1}{4 \sinh^2(f / 2)}

    It is what the cross-entropy of grey levels becomes with its normaliser. Log-normaliser, mean and variance have
    removable singularities at f = 0, where they are read from their series in float32 and float64 alike.

    Exact when: numbers follow this law: the most spread one on [0, 1] of a given mean.
    Biased when: data pile up at exactly 0 and 1; densities of a Bernoulli likelihood are no yardstick for these.
    Cost: about ten multiplications and two exponentials a number; `normal_moments` 49 evaluations a number, and
        96 more where any logit is wide.

    Raises:
        DataError: If a target lies outside [0, 1].

    References:
        | The continuous Bernoulli: fixing a pervasive error in variational autoencoders (Loaiza-Ganem and
          Cunningham, 2019)
        | Departure: logits, and a series that is as precise as the formula where they meet.
    """

    def check(self, target: Tensor) -> None:
        r"""Raise unless all of ``target`` (B, \*D) lies in [0, 1]."""
        check_range(target, "ContinuousBernoulli")

    def log_density(self, outputs: Tensor, target: Tensor) -> Tensor:
        r"""Log-density of every number, nats, (..., B, \*D)."""
        return (target - 0.5) * outputs - _log_sinhc(outputs / 2)

    def distribution(self, outputs: Tensor) -> torch.distributions.ContinuousBernoulli:
        """Torch's continuous Bernoulli, which stops probabilities short of 0 and 1: `log_density` does not."""
        # at x = 0.9 its densities are off by 0.2 nats at a logit of 20 in float32, by 0.1 at one of 40 in float64
        return torch.distributions.ContinuousBernoulli(logits=outputs, validate_args=False)

    def mean(self, outputs: Tensor) -> Tensor:
        """1 / (1 - exp(-f)) - 1 / f."""
        near, far, is_near = _split(outputs / 2)
        size = 2 * far
        tail = 1 / size - 1 / torch.expm1(size)  # the mean at -|f|, without a cancellation
        tail = torch.where(outputs < 0, tail, 1 - tail)
        return torch.where(is_near, 0.5 + 0.5 * _series(near, 0), tail)

    def variance(self, outputs: Tensor) -> Tensor:
        """Derivative of the mean in the logit."""
        near, far, is_near = _split(outputs / 2)
        shrunk = torch.exp(-2 * far)
        formula = 0.25 / far**2 - shrunk / (1 - shrunk) ** 2
        return torch.where(is_near, 0.25 * _series(near, 1), formula)

    def output_hessian(self, outputs: Tensor) -> Tensor:
        """The variance, one entry per output."""
        return self.variance(outputs)

    def normal_moments(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r"""Moments of the mean when the logit is Normal, to 1e-10 whatever its variance.

        Up to a scale of 4, and wherever the logit stays 8 scales from 0, by the trapezoidal rule, of deviations from
        the mean's own value, so that a small variance does not drown in rounding. Elsewhere the functions are narrow
        beside the Normal, and the integrals are taken over frequencies k:

        .. math:: \mathbb{E}[m'] = \tfrac1\pi \int_0^\infty \cos(k\mu) e^{-\sigma^2 k^2 / 2}
                  \frac{2\pi k}{e^{2\pi k} - 1} dk, \qquad
                  \mathbb{E}\Big[\frac{2m - 1}{f}\Big] = -\tfrac2\pi \int_0^\infty \cos(k\mu)
                  e^{-\sigma^2 k^2 / 2} \log(1 - e^{-2\pi k}) dk

        and likewise for m; :math:`m^2 = m - m' - (2m - 1) / f` gives the second moment.

        Args:
            mean: Means of the logits, (..., B, \*O).
            var: Their variances, the same shape.

        Returns:
            Mean of m, expectation of m', variance of m.
        """
        scale = var.sqrt()
        centre = self.mean(mean)
        first, second, noise = (torch.zeros_like(mean) for _ in range(3))
        for node, weight in zip(*_trapezoid(), strict=True):
            at = mean + node * scale
            shift = self.mean(at) - centre
            first, second = first + weight * shift, second + weight * shift**2
            noise = noise + weight * self.variance(at)
        result = centre + first, noise, (second - first**2).clamp(min=0)
        is_wide = (scale > _NARROW) & (mean.abs() < _REMOTE * scale)
        if not bool(is_wide.any()):
            return result
        wide = _over_frequencies(mean, scale.clamp(min=_NARROW))
        return tuple(torch.where(is_wide, w, r) for w, r in zip(wide, result, strict=True))  # pyright: ignore[reportReturnType] - three

    def log_predictive(self, mean: Tensor, var: Tensor, target: Tensor) -> Tensor:
        """Log-density of the continuous Bernoulli of this mean, which has no second parameter, number by number."""
        return self.log_density(self.logit_of(mean), target)

    def logit_of(self, mean: Tensor) -> Tensor:
        r"""The logit f whose mean m(f) is given: the inverse of `mean`.

        Newton's method on 1 / m(-a) = 1 / q for the smaller tail q of the mean, a function of slope between 1/3 and
        1; steps stay in the interval that these slopes allow.

        Args:
            mean: Numbers in (0, 1); 0 and 1 are moved inside by the rounding of their dtype.

        Returns:
            Logits of the same shape.
        """
        eps = torch.finfo(mean.dtype).eps
        tail = torch.minimum(mean, 1 - mean).clamp(min=eps)
        goal = 1 / tail
        low, high = goal - 2, torch.minimum(goal, 3 * (goal - 2))
        size = high
        for _ in range(8):
            at = self.mean(-size)
            slope = self.variance(size) / at**2
            size = torch.minimum(torch.maximum(size - (1 / at - goal) / slope, low), high)
        return torch.where(mean < 0.5, -size, size)


def _split(half: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The series' argument, the formula's, and which is read; the other is harmless, in gradients too."""
    is_near = half.abs() < _NEAR
    return torch.where(is_near, half, 0.0), torch.where(is_near, 1.0, half).abs(), is_near


def _series(half: Tensor, n_derivatives: int) -> Tensor:
    """Langevin's function coth(h) - 1/h near 0, or its derivative (1), or its integral from 0 (-1)."""
    factor = {-1: lambda k: 1 / (2 * k + 2), 0: lambda k: 1.0, 1: lambda k: 2 * k + 1}[n_derivatives]
    square, total = half**2, torch.zeros_like(half)
    for k in reversed(range(len(_COTH))):
        total = total * square + _COTH[k] * factor(k)
    return total if n_derivatives == 1 else total * half if n_derivatives == 0 else total * square


def _log_sinhc(half: Tensor) -> Tensor:
    """log(sinh(h) / h)."""
    near, far, is_near = _split(half)
    formula = far + torch.log1p(-torch.exp(-2 * far)) - torch.log(2 * far)
    return torch.where(is_near, _series(near, -1), formula)


@cache
def _trapezoid() -> tuple[list[float], list[float]]:
    """Nodes and normalised weights of the trapezoidal rule for a standard Normal, to 8.4 scales."""
    nodes = 0.35 * np.arange(-24, 25)
    weights = np.exp(-0.5 * nodes**2)
    return nodes.tolist(), (weights / weights.sum()).tolist()


@cache
def _frequencies() -> tuple[list[float], list[float]]:
    """Nodes t in (0, 8.5) and weights of a rule for log t times something smooth, exp(-t^2 / 2) included."""
    nodes, weights = np.polynomial.legendre.leggauss(96)
    share, weights = 0.5 * (nodes + 1), 0.5 * weights
    t = 8.5 * share**4
    return t.tolist(), (weights * 34.0 * share**3 * np.exp(-0.5 * t**2) / math.pi).tolist()


def _over_frequencies(mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    ratio = mean / scale
    first, noise, quotient = (torch.zeros_like(mean) for _ in range(3))
    for t, weight in zip(*_frequencies(), strict=True):
        x = 2 * math.pi * t / scale
        smooth, cosine = x / torch.expm1(x), torch.cos(t * ratio)
        first = first + weight / t * smooth * torch.sin(t * ratio)
        noise = noise + weight * smooth * cosine
        quotient = quotient - 2 * weight * torch.log(-torch.expm1(-x)) * cosine
    first, noise, quotient = 0.5 + first, noise / scale, quotient / scale
    spread = first * (1 - first) - noise - quotient
    return first, noise, spread.clamp(min=0)
