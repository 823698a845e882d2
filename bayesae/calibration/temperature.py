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


@dataclass(frozen=True)
class Temperature:
    r"""A temperature of the weight posterior and a factor of the noise, by the likelihood of held-out rows.

    .. math:: \max_{a, T}\ \sum_{i, d} \log N\big(x_{id};\ \mu_{id},\
              a\, noise_{id} + code_{id} + T\, weights_{id}\big), \qquad 10^{-6} \le a, T \le 10^6

    The code's part stays as it is. Where the weights' part is 0 everywhere (one network) T is 1.

    Exact when: the weight posterior is Normal and linearised: a temperature T multiplies its covariance, and the
        weights' part with it, so that moments come out as those of the tempered posterior. Held-out data then choose a
        and T as maximum likelihood does.
    Biased when: the posterior is sampled: its tempered draws are not these moments; or the weights' part is a
        multiple of the noise: only the sum is then settled.
    Cost: a few dozen passes over the values.

    Raises:
        DataError: If there are no rows, or a variance is not positive.
        UnsupportedError: If the likelihood's mean settles its law (binary and nominal data).

    References:
        | How Good is the Bayes Posterior in Deep Neural Networks Really? (Wenzel et al., 2020): temperatures.
          Departure: chosen by held-out likelihood after the fit, on the predictive variance.
    """

    def fit(self, moments: Moments, x: Tensor | np.ndarray) -> Rescaled:
        r"""Factor and temperature of these rows.

        Args:
            moments: Of the predictive at x.
            x: Rows that trained nothing, (N, \*data).

        Returns:
            `Rescaled`: ``noise`` is a, ``weights`` is T, ``code`` is 1. Warns where one of them is at an end of its
            range: the rows would have that part of the variance gone, or alone.
        """
        from scipy.optimize import minimize

        error, _ = errors_of(moments, x)
        squares = error**2
        parts = torch.stack([moments.noise.detach().double(), moments.weights.detach().double()])
        rest = moments.code.detach().double()

        def loss(logarithms: np.ndarray) -> tuple[float, np.ndarray]:
            factors = torch.from_numpy(logarithms).to(parts).exp()
            scaled = factors.reshape(-1, *[1] * rest.dim()) * parts
            var = scaled.sum(0) + rest
            slope = (1 - squares / var) / var
            gradient = 0.5 * (scaled * slope).flatten(1).mean(1)
            return float(0.5 * (squares / var + var.log()).mean()), gradient.cpu().numpy()

        bounds = [(-math.log(_LARGEST), math.log(_LARGEST))] * 2
        found = minimize(
            loss, np.zeros(2), jac=True, method="L-BFGS-B", bounds=bounds, options={"ftol": 0, "gtol": 1e-9}
        )
        for name, value in zip(("noise factor", "temperature"), found.x, strict=True):
            if abs(value) > 0.999 * bounds[0][1]:
                message = f"The {name} that these rows like best is at the end of its range: {math.exp(value):.3g}."
                warnings.warn(message, stacklevel=2)
        noise, weights = (torch.tensor(math.exp(value), dtype=parts.dtype) for value in found.x)
        return Rescaled(noise, torch.ones_like(noise), weights)
