"""Vectors of parameters, as laplace-torch keeps them, and their names."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["masks_of", "unflatten"]


def unflatten(vector: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    r"""Cut a vector of parameters into their shapes.

    Args:
        vector: (..., P), parameters one after the other.
        like: Parameters in that order.

    Returns:
        Leaves (..., \*shape), views of the vector.
    """
    parts = vector.split([value.numel() for value in like.values()], -1)
    return {
        name: part.reshape(*vector.shape[:-1], *value.shape)
        for (name, value), part in zip(like.items(), parts, strict=True)
    }


def masks_of(indices: Tensor, like: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """Turn positions in the vector of parameters into masks.

    Args:
        indices: Positions (S,) in any order, each once.
        like: Parameters in the vector's order.

    Returns:
        Masks of those parameters that have a chosen weight, and for each position its rank (S,) in the masks' order.
    """
    chosen = torch.zeros(sum(value.numel() for value in like.values()), dtype=torch.bool)
    chosen[indices.cpu()] = True
    masks = {name: mask for name, mask in unflatten(chosen, like).items() if mask.any()}
    return masks, indices.argsort().argsort()
