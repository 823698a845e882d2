"""The Gaussian likelihood with constant noise: shared, or one scale for every number of a row."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bayesae.likelihoods.noise import Positive, log, root
from bayesae.likelihoods.scales import ScaledHead

__all__ = ["Gaussian", "log_normal_density"]


class Gaussian(ScaledHead):
    r"""Independent Gaussian outputs of one noise scale, or of one for every number of a row.

    .. math:: \log p(x \mid f) = -\tfrac12 \sum_d \Big[\frac{(x_d - f_d)^2}{\sigma_d^2}
              + \log 2\pi\sigma_d^2 \Big], \qquad H = \operatorname{diag}(1 / \sigma_d^2)

    Args:
        scale: Standard deviation of the noise, units of x: a number, or numbers (\*D) with ``per_output``. None:
            estimated as the root mean squared residual, by `fit_model` while it trains or by `estimate_noise` for a
            network trained elsewhere.
        per_output: Whether every number of a row has a scale of its own; False, because one scale is estimated from
            D times as many residuals.
        floor: Lower bound of an estimated scale, units of x. A network that copies its input would otherwise
            drive the scale, and with it every density, to infinity; 1e-3 is a quarter of a grey level of 256. With
            ``per_output`` numbers that never vary (dead pixels) end there.

    Exact when: the residuals are Gaussian with one variance (of each number, with ``per_output``).
    Biased when: the scale is estimated on the rows that trained the network: it is then too small for new rows.
    Cost: one pass over the numbers.

    Raises:
        DataError: If ``scale`` or ``floor`` is not positive and finite, or several scales come without ``per_output``.
        NotFittedError: If a density is asked for before the scale was estimated.
        ShapeError: If there are not as many scales as numbers in a row.

    References:
        Departure: with ``per_output`` a number that no row observed takes the mean squared residual of the others.
    """

    def __init__(self, scale: Positive | None = None, *, per_output: bool = False, floor: float = 1e-3) -> None:
        super().__init__(scale, per_output, floor)

    @property
    def noise_var(self) -> float | Tensor:
        """Noise variance, units of x squared, a float or float64 (D,); raises `NotFittedError` before it is known."""
        return self._known

    def set_noise_var(self, var: float | Tensor) -> None:
        """Store an estimated noise variance, no lower than the floor; for the functions that fit."""
        self._store(torch.as_tensor(var, dtype=torch.float64))

    def _terms(self, outputs: Tensor, target: Tensor) -> Tensor:
        squares = (target - outputs) ** 2
        return torch.stack([squares, torch.ones_like(squares)])

    def update_noise(self, statistics: Tensor) -> bool:
        """Set the noise variance to the mean squared residual; one pass settles it.

        Args:
            statistics: Sums of `noise_statistics`: squared residuals, and counts.

        Returns:
            False.
        """
        squares, counts = self._totals(statistics, count=1)
        self._store(squares / counts)
        return False

    def log_density(self, outputs: Tensor, target: Tensor) -> Tensor:
        r"""Log-density of every number, nats, (..., B, \*D)."""
        return log_normal_density(target, outputs, self._like(outputs))

    def distribution(self, outputs: Tensor) -> torch.distributions.Normal:
        """Normal, of this noise scale."""
        scale = root(self._like(outputs))
        return torch.distributions.Normal(outputs, scale, validate_args=False)

    def variance(self, outputs: Tensor) -> Tensor:
        """The noise variance, expanded to the outputs."""
        return self._constant(self._like(outputs), outputs).expand(outputs.shape)

    def output_hessian(self, outputs: Tensor) -> Tensor:
        r"""1 / noise variance, constant: shape () for shared noise, else (B, \*O)."""
        return self._constant(1 / self._like(outputs), outputs)

    def log_predictive(self, mean: Tensor, var: Tensor, target: Tensor) -> Tensor:
        """Log N(target; mean, var), number by number."""
        return log_normal_density(target, mean, var)


def log_normal_density(x: Tensor, mean: Tensor, var: float | Tensor) -> Tensor:
    """Log N(x; mean, var), number by number."""
    return -0.5 * ((x - mean) ** 2 / var + log(2 * math.pi * var))
