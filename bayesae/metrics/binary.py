"""How good probabilities of binary pixels are: the Brier score and the expected calibration error, also by batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from bayesae.data import check_counts
from bayesae.errors import DataError, ShapeError
from bayesae.metrics._checks import Numbers, check_rows, tensor_of
from bayesae.metrics._sums import PixelSums

__all__ = ["BinaryCalibration", "BinarySums", "brier_score", "ece"]

_PROBABILITIES = "probabilities in [0, 1] and pixels 0 or 1"


def brier_score(mean: Numbers, x: Numbers) -> Tensor:
    r"""Squared error of a probability, :math:`(p - x)^2`, element-wise; smaller is better.

    Args:
        mean: Probability of a 1, in [0, 1].
        x: 0 or 1, of the same shape.

    Returns:
        Of that shape, gradients flow; its mean is the Brier score, which `BinarySums` adds up batch by batch.

    Exact when: always, as a statistic. The score is proper: its expectation is least at the true probability.

    Raises:
        ShapeError: If shapes differ.
        DataError: If there are no pixels, a probability is not in [0, 1], or x is not 0 or 1.

    References:
        | Verification of Forecasts Expressed in Terms of Probability (Brier, 1950)
    """
    mean, x = _of_one_shape(mean, x)
    if bool(_is_wrong(mean, x).any()):
        raise DataError(_PROBABILITIES, "others", "Moments of a Bernoulli have them.")
    return (mean - x) ** 2


class BinaryCalibration(NamedTuple):
    r"""Probabilities in bins, how often a 1 came, and their Brier score; shapes are those pooled, (\*data) by pixel.

    Args:
        predicted: Mean probability of each bin, (E,) or (E, \*data); NaN in empty ones.
        observed: Share of ones, likewise.
        n_pixels: In each bin.
        error: Mean absolute difference of the two, each bin by its pixels: the expected calibration error, () or
            (\*data).
        brier: Mean of `brier_score`, () or (\*data).
    """

    predicted: Tensor
    observed: Tensor
    n_pixels: Tensor
    error: Tensor
    brier: Tensor


def ece(mean: Numbers, x: Numbers, *, n_bins: int = 10, is_pooled: bool = True) -> BinaryCalibration:
    r"""Expected calibration error of probabilities of binary pixels, in bins of equal width.

    .. math:: ECE = \sum_e \frac{n_e}{n} \Big| \bar p_e - \bar x_e \Big|

    Args:
        mean: Probability of a 1, in [0, 1]; (B, \*data), or any shape if pooled.
        x: 0 or 1, of the same shape.
        n_bins: E; a probability on an edge is in the bin below, as in scikit-learn.
        is_pooled: Bins over all pixels; False fills them for every pixel, over rows.

    Returns:
        `BinaryCalibration`, float64; by batches it is what `BinarySums` come to.

    Exact when: as a statistic, always; it goes to 0 as pixels are added if each is 1 with the probability given.
    Biased when: bins hold few pixels: the spread of a share comes on top, about sqrt(2 p (1 - p) / (pi n)) a bin of n.
        A single pixel's bins hold at most B: of 100 rows and ten bins a perfect predictive has an error near 0.1.

    Raises:
        ShapeError: If shapes differ.
        DataError: If there are no pixels, a probability is not in [0, 1], x is not 0 or 1, or ``n_bins`` is below 1.

    References:
        | Obtaining Well Calibrated Probabilities Using Bayesian Binning (Pakdaman Naeini, Cooper, Hauskrecht, 2015)
    """
    mean, x = _of_one_shape(mean, x)
    check_rows(x, is_pooled)
    if is_pooled:
        mean, x = mean.flatten(), x.flatten()
    sums = BinarySums.of(x.shape[1:], n_bins=n_bins, device=x.device)
    return sums.update(mean, x).result(is_pooled=is_pooled)


@dataclass(frozen=True, eq=False)
class BinarySums(PixelSums):
    r"""Sums over rows, pixel by pixel, from which the Brier score and the calibration error of probabilities follow.

    ::

        sums = BinarySums.of((1, 28, 28))
        for x in batches:
            sums = sums.update(predictive.moments(x).mean, x)
        sums.result().brier, sums.result(is_pooled=False).error

    Args:
        sums: (2 + 3 E, \*data), float64: squared errors, values out of range, and each bin's number, probabilities and
            ones.
        n_bins: E, of equal width.

    Exact when: always: results are those of `brier_score` and `ece` on all rows at once, to rounding.
    Cost: a few passes over each batch, on its device, which nothing waits for before `result`; memory of a few batches,
        and of 2 + 3 E numbers a pixel.
    """

    n_bins: int

    @classmethod
    def of(cls, data_shape: Sequence[int], *, n_bins: int = 10, device: torch.device | str = "cpu") -> BinarySums:
        r"""Sums of no rows.

        Args:
            data_shape: Of one row, (\*data).
            n_bins: As of `ece`.
            device: Where rows will be; those of other devices are moved there.

        Returns:
            The sums, all 0.

        Raises:
            DataError: If ``n_bins`` is below 1.
        """
        check_counts(n_bins=n_bins)
        return cls(torch.zeros(2 + 3 * n_bins, *data_shape, dtype=torch.float64, device=device), n_bins)

    def update(self, mean: Numbers, x: Numbers, mask: Numbers | None = None) -> BinarySums:
        r"""The sums with the rows of one batch added; nothing waits for the device.

        Args:
            mean: Probabilities of a 1, (B, \*data); what is not in [0, 1] is found by `result`.
            x: What came, 0 or 1, (B, \*data).
            mask: True where x was observed, (B, \*data); other entries, which may be NaN, do not count.

        Returns:
            New sums.

        Raises:
            ShapeError: If shapes are not (B, \*data), or the mask is not bool.
        """
        mean, x = self._rows(mean, x)
        seen = torch.ones_like(x)
        if mask is not None:
            mask = self._mask(mask, x)
            seen, mean, x = mask.double(), torch.where(mask, mean, 0.0), torch.where(mask, x, 0.0)
        edges = torch.linspace(0, 1, self.n_bins + 1, dtype=x.dtype, device=x.device)[1:-1]
        place, empty = torch.bucketize(mean.contiguous(), edges), x.new_zeros(self.n_bins, *x.shape[1:])
        bins = [empty.scatter_add(0, place, part) for part in (seen, mean, x)]
        whole = torch.stack([((mean - x) ** 2).sum(0), _is_wrong(mean, x).double().sum(0)])
        return replace(self, sums=self.sums + torch.cat([whole, *bins]))

    def result(self, *, is_pooled: bool = True) -> BinaryCalibration:
        r"""Means of what was summed.

        Args:
            is_pooled: Over all pixels; False gives every pixel its own.

        Returns:
            `BinaryCalibration`, float64; NaN for a pixel that was never observed.

        Raises:
            DataError: If there were no values, a probability was not in [0, 1], or a pixel not 0 or 1.
        """
        squares, n_wrong, *rest = self._pooled(is_pooled)
        n_pixels, predicted, observed = torch.stack(rest).unflatten(0, (3, self.n_bins))
        count = n_pixels.sum(0)
        self._check_count(count)
        if bool(n_wrong.sum() > 0):
            raise DataError(_PROBABILITIES, f"{int(n_wrong.sum())} others", "Moments of a Bernoulli have them.")
        error = (predicted - observed).abs().sum(0) / count
        return BinaryCalibration(predicted / n_pixels, observed / n_pixels, n_pixels, error, squares / count)


def _is_wrong(mean: Tensor, x: Tensor) -> Tensor:
    return ~((mean >= 0) & (mean <= 1) & ((x == 0) | (x == 1)))


def _of_one_shape(mean: Numbers, x: Numbers) -> tuple[Tensor, Tensor]:
    mean = tensor_of(mean)
    mean = mean.float() if mean.dtype == torch.bool else mean
    x = tensor_of(x, mean)
    if mean.shape != x.shape:
        raise ShapeError("probabilities and pixels of one shape", f"{tuple(mean.shape)}, {tuple(x.shape)}", "Reshape.")
    if x.numel() == 0:
        raise DataError("at least one pixel", "none", "Give rows.")
    return mean, x
