r"""The Hessian of -log p in the outputs of every row, whatever its form, as the engine reads it.

A likelihood passes a plain tensor: () for a multiple of the identity, or the diagonal (B, \*O); or a `BlockHessian` or
`LowRankHessian` of `bayesae.types`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesae.errors import NonFiniteError, ShapeError
from bayesae.types import BlockHessian, HessianFunction, LowRankHessian, OutputHessian

__all__ = ["Hessian", "HessianFunction", "OutputHessian", "cholesky", "read_hessian"]


def cholesky(matrix: Tensor, what: str | None = None) -> Tensor:
    """Lower factor of positive semi-definite matrices, singular ones included, computed in float64.

    A matrix that is singular up to the rounding of its own dtype gets that much on its diagonal, others nothing.

    Args:
        matrix: (..., n, n).
        what: What it is, to raise unless it is positive semi-definite; None if it is by construction.

    Returns:
        (..., n, n), lower triangular, in the matrix's dtype.

    Raises:
        NonFiniteError: If ``what`` is given and the matrix has a negative direction. (Of a matrix on a GPU torch says
            so, without waiting for it.)
    """
    eps, n, wide = torch.finfo(matrix.dtype).eps, matrix.shape[-1], matrix.double()
    size = torch.linalg.matrix_norm(wide)
    jitter = 4 * eps * size + torch.finfo(wide.dtype).eps * n * size + torch.finfo(wide.dtype).tiny
    first, failed = torch.linalg.cholesky_ex(wide)
    second, still = torch.linalg.cholesky_ex(wide + torch.diag_embed(jitter[..., None].expand(*jitter.shape, n)))
    if what is not None:
        is_sound = ((failed == 0) | (still == 0)).all()
        if matrix.device.type != "cpu":
            torch._assert_async(is_sound, f"{what} must be positive semi-definite")  # pyright: ignore[reportPrivateImportUsage]
        elif not bool(is_sound):
            raise NonFiniteError(f"a positive semi-definite {what}", "one with a negative direction", "Check its sign.")
    return torch.where((failed == 0)[..., None, None], first, second).to(matrix.dtype)


@dataclass(frozen=True)
class Hessian:
    r"""H of one batch, apart into a part that is diagonal or in blocks and dense rows.

    Args:
        shape: Of the outputs, (B, \*O).
        diagonal: (), (B, \*O), or None.
        blocks: Cholesky factors (B, \*rest, g, g) instead of a diagonal.
        axis: Of the group.
        dense: Rows (B, R, \*O) whose Gram matrix is added.
    """

    shape: torch.Size
    diagonal: Tensor | None
    blocks: Tensor | None = None
    axis: int = 1
    dense: Tensor | None = None

    @property
    def n_outputs(self) -> int:
        """O."""
        return self.shape[1:].numel()

    def take(self, rows: slice) -> Hessian:
        """H of some of the data."""

        def some(value: Tensor | None) -> Tensor | None:
            return value if value is None or value.dim() == 0 else value[rows]

        n = len(range(*rows.indices(self.shape[0])))
        return Hessian(
            torch.Size((n, *self.shape[1:])), some(self.diagonal), some(self.blocks), self.axis, some(self.dense)
        )

    def seeds(self, masks: Tensor) -> Tensor:
        r"""Rows whose Gram matrix is H on the outputs that a mask chooses, the dense part left out.

        Args:
            masks: (T, \*O), 0 or 1: outputs that share a row. With blocks the axis of the group has size 1, and each
                mask makes g rows.

        Returns:
            (B or 1, T g, \*O).
        """
        masks = masks[None]
        if self.blocks is not None:
            # row k of a group is column k of its Cholesky factor
            lower = self.blocks.movedim(-2, self.axis).movedim(-1, 1)  # (B, g rows, *O)
            return (lower[:, None] * masks[:, :, None]).flatten(1, 2)
        assert self.diagonal is not None
        scale = self.diagonal.sqrt()
        return masks * (scale if scale.dim() == 0 else scale[:, None])

    def apply(self, v: Tensor) -> Tensor:
        r"""H v for vectors (B or 1, K, \*O)."""
        if self.blocks is not None:
            moved = v.movedim(self.axis + 1, -1)
            lower = self.blocks[:, None]
            result = (lower @ (lower.mT @ moved[..., None]))[..., 0].movedim(-1, self.axis + 1)
        else:
            assert self.diagonal is not None
            result = v * (self.diagonal if self.diagonal.dim() == 0 else self.diagonal[:, None])
        if self.dense is not None:
            dense, flat = self.dense.flatten(2), v.flatten(2)
            result = result + ((flat @ dense.mT) @ dense).reshape(result.shape[:1] + v.shape[1:])
        return result

    def draw(self, n: int, generator: torch.Generator | None, place: tuple[int, slice] | None = None) -> Tensor:
        r"""Random vectors (B, n, \*O) whose second moment is H: signs times a factor of it.

        Args:
            n: A datum.
            generator: Of the signs; torch's own if None.
            place: How many data share the generator and which of them these are, so that each has the signs that it
                has among all; None if these are all.

        Returns:
            The vectors.
        """

        def signs(*size: int) -> Tensor:
            like = self.dense if self.diagonal is None and self.blocks is None else self.diagonal
            like = self.blocks if like is None else like
            assert like is not None
            # signs and not Normal numbers: the same mean, a smaller variance; 32 of them from one random number
            total = math.prod(size)
            shape, whole = ((total + 31) // 32, 1), torch.iinfo(torch.int32)
            words = torch.randint(
                whole.min, whole.max, shape, generator=generator, device=like.device, dtype=torch.int32
            )
            bits = (words >> torch.arange(32, device=like.device, dtype=torch.int32)).bitwise_and_(1)
            return bits.flatten()[:total].reshape(size).to(like.dtype).mul_(2).sub_(1)

        (b, part), o = (self.shape[0], slice(None)) if place is None else place, self.shape[1:]
        if self.blocks is not None:
            flips = signs(b, n, *o)[part].movedim(self.axis + 1, -1)
            result = (self.blocks[:, None] @ flips[..., None])[..., 0].movedim(-1, self.axis + 1)
        else:
            assert self.diagonal is not None
            scale = self.diagonal.sqrt()
            result = signs(b, n, *o)[part] * (scale if scale.dim() == 0 else scale[:, None])
        if self.dense is not None:
            mixed = signs(b, n, self.dense.shape[1])[part] @ self.dense.flatten(2)
            result = result + mixed.reshape(result.shape)
        return result


def read_hessian(given: OutputHessian, outputs: Tensor, mask: Tensor | None) -> Hessian:
    r"""Check what a likelihood passed, and leave out masked outputs.

    Args:
        given: Its form.
        outputs: (B, \*O).
        mask: True where an output counts, as many numbers as outputs, or None.

    Returns:
        H.

    Raises:
        ShapeError: If shapes do not fit the outputs.
    """
    shape, dtype = outputs.shape, outputs.dtype
    keep = None if mask is None else mask.reshape(shape).to(dtype)
    if isinstance(given, BlockHessian):
        values, axis = given.values.to(dtype), given.axis
        rest = [n for i, n in enumerate(shape) if i != axis]
        g = shape[axis] if 0 < axis < len(shape) else -1
        if values.shape != (*rest, g, g):
            raise ShapeError(
                f"blocks of shape {(*rest, g, g)} for axis {axis} of outputs {tuple(shape)}",
                f"{tuple(values.shape)}",
                "Put the group's two axes last, the other outputs in order before them.",
            )
        if keep is not None:
            keep = keep.movedim(axis, -1)
            values = values * keep[..., :, None] * keep[..., None, :]
        return Hessian(shape, None, cholesky(values, "Hessian block"), axis)
    if isinstance(given, LowRankHessian):
        diagonal = outputs.new_zeros(()) if given.diagonal is None else given.diagonal
        dense = given.factor.to(dtype)
        if dense.shape[:1] + dense.shape[2:] != shape:
            raise ShapeError(f"a factor (B, R, *O) for outputs {tuple(shape)}", f"{tuple(dense.shape)}", "Mind R.")
        dense = dense if keep is None else dense * keep[:, None]
        return Hessian(shape, _masked(diagonal.to(dtype), keep, shape), dense=dense)
    return Hessian(shape, _masked(given.to(dtype), keep, shape))


def _masked(diagonal: Tensor, keep: Tensor | None, shape: torch.Size) -> Tensor:
    if diagonal.dim():
        if diagonal.numel() != shape.numel() or diagonal.shape[0] != shape[0]:
            raise ShapeError(
                f"a diagonal () or {tuple(shape)}", f"{tuple(diagonal.shape)}", "Expand it to the shape of the outputs."
            )
        diagonal = diagonal.reshape(shape)
    return diagonal if keep is None else diagonal * keep
