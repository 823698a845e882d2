r"""Bounds by other divergences, of weights :math:`w_k = p(x, z_k) / q(z_k \mid x)`."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from bayesae.draws import Draws, logmeanexp_over_latents
from bayesae.errors import DataError, UnsupportedError
from bayesae.objectives.elbo import sampled_elbo

__all__ = ["CUBO", "Renyi"]

_FEW, _HEAVY = 10.0, 0.7


@dataclass(frozen=True)
class Renyi:
    r"""The variational Renyi bound.

    .. math:: \mathcal{L}_\alpha = \frac{1}{1 - \alpha} \log \tfrac1K \sum_k w_k^{1 - \alpha}

    Args:
        alpha: Order: 1 is `sampled_elbo`, 0 is `iwae`, ``-math.inf`` the largest log weight (VR-max), ``math.inf`` the
            smallest. The bound falls as alpha grows, for the same draws too.

    Exact when: q is the true posterior, where it is log p(x); or alpha is 0 and K goes to infinity.
    Biased when: K is finite, towards the ELBO. For alpha in [0, 1] it is a lower bound of log p(x) in expectation, for
        alpha above 1 its limit is; for alpha below 0 the limit lies *above* log p(x), and K draws on either side.

    Raises:
        DataError: If alpha is not a number.
        UnsupportedError: When called, if the code is deterministic.

    References:
        | Renyi Divergence Variational Inference (Li, Turner, 2016, https://arxiv.org/abs/1602.02311)
        | Departure: VR-max takes gradients through the largest weight, as the limit does.
    """

    alpha: float

    def __post_init__(self) -> None:
        if math.isnan(self.alpha):
            raise DataError("alpha, a number", repr(self.alpha), "0.5 lies half way between iwae and the ELBO.")

    def __call__(self, draws: Draws) -> Tensor:
        """The bound of every row, (S, B), in nats."""
        if self.alpha == 1:
            return sampled_elbo(draws)
        if math.isinf(self.alpha):
            return draws.log_ratio.amax(0) if self.alpha < 0 else draws.log_ratio.amin(0)
        order = 1 - self.alpha
        return logmeanexp_over_latents(order * draws.log_ratio) / order


@dataclass(frozen=True)
class CUBO:
    r"""The chi-square *upper* bound of log p(x): with a lower bound it sandwiches the evidence.

    .. math:: \frac1n \log \tfrac1K \sum_k w_k^n \quad \to \quad \frac1n \log \mathbb{E}_q[w^n] \ge \log p(x)

    It is no objective to climb, and `fit_model` refuses it. To fit q by it, let the encoder climb its negative:
    ``lambda draws: {"decoder": elbo(draws), "encoder": -CUBO()(draws)}``.

    Args:
        n: Order, above 1; 2 is the chi-square divergence.

    Exact when: q is the true posterior, where it is log p(x).
    Biased when: K is finite: the logarithm of a Monte-Carlo mean is low, so that few draws may bound nothing. Its limit
        is infinite where q is too narrow: for Normals in one dimension, of variances s^2 of q and v of the posterior,
        where :math:`s^2 \le v (n - 1) / n`. The first shows in `ess`, the second in `tail_shape`: rows with less than
        10 of the one or more than 0.7 of the other are warned of.

    Raises:
        DataError: If n is not above 1.
        UnsupportedError: When called, if the code is deterministic.

    References:
        | Variational Inference via chi Upper Bound Minimization (Dieng et al., 2017, https://arxiv.org/abs/1611.00328)
        | Pareto Smoothed Importance Sampling (Vehtari et al., 2024, https://arxiv.org/abs/1507.02646): the limit of
          0.7; the shape here is Hill's estimate, for which nothing is fitted
    """

    n: float = 2.0

    def __post_init__(self) -> None:
        if not 1 < self.n < math.inf:
            raise DataError("a finite order n above 1", repr(self.n), "2 is the chi-square divergence.")

    def __call__(self, draws: Draws) -> Tensor:
        """The bound of every row, (S, B), in nats; warns of rows where it is not to be trusted."""
        ess, shape = self.ess(draws), self.tail_shape(draws)
        if n_poor := int((~((ess >= _FEW) & (shape <= _HEAVY))).sum()):  # NaN too
            message = (
                f"CUBO({self.n:g}) is too low in {n_poor} of {ess.numel()} rows, or infinite: at worst it rests on "
                f"{float(ess.min()):.2g} effective draws of {len(draws.latents)} and w^n has a tail of shape "
                f"{float(shape.max()):.2g}, infinite in the mean from 1. Take more code draws, or a wider q."
            )
            warnings.warn(message, stacklevel=2)
        return Renyi(1 - self.n)(draws)

    def ess(self, draws: Draws) -> Tensor:
        r"""Effective sample size of the mean of :math:`w^n`; the bound's standard error follows from it.

        The latter is about :math:`\sqrt{1 / \mathrm{ess} - 1 / K} / n`, where the tail is light.

        Args:
            draws: Draws of a stochastic code.

        Returns:
            (S, B), in [1, K].
        """
        powers = self.n * draws.log_ratio.detach()
        return torch.exp(2 * powers.logsumexp(0) - (2 * powers).logsumexp(0))

    def tail_shape(self, draws: Draws) -> Tensor:
        r"""Pareto shape of the upper tail of :math:`w^n`: its mean is infinite from 1, its variance from 1/2.

        Hill's estimate: the mean excess of the largest :math:`n \log w`, :math:`\min(K / 5, 3 \sqrt K)` of them, over
        the next one.

        Args:
            draws: Draws of a stochastic code.

        Returns:
            (S, B), at least 0; infinite for one draw.
        """
        log_ratio = draws.log_ratio.detach()
        n_draws = len(log_ratio)
        if n_draws == 1:
            return torch.full_like(log_ratio[0], torch.inf)
        n_tail = max(1, min(n_draws // 5, int(3 * n_draws**0.5)))
        top = log_ratio.topk(n_tail + 1, 0).values
        return self.n * (top[:-1] - top[-1]).mean(0)

    def at(self, progress: float) -> NoReturn:
        """Refuse to be climbed.

        Raises:
            UnsupportedError: Always.
        """
        fix = "Climb objectives.elbo, and read CUBO off the draws; or let the encoder climb its negative."
        raise UnsupportedError("a lower bound to climb", f"{self}, an upper bound", fix)
