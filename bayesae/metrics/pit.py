"""Calibration of predictive quantiles by the probability integral transform, for data that pile up on single values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bayesae.data import check_counts
from bayesae.errors import DataError
from bayesae.functional import check_finite

__all__ = ["Atoms", "QuantileCalibration", "pit", "quantile_calibration"]


@dataclass(frozen=True)
class Atoms:
    r"""How data came from a continuous law: clipped to a range, then rounded, so that single values have mass.

    .. math:: x = \operatorname{round}_w(\min(\max(y, low), high)), \qquad y \sim N(\mu, \sigma^2)

    Args:
        low: Least value, units of x: all of the law below it sits there. None: the law is not cut off below.
        high: Greatest value, likewise.
        bin_width: Distance w of the levels to which data are rounded, units of x, such as 1/255 for pixels of 8 bits;
            ``low`` and ``high`` are levels. 0: they are not rounded.

    Raises:
        DataError: If ``low`` is not below ``high`` or the width is negative.
    """

    low: float | None = None
    high: float | None = None
    bin_width: float = 0.0

    def __post_init__(self) -> None:
        is_empty = self.low is not None and self.high is not None and not self.low < self.high
        if is_empty or not self.bin_width >= 0:
            raise DataError("low < high and a bin width of 0 or more", f"{self}", "Pixels of 8 bits: 0, 1, 1/255.")

    def is_outside(self, x: Tensor) -> Tensor:
        """True where x cannot have come from such a law."""
        outside = torch.zeros_like(x, dtype=torch.bool)
        if self.low is not None:
            outside = outside | (x < self.low)
        return outside if self.high is None else outside | (x > self.high)

    def levels_of(self, mean: Tensor, var: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Distribution function just below x and at x, shape of x; both are one number where x is no atom."""
        scale, half = var.sqrt(), self.bin_width / 2
        upto = torch.special.ndtr((x + half - mean) / scale)
        below = torch.special.ndtr((x - half - mean) / scale) if half else upto
        if self.low is not None:
            below = torch.where(x <= self.low, 0.0, below)
        if self.high is not None:
            upto = torch.where(x >= self.high, 1.0, upto)
        return below, upto


CONTINUOUS = Atoms()


def share_below(below: Tensor, upto: Tensor, level: float) -> Tensor:
    """Probability that a uniform number between ``below`` and ``upto`` is at most ``level``, element-wise."""
    spread = ((level - below) / (upto - below)).clamp(0, 1)
    return torch.where(upto > below, spread, (upto <= level).to(spread))


def checked(mean: Tensor, var: Tensor, x: Tensor, atoms: Atoms) -> tuple[Tensor, Tensor, Tensor]:
    """The three in float64, of one shape; raises where no Normal law with data in its range is given."""
    mean, var, x = (part.detach().double() for part in torch.broadcast_tensors(mean, var, x))
    if x.numel() == 0:
        raise DataError("at least one value", "none", "Give rows.")
    check_finite({"(x - mean) / sd": (x - mean) / var.sqrt()}, "standardised errors", "Is a variance 0, or a mean NaN?")
    n_outside = int(atoms.is_outside(x).sum())
    if n_outside:
        raise DataError(f"data in the range of {atoms}", f"{n_outside} outside of it", "Give the data's own range.")
    return mean, var, x


def pit(mean: Tensor, var: Tensor, x: Tensor, *, atoms: Atoms = CONTINUOUS, seed: int = 0) -> Tensor:
    r"""Randomised probability integral transform of Normal predictives.

    .. math:: u = F(x^-) + v\,(F(x) - F(x^-)), \qquad v \sim U(0, 1)

    F is the distribution function of the predictive after clipping and rounding; where x is no atom u = F(x).

    Args:
        mean: Predictive means, units of x.
        var: Predictive variances, units of x squared.
        x: What came, of their common shape.
        atoms: How data came from the Normal law; by default they are it.
        seed: Of v; the caller's generators are not touched.

    Returns:
        u in [0, 1], float64, of the common shape.

    Exact when: x is drawn from the predictive, clipped and rounded as ``atoms`` says: u is then uniform.
    Biased when: x piles up on values that ``atoms`` does not name: u then piles up too.
    Cost: two Normal distribution functions a value.

    Raises:
        DataError: If there are no values, or values outside the atoms' range.
        NonFiniteError: If a standardised error is not finite.

    References:
        | Predictive Model Assessment for Count Data (Czado, Gneiting, Held, 2009)
    """
    mean, var, x = checked(mean, var, x, atoms)
    below, upto = atoms.levels_of(mean, var, x)
    generator = torch.Generator(x.device).manual_seed(seed)
    uniform = torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    return below + uniform * (upto - below)


class QuantileCalibration(NamedTuple):
    """Shares of the data below each predictive quantile.

    Args:
        levels: Nominal levels, (L,).
        observed: Share of values below the predictive quantile of that level, (L,).
        error: Mean absolute difference of the two.
    """

    levels: Tensor
    observed: Tensor
    error: float


def quantile_calibration(
    mean: Tensor, var: Tensor, x: Tensor, *, n_levels: int = 19, atoms: Atoms = CONTINUOUS
) -> QuantileCalibration:
    r"""Calibration of Gaussian predictive quantiles, pooled over all entries.

    The probability integral transform (`pit`) is uniform if and only if the predictive is calibrated on average; its
    distribution function is what is returned. Where x is an atom the random part is averaged over, not drawn: the mass
    of a value is spread evenly over the levels that it takes up.

    Args:
        mean: Predictive means.
        var: Predictive variances.
        x: What came.
        n_levels: Levels 1/(n+1) .. n/(n+1).
        atoms: How data came from the Normal law: clipped or rounded. By default they are it.

    Returns:
        Levels, observed shares and the mean absolute error: 0 is calibrated, 0.25 the most for a symmetric
        predictive that is much too wide or much too narrow.

    Exact when: x is drawn from the predictive, clipped and rounded as ``atoms`` says: the error then goes to 0 as
        entries are added.
    Biased when: x has atoms (pixels that are exactly 0) that ``atoms`` does not name: one value then cannot be spread
        over levels.

    Raises:
        DataError: If there are no values, values outside the atoms' range, or ``n_levels`` is below 1.
        NonFiniteError: If a standardised error is not finite.

    References:
        | Accurate Uncertainties for Deep Learning Using Calibrated Regression (Kuleshov, Fenner, Ermon, 2018)
        | Predictive Model Assessment for Count Data (Czado, Gneiting, Held, 2009)
    """
    check_counts(n_levels=n_levels)
    mean, var, x = checked(mean, var, x, atoms)
    below, upto = atoms.levels_of(mean, var, x)
    levels = torch.arange(1, n_levels + 1, dtype=x.dtype, device=x.device) / (n_levels + 1)
    observed = torch.stack([share_below(below, upto, k / (n_levels + 1)).mean() for k in range(1, n_levels + 1)])
    return QuantileCalibration(levels, observed, float((observed - levels).abs().mean()))
