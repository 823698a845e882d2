"""`DriftMonitor`: alarms over a stream of scores, with a false-alarm guarantee that holds at every row at once."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from bayesae.data import check_choice
from bayesae.ood._checks import check_rate, checked_p_values, checked_scores
from bayesae.ood.betting import Bet, SimpleJumper

__all__ = ["DriftInfo", "DriftMonitor", "DriftState"]

Statistic = Literal["martingale", "cusum", "shiryaev-roberts"]

_BLOCK = 1024  # rows that are ranked among one another by pairs


@dataclass(frozen=True)
class DriftState:
    """What a `DriftMonitor` knows after the rows so far; a new one after every update.

    Args:
        scores: Calibration scores and all since, sorted, (n,).
        bet: State of the bet.
        log_statistic: Log of the martingale, of CUSUM or of the Shiryaev-Roberts statistic.
        n_seen: Rows of the stream so far.
        alarmed_at: Number of the first row with an alarm, counted from 1: the run length; less the number of the last
            row before a change, it is the delay. None as long as there was no alarm.
        generator: State of the random numbers that break ties.
    """

    scores: Tensor
    bet: Tensor
    log_statistic: float
    n_seen: int
    alarmed_at: int | None
    generator: Tensor


class DriftInfo(NamedTuple):
    """What an update says of its B rows.

    Args:
        p_values: Online smoothed p-values, (B,).
        log_statistics: Log of the statistic after each row, (B,).
        is_alarm: Whether the statistic is at or above the limit at the row, (B,).
    """

    p_values: Tensor
    log_statistics: Tensor
    is_alarm: Tensor


@dataclass(frozen=True)
class DriftMonitor:
    r"""Watches a stream of scores for drift by a conformal test martingale.

    Each score is ranked among the calibration scores *and all of the stream before it*. As long as all of them are
    exchangeable these smoothed p-values are independent and uniform, so that a fair bet against that multiplies its
    capital by factors :math:`f_t` of mean 1 (conditional on the past). Capital is evidence of drift.

    .. math:: M_t = M_{t-1} f_t \;\text{(martingale)}, \quad
              C_t = \max(C_{t-1}, 1)\, f_t \;\text{(cusum)}, \quad
              R_t = (R_{t-1} + 1)\, f_t \;\text{(shiryaev-roberts)}, \quad M_0 = 1,\; C_0 = R_0 = 0

    An alarm is a value of 1 / level or more. For the martingale that happens *ever* with probability ``level`` at most
    (Ville's inequality); it is for a stream that ends. The others restart their evidence and raise false alarms again
    and again, the first of them after 1 / level rows or more in the mean (:math:`R_t - t` is a martingale, and
    :math:`C_t \le R_t`), so that n rows see one with probability n level at most; they are for a stream that goes on.

    **The default level of 0.01 is made for the martingale.** For "shiryaev-roberts" it means one false alarm in about a
    hundred rows, so that nearly every familiar stream of 200 has one. Where n rows are to see any false alarm with a
    chance of alpha at most, these two need level = alpha / n.

    Args:
        level: In (0, 1): chance of any false alarm (martingale), or one false alarm in 1 / level rows (the others).
        statistic: Which of the three.
        bet: How to bet: `SimpleJumper` or `PowerMixture`.

    Exact when: the bounds on false alarms are, for every length of stream and any score, while calibration rows and
        stream are exchangeable and the scores come from the same weight draws: give the predictive one seed. For
        "shiryaev-roberts" the bound is all but reached: the mean run length is the statistic's mean at the alarm, 1 /
        level and the little that its last row adds. The martingale and CUSUM alarm less often than their bounds.
    Biased when: the model is fitted again on the stream, or rows of one stream hang together (video): familiar streams
        then drift too. Long after a change the past contains the drift and evidence grows no further.
    Cost: a row costs a bisection and a comparison with up to 1,024 others; memory and each update grow
        with all rows seen.

    Raises:
        DataError: If ``level`` is not in (0, 1).
        UnsupportedError: If there is no such statistic.

    Example:
        >>> familiar, strange = torch.arange(100.0), torch.full((20,), 200.0)
        >>> monitor = DriftMonitor(level=0.01)
        >>> state = monitor.init(familiar, seed=0)
        >>> state, info = monitor.update(state, strange)
        >>> state.alarmed_at is not None and bool(info.is_alarm[-1])
        True

    References:
        | Testing Exchangeability On-Line (Vovk, Nouretdinov, Gammerman, 2003)
        | Retrain or Not Retrain: Conformal Test Martingales for Change-Point Detection (Vovk, Petej, Nouretdinov,
          Ahlberg, Carlsson, Gammerman, 2021)
    """

    level: float = 0.01
    statistic: Statistic = "martingale"
    bet: Bet = field(default_factory=SimpleJumper)

    def __post_init__(self) -> None:
        check_rate("level", self.level)
        check_choice("statistic", self.statistic, get_args(Statistic))

    @property
    def log_limit(self) -> float:
        """Log of 1 / level: an alarm at it or above."""
        return -math.log(self.level)

    def init(self, calibration_scores: Tensor | np.ndarray, *, seed: int) -> DriftState:
        """The state before the stream.

        Args:
            calibration_scores: Scores of rows on which nothing was fitted, (n,); higher = stranger.
            seed: Of the numbers that break ties; the caller's generators are not touched.

        Returns:
            The state.

        Raises:
            DataError: If there is no calibration score.
            NonFiniteError: If one is NaN.
        """
        scores = checked_scores(calibration_scores).sort().values
        generator = torch.Generator().manual_seed(seed)
        return DriftState(scores, self.bet.init(), self._start, 0, None, generator.get_state())

    def update(self, state: DriftState, scores: Tensor | np.ndarray) -> tuple[DriftState, DriftInfo]:
        """Take in the next rows; how they are cut into batches changes nothing beyond rounding.

        Args:
            state: Of `init` or of the last update; it stays as it was.
            scores: Scores of the next rows in their order, (B,).

        Returns:
            The new state and what it says of the rows.

        Raises:
            DataError: If there is no score.
            NonFiniteError: If a score is NaN.
        """
        values = checked_scores(scores)
        generator = torch.Generator()
        generator.set_state(state.generator)
        uniform = 1 - torch.rand(len(values), generator=generator, dtype=torch.float64)  # in (0, 1]
        pool, pieces = state.scores, []
        for block, ties in zip(values.split(_BLOCK), uniform.split(_BLOCK), strict=True):
            pieces.append(_online_p_values(pool, block, ties))
            pool = torch.cat([pool, block]).sort().values
        p_values = torch.cat(pieces)
        bet, log_factors = self.bet.update(state.bet, p_values)
        path = self._accumulated(torch.tensor(state.log_statistic, dtype=torch.float64), log_factors)
        is_alarm = path >= self.log_limit
        alarmed_at = state.alarmed_at
        if alarmed_at is None and bool(is_alarm.any()):
            alarmed_at = state.n_seen + 1 + int(is_alarm.int().argmax())
        n_seen = state.n_seen + len(values)
        new = DriftState(pool, bet, float(path[-1]), n_seen, alarmed_at, generator.get_state())
        return new, DriftInfo(p_values, path, is_alarm)

    def log_statistics(self, p_values: Tensor | np.ndarray) -> Tensor:
        r"""The statistic along whole streams of p-values: uniform ones show what run lengths a level gives.

        Args:
            p_values: Independent where nothing drifts, (\*R, n), in (0, 1].

        Returns:
            Logs, (\*R, n), float64 on the CPU.

        Raises:
            DataError: If a number is no p-value.
        """
        p = checked_p_values(p_values)
        return self._accumulated(torch.full(p.shape[:-1], self._start).double(), self.bet.update(self.bet.init(), p)[1])

    @property
    def _start(self) -> float:
        return 0.0 if self.statistic == "martingale" else -math.inf

    def _accumulated(self, start: Tensor, log_factors: Tensor) -> Tensor:
        if self.statistic == "martingale":
            return start.unsqueeze(-1) + log_factors.cumsum(-1)
        combined = torch.maximum if self.statistic == "cusum" else torch.logaddexp
        log_one, values, path = torch.zeros_like(start), start, []
        for log_factor in log_factors.unbind(-1):
            values = combined(values, log_one) + log_factor
            path.append(values)
        return torch.stack(path, -1)


def _online_p_values(pool: Tensor, values: Tensor, uniform: Tensor) -> Tensor:
    """P-values of (B,) scores in turn, each among the sorted pool (n,) and the scores before it."""
    n_lower = torch.searchsorted(pool, values)
    n_not_higher = torch.searchsorted(pool, values, right=True)
    earlier = torch.ones(len(values), len(values), dtype=torch.bool).tril(-1)
    n_higher = len(pool) - n_not_higher + ((values[None] > values[:, None]) & earlier).sum(1)
    n_equal = n_not_higher - n_lower + ((values[None] == values[:, None]) & earlier).sum(1)
    n_before = len(pool) + torch.arange(len(values))
    return (n_higher + uniform * (1 + n_equal)) / (n_before + 1)
