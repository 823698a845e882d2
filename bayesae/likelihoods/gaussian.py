"""Gaussian likelihoods."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bayesae.errors import DataError, NotFittedError
from bayesae.functional import at_least_float32
from bayesae.likelihoods.base import Head, sum_numbers

__all__ = ["Gaussian"]


class Gaussian(Head):
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

    def log_prob(self, outputs: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """Log-density in nats, (..., B)."""
        var = self.noise_var
        outputs = at_least_float32(outputs)
        values = -0.5 * ((target - outputs) ** 2 / var + math.log(2 * math.pi * var))
        return sum_numbers(values, target, mask)

    def distribution(self, outputs: Tensor) -> torch.distributions.Normal:
        """Normal, of this noise scale."""
        return torch.distributions.Normal(outputs, math.sqrt(self.noise_var), validate_args=False)

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
