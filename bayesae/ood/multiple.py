"""Many p-values: several of one row merged into one, and one each of many rows judged together."""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from bayesae.data import check_choice
from bayesae.errors import DataError, ShapeError
from bayesae.ood._checks import check_rate, checked_p_values

__all__ = ["benjamini_hochberg", "merge_p_values", "null_share"]

Rule = Literal["bonferroni", "harmonic", "mean"]


def merge_p_values(p_values: Tensor | np.ndarray, rule: Rule) -> Tensor:
    r"""One p-value a row from J of them, whatever their dependence.

    .. math:: J \min_j p_j \;\text{(bonferroni)}, \qquad \frac{2}{J} \sum_j p_j \;\text{(mean)}, \qquad
              c_J \, \frac{J}{\sum_j 1 / p_j} \;\text{(harmonic)}, \quad c_1 = 1,\; c_2 = 2,\; c_J = e \log J

    and at most 1. `CombinedCalibration` pays no such factor, for half of the calibration rows.

    Args:
        p_values: (N, J), each valid on its own.
        rule: "bonferroni" where one of the scores may see clearly, "mean" where all see a little, "harmonic" between.

    Returns:
        (N,), float64 on the CPU, valid p-values.

    No exact case: conservative. "bonferroni" and "mean" are the smallest valid multiples of minimum and mean for the
        worst dependence (the mean of one p-value is itself, and is not doubled); e log J is above the smallest.
    Cost: one pass.

    Raises:
        UnsupportedError: If there is no such rule.
        ShapeError: If p-values are not (N, J).
        DataError: If a number is no p-value.

    References:
        | Combining P-Values Via Averaging (Vovk, Wang, 2020)
    """
    check_choice("rule", rule, get_args(Rule))
    p = checked_p_values(p_values)
    if p.dim() != 2:
        raise ShapeError("p-values (N, J)", f"{tuple(p.shape)}", "Stack the p-values of each score along axis 1.")
    n_scores = p.shape[1]
    if rule == "bonferroni":
        merged = n_scores * p.amin(1)
    elif rule == "mean":
        merged = min(n_scores, 2) * p.mean(1)
    else:
        merged = {1: 1.0, 2: 2.0}.get(n_scores, math.e * math.log(n_scores)) * n_scores / (1 / p).sum(1)
    return merged.clamp(max=1)


def benjamini_hochberg(p_values: Tensor | np.ndarray, *, null_share: float = 1.0) -> Tensor:
    r"""Adjusted p-values: flag those <= q and the expected share of false flags among the flags is at most q.

    .. math:: \tilde p_{(i)} = \min_{j \ge i} \, \min\!\Big(1,\; \hat\pi_0 \, \frac{N}{j} \, p_{(j)}\Big)

    Args:
        p_values: One for each of N rows, (N,).
        null_share: Share of familiar rows, in (0, 1]: 1 to be safe, or what `null_share` estimates.

    Returns:
        (N,), float64 on the CPU.

    Exact when: p-values of familiar rows are independent and uniform: the false-discovery rate is q times their share.
    Biased when: p-values depend on one another negatively. Conformal ones that share a calibration set depend
        positively (PRDS), so that the rate is at most q.
    Cost: one sort.

    Raises:
        ShapeError: If p-values are not (N,).
        DataError: If a number is no p-value, or ``null_share`` no share.

    References:
        | Controlling the False Discovery Rate (Benjamini, Hochberg, 1995)
        | Testing for Outliers with Conformal p-values (Bates, Candes, Lei, Romano, Sesia, 2023)
    """
    p = _line(p_values)
    if not 0 < null_share <= 1:
        raise DataError("null_share in (0, 1]", f"{null_share}", "1 holds whatever the share is.")
    ordered, order = p.sort()
    n = len(p)
    scaled = null_share * n / torch.arange(1, n + 1, dtype=p.dtype) * ordered
    adjusted = scaled.flip(0).cummin(0).values.flip(0).clamp(max=1)
    return torch.empty_like(p).index_copy_(0, order, adjusted)


def null_share(p_values: Tensor | np.ndarray, *, level: float = 0.5) -> float:
    r"""Storey's estimate of the share of familiar rows: what of a uniform law lies above ``level``.

    .. math:: \hat\pi_0 = \min\!\Big(1,\; \frac{1 + \#\{i : p_i > \lambda\}}{N (1 - \lambda)}\Big)

    Args:
        p_values: One for each of N rows, (N,).
        level: :math:`\lambda` in (0, 1), fixed beforehand.

    Returns:
        In (0, 1].

    No exact case: it is 1 / (N (1 - level)) high in expectation before the minimum is taken.
    Biased when: strange rows have p-values above ``level``: the share is then too high, which is the safe side.
    Cost: one pass.

    Raises:
        ShapeError: If p-values are not (N,).
        DataError: If a number is no p-value, or ``level`` not in (0, 1).

    References:
        | A Direct Approach to False Discovery Rates (Storey, 2002)
        | Strong Control, Conservative Point Estimation and Simultaneous Conservative Consistency of False Discovery
          Rates (Storey, Taylor, Siegmund, 2004), which adds the 1
    """
    check_rate("level", level)
    p = _line(p_values)
    return min(1.0, (1 + int((p > level).sum())) / (len(p) * (1 - level)))


def _line(p_values: Tensor | np.ndarray) -> Tensor:
    p = checked_p_values(p_values)
    if p.dim() != 1:
        raise ShapeError("p-values (N,)", f"{tuple(p.shape)}", "Give one p-value a row; merge_p_values makes them so.")
    return p
