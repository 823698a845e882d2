r"""The importance-weighted bounds, of weights :math:`w_k = p(x, z_k) / q(z_k \mid x)`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from bayesae.data import check_counts
from bayesae.draws import Draws, logmeanexp_over_latents
from bayesae.errors import DataError, ShapeError
from bayesae.objectives.base import Grouped
from bayesae.objectives.elbo import sampled_elbo

__all__ = ["CIWAE", "PIWAE", "MultiplyIWAE", "iwae"]


def iwae(draws: Draws) -> Tensor:
    r"""Importance-weighted bound of K draws, :math:`\log \tfrac1K \sum_k w_k`.

    Args:
        draws: Draws of a stochastic code.

    Returns:
        (S, B), in nats.

    Exact when: q is the true posterior, where it is log p(x); or K goes to infinity.
    Biased when: K is finite: low, and less so with every draw. The encoder's gradient drowns in its own noise, its
        signal to noise falls as :math:`K^{-1/2}`: use `PIWAE` or `dreg`. On draws of
        ``codes.Amortised(gradient="path")`` the encoder's gradient is not this bound's for K > 1: use `dreg`.

    Raises:
        UnsupportedError: If the code is deterministic.

    References:
        | Importance Weighted Autoencoders (Burda, Grosse, Salakhutdinov, 2016, https://arxiv.org/abs/1509.00519)
    """
    return draws.log_evidence()


@dataclass(frozen=True)
class MultiplyIWAE:
    r"""Mean of M importance-weighted bounds of L = K / M draws each.

    .. math:: \tfrac1M \sum_{m=1}^{M} \log \tfrac1L \sum_{l=1}^{L} w_{m, l}

    Not the importance-weighted bound for *missing data* of the same initials: that is `iwae` on rows with a mask.

    Args:
        n_groups: M, which must divide K: 1 is `iwae`, K is `sampled_elbo`.

    Exact when: q is the true posterior, where it is log p(x).
    Biased when: low, as `iwae` of L draws; the signal to noise of the encoder's gradient is that of
        :math:`\sqrt{M / L}`.

    Raises:
        DataError: If n_groups is no count.
        ShapeError: When called, if it does not divide K.
        UnsupportedError: When called, if the code is deterministic.

    References:
        | Tighter Variational Bounds are Not Necessarily Better (Rainforth et al., 2018,
          https://arxiv.org/abs/1802.04537): MIWAE
    """

    n_groups: int

    def __post_init__(self) -> None:
        check_counts(n_groups=self.n_groups)

    def __call__(self, draws: Draws) -> Tensor:
        """The bound of every row, (S, B), in nats."""
        log_ratio = draws.log_ratio
        if len(log_ratio) % self.n_groups:
            fix = "Give n_latent_draws= a multiple of it."
            raise ShapeError(f"draws in {self.n_groups} groups of one size", f"K = {len(log_ratio)}", fix)
        return logmeanexp_over_latents(log_ratio.unflatten(0, (self.n_groups, -1)).transpose(0, 1)).mean(0)


@dataclass(frozen=True)
class CIWAE:
    r"""A combination of the two bounds.

    .. math:: \beta\, \tfrac1K \sum_k \log w_k + (1 - \beta) \log \tfrac1K \sum_k w_k

    Args:
        beta: Share of `sampled_elbo`, in [0, 1]; the rest is `iwae`. It is to be chosen, not learned: the objective is
            linear in it, so that a gradient goes to 0 or 1.

    Exact when: q is the true posterior, where it is log p(x).
    Biased when: low, between the two bounds.

    Raises:
        DataError: If beta lies outside [0, 1].
        UnsupportedError: When called, if the code is deterministic.

    References:
        | Tighter Variational Bounds are Not Necessarily Better (Rainforth et al., 2018,
          https://arxiv.org/abs/1802.04537)
    """

    beta: float

    def __post_init__(self) -> None:
        if not 0 <= self.beta <= 1:
            raise DataError("beta in [0, 1]", repr(self.beta), "0 is iwae, 1 is sampled_elbo.")

    def __call__(self, draws: Draws) -> Tensor:
        """The bound of every row, (S, B), in nats."""
        return self.beta * sampled_elbo(draws) + (1 - self.beta) * iwae(draws)


@dataclass(frozen=True)
class PIWAE:
    """The decoder climbs `iwae` of all K draws, the encoder `MultiplyIWAE` of the same draws.

    Args:
        n_groups: M of the encoder's bound; 1 makes the two one.

    Exact when: q is the true posterior, where both bounds are log p(x).
    Biased when: low, as its two bounds are.

    Raises:
        DataError: If n_groups is no count.
        ShapeError: When called, if it does not divide K.
        UnsupportedError: When called, if the code is deterministic.

    References:
        | Tighter Variational Bounds are Not Necessarily Better (Rainforth et al., 2018,
          https://arxiv.org/abs/1802.04537)
    """

    n_groups: int

    def __post_init__(self) -> None:
        check_counts(n_groups=self.n_groups)

    def __call__(self, draws: Draws) -> Grouped:
        """Both bounds of every row, (S, B) each, in nats."""
        return {"decoder": iwae(draws), "encoder": MultiplyIWAE(self.n_groups)(draws)}
