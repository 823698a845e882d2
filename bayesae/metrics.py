"""How good scores and predictive distributions are: detection, likelihood, calibration, sharpness.

scikit-learn is imported where it is called: it takes longer to load than the rest of the library.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bayesae.errors import DataError, NonFiniteError
from bayesae.functional import check_finite

__all__ = [
    "Interval",
    "QuantileCalibration",
    "aupr",
    "auroc",
    "bootstrap_interval",
    "fpr_at_tpr",
    "gaussian_crps",
    "gaussian_nll",
    "quantile_calibration",
    "sharpness",
]


def _labelled(familiar: Tensor, strange: Tensor) -> tuple[np.ndarray, np.ndarray]:
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

    return float(roc_auc_score(*_labelled(familiar, strange)))


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

    return float(average_precision_score(*_labelled(familiar, strange)))


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

    false_positive, true_positive, _ = roc_curve(*_labelled(familiar, strange), drop_intermediate=False)
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
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(metric(familiar, strange), float(low), float(high))


def gaussian_nll(mean: Tensor, var: Tensor, x: Tensor) -> Tensor:
    """Minus log N(x; mean, var), element-wise, in nats (units of x: a density)."""
    return 0.5 * ((x - mean) ** 2 / var + torch.log(2 * math.pi * var))


def gaussian_crps(mean: Tensor, var: Tensor, x: Tensor) -> Tensor:
    r"""Continuous ranked probability score of N(mean, var), element-wise, units of x, smaller is better.

    .. math:: \sigma \Big[ u (2\Phi(u) - 1) + 2\varphi(u) - \tfrac{1}{\sqrt\pi} \Big], \qquad u = (x - \mu)/\sigma

    Args:
        mean: Predictive means.
        var: Predictive variances.
        x: What came.

    Returns:
        Of their common shape.

    References:
        | Strictly Proper Scoring Rules, Prediction, and Estimation (Gneiting, Raftery, 2007)
    """
    scale = var.sqrt()
    u = (x - mean) / scale
    density = torch.exp(-0.5 * u**2) / math.sqrt(2 * math.pi)
    return scale * (u * (2 * torch.special.ndtr(u) - 1) + 2 * density - 1 / math.sqrt(math.pi))


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


def quantile_calibration(mean: Tensor, var: Tensor, x: Tensor, *, n_levels: int = 19) -> QuantileCalibration:
    r"""Calibration of Gaussian predictive quantiles, pooled over all entries.

    The probability integral transform :math:`u = \Phi((x - \mu)/\sigma)` is uniform if and only if the predictive
    is calibrated on average; its distribution function is what is returned.

    Args:
        mean: Predictive means.
        var: Predictive variances.
        x: What came.
        n_levels: Levels 1/(n+1) .. n/(n+1).

    Returns:
        Levels, observed shares and the mean absolute error: 0 is calibrated, 0.25 the most for a symmetric
        predictive that is much too wide or much too narrow.

    Exact when: x is drawn from the predictive: the error then goes to 0 as entries are added.
    Biased when: x has atoms (pixels that are exactly 0): one value then cannot be spread over levels.

    References:
        | Accurate Uncertainties for Deep Learning Using Calibrated Regression (Kuleshov, Fenner, Ermon, 2018)
    """
    transform = torch.special.ndtr((x - mean) / var.sqrt()).flatten()
    check_finite({"(x - mean) / sd": transform}, "standardised errors", "Is a variance 0, or a mean NaN?")
    levels = torch.arange(1, n_levels + 1, dtype=mean.dtype, device=mean.device) / (n_levels + 1)
    observed = torch.stack([(transform <= level).to(mean.dtype).mean() for level in levels])
    return QuantileCalibration(levels, observed, float((observed - levels).abs().mean()))


def sharpness(var: Tensor) -> float:
    """Root of the mean predictive variance, units of x; among calibrated predictives the smaller one is better."""
    return float(var.mean().sqrt())
