r"""Likelihoods p(x | outputs): heads that turn a network's tensor into a distribution over data.

A likelihood is a small module, so that a noise scale travels with ``state_dict`` and ``deepcopy``; the scale is a
hyper-parameter outside theta, never a parameter of a network.

Outputs have shape (..., B, \*O) and targets (B, \*O).
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bayesae.errors import DataError, NotFittedError
from bayesae.functional import at_least_float32

__all__ = ["Bernoulli", "Gaussian"]


def _sum_outputs(values: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    r"""Sum (..., B, \*O) over the outputs that ``mask`` leaves: (..., B)."""
    if mask is not None:
        values = torch.where(mask, values, 0.0)
    return values.flatten(values.dim() - target.dim() + 1).sum(-1) if target.dim() > 1 else values


class Gaussian(nn.Module):
    r"""Independent Gaussian outputs of one noise scale.

    .. math:: \log p(x \mid f) = -\tfrac12 \sum_o \Big[\frac{(x_o - f_o)^2}{\sigma^2}
              + \log 2\pi\sigma^2 \Big], \qquad H = I / \sigma^2

    Args:
        scale: Standard deviation of the noise, units of x. None: estimated as the root mean squared residual, by
            `fit_model` while it trains or by `estimate_noise` for a network trained elsewhere.
        floor: Lower bound of an estimated scale, units of x. A network that copies its input would otherwise
            drive the scale, and with it every density, to infinity; 1e-3 is a quarter of a grey level of 256.

    Exact when: the residuals are Gaussian with one variance.
    Biased when: the scale is estimated on the rows that trained the network: it is then too small for new rows.

    Raises:
        DataError: If ``scale`` or ``floor`` is not positive and finite.
        NotFittedError: If a density is asked for before the scale was estimated.
    """

    def __init__(self, scale: float | None = None, *, floor: float = 1e-3) -> None:
        super().__init__()
        for name, value in (("scale", scale), ("floor", floor)):
            if value is not None and not (0 < value < math.inf):
                raise DataError(f"a positive, finite {name}", repr(value), f"Give {name} in the units of the data.")
        self.is_learned, self.floor = scale is None, floor
        # a Python float: a float32 buffer would be off by 1e-8 in a model that is cast to float64
        self._var = None if scale is None else float(scale) ** 2

    @property
    def noise_var(self) -> float:
        """Noise variance, units of x squared; raises `NotFittedError` before it is known."""
        if self._var is None:
            raise NotFittedError(
                "a noise scale",
                "Gaussian() whose scale was never estimated",
                "Call fit_model or estimate_noise(model, data), or give Gaussian(scale=...).",
            )
        return self._var

    @property
    def is_estimated(self) -> bool:
        """Whether the noise variance is known."""
        return self._var is not None

    def set_noise_var(self, var: float) -> None:
        """Store an estimated noise variance, no lower than the floor; for the functions that fit."""
        self._var = max(float(var), self.floor**2)

    def get_extra_state(self) -> Tensor:
        """The noise variance for ``state_dict``; NaN while unknown."""
        return torch.tensor(math.nan if self._var is None else self._var, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Take the noise variance from a ``state_dict``."""
        self._var = None if bool(state.isnan()) else float(state)

    def check(self, target: Tensor) -> None:
        """Any real target will do."""

    def log_prob(self, outputs: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """Log-density in nats, (..., B)."""
        var = self.noise_var
        outputs = at_least_float32(outputs)
        values = -0.5 * ((target - outputs) ** 2 / var + math.log(2 * math.pi * var))
        return _sum_outputs(values, target, mask)

    def mean(self, outputs: Tensor) -> Tensor:
        """The outputs themselves."""
        return outputs

    def variance(self, outputs: Tensor) -> Tensor:
        """The noise variance, expanded to the outputs."""
        return outputs.new_tensor(self.noise_var).expand(outputs.shape)

    def output_hessian(self, outputs: Tensor) -> Tensor:
        """1 / noise variance, constant: shape ()."""
        return outputs.new_tensor(1 / self.noise_var)

    def normal_moments(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Exact: the identity link keeps a Normal a Normal."""
        return mean, self.variance(mean), var

    def log_predictive(self, mean: Tensor, var: Tensor, target: Tensor) -> Tensor:
        """Log N(target; mean, var), pixel by pixel."""
        return -0.5 * ((target - mean) ** 2 / var + torch.log(2 * math.pi * var))

    def extra_repr(self) -> str:
        """Scale and how it came about, for ``repr``."""
        return f"scale={None if self._var is None else math.sqrt(self._var)}, is_learned={self.is_learned}"


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


class Bernoulli(nn.Module):
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
        r"""Raise unless all of ``target`` lies in [0, 1].

        Args:
            target: (B, \*O).

        Raises:
            DataError: Giving the range that came.
        """
        low, high = float(target.min()), float(target.max())
        if low < 0 or high > 1:
            raise DataError(
                "Bernoulli data in [0, 1]",
                f"values from {low:.4g} to {high:.4g}",
                "Scale the data (x / 255 for bytes), or use a Gaussian likelihood.",
            )

    def log_prob(self, outputs: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """Log-probability in nats, (..., B)."""
        outputs = at_least_float32(outputs)
        return _sum_outputs(target * outputs - F.softplus(outputs), target, mask)

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
