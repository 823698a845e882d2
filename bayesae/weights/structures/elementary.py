"""Structures that keep the entries of the curvature as they are: its diagonal, or all of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bayesae.curvature import Linearisation, ggn_block, ggn_diagonal
from bayesae.errors import UnsupportedError
from bayesae.families import DenseNormal, DiagonalNormal
from bayesae.families.base import Normal
from bayesae.functional import check_finite
from bayesae.subset import Subset
from bayesae.types import HessianFunction, Params
from bayesae.weights.structures.base import Eigenvalues, OnePass, Precision, zeros
from bayesae.weights.structures.low_rank import LowRankCurvature

__all__ = ["Dense", "Diagonal"]

_MAX_BYTES = 2**31


@dataclass(frozen=True)
class Diagonal(OnePass):
    """The diagonal, (P,)."""

    def start(self, linearisation: Linearisation, subset: Subset) -> Tensor:
        """Zeros, (P,)."""
        return zeros(linearisation, len(subset))

    def add(
        self,
        sums: Tensor,
        linearisation: Linearisation,
        subset: Subset,
        x: Tensor,
        hessian: HessianFunction,
        mask: Tensor | None,
    ) -> Tensor:
        """The exact diagonal of the batch on top."""
        whole = ggn_diagonal(linearisation, x, hessian, mask=mask)
        return sums + subset.ravel(whole)

    def finish(self, sums: Tensor, subset: Subset, share: float) -> _DiagonalCurvature:
        """The diagonal is its own eigenvalues."""
        return _DiagonalCurvature(sums * share, subset)


@dataclass(frozen=True)
class _DiagonalCurvature(Eigenvalues):
    subset: Subset

    def posterior(self, mean: Params, precision: Precision, temperature: float, info: Mapping[str, float]) -> Normal:
        var = temperature / (self.eigenvalues + precision)
        return DiagonalNormal(mean, var, self.subset, is_linearised=True, info=info)


@dataclass(frozen=True)
class Dense(OnePass):
    """All of it, (P, P)."""

    def start(self, linearisation: Linearisation, subset: Subset) -> Tensor:
        """Zeros, (P, P).

        Args:
            linearisation: The network at its mode.
            subset: The uncertain weights.

        Returns:
            The sum of no row.

        Raises:
            UnsupportedError: If the matrix would take more than 2 GiB.
        """
        size = len(subset)
        if 8 * size**2 > _MAX_BYTES:
            limit = int((_MAX_BYTES / 8) ** 0.5)
            raise UnsupportedError(
                f"at most {limit} weights for a dense curvature",
                f"{size}, a matrix of {8 * size**2 / 2**30:.0f} GiB",
                "Choose fewer with subset=, a layer by name patterns or single weights by Subset(masks), or use "
                "structure='kronecker' or 'low_rank'.",
            )
        return zeros(linearisation, size, size)

    def add(
        self,
        sums: Tensor,
        linearisation: Linearisation,
        subset: Subset,
        x: Tensor,
        hessian: HessianFunction,
        mask: Tensor | None,
    ) -> Tensor:
        """The block of the batch on top."""
        return sums + ggn_block(linearisation, x, hessian, subset.masks, mask=mask)

    def finish(self, sums: Tensor, subset: Subset, share: float) -> _DenseCurvature:
        """Its eigendecomposition; eigenvalues below 0 are rounding."""
        check_finite({"G": sums}, "curvature", "Did the training diverge?")
        total = 0.5 * share * (sums + sums.mT)
        # weights without curvature are eigenvectors themselves; where they are many, LAPACK fails to converge with them
        live = (total.diagonal() > 0).nonzero()[:, 0]
        values, vectors = torch.zeros_like(total.diagonal()), torch.eye(len(total)).to(total)
        values[live], vectors[live[:, None], live] = torch.linalg.eigh(total[live[:, None], live])
        return _DenseCurvature(values.clamp(min=0), vectors, subset)


@dataclass(frozen=True)
class _DenseCurvature(Eigenvalues):
    vectors: Tensor
    subset: Subset

    @cached_property
    def _as_factor(self) -> LowRankCurvature:
        """The same as F.T @ F: eigenvectors do not diagonalise a Lambda of several precisions, Woodbury takes any."""
        factor = self.eigenvalues.sqrt()[:, None] * self.vectors.mT
        return LowRankCurvature(torch.zeros_like(self.eigenvalues), factor, self.subset)

    def effective(self, precision: Precision) -> Tensor:
        return self._as_factor.effective(precision) if isinstance(precision, Tensor) else super().effective(precision)

    def log_det(self, precision: Precision) -> float:
        return self._as_factor.log_det(precision) if isinstance(precision, Tensor) else super().log_det(precision)

    def posterior(self, mean: Params, precision: Precision, temperature: float, info: Mapping[str, float]) -> Normal:
        # not G + lambda I: of a float32 sum the rounding of the largest eigenvalue can exceed lambda
        if isinstance(precision, Tensor):
            total = (self.vectors * self.eigenvalues) @ self.vectors.mT + torch.diag(precision)
            total = 0.5 * (total + total.mT) / temperature
        else:
            total = (self.vectors * ((self.eigenvalues + precision) / temperature)) @ self.vectors.mT
        return DenseNormal(mean, total, self.subset, is_linearised=True, info=info)
