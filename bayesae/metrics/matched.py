"""Detection among rows that are alike in something else: what is left of a score beyond brightness, say."""

from __future__ import annotations

import numpy as np
import torch

from bayesae.data import check_counts
from bayesae.errors import DataError, ShapeError
from bayesae.functional import check_finite
from bayesae.metrics._checks import Numbers, tensor_of
from bayesae.metrics.detection import auroc

__all__ = ["matched_auroc"]


def matched_auroc(
    familiar: Numbers, strange: Numbers, familiar_by: Numbers, strange_by: Numbers, *, n_bins: int = 10
) -> float:
    r"""Probability that a strange row scores higher than a familiar one *of the same stratum* of a covariate.

    .. math:: \frac{\sum_b n_b m_b\, \mathrm{AUROC}_b}{\sum_b n_b m_b}

    with n_b familiar and m_b strange rows in stratum b. At most ``n_bins`` values of the covariate have a stratum each;
    else strata have equal numbers of rows, both kinds together. A score that only tells how bright an image is has 0.5,
    however much brighter strange images are.

    Args:
        familiar: Scores of familiar rows, (N,); higher = stranger.
        strange: Scores of strange rows, (M,).
        familiar_by: The covariate of the familiar rows, (N,), such as the mean brightness.
        strange_by: The covariate of the strange rows, (M,).
        n_bins: Strata, at most.

    Returns:
        In [0, 1].

    Exact when: the covariate has at most ``n_bins`` values.
    Biased when: strata are wide: towards the unmatched AUROC, by what the covariate varies within them. Few rows of
        one kind in a stratum of the other decide all: look at the overlap too.
    Cost: one sort a stratum.

    Raises:
        DataError: If no stratum has rows of both kinds, or ``n_bins`` is below 1.
        ShapeError: If there is not one covariate for every score.
        NonFiniteError: If a covariate or a score is not finite.

    References:
        | Adjusting for covariate effects on classification accuracy using the covariate-adjusted receiver operating
          characteristic curve (Janes, Pepe, 2009)
    """
    check_counts(n_bins=n_bins)
    familiar, strange, familiar_by, strange_by = (
        tensor_of(values).detach().cpu() for values in (familiar, strange, familiar_by, strange_by)
    )
    for scores, by in ((familiar, familiar_by), (strange, strange_by)):
        if scores.shape != by.shape or scores.dim() != 1:
            got = f"scores {tuple(scores.shape)} and covariates {tuple(by.shape)}"
            raise ShapeError("one covariate for every score, (N,)", got, "Compute both of the same rows.")
    by = torch.cat([familiar_by.double(), strange_by.double()])
    check_finite({"familiar_by and strange_by": by}, "covariates", "Leave out rows without one.")
    edges = by.unique()[:-1]
    if len(edges) >= n_bins:
        # not torch.quantile, which ends at 2^24 rows
        edges = torch.from_numpy(np.quantile(by.numpy(), np.linspace(0, 1, n_bins + 1)[1:-1])).unique()
    bins = [torch.bucketize(values.double(), edges) for values in (familiar_by, strange_by)]
    total, n_pairs = 0.0, 0
    for stratum in range(len(edges) + 1):
        parts = familiar[bins[0] == stratum], strange[bins[1] == stratum]
        n = len(parts[0]) * len(parts[1])
        if n:
            total, n_pairs = total + n * auroc(*parts), n_pairs + n
    if not n_pairs:
        fix = "The kinds do not overlap: nothing can be matched. Take fewer bins."
        raise DataError("a stratum with rows of both kinds", f"none of {len(edges) + 1}", fix)
    return total / n_pairs
