"""Carrying J.T H J of every row back through a chain, in whichever form is smaller."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bayesae.curvature.chain import push

__all__ = ["QuadraticForm"]


@dataclass(frozen=True)
class QuadraticForm:
    r"""The matrix :math:`M = D S^\top K S D` of every row of a batch, never formed unless it is small.

    Args:
        width: Size of M.
        core: K: () for a multiple of the identity, (B, R) for a diagonal, (B, R, R) for full.
        factor: S: (R, width) if it is the same for every row, (B, R, width), or None for the identity.
        slope: Diagonal of D, (B, width), or None for ones.
    """

    width: int
    core: Tensor
    factor: Tensor | None = None
    slope: Tensor | None = None

    @property
    def n_rows(self) -> int:
        """R."""
        return self.width if self.factor is None else self.factor.shape[-2]

    def diagonal(self) -> Tensor:
        """Diagonal of M, (B, width), or (1, width) if it is the same for every row."""
        core, factor = self.core, self.factor
        if factor is None:
            value = core.diagonal(dim1=-2, dim2=-1) if core.dim() == 3 else core
            value = value.expand(1, self.width) if core.dim() == 0 else value
        elif core.dim() == 0:
            value = core * (factor**2).sum(-2)
            value = value[None] if factor.dim() == 2 else value
        elif core.dim() == 2:
            value = core @ factor**2 if factor.dim() == 2 else (core[:, None] @ factor**2)[:, 0]
        else:
            # a full core was a Gram matrix: rounding can leave -eps where the truth is 0
            value = ((core @ factor) * factor).sum(-2).clamp(min=0)
        return value if self.slope is None else value * self.slope**2

    def through_slope(self, slope: Tensor) -> QuadraticForm:
        """M for the inputs of an element-wise layer."""
        return replace(self, slope=slope if self.slope is None else self.slope * slope)

    def through_linear(self, weight: Tensor) -> QuadraticForm:
        """M for the inputs of a linear layer, weight (width, in).

        Chooses by operations between carrying the factor on and multiplying it out first; a factor that is
        the same for every row is compressed to at most ``in`` rows.

        Args:
            weight: (width, in).

        Returns:
            The form of size ``in``.
        """
        rows, width, n_in = self.n_rows, self.width, weight.shape[1]
        carry_on = rows * width * n_in + (rows * n_in**2 if rows > n_in else 0)
        multiply_out = rows * width**2 + width**2 * n_in + width * n_in**2
        if rows > width and multiply_out < carry_on:
            return self._multiplied_out().through_linear(weight)
        moved = QuadraticForm(n_in, self.core, push(self.factor, self.slope, weight))
        is_constant = self.core.dim() == 0 and moved.factor is not None and moved.factor.dim() == 2
        return moved._compressed() if is_constant and moved.n_rows > n_in else moved

    def _compressed(self) -> QuadraticForm:
        # QR and not Cholesky of the Gram matrix: dead units make that one singular
        assert self.factor is not None
        return replace(self, factor=torch.linalg.qr(self.factor, mode="r").R)

    def _multiplied_out(self) -> QuadraticForm:
        factor = self.factor
        assert factor is not None
        if self.slope is not None:
            factor = factor * self.slope[:, None]
        if self.core.dim() == 0:
            gram = self.core * (factor.mT @ factor)
        elif self.core.dim() == 2:
            gram = factor.mT @ (self.core[:, :, None] * factor)
        else:
            gram = factor.mT @ (self.core @ factor)
        return QuadraticForm(self.width, gram)
