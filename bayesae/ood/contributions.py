"""Which number of a row is strange: the parts of a score, output by output, and how sure the weights are of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bayesae.data import as_tensor
from bayesae.draws import Draws, Moments, fitted_mask, fitted_rows
from bayesae.errors import ShapeError, UnsupportedError
from bayesae.functional import at_least_float32
from bayesae.likelihoods import Gaussian

__all__ = ["Contributions", "contribution_draws", "contribution_moments", "contributions"]


@dataclass(frozen=True)
class Contributions:
    r"""Minus log p(x_o | z, theta), as uncertain as the weights are; higher = stranger.

    Args:
        mean: Mean over the weight posterior, (B, \*data), nats.
        standard_deviation: Standard deviation over the weight posterior, of the same shape, nats; 0 for one network.
    """

    mean: Tensor
    standard_deviation: Tensor


def contributions(
    moments: Moments,
    x: Tensor | np.ndarray,
    mask: Tensor | np.ndarray | None = None,
    *,
    reference: Tensor | np.ndarray | None = None,
) -> Tensor:
    r"""The parts of `negative_log_density`, number by number: they add up to it exactly.

    .. math:: c_o = -\log p(x_o \mid \mathbb{E}[x_o], \operatorname{Var}[x_o]) - r_o, \qquad r_o = 0
              \text{ or what familiar rows give at } o

    A border that every familiar row explains badly is strange in every row: with
    ``reference=contributions(predictive.moments(familiar), familiar).mean(0)`` it no longer is. Parts of the colour
    channels of one pixel may be summed by the caller: they are nats.

    Args:
        moments: Moments of the predictive at x.
        x: (B, \*data).
        mask: True where x was observed, (B, \*data); other entries, which may be NaN, contribute 0.
        reference: Mean contributions of familiar rows, (\*data), nats; best of rows that did not train the network.

    Returns:
        (B, \*data), nats; a colour image's channels and a sequence's steps stay apart.

    Exact when: as for `negative_log_density`: numbers are independent given x's moments, and Gaussian (or binary).
    Biased when: the code has seen the strange part: the reconstruction then follows it, or bends elsewhere because of
        it, and familiar numbers look strange.

    Raises:
        ShapeError: If x, mask or reference do not fit the moments.
    """
    values = -moments.log_prob(as_tensor(x))
    if reference is not None:
        reference = as_tensor(reference)
        if reference.shape != values.shape[1:]:
            raise ShapeError(
                f"a reference of shape {tuple(values.shape[1:])}, one number for all rows",
                f"{tuple(reference.shape)}",
                "Average the contributions of familiar rows over their first axis.",
            )
        values = values - reference.to(values)
    return observed_only(values, mask)


def contribution_moments(
    moments: Moments, x: Tensor | np.ndarray, mask: Tensor | np.ndarray | None = None
) -> Contributions:
    r"""Mean and standard deviation of minus log p(x_o | z, theta) over Normal outputs, without a draw.

    With Gaussian noise of variance n and an output f ~ N(m, w) whose code adds a variance k,

    .. math:: \mathbb{E}[c_o] = \frac{(x_o - m)^2 + w + k}{2 n} + \tfrac12 \log 2 \pi n, \qquad
              \operatorname{Var}_\theta[c_o] = \frac{w^2 + 2 w (x_o - m)^2}{2 n^2}

    (2 n c is, up to a constant, w times a non-central chi-squared variable). The mean is at least what `contributions`
    gives (Jensen): that is minus the log of the averaged density, this is the average of minus the log.

    Args:
        moments: Moments of the predictive at x, of a ``Gaussian`` likelihood.
        x: (B, \*data).
        mask: As for `contributions`.

    Returns:
        `Contributions`, of the shape of x.

    Exact when: outputs are Normal under the weight posterior (a linearised Laplace posterior); with several networks
        the mean still is. A stochastic code may add any variance that does not depend on the weights.
    Biased when: the noise variance itself is uncertain: it is taken as known.

    Raises:
        UnsupportedError: If the likelihood is not ``Gaussian``: use `contribution_draws`.
        ShapeError: If x or mask do not fit the moments.
    """
    if not isinstance(moments.likelihood, Gaussian):
        raise UnsupportedError(
            "a Gaussian likelihood, whose log-density is a square of the output",
            type(moments.likelihood).__name__,
            "Use contribution_draws(predictive(x, keep_outputs=True), x).",
        )
    square = (fitted_rows(as_tensor(x), moments.mean.shape, moments.mean) - moments.mean) ** 2
    noise, weights = moments.noise, moments.weights
    mean = 0.5 * ((square + weights + moments.code) / noise + torch.log(2 * math.pi * noise))
    deviation = torch.sqrt(0.5 * weights * (weights + 2 * square)) / noise
    return Contributions(observed_only(mean, mask), observed_only(deviation, mask))


def contribution_draws(draws: Draws, x: Tensor | np.ndarray, mask: Tensor | np.ndarray | None = None) -> Contributions:
    r"""Mean and standard deviation of minus log p(x_o | z, theta) over weight draws, whatever the likelihood.

    .. math:: c_{so} = -\tfrac1K \sum_k \log p(x_o \mid z_k, \theta_s), \qquad
              \operatorname{mean}_s c_{so}, \quad \operatorname{sd}_s c_{so}

    The means add up to minus the draws' mean log-likelihood. The standard deviation has divisor S, as all moments of
    draws here have.

    Args:
        draws: Draws of the predictive at x, with outputs: ``predictive(x, keep_outputs=True)``.
        x: (B, \*data); what the outputs explain (``Batch.target`` where there is one).
        mask: As for `contributions`.

    Returns:
        `Contributions`, of the shape of x.

    Exact when: the draws are the whole posterior (an ensemble).
    Biased when: S is finite (the variance is low by a share 1 / S), or the code is stochastic: 1 / K of its spread
        counts as the weights'.
    Cost: one log-density a number and draw; memory of the outputs.

    Raises:
        UnsupportedError: If the draws came without outputs.
        ShapeError: If x or mask do not fit the outputs.
    """
    if draws.outputs is None:
        raise UnsupportedError("draws with their outputs", "outputs=None", "Use predictive(x, keep_outputs=True).")
    outputs = at_least_float32(draws.outputs)  # densities in half precision lose their digits
    shape = (outputs.shape[2], *draws.likelihood.data_shape(outputs.shape[3:]))
    # not distribution().log_prob: torch's laws stop probabilities short of 0 and 1, or lose the digits of large counts
    values = -draws.likelihood.log_density(outputs, fitted_rows(as_tensor(x), shape, outputs)).mean(0)
    mean, deviation = (part.reshape(tuple(x.shape)) for part in (values.mean(0), values.std(0, correction=0)))
    return Contributions(observed_only(mean, mask), observed_only(deviation, mask))


def observed_only(values: Tensor, mask: Tensor | np.ndarray | None) -> Tensor:
    r"""The parts (B, \*data) of a score with 0 where nothing was observed; as they are without a mask."""
    if mask is None:
        return values
    return torch.where(fitted_mask(as_tensor(mask), values.shape).to(values.device), values, 0.0)
