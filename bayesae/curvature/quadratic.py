"""Carrying J.T H J of every row back through linear and element-wise layers, in whichever form is smaller."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bayesae.curvature.hessian import cholesky

__all__ = ["QuadraticForm", "SharedProduct"]

_BLOCK = 32  # rows of a triangular factor whose leading zeros are left out together


def _compress(factor: Tensor) -> Tensor:
    return torch.linalg.qr(factor, mode="r").R


class SharedProduct:
    """S D W with rows S (R, width) that all data share, slopes D (B, width) and W (width, in), not multiplied out.

    Whoever wants only squared column norms, or the product with few columns more, never needs (B, R, in).

    Args:
        shared: S.
        slope: D.
        weight: W.
        is_triangular: Whether S is upper triangular, so that leading zeros of its rows are left out.
    """

    def __init__(self, shared: Tensor, slope: Tensor, weight: Tensor, is_triangular: bool) -> None:
        self.shared, self.slope, self.weight, self.is_triangular = shared, slope, weight, is_triangular
        self.shape = (len(slope), len(shared), weight.shape[1])

    def _blocks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Some rows of S without their leading zeros, and the part of D W (width, B in) that they multiply."""
        # contiguous, because the product would take over the slopes' strides and be copied
        scaled = (self.slope.mT.contiguous()[:, :, None] * self.weight[:, None]).flatten(1)
        for start in range(0, len(self.shared), _BLOCK):
            first, some = start if self.is_triangular else 0, slice(start, start + _BLOCK)
            yield some, self.shared[some, first:], scaled[first:]

    def square_norms(self, weights: Tensor | None = None) -> Tensor:
        """Of the columns, (B, in), rows weighted by (B, R) or not."""
        total = self.weight.new_zeros(_BLOCK, self.shape[0] * self.shape[2])
        space = torch.empty_like(total)
        roots = None if weights is None else weights.mT.sqrt()[:, :, None]  # (R, B, 1)
        for some, rows, columns in self._blocks():
            work = space[: len(rows)]
            torch.mm(rows, columns, out=work)
            if roots is not None:
                work.unflatten(1, (self.shape[0], self.shape[2])).mul_(roots[some])
            total[: len(rows)].addcmul_(work, work)  # while both are in cache
        return total.sum(0).unflatten(0, (self.shape[0], self.shape[2]))

    def row_norms(self, weights: Tensor) -> Tensor:
        """Squared norms of the rows (B, R), columns weighted by (B, in)."""
        space = self.weight.new_empty(_BLOCK, self.shape[0] * self.shape[2])
        result = self.weight.new_empty(len(self.shared), self.shape[0])
        for some, rows, columns in self._blocks():
            work = space[: len(rows)]
            torch.mm(rows, columns, out=work)
            by_datum = work.square_().unflatten(1, (self.shape[0], self.shape[2])).mul_(weights)
            torch.sum(by_datum, -1, out=result[some])
        return result.mT

    def gram_sum(self, slope: Tensor | None) -> Tensor:
        """Sum over data of D' W^T D S^T S D W D', (in, in); slopes D' (B, in) or None."""
        total = self.weight.new_zeros(self.shape[2], self.shape[2])
        space = self.weight.new_empty(_BLOCK, self.shape[0] * self.shape[2])
        for _, rows, columns in self._blocks():
            work = space[: len(rows)]
            torch.mm(rows, columns, out=work)
            by_datum = work.unflatten(1, (self.shape[0], self.shape[2]))
            flat = (by_datum if slope is None else by_datum.mul_(slope)).flatten(0, 1)
            total.addmm_(flat.mT, flat)
        return total

    def times(self, slope: Tensor, weight: Tensor) -> Tensor:
        """S D W D' W' from the right, for few columns W': (B, R, in')."""
        # data stand in the columns, so that each product is one for the whole batch
        inner = self.weight @ (slope.mT.contiguous()[:, :, None] * weight[:, None]).flatten(1)  # (width, B in')
        inner = self.slope.mT.contiguous()[:, :, None] * inner.unflatten(1, (len(slope), -1))
        return (self.shared @ inner.flatten(1)).unflatten(1, (len(slope), -1)).transpose(0, 1)

    def full(self) -> Tensor:
        """(B, R, in)."""
        moved: Tensor | None = None
        for some, rows, columns in self._blocks():
            moved = columns.new_empty(len(self.shared), columns.shape[1]) if moved is None else moved
            torch.mm(rows, columns, out=moved[some])
        assert moved is not None
        return moved.unflatten(1, (self.shape[0], self.shape[2])).transpose(0, 1)


def _push(
    factor: Tensor | SharedProduct | None, slope: Tensor | None, weight: Tensor, is_triangular: bool
) -> Tensor | SharedProduct:
    """Rows times slope times weight: (R, in) if nothing depends on the row, else (B, R, in)."""
    if isinstance(factor, SharedProduct):
        if slope is not None and weight.shape[1] * 8 <= factor.shape[2]:
            return factor.times(slope, weight)
        factor = factor.full()
    if slope is None:
        return weight if factor is None else factor @ weight
    if factor is None:
        return slope[:, :, None] * weight
    factor = factor[0] if len(factor) == 1 and factor.dim() == 3 else factor
    if factor.shape[-2] < weight.shape[1]:
        return (factor * slope[:, None]) @ weight
    if factor.dim() == 3:
        return torch.bmm(factor, slope[:, :, None] * weight)
    return SharedProduct(factor, slope, weight, is_triangular)


