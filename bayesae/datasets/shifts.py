"""`shifted`: images made noisy, turned or blurred, in five documented strengths."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from bayesae.errors import DataError, ShapeError

__all__ = ["shifted"]

Shift: TypeAlias = Literal["noise", "rotation", "blur"]

NOISE = (0.04, 0.08, 0.12, 0.18, 0.26)  # standard deviations, grey levels in [0, 1]
ROTATION = (10.0, 20.0, 30.0, 45.0, 60.0)  # degrees
BLUR = (0.03, 0.05, 0.075, 0.1, 0.15)  # standard deviations, shares of the shorter side


def shifted(images: Tensor, kind: Shift, strength: int, *, seed: int = 0) -> Tensor:
    """Images as another camera might have taken them: a shift away from the data that a model was fitted on.

    ==========  ============================================  ===================================
    kind        strengths 1 to 5                              what
    ==========  ============================================  ===================================
    noise       0.04, 0.08, 0.12, 0.18, 0.26 grey levels      Normal noise, clipped to [0, 1]
    rotation    10, 20, 30, 45, 60 degrees                    to a random side, about the centre
    blur        0.03, 0.05, 0.075, 0.1, 0.15 of the side      Gaussian kernel's deviation
    ==========  ============================================  ===================================

    Turned images are interpolated linearly and black (0) where they came from outside; blurred ones go on at
    their edges as the outermost pixels do.

    Args:
        images: (N, C, height, width), grey levels in [0, 1].
        kind: "noise", "rotation" or "blur".
        strength: 1 to 5.
        seed: Of the noise and of the sides to which images turn; the caller's generators are not touched.

    Returns:
        New images in [0, 1], shape, dtype and device as ``images``.

    No exact case: no camera does just this; each image's shift is documented and the same whenever it is asked for.
    Cost: one pass; blur two convolutions.

    Raises:
        ShapeError: If images are not (N, C, height, width) of floating-point numbers.
        DataError: If the kind or strength is unknown, or a grey level is not in [0, 1].

    References:
        | Benchmarking Neural Network Robustness to Common Corruptions and Perturbations (Hendrycks, Dietterich, 2019).
          Departure: three kinds, strengths of our own for small images.

    Example:
        >>> shifted(torch.ones(2, 1, 8, 8), "blur", 5).mean()
        tensor(1.)
    """
    if images.dim() != 4 or not images.is_floating_point():
        raise ShapeError("images (N, C, height, width) of floats", f"{tuple(images.shape)}, {images.dtype}", "Reshape.")
    if kind not in ("noise", "rotation", "blur") or strength not in range(1, 6):
        raise DataError("noise, rotation or blur of strength 1 to 5", f"{kind!r}, {strength!r}", "See shifted().")
    if not bool(((images >= 0) & (images <= 1)).all()):
        raise DataError("grey levels in [0, 1]", "others", "Divide pixels of 8 bits by 255.")
    generator, place = torch.Generator().manual_seed(seed), strength - 1
    if kind == "noise":
        noise = torch.randn(images.shape, generator=generator, dtype=torch.float64)
        return (images + NOISE[place] * noise.to(images)).clamp(0, 1)
    if kind == "blur":
        return _blurred(images, BLUR[place] * min(images.shape[-2:])).clamp(0, 1)
    sides = 2 * torch.randint(2, (len(images),), generator=generator) - 1
    return _turned(images, (sides * math.radians(ROTATION[place])).to(images)).clamp(0, 1)


def _turned(images: Tensor, angles: Tensor) -> Tensor:
    """Images turned by angles (N,) in radians, in pixels and so without stretching, 0 outside."""
    height, width = images.shape[-2:]
    cos, sin, zero = angles.cos(), angles.sin(), torch.zeros_like(angles)
    rows = [[cos, -sin * (height / width), zero], [sin * (width / height), cos, zero]]
    matrices = torch.stack([torch.stack(row, -1) for row in rows], 1)
    grid = functional.affine_grid(matrices, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _blurred(images: Tensor, deviation: float) -> Tensor:
    """Images under a Gaussian kernel of this deviation in pixels, cut off at four of them; edges go on."""
    radius = math.ceil(4 * deviation)
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float64)
    kernel = (-0.5 * (offsets / deviation) ** 2).exp()
    kernel = (kernel / kernel.sum()).to(images)
    pixels = functional.pad(images.flatten(0, 1)[:, None], [radius] * 4, mode="replicate")
    pixels = functional.conv2d(functional.conv2d(pixels, kernel[:, None][None, None]), kernel[None][None, None])
    return pixels.reshape(images.shape)
