"""What a structure of `Laplace` is: how its curvature is summed over batches, and what a prior makes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from bayesae.curvature import Linearisation
from bayesae.distributed import add_over_ranks
from bayesae.families.base import Normal
from bayesae.subset import Subset
from bayesae.types import HessianFunction, Params

__all__ = ["Curvature", "Eigenvalues", "OnePass", "Precision", "Structure", "zeros"]


Precision: TypeAlias = float | Tensor
"""Prior precision of the chosen weights: one number for all, or (P,) float64 in the order of ``Subset.ravel``."""


class Curvature(Protocol):
    """G, the sum over all rows, as a diagonal prior precision Lambda meets it.

    One number for all weights is the fast case of most structures, and says the same as a vector of it.
    """

    def effective(self, precision: Precision) -> Tensor:
        """What data say of every weight, 1 - Lambda_ii (G + Lambda)^-1_ii, between 0 and 1: (P,).

        Its sum is the effective number of weights, Tr G (G + Lambda)^-1. Of one number only the sum counts, and of a
        structure with layers sums over whole layers: entries may stand for directions.
        """
        ...

    def log_det(self, precision: Precision) -> float:
        """Log det (G + Lambda), nats."""
        ...

    def posterior(self, mean: Params, precision: Precision, temperature: float, info: Mapping[str, float]) -> Normal:
        """N(mean, T (G + Lambda)^-1), linearised."""
        ...


@runtime_checkable
class Structure(Protocol):
    """How one form of G is summed: hyper-parameters only; the sums are handed round and never written on.

    Sums are float64, whatever the network's dtype.
    """

    @property
    def n_passes(self) -> int:
        """Passes over the data."""
        ...

    def start(self, linearisation: Linearisation, subset: Subset) -> Any:  # noqa: ANN401 - sums of its own kind
        """Sums before the first batch."""
        ...

    def add(
        self,
        sums: Any,  # noqa: ANN401
        linearisation: Linearisation,
        subset: Subset,
        x: Tensor,
        hessian: HessianFunction,
        mask: Tensor | None,
    ) -> Any:  # noqa: ANN401
        """Sums with the rows of one more batch."""
        ...

    def over_ranks(self, sums: Any) -> Any:  # noqa: ANN401
        """Sums of this pass added over the ranks of `torch.distributed`, each of which has seen a share of its rows."""
        ...

    def next_pass(self, sums: Any, subset: Subset) -> Any:  # noqa: ANN401
        """What the next pass starts from, after all rows of one."""
        ...

    def finish(self, sums: Any, subset: Subset, share: float) -> Curvature:  # noqa: ANN401
        """G from the last pass, times ``share`` = rows of the data set over rows seen."""
        ...


class OnePass:
    """A structure that is a plain sum over rows."""

    @property
    def n_passes(self) -> int:
        """1."""
        return 1

    def next_pass(self, sums: Any, subset: Subset) -> Any:  # noqa: ANN401
        """There is none: the sums themselves."""
        return sums

    def over_ranks(self, sums: Any) -> Any:  # noqa: ANN401
        """One tensor, added."""
        return add_over_ranks([sums])[0]


@dataclass(frozen=True)
class Eigenvalues:
    """What the evidence needs of a G that is diagonal in a basis in which Lambda is diagonal too.

    Args:
        eigenvalues: Non-negative, (P,), float64.
    """

    eigenvalues: Tensor

    def effective(self, precision: Precision) -> Tensor:
        """Of every eigenvalue h, h / (h + lambda)."""
        return self.eigenvalues / (self.eigenvalues + precision)

    def log_det(self, precision: Precision) -> float:
        """The sum of log (h + lambda)."""
        return float(torch.log(self.eigenvalues + precision).sum())


def zeros(linearisation: Linearisation, *shape: int) -> Tensor:
    """Float64 zeros where the network's weights are."""
    device = next(iter(linearisation.params.values())).device
    return torch.zeros(shape, dtype=torch.float64, device=device)
