"""Errors of the library: each says what was expected, what came, and what to do about it."""

from __future__ import annotations

__all__ = [
    "BayesAEError",
    "DataError",
    "DivergedError",
    "FileError",
    "NonFiniteError",
    "NotFittedError",
    "ParameterError",
    "ShapeError",
    "UnsupportedError",
]


class BayesAEError(Exception):
    """Base of every error that this library raises on purpose.

    Args:
        expected: What the function needed.
        got: What it was given.
        fix: What the caller can do about it.
    """

    def __init__(self, expected: str, got: str, fix: str) -> None:
        self.expected, self.got, self.fix = expected, got, fix
        super().__init__(f"expected {expected}; got {got}. {fix}")

    def __reduce__(self) -> tuple[type[BayesAEError], tuple[object, ...]]:
        return type(self), (self.expected, self.got, self.fix)


class ShapeError(BayesAEError, ValueError):
    """A tensor has the wrong shape or dtype."""


class DataError(BayesAEError, ValueError):
    """Data that cannot be used: none at all, out of the likelihood's range, a file that is not there."""


class FileError(BayesAEError, ValueError):
    """A file that is missing, damaged, of another format, or written by a later version."""


class NonFiniteError(BayesAEError, ValueError):
    """NaN or infinity, in what was given or in what came out."""


class DivergedError(NonFiniteError):
    """A run that draws weights has left the numbers; what it collected before is not lost.

    Args:
        expected: What the run needed.
        got: What it came to.
        fix: What the caller can do about it.
        posterior: The weight posterior of the draws before; None if there is none yet.
    """

    def __init__(self, expected: str, got: str, fix: str, posterior: object = None) -> None:
        super().__init__(expected, got, fix)
        self.posterior = posterior

    def __reduce__(self) -> tuple[type[DivergedError], tuple[object, ...]]:
        return type(self), (self.expected, self.got, self.fix, self.posterior)


class ParameterError(BayesAEError, ValueError):
    """Parameter names that are missing, unknown or select nothing."""


class UnsupportedError(BayesAEError, RuntimeError):
    """A combination that the method has no rule for; the message names the part."""


class NotFittedError(BayesAEError, RuntimeError):
    """Something is asked of an object before it was fitted."""
