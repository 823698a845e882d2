"""Normal distributions over independent weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bayesae.curvature import DiagonalCovariance
from bayesae.errors import ShapeError
from bayesae.families.base import Normal, check_sign, standard_normal
from bayesae.functional import check_finite
from bayesae.subset import Subset
from bayesae.types import Params

__all__ = ["DiagonalNormal"]


@dataclass(frozen=True)
class DiagonalNormal(Normal):
    r"""q(theta) = N(mean, diag(var)) over a subset of the weights, the others fixed at the mean.

    Args:
        mean: Every parameter in its own shape.
        var: Variances of the chosen weights, (P,), units of theta squared.
        subset: Which weights these are.
        is_linearised: Whether predictions should linearise the network around the mean.
        info: What the fit had to say, by name.
        noise: The likelihood's ``state_dict`` where noise was learned along with the weights.

    Exact when: the posterior is Normal and the weights are independent under it.
    Cost: memory of two sets of weights; a draw costs P random numbers.

    Raises:
        ParameterError: If the subset names unknown parameters.
        ShapeError: If ``var`` is not (P,).
        NonFiniteError: If a mean or a variance is not finite.
        DataError: If a variance is negative.
    """

    mean: Params
    var: Tensor
    subset: Subset
    is_linearised: bool = False
    info: Mapping[str, float] = field(default_factory=dict)
    noise: Params | None = None

    def __post_init__(self) -> None:
        self.subset.check(self.mean)
        if self.var.shape != (len(self.subset),):
            raise ShapeError(f"var of shape ({len(self.subset)},)", f"{tuple(self.var.shape)}", "Ravel it first.")
        check_finite(self.mean | {"var": self.var}, "means and variances", "Did the training diverge?")
        check_sign(self.var, "variances", allows_zero=True)

    def covariance(self) -> DiagonalCovariance:
        """Independent weights."""
        return DiagonalCovariance(self._in_shape(self.var))

    def _deviation(self, generator: torch.Generator) -> Tensor:
        # in the network's own dtype: nothing is solved or rotated here
        var = self.var.to(self.subset.ravel(self.mean))
        return var.sqrt() * standard_normal(var, generator)

    def _marginal_variance(self) -> Tensor:
        return self.var
