"""Block-tridiagonal systems, many at once: what a curve's nodes and their neighbours give."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["BlockTridiagonal"]


@dataclass(frozen=True)
class BlockTridiagonal:
    """P symmetric matrices of n x n blocks (Z, Z) with one band beside the diagonal.

    Args:
        diagonal: (P, n, Z, Z), symmetric blocks.
        upper: Block (i, i + 1), (P, n - 1, Z, Z).
    """

    diagonal: Tensor
    upper: Tensor

    def __add__(self, other: BlockTridiagonal) -> BlockTridiagonal:
        """Sum of both."""
        return BlockTridiagonal(self.diagonal + other.diagonal, self.upper + other.upper)

    def scaled(self, factors: Tensor) -> BlockTridiagonal:
        """Each matrix times a number of its own, factors (P,)."""
        each = factors[:, None, None, None]
        return BlockTridiagonal(each * self.diagonal, each * self.upper)

    def solve(self, right: Tensor) -> tuple[Tensor, Tensor]:
        """Solutions by block Cholesky, and which of the matrices are positive definite.

        Args:
            right: (P, n, Z).

        Returns:
            Solutions (P, n, Z), 0 where a matrix is not positive definite, and whether it is, (P,).

        Cost: n factorisations of (P, Z, Z).
        """
        n = self.diagonal.shape[1]
        factors: list[Tensor] = []
        links: list[Tensor] = []
        carried: list[Tensor] = []
        is_definite = torch.ones(len(right), dtype=torch.bool, device=right.device)
        for i in range(n):
            block, vector = self.diagonal[:, i], right[:, i, :, None]
            if i:
                block = block - links[-1].mT @ links[-1]
                vector = vector - links[-1].mT @ carried[-1]
            factor, info = torch.linalg.cholesky_ex(block)
            is_definite = is_definite & (info == 0)
            factors.append(factor)
            carried.append(torch.linalg.solve_triangular(factor, vector, upper=False))
            if i + 1 < n:
                links.append(torch.linalg.solve_triangular(factor, self.upper[:, i], upper=False))
        solution = [torch.linalg.solve_triangular(factors[-1].mT, carried[-1], upper=True)]
        for i in reversed(range(n - 1)):
            rest = carried[i] - links[i] @ solution[-1]
            solution.append(torch.linalg.solve_triangular(factors[i].mT, rest, upper=True))
        stacked = torch.stack(solution[::-1], 1)[..., 0]
        return torch.where(is_definite[:, None, None], stacked, 0.0), is_definite
