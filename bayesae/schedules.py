"""Schedules: factors of a learning rate or a step as functions of the share of a run that is done."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

from bayesae.errors import DataError, UnsupportedError

__all__ = ["Schedule", "as_number", "check_schedule", "constant", "cosine", "factor_at", "one_cycle"]

Schedule: TypeAlias = Literal["constant", "cosine", "one_cycle"] | Callable[[float], float]
"""Factor of the learning rate as a function of the share of training that is done, in [0, 1)."""


def as_number(value: object) -> float:
    """A real number of Python, NumPy or torch as a float; NaN for anything else."""
    number: Any = value
    try:
        return math.nan if isinstance(value, str) else float(number)
    except (TypeError, ValueError, RuntimeError):  # None, an array of several, a tensor of complex numbers
        return math.nan


def constant(progress: float) -> float:
    """1, whatever the progress."""
    return 1.0


def cosine(progress: float) -> float:
    r"""Half a cosine from 1 to 0: :math:`\tfrac12 (1 + \cos \pi p)`.

    Args:
        progress: p, share of training that is done.

    Returns:
        The factor.

    References:
        | SGDR: Stochastic Gradient Descent with Warm Restarts (Loshchilov, Hutter, 2017); no restarts here
    """
    return 0.5 * (1 + math.cos(math.pi * progress))


def one_cycle(progress: float) -> float:
    """Warm-up from 1/25 to 1 over the first three tenths, then down to 4e-6, both along half a cosine.

    Args:
        progress: Share of training that is done.

    Returns:
        The factor; the constants are those of ``torch.optim.lr_scheduler.OneCycleLR``.

    References:
        | Super-Convergence: Very Fast Training of Neural Networks Using Large Learning Rates (Smith, Topin, 2018)
        | Departure: momentum stays as it is.
    """
    if progress < _WARM_UP:
        return _LOW + (1 - _LOW) * (1 - cosine(progress / _WARM_UP))
    return _END + (1 - _END) * cosine((progress - _WARM_UP) / (1 - _WARM_UP))


_WARM_UP, _LOW, _END = 0.3, 1 / 25, 1 / 25e4
_SCHEDULES: dict[str, Callable[[float], float]] = {"constant": constant, "cosine": cosine, "one_cycle": one_cycle}


def factor_at(schedule: Schedule, progress: float) -> float:
    """What a schedule says.

    Args:
        schedule: A name or a function.
        progress: Share of training that is done.

    Returns:
        The factor of the learning rate.

    Raises:
        UnsupportedError: If the schedule is unknown.
        DataError: If it gives a negative factor, or none.
    """
    given = check_schedule(schedule)(progress)
    factor = as_number(given)
    if not 0 <= factor < math.inf:
        raise DataError("a schedule of factors of at least 0", f"{given!r} at {progress}", "1 is the full rate.")
    return factor


def check_schedule(schedule: Any) -> Callable[[float], float]:  # noqa: ANN401 - a name, a function, or neither
    """The function that a schedule is; raises `UnsupportedError` if it is neither a name nor a function."""
    if isinstance(schedule, str) and schedule in _SCHEDULES:
        return _SCHEDULES[schedule]
    if not callable(schedule):
        expected = f"a schedule, one of {list(_SCHEDULES)} or a function of the progress"
        raise UnsupportedError(expected, repr(schedule), "'constant' is the default.")
    return schedule  # pyright: ignore[reportReturnType] - what it gives is checked when it gives it
