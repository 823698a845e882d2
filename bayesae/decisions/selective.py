"""Answers for some rows only: how the error falls as uncertain rows are left out, and a rule that keeps it low."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bayesae.data import as_tensor
from bayesae.errors import DataError, ShapeError
from bayesae.functional import check_finite

__all__ = ["RiskCoverage", "SelectiveThreshold", "risk_coverage", "selective_threshold"]


class RiskCoverage(NamedTuple):
    """The mean error of the least uncertain rows, for every share of them.

    Args:
        coverage: Share of rows that are answered, 1/N to 1, (N,).
        risk: Mean error of these, (N,), units of the errors.
        area: Mean risk over all coverages (AURC).
        excess: ``area`` less that of the best order, by the errors themselves: 0 is an order without a mistake.
    """

    coverage: Tensor
    risk: Tensor
    area: float
    excess: float


def risk_coverage(errors: Tensor | np.ndarray, scores: Tensor | np.ndarray) -> RiskCoverage:
    r"""How well a score says which rows to leave out: the risk-coverage curve and the area under it.

    .. math:: r_k = \tfrac1k \sum_{i=1}^k \ell_{(i)}, \qquad \mathrm{AURC} = \tfrac1N \sum_{k=1}^N r_k

    with the errors in order of rising scores. Rows of equal scores count with their mean error, which is the
    expectation over their orders.

    Args:
        errors: What an answer costs, (N,): 0 and 1 (bool will do) for right and wrong, or any finite number.
        scores: Uncertainty of each row, (N,); higher = left out first.

    Returns:
        `RiskCoverage`, in float64 where the errors are. A score without information has an area of the mean error.

    Exact when: always, as a statistic.
    Cost: two sorts.

    Raises:
        ShapeError: If errors and scores are not one number a row.
        DataError: If there are no rows.
        NonFiniteError: If a number is not finite.

    References:
        | Selective Classification for Deep Neural Networks (Geifman, El-Yaniv, 2017)
        | Bias-Reduced Uncertainty Estimation for Deep Neural Classifiers (Geifman, Uziel, El-Yaniv, 2019)
    """
    errors, scores = _checked(errors, scores)
    _, group, count = scores.unique(return_inverse=True, return_counts=True)
    mean = torch.zeros(len(count), dtype=torch.float64, device=errors.device).index_add_(0, group, errors) / count
    n_rows = torch.arange(1, len(errors) + 1, dtype=torch.float64, device=errors.device)
    risk = mean.repeat_interleave(count).cumsum(0) / n_rows
    best = errors.sort().values.cumsum(0) / n_rows
    return RiskCoverage(n_rows / len(errors), risk, float(risk.mean()), float((risk - best).mean()))


class SelectiveThreshold(NamedTuple):
    """Answer the rows whose score is *below* the threshold.

    Args:
        threshold: Infinite if every row may be answered.
        coverage: Share of the calibration rows that are answered.
        risk: Their mean error; what the rule promises is the level that was asked for, not this.
    """

    threshold: float
    coverage: float
    risk: float


def selective_threshold(
    errors: Tensor | np.ndarray,
    scores: Tensor | np.ndarray,
    *,
    risk: float,
    confidence: float = 0.95,
    n_thresholds: int = 20,
) -> SelectiveThreshold:
    r"""The rule that answers most rows among those whose risk is below a level, with confidence.

    .. math:: P\big( \mathbb{E}[\ell \mid score < \hat t\,] \le r \big) \ge 1 - \delta

    over calibration sets. Thresholds stand at fixed numbers k of calibration rows. The k rows below a threshold
    are independent draws of all that will be answered by it, so that :math:`\mathbb{E}[\ell \mid score < t] > r` is
    rejected where the exact binomial tail :math:`P(\mathrm{Bin}(k, r) \le k \hat r)` is at most :math:`\delta` over the
    number of thresholds. That is to say, where the Clopper-Pearson bound is at most r. For errors in [0, 1] that are no
    bool it is the smaller of Hoeffding's and Bentkus's tails,

    .. math:: \exp(-k\, \mathrm{KL}(\hat r \,\|\, r)) \quad\text{and}\quad
              e\, P(\mathrm{Bin}(k, r) \le \lceil k \hat r \rceil)

    Args:
        errors: Of calibration rows that trained neither network nor score, (N,): True where wrong, or in [0, 1] (divide
            by the largest that can occur).
        scores: Uncertainty of each row, (N,); higher = left out first.
        risk: r, the mean error that answered rows may have, in (0, 1).
        confidence: :math:`1 - \delta`, in (0, 1).
        n_thresholds: How many coverages are tried, evenly from the smallest that could be shown to be safe up to 1.
            More are finer, and each is tested more strictly.

    Returns:
        `SelectiveThreshold`.

    Exact when: rows are independent, new ones come from the same law, and their scores from the same weight draws (give
        the predictive one seed): the promise holds for every N and every score. (Scores may have ties.)
    Biased when: never too bold, but cautious: the confidence is shared out evenly over the thresholds.
    Cost: one sort.

    Raises:
        ShapeError: If errors and scores are not one number a row.
        DataError: If a level is not in (0, 1), there are fewer than two thresholds, an error is not in [0, 1], there
            are too few rows for the promise even if none were wrong, or no threshold can be shown to keep it.
        NonFiniteError: If a number is not finite.

    References:
        | Selective Classification for Deep Neural Networks (Geifman, El-Yaniv, 2017)
        | Distribution-Free, Risk-Controlling Prediction Sets (Bates, Angelopoulos, Lei, Malik, Jordan, 2021)
        | Departure: a fixed grid of thresholds in place of a binary search, whose path depends on the errors; the row
          at the threshold is not counted, so that those below it are independent.
    """
    for name, value in (("risk", risk), ("confidence", confidence)):
        if not 0 < value < 1:
            raise DataError(f"a {name} in (0, 1)", f"{value}", "0.05 is 5 %.")
    if n_thresholds < 2:
        raise DataError("at least two thresholds", f"n_thresholds={n_thresholds}", "One of them answers every row.")
    errors = as_tensor(errors)
    is_binary = errors.dtype == torch.bool
    errors, scores = _checked(errors, scores)
    low, high = float(errors.min()), float(errors.max())
    if low < 0 or high > 1:
        raise DataError("errors in [0, 1]", f"{low:.4g} to {high:.4g}", "Divide by the largest error that can occur.")
    level = (1 - confidence) / n_thresholds
    n, smallest = len(errors), math.ceil(math.log(level) / math.log1p(-risk))
    if smallest > n:
        raise DataError(
            f"at least {smallest} calibration rows for a risk of {risk:g} with confidence {confidence:g}",
            f"{n}",
            "So few would not show it even if none were wrong: give more, or ask for less.",
        )
    order = scores.argsort()
    ordered = torch.cat([scores[order], scores.new_tensor([math.inf])])
    sums = torch.cat([errors.new_zeros(1), errors[order].cumsum(0)])
    thresholds = ordered[torch.linspace(smallest, n, n_thresholds, dtype=torch.float64).round().long()]
    n_below = torch.searchsorted(ordered, thresholds)  # fewer than planned where scores are tied
    tail = _tail(sums[n_below].cpu().numpy(), n_below.cpu().numpy(), risk, is_binary)
    passing = np.flatnonzero(tail <= level)
    if len(passing) == 0:
        lowest = float((sums[n_below] / n_below)[n_below > 0].min())  # the last threshold has all rows below it
        raise DataError(
            f"a threshold below which the risk is at most {risk:g} with confidence {confidence:g}",
            f"none: the lowest mean error of those tried is {lowest:.4g}",
            "Give more calibration rows, a score that tells errors better, or ask for less.",
        )
    best = int(passing[n_below.cpu().numpy()[passing].argmax()])
    count = int(n_below[best])
    return SelectiveThreshold(float(thresholds[best]), count / n, float(sums[count]) / count)


def _tail(sums: np.ndarray, counts: np.ndarray, risk: float, is_binary: bool) -> np.ndarray:
    """Bound of the chance that as few errors are seen if the risk is ``risk``; 1 where there are no rows."""
    from scipy.special import bdtr, rel_entr

    # sums of shares may be a rounding above a whole number
    binomial = bdtr(np.ceil(sums - 1e-9), np.maximum(counts, 1), risk)
    if not is_binary:
        mean = np.minimum(sums / np.maximum(counts, 1), risk)
        hoeffding = np.exp(-counts * (rel_entr(mean, risk) + rel_entr(1 - mean, 1 - risk)))
        binomial = np.minimum(hoeffding, math.e * binomial)
    return np.where(counts > 0, binomial, 1.0)


def _checked(errors: Tensor | np.ndarray, scores: Tensor | np.ndarray) -> tuple[Tensor, Tensor]:
    """Both in float64 where the errors are: one finite number a row each, of at least one row."""
    errors, scores = as_tensor(errors), as_tensor(scores)
    if errors.dim() != 1 or errors.shape != scores.shape:
        raise ShapeError(
            "errors and scores (N,)", f"{tuple(errors.shape)} and {tuple(scores.shape)}", "One of each a row."
        )
    if len(errors) == 0:
        raise DataError("at least one row", "none", "Score some rows.")
    errors, scores = errors.detach().double().contiguous(), scores.detach().to(errors.device).double().contiguous()
    check_finite({"errors": errors, "scores": scores}, "errors and scores", "Look at those rows.")
    return errors, scores
