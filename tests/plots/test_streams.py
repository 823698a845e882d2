from __future__ import annotations

import pytest
import torch
from matplotlib.figure import Figure

import bayesae as bae


def test_one_line_a_monitor_and_the_limits():
    axes, values = Figure().subplots(), {"a": torch.randn(4), "b": torch.randn(4)}
    assert bae.plots.stream_trace(axes, values, limit=3.0, label="log", change=10, every=5) is axes
    first, second, limit, change = axes.lines
    assert list(first.get_xdata()) == [5, 10, 15, 20] == list(second.get_xdata())
    assert torch.equal(torch.as_tensor(second.get_ydata()).float(), values["b"])
    assert set(limit.get_ydata()) == {3.0} and set(change.get_xdata()) == {10}
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b", "alarm", "change"]


def test_without_a_change_there_is_no_line_for_it():
    axes = bae.plots.stream_trace(Figure().subplots(), {"a": torch.randn(3)}, limit=0.0, label="log")
    assert len(axes.lines) == 2 and list(axes.lines[0].get_xdata()) == [1, 2, 3]
    with pytest.raises(bae.errors.ShapeError, match=r"values \(n,\); got \(2, 3\) of a"):
        bae.plots.stream_trace(axes, {"a": torch.randn(2, 3)}, limit=0.0, label="log")
