"""The one way in for scores, p-values and rates as the guarantees take them."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from bayesae.data import as_tensor
from bayesae.errors import DataError, NonFiniteError, ShapeError

__all__ = ["check_rate", "checked_p_values", "checked_scores", "fewest_ranks"]


def checked_scores(scores: Tensor | np.ndarray, n_dims: int = 1) -> Tensor:
    """Scores of at least one row, none of them NaN.

    Args:
        scores: (N,), or (N, J) for J scores a row; tensors of any device and layout, with a gradient or without, and
            arrays of any kind.
        n_dims: 1 or 2.

    Returns:
        Detached, contiguous, in float64 on the CPU. It may share the caller's memory: whoever keeps it clones it. An
        infinite score stays what it is: the strangest of all.

    Raises:
        ShapeError: If there are other axes.
        DataError: If there is no score.
        NonFiniteError: If a score is NaN.
    """
    values = as_tensor(scores).detach().double().cpu().contiguous()
    if values.dim() != n_dims:
        wanted = "(N,)" if n_dims == 1 else "(N, J)"
        raise ShapeError(f"scores {wanted}", f"{tuple(values.shape)}", "Give one line of numbers a score.")
    if not values.numel():
        raise DataError("at least one score", "none", "Score some rows.")
    if n_nan := int(values.isnan().sum()):
        raise NonFiniteError("scores that are numbers", f"{n_nan} NaN", "Look at those rows: a NaN has no rank.")
    return values


def checked_p_values(p_values: Tensor | np.ndarray) -> Tensor:
    r"""P-values in (0, 1].

    Args:
        p_values: Of any shape but empty.

    Returns:
        The same in float64 on the CPU.

    Raises:
        DataError: If there is none, or one that is no p-value.
    """
    values = as_tensor(p_values).detach().double().cpu().contiguous()
    if not values.numel():
        raise DataError("at least one p-value", "none", "Test some rows.")
    is_wrong = ~((values > 0) & (values <= 1))
    if bool(is_wrong.any()):
        raise DataError("p-values in (0, 1]", f"{float(values[is_wrong][0])}", "Use those of a ConformalCalibration.")
    return values


def check_rate(name: str, rate: float) -> None:
    """Refuse a rate or level that is none.

    Args:
        name: Of the argument.
        rate: Its value.

    Raises:
        DataError: If it is not in (0, 1).
    """
    if not 0 < rate < 1:
        raise DataError(f"{name} in (0, 1)", f"{rate}", "0.05 is one in twenty.")


def fewest_ranks(rate: float) -> int:
    """The smallest n for which a p-value 1 / (n + 1) can be as small as a rate.

    Args:
        rate: In (0, 1).

    Returns:
        n, at least 1, by the very comparison that an alarm makes: 48 for 1 / 49, whose inverse rounds to above 49.
    """
    n = max(1, math.floor(1 / rate) - 2)
    while 1 / (n + 1) > rate:
        n += 1
    return n
