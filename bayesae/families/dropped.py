"""`DroppedInputs`: networks whose layers have lost some of their inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from bayesae.errors import DataError, ParameterError, ShapeError
from bayesae.functional import check_finite
from bayesae.random import per_draw
from bayesae.types import Params

__all__ = ["DroppedInputs", "input_factors"]


@dataclass(frozen=True)
class DroppedInputs:
    r"""q(theta): chosen weight tensors with every input kept with probability 1 - p, and raised by as much.

    .. math:: \theta_{oi} = m_{oi} \frac{b_i}{1 - p}, \quad b_i \sim \mathrm{Bernoulli}(1 - p); \qquad
              \mathbb{E}[\theta_{oi}] = m_{oi}, \quad
              \operatorname{Cov}[\theta_{oi}, \theta_{o'i'}] = \delta_{ii'} \frac{p}{1 - p}\, m_{oi} m_{o'i}

    What MC-dropout leaves: a layer whose weights have lost the column of an input is a layer whose input was dropped.
    A draw is one network, the same for all rows, so that scores and geodesics over draws see functions.

    Args:
        mean: Every parameter in its own shape.
        axes: Where the inputs of a masked tensor stand, by its name: 1 in weights of linear layers and convolutions,
            0 of transposed ones. Other tensors are fixed.
        rate: p, in [0, 1).
        info: What the fit had to say, by name.

    Exact when: always: mean and variances are those of its draws.
    Cost: one number an input and draw.

    Raises:
        DataError: If the rate is not in [0, 1).
        ParameterError: If a masked tensor is unknown.
        ShapeError: If it has no such axis.
        NonFiniteError: If a mean is not finite.
    """

    mean: Params
    axes: Mapping[str, int]
    rate: float
    info: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.rate < 1:
            raise DataError("a rate in [0, 1)", f"{self.rate}", "It is the share of inputs that are dropped.")
        if unknown := sorted(self.axes.keys() - self.mean.keys()):
            raise ParameterError(f"names among {sorted(self.mean)}", f"{unknown}", "Name them as in model.network.")
        for name, axis in self.axes.items():
            if not 0 <= axis < self.mean[name].dim():
                got = f"axis {axis} of {tuple(self.mean[name].shape)}"
                raise ShapeError(f"an axis of {name!r}", got, "1 for linear layers, 0 for transposed convolutions.")
        check_finite(self.mean, "means", "Did the training diverge?")

    @property
    def is_linearised(self) -> bool:
        """False: draws are networks, and are run as such."""
        return False

    @property
    def n_atoms(self) -> int | None:
        """None: all masks together are too many to be counted out."""
        return None

    def sample(self, n: int) -> Params:
        r"""Draws of every parameter, leaves (S = n, \*shape); fixed ones are expanded without a copy."""
        factors = input_factors(n, self.mean, self.axes, self.rate)
        return {
            name: leaf * factors[name] if name in factors else leaf.expand(n, *leaf.shape)
            for name, leaf in self.mean.items()
        }

    def variances(self) -> Params:
        """Marginal variance of every parameter in its own shape, 0 for fixed ones."""
        odds = self.rate / (1 - self.rate)
        return {
            name: odds * leaf**2 if name in self.axes else torch.zeros_like(leaf) for name, leaf in self.mean.items()
        }


def input_factors(n: int, params: Params, axes: Mapping[str, int], rate: float) -> Params:
    r"""What draws multiply the inputs of masked tensors by: 0, or 1 / (1 - p).

    Args:
        n: S.
        params: Every parameter in its own shape.
        axes: Where inputs stand in the masked tensors.
        rate: p.

    Returns:
        By name of the masked tensors, of S and their shapes with every axis but that of the inputs 1.
    """
    sizes = [params[name].shape[axis] for name, axis in axes.items()]
    device = next(iter(params.values())).device
    # float32 whatever the network's dtype, so that a seed drops the same inputs
    numbers = per_draw(n, lambda one: torch.rand(sum(sizes), generator=one, device=device), device)
    factors = {}
    for (name, axis), part in zip(axes.items(), numbers.split(sizes, 1), strict=True):
        leaf = params[name]
        shape = [leaf.shape[axis] if place == axis else 1 for place in range(leaf.dim())]
        factors[name] = ((part >= rate).to(leaf) / (1 - rate)).reshape(n, *shape)
    return factors
