"""The divergence of two Normal laws of codes."""

from __future__ import annotations

import torch
from torch import Tensor

from bayesae.codes.laws import DiagonalLaw, Law

__all__ = ["kl_between"]


def kl_between(p: Law, q: Law) -> Tensor:
    r"""Kullback-Leibler divergence of two Normals, row by row.

    .. math:: \operatorname{KL}(p \| q) = \log p(m_p) - \log q(m_p)
              + \tfrac12 \big( \operatorname{tr}(C_q^{-1} C_p) - Z \big)

    Args:
        p: The law that the expectation is under, (S, B) of them.
        q: The other, of the same codes and any covariance.

    Returns:
        Nats, (S, B).

    Exact when: always.
    Cost: O(Z) a row for two diagonal laws, else one factorisation of a (Z, Z) matrix.
    """
    if isinstance(p, DiagonalLaw) and isinstance(q, DiagonalLaw):
        narrower = p.log_scale - q.log_scale
        shift = (p.loc - q.loc) * (-q.log_scale).exp()
        return (0.5 * (shift**2 + torch.expm1(2 * narrower)) - narrower).sum(-1)
    factor = torch.linalg.cholesky(q.covariance())
    ratio = torch.cholesky_solve(p.covariance(), factor).diagonal(dim1=-2, dim2=-1)
    return p.log_prob(p.loc) - q.log_prob(p.loc) + 0.5 * (ratio - 1).sum(-1)
