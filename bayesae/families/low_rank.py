"""Normal distributions over weights whose precision is diagonal plus low rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from bayesae.curvature import LowRankCovariance
from bayesae.errors import ShapeError
from bayesae.families.base import Normal, check_sign, standard_normal
from bayesae.functional import check_finite
from bayesae.subset import Subset
from bayesae.types import Params

__all__ = ["LowRankNormal"]


@dataclass(frozen=True)
class LowRankNormal(Normal):
    r"""q(theta) = N(mean, (diag(d) + F^T F)^-1) over a subset of the weights, the others fixed at the mean.

    .. math:: \Sigma = D^{-1} - W^\top W, \qquad W = R^{-1} F D^{-1}, \qquad R R^\top = I + F D^{-1} F^\top

    by Woodbury. A draw is :math:`\Sigma y` of :math:`y = D^{1/2} \varepsilon_1 + F^\top \varepsilon_2`, whose
    covariance is the precision: exact, and no (P, P) matrix.

    Args:
        mean: Every parameter in its own shape.
        diagonal: d of the chosen weights, (P,), positive, in 1 / (units of theta) squared.
        factor: F, (K, P), in 1 / (units of theta).
        subset: Which weights these are; gives the order.
        is_linearised: Whether predictions should linearise the network around the mean.
        info: What the fit had to say, by name.

    Exact when: the posterior is Normal and its precision of this form.
    Cost: K^2 P operations once and 4 K P a draw; memory 2 K P. Output variances are computed in float64.

    Raises:
        ParameterError: If the subset names unknown parameters.
        ShapeError: If ``diagonal`` is not (P,) or ``factor`` not (K, P).
        NonFiniteError: If a number is not finite.
        DataError: If an entry of the diagonal is not positive.
    """

    mean: Params
    diagonal: Tensor
    factor: Tensor
    subset: Subset
    is_linearised: bool = False
    info: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.subset.check(self.mean)
        size = len(self.subset)
        if self.diagonal.shape != (size,) or self.factor.dim() != 2 or self.factor.shape[1] != size:
            got = f"{tuple(self.diagonal.shape)} and {tuple(self.factor.shape)}"
            raise ShapeError(f"diagonal ({size},) and factor (K, {size})", got, "Ravel them first.")
        parts = {"diagonal": self.diagonal, "factor": self.factor}
        check_finite(self.mean | parts, "means and precisions", "Did the training diverge?")
        check_sign(self.diagonal, "diagonal of the precision", allows_zero=False)

    @cached_property
    def _removed(self) -> Tensor:
        """W, (K, P): how far the low rank part takes the covariance below 1 / d."""
        diagonal, factor = self.diagonal.double(), self.factor.double()
        scaled = factor / diagonal
        core = torch.eye(len(factor), dtype=factor.dtype, device=factor.device) + scaled @ factor.mT
        return torch.linalg.solve_triangular(torch.linalg.cholesky(core), scaled, upper=False)

    def covariance(self) -> LowRankCovariance:
        """The inverse of the precision: a diagonal less a low rank."""
        removed = self._in_shape(self._removed) if len(self.factor) else {}
        return LowRankCovariance(self._in_shape(1 / self.diagonal), removed, sign=-1)

    def _point(self) -> Params:
        # along the factor the covariance is a difference that float32 loses: 1 / d less nearly all of it
        return {name: leaf.double() for name, leaf in self.mean.items()}

    def _deviation(self, generator: torch.Generator) -> Tensor:
        diagonal, factor = self.diagonal.double(), self.factor.double()
        coarse = standard_normal(factor.new_empty(len(factor)), generator)
        y = diagonal.sqrt() * standard_normal(diagonal, generator) + coarse @ factor
        return y / diagonal - (self._removed @ y) @ self._removed

    def _marginal_variance(self) -> Tensor:
        # never below 0 but by rounding
        return (1 / self.diagonal.double() - (self._removed**2).sum(0)).clamp(min=0)
