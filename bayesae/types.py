"""The types that every part of the library shares, and the letters of its axes.

Axes, in the order in which they stand (each draw adds its axis on the left, as in torch):

====  ==============================================================================
K     code draws
S     weight draws
B     rows of a batch
Z     code dimensions
O     outputs of the network for one row, any number of axes (``*O``)
N, P  rows of the data set; parameters
R     rows of a factor, so that a curvature reads ``factor.T @ factor``
====  ==============================================================================
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

__all__ = ["Batch", "Likelihood", "Params", "WeightPosterior", "WeightPrior"]

Params = dict[str, Tensor]
"""Parameters by name, as in ``named_parameters``; draws of them have leaves ``(S, *shape)``."""


class Batch(NamedTuple):
    r"""What one step sees.

    Args:
        x: Inputs, (B, \*data).
        mask: True where ``x`` is observed, (B, \*data); None if everything is.
        context: Labels or covariates, (B, ...).
        target: What the outputs are to explain; ``x`` itself if None.
        index: Row numbers in the data set, (B,): what persistent chains key on.
    """

    x: Tensor
    mask: Tensor | None = None
    context: Tensor | None = None
    target: Tensor | None = None
    index: Tensor | None = None  # pyright: ignore[reportIncompatibleMethodOverride] - nobody searches a batch

    @property
    def explained(self) -> Tensor:
        """The tensor that the likelihood scores: ``target``, or ``x`` if there is none."""
        return self.x if self.target is None else self.target


@runtime_checkable
class Likelihood(Protocol):
    """p(target | outputs): from the network's outputs (natural parameters) to data space."""

    def check(self, target: Tensor) -> None:
        r"""Raise if ``target`` (B, \*O) cannot have come from this likelihood."""
        ...

    def log_prob(self, outputs: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        r"""Log-density (..., B) of ``target`` (B, \*O) under ``outputs`` (..., B, \*O), in nats."""
        ...

    def mean(self, outputs: Tensor) -> Tensor:
        r"""Mean in data space, (..., B, \*O)."""
        ...

    def variance(self, outputs: Tensor) -> Tensor:
        r"""Noise variance in data space, broadcastable to (..., B, \*O)."""
        ...

    def output_hessian(self, outputs: Tensor) -> Tensor:
        r"""Diagonal of the Hessian of -log p in the outputs: () if constant, else (B, \*O)."""
        ...

    def normal_moments(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Data-space mean, expected noise variance and variance of the mean if outputs ~ N(mean, var)."""
        ...

    def log_predictive(self, mean: Tensor, var: Tensor, target: Tensor) -> Tensor:
        r"""Pixel-wise log-density (B, \*O) of ``target`` under a predictive with these data-space moments."""
        ...


class WeightPrior(Protocol):
    """p(theta), over every parameter."""

    def log_prob(self, params: Params) -> Tensor:
        r"""Log-density (S,) of draws with leaves (S, \*shape)."""
        ...


@runtime_checkable
class WeightPosterior(Protocol):
    """q(theta): a family, whatever the method that fitted it."""

    @property
    def mean(self) -> Params:
        """Mean of every parameter, in its own shape."""
        ...

    @property
    def is_linearised(self) -> bool:
        """Whether predictions should linearise the network around the mean (a Laplace posterior's should)."""
        ...

    @property
    def n_atoms(self) -> int | None:
        """Number of particles, or None for a continuous distribution."""
        ...

    def sample(self, n: int) -> Params:
        r"""Draws with leaves (S = n, \*shape), of **every** parameter."""
        ...
