"""Normal distributions over weights whose covariance is diagonal plus low rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bayesae.curvature import LowRankCovariance
from bayesae.errors import ShapeError
from bayesae.families.base import Normal, check_sign, standard_normal
from bayesae.functional import check_finite
from bayesae.subset import Subset
from bayesae.types import Params

__all__ = ["FactorNormal"]


@dataclass(frozen=True)
class FactorNormal(Normal):
    r"""q(theta) = N(mean, diag(v) + F^T F) over a subset of the weights, the others fixed at the mean.

    What SWAG and factor-covariance variational inference leave; `LowRankNormal` has its *precision* of this form. A
    draw is :math:`v^{1/2} \varepsilon_1 + F^\top \varepsilon_2`.

    Args:
        mean: Every parameter in its own shape.
        var: v of the chosen weights, (P,), not negative, in (units of theta) squared.
        factor: F, (K, P), in units of theta.
        subset: Which weights these are; gives the order.
        is_linearised: Whether predictions should linearise the network around the mean.
        info: What the fit had to say, by name.
        noise: The likelihood's ``state_dict`` where noise was learned along with the weights.

    Exact when: the posterior is Normal and its covariance of this form.
    Cost: 2 K P operations a draw; memory K P.

    Raises:
        ParameterError: If the subset names unknown parameters.
        ShapeError: If ``var`` is not (P,) or ``factor`` not (K, P).
        NonFiniteError: If a number is not finite.
        DataError: If a variance is negative.

    References:
        | Gaussian Variational Approximation with a Factor Covariance Structure (Ong, Nott, Smith, 2018)
    """

    mean: Params
    var: Tensor
    factor: Tensor
    subset: Subset
    is_linearised: bool = False
    info: Mapping[str, float] = field(default_factory=dict)
    noise: Params | None = None

    def __post_init__(self) -> None:
        self.subset.check(self.mean)
        size = len(self.subset)
        if self.var.shape != (size,) or self.factor.dim() != 2 or self.factor.shape[1] != size:
            got = f"{tuple(self.var.shape)} and {tuple(self.factor.shape)}"
            raise ShapeError(f"var ({size},) and factor (K, {size})", got, "Ravel them first.")
        parts = {"var": self.var, "factor": self.factor}
        check_finite(self.mean | parts, "means and variances", "Did the training diverge?")
        check_sign(self.var, "variances", allows_zero=True)

    def covariance(self) -> LowRankCovariance:
        """A diagonal plus a low rank."""
        factor = self._in_shape(self.factor) if len(self.factor) else {}
        return LowRankCovariance(self._in_shape(self.var), factor)

    def _deviation(self, generator: torch.Generator) -> Tensor:
        coarse = standard_normal(self.factor.new_empty(len(self.factor)), generator)
        return self.var.sqrt() * standard_normal(self.var, generator) + coarse @ self.factor

    def _marginal_variance(self) -> Tensor:
        return self.var + (self.factor**2).sum(0)
