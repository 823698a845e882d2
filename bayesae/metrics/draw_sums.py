"""`DrawSums`: scores of predictives that are known by draws, batch by batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from bayesae.errors import NonFiniteError
from bayesae.metrics._checks import Numbers
from bayesae.metrics._sums import PixelSums
from bayesae.metrics.samples import check_draws, crps_between, energy_between, tensors_of_draws

__all__ = ["DrawScores", "DrawSums"]


class DrawScores(NamedTuple):
    r"""What `DrawSums` came to.

    Args:
        n_rows: Of which something was observed, ().
        crps: Mean of `crps_of_draws`, units of x, (), or (\*data) by pixel.
        energy: Mean of `energy_score` over those rows, units of x, (): whole rows have no pixels.
    """

    n_rows: Tensor
    crps: Tensor
    energy: Tensor


@dataclass(frozen=True, eq=False)
class DrawSums(PixelSums):
    r"""Sums over rows from which the mean ranked probability score, by pixel, and the mean energy score follow.

    ::

        sums = DrawSums.of((1, 28, 28), is_fair=True)
        for x in batches:
            draws = predictive_draws(predictive(x, keep_outputs=True), seed=0)
            sums = sums.update(draws, x)
        sums.result().energy, sums.result(is_pooled=False).crps

    Args:
        sums: (4, \*data), float64: numbers observed and their scores; rows and their energy scores, at every pixel.
        is_fair: As of `crps_of_draws`.

    Exact when: always: results are the means of `crps_of_draws` and `energy_score` on all rows at once, to rounding.
    Cost: those of the two scores on each batch, on its device, which nothing waits for before `result`; memory of a
        batch's draws, and of four numbers a pixel.
    """

    is_fair: bool

    @classmethod
    def of(cls, data_shape: Sequence[int], *, is_fair: bool = False, device: torch.device | str = "cpu") -> DrawSums:
        r"""Sums of no rows.

        Args:
            data_shape: Of one row, (\*data).
            is_fair: As of `crps_of_draws`.
            device: Where rows will be; those of other devices are moved there.

        Returns:
            The sums, all 0.
        """
        return cls(torch.zeros(4, *data_shape, dtype=torch.float64, device=device), is_fair)

    def update(self, draws: Numbers, x: Numbers, mask: Numbers | None = None) -> DrawSums:
        r"""The sums with the rows of one batch added; nothing waits for the device.

        Args:
            draws: Of the predictive, noise included, (S, B, \*data); S may change from batch to batch.
            x: What came, (B, \*data).
            mask: True where x was observed, (B, \*data). Other entries, which may be NaN, do not count; the energy
                score of a row is that of the numbers observed, and a row without any counts for none.

        Returns:
            New sums.

        Raises:
            ShapeError: If shapes are not (S, B, \*data) and (B, \*data), one draw is to be fair, or a mask is not bool.
        """
        (x,) = self._rows(x)
        draws, x = tensors_of_draws(draws, x)
        check_draws(draws, x, self.is_fair)
        observed = torch.ones_like(x)
        if mask is not None:
            mask = self._mask(mask, x)
            observed, draws, x = mask.to(x), torch.where(mask, draws, 0.0), torch.where(mask, x, 0.0)
        # entries that are 0 in all draws and in x add nothing to a distance
        is_row = observed.reshape(len(x), -1).amax(1) if observed.numel() else observed.new_zeros(len(x))
        rows = torch.stack([is_row.sum(), energy_between(draws, x, self.is_fair).sum()])
        pixels = torch.stack([observed.sum(0), crps_between(draws, x, self.is_fair).sum(0)])
        added = torch.cat([pixels, rows.reshape(2, *[1] * (x.dim() - 1)).expand_as(pixels)])
        return replace(self, sums=self.sums + added)

    def result(self, *, is_pooled: bool = True) -> DrawScores:
        r"""Means of what was summed.

        Args:
            is_pooled: Ranked probability scores over all pixels; False gives every pixel its own.

        Returns:
            `DrawScores`, float64; NaN for a pixel that was never observed.

        Raises:
            DataError: If there were no values.
            NonFiniteError: If a draw or x was not finite.
        """
        self._check_count(self.sums[0])
        if not bool(torch.isfinite(self.sums).all()):
            raise NonFiniteError("finite sums", "NaN or infinite ones", "Is a draw NaN, or x without its mask?")
        n_rows, energy = self.sums[2:].reshape(2, -1)[:, 0]
        observed, crps = self._pooled(is_pooled)[:2]
        return DrawScores(n_rows, crps / observed, energy / n_rows)
