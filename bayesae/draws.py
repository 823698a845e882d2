"""`Draws` and `Moments`: what a predictive returns and every score and objective reduces."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from bayesae.errors import ShapeError, UnsupportedError
from bayesae.types import Likelihood

__all__ = [
    "Draws",
    "Moments",
    "concatenate_rows",
    "concatenate_weight_draws",
    "fitted_mask",
    "fitted_rows",
    "logmeanexp_over_latents",
    "logmeanexp_over_weights",
    "mean_over_weights",
]

_LATENT_AXIS, _WEIGHT_AXIS = 0, 0  # of (K, S, B) and of (S, B): the axis that is reduced always comes first


def logmeanexp_over_latents(values: Tensor) -> Tensor:
    """Log of the mean of exponentials over code draws: (K, S, B) to (S, B)."""
    return torch.logsumexp(values, _LATENT_AXIS) - math.log(values.shape[_LATENT_AXIS])


def logmeanexp_over_weights(values: Tensor) -> Tensor:
    """Log of the mean of exponentials over weight draws: (S, B) to (B,)."""
    return torch.logsumexp(values, _WEIGHT_AXIS) - math.log(values.shape[_WEIGHT_AXIS])


def mean_over_weights(values: Tensor) -> Tensor:
    """Mean over weight draws: (S, B) to (B,)."""
    return values.mean(_WEIGHT_AXIS)


@dataclass(frozen=True)
class Draws:
    r"""Draws of codes and weights with their densities; every score and bound is a reduction of it.

    Args:
        latents: Codes, (K, S, B, Z).
        log_likelihood: log p(x_observed | z, theta) in nats, summed over outputs, (K, S, B).
        log_prior: log p(z), (K, S, B).
        log_q: log q(z | x, theta), (K, S, B); None for a deterministic encoder.
        likelihood: The likelihood that turned outputs into densities.
        kl: KL(q(z | x) || p(z)) in G parts that add up, (S, B, G): in closed form for a Normal q (one part for each
            independent group of code dimensions); of an autoregressive flow each dimension's mean over these draws;
            None where only ``log_q - log_prior`` is known.
        outputs: Natural parameters, (K, S, B, \*O); None unless they were asked for.
        is_path_gradient: Whether ``log_q`` passes no gradient to the parameters of q but through ``latents``.
        penalty: What training subtracts from the objective of a row, nats, (S, B): a regulariser of q.
        mask: Which numbers of the data ``log_likelihood`` sums over, (B, \*data); None where all were observed.
    """

    latents: Tensor
    log_likelihood: Tensor
    log_prior: Tensor
    log_q: Tensor | None
    likelihood: Likelihood
    kl: Tensor | None = None
    outputs: Tensor | None = None
    is_path_gradient: bool = False
    penalty: Tensor | None = None
    mask: Tensor | None = None

    @property
    def log_ratio(self) -> Tensor:
        """Log p(x, z | theta) - log q(z | x, theta), (K, S, B).

        Raises:
            UnsupportedError: If the code is deterministic, so that q has no density.
        """
        if self.log_q is None:
            raise UnsupportedError(
                "codes drawn from a distribution",
                "a deterministic encoder (log_q is None), whose q(z | x) has no density",
                "Use log_likelihood, or a code posterior with a density.",
            )
        return self.log_likelihood + self.log_prior - self.log_q

    def log_evidence(self) -> Tensor:
        """Importance-sampling estimate of log p(x | theta), (S, B); exact when q is the true posterior."""
        return logmeanexp_over_latents(self.log_ratio)

    def ess(self) -> Tensor:
        """Effective sample size of the code draws' importance weights, in [1, K], (S, B)."""
        log_ratio = self.log_ratio
        return torch.exp(2 * log_ratio.logsumexp(_LATENT_AXIS) - (2 * log_ratio).logsumexp(_LATENT_AXIS))

    def log_density(self) -> Tensor:
        """Log p(x | theta) of each weight draw, (S, B): what scores over weights reduce.

        Returns:
            `log_evidence` where q has a density; for a deterministic encoder log p(x | z(x), theta).
        """
        return logmeanexp_over_latents(self.log_likelihood) if self.log_q is None else self.log_evidence()

    def without_outputs(self) -> Draws:
        """The same draws, the large tensor let go."""
        return replace(self, outputs=None)


