"""What likelihoods share: where the parameters of a number of data stand among the outputs, and sums over numbers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bayesae.errors import ShapeError

__all__ = ["Head", "sum_numbers"]


class Head(nn.Module):
    r"""A likelihood whose numbers are independent and have ``n_parameters`` outputs each.

    With one parameter outputs have the data's shape (\*D); with g parameters they have a trailing axis (\*D, g), so
    that a decoder of flat outputs ends in ``nn.Unflatten(1, (-1, g))``. A likelihood is a small module, so that a noise
    scale travels with ``state_dict`` and ``deepcopy``; it has no parameters.
    """

    n_parameters: int = 1
    is_fisher: bool = False

    def check(self, target: Tensor) -> None:
        """Any real target will do."""

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
