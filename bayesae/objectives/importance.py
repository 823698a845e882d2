"""The importance-weighted bounds."""

from __future__ import annotations

from torch import Tensor

from bayesae.draws import Draws

__all__ = ["iwae"]


def iwae(draws: Draws) -> Tensor:
    r"""Importance-weighted bound of K draws, :math:`\log \tfrac1K \sum_k p(x, z_k) / q(z_k \mid x)`.

    Args:
        draws: Draws of a stochastic code.

    Returns:
        (S, B), in nats.
    """
    return draws.log_evidence()