@dataclass(frozen=True)
class QuadraticForm:
    r"""The matrix :math:`M = D S^\top K S D` of every row of a batch, never formed unless it is small.

    Args:
        width: Size of M.
        core: K: () for a multiple of the identity, (B, R) for a diagonal, (B, R, R) for full. A full one is float64: in
            float32 a Gram matrix is positive definite only up to rounding that its Cholesky factor would amplify.
        factor: S: (R, width) if it is the same for every row, (B, R, width), a `SharedProduct`, or None for the
            identity.
        slope: Diagonal of D, (B, width), or None for ones.
        keeps_rows: Whether rows mean something of their own (one an output), so that only the factor may be carried.
        is_triangular: Whether S is upper triangular, as QR leaves it.
        dtype: Of the network, where the core's is another.
    """

    width: int
    core: Tensor
    factor: Tensor | SharedProduct | None = None
    slope: Tensor | None = None
    keeps_rows: bool = False
    is_triangular: bool = False
    dtype: torch.dtype | None = None

    @classmethod
    def of_gram(cls, left: Tensor, right: Tensor) -> QuadraticForm:
        """The form M = left right^T of factors (B, n, R), multiplied out in float64."""
        return cls(left.shape[1], left.double() @ right.double().mT, dtype=left.dtype)

    @property
    def n_rows(self) -> int:
        """R."""
        return self.width if self.factor is None else self.factor.shape[-2]

    @property
    def is_shared(self) -> bool:
        """Whether M is the same for all data."""
        is_fixed = self.factor is None or isinstance(self.factor, Tensor) and self.factor.dim() == 2
        return is_fixed and self.core.dim() == 0 and self.slope is None

    @property
    def rows_before_slope(self) -> Tensor | None:
        """S multiplied out."""
        return self.factor.full() if isinstance(self.factor, SharedProduct) else self.factor

    def diagonal(self) -> Tensor:
        """Diagonal of M, (B, width), or (1, width) if it is the same for every row."""
        core, factor = self.core, self.factor
        if isinstance(factor, SharedProduct) and core.dim() < 3:
            value = core * factor.square_norms() if core.dim() == 0 else factor.square_norms(core)
            return value if self.slope is None else value * self.slope**2
        factor = self.rows_before_slope
        if factor is None:
            value = core.diagonal(dim1=-2, dim2=-1).to(self.dtype) if core.dim() == 3 else core
            value = value.expand(1, self.width) if core.dim() == 0 else value
        elif core.dim() == 0:
            value = core * (factor * factor).sum(-2)  # several times faster than a norm along this axis
            value = value[None] if factor.dim() == 2 else value
        elif core.dim() == 2:
            value = core @ factor**2 if factor.dim() == 2 else (core[:, None] @ factor**2)[:, 0]
        else:
            # a full core was a Gram matrix: rounding can leave -eps where the truth is 0
            value = ((core.to(factor) @ factor) * factor).sum(-2).clamp(min=0)
        return value if self.slope is None else value * self.slope**2

    def gram_sum(self, n_rows: int) -> Tensor:
        """Sum of M over ``n_rows`` rows of data, (width, width)."""
        core, slope = self.core, self.slope
        if isinstance(self.factor, SharedProduct) and core.dim() == 0:
            return core * self.factor.gram_sum(slope)
        factor = self.rows_before_slope
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
            per_row = core if slope is None else core * slope[:, :, None] * slope[:, None, :]
            return per_row.expand(n_rows, -1, -1).sum(0).to(self.dtype)
        rows = self.rows()
        if len(rows) == 1:
            rows = rows.expand(n_rows, -1, -1)
        return rows.flatten(0, 1).mT @ rows.flatten(0, 1)

    def rows(self) -> Tensor:
        """Rows whose Gram matrix is M: (B or 1, R, width)."""
        core, factor = self.core, self.rows_before_slope
        if core.dim() == 3:
            root = cholesky(core).mT.to(self.dtype)
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
        if isinstance(factor, Tensor) and factor.dim() == 2 and rows > n_in:
            if self.core.dim() == 0 and not self.keeps_rows:
                return QuadraticForm(n_in, self.core, compressed(factor), is_triangular=True)
        return QuadraticForm(n_in, self.core, factor, None, self.keeps_rows, dtype=self.dtype)

    def multiplied_out(self) -> QuadraticForm:
        """The same as a full matrix."""
        factor = self.rows_before_slope
        if factor is None:
            return self
        if self.slope is not None:
            factor = factor * self.slope[:, None]
        if self.core.dim() == 0:
            left = self.core * factor
        elif self.core.dim() == 2:
            left = self.core[:, :, None] * factor
        else:
            left = self.core @ factor.double()
        return QuadraticForm.of_gram(*((f[None] if f.dim() == 2 else f).mT for f in (factor, left)))
