"""The Gaussian likelihood whose noise scale the network gives."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bayesae.likelihoods.base import Head, log_normal_mean
from bayesae.likelihoods.gaussian import log_normal_density
from bayesae.likelihoods.noise import check_positive

__all__ = ["HeteroscedasticGaussian"]


class HeteroscedasticGaussian(Head):
    r"""Independent Gaussian numbers whose mean and log-scale are both outputs of the network.

    .. math:: x_d \sim \mathcal{N}(m_d, v_d), \qquad (m_d, s_d) = f_d, \qquad v_d = e^{2 s_d} + \sigma_0^2

    Outputs are (..., B, \*D, 2): mean, then log-scale. The Hessian in them is indefinite (a residual larger than the
    scale curves the wrong way), so `output_hessian` is the Fisher information, which is diagonal:

    .. math:: F_{mm} = \frac{1}{v}, \qquad F_{ss} = 2 \Big(\frac{e^{2s}}{v}\Big)^2, \qquad F_{ms} = 0

    Args:
        floor: :math:`\sigma_0`, a scale that no output can undercut, units of x; 1e-3 is a quarter of a grey level of
            256. Without it one number that the network fits exactly has a density without bound.

    Exact when: noise is Gaussian given the code; `normal_moments` in closed form (a log-normal noise variance).
    Biased when: `log_predictive` sees the noise variance by its mean only, where it is uncertain itself.
    Cost: one pass over the numbers.

    Raises:
        DataError: If ``floor`` is not positive and finite.

    References:
        | Estimating the mean and variance of the target probability distribution (Nix and Weigend, 1994)
        | Departure: a floor is added to the variance, rather than a constant to the density.
    """

    n_parameters = 2
    is_fisher = True

    def __init__(self, floor: float = 1e-3) -> None:
        super().__init__()
        check_positive("floor", floor)
        self.floor = float(floor)

    @property
    def arguments(self) -> dict[str, Any]:
        """Constructor arguments."""
        return {"floor": self.floor}

    def log_density(self, outputs: Tensor, target: Tensor) -> Tensor:
        r"""Log-density of every number, nats, (..., B, \*D)."""
        log_var = self._log_var(outputs[..., 1])
        # exp of -log v: no v is formed that could overflow
        return -0.5 * ((target - outputs[..., 0]) ** 2 * torch.exp(-log_var) + log_var + math.log(2 * math.pi))

    def _log_var(self, log_scale: Tensor) -> Tensor:
        return torch.logaddexp(2 * log_scale, log_scale.new_tensor(2 * math.log(self.floor)))

    def distribution(self, outputs: Tensor) -> torch.distributions.Normal:
        """Normal, of every number's own scale."""
        return torch.distributions.Normal(outputs[..., 0], self.variance(outputs).sqrt(), validate_args=False)

    def mean(self, outputs: Tensor) -> Tensor:
        """The first of the two outputs."""
        return outputs[..., 0]

    def variance(self, outputs: Tensor) -> Tensor:
        """Exp(2 s) + floor squared."""
        return torch.exp(2 * outputs[..., 1]) + self.floor**2

    def output_hessian(self, outputs: Tensor) -> Tensor:
        r"""Fisher information, one entry per output, (B, \*D, 2)."""
        log_scale = outputs[..., 1]
        log_var = self._log_var(log_scale)
        return torch.stack([torch.exp(-log_var), 2 * torch.exp(2 * (2 * log_scale - log_var))], -1)

    def normal_moments(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r"""Exact: the mean stays Normal, the noise variance is log-normal; (..., B, \*D) each."""
        noise = log_normal_mean(2 * mean[..., 1], 4 * var[..., 1]) + self.floor**2
        return mean[..., 0], noise, var[..., 0]

    def log_predictive(self, mean: Tensor, var: Tensor, target: Tensor) -> Tensor:
        """Log N(target; mean, var), number by number."""
        return log_normal_density(target, mean, var)
