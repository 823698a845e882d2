"""`PixelSums`: what metrics that add up batch by batch share."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Self

from torch import Tensor

from bayesae.distributed import add_over_ranks
from bayesae.errors import DataError, ShapeError

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
            ShapeError: If settings or shapes differ.
        """
        settings = [field.name for field in fields(self) if field.name != "sums"]
        if other.sums.shape != self.sums.shape or any(getattr(other, one) != getattr(self, one) for one in settings):
            raise ShapeError("sums of the same settings and data shape", "others", "Start both by the same call.")
        return replace(self, sums=self.sums + other.sums)

    def over_ranks(self) -> Self:
        """The sums of the rows of all ranks, the same on each; these sums where there is one rank."""
        return replace(self, sums=add_over_ranks([self.sums])[0])

    def _check_rows(self, *parts: Tensor | None) -> None:
        r"""Raise unless all parts that there are have one shape, (B, \*data)."""
        shapes = {tuple(part.shape) for part in parts if part is not None}
        one = next(iter(shapes))
        if len(shapes) > 1 or one[1:] != tuple(self.sums.shape[1:]) or len(one) != self.sums.dim():
            expected = f"(B, {', '.join(map(str, self.sums.shape[1:]))}) for all"
            raise ShapeError(expected, f"{sorted(shapes)}", "Give x as the moments have it.")

    def _pooled(self, is_pooled: bool) -> Tensor:
        """The sums over all pixels, (R,), or as they are."""
        return self.sums.reshape(len(self.sums), -1).sum(1) if is_pooled else self.sums

    @staticmethod
    def _check_count(count: Tensor) -> None:
        if not bool(count.sum() > 0):
            raise DataError("at least one value", "none", "Call update first.")
