"""Estimates from several completed data sets as one, with a standard error: Rubin's rules, plain and nested."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bayesae.data import as_tensor
from bayesae.errors import DataError, ShapeError
from bayesae.functional import check_finite

__all__ = ["Pooled", "pool"]


@dataclass(frozen=True)
class Pooled:
    r"""An estimate over all completed data sets.

    Args:
        estimate: Mean of the estimates, (\*shape), float64.
        var: Its variance, within completed data sets and between them.
        dof: Degrees of freedom of the Student-t that (estimate - truth) / sqrt(var) follows; infinite where completed
            data sets agree; 0 where all of the variance is due to what is missing and ``complete_dof`` was given.
        missing_share: Share of the variance that is due to what is missing, in [0, 1].
    """

    estimate: Tensor
    var: Tensor
    dof: Tensor
    missing_share: Tensor

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        r"""Confidence interval of Student's t, (\*shape) each.

        Args:
            level: In (0, 1).

        Returns:
            Lower and upper bounds; infinite where there are no degrees of freedom.

        Raises:
            DataError: If the level is none.
        """
        from scipy.special import stdtrit  # slow to import

        check_level(level)
        quantile = 0.5 + 0.5 * level
        dof = self.dof.cpu().numpy().clip(max=1e12)  # a Normal by then
        factor = torch.as_tensor(stdtrit(dof, quantile)).to(self.dof).where(self.dof > 0, torch.inf)
        half = factor * self.var.sqrt()
        return self.estimate - half, self.estimate + half


def pool(
    estimates: Tensor | np.ndarray,
    variances: Tensor | np.ndarray,
    *,
    n_nests: int | None = None,
    complete_dof: float | None = None,
) -> Pooled:
    r"""Rubin's rules: M estimates of one quantity, each from data completed in another way.

    .. math:: \bar Q = \tfrac1M \sum_m Q_m, \qquad T = \bar U + (1 + \tfrac1M) B, \qquad
              \nu = (M - 1) \Big(\frac{T}{(1 + 1 / M) B}\Big)^2

    with :math:`\bar U` the mean of the variances and B the variance (divisor M - 1) of the estimates. Completions that
    share a draw of the weights are nested in it: of S draws with K completions each, M = S K, it is

    .. math:: T = \bar U + \tfrac1K (1 + \tfrac1S) B_S + (1 - \tfrac1K) W, \qquad
              \frac1\nu = \frac{1}{S - 1} \Big(\frac{(1 + 1 / S) B_S}{K T}\Big)^2
              + \frac{1}{S (K - 1)} \Big(\frac{(1 - 1 / K) W}{T}\Big)^2

    with B_S the mean square between nests, K times the variance of their means, and W that within.

    Args:
        estimates: Q, (M, \*shape), in the order of `Imputations.draws`: nest after nest.
        variances: U, squared standard errors as of complete data, likewise.
        n_nests: S; None, 1 or M take completions as independent of one another.
        complete_dof: Degrees of freedom that complete data would have; it bounds those of the result. None: infinite.

    Returns:
        The pooled estimate, float64.

    Exact when: in the limit of large samples, for completions that are drawn from the posterior of what is missing
        given what is observed ("proper" ones, weights drawn too).
    Biased when: completions leave the spread of weights, codes or noise out: B, and with it T, is then too small.

    Raises:
        ShapeError: If the two have different shapes, or there are fewer than two completions.
        DataError: If ``n_nests`` does not divide M, a variance is negative, or ``complete_dof`` is not positive.
        NonFiniteError: If a number is not finite.

    References:
        | Multiple Imputation for Nonresponse in Surveys (Rubin, 1987)
        | Small-Sample Degrees of Freedom with Multiple Imputation (Barnard, Rubin, 1999): ``complete_dof``
        | Nested Multiple Imputation of NMES via Partially Incompatible MCMC (Rubin, 2003): ``n_nests``
    """
    q, u = (as_tensor(part).detach().double() for part in (estimates, variances))
    n = len(q) if q.dim() else 0
    if q.shape != u.shape or n < 2:
        got = f"{tuple(q.shape)} and {tuple(u.shape)}"
        raise ShapeError("estimates and variances of one shape (M, *shape), M >= 2", got, "One of each a completion.")
    check_finite({"estimates": q, "variances": u}, "estimates and variances", "Leave those completions out.")
    if bool((u < 0).any()):
        raise DataError("variances of at least 0", f"{float(u.min()):.4g}", "Give squared standard errors.")
    if complete_dof is not None and not complete_dof > 0:
        raise DataError("complete_dof above 0, or None", f"{complete_dof}", "N - 1 for a mean of N rows.")
    nests = 1 if n_nests is None else n_nests
    if nests < 1 or n % nests:
        raise DataError(f"n_nests that divides the {n} completions", f"{n_nests}", "Give n_weight_draws of the draws.")
    n_inside = n // nests
    if nests == 1 or n_inside == 1:
        terms = [((1 + 1 / n) * q.var(0), n - 1)]
    else:
        nested = q.unflatten(0, (nests, n_inside))
        terms = [((1 + 1 / nests) * nested.mean(1).var(0), nests - 1)]
        terms += [((1 - 1 / n_inside) * nested.var(1).mean(0), nests * (n_inside - 1))]
    between = torch.stack([term for term, _ in terms]).sum(0)
    total = u.mean(0) + between
    share = torch.where(total > 0, between / total, 0.0)
    parts = [torch.where(total > 0, term / total, 0.0).square() / dof for term, dof in terms]
    dof = 1 / torch.stack(parts).sum(0)
    if complete_dof is not None:
        observed = (complete_dof + 1) / (complete_dof + 3) * complete_dof * (1 - share)
        dof = torch.where(observed > 0, 1 / (1 / dof + 1 / observed), 0.0)
    return Pooled(q.mean(0), total, dof, share)


def check_level(level: float) -> None:
    """Raise unless a level of intervals is a share.

    Args:
        level: What was given.

    Raises:
        DataError: If it is not in (0, 1).
    """
    if not 0 < level < 1:
        raise DataError("a level of intervals in (0, 1)", f"{level}", "0.95 is 95 %.")
