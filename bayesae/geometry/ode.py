"""Ordinary differential equations, many at once, each with a step size of its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bayesae.errors import NonFiniteError, UnsupportedError

__all__ = ["integrate"]

# Dormand and Prince's pair of orders 5 and 4
_TIMES = (0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1)
_ROWS = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


def integrate(
    rate: Callable[[Tensor, Tensor, Tensor], Tensor], state: Tensor, *, tolerance: float, max_steps: int
) -> Tensor:
    """States at time 1 of ``dy/dt = rate`` from those at time 0, by Dormand and Prince's pair with error control.

    Args:
        rate: Times (A,), states (A, Y) and the numbers (A,) of the rows that they belong to, to derivatives (A, Y).
        state: (B, Y).
        tolerance: Largest local error of a step: absolute, and relative to the state; ten roundings at least.
        max_steps: Steps tried before giving up.

    Returns:
        (B, Y).

    Raises:
        NonFiniteError: If steps shrink to nothing because the rate is not finite; where a trial alone runs into such
            values, the step is shortened.
        UnsupportedError: If time 1 is not reached in ``max_steps``.
    """
    tolerance = max(tolerance, 10 * torch.finfo(state.dtype).eps)
    state, times = state.clone(), torch.zeros(len(state), dtype=state.dtype, device=state.device)
    steps = torch.full_like(times, 0.05)
    rows = torch.arange(len(state), device=state.device)
    for _ in range(max_steps):
        if not len(rows):
            return state
        h, y, t = torch.minimum(steps[rows], 1 - times[rows]), state[rows], times[rows]
        slopes: list[Tensor] = []
        inner = y
        for share, row in zip(_TIMES, _ROWS, strict=True):
            inner = y + h[:, None] * sum((a * k for a, k in zip(row, slopes, strict=True)), torch.zeros_like(y))
            slopes.append(rate(t + share * h, inner, rows))
        error = h[:, None] * sum((e * k for e, k in zip(_ERROR, slopes, strict=True)), torch.zeros_like(y))
        size = (error / (tolerance * (1 + torch.maximum(y.abs(), inner.abs())))).abs().amax(1)
        is_good = size <= 1  # a NaN is not
        state[rows[is_good]] = inner[is_good]
        times[rows[is_good]] += h[is_good]
        factor = torch.nan_to_num(0.9 * size.clamp(min=1e-10) ** -0.2, nan=0.2).clamp(0.2, 5)
        steps[rows] = h * factor
        is_stuck = steps[rows] < 1e-12
        if is_stuck.any():
            got = f"{int(is_stuck.sum())} of {len(state)} curves that run into one that is not, at most"
            got = f"{got} to time {float(times[rows[is_stuck]].max()):.3g}"
            fix = "Shorten the velocity; does the decoder change along every code dimension there?"
            raise NonFiniteError("a metric that is finite and positive definite along the curve", got, fix)
        rows = rows[times[rows] < 1 - 1e-12]
    if not len(rows):
        return state
    got = f"{len(rows)} of {len(state)} curves at time {float(times[rows].min()):.3g} after {max_steps} steps"
    raise UnsupportedError("curves that reach time 1", got, "Allow more steps, a larger tolerance, or shorten them.")
