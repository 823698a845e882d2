"""Split conformal intervals for images, with a guarantee at every number of calibration images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from bayesae.calibration.base import (
    ONE_DEVIATION,
    Recalibrated,
    at_deviations,
    check_level,
    errors_of,
    rescaled,
)
from bayesae.data import check_choice, check_rises
from bayesae.draws import Moments
from bayesae.errors import DataError, ShapeError

__all__ = ["ConformalQuantiles", "SplitConformal"]

Unit = Literal["pixel", "position", "image"]

_ROUNDING = 1e-7  # images: what sums of shares of them, and products with a level, may be off


@dataclass(frozen=True, eq=False)
class ConformalQuantiles(Recalibrated):
    r"""Sorted scores of calibration images, from which an interval of any level follows.

    Args:
        scores: \|x - mean\| / deviation, sorted along the first axis: (n,) of all pixels, (N, \*data) of every
            position, or (N,) of the largest of each image.
        n_images: How many images lie at or below each score, of the same shape; a pixel counts for its share of the
            image.

    Exact when: see `SplitConformal`.
    Cost: one pass over the scores for each quantile.

    Raises:
        DataError: If scores or numbers of images are not sorted, or there are none.
        ShapeError: If they differ in shape.
    """

    scores: Tensor
    n_images: Tensor

    def __post_init__(self) -> None:
        check_rises(scores=self.scores, n_images=self.n_images)
        if self.scores.shape != self.n_images.shape:
            got = f"{tuple(self.scores.shape)}, {tuple(self.n_images.shape)}"
            raise ShapeError("scores and numbers of images of one shape", got, "Take them as a fit gives them.")

    def __call__(self, moments: Moments) -> Moments:
        """The moments, their deviation half the width of the 68.27 % interval."""
        factor = self._at(ONE_DEVIATION) ** 2
        return rescaled(moments, noise=factor, code=factor, weights=factor)

    def quantile(self, moments: Moments, level: float) -> Tensor:
        """End of the central interval of level abs(2 level - 1): intervals are what the guarantee is for."""
        check_level(level)
        central = abs(2 * level - 1)
        if central == 0:
            return moments.mean
        return at_deviations(moments, math.copysign(1, level - 0.5) * self._at(central))

    def _at(self, level: float) -> Tensor:
        # the scores of one more image count as infinite
        n_all = self.n_images[-1]
        place = (self.n_images < level * (n_all + 1) - _ROUNDING).sum(0)
        if bool((place == len(self.scores)).any()):
            wanted = f"{math.ceil(level / (1 - level) - 1e-9)} calibration images for a level of {level:g}"
            raise DataError(wanted, f"{int(n_all.min() + 0.5)}", "Hold out more images, or ask for a lower level.")
        return self.scores.gather(0, place[None])[0]


@dataclass(frozen=True)
class SplitConformal:
    r"""Intervals mean ± q deviations, where q is a conformal quantile of the score s = \|x - mean\| / deviation.

    Pixels of one image are not exchangeable; images are, if calibration and new images come from one source in any
    order. The image is therefore the unit, and what is guaranteed depends on ``unit``. With N calibration images of D
    pixels and a level :math:`\ell`:

    - "pixel": a pixel of a new image, chosen at random, is inside with probability :math:`\ell` or more. Each image
      has mass 1 / (N + 1), spread over its pixels, and the new one's is at infinity:

      .. math:: q = \min\Big\{ s : \frac{1}{N+1} \sum_i \frac{1}{D} \sum_d [s_{id} \le s] \ge \ell \Big\}

    - "position": of a new image *every* position d is inside with probability :math:`\ell` or more, each by itself:
      :math:`q_d` is the score of rank :math:`\lceil (N+1) \ell \rceil` among the N at that position.
    - "image": *all* pixels of a new image are inside at once with probability :math:`\ell` or more: the same rank
      among the images' largest scores.

    Probabilities are over calibration images and the new one together. No law of the errors is assumed; deviations
    that do not rank errors cost width, not coverage.

    Of images with missing entries all of this is said of observed pixels: "pixel" chooses among those of the new image,
    "position" counts the N_d images in which d was observed, "image" asks for all that were, and an image without any
    counts for none.

    Args:
        unit: What the level is the coverage of.

    Exact when: images, with what is missing in them, are exchangeable, for coverage of at least the level. With
        continuous scores "position" and "image" cover :math:`\lceil (N+1) \ell \rceil / (N+1)` exactly.
    Biased when: calibration images are not like the new ones (another source, shift, or images that trained the
        network); or a level is read as that of one given image, of pixels of one kind, or of pixels that are missing.
    Cost: one sort of the scores, which are kept with as many numbers of images.

    Raises:
        DataError: From the result, if N is less than level / (1 - level).
        UnsupportedError: If there is no such unit.

    References:
        | Distribution-Free Predictive Inference for Regression (Lei, G'Sell, Rinaldo, Tibshirani, Wasserman, 2018)
        | Distribution-Free Inference with Hierarchical Data (Lee, Barber, Willett, 2023): "pixel", images as groups
    """

    unit: Unit = "pixel"

    def __post_init__(self) -> None:
        check_choice("unit", self.unit, get_args(Unit))

    def fit(
        self, moments: Moments, x: Tensor | np.ndarray, mask: Tensor | np.ndarray | None = None
    ) -> ConformalQuantiles:
        """The scores of these images; arguments and errors as of `Recalibration.fit`."""
        error, var, is_observed = errors_of(moments, x, mask)
        scores, n_pixels = error.abs() / var.sqrt(), is_observed.reshape(len(error), -1).sum(1)
        if self.unit == "pixel":
            share = (1 / n_pixels.double()).reshape(-1, *[1] * (scores.dim() - 1)).expand_as(scores)
            scores, counts = scores[is_observed], share[is_observed]
        elif self.unit == "image":  # a score is 0 where nothing was observed
            scores = scores.reshape(len(scores), -1).amax(1)[n_pixels > 0]
            counts = torch.ones_like(scores)
        else:
            scores, counts = torch.where(is_observed, scores, math.inf), is_observed.double()
        scores, order = scores.sort(0)
        return ConformalQuantiles(scores, counts.gather(0, order).cumsum(0))
