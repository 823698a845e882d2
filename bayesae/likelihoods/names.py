"""Likelihoods by name, for files and command lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bayesae.errors import ParameterError
from bayesae.likelihoods.base import Head
from bayesae.likelihoods.bernoulli import Bernoulli
from bayesae.likelihoods.categorical import Categorical
from bayesae.likelihoods.continuous_bernoulli import ContinuousBernoulli
from bayesae.likelihoods.counts import NegativeBinomial, Poisson
from bayesae.likelihoods.gaussian import Gaussian
from bayesae.likelihoods.heteroscedastic import HeteroscedasticGaussian
from bayesae.likelihoods.mixed import Mixed
from bayesae.likelihoods.student_t import StudentT

__all__ = ["NAMES", "build"]

_CLASSES: dict[str, type[Head]] = {
    kind.__name__: kind
    for kind in (
        Gaussian,
        HeteroscedasticGaussian,
        Bernoulli,
        ContinuousBernoulli,
        Categorical,
        Poisson,
        NegativeBinomial,
        StudentT,
        Mixed,
    )
}
NAMES: tuple[str, ...] = tuple(_CLASSES)
"""Names that `build` knows."""


def build(name: str, arguments: Mapping[str, Any] | None = None) -> Head:
    """A fresh likelihood from its class name and its ``arguments``; what it had learned is in its ``state_dict``.

    Args:
        name: One of `NAMES`.
        arguments: As its property ``arguments`` gives them; None for defaults.

    Returns:
        The likelihood.

    Raises:
        ParameterError: If the name, or the name of an argument, is unknown, or the arguments have no names.
        DataError: If an argument has no value that the likelihood takes.
    """
    if not isinstance(name, str) or name not in _CLASSES:
        raise ParameterError(f"a likelihood among {', '.join(NAMES)}", repr(name), "Mind capitals.")
    if not isinstance(arguments, Mapping | None):
        raise ParameterError(f"arguments of {name} by name", repr(arguments), 'Write {"scale": 0.1}, say.')
    given = dict(arguments or {})
    if name == "Mixed" and "columns" in given:
        given["columns"] = [build(*column) for column in _pairs(given["columns"])]
    try:
        return _CLASSES[name](**given)
    except TypeError as error:
        raise ParameterError(f"arguments of {name}", f"{given} ({error})", "See its documentation.") from error


def _pairs(columns: object) -> Sequence[Sequence[Any]]:
    """What a table's columns must be: a name and its arguments each."""
    listed = list(columns) if isinstance(columns, Sequence) else [columns]
    pairs = [column for column in listed if isinstance(column, Sequence) and len(column) == 2]
    if len(pairs) < len(listed):
        raise ParameterError("a name and its arguments for every column", repr(columns), 'Write ["Gaussian", {}], say.')
    return pairs
