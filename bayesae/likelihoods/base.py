"""What likelihoods share: where the parameters of a number of data stand among the outputs, and sums over numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bayesae.errors import DataError, ShapeError, UnsupportedError
from bayesae.functional import at_least_float32
from bayesae.types import OutputHessian

__all__ = ["Head", "check_counts_of", "check_range", "float64_of", "log_normal_mean", "softplus", "sum_numbers"]


class Head(nn.Module):
    r"""A likelihood whose numbers are independent and have ``n_parameters`` outputs each.

    .. math:: \log p(x \mid f) = \sum_{d \in D} \log p(x_d \mid f_{d, 1}, \dots, f_{d, g})

    With one parameter outputs have the data's shape (\*D); with g parameters they have a trailing axis (\*D, g), so
    that a decoder of flat outputs ends in ``nn.Unflatten(1, (-1, g))``. A likelihood is a small module, so that a noise
    scale travels with ``state_dict`` and ``deepcopy``; it has no parameters.

    A head of one's own defines `log_density` and what `bayesae.types.Likelihood` asks for beyond this class.
    """

    n_parameters: int = 1
    is_fisher: bool = False
    is_nominal: bool = False
    is_learned: bool = False
    is_estimated: bool = True

    @property
    def arguments(self) -> dict[str, Any]:
        """Constructor arguments as JSON can write them; what was learned travels in ``state_dict`` instead."""
        return {}

    def log_density(self, outputs: Tensor, target: Tensor) -> Tensor:
        r"""Log-density of every number: outputs (..., B, \*O) and target (B, \*D) to (..., B, \*D), nats."""
        raise NotImplementedError

    def attainable(self, target: Tensor) -> Tensor:
        r"""Largest log-density that any outputs give each number of ``target`` (B, \*D): (B, \*D), nats."""
        fix = "Its densities grow without bound: use the score as it is."
        raise UnsupportedError("a likelihood whose density has a largest value", type(self).__name__, fix)

    def mean(self, outputs: Tensor) -> Tensor:
        r"""Mean in data space, (..., B, \*D)."""
        raise NotImplementedError

    def variance(self, outputs: Tensor) -> Tensor:
        r"""Noise variance in data space, (..., B, \*D)."""
        raise NotImplementedError

    def distribution(self, outputs: Tensor) -> torch.distributions.Distribution:
        r"""The law of the data, batch shape (..., B, \*D)."""
        raise NotImplementedError

    def output_hessian(self, outputs: Tensor) -> OutputHessian:
        r"""Hessian, or Fisher information, of -log p in the outputs (B, \*O)."""
        raise NotImplementedError

    def normal_moments(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """Data-space mean, expected noise variance and variance of the mean under Normal outputs, or None."""
        raise NotImplementedError

    def log_predictive(self, mean: Tensor, var: Tensor, target: Tensor) -> Tensor:
        r"""Log-density (B, \*D) of every number under a predictive with these data-space moments."""
        raise NotImplementedError

    def check(self, target: Tensor) -> None:
        """Any real target will do."""

    def log_prob(self, outputs: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        r"""Log-density of a row: the sum of `log_density` over its numbers.

        Args:
            outputs: (..., B, \*O); scored in float32 or wider.
            target: (B, \*D).
            mask: True where a number counts, (B, \*D). Others may be anything, NaN included, in target and outputs:
                they give nothing to the sum and a gradient of 0.

        Returns:
            (..., B), nats.
        """
        outputs = at_least_float32(outputs)
        if mask is not None:
            # before the density and not after it: 0 times the gradient of a NaN is NaN
            outputs = torch.where(self.output_mask(mask), outputs, 0.0)
            target = torch.where(mask, target, 0.0)
        return sum_numbers(self.log_density(outputs, target), target, mask)

    def data_shape(self, output_shape: torch.Size) -> torch.Size:
        r"""Shape (\*D) of a row that outputs of shape (\*O) explain.

        Args:
            output_shape: Of one row's outputs.

        Returns:
            The same shape, or without its last axis where a number has several parameters.

        Raises:
            ShapeError: If there is no trailing axis of the parameters.
        """
        if self.n_parameters == 1:
            return torch.Size(output_shape)
        if len(output_shape) < 2 or output_shape[-1] != self.n_parameters:
            raise ShapeError(
                f"outputs (B, ..., {self.n_parameters}) for {type(self).__name__}",
                f"(B, {', '.join(map(str, output_shape))})",
                f"End the decoder in nn.Unflatten(1, (-1, {self.n_parameters})), say.",
            )
        return torch.Size(output_shape[:-1])

    def output_mask(self, mask: Tensor) -> Tensor:
        r"""Which outputs count: all parameters of the numbers that do.

        Args:
            mask: (B, \*D).

        Returns:
            (B, \*O).
        """
        return mask if self.n_parameters == 1 else mask[..., None].expand(*mask.shape, self.n_parameters)


def sum_numbers(values: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    r"""Sum (..., B, \*D) over the numbers of a row that ``mask`` leaves: (..., B)."""
    if mask is not None:
        values = torch.where(mask, values, 0.0)
    return values.flatten(values.dim() - target.dim() + 1).sum(-1) if target.dim() > 1 else values


def check_range(target: Tensor, name: str) -> None:
    r"""Raise unless all of ``target`` lies in [0, 1].

    Args:
        target: (B, \*D).
        name: Of the likelihood.

    Raises:
        DataError: Giving the range that came.
    """
    if target.numel() == 0:
        return  # no rows, no range
    low, high = float(target.min()), float(target.max())
    if low < 0 or high > 1:
        raise DataError(
            f"{name} data in [0, 1]",
            f"values from {low:.4g} to {high:.4g}",
            "Scale the data (x / 255 for bytes), or use a Gaussian likelihood.",
        )


def check_counts_of(target: Tensor, name: str) -> None:
    r"""Raise unless all of ``target`` are whole numbers of at least 0.

    Args:
        target: (B, \*D).
        name: Of what needs counts.

    Raises:
        DataError: Giving the first number that is not a count.
    """
    is_bad = ~((target >= 0) & (target == target.round()) & target.isfinite())
    if bool(is_bad.any()):
        raise DataError(
            f"counts 0, 1, 2, ... for {name}",
            f"{float(target[is_bad][0]):.6g}",
            "Give raw counts and not their logarithms or shares, or use a Gaussian likelihood.",
        )


def float64_of(what: str, given: object) -> Tensor:
    """Numbers that a caller gave, as a float64 tensor.

    Args:
        what: Expected, in words.
        given: Number, numbers, array or tensor.

    Returns:
        The numbers in their own shape, detached, on the CPU.

    Raises:
        DataError: If they are no numbers.
    """
    try:
        return torch.as_tensor(given, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(what, repr(given), f"Give numbers ({error}).") from error


def softplus(x: Tensor) -> Tensor:
    """Log(1 + exp(x)); torch's own default is linear from 20 on and so off by 2e-9."""
    return F.softplus(x, threshold=40)


def log_normal_mean(mean: Tensor, var: Tensor) -> Tensor:
    """E exp(f) for f ~ N(mean, var)."""
    return torch.exp(mean + 0.5 * var)
