"""Rows to take in next: those that together tell most about the weights."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bayesae.data import as_tensor
from bayesae.errors import DataError, ShapeError
from bayesae.functional import check_finite
from bayesae.ood.information import joint_information

__all__ = ["Acquisition", "acquire"]

_ROWS_AT_ONCE = 64


class Acquisition(NamedTuple):
    """Rows in the order in which they were chosen.

    Args:
        rows: Their numbers, (n,).
        gains: What each tells beyond those before it, (n,), nats; they add up to what all tell together, and never
            rise.
    """

    rows: Tensor
    gains: Tensor


def acquire(grams: Tensor | np.ndarray, n: int) -> Acquisition:
    r"""Choose n rows that together tell most about the weights, one after the other.

    .. math:: i_{k+1} = \operatorname{argmax}_i F(A_k \cup \{i\}), \qquad
              F(A) = \tfrac12 \log\det\Big(I_S + \sum_{i \in A} G_i\Big)

    The n rows that tell most one by one often tell the same; here the second of two equal rows is worth what is left.
    F never falls and has diminishing gains, so that a row's last known gain bounds its next one, and rows whose bound
    is below the best gain found are not looked at again (lazy greedy, 64 rows at a time).

    Args:
        grams: Of all candidates, under the same weight draws, (N, S, S): `ood.information_gram`, chunks of rows
            concatenated.
        n: How many to choose, 1 to N.

    Returns:
        `Acquisition`. Of equal rows the first comes first.

    Exact when: n = 1, or each row tells something of its own (their Gram matrices live in orthogonal spaces). Else F of
        the chosen rows is at least 1 - 1/e, 63 %, of the largest that any n rows have.
    Biased when: as `ood.joint_information` is: with n rows that span more than S - 1 directions, take more draws.
    Cost: a Cholesky factor (S, S) for every look at a row: about N + 64 n looks where gains differ, N n at most. Memory
        of the Gram matrices, N S² numbers, and of 64 more.

    Raises:
        ShapeError: If the matrices are not (N, S, S).
        DataError: If n is not in 1 to N.
        NonFiniteError: If a Gram matrix is not finite.

    References:
        | BatchBALD: Efficient and Diverse Batch Acquisition for Deep Bayesian Active Learning (Kirsch, van Amersfoort,
          Gal, 2019)
        | An Analysis of Approximations for Maximizing Submodular Set Functions (Nemhauser, Wolsey, Fisher, 1978)
        | Accelerated Greedy Algorithms for Maximizing Submodular Set Functions (Minoux, 1978)
        | Departure: the joint information is that of Normal outputs, in closed form and for any size of the batch.
    """
    grams = as_tensor(grams).detach()
    if grams.dim() != 3 or grams.shape[1] != grams.shape[2]:
        raise ShapeError("Gram matrices (N, S, S)", f"{tuple(grams.shape)}", "Use ood.information_gram(draws).")
    if not 1 <= n <= len(grams):
        raise DataError(f"n from 1 to the {len(grams)} candidates", f"n={n}", "Choose fewer rows or give more.")
    check_finite({"grams": grams}, "Gram matrices", "Look at the rows that they are of.")
    told, information = torch.zeros_like(grams[0], dtype=torch.float64), 0.0
    bounds = torch.full((len(grams),), math.inf, dtype=torch.float64)
    rows: list[int] = []
    gains: list[float] = []
    while len(rows) < n:
        best_gain, best_row = -math.inf, -1
        order = bounds.argsort(descending=True, stable=True)[: len(grams) - len(rows)]  # those chosen stand last
        for block in order.split(_ROWS_AT_ONCE):
            if bounds[block[0]] < best_gain:
                break
            together = told + grams[block.to(grams.device)].double()
            bounds[block] = joint_information(together[:, None]).cpu() - information
            gain, row = max(zip(bounds[block].tolist(), (-block).tolist(), strict=True))
            if gain > best_gain:
                best_gain, best_row = gain, -row
        rows.append(best_row)
        gains.append(best_gain)
        bounds[best_row] = -math.inf
        told = told + grams[best_row].double()
        information += best_gain
    return Acquisition(torch.tensor(rows), torch.tensor(gains, dtype=torch.float64))
