"""Likelihoods of counts; the network gives the logarithm of a rate."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from bayesae.errors import DataError, ShapeError
from bayesae.likelihoods.base import Head, check_counts_of, log_normal_mean, softplus
from bayesae.likelihoods.noise import NoisyHead, Positive, log

__all__ = ["NegativeBinomial", "Poisson", "size_factors"]

_LARGE = 8.0  # from where Stirling's series is good to 1e-14
_STIRLING = (1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188, -691 / 360360)
_MAX_DISPERSION = 1e6  # a learned r there is a Poisson law to one part in 1e6 of the mean
_MIN_DISPERSION = 1e-4
_SETTLED = 1e-8  # step of log r below which another pass of Newton is not worth its time


class Poisson(Head):
    r"""Independent counts; the network gives log-rates.

    .. math:: \log p(x \mid f) = \sum_d x_d f_d - e^{f_d} - \log x_d!, \qquad H = \operatorname{diag}(e^f)

    Rates of rows that differ in depth (sequencing, exposure) carry an offset of the log-rate, which belongs to the
    network: ``nets.Offset(decoder)`` adds the logarithm of `size_factors`, given as ``Batch.context``.

    Exact when: counts have a variance equal to their mean; `normal_moments` in closed form (a log-normal rate).
    Biased when: counts vary more than that: `NegativeBinomial`. `log_predictive` is the negative binomial of the
        predictive moments, where the exact mixture is Poisson-log-normal.
    Cost: two exponentials and a logarithm a number.

    Raises:
        DataError: If a target is no whole number of at least 0.

    References:
        | Do not log-transform count data (O'Hara and Kotze, 2010)
        | Fast and accurate computation of binomial probabilities (Loader, 2000): the form for large counts
    """

    def check(self, target: Tensor) -> None:
        r"""Raise unless all of ``target`` (B, \*D) are counts."""
        check_counts_of(target, "Poisson")

    def log_density(self, outputs: Tensor, target: Tensor) -> Tensor:
        r"""Log-probability of every number, nats, (..., B, \*D).

        Large counts by Loader's saddle-point form, :math:`-x (e^d - 1 - d) - \tfrac12 \log 2 \pi x - \delta(x)` with
        d = f - log x: in float32 the three terms of the definition would each be larger than what they leave.

        Args:
            outputs: Log-rates, (..., B, \*D).
            target: Counts, (B, \*D).

        Returns:
            Log-probabilities.
        """
        is_large = target >= _LARGE
        large, small = torch.where(is_large, target, _LARGE), torch.where(is_large, 0.0, target)
        gap = torch.where(is_large, outputs - large.log(), 0.0)
        saddle = -large * (torch.expm1(gap) - gap) - 0.5 * torch.log(2 * math.pi * large) - _remainder(large)
        few = small * outputs - torch.where(is_large, 0.0, outputs).exp() - torch.lgamma(small + 1)
        return torch.where(is_large, saddle, few)

    def attainable(self, target: Tensor) -> Tensor:
        r"""Log-probability at a rate of x, (B, \*D): 0 for x = 0."""
        return _at_own_mean(self, target)

    def distribution(self, outputs: Tensor) -> torch.distributions.Poisson:
        """Poisson."""
        return torch.distributions.Poisson(outputs.exp(), validate_args=False)

    def mean(self, outputs: Tensor) -> Tensor:
        """Rates."""
        return outputs.exp()

    def variance(self, outputs: Tensor) -> Tensor:
        """Rates."""
        return outputs.exp()

    def output_hessian(self, outputs: Tensor) -> Tensor:
        """Rates, one entry per output."""
        return outputs.exp()

    def normal_moments(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Exact: the rate is log-normal."""
        rate = log_normal_mean(mean, var)
        return rate, rate, rate**2 * torch.expm1(var)

    def log_predictive(self, mean: Tensor, var: Tensor, target: Tensor) -> Tensor:
        """Log-probability of the negative binomial with these moments, number by number."""
        return _log_matched(mean, var, target)


class NegativeBinomial(NoisyHead):
    r"""Independent over-dispersed counts; the network gives log-means.

    .. math:: \log p(x \mid f) = \sum_d \log \frac{\Gamma(x_d + r)}{\Gamma(r)\, x_d!}
              + r \log \frac{r}{r + m_d} + x_d \log \frac{m_d}{r + m_d}, \qquad m = e^f, \quad
              \operatorname{Var} = m + \frac{m^2}{r}

    The Hessian :math:`(x + r) r m / (r + m)^2` depends on the data, so `output_hessian` is its expectation, the Fisher
    information:

    .. math:: F = \frac{r m}{r + m}

    A learned r maximises the likelihood, by one Newton step of log r a pass, between 1e-4 and 1e6 (counts that vary no
    more than Poisson's have their maximum at infinity).

    Args:
        dispersion: r, a number, or numbers (\*D) with ``per_output``; small is more spread. None: learned by
            `fit_model` or `estimate_noise`.
        per_output: Whether every number of a row (every gene) has a dispersion of its own.

    Exact when: counts are Poisson with gamma-distributed rates of one shape r; `normal_moments` in closed form.
    Biased when: `log_predictive` is the negative binomial of the predictive moments, where the exact one is a mixture.
    Cost: four logarithms of gamma functions and exponentials a number; learning, about five passes.

    Raises:
        DataError: If a target is no whole number of at least 0, or ``dispersion`` is not positive and finite.
        NotFittedError: If a density is asked for before the dispersion was learned.
        ShapeError: If there are not as many dispersions as numbers in a row.

    References:
        | Single-cell RNA-seq denoising using a deep count autoencoder (Eraslan et al., 2019)
        | Departure: dispersion outside the network, by maximum likelihood over all rows.
    """

    is_fisher = True
    n_statistics = 3

    def __init__(self, dispersion: Positive | None = None, *, per_output: bool = False) -> None:
        super().__init__(dispersion, "dispersion", per_output)

    @property
    def dispersion(self) -> float | Tensor:
        """The dispersion r, a float or float64 (D,)."""
        return self._known

    def check(self, target: Tensor) -> None:
        r"""Raise unless all of ``target`` (B, \*D) are counts."""
        check_counts_of(target, "NegativeBinomial")

    def _terms(self, outputs: Tensor, target: Tensor) -> Tensor:
        r, m = torch.as_tensor(self._like(outputs), dtype=torch.float64), outputs.exp()
        slope = torch.digamma(target + r) - torch.digamma(r) + torch.log(r / (r + m)) + (m - target) / (r + m)
        curve = torch.polygamma(1, target + r) - torch.polygamma(1, r) + 1 / r - 2 / (r + m)
        curve = curve + (r + target) / (r + m) ** 2
        # derivatives in log r
        return torch.stack([r * slope, r * slope + r**2 * curve, torch.ones_like(m)])

    def update_noise(self, statistics: Tensor) -> bool:
        """One Newton step of log r, of at most 1.

        Args:
            statistics: Sums of `noise_statistics`: first and second derivatives in log r, and counts.

        Returns:
            Whether log r moved by more than 1e-8.
        """
        slope, curve, _ = self._totals(statistics, count=2)
        before = torch.as_tensor(self._known, dtype=torch.float64).log()
        # uphill by 1 where the likelihood is not concave
        step = torch.where(curve < 0, -slope / torch.where(curve < 0, curve, -1.0), slope.sign()).clamp(-1, 1)
        after = (before + step).clamp(math.log(_MIN_DISPERSION), math.log(_MAX_DISPERSION))
        self._store(after.exp())
        return bool(((after - before).abs() > _SETTLED).any())

    def log_density(self, outputs: Tensor, target: Tensor) -> Tensor:
        r"""Log-probability of every number, nats, (..., B, \*D)."""
        wide = outputs.double()  # see `_log_negative_binomial`
        return _log_negative_binomial(wide, self._like(wide), target).to(outputs.dtype)

    def attainable(self, target: Tensor) -> Tensor:
        r"""Log-probability at a mean of x, (B, \*D): 0 for x = 0."""
        return _at_own_mean(self, target)

    def distribution(self, outputs: Tensor) -> torch.distributions.NegativeBinomial:
        """Negative binomial."""
        r = self._like(outputs)
        return torch.distributions.NegativeBinomial(
            torch.as_tensor(r, dtype=outputs.dtype, device=outputs.device), logits=outputs - log(r), validate_args=False
        )

    def mean(self, outputs: Tensor) -> Tensor:
        """Exponentials."""
        return outputs.exp()

    def variance(self, outputs: Tensor) -> Tensor:
        """M + m^2 / r."""
        m = outputs.exp()
        return m + m**2 / self._like(outputs)

    def output_hessian(self, outputs: Tensor) -> Tensor:
        """Fisher information r m / (r + m), one entry per output."""
        r = self._like(outputs)
        return r * torch.sigmoid(outputs - log(r))

    def normal_moments(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Exact: the mean is log-normal."""
        m = log_normal_mean(mean, var)
        return m, m + m**2 * var.exp() / self._like(mean), m**2 * torch.expm1(var)

    def log_predictive(self, mean: Tensor, var: Tensor, target: Tensor) -> Tensor:
        """Log-probability of the negative binomial with these moments, number by number."""
        return _log_matched(mean, var, target)

    def extra_repr(self) -> str:
        """Dispersion and how it came about, for ``repr``."""
        shown = self._noise
        if isinstance(shown, Tensor):
            shown = f"{float(shown.min()):.4g} to {float(shown.max()):.4g}"
        return f"dispersion={shown}, is_learned={self.is_learned}"


def _at_own_mean(head: Poisson | NegativeBinomial, x: Tensor) -> Tensor:
    return torch.where(x > 0, head.log_density(x.clamp(min=1).log(), x), 0.0)


def size_factors(counts: Tensor | np.ndarray) -> Tensor:
    r"""Depth of every row relative to the mean: what the context of ``nets.Offset`` is.

    .. math:: s_i = \frac{\sum_d x_{id}}{\tfrac1N \sum_j \sum_d x_{jd}}

    Args:
        counts: Whole numbers of at least 0, (N, \*D).

    Returns:
        (N, 1), positive, of mean 1, in float32 or wider. Pass rows of a test set through the same function together
        with training rows, or divide their totals by the training mean: the mean is over what is given.

    Exact when: rows differ by their depth alone.

    Raises:
        DataError: If a row is empty (it has no depth), or a number is no count.
        ShapeError: If there are no rows of numbers.
    """
    counts = torch.as_tensor(counts)
    if counts.dim() < 2:
        raise ShapeError("counts (N, *D)", f"shape {tuple(counts.shape)}", "A single row needs a first axis of 1.")
    check_counts_of(counts, "size_factors")
    totals = counts.double().flatten(1).sum(1, keepdim=True)
    if not bool((totals > 0).all()):
        n_empty = int((totals == 0).sum())
        raise DataError("a count in every row", f"{n_empty} rows of zeros", "Remove them: they have no depth.")
    dtype = counts.dtype if counts.dtype in {torch.float32, torch.float64} else torch.float32
    return (totals / totals.mean()).to(dtype)


def _remainder(z: Tensor) -> Tensor:
    """Log Gamma(z) - (z - 1/2) log z + z - log(2 pi) / 2, by Stirling's series, for z of at least 8."""
    inverse = 1 / z
    square, total = inverse**2, torch.zeros_like(z)
    for coefficient in reversed(_STIRLING):
        total = total * square + coefficient
    return total * inverse


def _log_rising(r: float | Tensor, x: Tensor) -> Tensor:
    """Log Gamma(x + r) - log Gamma(r) - x log r, which goes to 0 as r grows."""
    r = torch.as_tensor(r, dtype=x.dtype, device=x.device)
    is_large = r >= _LARGE
    large, small = torch.where(is_large, r, _LARGE), torch.where(is_large, 1.0, r)
    series = (large + x - 0.5) * torch.log1p(x / large) - x + _remainder(large + x) - _remainder(large)
    plain = torch.lgamma(x + small) - torch.lgamma(small) - x * small.log()
    return torch.where(is_large, series, plain)


def _log_negative_binomial(log_mean: Tensor, r: float | Tensor, x: Tensor) -> Tensor:
    """Log-probability of counts x, number by number; Poisson's where r is infinite for all purposes."""
    # callers give float64: at a mean of 1e5 the terms are 1e6 nats each and leave about 10
    x = x.to(log_mean.dtype)
    tail = softplus(log_mean - log(r))  # log(1 + m / r)
    return _log_rising(r, x) - (x + r) * tail + x * log_mean - torch.lgamma(x + 1)


def _log_matched(mean: Tensor, var: Tensor, x: Tensor) -> Tensor:
    """Of the negative binomial with this mean and variance; a variance not above the mean is taken as Poisson's."""
    limits = torch.finfo(mean.dtype)  # of what came: a smaller excess of the variance is its rounding
    wide = mean.double().clamp(min=limits.tiny)
    r = wide / ((var.double() - wide) / wide).clamp(min=limits.eps)
    return _log_negative_binomial(wide.log(), r, x).to(mean.dtype)
