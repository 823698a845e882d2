"""Batch typicality: whether the *mean* score of a batch is that of familiar batches, too low counting as too high."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from bayesae.data import as_tensor, check_choice
from bayesae.errors import DataError, NonFiniteError, ShapeError
from bayesae.ood._checks import check_rate, checked_scores, fewest_ranks

__all__ = ["BatchTypicality", "TypicalityInfo", "TypicalityMonitor", "TypicalityState", "batch_typicality"]

Method = Literal["permutation", "bootstrap"]


class BatchTypicality(NamedTuple):
    """What the test says of M batches.

    Args:
        statistics: Distance of a batch's mean score from the calibration's, (M,), units of the score.
        p_values: (M,), small = the batch is not typical.
    """

    statistics: Tensor
    p_values: Tensor


def batch_typicality(
    calibration: Tensor | np.ndarray,
    batches: Tensor | np.ndarray,
    *,
    method: Method = "permutation",
    n_resamples: int = 999,
    seed: int = 0,
) -> BatchTypicality:
    r"""Test batches of scores for typicality.

    .. math:: T = \Big|\frac1B \sum_{b=1}^B s_b - \frac1n \sum_{i=1}^n s_i\Big|, \qquad
              p = \frac{1 + \#\{r : T_r \ge T\}}{R + 1}

    with R batches :math:`T_r` for comparison. "permutation" exchanges rows between batch and calibration; "bootstrap"
    draws batches from the calibration rows with replacement, as published.

    Args:
        calibration: Scores of familiar rows on which nothing was fitted, (n,). Minus log-densities make it the test of
            the typical set.
        batches: Scores of M batches of B rows, (M, B). The windows of a stream are ``scores.unfold(0, B, step)``.
        method: How familiar batches are made.
        n_resamples: R.
        seed: Of the resampling; the caller's generators are not touched.

    Returns:
        Statistics and p-values, float64 on the CPU; none is below 1 / (R + 1).

    Exact when: with "permutation", a batch and the calibration rows are exchangeable and the scores come from the same
        weight draws (give the predictive one seed): P(p <= a) <= a for every B, n and R, with equality at
        a = k / (R + 1) but for ties.
    Biased when: with "bootstrap", B is not small beside n: the calibration's own mean is taken as known, where the
        variance of T's difference is 1 + B / n times that, so that false alarms are too frequent. P-values of several
        batches share the calibration rows and are not independent.
    Cost: R selections among n + B numbers, then a product (R, B) by (B, M); memory of some R (n + B) numbers
        ("permutation"). R draws of B ("bootstrap").

    Raises:
        ShapeError: If the shapes are others.
        NonFiniteError: If a score is not finite: a mean needs numbers.
        DataError: If there is nothing to compare, or ``n_resamples`` is below 1.
        UnsupportedError: If there is no such method.

    References:
        | Detecting Out-of-Distribution Inputs to Deep Generative Models Using Typicality (Nalisnick, Matsukawa, Teh,
          Lakshminarayanan, 2019): "bootstrap"
        | The Design of Experiments (Fisher, 1935): "permutation"
    """
    check_choice("method", method, get_args(Method))
    familiar, rows = _finite(checked_scores(calibration)), as_tensor(batches)
    if rows.dim() != 2:
        raise ShapeError("batches (M, B)", f"{tuple(rows.shape)}", "One batch of scores is scores[None].")
    rows = _finite(checked_scores(rows, 2))
    if n_resamples < 1:
        raise DataError("n_resamples of at least 1", f"{n_resamples}", "999 resolves p-values of 0.001.")
    centre = familiar.mean()
    familiar, rows = familiar - centre, rows - centre
    statistics = rows.mean(1).abs()
    generator = torch.Generator().manual_seed(seed)
    n, size = len(familiar), rows.shape[1]
    if method == "bootstrap":
        drawn = torch.randint(n, (n_resamples, size), generator=generator)
        resampled = familiar[drawn].mean(1).abs()[:, None]
    else:
        is_drawn = _subsets(n + size, size, n_resamples, generator)
        drawn_sum = (is_drawn[:, :n] @ familiar)[:, None] + is_drawn[:, n:] @ rows.T
        resampled = (drawn_sum / size - (rows.sum(1) - drawn_sum) / n).abs()  # the calibration itself adds up to 0
    # equal sums differ in their last bits by the order of summation: count them as ties, which is the safe side
    slack = 1e-12 * (statistics + familiar.abs().mean())
    n_beyond = (resampled >= statistics - slack).sum(0)
    return BatchTypicality(statistics, (1 + n_beyond.double()) / (n_resamples + 1))


def _finite(scores: Tensor) -> Tensor:
    """The scores; raises if one is infinite."""
    if not bool(scores.isfinite().all()):
        raise NonFiniteError("finite scores", "an infinite one", "A mean needs numbers; DriftMonitor needs only ranks.")
    return scores


def _subsets(n: int, size: int, n_subsets: int, generator: torch.Generator) -> Tensor:
    """Random subsets of equal size as rows of 0 and 1, (n_subsets, n), in float64."""
    keys = torch.rand(n_subsets, n, generator=generator, dtype=torch.float64)
    chosen = keys.topk(size, 1, largest=False, sorted=False).indices
    return torch.zeros_like(keys).scatter_(1, chosen, 1.0)


@dataclass(frozen=True)
class TypicalityState:
    """What a `TypicalityMonitor` knows after the rows so far.

    Args:
        calibration: Calibration scores, (n,).
        waiting: Scores of the window that is not yet full, fewer than its size.
        n_seen: Rows of the stream so far.
        alarmed_at: Number of the row that completed the first window with an alarm, counted from 1; None before.
        seed: Of the resampling.
    """

    calibration: Tensor
    waiting: Tensor
    n_seen: int
    alarmed_at: int | None
    seed: int


class TypicalityInfo(NamedTuple):
    """What an update says of the W windows that it completed, W of 0 and more.

    Args:
        statistics: As of `BatchTypicality`, (W,).
        p_values: As of `BatchTypicality`, (W,).
        is_alarm: Whether the p-value is at most the level, (W,).
    """

    statistics: Tensor
    p_values: Tensor
    is_alarm: Tensor


@dataclass(frozen=True)
class TypicalityMonitor:
    """Watches a stream by `batch_typicality` of one window after another.

    Args:
        window: Rows of a window; windows do not overlap.
        level: In (0, 1): chance of a false alarm *at each window*, so that a long stream is bound to have some.
        method: As of `batch_typicality`.
        n_resamples: As of `batch_typicality`, of at least 1 / level - 1.

    Exact when: as `batch_typicality` is: each window's false alarms with "permutation".
    Biased when: windows are taken as independent: they share the calibration rows. If these came out unusual, so does
        every window; `DriftMonitor` bounds the false alarms of the whole stream.
    Cost: an update with a full window costs one `batch_typicality`; memory is that of the calibration scores.

    Raises:
        DataError: If ``window`` or ``level`` is out of its range, or there are too few resamples for the level.
        UnsupportedError: If there is no such method.

    References:
        | Detecting Out-of-Distribution Inputs to Deep Generative Models Using Typicality (Nalisnick, Matsukawa, Teh,
          Lakshminarayanan, 2019)
    """

    window: int = 50
    level: float = 0.01
    method: Method = "permutation"
    n_resamples: int = 999

    def __post_init__(self) -> None:
        check_rate("level", self.level)
        check_choice("method", self.method, get_args(Method))
        if self.window < 1:
            raise DataError(
                "a window of at least 1 row", f"{self.window}", "50 is a start; larger windows see weaker drift, later."
            )
        if self.n_resamples < (n_needed := fewest_ranks(self.level)):
            fix = f"Take {n_needed} or more: no p-value is below 1 / (n_resamples + 1)."
            raise DataError(f"n_resamples for a level of {self.level}", f"{self.n_resamples}", fix)

    def init(self, calibration_scores: Tensor | np.ndarray, *, seed: int) -> TypicalityState:
        """The state before the stream.

        Args:
            calibration_scores: Scores of rows on which nothing was fitted, (n,).
            seed: Of the resampling.

        Returns:
            The state.

        Raises:
            DataError: If there is no calibration score.
            NonFiniteError: If one is not finite.
        """
        scores = _finite(checked_scores(calibration_scores)).clone()  # what the caller does to them later is not ours
        return TypicalityState(scores, scores.new_empty(0), 0, None, seed)

    def update(self, state: TypicalityState, scores: Tensor | np.ndarray) -> tuple[TypicalityState, TypicalityInfo]:
        """Take in the next rows; how they are cut into batches changes nothing beyond rounding.

        Args:
            state: Of `init` or of the last update; it stays as it was.
            scores: Scores of the next rows in their order, (B,).

        Returns:
            The new state, and what it says of the windows that are now full.

        Raises:
            DataError: If there is no score.
            NonFiniteError: If a score is not finite.
        """
        values = torch.cat([state.waiting, _finite(checked_scores(scores))])
        n_full = len(values) // self.window
        full, waiting = values[: n_full * self.window], values[n_full * self.window :].clone()
        n_before = state.n_seen - len(state.waiting)
        new = replace(state, waiting=waiting, n_seen=n_before + len(values))
        if not n_full:
            return new, TypicalityInfo(values[:0], values[:0], torch.zeros(0, dtype=torch.bool))
        windows = full.reshape(n_full, self.window)
        found = batch_typicality(
            state.calibration, windows, method=self.method, n_resamples=self.n_resamples, seed=state.seed
        )
        is_alarm = found.p_values <= self.level
        if state.alarmed_at is None and bool(is_alarm.any()):
            new = replace(new, alarmed_at=n_before + self.window * (1 + int(is_alarm.int().argmax())))
        return new, TypicalityInfo(*found, is_alarm)
