"""Carrying J.T H J of every row back through linear and element-wise layers, in whichever form is smaller."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bayesae.curvature.hessian import cholesky

__all__ = ["QuadraticForm"]

_BLOCK = 32  # rows of a triangular factor whose leading zeros are left out together


def _compress(factor: Tensor) -> Tensor:
    return torch.linalg.qr(factor, mode="r").R


def _push(factor: Tensor | None, slope: Tensor | None, weight: Tensor, is_triangular: bool) -> Tensor:
    """Rows times slope times weight: (R, in) if nothing depends on the row, else (B, R, in)."""
    if slope is None:
        return weight if factor is None else factor @ weight
    if factor is None:
        return slope[:, :, None] * weight
    factor = factor[0] if len(factor) == 1 and factor.dim() == 3 else factor
    if factor.shape[-2] < weight.shape[1]:
        return (factor * slope[:, None]) @ weight
    if factor.dim() == 3:
        return torch.bmm(factor, slope[:, :, None] * weight)
    # rows that all data share: one product for the whole batch
    scaled = (slope.mT[:, :, None] * weight[:, None]).flatten(1)  # (width, B in)
    moved = scaled.new_empty(len(factor), scaled.shape[1])
    size = _BLOCK if is_triangular else len(factor)
    for start in range(0, len(factor), size):
        first, some = start if is_triangular else 0, slice(start, start + size)
        torch.mm(factor[some, first:], scaled[first:], out=moved[some])
    return moved.unflatten(1, (len(slope), -1)).transpose(0, 1)


@dataclass(frozen=True)
class QuadraticForm:
    r"""The matrix :math:`M = D S^\top K S D` of every row of a batch, never formed unless it is small.

    Args:
        width: Size of M.
        core: K: () for a multiple of the identity, (B, R) for a diagonal, (B, R, R) for full.
        factor: S: (R, width) if it is the same for every row, (B, R, width), or None for the identity.
        slope: Diagonal of D, (B, width), or None for ones.
        keeps_rows: Whether rows mean something of their own (one an output), so that only the factor may be carried.
        is_triangular: Whether S is upper triangular, as QR leaves it.
    """

    width: int
    core: Tensor
    factor: Tensor | None = None
    slope: Tensor | None = None
    keeps_rows: bool = False
    is_triangular: bool = False

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
            value = core * (factor * factor).sum(-2)  # several times faster than a norm along this axis
            value = value[None] if factor.dim() == 2 else value
        elif core.dim() == 2:
            value = core @ factor**2 if factor.dim() == 2 else (core[:, None] @ factor**2)[:, 0]
        else:
            # a full core was a Gram matrix: rounding can leave -eps where the truth is 0
            value = ((core @ factor) * factor).sum(-2).clamp(min=0)
        return value if self.slope is None else value * self.slope**2

    def gram_sum(self, n_rows: int) -> Tensor:
        """Sum of M over ``n_rows`` rows of data, (width, width)."""
        core, factor, slope = self.core, self.factor, self.slope
        if core.dim() == 0 and (factor is None or factor.dim() == 2):
            # one matrix for all rows; only the slopes differ, and their outer products add up
            outer = core.new_tensor(float(n_rows)) if slope is None else slope.mT @ slope
            if factor is None:
                weight = outer.expand(self.width) if slope is None else outer.diagonal()
                return torch.diag(core * weight)
            return core * (factor.mT @ factor) * outer
        if factor is None and core.dim() == 2:
            return torch.diag((core if slope is None else core * slope**2).sum(0))
        if factor is None and core.dim() == 3:
            return (core if slope is None else core * slope[:, :, None] * slope[:, None, :]).sum(0)
        rows = self.rows()
        if len(rows) == 1:
            rows = rows.expand(n_rows, -1, -1)
        return rows.flatten(0, 1).mT @ rows.flatten(0, 1)

    def rows(self) -> Tensor:
        """Rows whose Gram matrix is M: (B or 1, R, width)."""
        core, factor = self.core, self.factor
        if core.dim() == 3:
            root = cholesky(core).mT
            rows = root if factor is None else root @ factor
        elif factor is None:
            rows = torch.diag_embed(core.sqrt().expand(1, self.width) if core.dim() == 0 else core.sqrt())
        else:
            rows = factor * (core.sqrt() if core.dim() == 0 else core.sqrt()[:, :, None])
            rows = rows[None] if rows.dim() == 2 else rows
        return rows if self.slope is None else rows * self.slope[:, None]

    def through_slope(self, slope: Tensor) -> QuadraticForm:
        """M for the inputs of an element-wise layer."""
        return replace(self, slope=slope if self.slope is None else self.slope * slope)

    def through_linear(self, weight: Tensor, compressed: Callable[[Tensor], Tensor] = _compress) -> QuadraticForm:
        """M for the inputs of a linear layer, weight (width, in).

        Chooses by operations between carrying the factor on and multiplying it out first; a factor that is
        the same for every row is compressed to at most ``in`` rows.

        Args:
            weight: (width, in).
            compressed: From a factor (R, width) to an equivalent one of width rows; by QR by default.

        Returns:
            The form of size ``in``.
        """
        rows, width, n_in = self.n_rows, self.width, weight.shape[1]
        carry_on = rows * width * n_in + (rows * n_in**2 if rows > n_in else 0)
        multiply_out = rows * width**2 + width**2 * n_in + width * n_in**2
        if rows > width and multiply_out < carry_on and not self.keeps_rows:
            return self.multiplied_out().through_linear(weight, compressed)
        factor = _push(self.factor, self.slope, weight, self.is_triangular)
        moved = QuadraticForm(n_in, self.core, factor, None, self.keeps_rows)
        if self.core.dim() == 0 and factor.dim() == 2 and moved.n_rows > n_in and not self.keeps_rows:
            return replace(moved, factor=compressed(factor), is_triangular=True)
        return moved

    def multiplied_out(self) -> QuadraticForm:
        """The same as a full matrix."""
        factor = self.factor
        if factor is None:
            return self
        if self.slope is not None:
            factor = factor * self.slope[:, None]
        if self.core.dim() == 0:
            gram = self.core * (factor.mT @ factor)
        elif self.core.dim() == 2:
            gram = factor.mT @ (self.core[:, :, None] * factor)
        else:
            gram = factor.mT @ (self.core @ factor)
        return QuadraticForm(self.width, gram if gram.dim() == 3 else gram[None])
