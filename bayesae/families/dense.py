"""Normal distributions over a few weights with any covariance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from bayesae.curvature import DenseCovariance
from bayesae.errors import DataError, ShapeError
from bayesae.families.base import Normal, standard_normal
from bayesae.functional import check_finite
from bayesae.subset import Subset
from bayesae.types import Params

__all__ = ["DenseNormal"]

_ASYMMETRY = 1e-5  # of the largest entry: rounding of a float32 sum, no mistake


@dataclass(frozen=True)
class DenseNormal(Normal):
    r"""q(theta) = N(mean, precision^-1) over a subset of the weights, the others fixed at the mean.

    .. math:: \theta = \text{mean} + L^{-\top} \varepsilon, \qquad \Lambda = L L^\top

    The precision and not the covariance is given, because it is what a curvature and a prior add up to, and a prior
    keeps it away from singular. All of its algebra is float64.

    Args:
        mean: Every parameter in its own shape.
        precision: Of the chosen weights, (P, P), symmetric, in 1 / (units of theta) squared.
        subset: Which weights these are; gives the order of rows.
        is_linearised: Whether predictions should linearise the network around the mean.
        info: What the fit had to say, by name.

    Exact when: the posterior is Normal.
    Cost: P^3 / 3 operations once and P^2 a draw; memory 2 P^2, and P^2 more from the first covariance on.

    Raises:
        ParameterError: If the subset names unknown parameters.
        ShapeError: If the precision is not (P, P).
        NonFiniteError: If a number is not finite.
        DataError: If the precision is not symmetric and positive definite.
    """

    mean: Params
    precision: Tensor
    subset: Subset
    is_linearised: bool = False
    info: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.subset.check(self.mean)
        size = len(self.subset)
        if self.precision.shape != (size, size):
            got = f"{tuple(self.precision.shape)}"
            raise ShapeError(f"a precision of shape ({size}, {size})", got, "Use the order of the subset's ravel.")
        check_finite(self.mean | {"precision": self.precision}, "means and precisions", "Did the training diverge?")
        if size:
            asymmetry = float((self.precision - self.precision.mT).abs().max() / self.precision.abs().max())
            if not asymmetry <= _ASYMMETRY:
                got = f"one that differs from its transpose by {asymmetry:.1g} of its largest entry"
                raise DataError("a symmetric precision", got, "Is the order of rows that of columns?")
        _ = self._root  # a precision that is none shows here and not in the first draw

    @cached_property
    def _root(self) -> Tensor:
        """L, lower."""
        root, info = torch.linalg.cholesky_ex(self.precision.double())
        if int(info):
            got = f"a leading minor of {int(info)} rows that is not"
            raise DataError(
                "a positive definite precision", got, "Raise the prior's precision, or choose fewer weights."
            )
        return root

    @cached_property
    def _matrix(self) -> Tensor:
        return torch.cholesky_inverse(self._root)

    def covariance(self) -> DenseCovariance:
        """The inverse of the precision, float64; inverted once."""
        return DenseCovariance(self.subset.masks, self._matrix)

    def _deviation(self, generator: torch.Generator) -> Tensor:
        noise = standard_normal(self._root.new_empty(len(self._root), 1), generator)
        return torch.linalg.solve_triangular(self._root.mT, noise, upper=True).squeeze(1)

    def _marginal_variance(self) -> Tensor:
        return self._matrix.diagonal()
