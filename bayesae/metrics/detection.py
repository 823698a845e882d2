"""How well scores tell strange rows from familiar ones.

scikit-learn is imported where it is called: it takes longer to load than the rest of the library.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bayesae.errors import DataError, NonFiniteError

__all__ = ["Interval", "aupr", "auroc", "bootstrap_interval", "fpr_at_tpr"]


def labelled(familiar: Tensor, strange: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Labels (0 familiar, 1 strange) and scores of both kinds, finite and none empty."""
    if min(len(familiar), len(strange)) == 0:
        raise DataError("scores of both kinds", f"{len(familiar)} and {len(strange)}", "Score some rows of each.")
    values = torch.cat([familiar.double(), strange.double()]).cpu().numpy()
    if not np.isfinite(values).all():
        raise NonFiniteError("finite scores", f"{(~np.isfinite(values)).sum()} that are not", "Look at those rows.")
    return np.r_[np.zeros(len(familiar)), np.ones(len(strange))], values


def auroc(familiar: Tensor, strange: Tensor) -> float:
    r"""Probability that a strange row scores higher than a familiar one, ties counted half.

    Args:
        familiar: Scores of in-distribution rows, (N,); higher = stranger.
        strange: Scores of out-of-distribution rows, (M,).

    Returns:
        In [0, 1]; 0.5 is chance.

    Exact when: always, as a statistic; two unit Gaussians :math:`\Delta` apart give :math:`\Phi(\Delta/\sqrt2)`.
    Cost: one sort.

    Raises:
        DataError: If a kind has no score.
        NonFiniteError: If a score is not finite.
    """
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(*labelled(familiar, strange)))


def aupr(familiar: Tensor, strange: Tensor) -> float:
    """Average precision with the strange rows as positives; depends on how many of each there are.

    Args:
        familiar: As for `auroc`.
        strange: As for `auroc`.

    Returns:
        In (0, 1]; chance is the share of strange rows.

    Exact when: always, as a statistic.

    Raises:
        DataError: If a kind has no score.
        NonFiniteError: If a score is not finite.
    """
    from sklearn.metrics import average_precision_score

    return float(average_precision_score(*labelled(familiar, strange)))


def fpr_at_tpr(familiar: Tensor, strange: Tensor, tpr: float = 0.95) -> float:
    """Share of familiar rows that are flagged when at least ``tpr`` of the strange ones are.

    Args:
        familiar: As for `auroc`.
        strange: As for `auroc`.
        tpr: Share of strange rows to be caught.

    Returns:
        The smallest false-positive rate of a threshold that does so.

    Exact when: always, as a statistic.

    Raises:
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
    familiar: Tensor,
    strange: Tensor,
    *,
    level: float = 0.95,
    n_resamples: int = 200,
    seed: int = 0,
) -> Interval:
    """A detection metric with the interval that resampling rows of both kinds gives.

    It covers the choice of test rows and not that of the training run: spread over seeds is another matter.

    Args:
        metric: Such as `auroc`.
        familiar: Scores of familiar rows.
        strange: Scores of strange rows.
        level: Of the percentile interval.
        n_resamples: Resamples of each kind.
        seed: Of the resampling; the caller's generators are not touched.

    Returns:
        The metric and its interval.

    No exact case: it covers at ``level`` as the numbers of rows and of resamples grow.
    Cost: ``n_resamples`` evaluations of the metric.
    """
    generator = torch.Generator().manual_seed(seed)

    def resample(scores: Tensor) -> Tensor:
        return scores[torch.randint(len(scores), (len(scores),), generator=generator)]

    familiar, strange = familiar.cpu(), strange.cpu()
    values = [metric(resample(familiar), resample(strange)) for _ in range(n_resamples)]
    low, high = np.quantile(values, ends(level))
    return Interval(metric(familiar, strange), float(low), float(high))


def ends(level: float) -> list[float]:
    """The two quantiles of a percentile interval."""
    return [(1 - level) / 2, (1 + level) / 2]
