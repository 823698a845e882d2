"""Shifts of images, against scipy's filters."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch.testing import assert_close

import bayesae as bae
from bayesae.datasets import shifted
from bayesae.datasets.shifts import BLUR, NOISE, ROTATION

KINDS = ("noise", "rotation", "blur")


def images(n=6, side=(24, 20)):
    return torch.rand(n, 2, *side, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("strength", [1, 3, 5])
def test_blur_is_a_gaussian_filter(strength):
    x = images()
    deviation = BLUR[strength - 1] * 20
    radius = math.ceil(4 * deviation)
    expected = ndimage.gaussian_filter(
        x.numpy(), (0, 0, deviation, deviation), mode="nearest", radius=(0, 0, *[radius] * 2)
    )
    assert_close(shifted(x, "blur", strength), torch.from_numpy(expected))


@pytest.mark.parametrize("strength", [1, 4])
def test_rotation_is_by_that_angle_to_either_side(strength):
    x, sides = images(12), []
    turned = shifted(x, "rotation", strength)
    for image, found in zip(x, turned, strict=True):
        both = [
            ndimage.rotate(image.numpy(), side * ROTATION[strength - 1], (1, 2), False, order=1, mode="grid-constant")
            for side in (-1, 1)
        ]
        fits = [np.allclose(found, one, atol=1e-10) for one in both]
        assert sum(fits) == 1
        sides.append(fits[1])
    assert len(set(sides)) == 2


def test_noise_has_its_deviation():
    x = torch.full((100, 1, 30, 30), 0.5, dtype=torch.float64)
    for strength in (1, 2, 3):
        noise = shifted(x, "noise", strength) - x
        assert abs(float(noise.std()) / NOISE[strength - 1] - 1) < 4 / math.sqrt(2 * x.numel())
    assert shifted(x, "noise", 5).min() >= 0


@pytest.mark.parametrize("kind", KINDS)
def test_stronger_is_further_away_and_nothing_else_moves(kind):
    x, state = images(), torch.get_rng_state()
    before = x.clone()
    distances = [float((shifted(x, kind, strength) - x).square().mean()) for strength in range(1, 6)]
    assert kind == "rotation" or distances == sorted(distances)
    assert min(distances) > 1e-4
    assert torch.equal(x, before) and torch.equal(state, torch.get_rng_state())
    assert torch.equal(shifted(x, kind, 2, seed=3), shifted(x, kind, 2, seed=3))
    assert torch.equal(shifted(x, kind, 2, seed=3), shifted(x, kind, 2, seed=4)) == (kind == "blur")
    half = shifted(x.float(), kind, 2)
    assert half.dtype == torch.float32 and half.min() >= 0 and half.max() <= 1
    assert_close(half.double(), shifted(x, kind, 2), rtol=0, atol=1e-5)


def test_what_is_refused():
    x = images()
    with pytest.raises(bae.errors.ShapeError, match=r"\(N, C, height, width\)"):
        shifted(x[0], "blur", 1)
    with pytest.raises(bae.errors.DataError, match="strength 1 to 5"):
        shifted(x, "blur", 6)
    with pytest.raises(bae.errors.DataError, match="'fog'"):
        shifted(x, "fog", 1)
    with pytest.raises(bae.errors.DataError, match="grey levels"):
        shifted(255 * x, "blur", 1)
