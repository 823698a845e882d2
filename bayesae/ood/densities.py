"""Scores of log p(x | theta) over weight draws: reductions of `Draws` to (B,); higher = stranger, always."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from bayesae.data import as_tensor
from bayesae.draws import Draws, logmeanexp_over_weights, mean_over_weights
from bayesae.errors import DataError, NonFiniteError, ShapeError, UnsupportedError
from bayesae.ood.codes import code_variance, volume
from bayesae.ood.information import information_gain

__all__ = [
    "all_scores",
    "disagreement",
    "largest_weight",
    "log_density_deviation",
    "negative_expected_log_density",
    "negative_log_predictive",
    "share_saturated",
    "typicality",
    "waic",
    "weight_entropy",
]


def negative_log_predictive(draws: Draws) -> Tensor:
    r"""Minus the log of the posterior's mean density, :math:`-\log \frac1S \sum_s p(x \mid \theta_s)`.

    Args:
        draws: Draws of the predictive at x.

    Returns:
        (B,), in nats.

    Exact when: the draws are the whole posterior (an ensemble, one particle).
    Biased when: S is finite: by Jensen's inequality it is too large in expectation, the more so the more the
        log-densities vary; with hundreds of outputs one draw dominates.

    References:
        | Bayesian Variational Autoencoders for Unsupervised Out-of-Distribution Detection
          (Daxberger, Hernandez-Lobato, 2019)
    """
    return -logmeanexp_over_weights(draws.log_density())


def waic(draws: Draws) -> Tensor:
    r"""Minus the Watanabe-Akaike information criterion of a row.

    .. math:: -\big(\operatorname{mean}_s \ell_s - \operatorname{var}_s \ell_s\big), \qquad
              \ell_s = \log p(x \mid \theta_s)

    The variance over draws has divisor S, so that one particle gives minus its log-likelihood.

    Args:
        draws: Draws of the predictive at x.

    Returns:
        (B,), in nats (the variance in nats squared, as published).

    Exact when: all draws are equal: it is minus their log-likelihood.

    References:
        | WAIC, but Why? Generative Ensembles for Robust Anomaly Detection (Choi, Jang, Alemi, 2018)
    """
    values = draws.log_density()
    return -mean_over_weights(values) + ((values - mean_over_weights(values)) ** 2).mean(0)


def negative_expected_log_density(draws: Draws) -> Tensor:
    r"""Minus the posterior's mean log-density, :math:`-\frac1S \sum_s \log p(x \mid \theta_s)`.

    Args:
        draws: Draws of the predictive at x.

    Returns:
        (B,), in nats; at least `negative_log_predictive` (Jensen).

    Exact when: the draws are the whole posterior; unbiased else, if log p(x | theta) is.
    """
    return -mean_over_weights(draws.log_density())


def disagreement(draws: Draws, *, temperature: float = 1.0) -> Tensor:
    r"""How much the row would narrow the weight posterior: log S minus the log effective sample size.

    .. math:: \log S - \log \frac{1}{\sum_s w_s^2}, \qquad
              w_s = \frac{p(x \mid \theta_s)^{1/T}}{\sum_t p(x \mid \theta_t)^{1/T}}

    Args:
        draws: Draws of the predictive at x, S > 1.
        temperature: T divides the log-densities. With hundreds of outputs they differ by tens of nats between draws
            and at T = 1 one draw decides: `share_saturated` says for how many rows. The number of outputs is a
            natural T: the mean log-density of a pixel.

    Returns:
        (B,), from 0 (draws agree) to log S (one draw explains the row).

    Raises:
        UnsupportedError: If there is one draw only.
        DataError: If the temperature is not positive.

    Exact when: always, as a function of the draws. S must be the same for all rows that are compared.

    References:
        | Bayesian Variational Autoencoders for Unsupervised Out-of-Distribution Detection
          (Daxberger, Hernandez-Lobato, 2019)
    """
    log_weights = _log_weights(draws, temperature)
    score = math.log(len(log_weights)) + (2 * log_weights).logsumexp(0)
    return score.to(draws.log_likelihood.dtype)


def weight_entropy(draws: Draws, *, temperature: float = 1.0) -> Tensor:
    r"""Log S minus the entropy of the normalised likelihoods: what the row tells about the weights.

    .. math:: \log S + \sum_s w_s \log w_s = \operatorname{KL}\Big(\sum_s w_s \delta_{\theta_s} \Big\|
              \tfrac1S \sum_s \delta_{\theta_s}\Big), \qquad w_s \text{ as in `disagreement`}

    The published score is the entropy, low for strange rows; this one is its distance from the largest entropy, and
    the information that the row, once seen, gains about the weights.

    Args:
        draws: Draws of the predictive at x, S > 1.
        temperature: As for `disagreement`.

    Returns:
        (B,), nats, from 0 to log S; at most `disagreement`, whose Renyi order is 2 where this one's is 1.

    Raises:
        UnsupportedError: If there is one draw only.
        DataError: If the temperature is not positive.

    Exact when: always, as a function of the draws.

    References:
        | Do Bayesian Variational Autoencoders Know What They Don't Know? (Glazunov, Zarras, 2022)
    """
    log_weights = _log_weights(draws, temperature)
    score = math.log(len(log_weights)) - torch.special.entr(log_weights.exp()).sum(0)
    return score.to(draws.log_likelihood.dtype)


def log_density_deviation(draws: Draws) -> Tensor:
    r"""Standard deviation of log p(x | theta_s) over weight draws.

    Args:
        draws: Draws of the predictive at x, S > 1.

    Returns:
        (B,), nats; divisor S, as all moments of draws here.

    Raises:
        UnsupportedError: If there is one draw only.

    Exact when: the draws are the whole posterior.
    Biased when: log p(x | theta) is estimated with few codes: their noise counts as the weights', but for what
        common random numbers take out (`Predictive` draws codes with the same noise for all weights).

    References:
        | Do Bayesian Variational Autoencoders Know What They Don't Know? (Glazunov, Zarras, 2022)
    """
    return _several(draws).std(0, correction=0)


def typicality(scores: Tensor | np.ndarray, familiar: Tensor | np.ndarray) -> Tensor:
    r"""How far a score is from the mean of familiar rows': strange is what is *too likely*, too.

    .. math:: \Big| s(x) - \frac1N \sum_{n=1}^N s(x_n') \Big|

    With s of minus the log-density the mean estimates the entropy: Nalisnick's test of single rows. Any score will do.
    Of batches `batch_typicality` has the distance of the means, and what it is worth.

    Args:
        scores: Scores of the rows, (B,).
        familiar: Scores of held-out familiar rows, (N,), not of test rows; of training rows it is low by what the
            network has learnt by heart.

    Returns:
        (B,), in the scores' unit, dtype (float64 of whole numbers) and device; it passes their gradient on.

    Exact when: always, as a function of the scores. As a distance between rows it asks for scores from the same weight
        draws: give the predictive one seed.
    Biased when: N is small: the standard error of the mean is that of N scores.

    Raises:
        DataError: If there are no familiar scores.
        NonFiniteError: If a score is not finite.
        ShapeError: If scores are no vectors.

    References:
        | Detecting Out-of-Distribution Inputs to Deep Generative Models Using Typicality (Nalisnick, Matsukawa, Teh,
          Lakshminarayanan, 2019)
    """
    scores, familiar = as_tensor(scores), as_tensor(familiar).detach()
    if scores.dim() != 1 or familiar.dim() != 1:
        got = f"{tuple(scores.shape)} and {tuple(familiar.shape)}"
        raise ShapeError("scores (B,) and (N,)", got, "One score a row.")
    if len(familiar) == 0:
        raise DataError("familiar scores", "none", "Score rows that were held out.")
    for values in (scores, familiar):
        if not bool(values.isfinite().all()):
            raise NonFiniteError("finite scores", f"{int((~values.isfinite()).sum())} that are not", "Find the rows.")
    # float64: a sum of thousands of scores of hundreds of nats
    distance = (scores.double() - familiar.double().mean().to(scores.device)).abs()
    return distance.to(scores.dtype) if scores.is_floating_point() else distance


def largest_weight(draws: Draws, *, temperature: float = 1.0) -> Tensor:
    r"""Likelihood of the row under the weight draw that explains it best, as a share of that under all draws.

    .. math:: \max_s w_s, \qquad w_s \text{ as in `disagreement`}

    Near 1 one draw explains the row alone, and the scores of weights cannot tell such rows apart: `share_saturated`.
    Log S plus its log is of Renyi order infinity what `disagreement` is of order 2, and at least as large.

    Args:
        draws: Draws of the predictive at x, S > 1.
        temperature: As for `disagreement`.

    Returns:
        (B,), from 1 / S (draws agree) to 1.

    Raises:
        UnsupportedError: If there is one draw only.
        DataError: If the temperature is not positive.

    Exact when: always, as a function of the draws.
    """
    return _log_weights(draws, temperature).amax(0).exp().to(draws.log_likelihood.dtype)


def share_saturated(draws: Draws, *, temperature: float = 1.0, level: float = 0.99) -> float:
    """Share of rows that one weight draw explains alone, so that weights' scores cannot tell them apart.

    Of many rows it comes with all other scores: ``(scores["largest_weight"] >= 0.99).double().mean()`` of
    ``scores = predictive.reduce(ood.all_scores, x)``.

    Args:
        draws: Draws of the predictive at x, S > 1.
        temperature: As for `disagreement`.
        level: `largest_weight` from which a draw is alone.

    Returns:
        In [0, 1]. Of saturated rows `disagreement` and `weight_entropy` are log S, whatever the rows are.

    Raises:
        UnsupportedError: If there is one draw only.
        DataError: If the temperature is not positive.

    Exact when: always, as a function of the draws.
    """
    return float((largest_weight(draws, temperature=temperature) >= level).double().mean())


def all_scores(
    draws: Draws, familiar: Tensor | np.ndarray | None = None, *, temperature: float = 1.0
) -> dict[str, Tensor]:
    """Every score of `Draws` at once, from one pass of the predictive.

    Of many rows ``predictive.reduce(ood.all_scores, x)`` keeps no more draws than it needs at a time. Rows with missing
    entries are scored on what was observed.

    Args:
        draws: Draws of the predictive at x; with outputs there is "information_gain" too.
        familiar: `negative_log_predictive` of held-out familiar rows, (N,), under as many draws: adds "typicality".
        temperature: Of `disagreement`, `weight_entropy` and `largest_weight`.

    Returns:
        Scores (B,) by the names of their functions, without those that need more draws than there are, or (the volume)
            codes that span all their dimensions.

    Exact when: as each of them.
    """
    found = {
        "negative_log_predictive": negative_log_predictive(draws),
        "negative_expected_log_density": negative_expected_log_density(draws),
        "waic": waic(draws),
    }
    if familiar is not None:
        found["typicality"] = typicality(found["negative_log_predictive"], familiar)
    if draws.log_likelihood.shape[1] > 1:
        found["log_density_deviation"] = log_density_deviation(draws)
        found["disagreement"] = disagreement(draws, temperature=temperature)
        found["weight_entropy"] = weight_entropy(draws, temperature=temperature)
        found["largest_weight"] = largest_weight(draws, temperature=temperature)
        if draws.outputs is not None:
            found["information_gain"] = information_gain(draws)
    if draws.latents[..., 0, 0].numel() > 1:
        found["code_variance"] = code_variance(draws)
        code_volume = volume(draws)
        if bool(code_volume.isfinite().all()):
            found["code_volume"] = code_volume
    return found


def _several(draws: Draws) -> Tensor:
    """Log-densities (S, B) of more than one weight draw."""
    values = draws.log_density()
    if len(values) < 2:
        raise UnsupportedError("at least two weight draws", "one", "One network cannot disagree with itself.")
    return values


def _log_weights(draws: Draws, temperature: float) -> Tensor:
    """Log of the normalised likelihoods (S, B)."""
    if not temperature > 0:
        raise DataError("a positive temperature", f"{temperature}", "1 is the published score.")
    # not exp first: densities of hundreds of outputs differ by hundreds of nats
    return torch.log_softmax(_several(draws).double() / temperature, 0)