@dataclass(frozen=True)
class Moments:
    r"""Predictive mean and variance in data space, the variance in three parts.

    .. math:: \operatorname{Var}[x] = \underbrace{\mathbb{E}[\operatorname{Var}(x \mid z, \theta)]}_{noise}
              + \underbrace{\mathbb{E}_\theta \operatorname{Var}_z \mathbb{E}[x \mid z, \theta]}_{code}
              + \underbrace{\operatorname{Var}_\theta \mathbb{E}_z \mathbb{E}[x \mid z, \theta]}_{weights}

    Every field has the data's own shape (B, \*data), or (B, \*data, C) where data are C classes without an order: the
    moments are then those of each class's indicator. Parts from draws are the moments *of the mixture of
    those draws* (divisors S and K, not S - 1 and K - 1), so that they add up exactly. As estimates of the posterior's
    own, the sum is low by a share 1 / S, and of a stochastic code the weight part holds 1 / K of the code's variance
    (all of it for K = 1): take K of 10 or more to tell the two apart.

    Args:
        mean: Predictive mean, units of x.
        noise: Expected noise variance, units of x squared.
        code: Variance due to the code.
        weights: Variance due to the weights.
        likelihood: The likelihood in whose data space this lives.
        standard_error: Monte-Carlo standard error of ``mean``; infinite for a single draw, None where nothing was
            sampled: closed forms, and particles that were all run.
    """

    mean: Tensor
    noise: Tensor
    code: Tensor
    weights: Tensor
    likelihood: Likelihood
    standard_error: Tensor | None = None

    @property
    def is_exact(self) -> bool:
        """Whether no sampling was involved."""
        return self.standard_error is None

    @property
    def total(self) -> Tensor:
        """Predictive variance: the sum of the three parts."""
        return self.noise + self.code + self.weights

    def log_prob(self, x: Tensor | np.ndarray) -> Tensor:
        r"""Pixel-wise log predictive density of ``x`` (B, \*data) with these moments, (B, \*data), in nats.

        Args:
            x: The rows that the moments were made of.

        Returns:
            Of the likelihood's law with these moments: N(mean, total) for Gaussian ones, a negative binomial for
            counts, Bernoulli(mean) and its like where the mean settles all (``log_predictive`` of each says which).

        Raises:
            ShapeError: If x has other rows, or rows of another size.
        """
        shape = self.mean.shape[:-1] if self.likelihood.is_nominal else self.mean.shape
        return self.likelihood.log_predictive(self.mean, self.total, fitted_rows(x, shape, self.mean))


def fitted_rows(x: Tensor | np.ndarray, shape: Sequence[int], like: Tensor) -> Tensor:
    r"""Rows as a record knows them.

    Args:
        x: (B, ...), of as many numbers a row as ``shape`` has; (B,) will do for (B, 1) and the other way round.
        shape: Of the record's data, (B, \*data).
        like: Gives dtype and device.

    Returns:
        (B, \*data).

    Raises:
        ShapeError: If there are other rows, or rows of another size.
    """
    rows = torch.as_tensor(x)
    if rows.dim() == 0 or len(rows) != shape[0] or rows.numel() != math.prod(shape):
        raise ShapeError(
            f"x of shape {tuple(shape)}",
            f"{tuple(rows.shape)}",
            "Give the rows that the moments or draws were made of.",
        )
    return rows.to(like).reshape(tuple(shape))


def fitted_mask(mask: Tensor | np.ndarray, shape: Sequence[int]) -> Tensor:
    r"""Which numbers of a record's rows were observed.

    Args:
        mask: True where one was, of as many numbers a row as ``shape`` has.
        shape: Of the record's data, (B, \*data).

    Returns:
        bool, (B, \*data).

    Raises:
        ShapeError: If the mask is not bool, of other rows, or of rows of another size.
    """
    given = torch.as_tensor(mask)
    if given.dtype != torch.bool or given.dim() == 0 or len(given) != shape[0] or given.numel() != math.prod(shape):
        expected, got = f"a mask of shape {tuple(shape)} and dtype bool", f"{tuple(given.shape)} and {given.dtype}"
        raise ShapeError(expected, got, "True where an entry was observed.")
    return given.reshape(tuple(shape))


Record = TypeVar("Record", Draws, Moments)


def concatenate_rows(pieces: Sequence[Record]) -> Record:
    """Join `Draws` or `Moments` of consecutive chunks of rows along B.

    Args:
        pieces: Records of one type, of the same number of draws.

    Returns:
        One record of that type.
    """
    return _joined(pieces, _ROW_AXES[type(pieces[0])])


def concatenate_weight_draws(pieces: Sequence[Draws]) -> Draws:
    """Join `Draws` of the same rows under consecutive weight draws along S.

    Args:
        pieces: Records of the same number of code draws.

    Returns:
        One record. It knows one likelihood, the first's: where outputs are there to be scored again, all pieces have
        to have the same one.

    Raises:
        UnsupportedError: If pieces with outputs have likelihoods that differ, in their noise say.
    """
    first = pieces[0]
    n_others = 0 if first.outputs is None else sum(not _is_same(first.likelihood, one.likelihood) for one in pieces)
    if n_others:
        got = f"others than the first in {n_others} of {len(pieces)} pieces, as of a mixture that learned several"
        fix = "Predict from the components one by one, or without outputs (keep_outputs=False)."
        raise UnsupportedError("one likelihood of all outputs", got, fix)
    return _joined(pieces, {name: axis - 1 for name, axis in _ROW_AXES[Draws].items() if axis})


def _is_same(one: Likelihood, other: Likelihood) -> bool:
    """Whether two likelihoods are one object, or of one kind with the same numbers."""
    if one is other:
        return True
    if type(one) is not type(other) or not isinstance(one, nn.Module) or not isinstance(other, nn.Module):
        return False
    mine, others = one.state_dict(), other.state_dict()
    is_alike = repr(one) == repr(other) and mine.keys() == others.keys()
    return is_alike and all(torch.equal(value, others[name]) for name, value in mine.items())


def _joined(pieces: Sequence[Record], axes: dict[str, int]) -> Record:
    if len(pieces) == 1:
        return pieces[0]
    parts = {name: [getattr(piece, name) for piece in pieces] for name in axes}
    joined = {name: torch.cat(part, axes[name]) for name, part in parts.items() if part[0] is not None}
    return replace(pieces[0], **joined)


_ROW_AXES = {
    Draws: {
        "latents": 2,
        "log_likelihood": 2,
        "log_prior": 2,
        "log_q": 2,
        "kl": 1,
        "outputs": 2,
        "penalty": 1,
        "mask": 0,
    },
    Moments: {"mean": 0, "noise": 0, "code": 0, "weights": 0, "standard_error": 0},
}
