"""Isotonic recalibration of binary pixels: probabilities mapped to the shares of ones that held-out rows show."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from bayesae.calibration.base import observed_rows
from bayesae.data import check_rises
from bayesae.draws import Moments
from bayesae.errors import DataError, ShapeError, UnsupportedError
from bayesae.functional import check_finite
from bayesae.likelihoods import Bernoulli

__all__ = ["IsotonicProbabilities", "RecalibratedProbabilities"]


@dataclass(frozen=True, eq=False)
class RecalibratedProbabilities:
    r"""A rising map of probabilities, linear between knots and level beyond the first and the last.

    It is no `Recalibrated`, whose mean stays: of a binary pixel the mean is the law, and so the mean is what moves.

    Args:
        predicted: Probabilities of the predictive, rising, (K,).
        observed: What becomes of them, rising, (K,).

    Exact when: as `IsotonicProbabilities`.
    Cost: one search among K knots a pixel.

    Raises:
        DataError: If either does not rise or is no probability, or there are none.
        ShapeError: If they differ in shape, or have several axes.
    """

    predicted: Tensor
    observed: Tensor

    def __post_init__(self) -> None:
        check_rises(predicted=self.predicted, observed=self.observed)
        if self.predicted.dim() != 1 or self.predicted.shape != self.observed.shape:
            got = f"{tuple(self.predicted.shape)}, {tuple(self.observed.shape)}"
            raise ShapeError("knots (K,) of one shape", got, "Take them as a fit gives them.")
        for name in ("predicted", "observed"):
            _check_probabilities(name, getattr(self, name))

    def __call__(self, moments: Moments) -> Moments:
        r"""The moments with the recalibrated probability q as mean and q (1 - q) as variance.

        Noise, code and weights keep their shares of it: all of it is noise where the predictive was certain. The
        standard error becomes half of what the map makes of p ± one standard error.

        Args:
            moments: Of the predictive that was fitted, at any rows.

        Returns:
            New moments, whose `Moments.log_prob` is that of q.

        Raises:
            UnsupportedError: If the likelihood is not Bernoulli.
        """
        _check_bernoulli(moments)
        p, error = moments.mean, moments.standard_error
        q = self.probability(p)
        wide, total = q.double() * (1 - q.double()), moments.total.double()
        shares = {
            name: torch.where(total > 0, getattr(moments, name).double() / total, float(name == "noise"))
            for name in ("noise", "code", "weights")
        }
        if error is not None:
            low, high = (self.probability((p + side * error).clamp(0, 1)) for side in (-1, 1))
            error = torch.where(error.isfinite(), (high - low) / 2, error)
        parts = {name: (share * wide).to(p.dtype) for name, share in shares.items()}
        return replace(moments, mean=q, standard_error=error, **parts)

    def probability(self, p: Tensor) -> Tensor:
        """Recalibrated probabilities.

        Args:
            p: Probabilities of the predictive, of any shape.

        Returns:
            Of that shape, dtype and device.

        Raises:
            DataError: If one is not in [0, 1].
        """
        _check_probabilities("p", p)
        x, y, at = (part.to(p.device, torch.float64) for part in (self.predicted, self.observed, p.detach()))
        above = torch.searchsorted(x, at.contiguous()).clamp(1, max(len(x) - 1, 1))
        above, below = above.clamp(max=len(x) - 1), above - 1
        gap = x[above] - x[below]
        share = torch.where(gap > 0, (at - x[below]) / gap, 0.5).clamp(0, 1)
        return y[below].lerp(y[above], share).to(p.dtype)


@dataclass(frozen=True)
class IsotonicProbabilities:
    r"""Isotonic regression of binary pixels on their predicted probabilities, all pixels pooled.

    .. math:: \min_{g\ \text{rising}}\ \sum_{i, d} \big(x_{id} - g(p_{id})\big)^2
              + \tfrac{\nu}{n} \big(p_{id} - g(p_{id})\big)^2

    Neighbours that do not rise are pooled: each block of probabilities has the share of ones in it. The other
    recalibrations ask for a variance that the mean does not settle; this one is for `likelihoods.Bernoulli`. Of rows
    with missing entries the sum is over the n numbers observed.

    Args:
        n_prior: Numbers :math:`\nu` that the predictive's own probabilities count for, spread evenly over all. 0 is
            isotonic regression itself, which may give 0 or 1 at the ends: more certainty than n numbers can.

    Exact when: x is 1 with probability g(p), of one rising g for all pixels, as calibration rows are added. On the
        calibration rows, with ``n_prior=0``, each block has its share of ones, and no rising map a smaller Brier score.
    Biased when: g changes from pixel to pixel: probabilities are then right on average over pixels only; blocks at the
        ends rest on few ones or zeros; and pixels of one image are dependent: n count for less than n. The shares of
        code and weights are those before the map, which knows the mean of the draws and not each of them.
    Cost: one sort of the numbers on the CPU.

    Raises:
        DataError: If ``n_prior`` is negative or not finite.

    References:
        | Transforming Classifier Scores into Accurate Multiclass Probability Estimates (Zadrozny, Elkan, 2002).
          Departure: linear between blocks, as in scikit-learn, and a prior.
    """

    n_prior: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.n_prior < float("inf"):
            raise DataError("n_prior of 0 or more", f"{self.n_prior}", "It counts numbers.")

    def fit(
        self, moments: Moments, x: Tensor | np.ndarray, mask: Tensor | np.ndarray | None = None
    ) -> RecalibratedProbabilities:
        r"""The map of these rows.

        Args:
            moments: Of the predictive at x, with a Bernoulli likelihood.
            x: Rows that trained nothing, (N, \*data), 0 or 1; grey levels are taken as shares of ones.
            mask: True where x was observed, (N, \*data); other entries, which may be NaN, decide nothing.

        Returns:
            What recalibrates moments of any rows; its knots are on the moments' device.

        Raises:
            DataError: If nothing was observed, or an observed x is not in [0, 1].
            NonFiniteError: If an observed x or its probability is not finite.
            ShapeError: If x or the mask do not fit the moments.
            UnsupportedError: If the likelihood is not Bernoulli.
        """
        from sklearn.isotonic import IsotonicRegression

        _check_bernoulli(moments)
        rows, is_observed = observed_rows(moments, x, mask)
        rows, p = (part.detach().double()[is_observed] for part in (rows, moments.mean))
        check_finite({"x": rows, "mean": p}, "pixels and probabilities", "Give a mask of what is missing.")
        _check_probabilities("x", rows)
        share = self.n_prior / (len(p) + self.n_prior)
        target = rows.lerp(p, share)
        regression = IsotonicRegression(y_min=0.0, y_max=1.0).fit(p.cpu().numpy(), target.cpu().numpy())
        knots = (regression.X_thresholds_, regression.y_thresholds_)
        return RecalibratedProbabilities(*(torch.as_tensor(part, dtype=p.dtype, device=p.device) for part in knots))


def _check_bernoulli(moments: Moments) -> None:
    if not isinstance(moments.likelihood, Bernoulli):
        raise UnsupportedError(
            "moments of a Bernoulli likelihood",
            f"those of {type(moments.likelihood).__name__}",
            "Numbers with a variance of their own are for Isotonic, VarianceScaling or SplitConformal.",
        )


def _check_probabilities(name: str, values: Tensor) -> None:
    n_wrong = int((~((values >= 0) & (values <= 1))).sum())
    if n_wrong:
        raise DataError(f"{name} in [0, 1]", f"{n_wrong} of {values.numel()} that are not", "Give Bernoulli pixels.")
