"""Checks of the numbers that code posteriors are made with."""

from __future__ import annotations

import math

from bayesae.errors import DataError

__all__ = ["check_number"]


def check_number(name: str, value: object, *, below: float = math.inf, is_zero_allowed: bool = False) -> None:
    """Raise unless an argument is a positive number.

    Args:
        name: Of the argument.
        value: What was given.
        below: What it must be smaller than.
        is_zero_allowed: Whether 0 will do.

    Raises:
        DataError: If it is not.
    """
    if not isinstance(value, bool) and isinstance(value, int | float):
        if 0 < value < below or (is_zero_allowed and value == 0):
            return
    low = "at least 0" if is_zero_allowed else "above 0"
    raise DataError(f"{name}, a number {low} and below {below:g}", repr(value)[:80], f"Change {name}=.")
