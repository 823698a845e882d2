"""`PixelSums`: what metrics that add up batch by batch share."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor

from bayesae.distributed import add_over_ranks
from bayesae.errors import DataError, ShapeError
from bayesae.metrics._checks import Numbers, tensor_of

__all__ = ["PixelSums"]


@dataclass(frozen=True, eq=False)
class PixelSums:
    r"""Sums over rows, pixel by pixel; every other field of a subclass is a setting.

    Args:
        sums: (R, \*data), float64: a row for each statistic.

    Exact when: always, to rounding.
    """

    sums: Tensor

    def merge(self, other: Self) -> Self:
        """The sums of both sets of rows.

        Args:
            other: Of the same settings, on the same device.

        Returns:
            New sums.

        Raises:
            ShapeError: If kinds, settings or shapes differ.
        """
        settings = [field.name for field in fields(self) if field.name != "sums"]
        is_alike = type(other) is type(self) and other.sums.shape == self.sums.shape
        if not is_alike or any(getattr(other, one) != getattr(self, one) for one in settings):
            raise ShapeError("sums of the same settings and data shape", "others", "Start both by the same call.")
        return replace(self, sums=self.sums + other.sums)

    def over_ranks(self) -> Self:
        """The sums of the rows of all ranks, the same on each; these sums where there is one rank."""
        return replace(self, sums=add_over_ranks([self.sums])[0])

    def _rows(self, *parts: Numbers) -> tuple[Tensor, ...]:
        r"""Parts (B, \*data) in float64, on the sums' device and apart from any graph; raises unless shapes are one."""
        tensors = tuple(tensor_of(part).detach().to(self.sums) for part in parts)
        self._check_shapes(*(tensor.shape for tensor in tensors))
        return tensors

    def _mask(self, mask: Numbers, x: Tensor) -> Tensor:
        """Which entries of x were observed, on its device; raises unless the mask is bool and of its shape."""
        found = tensor_of(mask).to(x.device)
        self._check_shapes(x.shape, found.shape)
        if found.dtype != torch.bool:
            raise ShapeError("a mask of dtype bool", f"{found.dtype}", "True where an entry was observed.")
        return found

    def _check_shapes(self, *shapes: torch.Size) -> None:
        found = {tuple(shape) for shape in shapes}
        one = tuple(shapes[0])
        if len(found) > 1 or one[1:] != tuple(self.sums.shape[1:]) or len(one) != self.sums.dim():
            expected = f"({', '.join(map(str, ('B', *self.sums.shape[1:])))}) for all"
            raise ShapeError(expected, f"{sorted(found)}", "Give x as the moments have it.")

    def _pooled(self, is_pooled: bool) -> Tensor:
        """The sums over all pixels, (R,), or as they are."""
        return self.sums.reshape(len(self.sums), -1).sum(1) if is_pooled else self.sums

    @staticmethod
    def _check_count(count: Tensor) -> None:
        if not bool(count.sum() > 0):
            raise DataError("at least one value", "none", "Call update first.")
