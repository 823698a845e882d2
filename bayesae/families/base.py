"""What Normal distributions over weights share, whatever the form of their covariance."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor, nn

from bayesae.curvature import (
    DenseCovariance,
    DiagonalCovariance,
    KroneckerCovariance,
    Linearisation,
    LowRankCovariance,
    output_variance,
)
from bayesae.errors import DataError
from bayesae.functional import at_least_float32
from bayesae.random import per_draw
from bayesae.subset import Subset
from bayesae.types import Params

__all__ = ["Covariance", "Normal", "check_sign", "standard_normal"]

Covariance: TypeAlias = DiagonalCovariance | KroneckerCovariance | DenseCovariance | LowRankCovariance


class Normal(ABC):
    """N(mean, covariance) over a subset of the weights, the others fixed at the mean.

    A family gives a draw around 0, the marginal variances and the covariance as the curvature engine reads it.
    """

    mean: Params
    subset: Subset
    is_linearised: bool
    info: Mapping[str, float]

    @property
    def n_atoms(self) -> int | None:
        """None: continuous."""
        return None

    def sample(self, n: int) -> Params:
        r"""Draws of every parameter, leaves (S = n, \*shape); fixed ones are expanded without a copy."""
        centre = self.subset.ravel(self.mean)
        draws = per_draw(n, lambda generator: centre + self._deviation(generator).to(centre), centre.device)
        return self.subset.scatter(draws, self.mean)

    def variances(self) -> Params:
        """Marginal variance of every parameter in its own shape, 0 for fixed ones."""
        zeros = {name: torch.zeros_like(leaf) for name, leaf in self.mean.items()}
        return self.subset.scatter(self._marginal_variance().to(self.subset.ravel(zeros)), zeros)

    @abstractmethod
    def covariance(self) -> Covariance:
        """The covariance as `curvature.output_variance` reads it; fixed weights are left out or 0."""

    def output_variance(self, network: nn.Module, x: Tensor, chunk_size: int | None = None) -> tuple[Tensor, Tensor]:
        r"""Outputs at the mean and their exact variance in the linearised network, both (B, \*O).

        Args:
            network: Maps x to outputs; its own weights do not enter.
            x: (B, \*data).
            chunk_size: Rows at a time; None bounds memory by itself.

        Returns:
            Outputs and the variance of each.
        """
        linearisation = Linearisation(network, self._point(), chunk_size=chunk_size)
        outputs, variance = output_variance(linearisation, x, self.covariance())
        dtype = at_least_float32(next(iter(self.mean.values()))).dtype
        return outputs.to(dtype), variance.to(dtype)

    def _point(self) -> Params:
        """Where the network is linearised; its dtype is that of the engine's arithmetic."""
        return {name: at_least_float32(leaf) for name, leaf in self.mean.items()}

    @abstractmethod
    def _deviation(self, generator: torch.Generator) -> Tensor:
        """One draw of the chosen weights less their mean, (P,)."""

    @abstractmethod
    def _marginal_variance(self) -> Tensor:
        """Of the chosen weights, (P,)."""

    def _in_shape(self, values: Tensor) -> Params:
        r"""Numbers (..., P) of the chosen weights in their parameters' shapes, 0 elsewhere; other tensors left out."""
        point = self._point()
        zeros = {name: torch.zeros_like(point[name]) for name in self.subset.masks}
        return self.subset.scatter(values.to(self.subset.ravel(zeros).dtype), zeros) if zeros else {}


def standard_normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """Independent standard normal numbers of the shape, dtype and device of ``like``."""
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)


def check_sign(values: Tensor, what: str, *, allows_zero: bool) -> None:
    """Raise if a variance or a precision has the wrong sign.

    Args:
        values: The numbers.
        what: What they are, for the message.
        allows_zero: Whether 0 will do: a variance of 0 fixes a weight, a precision of 0 frees it entirely.

    Raises:
        DataError: With the smallest of them.
    """
    if not bool((values >= 0).all() if allows_zero else (values > 0).all()):
        sign = "non-negative" if allows_zero else "positive"
        raise DataError(f"{sign} {what}", f"{float(values.min()):.3g} at the least", "Was a sign lost, or a prior?")
