"""Posterior temperature: how much of the weights' variance, and how much noise, held-out rows want."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bayesae.calibration.base import errors_of
from bayesae.calibration.scaling import Rescaled
from bayesae.draws import Moments

__all__ = ["Temperature"]

_LARGEST = 1e6
_LARGEST_SLOPE = 1e-6  # nats a number and unit of a logarithm; at a curvature of 1/2 a relative error of 2e-6


@dataclass(frozen=True)
class Temperature:
    r"""A temperature of the weight posterior and a factor of the noise, by the likelihood of held-out rows.

    .. math:: \max_{a, T}\ \sum_{i, d} \log N\big(x_{id};\ \mu_{id},\
              a\, noise_{id} + code_{id} + T\, weights_{id}\big), \qquad 10^{-6} \le a, T \le 10^6

    The code's part stays as it is. Where the weights' part is 0 everywhere (one network) T is 1. Of rows with missing
    entries the sum is over what was observed.

    Exact when: the weight posterior is Normal and linearised: a temperature T multiplies its covariance, and the
        weights' part with it, so that moments come out as those of the tempered posterior. Held-out data then choose a
        and T as maximum likelihood does.
    Biased when: the posterior is sampled: its tempered draws are not these moments; or the weights' part is a
        multiple of the noise: only the sum is then settled.
    Cost: a few dozen passes over the values.

    References:
        | How Good is the Bayes Posterior in Deep Neural Networks Really? (Wenzel et al., 2020): temperatures.
          Departure: chosen by held-out likelihood after the fit, on the predictive variance.
    """

    def fit(self, moments: Moments, x: Tensor | np.ndarray, mask: Tensor | np.ndarray | None = None) -> Rescaled:
        r"""Factor and temperature of these rows; arguments and errors as of `Recalibration.fit`.

        Returns:
            `Rescaled`: ``noise`` is a, ``weights`` is T, ``code`` is 1. Warns where one of them is at an end of its
            range (the rows would have that part of the variance gone, or alone), and where the search has not
            converged.
        """
        from scipy.optimize import minimize

        error, _, is_observed = errors_of(moments, x, mask)
        squares = error[is_observed] ** 2
        noise, weights, rest = (
            part.detach().double()[is_observed] for part in (moments.noise, moments.weights, moments.code)
        )
        parts = torch.stack([noise, weights])

        def loss(logarithms: np.ndarray) -> tuple[float, np.ndarray]:
            scaled = torch.from_numpy(logarithms).to(parts).exp()[:, None] * parts
            var = scaled.sum(0) + rest
            slope = (1 - squares / var) / var
            gradient = 0.5 * (scaled * slope).mean(1)
            return float(0.5 * (squares / var + var.log()).mean()), gradient.cpu().numpy()

        end = math.log(_LARGEST)
        found = minimize(
            loss, np.zeros(2), jac=True, method="L-BFGS-B", bounds=[(-end, end)] * 2, options={"ftol": 0, "gtol": 1e-9}
        )
        # not found.success: at the limit of rounding the last line search fails. What a bound holds up does not count
        slope = float(np.abs(np.clip(found.x - found.jac, -end, end) - found.x).max())
        if not slope <= _LARGEST_SLOPE:
            message = (
                f"The search for noise factor and temperature has not converged: the likelihood still rises by "
                f"{slope:.1g} nats a number. Look at the variances of these rows for very large and small ones."
            )
            warnings.warn(message, RuntimeWarning, stacklevel=2)
        for name, value in zip(("noise factor", "temperature"), found.x, strict=True):
            if abs(value) > 0.999 * end:
                message = f"The {name} that these rows like best is at the end of its range: {math.exp(value):.3g}."
                warnings.warn(message, stacklevel=2)
        noise_factor, temperature = (torch.tensor(math.exp(value), dtype=parts.dtype) for value in found.x)
        return Rescaled(noise_factor, torch.ones_like(noise_factor), temperature)
