"""Rows to take in next: those that together tell most about the weights."""

from __future__ import annotations

import heapq
from typing import NamedTuple

import torch
from torch import Tensor

from bayesae.errors import DataError, ShapeError
from bayesae.functional import check_finite
from bayesae.ood.information import joint_information

__all__ = ["Acquisition", "acquire"]


class Acquisition(NamedTuple):
    """Rows in the order in which they were chosen.

    Args:
        rows: Their numbers, (n,).
        gains: What each tells beyond those before it, (n,), nats; they add up to what all tell together, and never
            rise.
    """

    rows: Tensor
    gains: Tensor


def acquire(grams: Tensor, n: int) -> Acquisition:
    r"""Choose n rows that together tell most about the weights, one after the other.

    .. math:: i_{k+1} = \operatorname{argmax}_i F(A_k \cup \{i\}), \qquad
              F(A) = \tfrac12 \log\det\Big(I_S + \sum_{i \in A} G_i\Big)

    The n rows that tell most one by one often tell the same; here the second of two equal rows is worth what is left.
    F never falls and has diminishing gains, so that a row's last known gain bounds its next one: a row is looked at
    again only when that bound is the largest (lazy greedy).

    Args:
        grams: Of all candidates, under the same weight draws, (N, S, S): `ood.information_gram`, chunks of rows
            concatenated.
        n: How many to choose, 1 to N.

    Returns:
        `Acquisition`. Of equal rows the first comes first.

    Exact when: n = 1, or each row tells something of its own (their Gram matrices live in orthogonal spaces). Else F of
        the chosen rows is at least 1 - 1/e, 63 %, of the largest that any n rows have.
    Biased when: as `ood.joint_information` is: with n rows that span more than S - 1 directions, take more draws.
    Cost: a Cholesky factor (S, S) and two triangular solves for every look at a row: N + n at least, N n at most.
        Memory of the Gram matrices, N S² numbers, and S² more.

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
    if grams.dim() != 3 or grams.shape[1] != grams.shape[2]:
        raise ShapeError("Gram matrices (N, S, S)", f"{tuple(grams.shape)}", "Use ood.information_gram(draws).")
    if not 1 <= n <= len(grams):
        raise DataError(f"n from 1 to the {len(grams)} candidates", f"n={n}", "Choose fewer rows or give more.")
    check_finite({"grams": grams}, "Gram matrices", "Look at the rows that they are of.")
    eye = torch.eye(grams.shape[1], dtype=torch.float64, device=grams.device)
    told, factor = eye, eye
    # (minus the bound, row, number of rows that were chosen when it was computed)
    queue = [(-gain, row, 0) for row, gain in enumerate(joint_information(grams[:, None]).tolist())]
    heapq.heapify(queue)
    rows: list[int] = []
    gains: list[float] = []
    while len(rows) < n:
        bound, row, age = heapq.heappop(queue)
        gram = grams[row].double()
        if age < len(rows):
            # what it tells beyond the chosen rows: log det (A + G) - log det A = log det (I + L^-1 G L^-T)
            half = torch.linalg.solve_triangular(factor, gram, upper=False)
            beyond = torch.linalg.solve_triangular(factor, half.mT, upper=False)
            gain = float(joint_information(beyond[None]))
            heapq.heappush(queue, (-gain, row, len(rows)))
            continue
        rows.append(row)
        gains.append(-bound)
        told = told + gram
        factor = torch.linalg.cholesky(told)
    return Acquisition(torch.tensor(rows), torch.tensor(gains, dtype=torch.float64))
