from __future__ import annotations

import pytest
import torch
from matplotlib.figure import Figure

import bayesae as bae


def test_one_line_a_chain():
    axes, values = Figure().subplots(), torch.randn(3, 7)
    assert bae.plots.chain_trace(axes, values, label="nats") is axes
    assert len(axes.lines) == 3 and axes.get_ylabel() == "nats"
    for line, chain in zip(axes.lines, values, strict=True):
        assert list(line.get_xdata()) == [1, 2, 3, 4, 5, 6, 7]
        assert torch.equal(torch.as_tensor(line.get_ydata()).float(), chain)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["chain 0", "chain 1", "chain 2"]
    with pytest.raises(bae.errors.ShapeError, match=r"values \(C, n\)"):
        bae.plots.chain_trace(axes, values[0])
