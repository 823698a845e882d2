"""How the weight and the bias of a linear layer, convolutions among them, stand in one matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesae.types import Params

__all__ = ["Layout"]


@dataclass(frozen=True)
class Layout:
    r"""The matrix :math:`[W, b]` of a Linear layer, a convolution or a transposed convolution.

    Pre-activations are :math:`h_{g,c,t} = \sum_j [W, b]_{g,c,j} \, [a, 1]_{g,j,t}` over groups g, channels c of a
    group, positions t and patch entries j = (input channel, tap); the last j is the bias.

    Args:
        weight: Name of the weight.
        bias: Name of the bias, or None.
        shape: The weight's own shape.
        groups: Number of groups, 1 for Linear layers.
        is_transposed: Whether the weight is (in, out / groups, \*taps) as in transposed convolutions.
    """

    weight: str
    bias: str | None
    shape: torch.Size
    groups: int = 1
    is_transposed: bool = False

    @property
    def n_out(self) -> int:
        """Channels of one group, C."""
        return self.shape[1] if self.is_transposed else self.shape[0] // self.groups

    @property
    def n_in(self) -> int:
        """Columns of the matrix, J: patch entries of one group, and one for the bias."""
        return self.shape.numel() // (self.groups * self.n_out) + (self.bias is not None)

    @property
    def names(self) -> list[str]:
        """Names of the parameters in the matrix."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def join(self, params: Mapping[str, Tensor]) -> Tensor:
        r"""The matrix (..., g, C, J) of parameters (..., \*shape)."""
        weight = params[self.weight]
        lead = weight.shape[: weight.dim() - len(self.shape)]
        weight = weight.reshape(*lead, self.groups, -1, *self.shape[1:])
        if self.is_transposed:
            weight = weight.transpose(len(lead) + 1, len(lead) + 2)
        matrix = weight.flatten(len(lead) + 2)
        if self.bias is None:
            return matrix
        return torch.cat([matrix, params[self.bias].reshape(*lead, self.groups, -1, 1)], -1)

    def split(self, matrix: Tensor) -> Params:
        r"""Parameters (..., \*shape) of a matrix (..., g, C, J); the inverse of `join`."""
        lead = matrix.shape[:-3]
        part = matrix if self.bias is None else matrix[..., :-1]
        if self.is_transposed:
            n_in = self.shape[0] // self.groups
            part = part.reshape(*lead, self.groups, self.n_out, n_in, -1).transpose(-3, -2)
        result = {self.weight: part.reshape(*lead, *self.shape)}
        if self.bias is not None:
            result[self.bias] = matrix[..., -1].reshape(*lead, -1)
        return result
