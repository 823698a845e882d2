"""Split conformal intervals for images, with a guarantee at every number of calibration images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from torch import Tensor

from bayesae.calibration.base import (
    ONE_DEVIATION,
    Recalibrated,
    at_deviations,
    check_level,
    errors_of,
    rescaled,
)
from bayesae.data import check_choice
from bayesae.draws import Moments
from bayesae.errors import DataError

__all__ = ["ConformalQuantiles", "SplitConformal"]

Unit = Literal["pixel", "position", "image"]


@dataclass(frozen=True, eq=False)
class ConformalQuantiles(Recalibrated):
    r"""Sorted scores of calibration images, from which an interval of any level follows.

    Args:
        scores: \|x - mean\| / deviation, sorted along the first axis: (N D,) of all pixels, (N, \*data) of every
            position, or (N,) of the largest of each image.
        n_images: N.

    Exact when: see `SplitConformal`.
    """

    scores: Tensor
    n_images: int

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
        # the scores of one more image count as infinite; the small number undoes rounding of the product
        rank = math.ceil(level * (self.n_images + 1) * (len(self.scores) / self.n_images) - 1e-9)
        if rank > len(self.scores):
            wanted = f"{math.ceil(level / (1 - level) - 1e-9)} calibration images for a level of {level:g}"
            raise DataError(wanted, f"{self.n_images}", "Hold out more images, or ask for a lower level.")
        return self.scores[max(rank, 1) - 1]


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

    Args:
        unit: What the level is the coverage of.

    Exact when: images are exchangeable, for coverage of at least the level. With continuous scores "position" and
        "image" cover :math:`\lceil (N+1) \ell \rceil / (N+1)` exactly.
    Biased when: calibration images are not like the new ones (another source, shift, or images that trained the
        network); or a level is read as that of one given image, or of pixels of one kind.
    Cost: one sort of the scores, which are kept.

    Raises:
        DataError: If there are no rows, or a variance is not positive; from the result if N is less than
            level / (1 - level).
        UnsupportedError: If there is no such unit, or the likelihood's mean settles its law (binary and nominal data).

    References:
        | Distribution-Free Predictive Inference for Regression (Lei, G'Sell, Rinaldo, Tibshirani, Wasserman, 2018)
        | Distribution-Free Inference with Hierarchical Data (Lee, Barber, Willett, 2023): "pixel", images as groups
    """

    unit: Unit = "pixel"

    def __post_init__(self) -> None:
        check_choice("unit", self.unit, get_args(Unit))

    def fit(self, moments: Moments, x: Tensor | np.ndarray) -> ConformalQuantiles:
        r"""The scores of these images.

        Args:
            moments: Of the predictive at x.
            x: Images that trained nothing, (N, \*data).

        Returns:
            `ConformalQuantiles`.
        """
        error, var = errors_of(moments, x)
        scores = error.abs() / var.sqrt()
        if self.unit == "pixel":
            scores = scores.flatten()
        elif self.unit == "image":
            scores = scores.reshape(len(scores), -1).amax(1)
        return ConformalQuantiles(scores.sort(0).values, len(error))
