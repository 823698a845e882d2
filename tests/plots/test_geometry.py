"""Figures of a code space's geometry."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import bayesae as bae


@pytest.fixture
def axes():
    return Figure().subplots()


def test_the_background_has_its_axes_the_right_way_up(axes):
    low, high = torch.tensor([0.0, 10.0]), torch.tensor([1.0, 14.0])
    assert bae.plots.volume_background(axes, lambda z: z[:, 0] + 100 * z[:, 1], low, high, n=4) is axes
    shown = axes.images[0]
    assert shown.get_extent() == [0, 1, 10, 14] and shown.origin == "lower"
    assert np.allclose(shown.get_array()[1, 2], 0.625 + 100 * 11.5)


def test_curves_have_one_label_a_name(axes):
    curves = {"geodesics": torch.rand(3, 5, 2), "straight": torch.rand(3, 2, 2)}
    bae.plots.code_curves(axes, curves, colours={"geodesics": "red", "straight": "black"})
    assert len(axes.lines) == 6
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["geodesics", "straight"]
    assert np.allclose(axes.lines[1].get_xydata(), curves["geodesics"][1])
    draws = torch.rand(4, 3, 5, 2)
    bae.plots.curve_band(axes, draws, colour="blue", label="draws")
    assert len(axes.lines) == 18
    assert [line.get_label() for line in axes.lines[6:]].count("draws") == 1
    assert np.allclose(axes.lines[6 + 4].get_xydata(), draws[1, 1])


def test_a_strip_has_a_row_a_curve(axes):
    one, other = torch.rand(3, 1, 4, 5), torch.rand(3, 1, 4, 5)
    bae.plots.film_strip(axes, {"geodesic": one, "straight": other}, high=1.0)
    shown = axes.images[0].get_array()
    assert shown.shape == (2 * 5 - 1, 3 * 6 - 1)
    assert np.allclose(shown[5:9, 6:11], other[1, 0])
    assert [text.get_text() for text in axes.get_yticklabels()] == ["geodesic", "straight"]


def test_what_is_refused(axes):
    with pytest.raises(bae.errors.ShapeError, match=r"corners \(2,\)"):
        bae.plots.volume_background(axes, lambda z: z[:, 0], torch.zeros(3), torch.ones(3))
    with pytest.raises(bae.errors.NonFiniteError, match="finite volume elements"):
        bae.plots.volume_background(axes, lambda z: z[:, 0] * math.nan, torch.zeros(2), torch.ones(2))
    with pytest.raises(bae.errors.ShapeError, match=r"curves \(P, n \+ 1, 2\) of a"):
        bae.plots.code_curves(axes, {"a": torch.rand(3, 2)})
    with pytest.raises(bae.errors.ShapeError, match=r"curves \(S, P, n \+ 1, 2\)"):
        bae.plots.curve_band(axes, torch.rand(4, 5, 2))
    with pytest.raises(bae.errors.ShapeError, match=r"frames \(T, height, width\)"):
        bae.plots.film_strip(axes, {"a": torch.rand(3, 4, 4), "b": torch.rand(2, 4, 4)})
