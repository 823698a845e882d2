"""How well scores tell strange rows from familiar ones.

scikit-learn is imported where it is called: it takes longer to load than the rest of the library.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bayesae.errors import DataError, NonFiniteError, ShapeError
from bayesae.metrics._checks import Numbers, check_resampling, tensor_of, values_of

__all__ = ["Interval", "aupr", "auroc", "bootstrap_interval", "fpr_at_tpr"]


def labelled(familiar: Numbers, strange: Numbers) -> tuple[np.ndarray, np.ndarray]:
    """Labels (0 familiar, 1 strange) and scores of both kinds, finite and none empty."""
    kinds = values_of(familiar), values_of(strange)
    _check_both(*kinds)
    values = torch.cat([kind.double() for kind in kinds]).numpy()
    if not np.isfinite(values).all():
        raise NonFiniteError("finite scores", f"{(~np.isfinite(values)).sum()} that are not", "Look at those rows.")
    return np.r_[np.zeros(len(kinds[0])), np.ones(len(kinds[1]))], values


def _check_both(familiar: Tensor, strange: Tensor) -> None:
    if min(len(familiar), len(strange)) == 0:
        raise DataError("scores of both kinds", f"{len(familiar)} and {len(strange)}", "Score some rows of each.")


def auroc(familiar: Numbers, strange: Numbers) -> float:
    r"""Probability that a strange row scores higher than a familiar one, ties counted half.

    Args:
        familiar: Scores of in-distribution rows, (N,); higher = stranger.
        strange: Scores of out-of-distribution rows, (M,). Both may be arrays, or tensors of any device.

    Returns:
        In [0, 1]; 0.5 is chance.

    Exact when: always, as a statistic; two unit Gaussians :math:`\Delta` apart give :math:`\Phi(\Delta/\sqrt2)`.
    Cost: one sort.

    Raises:
        ShapeError: If scores are not one a row.
        DataError: If a kind has no score.
        NonFiniteError: If a score is not finite.
    """
    from scipy.stats import rankdata  # studies ask thousands of times: scikit-learn's checks take a hundred sorts

    is_strange, values = labelled(familiar, strange)
    n = int(is_strange.sum())
    above = rankdata(values)[is_strange == 1].sum() - n * (n + 1) / 2  # pairs in which the strange row is higher
    return float(above / (n * (len(values) - n)))


def aupr(familiar: Numbers, strange: Numbers) -> float:
    """Average precision with the strange rows as positives; depends on how many of each there are.

    Args:
        familiar: As for `auroc`.
        strange: As for `auroc`.

    Returns:
        In (0, 1]; chance is the share of strange rows.

    Exact when: always, as a statistic.

    Raises:
        ShapeError: If scores are not one a row.
        DataError: If a kind has no score.
        NonFiniteError: If a score is not finite.
    """
    from sklearn.metrics import average_precision_score

    return float(average_precision_score(*labelled(familiar, strange)))


def fpr_at_tpr(familiar: Numbers, strange: Numbers, tpr: float = 0.95) -> float:
    """Share of familiar rows that are flagged when at least ``tpr`` of the strange ones are.

    Args:
        familiar: As for `auroc`.
        strange: As for `auroc`.
        tpr: Share of strange rows to be caught.

    Returns:
        The smallest false-positive rate of a threshold that does so.

    Exact when: always, as a statistic.

    Raises:
        ShapeError: If scores are not one a row.
        DataError: If ``tpr`` is not a share, or a kind has no score.
        NonFiniteError: If a score is not finite.
    """
    if not 0 < tpr <= 1:
        raise DataError("a share of strange rows in (0, 1]", f"tpr={tpr}", "0.95 is 95 %.")
    from sklearn.metrics import roc_curve

    false_positive, true_positive, _ = roc_curve(*labelled(familiar, strange), drop_intermediate=False)
    return float(false_positive[np.argmax(true_positive >= tpr)])


class Interval(NamedTuple):
    """A value with a bootstrap percentile interval."""

    value: float
    low: float
    high: float


def bootstrap_interval(
    metric: Callable[[Tensor, Tensor], float],
    familiar: Numbers,
    strange: Numbers,
    *,
    level: float = 0.95,
    n_resamples: int = 200,
    seed: int = 0,
) -> Interval:
    """A detection metric with the interval that resampling rows of both kinds gives.

    It covers the choice of test rows and not that of the training run: spread over seeds is another matter.

    Args:
        metric: Such as `auroc`; of rows in CPU tensors.
        familiar: Scores of familiar rows, (N,), or (N, ...) of several numbers a row if the metric takes them.
        strange: Scores of strange rows, (M,) or (M, ...).
        level: Of the percentile interval, in (0, 1).
        n_resamples: Resamples of each kind; of fewer than some 2 / (1 - level) the ends are the extremes.
        seed: Of the resampling; the caller's generators are not touched.

    Returns:
        The metric and its interval.

    No exact case: it covers at ``level`` as the numbers of rows and of resamples grow.
    Biased when: there are few rows of a kind: the interval is then too short; of a single row it has no width.
    Cost: ``n_resamples`` evaluations of the metric.

    Raises:
        ShapeError: If scores have no rows.
        DataError: If a kind has no score, the level is not in (0, 1), or ``n_resamples`` is below 1; and what the
            metric raises.
        NonFiniteError: If the metric is not finite, of the rows or of a resample.
    """
    check_resampling(level, n_resamples)
    familiar, strange = (tensor_of(scores).detach().cpu() for scores in (familiar, strange))
    if min(familiar.dim(), strange.dim()) == 0:
        raise ShapeError("scores of rows, (N, ...)", "one number, ()", "Give the scores of both kinds.")
    _check_both(familiar, strange)
    generator = torch.Generator().manual_seed(seed)

    def resample(scores: Tensor) -> Tensor:
        return scores[torch.randint(len(scores), (len(scores),), generator=generator)]

    value = float(metric(familiar, strange))
    values = [float(metric(resample(familiar), resample(strange))) for _ in range(n_resamples)]
    n_wrong = int((~np.isfinite([value, *values])).sum())
    if n_wrong:
        raise NonFiniteError("a metric that is finite", f"{n_wrong} of {n_resamples + 1} that are not", "Look at it.")
    low, high = np.quantile(values, ends(level))
    return Interval(value, float(low), float(high))


def ends(level: float) -> list[float]:
    """The two quantiles of a percentile interval."""
    return [(1 - level) / 2, (1 + level) / 2]
