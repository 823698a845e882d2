from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pytest
import torch

import bayesae as bae

mpl.use("Agg")


@pytest.fixture
def axes():
    from matplotlib.figure import Figure

    return Figure().subplots()


def test_images_stand_side_by_side(axes):
    rows = torch.rand(3, 1, 4, 5)
    assert bae.plots.images(axes, rows, title="t", high=1.0) is axes
    shown = axes.images[0].get_array()
    assert shown.shape == (4, 3 * 5 + 2)
    assert torch.equal(torch.as_tensor(shown[:, 6:11].data), rows[1, 0])
    assert shown.mask[:, 5].all() and axes.images[0].get_clim() == (0, 1)


def test_histograms_have_common_bins_and_every_row(axes):
    scores = {"a": torch.randn(200), "b": torch.randn(300) + 50}
    bae.plots.score_histograms(axes, scores, xlabel="nats")
    assert axes.get_xlabel() == "nats"
    outlines = [patch.get_path().vertices for patch in axes.patches]
    lefts = [sorted(set(v[:, 0].round(6).tolist())) for v in outlines]
    assert lefts[0] == lefts[1] and len(lefts[0]) == 41
    for vertices in outlines:  # a density over all rows: its area is 1
        x, y = vertices[:, 0], vertices[:, 1]
        area = abs(float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum())) / 2
        assert area == pytest.approx(1.0, rel=1e-6)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b"]


def test_reliability_draws_the_diagonal(axes):
    levels = torch.linspace(0, 1, 5)
    bae.plots.reliability(axes, {"m": (levels, levels**2)})
    assert axes.lines[0].get_xdata().tolist() == [0, 1] and axes.lines[0].get_ydata().tolist() == [0, 1]
    assert torch.allclose(torch.as_tensor(axes.lines[1].get_ydata()), levels**2)


def test_heat_lets_the_image_through_where_it_is_low(axes):
    image, values = torch.rand(1, 4, 5), torch.linspace(-2, 4, 20).reshape(1, 4, 5)
    assert bae.plots.heat_map(axes, image, values, label="nats") is axes
    below, heat = axes.images
    assert torch.allclose(torch.as_tensor(below.get_array().data), image[0].double()) and below.get_clim() == (0, 1)
    assert torch.allclose(torch.as_tensor(heat.get_array().data), values[0].double()) and heat.get_clim() == (0, 4)
    opacity = torch.as_tensor(heat.get_alpha())
    assert torch.allclose(opacity, 0.85 * (values[0] / 4).clamp(0, 1).double())
    bar = [other for other in axes.get_figure().axes if other is not axes]
    assert len(bar) == 1 and bar[0].get_ylabel() == "nats"
    axes.get_figure().canvas.draw()


def test_channels_of_values_add_up_and_those_of_the_image_are_averaged(axes):
    image, values = torch.rand(3, 4, 5), torch.rand(3, 4, 5)
    bae.plots.heat_map(axes, image, values, low=0.5, high=2.0)
    below, heat = axes.images
    assert torch.allclose(torch.as_tensor(below.get_array().data), image.mean(0).double())
    assert torch.allclose(torch.as_tensor(heat.get_array().data), values.sum(0).double())
    assert heat.get_clim() == (0.5, 2.0) and axes.get_figure().axes == [axes]  # no label, no bar


def test_an_outline_goes_around_its_pixels(axes):
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask[1, 2:4] = mask[3, 0] = True
    bae.plots.heat_map(axes, torch.zeros(4, 5), torch.zeros(4, 5), outline=mask)
    sides = {tuple(sorted(zip(*line.get_data(), strict=True))) for line in axes.lines}
    x, y = 1.5, 0.5
    expected = [((x, y), (x, y + 1)), ((x + 2, y), (x + 2, y + 1))]
    expected += [((x + i, y + j), (x + i + 1, y + j)) for i in (0, 1) for j in (0, 1)]
    expected += [
        ((-0.5, 2.5), (0.5, 2.5)),
        ((-0.5, 3.5), (0.5, 3.5)),
        ((-0.5, 2.5), (-0.5, 3.5)),
        ((0.5, 2.5), (0.5, 3.5)),
    ]
    assert sides == set(expected) and len(axes.lines) == len(expected)


def test_a_heat_map_needs_a_value_for_every_pixel(axes):
    with pytest.raises(bae.errors.ShapeError, match="every pixel"):
        bae.plots.heat_map(axes, torch.zeros(4, 5), torch.zeros(5, 4))
