"""The evidence lower bound: its two estimators, and how its KL is weighted, warmed up and floored."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bayesae.draws import Draws
from bayesae.errors import DataError
from bayesae.objectives.base import log_q_of
from bayesae.objectives.warm_up import WarmUp

__all__ = ["ELBO", "AnnealedELBO", "elbo", "sampled_elbo"]


def elbo(draws: Draws) -> Tensor:
    r"""Evidence lower bound, by the closed-form KL where there is one.

    .. math:: \mathcal{L}(x) = \tfrac1K \sum_k \log p(x \mid z_k) - \operatorname{KL}(q(z \mid x) \| p(z))

    On draws of ``codes.Amortised(gradient="path")`` it is `sampled_elbo`: a closed-form KL would bring the parameters
    of q back in.

    Args:
        draws: Draws of a stochastic code; any K.

    Returns:
        (S, B), in nats.

    Exact when: q is the true posterior, where it is log p(x) in expectation.

    Raises:
        UnsupportedError: If the code is deterministic.

    References:
        | Auto-Encoding Variational Bayes (Kingma, Welling, 2013, https://arxiv.org/abs/1312.6114), estimator B
    """
    return draws.log_likelihood.mean(0) - _kl_parts(draws).sum(-1)


def sampled_elbo(draws: Draws) -> Tensor:
    r"""Evidence lower bound by draws alone, :math:`\tfrac1K \sum_k \log p(x, z_k) - \log q(z_k \mid x)`.

    Of the two estimators it has the smaller variance where q is near the true posterior: the noise of log q cancels
    that of the log-joint. On draws of ``codes.Amortised(gradient="path")`` its gradient is *sticking the landing*:
    without the score of q, so that it has no variance at all where q is the true posterior.

    Args:
        draws: Draws of a stochastic code; any K.

    Returns:
        (S, B), in nats.

    Exact when: q is the true posterior, where every draw gives log p(x).

    Raises:
        UnsupportedError: If the code is deterministic.

    References:
        | Auto-Encoding Variational Bayes (Kingma, Welling, 2013, https://arxiv.org/abs/1312.6114), estimator A
        | Sticking the Landing (Roeder, Wu, Duvenaud, 2017, https://arxiv.org/abs/1703.09194)
    """
    return draws.log_ratio.mean(0)


@dataclass(frozen=True)
class ELBO:
    r"""`elbo` with a weight on its KL, a warm-up of that weight, and free bits.

    .. math:: \tfrac1K \sum_k \log p(x \mid z_k) - \beta \sum_{g=1}^{G} \max\Big(\lambda,\;
              \tfrac1B \sum_{b} \operatorname{KL}_g(x_b)\Big)

    With free bits a row's value has its own KL in parts whose mean over the batch is above :math:`\lambda`, and
    :math:`\lambda` in the others: the mean over the batch, and its gradient, are those of the formula.

    Args:
        beta: Weight of the KL: 1 for the bound, above 1 for a beta-VAE.
        warm_up: Factor of beta as a function of the share of training that is done; `WarmUp` is one. Called as it is,
            and so in validation, the objective has all of beta.
        free_bits: :math:`\lambda`, nats that each part of the KL may have for nothing; 0 leaves the KL alone. Parts are
            those of ``draws.kl``; where the KL is sampled there is one.

    Exact when: it is `elbo` with beta of 1 and no free bits.
    Biased when: read as a bound with beta below 1, as at the start of a warm-up. With free bits a row's value
        depends on the batch that it is in.

    Raises:
        DataError: If beta or free_bits are negative or not finite.
        UnsupportedError: When called, if the code is deterministic.

    References:
        | beta-VAE: Learning Basic Visual Concepts with a Constrained Variational Framework (Higgins et al., 2017)
        | Generating Sentences from a Continuous Space (Bowman et al., 2016): warm-up
        | Improving Variational Inference with Inverse Autoregressive Flow (Kingma et al., 2016,
          https://arxiv.org/abs/1606.04934): free bits
    """

    beta: float = 1.0
    warm_up: Callable[[float], float] | None = None
    free_bits: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("beta", self.beta), ("free_bits", self.free_bits)):
            if not 0 <= value < math.inf:
                raise DataError(f"a finite {name} of at least 0", repr(value), "ELBO() is the plain bound.")

    def __call__(self, draws: Draws) -> Tensor:
        """The objective of every row, (S, B), in nats."""
        kl = _kl_parts(draws)
        if self.free_bits:
            kl = torch.where(kl.mean(1, keepdim=True) > self.free_bits, kl, self.free_bits)
        return draws.log_likelihood.mean(0) - self.beta * kl.sum(-1)

    def at(self, progress: float) -> ELBO:
        """The objective at a share of training: beta times its warm-up."""
        factor = 1.0 if self.warm_up is None else self.warm_up(progress)
        return replace(self, beta=self.beta * factor, warm_up=None)


@dataclass(frozen=True)
class AnnealedELBO:
    r"""Minus the annealed free energy: the log-joint, prior *and* likelihood, grows into the bound.

    .. math:: \tfrac1K \sum_k a \log p(x, z_k) - \log q(z_k \mid x)

    Args:
        warm_up: Factor a as a function of the share of training that is done; the default starts at 0.01. Called as
            it is, and so in validation, the objective has a = 1 and is `sampled_elbo`.
        factor: a; `at` sets it.

    Exact when: it is `sampled_elbo` with a = 1.
    Biased when: read as a bound while a < 1: what training reports then is not the ELBO.

    Raises:
        DataError: If the factor lies outside [0, 1].
        UnsupportedError: When called, if the code is deterministic.

    References:
        | Variational Inference with Normalizing Flows (Rezende, Mohamed, 2015, https://arxiv.org/abs/1505.05770); there
          a = min(1, 0.01 + t / 10000) at update t
    """

    warm_up: Callable[[float], float] = WarmUp(start=0.01)
    factor: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.factor <= 1:
            raise DataError("a factor in [0, 1]", repr(self.factor), "Leave it out: warm_up sets it.")

    def __call__(self, draws: Draws) -> Tensor:
        """The objective of every row, (S, B), in nats."""
        return (self.factor * (draws.log_likelihood + draws.log_prior) - log_q_of(draws)).mean(0)

    def at(self, progress: float) -> AnnealedELBO:
        """The objective at a share of training."""
        return replace(self, factor=self.warm_up(progress))


def _kl_parts(draws: Draws) -> Tensor:
    """KL(q || p) in parts, (S, B, G): in closed form, or one part by the draws."""
    if draws.kl is None or draws.is_path_gradient:
        return (log_q_of(draws) - draws.log_prior).mean(0)[..., None]
    return draws.kl
