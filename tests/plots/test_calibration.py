"""Figures of coverage."""

from __future__ import annotations

import matplotlib as mpl
import pytest
import torch
from matplotlib.figure import Figure

import bayesae as bae

mpl.use("Agg")


def test_coverage_draws_the_diagonal_and_every_curve():
    axes, levels = Figure().subplots(), torch.linspace(0.1, 0.9, 5)
    assert bae.plots.coverage(axes, {"a": (levels, levels**2), "b": (levels, levels)}) is axes
    assert axes.lines[0].get_xdata().tolist() == axes.lines[0].get_ydata().tolist() == [0, 1]
    assert torch.equal(torch.as_tensor(axes.lines[1].get_ydata()), levels**2)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b"]


def test_coverage_by_deviation_has_a_line_at_the_level():
    axes, inside = Figure().subplots(), torch.tensor([0.9, 0.8, 0.6])
    bae.plots.coverage_by_deviation(axes, {"a": inside, "one": inside[:1]}, level=0.9)
    assert axes.lines[0].get_ydata() == pytest.approx([0.9, 0.9])
    assert axes.lines[1].get_xdata().tolist() == pytest.approx([1 / 6, 1 / 2, 5 / 6])
    assert torch.equal(torch.as_tensor(axes.lines[1].get_ydata()), inside) and axes.lines[2].get_xdata() == [0.5]
    assert axes.get_ylabel() == "share of pixels inside the 90 % interval"
    assert axes.get_ylim()[0] == 0.5
    bae.plots.coverage_by_deviation(axes, {"b": 1 - inside}, level=0.9)
    assert axes.get_ylim()[0] < 0.1  # no point is hidden
