"""The Student-t likelihood: noise with outliers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bayesae.errors import DataError
from bayesae.likelihoods.noise import Positive, log, root
from bayesae.likelihoods.scales import ScaledHead

__all__ = ["StudentT"]

_SETTLED = 1e-8  # relative step of a squared scale below which another pass of EM is not worth its time


class StudentT(ScaledHead):
    r"""Independent Student-t numbers around the outputs: residuals with heavy tails.

    .. math:: \log p(x \mid f) = \sum_d \log \frac{\Gamma(\frac{\nu + 1}{2})}{\Gamma(\frac\nu2)
              \sqrt{\nu\pi}\, \sigma_d}
              - \frac{\nu + 1}{2} \log\Big(1 + \frac{(x_d - f_d)^2}{\nu \sigma_d^2}\Big), \qquad
              \operatorname{Var} = \frac{\nu}{\nu - 2} \sigma_d^2

    Its Hessian is negative for an outlier, so `output_hessian` is the Fisher information, a constant:

    .. math:: F = \frac{\nu + 1}{(\nu + 3)\, \sigma_d^2}

    A learned scale is that of maximum likelihood: with weights :math:`w = (\nu + 1) / (\nu + r^2 / \sigma^2)` of the
    residuals r, a pass sets :math:`\sigma^2 \leftarrow \sum w r^2 / \sum w` (parameter-expanded EM, the same fixed
    point as EM's and faster).

    Args:
        df: :math:`\nu`, degrees of freedom, above 2 so that there is a variance. 4 has tails that forgive single bad
            pixels; 30 is close to a Gaussian.
        scale: :math:`\sigma`, units of x (not a standard deviation), a number, or numbers (\*D) with ``per_output``.
            None: learned by `fit_model` or `estimate_noise`.
        per_output: Whether every number of a row has a scale of its own.
        floor: Lower bound of a learned scale, units of x.

    Exact when: residuals follow this law; `normal_moments` always.
    Biased when: a Normal output is added: the predictive keeps df and matches the variance, where the true sum has
        lighter tails.
    Cost: one pass over the numbers; learning, about twenty passes.

    Raises:
        DataError: If ``df`` is not above 2, or ``scale`` or ``floor`` is not positive and finite.
        NotFittedError: If a density is asked for before the scale was learned.
        ShapeError: If there are not as many scales as numbers in a row.

    References:
        | Robust Statistical Modeling Using the t Distribution (Lange, Little, Taylor, 1989)
        | Parameter expansion to accelerate EM: the PX-EM algorithm (Liu, Rubin, Wu, 1998)
    """

    is_fisher = True

    def __init__(
        self, df: float = 4.0, scale: Positive | None = None, *, per_output: bool = False, floor: float = 1e-3
    ) -> None:
        if not (2 < df < math.inf):
            raise DataError("finite degrees of freedom df above 2", repr(df), "A Student-t of df <= 2 has no variance.")
        super().__init__(scale, per_output, floor)
        self.df = float(df)

    @property
    def arguments(self) -> dict[str, Any]:
        """Constructor arguments as JSON can write them; what was learned travels in ``state_dict`` instead."""
        return {"df": self.df} | super().arguments

    def _terms(self, outputs: Tensor, target: Tensor) -> Tensor:
        squares = (target - outputs) ** 2
        weights = (self.df + 1) / (self.df + squares / self._like(squares))
        return torch.stack([weights * squares, weights])

    def update_noise(self, statistics: Tensor) -> bool:
        """One step of EM.

        Args:
            statistics: Sums of `noise_statistics`: weighted squared residuals, and weights.

        Returns:
            Whether the squared scale moved by more than 1e-8 of itself.
        """
        squares, weights = self._totals(statistics, count=1)
        before = torch.as_tensor(self._known, dtype=torch.float64)
        self._store(squares / weights)
        after = torch.as_tensor(self._known, dtype=torch.float64)
        return bool(((after - before).abs() > _SETTLED * after).any())

    def log_density(self, outputs: Tensor, target: Tensor) -> Tensor:
        r"""Log-density of every number, nats, (..., B, \*D)."""
        return self._log_density(target - outputs, self._like(outputs))

    def _log_density(self, residual: Tensor, var: float | Tensor) -> Tensor:
        df = self.df
        constant = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - 0.5 * math.log(df * math.pi)
        return constant - 0.5 * log(var) - 0.5 * (df + 1) * torch.log1p(residual**2 / (df * var))

    def distribution(self, outputs: Tensor) -> torch.distributions.StudentT:
        """Student-t, of this scale."""
        scale = root(self._like(outputs))
        return torch.distributions.StudentT(self.df, outputs, scale, validate_args=False)

    def variance(self, outputs: Tensor) -> Tensor:
        """Scale squared times df / (df - 2), expanded to the outputs."""
        return self._constant(self._like(outputs) * (self.df / (self.df - 2)), outputs).expand(outputs.shape)

    def output_hessian(self, outputs: Tensor) -> Tensor:
        r"""Fisher information, constant: shape () for a shared scale, else (B, \*O)."""
        return self._constant((self.df + 1) / (self.df + 3) / self._like(outputs), outputs)

    def log_predictive(self, mean: Tensor, var: Tensor, target: Tensor) -> Tensor:
        """Log-density of a Student-t of this df with these moments, number by number."""
        return self._log_density(target - mean, var * ((self.df - 2) / self.df))
