"""`LogEvidence`, and the running sums of log weights that it is made of."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesae.draws import logmeanexp_over_weights
from bayesae.functional import check_finite

__all__ = ["Annealed", "LogEvidence", "LogWeights", "RunningMean", "warn_of_low_ess"]

_LOW_SHARE = 0.1  # of rows and weight draws with an effective sample size near one: then there is a warning


@dataclass(frozen=True)
class Annealed:
    """How an annealed run went.

    Args:
        acceptance: Mean acceptance of all transitions, (S, B); NaN if there was none.
        step_size: Geometric mean of the step sizes that the preliminary run found, (S, B); NaN likewise.
    """

    acceptance: Tensor
    step_size: Tensor


@dataclass(frozen=True)
class LogEvidence:
    r"""Estimates from weights w with E[w] = p(x), for every row under every weight draw, (S, B) each, in nats.

    Args:
        log_evidence: :math:`\log \tfrac1K \sum_k w_k`: a lower bound of log p(x) in expectation, and above
            log p(x) + t with a probability of at most exp(-t).
        ess: Effective sample size of the weights, in [1, K].
        standard_error: Of ``log_evidence``, to first order; too small where ``ess`` is. Infinite for K = 1.
        elbo: :math:`\tfrac1K \sum_k \log w_k`, a lower bound in expectation.
        elbo_standard_error: Of ``elbo``; infinite for K = 1.
        cubo: :math:`\tfrac12 \log \tfrac1K \sum_k w_k^2`. Its limit is an upper bound of log p(x); at a finite K it is
            low in expectation, grossly where ``ess`` is small, and infinite in the limit if q is too narrow.
        n_draws: K.
        annealed: How an annealed run went; None of plain importance weights.
    """

    log_evidence: Tensor
    ess: Tensor
    standard_error: Tensor
    elbo: Tensor
    elbo_standard_error: Tensor
    cubo: Tensor
    n_draws: int
    annealed: Annealed | None = None

    def over_weights(self) -> Tensor:
        r"""Log of the mean over weight draws, :math:`\log \tfrac1S \sum_s p(x \mid \theta_s)`, (B,)."""
        return logmeanexp_over_weights(self.log_evidence)

    def __str__(self) -> str:
        n_weight_draws, n_rows = self.log_evidence.shape
        error = math.sqrt(float((self.standard_error.double() ** 2).mean()) / self.standard_error.numel())
        means = [f"{float(values.double().mean()):.3f}" for values in (self.log_evidence, self.elbo)]
        share = float(self.ess.median()) / self.n_draws
        return (
            f"log p(x) {means[0]} +- {error:.3f} nats a row, ELBO {means[1]}; {n_rows} rows, {n_weight_draws} weight "
            f"draws, {self.n_draws} codes each, median ESS/K {share:.3g}"
        )


class RunningMean:
    """Mean and its standard error over the first axis of what was added, by Chan's update, in float64."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, values: Tensor) -> None:
        """Take in values (K', ...)."""
        values = values.double()
        mean, squares = values.mean(0), ((values - values.mean(0)) ** 2).sum(0)
        if self.count == 0:
            self.mean, self.squares = mean, squares
        else:
            share = len(values) / (self.count + len(values))
            shift = mean - self.mean
            self.squares = self.squares + squares + share * self.count * shift**2
            self.mean = self.mean + share * shift
        self.count += len(values)

    def error(self) -> Tensor:
        """Standard error of the mean; infinite for one value."""
        if self.count == 1:
            return torch.full_like(self.mean, torch.inf)
        return torch.sqrt(self.squares / (self.count - 1) / self.count)


class LogWeights:
    """Running sums of log weights in float64: memory does not grow with their number."""

    def __init__(self) -> None:
        self.mean = RunningMean()

    def add(self, log_weights: Tensor) -> None:
        """Take in log weights (K', S, B).

        Raises:
            NonFiniteError: If one is not finite.
        """
        check_finite({"log weights": log_weights}, "log weights", "Are the inputs far outside the training range?")
        wide = log_weights.double()
        first, second = wide.logsumexp(0), (2 * wide).logsumexp(0)
        if self.mean.count:
            first, second = torch.logaddexp(self.first, first), torch.logaddexp(self.second, second)
        self.first, self.second, self.dtype = first, second, log_weights.dtype
        self.mean.add(wide)

    def results(self) -> tuple[Tensor, ...]:
        """The first six fields of a `LogEvidence`."""
        n = self.mean.count
        ess = torch.exp(2 * self.first - self.second)
        # n times the relative variance of the weights is n / ess - 1, times n / (n - 1) to be unbiased
        error = torch.sqrt((n / ess - 1).clamp(min=0) / (n - 1)) if n > 1 else torch.full_like(ess, torch.inf)
        log_n = math.log(n)
        values = (self.first - log_n, ess, error, self.mean.mean, self.mean.error(), 0.5 * (self.second - log_n))
        return tuple(value.to(self.dtype) for value in values)


def warn_of_low_ess(ess: Tensor, n_draws: int, fix: str) -> None:
    """Warn where one weight decides for a notable share of rows.

    Args:
        ess: Effective sample sizes, (S, B).
        n_draws: K.
        fix: What to do about it.
    """
    share = float((ess < 1 + min(n_draws, 10) / 10).double().mean())
    if n_draws > 1 and share > _LOW_SHARE:
        text = (
            f"the effective sample size is near 1 of {n_draws} for {share:.0%} of the estimates of log p(x), which are"
        )
        warnings.warn(f"{text} then too low and their standard errors too small. {fix}", RuntimeWarning, stacklevel=3)
