"""Thresholds and p-values whose false-alarm rate holds for any score and any number of calibration rows.

All of it rests on one assumption: the score of a row to be judged and those of the calibration rows are *exchangeable*
(every order of them is equally probable). Calibration rows are therefore rows that neither weights nor noise were
fitted on, and **all rows are scored under the same weight draws**: give the predictive one seed, in the call for the
calibration rows and in every later one. Draws of its own make the scores of a call larger or smaller as a whole: the
`code_variance` of 8 draws then raises three to four times the alarms at 1 %, and one run in a hundred takes more than
40 % of familiar rows as strange at 5 %.

With one seed the noise of a stochastic code is shared by rows in one place of their calls. For two calls of many rows
this moves a rate by less than 1 / n, n calibration rows; where new rows come one by one, score the calibration rows one
by one as well, or take so many code draws that their noise does not matter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from bayesae.data import as_tensor, check_choice, check_rises
from bayesae.errors import DataError, ShapeError
from bayesae.ood._checks import check_rate, checked_scores, fewest_ranks

__all__ = ["CombinedCalibration", "ConformalCalibration", "threshold"]


def threshold(scores: Tensor | np.ndarray, rate: float) -> float:
    r"""The score beyond which a familiar row comes with probability ``rate`` at most.

    .. math:: t = s_{(k)}, \quad k = \lfloor (n + 1)\,\mathrm{rate} \rfloor, \qquad P(s_{n+1} > t) = \frac{k}{n + 1}

    with :math:`s_{(k)}` the k-th largest of n scores. ``score > t`` and ``ConformalCalibration.p_values <= rate`` are
    one and the same decision.

    Args:
        scores: Scores of calibration rows, (n,); higher = stranger.
        rate: False-alarm rate, in (0, 1).

    Returns:
        The threshold, units of the score; alarm where a score is *greater*.

    Exact when: rows are exchangeable, no two scores are equal, and the scores come from the same weight draws: give the
        predictive one seed. With ties the rate is smaller.
    Biased when: read as the rate *given these* calibration rows. That one is a random number with the law
        Beta(k, n + 1 - k), whose mean is the rate above: of 1,000 rows at 5 % its standard deviation is 0.7 %.
    Cost: one selection.

    Raises:
        DataError: If there are fewer than 1 / rate - 1 calibration rows: no threshold keeps the rate.
        NonFiniteError: If a score is NaN.
    """
    check_rate("rate", rate)
    values = checked_scores(scores)
    n = len(values)
    # (n + 1) rate may fall on the wrong side of an integer by rounding: k is what p-values k / (n + 1) <= rate give
    k = next(k for k in (int((n + 1) * rate) + 1 - step for step in range(3)) if k / (n + 1) <= rate)
    if k == 0:
        n_needed = fewest_ranks(rate)
        fix = f"Take {n_needed} calibration rows or more, or a larger rate."
        raise DataError(f"{n_needed} calibration scores for a rate of {rate}", f"{n}", fix)
    return float(values.kthvalue(n + 1 - k).values)


@dataclass(frozen=True)
class ConformalCalibration:
    r"""Conformal p-values: ranks of new scores among those of calibration rows.

    .. math:: p = \frac{1 + \#\{i : s_i \ge s\}}{n + 1}, \qquad
              \tilde p = \frac{\#\{i : s_i > s\} + U\,(1 + \#\{i : s_i = s\})}{n + 1}, \quad U \sim \mathcal{U}(0, 1)

    With groups (Mondrian) a row is compared with calibration rows of its own group, so that the rate holds within each.
    Two-sided p-values are twice the smaller of the two tails': they find rows that are *too* familiar as well.

    Args:
        by_group: Sorted calibration scores (n,) by group, as `fit` makes them; one key, None, without groups.
        is_two_sided: Whether low scores are strange too.

    Exact when: the row and the calibration rows are exchangeable and the scores come from the same weight draws (give
        the predictive one seed): :math:`P(p \le a) \le a` for every a, with equality at a = k / (n + 1) if no two
        scores are equal; :math:`\tilde p` is uniform on [0, 1], ties or not.
    Biased when: p-values of several rows are taken as independent: they share the calibration rows. The share of them
        below a given these is Beta distributed around a (see `threshold`). `DriftMonitor` makes independent ones.
    Cost: one sort, then a bisection a row.

    Raises:
        DataError: If scores of a group are not sorted, or there are none.
        NonFiniteError: If a score is NaN.
        ShapeError: If scores have several axes.

    References:
        | Algorithmic Learning in a Random World (Vovk, Gammerman, Shafer, 2005)
        | Testing for Outliers with Conformal p-values (Bates, Candes, Lei, Romano, Sesia, 2023)
    """

    by_group: Mapping[int | None, Tensor]
    is_two_sided: bool = False

    def __post_init__(self) -> None:
        for scores in self.by_group.values():
            check_rises(calibration_scores=checked_scores(scores))

    @classmethod
    def fit(
        cls, scores: Tensor | np.ndarray, groups: Tensor | np.ndarray | None = None, *, two_sided: bool = False
    ) -> ConformalCalibration:
        """Sort the calibration scores.

        Args:
            scores: Scores of calibration rows, (n,).
            groups: Whole numbers (n,), such as predicted classes; None for one group of all.
            two_sided: Whether low scores are strange too.

        Returns:
            The calibration.

        Raises:
            ShapeError: If groups are not one whole number a row.
            NonFiniteError: If a score is NaN.
        """
        values = checked_scores(scores)
        return cls({g: values[of_g].sort().values for g, of_g in _parts(values, groups).items()}, two_sided)

    def p_values(self, scores: Tensor | np.ndarray, groups: Tensor | np.ndarray | None = None) -> Tensor:
        """The p-value of each row, small = strange.

        Args:
            scores: Scores of new rows, (N,).
            groups: Their groups, (N,), if the calibration has some.

        Returns:
            (N,), float64 on the CPU, each at least 1 / (n + 1) (twice that if two-sided): a rate below it never alarms.

        Raises:
            DataError: If a row is of a group without calibration rows, or groups were given in one place only.
        """
        values = checked_scores(scores)
        whole = torch.ones_like(values)  # both tails count all of the ties
        return self._by_group(values, groups, whole, whole)

    def smoothed_p_values(
        self, scores: Tensor | np.ndarray, groups: Tensor | np.ndarray | None = None, *, seed: int
    ) -> Tensor:
        """The randomised p-value of each row, exactly uniform for familiar ones.

        Args:
            scores: Scores of new rows, (N,).
            groups: Their groups, (N,), if the calibration has some.
            seed: Of the numbers U; another for every call, or rows in the same place share theirs.

        Returns:
            (N,), float64 on the CPU, in (0, 1].

        Raises:
            DataError: As of `p_values`.
        """
        values = checked_scores(scores)
        generator = torch.Generator().manual_seed(seed)
        uniform = torch.rand(len(values), generator=generator, dtype=torch.float64)
        return self._by_group(values, groups, 1 - uniform, uniform)  # in (0, 1]: no p-value is 0

    def _by_group(self, values: Tensor, groups: Tensor | np.ndarray | None, upper: Tensor, lower: Tensor) -> Tensor:
        parts = _parts(values, groups)
        if missing := [name for name in parts if name not in self.by_group]:
            known = [name for name in self.by_group if name is not None]
            raise DataError(
                f"rows of groups {known}" if known else "no groups, as at the calibration",
                "no groups" if missing == [None] else f"rows of groups {missing}",
                "Calibrate and test with the same groups, each of them with calibration rows.",
            )
        p = torch.empty_like(values)
        for name, of_group in parts.items():
            p[of_group] = self._ranked(self.by_group[name], values[of_group], upper[of_group], lower[of_group])
        return p

    def _ranked(self, calibration: Tensor, values: Tensor, upper: Tensor, lower: Tensor) -> Tensor:
        """P-values where the upper and the lower tail count these shares of the ties."""
        n = len(calibration)
        n_lower = torch.searchsorted(calibration, values)
        n_equal = torch.searchsorted(calibration, values, right=True) - n_lower
        high = (n - n_lower - n_equal + upper * (1 + n_equal)) / (n + 1)
        if not self.is_two_sided:
            return high
        low = (n_lower + lower * (1 + n_equal)) / (n + 1)
        return (2 * torch.minimum(high, low)).clamp(max=1)


Rule = Literal["fisher", "harmonic", "minimum"]


@dataclass(frozen=True)
class CombinedCalibration:
    r"""One p-value for several scores of a row, exact whatever their dependence.

    Half the calibration rows turn each score into a p-value, ``rule`` makes one number of them, and the other half
    calibrates that number, as it would any score. Dependence needs no model: the calibration rows have it too.

    .. math:: T(x) = -\sum_j \log p_j \;\text{(fisher)}, \quad \log \sum_j 1 / p_j \;\text{(harmonic)}, \quad
              -\min_j p_j \;\text{(minimum)}, \qquad p = \frac{1 + \#\{i : T(x_i) \ge T(x)\}}{m + 1}

    A function of one's own needs no such object: ``ConformalCalibration.fit(f(scores))`` is as exact, if f was not
    fitted on these rows.

    Args:
        references: A calibration of each of the J scores, on the first half.
        combined: The calibration of T, on the m rows of the other half.
        rule: How T is made: "fisher" where several scores see the same strangeness a little, "minimum" where one of
            them sees it clearly, "harmonic" between the two.

    Exact when: the row and all calibration rows are exchangeable and the scores come from the same weight draws (give
        the predictive one seed): P(p <= a) <= a, whatever the dependence between scores.
    Cost: J + 1 sorts; half the calibration rows, and so half the resolution of p.

    References:
        | Combining P-Values Via Averaging (Vovk, Wang, 2020), for what holds without a second half: `merge_p_values`
    """

    references: tuple[ConformalCalibration, ...]
    combined: ConformalCalibration
    rule: Rule

    @classmethod
    def fit(cls, scores: Tensor | np.ndarray, rule: Rule = "fisher", *, seed: int = 0) -> CombinedCalibration:
        """Divide the calibration rows at random and calibrate on both halves.

        Args:
            scores: J scores of calibration rows, (n, J), n at least 2; higher = stranger, in any units.
            rule: How p-values are combined.
            seed: Of the division.

        Returns:
            The calibration.

        Raises:
            UnsupportedError: If there is no such rule.
            DataError: If there is one row only.
            NonFiniteError: If a score is NaN.
        """
        check_choice("rule", rule, get_args(Rule))
        values = checked_scores(scores, 2)
        if len(values) < 2:
            raise DataError("two calibration rows or more", "one", "Half of them rank scores, half the combination.")
        order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))
        first, second = values[order].tensor_split(2)
        references = tuple(ConformalCalibration.fit(column) for column in first.unbind(1))
        return cls(references, ConformalCalibration.fit(_combined(references, second, rule)), rule)

    def p_values(self, scores: Tensor | np.ndarray) -> Tensor:
        """The combined p-value of each row.

        Args:
            scores: (N, J), the scores in the order of the calibration.

        Returns:
            (N,), float64 on the CPU.

        Raises:
            ShapeError: If there is another number of scores.
        """
        return self.combined.p_values(_combined(self.references, checked_scores(scores, 2), self.rule))

    def smoothed_p_values(self, scores: Tensor | np.ndarray, *, seed: int) -> Tensor:
        """The combined p-value of each row with ties broken at random; T has many, as it is made of ranks.

        Args:
            scores: (N, J), the scores in the order of the calibration.
            seed: As of `ConformalCalibration.smoothed_p_values`.

        Returns:
            (N,), float64 on the CPU.

        Raises:
            ShapeError: If there is another number of scores.
        """
        statistic = _combined(self.references, checked_scores(scores, 2), self.rule)
        return self.combined.smoothed_p_values(statistic, seed=seed)


def _combined(references: tuple[ConformalCalibration, ...], scores: Tensor, rule: Rule) -> Tensor:
    if scores.shape[1] != len(references):
        raise ShapeError(
            f"{len(references)} scores a row", f"{scores.shape[1]}", "Give those of the calibration, in its order."
        )
    columns = zip(references, scores.unbind(1), strict=True)
    p = torch.stack([reference.p_values(column) for reference, column in columns], 1)
    if rule == "fisher":
        return -p.log().sum(1)
    return (1 / p).sum(1).log() if rule == "harmonic" else -p.amin(1)


def _parts(values: Tensor, groups: Tensor | np.ndarray | None) -> dict[int | None, Tensor]:
    """Which rows (N,) are of each group."""
    if groups is None:
        return {None: torch.ones(len(values), dtype=torch.bool)}
    names = as_tensor(groups).cpu()
    if names.shape != values.shape or names.is_floating_point():
        got = f"{names.dtype} of shape {tuple(names.shape)}"
        raise ShapeError(f"groups, whole numbers of shape {tuple(values.shape)}", got, "Give each row's group.")
    return {int(name): names == name for name in names.unique()}
