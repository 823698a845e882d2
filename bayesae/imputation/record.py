"""`Imputations`: completed rows, draw by draw, and what follows from them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bayesae.draws import Moments, fitted_rows
from bayesae.errors import DataError, UnsupportedError
from bayesae.functional import check_finite
from bayesae.imputation.base import shares
from bayesae.imputation.pooling import Pooled, check_level, pool

__all__ = ["Imputations"]


@dataclass(frozen=True)
class Imputations:
    r"""Rows with their missing entries drawn, several times over, and how far the draws can be trusted.

    Args:
        draws: Completed rows, (M, N, \*data): S weight draws after one another, each with M / S draws of codes and
            noise, rounded down or up as evenly as may be where S does not divide M. What was observed is as given. None
            of them, (0, N, \*data), of ``impute(keep_draws=False)``.
        mask: True where x was observed, (N, \*data).
        moments: Mean and variance of every entry in three parts, noise, code and weights, averaged over the laws
            p(x | z, theta) of all S K codes and not over draws of x. Where data are classes without an order there is
            an axis of classes more. With K = 1 code a weight draw, code and weights are not told apart: all of it
            stands under ``weights``, none under ``code`` (`impute` says when that is). An observed entry is its own
            mean, of variance 0, so that a density with these moments, ``moments.log_prob``, is NaN or infinite there:
            `log_prob` of this record is made for it.
        n_weight_draws: S.
        ess: Effective sample size of a row's S K codes, at most their number, (N,): of importance weights, or of
            correlated chains.
        rhat: Split R-hat of a row's chains, the largest over code dimensions and weight draws, (N,); infinite where a
            chain never moved. None without chains.
        acceptance: Mean share of proposed codes that chains took, or of importance-weighted ones that count, (N,); None
            for other methods.
        n_divergent: Steps of Hamiltonian chains that lost track of the energy, (N,); None for other methods.
        residual: What a fixed-point iteration still moved at its last step, the largest over entries and weight
            draws, units of x, (N,); None for other methods.
    """

    draws: Tensor
    mask: Tensor
    moments: Moments
    n_weight_draws: int
    ess: Tensor
    rhat: Tensor | None = None
    acceptance: Tensor | None = None
    n_divergent: Tensor | None = None
    residual: Tensor | None = None

    @property
    def mean(self) -> Tensor:
        r"""Rows with the mean in their missing entries, (N, \*data): what has the smallest squared error."""
        return self.moments.mean

    @property
    def variance(self) -> Tensor:
        r"""Variance of every entry, noise, code and weights together, (N, \*data); 0 where it was observed."""
        return self.moments.total

    def log_prob(self, x: Tensor | np.ndarray) -> Tensor:
        r"""Log-density of every missing entry's value under a law with its moments, nats.

        Args:
            x: Rows with values in the missing entries, (N, \*data); what stands in the observed ones does not matter.

        Returns:
            (N, \*data): of missing entries what `Moments.log_prob` says; 0 of observed ones, which are given.

        Exact when: as of the likelihood's ``log_predictive``: the law of the draws is a mixture, of which two moments
            are kept.

        Raises:
            ShapeError: If x has other rows, or rows of another size.
            NonFiniteError: If a value of a missing entry is NaN or infinite.
            UnsupportedError: If a missing entry has no variance, and so no density: of `FixedPoint` without noise.
        """
        given = torch.where(self.mask, 0.0, fitted_rows(x, self.mask.shape, self.moments.mean))
        check_finite({"x": given}, "values of missing entries", "Put in what they are, or 0 where nobody knows.")
        values = torch.where(self.mask, 0.0, self.moments.log_prob(given))
        if n_points := int(values.isnan().sum()):
            fix = "Use FixedPoint(noise=True), or a method that draws codes."
            raise UnsupportedError("missing entries with a variance", f"{n_points} that are points", fix)
        return values

    def interval(self, level: float = 0.9) -> tuple[Tensor, Tensor]:
        r"""Central interval of every entry, from quantiles of the draws at places p (M + 1) of their order.

        Args:
            level: In (0, 1).

        Returns:
            Lower and upper bounds, (N, \*data) each; both are x where it was observed.

        Exact when: (1 - level) / 2 * (M + 1) is whole: it covers, on average, a share ``level`` of values that come
            from where the draws do, however few draws there are.
        Biased when: it is not whole, as it then lies between two draws; draws are worth less than their number
            (``ess``); or they are those of `FixedPoint`, the default of a plain encoder, which leave out what the code
            could be and hold less than ``level`` (69 % for 90 % of probabilistic PCA; give `impute` ``CodeLaplace()``
            or ``CodeHMC()`` where codes are taken as N(0, I)).

        Raises:
            DataError: If the level is none, or there are too few draws for it, or they were not kept.
            UnsupportedError: If data are classes without an order.
        """
        check_level(level)
        if self.moments.likelihood.is_nominal:
            fix = "Read moments.mean, the share of every class."
            raise UnsupportedError("numbers that can be ordered", "classes without an order", fix)
        n = self._n_kept()
        place = 0.5 * (1 - level) * (n + 1)
        if place < 1 - 1e-9:
            least = math.ceil(2 / (1 - level) - 1 - 1e-9)
            raise DataError(f"{least} draws or more for intervals of {level:g}", f"{n}", "Raise n_draws=.")
        ordered = self.draws.sort(0).values
        below = min(max(math.floor(place + 1e-9), 1), n - 1) if n > 1 else 1
        share = max(place - below, 0.0)
        above = min(below, n - 1)
        low = torch.lerp(ordered[below - 1], ordered[above], share)
        return low, torch.lerp(ordered[n - below], ordered[n - 1 - above], share)

    def pool(self, analysis: Callable[[Tensor], tuple[Tensor, Tensor]], *, complete_dof: float | None = None) -> Pooled:
        r"""One estimate from an analysis of every completed data set.

        Args:
            analysis: Completed rows (N, \*data) to an estimate (\*shape) and its variance, as of complete data:
                tensors, arrays or numbers.
            complete_dof: As of `pool`.

        Returns:
            By Rubin's rules, nested in the weight draws; see `pool`. They want as many completions of every weight
            draw: where S does not divide M, the first M // S of each are analysed.

        Raises:
            DataError: If draws were not kept. Others as of `pool`.

        Example:
            ``imputations.pool(lambda x: (x.mean(0), x.var(0) / len(x)))`` are the means of columns.
        """
        nests = self.draws.split(shares(self._n_kept(), self.n_weight_draws))
        each = min(len(nest) for nest in nests)
        results = [[torch.as_tensor(part) for part in analysis(one)] for nest in nests for one in nest[:each]]
        estimates, variances = (torch.stack(part) for part in zip(*results, strict=True))
        return pool(estimates, variances, n_nests=self.n_weight_draws, complete_dof=complete_dof)

    def _n_kept(self) -> int:
        """How many draws there are; raises if they were not kept."""
        if len(self.draws) == 0:
            raise DataError("draws that were kept", "a record of mean and variance", "Use impute(keep_draws=True).")
        return len(self.draws)
