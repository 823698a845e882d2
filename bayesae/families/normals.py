"""Normal distributions over weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bayesae.curvature import output_variance
from bayesae.errors import ShapeError
from bayesae.functional import check_finite
from bayesae.random import per_draw
from bayesae.subset import Subset
from bayesae.types import Params

__all__ = ["DiagonalNormal"]


@dataclass(frozen=True)
class DiagonalNormal:
    r"""q(theta) = N(mean, diag(var)) over a subset of the weights, the others fixed at the mean.

    Args:
        mean: Every parameter in its own shape.
        var: Variances of the chosen weights, (P,), units of theta squared.
        subset: Which weights these are.
        is_linearised: Whether predictions should linearise the network around the mean.
        info: What the fit had to say, by name.

    Exact when: the posterior is Normal and the weights are independent under it.
    Cost: memory of two sets of weights; a draw costs P random numbers.

    Raises:
        ParameterError: If the subset names unknown parameters.
        ShapeError: If ``var`` is not (P,).
        NonFiniteError: If a mean or a variance is not finite.
    """

    mean: Params
    var: Tensor
    subset: Subset
    is_linearised: bool = False
    info: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.subset.check(self.mean)
        if self.var.shape != (len(self.subset),):
            raise ShapeError(f"var of shape ({len(self.subset)},)", f"{tuple(self.var.shape)}", "Ravel it first.")
        check_finite(self.mean | {"var": self.var}, "means and variances", "Did the training diverge?")

    @property
    def n_atoms(self) -> int | None:
        """None: continuous."""
        return None

    def sample(self, n: int) -> Params:
        r"""Draws of every parameter, leaves (S = n, \*shape); fixed ones are expanded without a copy."""
        centre = self.subset.ravel(self.mean)
        var = self.var.to(centre)

        def draw(generator: torch.Generator) -> Tensor:
            noise = torch.randn(centre.shape, generator=generator, dtype=centre.dtype, device=centre.device)
            return centre + var.sqrt() * noise

        return self.subset.scatter(per_draw(n, draw, centre.device), self.mean)

    def variances(self) -> Params:
        """Variance of every parameter in its own shape, 0 for fixed ones."""
        zeros = {name: torch.zeros_like(leaf) for name, leaf in self.mean.items()}
        return self.subset.scatter(self.var.to(next(iter(zeros.values()))), zeros)

    def output_variance(self, network: nn.Module, x: Tensor, chunk_size: int | None = None) -> tuple[Tensor, Tensor]:
        r"""Outputs at the mean and their exact variance in the linearised network, both (B, \*O)."""
        return output_variance(network, self.mean, self.variances(), x, chunk_size=chunk_size)
