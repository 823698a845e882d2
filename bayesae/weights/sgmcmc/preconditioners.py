"""Scales of each weight that samplers learn in burn-in: diagonal preconditioners."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bayesae.errors import DataError
from bayesae.weights.sgmcmc.base import check_positive

__all__ = ["RMSProp", "ScaleAdaptation"]


@dataclass(frozen=True)
class RMSProp:
    r"""Scales by the root mean square of the gradient.

    .. math:: V \leftarrow \alpha V + (1 - \alpha) (\nabla U / N)^2, \qquad G = 1 / (\lambda + \sqrt V)

    element by element, V (C, P) starting at the first square, or its mean over the weights where that is more. As in
    the paper the gradient is the mean over rows (U is their sum), so that published step sizes carry over.

    Args:
        memory: alpha, in [0, 1).
        damping: lambda, of the unit of the mean gradient: bounds G where a weight has none.
        is_frozen: Whether G stays as burn-in leaves it.

    Exact when: frozen: the chain is that of a linear change of variables, with the stationary law that the sampler
        states for G Lambda.
    Biased when: not frozen, at any step size: the correction :math:`\Gamma_i = \partial G_i / \partial \theta_i` is
        left out, as in the authors' experiments; it grows as the memory shortens.
    Cost: a few operations on (C, P) a step that adapts.

    Raises:
        DataError: If memory is outside [0, 1), or damping not positive.

    References:
        | Preconditioned Stochastic Gradient Langevin Dynamics for Deep Neural Networks (Li et al., 2016)
        | Departure: V is frozen after burn-in by default, and does not start at 0, where G would be largest.
    """

    memory: float = 0.99
    damping: float = 1e-5
    is_frozen: bool = True

    def __post_init__(self) -> None:
        check_positive(damping=self.damping)
        if not 0 <= self.memory < 1:
            raise DataError("0 <= memory < 1", repr(self.memory), "0.99 is the default.")

    def start(self, theta: Tensor) -> dict[str, Tensor]:
        """Before the first gradient: G of ones, V negative for none yet."""
        return {"scales": torch.ones_like(theta), "V": torch.full_like(theta, -1.0)}

    def adapt(self, moving: dict[str, Tensor], gradient: Tensor, n_data: int) -> None:
        """Take in gradients (C, P) of U."""
        square = (gradient / n_data).square_()
        first = square.maximum(square.mean(1, keepdim=True))
        moving["V"] = torch.where(moving["V"] < 0, first, torch.lerp(square, moving["V"], self.memory))
        moving["scales"] = 1 / (moving["V"].sqrt() + self.damping)

    def noise_taken_out(self, moving: dict[str, Tensor]) -> Tensor | None:
        """None: the batch gradient's own noise is left to the friction."""
        return None


@dataclass(frozen=True)
class ScaleAdaptation:
    r"""Springenberg's scales: the second moment of the gradient over a window that finds its own length.

    .. math:: r = \frac{1}{\tau + 1}, \quad \tau \leftarrow \tau - \tau \frac{g^2}{V + 10^{-6}} + 1, \quad
              g \leftarrow g + r (\nabla U - g), \quad V \leftarrow V + r ((\nabla U)^2 - V), \qquad
              G = (V + \lambda)^{-1/2}

    element by element, all starting at 1, in burn-in alone. (With r = 1 / tau, as a public implementation has it, the
    window stays at one gradient for ever in float32: g squared is then V to rounding.) The gradient is that of U, the
    sum over rows. In `SGHMC` a step_size of the square of the paper's :math:`\epsilon` gives the paper's step.

    Args:
        takes_out_noise: Whether the batch gradient's own noise, of variance V as the paper has it, is taken out of
            what is injected: in `SGHMC`
            :math:`2 a \eta G - \eta^2 G^2 V` in place of :math:`2 a \eta G`, not below 0. Right if
            the gradient is mostly noise, as at a mode; with all rows in a batch it has none, and the chain is too cold.
        damping: lambda: bounds G at 1000 by default, where a weight has no gradient.

    Exact when: burn-in is over, as for `RMSProp`, and with ``takes_out_noise=False`` or V the noise's variance.
    Cost: ten operations on (C, P) a step of burn-in.

    Raises:
        DataError: If damping is not positive.

    References:
        | Bayesian Optimization with Robust Bayesian Neural Networks (Springenberg et al., 2016)
        | Departures: the damping; no resampling of momenta or prior precisions, no clipping.
    """

    takes_out_noise: bool = True
    damping: float = 1e-6

    def __post_init__(self) -> None:
        check_positive(damping=self.damping)

    @property
    def is_frozen(self) -> bool:
        """True: it adapts in burn-in alone."""
        return True

    def start(self, theta: Tensor) -> dict[str, Tensor]:
        """Before the first gradient."""
        return {name: torch.ones_like(theta) for name in ("scales", "V", "window", "mean_gradient")}

    def adapt(self, moving: dict[str, Tensor], gradient: Tensor, n_data: int) -> None:
        """Take in gradients (C, P) of U."""
        window, mean, square = moving["window"], moving["mean_gradient"], moving["V"]
        share = 1 / (window + 1)
        window.sub_(window * mean.square() / (square + 1e-6)).add_(1)
        mean.add_((gradient - mean) * share)
        square.add_((gradient.square() - square) * share)
        moving["scales"] = (square + self.damping).rsqrt()

    def noise_taken_out(self, moving: dict[str, Tensor]) -> Tensor | None:
        """V, if it is to be taken out."""
        return moving["V"] if self.takes_out_noise else None
