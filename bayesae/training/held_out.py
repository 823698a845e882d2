"""The prior precision by held-out rows, where the evidence is not to be trusted."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bayesae import ood, random
from bayesae.data import Data, as_rows, batches, check_counts, count_rows
from bayesae.errors import DataError
from bayesae.families.base import Normal
from bayesae.functional import check_finite, parameters_of
from bayesae.joint import IsotropicNormal
from bayesae.models import Autoencoder
from bayesae.predictive import Predictive
from bayesae.training.weights import log_joint
from bayesae.weights.laplace import Laplace

__all__ = ["HeldOut", "held_out_precision"]


@dataclass(frozen=True)
class HeldOut:
    """What `held_out_precision` found.

    Args:
        posterior: The Laplace posterior under the best candidate; ``info`` has its ``held_out_log_density`` too.
        precision: That candidate.
        log_density: Mean held-out log predictive density of every candidate, nats a row, by precision.
        is_at_edge: Whether the best candidate is the first or the last, so that a better one may lie outside.
    """

    posterior: Normal
    precision: float
    log_density: dict[float, float]
    is_at_edge: bool


@torch.no_grad()
def held_out_precision(
    laplace: Laplace,
    model: Autoencoder,
    train: Data,
    validation: Data,
    *,
    candidates: Sequence[float] | None = None,
    temperature: float = 1.0,
    batch_size: int = 128,
    n_data: int | None = None,
    seed: int | None = 0,
) -> HeldOut:
    r"""The prior precision under which rows that did not train the network are least surprising.

    .. math:: \hat\lambda = \arg\max_\lambda \frac1V \sum_{v=1}^{V} \sum_o \log p\big(x_{vo} \mid
              \mathbb{E}_\lambda[x_{vo}], \operatorname{Var}_\lambda[x_{vo}]\big)

    The curvature is summed once. Each candidate makes a posterior, and `Predictive.moments` of it the density: the mean
    alone would say nothing, because under linearised weights it does not depend on the prior.

    Args:
        laplace: Structure and subset; how it tunes the prior is not read.
        model: A trained autoencoder; it is only read.
        train: The rows that trained it.
        validation: Rows that did not.
        candidates: Prior precisions, 1 / (units of theta) squared; None is 1e-4 to 1e4 in 17 steps of half a decade.
        temperature: Of the posterior.
        batch_size: Rows of ``train`` at a time.
        n_data: N of ``train``, where it has no length.
        seed: Of draws, for likelihoods whose moments have no closed form: all candidates see the same.

    Returns:
        `HeldOut`. Warns where the best candidate is at an edge.

    Exact when: no exact case: it is an estimate from V rows, as fine as the candidates.
    Biased when: the density of the best candidate is taken for that of new rows.
    Cost: one fit of Laplace and one `Predictive.moments` of ``validation`` a candidate.

    Raises:
        UnsupportedError: As `weights.Laplace`.
        DataError: If a candidate is not positive and finite, there are fewer than three, or a set has no rows.

    References:
        | Laplace Redux: Effortless Bayesian Deep Learning (Daxberger et al., 2021): the grid search
        | Departure: scored by the density with its full variance and not by the squared error of the mean.
    """
    grid = torch.logspace(-4, 4, 17, dtype=torch.float64).tolist() if candidates is None else sorted(set(candidates))
    if len(grid) < 3 or not all(0 < one < math.inf for one in grid):
        raise DataError("three or more positive, finite candidates", f"{grid}", "None takes 1e-4 to 1e4.")
    check_counts(batch_size=batch_size)
    n_data = count_rows(train, n_data)
    frozen = copy.deepcopy(model).eval()
    params = parameters_of(frozen.network)
    check_finite(params, "weights of the model", "Did fit_model diverge?")
    joint = log_joint(frozen, n_data, weight_prior=IsotropicNormal(grid[0]), temperature=temperature)
    state = laplace.init(params, joint)
    with random.scope(seed):
        for _ in range(laplace.epochs):
            for batch in batches(train, frozen.reference, batch_size=batch_size, is_shuffled=False, n_data=n_data):
                frozen.likelihood.check(batch.explained)
                state, _ = laplace.update(state, batch, joint)
    marginal, rows = laplace.marginal(state, joint), as_rows(validation, frozen.reference)

    def posterior(precision: float) -> Normal:
        info = marginal.info(precision, None) | laplace.setting(joint)
        if precision in scores:
            info["held_out_log_density"] = scores[precision]
        return marginal.curvature.posterior(params, precision, temperature, info)

    scores: dict[float, float] = {}
    for precision in grid:
        moments = Predictive(frozen, posterior(precision)).moments(rows, seed=seed)
        score = ood.negative_log_density(moments, rows.explained, rows.mask)
        scores[precision] = -float(score.double().mean())
    best = max(grid, key=scores.__getitem__)
    is_at_edge = best in (grid[0], grid[-1])
    if is_at_edge:
        message = (
            f"The best prior precision, {best:.3g}, is at the edge of the candidates: a better one may lie outside."
        )
        warnings.warn(message, stacklevel=3)  # above the no_grad decorator
    return HeldOut(posterior(best), best, scores, is_at_edge)
