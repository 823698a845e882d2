"""What arguments of the estimators may be; looked at by `fit`, because scikit-learn forbids it to ``__init__``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING

import numpy as np

from bayesae.errors import DataError, UnsupportedError
from bayesae.types import Likelihood

if TYPE_CHECKING:
    from bayesae.estimators.base import Table

__all__ = ["check_number", "check_training"]

_METHOD = ("epochs", "init", "update", "posterior")


def check_number(name: str, value: object, expected: str, fits: Callable[[float], bool], fix: str) -> None:
    """Raise unless an argument is a real number that fits.

    Args:
        name: Of the argument.
        value: What was given.
        expected: What it should be, after the name.
        fits: Whether a number will do.
        fix: What to do instead.

    Raises:
        DataError: If it does not.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not fits(float(value)):
        raise DataError(f"a {name} {expected}", repr(value)[:80], fix)


def check_training(estimator: Table) -> None:
    """Raise unless all arguments that the estimators share can be used.

    Args:
        estimator: Whose.

    Raises:
        DataError: If a size, a rate or a share is none.
        UnsupportedError: If the likelihood or the method of the weights is none.
    """
    hidden = estimator.hidden
    if hidden is not None:
        if isinstance(hidden, str) or not isinstance(hidden, Sequence | np.ndarray):
            raise DataError("a list of widths as hidden, or None", repr(hidden)[:80], "[16] is one layer of 16.")
        for width in hidden:
            _check_count("width in hidden", width, 1, "[16] is one layer of 16.")
    for name in ("latent_dim", "batch_size"):
        if getattr(estimator, name) is not None:
            _check_count(name, getattr(estimator, name), 1, "None follows the table.")
    _check_count("number of epochs", estimator.epochs, 1, "200 is the default.")
    if estimator.patience is not None:
        _check_count("patience", estimator.patience, 1, "None trains all epochs.")
    check_number("learning_rate", estimator.learning_rate, "above 0", lambda n: 0 < n < math.inf, "2e-3 is usual.")
    fix = "0.2 holds out a fifth."
    check_number("validation_fraction", estimator.validation_fraction, "in (0, 1)", lambda n: 0 < n < 1, fix)
    likelihood, weights = estimator.likelihood, estimator.weights
    if likelihood is not None and (isinstance(likelihood, type) or not isinstance(likelihood, Likelihood)):
        fix = "Give an object, likelihood=bae.likelihoods.Gaussian(per_output=True) say."
        raise UnsupportedError("a likelihood, or None", repr(likelihood)[:80], fix)
    if weights is not None and (isinstance(weights, type) or not all(hasattr(weights, part) for part in _METHOD)):
        fix = 'Give an object, weights=bae.weights.Laplace("kronecker") say.'
        raise UnsupportedError("a method of the weights, or None", repr(weights)[:80], fix)


def _check_count(name: str, value: object, least: int, fix: str) -> None:
    """Raise unless a value is a whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < least:
        raise DataError(f"a {name} that is a whole number of at least {least}", repr(value)[:80], fix)
