"""Traces of Markov chains."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from bayesae.errors import ShapeError

if TYPE_CHECKING:  # the caller made the axes; importing the library should not load matplotlib
    from matplotlib.axes import Axes

__all__ = ["chain_trace"]


def chain_trace(axes: Axes, values: Tensor, *, label: str = "log-joint, nats") -> Axes:
    """Draw one line a chain: chains that agree lie on one another and do not climb.

    Args:
        axes: Where to draw.
        values: Of each kept draw, (C, n): ``posterior.log_joint``, or one number of ``posterior.by_chain(...)``.
        label: What the values are, with their unit.

    Returns:
        The axes.

    Raises:
        ShapeError: If the values are not (C, n).
    """
    if values.dim() != 2:
        raise ShapeError("values (C, n)", f"{tuple(values.shape)}", "Choose one number a draw.")
    for number, chain in enumerate(values.detach().cpu().double().numpy()):
        axes.plot(range(1, len(chain) + 1), chain, linewidth=0.8, label=f"chain {number}")
    axes.set(xlabel="kept draw", ylabel=label)
    if len(values) > 1:
        axes.legend(frameon=False, fontsize="small")
    return axes
