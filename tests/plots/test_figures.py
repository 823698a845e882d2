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
