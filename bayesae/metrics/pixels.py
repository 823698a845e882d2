"""How well scores of pixels tell where a defect is."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from bayesae.errors import DataError, NonFiniteError, ShapeError
from bayesae.metrics._checks import Numbers, check_resampling, tensor_of
from bayesae.metrics.detection import Interval, aupr, auroc, ends, labelled

__all__ = ["per_region_overlap", "pixel_aupr", "pixel_auroc", "pixel_auroc_interval"]


def pixel_auroc(scores: Numbers, masks: Numbers, *, is_pooled: bool = True) -> float:
    r"""Probability that a defect pixel scores higher than one without a defect, ties counted half.

    Args:
        scores: One for every pixel, (N, \*data); higher = stranger.
        masks: True where a pixel is defect, (N, \*data).
        is_pooled: Compare pixels of all images; False averages the `auroc` of every image that has pixels of both
            kinds, and so does not ask scores of different images to be on one scale.

    Returns:
        In [0, 1]; 0.5 is chance.

    Exact when: always, as a statistic.
    Biased when: read as a share of defects: large ones weigh by their pixels (see `per_region_overlap`), and few
        defect pixels leave it high while most flags are false (see `pixel_aupr`).
    Cost: one sort.

    Raises:
        ShapeError: If masks are not bool or of another shape.
        DataError: If there are no pixels of both kinds.
        NonFiniteError: If a score is not finite.
    """
    return _over_pixels(auroc, scores, masks, is_pooled)


def pixel_aupr(scores: Numbers, masks: Numbers, *, is_pooled: bool = True) -> float:
    r"""Average precision with the defect pixels as positives.

    Args:
        scores: As for `pixel_auroc`.
        masks: As for `pixel_auroc`.
        is_pooled: As for `pixel_auroc`.

    Returns:
        In (0, 1]; chance is the share of defect pixels.

    Exact when: always, as a statistic.

    Raises:
        ShapeError: If masks are not bool or of another shape.
        DataError: If there are no pixels of both kinds.
        NonFiniteError: If a score is not finite.
    """
    return _over_pixels(aupr, scores, masks, is_pooled)


def pixel_auroc_interval(
    scores: Numbers,
    masks: Numbers,
    *,
    baseline: Numbers | None = None,
    level: float = 0.95,
    n_resamples: int = 200,
    seed: int = 0,
) -> Interval:
    r"""The pooled `pixel_auroc` with the interval that resampling **images** gives.

    Pixels of one image share a defect and a reconstruction: resampling them one by one would give an interval that is
    far too narrow.

    Args:
        scores: As for `pixel_auroc`.
        masks: As for `pixel_auroc`.
        baseline: Other scores of the same pixels; value and interval are then those of the gain over them.
        level: Of the percentile interval, in (0, 1).
        n_resamples: Resamples of the images.
        seed: Of the resampling; the caller's generators are not touched.

    Returns:
        The AUROC (or the gain) and its interval.

    No exact case: it covers at ``level`` as the numbers of images and of resamples grow.
    Cost: one sort, and a pass over the pixels for every resample.

    Raises:
        ShapeError: If masks or baseline do not fit.
        DataError: If a resample has no pixels of both kinds: too few images have a defect; or the level is not in
            (0, 1), or ``n_resamples`` is below 1.
        NonFiniteError: If a score is not finite.
    """
    check_resampling(level, n_resamples)
    generator = torch.Generator().manual_seed(seed)
    sides = []
    for values, is_strange in (_pixels(one, masks) for one in (scores, baseline) if one is not None):
        # in the order of the scores, so that sums over equal ones run through memory once
        order = np.argsort(values, axis=None)
        rank = np.r_[0, np.cumsum(np.diff(values.ravel()[order]) > 0)]
        sides.append((rank, order // is_strange.shape[1], is_strange.ravel()[order]))

    def value(times: np.ndarray) -> float:
        found = []
        for rank, image, is_strange in sides:
            weights = times[image]
            strange, familiar = (np.bincount(rank, weights * kind) for kind in (is_strange, ~is_strange))
            pairs = strange.sum() * familiar.sum()
            if pairs == 0:
                raise DataError("images with pixels of both kinds", "none in a resample", "Give more images.")
            found.append(strange @ (familiar.cumsum() - 0.5 * familiar) / pairs)
        return float(found[0] - sum(found[1:]))

    n = len(masks)
    if n == 0:
        raise DataError("images with pixels of both kinds", "none", "Give images.")
    draws = (torch.randint(n, (n,), generator=generator).numpy() for _ in range(n_resamples))
    low, high = np.quantile([value(np.bincount(index, minlength=n)) for index in draws], ends(level))
    return Interval(value(np.ones(n)), float(low), float(high))


def per_region_overlap(scores: Numbers, masks: Numbers, *, max_fpr: float = 0.3) -> float:
    r"""Mean share of a defect that is found, averaged over false-positive rates up to ``max_fpr``.

    .. math:: \frac{1}{r} \int_0^r \frac1C \sum_{c=1}^{C} \frac{|\{o \in c : s_o \ge t(u)\}|}{|c|}\, du, \qquad
              t(u): \text{ the threshold that flags a share } u \text{ of the clean pixels}

    Every connected component c of a mask counts the same, however large.

    Args:
        scores: One for every pixel, (N, ..., height, width); higher = stranger.
        masks: True where a pixel is defect, of the same shape. Pixels that touch, at a corner too, are one component.
        max_fpr: r, in (0, 1]; the field takes 0.3.

    Returns:
        In [0, 1]; chance is ``max_fpr / 2``.

    Exact when: always, as a statistic (trapezoids between the thresholds that the scores give).
    Cost: one sort.

    Raises:
        ShapeError: If masks are not bool or of another shape, or pixels have no two axes.
        DataError: If ``max_fpr`` is not a share, or there are no pixels of both kinds.
        NonFiniteError: If a score is not finite.

    References:
        | Uninformed Students: Student-Teacher Anomaly Detection with Discriminative Latent Embeddings
          (Bergmann, Fauser, Sattlegger, Steger, 2020)
    """
    if not 0 < max_fpr <= 1:
        raise DataError("a false-positive rate in (0, 1]", f"max_fpr={max_fpr}", "0.3 is 30 %.")
    scores, masks = tensor_of(scores), tensor_of(masks)
    if scores.dim() < 3:
        raise ShapeError("scores (N, ..., height, width)", f"{tuple(scores.shape)}", "Components need images.")
    from scipy import ndimage
    from sklearn.metrics import roc_curve

    values, is_strange = _pixels(scores, masks)
    neighbours = np.zeros((3,) * scores.dim(), dtype=bool)
    neighbours[(1,) * (scores.dim() - 2)] = True  # all of height and width, no other axis
    regions = np.asarray(ndimage.label(is_strange.reshape(scores.shape), neighbours)[0]).ravel()  # pyright: ignore
    # a pixel of a defect counts as its share of it: the curve is a weighted ROC curve
    weights = np.where(regions > 0, 1 / np.bincount(regions)[regions.astype(np.intp)], 1.0)
    labelled(*(torch.as_tensor(values[kind]) for kind in (~is_strange, is_strange)))
    false_positive, overlap, _ = roc_curve(
        is_strange.ravel(), values.ravel(), sample_weight=weights, drop_intermediate=False
    )
    inside = false_positive <= max_fpr
    x = np.r_[false_positive[inside], max_fpr]
    y = np.r_[overlap[inside], np.interp(max_fpr, false_positive, overlap)]
    return float(np.trapezoid(y, x) / max_fpr)


def _pixels(scores: Numbers, masks: Numbers) -> tuple[np.ndarray, np.ndarray]:
    """Scores in double precision and flags, (N, P) each."""
    scores, masks = tensor_of(scores), tensor_of(masks)
    if scores.shape != masks.shape or masks.dtype != torch.bool or scores.dim() < 2:
        raise ShapeError(
            f"masks of the scores' shape {tuple(scores.shape)}, (N, *data), and dtype bool",
            f"{tuple(masks.shape)} and {masks.dtype}",
            "True where a pixel is defect.",
        )
    values = scores.detach().double().flatten(1).cpu().numpy()
    if not np.isfinite(values).all():
        raise NonFiniteError("finite scores", f"{(~np.isfinite(values)).sum()} that are not", "Look at those pixels.")
    return values, masks.flatten(1).cpu().numpy()


def _over_pixels(metric: Callable[[Tensor, Tensor], float], scores: Numbers, masks: Numbers, is_pooled: bool) -> float:
    values, is_strange = (torch.as_tensor(part) for part in _pixels(scores, masks))
    if is_pooled:
        return metric(values[~is_strange], values[is_strange])
    has_both = is_strange.any(1) & ~is_strange.all(1)
    if not has_both.any():
        raise DataError("an image with pixels of both kinds", "none", "Give images that are defect in part.")
    rows = zip(values[has_both], is_strange[has_both], strict=True)
    return statistics.fmean(metric(row[~strange], row[strange]) for row, strange in rows)
