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

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

__all__ = [
    "Batch",
    "BlockHessian",
    "HessianFunction",
    "Likelihood",
    "LowRankHessian",
    "OutputHessian",
    "Params",
    "WeightPosterior",
    "WeightPrior",
]

Params = dict[str, Tensor]
"""Parameters by name, as in ``named_parameters``; draws of them have leaves ``(S, *shape)``."""


class Batch(NamedTuple):
    r"""What one step sees.

    Args:
        x: Inputs, (B, \*data).
        mask: True where ``x`` is observed, (B, \*data); None if everything is. Other entries are read as 0 and not
            scored. Neither are the entries of ``target`` in their places, clean or not: to score a target in full
            (denoising, say), set what is missing in ``x`` to 0 yourself and leave the mask out. A target of another
            size than x takes no mask: `ShapeError`.
        context: Labels or covariates, (B, ...).
        target: What the outputs are to explain, (B, ...); ``x`` itself if None.
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


@dataclass(frozen=True)
class BlockHessian:
    r"""Groups of outputs that curve together: logits of a category, or a mean and its scale.

    Args:
        values: (B, \*rest, g, g), positive semi-definite; ``rest`` are the other axes of the outputs, in order.
        axis: The axis of the group among the outputs (B, \*O), of size g; 1 is the first after the batch.
    """

    values: Tensor
    axis: int = 1


@dataclass(frozen=True)
class LowRankHessian:
    r""":math:`F^\top F`, plus a diagonal.

    Args:
        factor: F, (B, R, \*O).
        diagonal: (), (B, \*O), or None for 0.
    """

    factor: Tensor
    diagonal: Tensor | None = None


OutputHessian = Tensor | BlockHessian | LowRankHessian
HessianFunction = Callable[[Tensor], OutputHessian]


@runtime_checkable
class Likelihood(Protocol):
    r"""p(target | outputs): from the network's outputs (natural parameters) to data space.

    Outputs are (..., B, \*O), data (B, \*D). A likelihood with one parameter a number has O = D; one with g parameters
    a number has a trailing axis, O = (\*D, g).
    """

    @property
    def is_fisher(self) -> bool:
        """Whether `output_hessian` is the Fisher information, because the Hessian is not positive semi-definite."""
        ...

    @property
    def is_nominal(self) -> bool:
        """Whether data are classes without an order: moments then have an axis of the classes more than the data."""
        ...

    def check(self, target: Tensor) -> None:
        r"""Raise if ``target`` (B, \*D) cannot have come from this likelihood."""
        ...

    def data_shape(self, output_shape: torch.Size) -> torch.Size:
        r"""Shape (\*D) of a row of data that outputs of shape (\*O) explain; raises `ShapeError` if there is none."""
        ...

    def output_mask(self, mask: Tensor) -> Tensor:
        r"""Which outputs count, as many numbers as (B, \*O), where ``mask`` (B, \*D) is True where data count."""
        ...

    def distribution(self, outputs: Tensor) -> torch.distributions.Distribution:
        r"""The law of the data, independent over numbers: batch shape (..., B, \*D)."""
        ...

    def log_density(self, outputs: Tensor, target: Tensor) -> Tensor:
        r"""Log-density (..., B, \*D) of every number of ``target`` (B, \*D) under ``outputs`` (..., B, \*O), nats."""
        ...

    def attainable(self, target: Tensor) -> Tensor:
        r"""Largest log-density (B, \*D) that any outputs give each number of ``target`` (B, \*D), nats."""
        ...

    def log_prob(self, outputs: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        r"""Log-density (..., B) of ``target`` (B, \*D) under ``outputs`` (..., B, \*O), nats, summed over numbers."""
        ...

    def mean(self, outputs: Tensor) -> Tensor:
        r"""Mean in data space, (..., B, \*D); (..., B, \*D, C) where data are classes without an order."""
        ...

    def variance(self, outputs: Tensor) -> Tensor:
        """Noise variance in data space, of the shape of `mean`."""
        ...

    def output_hessian(self, outputs: Tensor) -> OutputHessian:
        r"""Hessian (or Fisher information) of -log p in the outputs (B, \*O): () if a constant times the identity."""
        ...

    def normal_moments(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        r"""Data-space mean, expected noise variance and variance of the mean if outputs ~ N(mean, diag(var)).

        Both arguments are (..., B, \*O). None where marginal variances of the outputs do not settle it: the moments
        then come from draws.
        """
        ...

    def log_predictive(self, mean: Tensor, var: Tensor, target: Tensor) -> Tensor:
        r"""Log-density (B, \*D) of every number of ``target`` under a predictive with these data-space moments."""
        ...


class WeightPrior(Protocol):
    """p(theta), over every parameter."""

    def log_prob(self, params: Params) -> Tensor:
        r"""Log-density (S,) of draws with leaves (S, \*shape)."""
        ...


@runtime_checkable
class WeightPosterior(Protocol):
    """q(theta): a family, whatever the method that fitted it.

    One that learned the likelihood's noise along with the weights has an attribute ``noise``, the likelihood's
    ``state_dict``, which `Predictive` puts in the place of the model's.
    """

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
