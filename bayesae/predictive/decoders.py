"""The decoder under weight draws that are fixed: what geometry takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesae.errors import ShapeError
from bayesae.functional import n_draws, select_draws
from bayesae.types import Params

__all__ = ["DrawnDecoder"]

_Decode = Callable[[Params, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class DrawnDecoder:
    r"""Codes (B, Z) to data-space means (S, B, \*O) under S weight draws.

    Args:
        shares: What decodes under given weights, and the draws that are its own, (S', \*shape) a leaf.
        context: (1, C) for all codes, or (B, C), one for each; None for a decoder that takes none.

    Exact when: always, given the draws.
    Cost: one pass of the decoder for every draw and code.
    """

    shares: tuple[tuple[_Decode, Params], ...]
    context: Tensor | None

    def __call__(self, z: Tensor) -> Tensor:
        r"""Means (S, B, \*O) of codes (B, Z); gradients pass.

        Args:
            z: (B, Z).

        Returns:
            The means.

        Raises:
            ShapeError: If there are neither one context nor as many as codes.
        """
        context = self.context
        if context is not None and len(context) not in (1, len(z)):
            fix = "Give one for every code, or one, of shape (1, C), for all."
            raise ShapeError(f"contexts of {len(z)} codes", f"{len(context)}", fix)
        given = None if context is None else context.to(z).expand(len(z), -1)
        return torch.cat([decode(params, z, given) for decode, params in self.shares])

    @property
    def singles(self) -> tuple[DrawnDecoder, ...]:
        """The same with one draw each, which view the same numbers: a draw's own geodesics need no other."""
        return tuple(
            DrawnDecoder(((decode, select_draws(params, slice(number, number + 1))),), self.context)
            for decode, params in self.shares
            for number in range(n_draws(params))
        )
