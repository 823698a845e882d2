"""`estimate_noise`: the noise of a likelihood that learns it."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from bayesae import objectives
from bayesae.codes import CodePosterior, encode
from bayesae.data import Data, batches, check_counts
from bayesae.draws import Draws
from bayesae.errors import DataError, UnsupportedError
from bayesae.likelihoods.noise import NoisyLikelihood
from bayesae.models import Autoencoder
from bayesae.objectives.base import Objective, climbed

__all__ = ["estimate_noise", "learns_noise", "noise_pass"]

_MAX_PASSES = 100


def estimate_noise(
    model: Autoencoder,
    data: Data,
    *,
    objective: Objective = objectives.reconstruction,
    codes: CodePosterior = encode,
    n_latent_draws: int = 1,
    n_data: int | None = None,
) -> float | Tensor | None:
    """Set a learned noise to its maximum-likelihood value given the outputs, **in place**, floor applied.

    A Gaussian variance becomes the mean squared residual. For networks trained elsewhere; `fit_model` does it by
    itself, with one pass after every epoch.

    Args:
        model: An autoencoder whose likelihood learns noise, such as ``Gaussian()`` or ``StudentT()``.
        data: Rows, best ones that did not train the network; a stream only with ``n_data``.
        objective: What the noise is to maximise, as in `fit_model`.
        codes: How codes are drawn.
        n_latent_draws: K.
        n_data: Rows of a pass over a stream.

    Returns:
        The noise scale, units of x, as the likelihood's ``scale``; None for noise that is not a scale.

    Exact when: one pass gives the maximum (Gaussian noise); else passes go on until the next would not move it.
    Biased when: the rows trained the network: residuals understate the noise of new rows.
    Cost: one pass for Gaussian noise, about ten for others, 100 at most.

    Raises:
        UnsupportedError: If the likelihood has no noise to learn.
        DataError: If no entry is observed.
    """
    if not learns_noise(model):
        expected = "Gaussian() with a learned scale, or another likelihood that learns noise"
        raise UnsupportedError(expected, repr(model.likelihood), "Its scale is given.")
    check_counts(n_latent_draws=n_latent_draws)
    for _ in range(_MAX_PASSES):
        if not noise_pass(model, data, codes, n_data, objective=objective, n_latent_draws=n_latent_draws):
            break
    return getattr(model.likelihood, "scale", None)


def learns_noise(model: Autoencoder) -> bool:
    """Whether the likelihood has noise that is not given."""
    return isinstance(model.likelihood, NoisyLikelihood) and model.likelihood.is_learned


@torch.no_grad()
def noise_pass(
    model: Autoencoder,
    data: Data,
    codes: CodePosterior,
    n_data: int | None = None,
    *,
    objective: Objective = objectives.reconstruction,
    n_latent_draws: int = 1,
) -> bool:
    r"""Move the likelihood's noise by one pass over the data; whether another pass would move it.

    One step of expectation maximisation for any objective: draw k counts by :math:`r_k = \partial\ell / \partial \log
    p(x \mid z_k)`, which is 1 / K of an ELBO and the importance weight of an importance-weighted bound.

    Args:
        model: Its likelihood learns noise.
        data: Rows.
        codes: How codes are drawn.
        n_data: Rows of a pass over a stream.
        objective: What the noise is to maximise.
        n_latent_draws: K.

    Returns:
        Whether the noise has yet to settle.

    Raises:
        DataError: If no entry is observed.
    """
    likelihood = model.likelihood
    assert isinstance(likelihood, NoisyLikelihood)
    if not likelihood.is_estimated:
        likelihood.start_noise()  # the draws' densities ask for one
    statistics, has_observed = None, False
    with _evaluating(model):
        for batch in batches(data, model.reference, batch_size=1024, is_shuffled=False, n_data=n_data):
            outputs = _counted(codes(model.live(), batch, n_latent_draws=n_latent_draws), objective)
            shape = model.likelihood.data_shape(outputs.shape[3:])
            mask = None if batch.mask is None else batch.mask.reshape(-1, *shape)
            has_observed = has_observed or mask is None or bool(mask.any())
            of_batch = likelihood.noise_statistics(outputs, batch.explained.reshape(-1, *shape), mask)
            statistics = of_batch if statistics is None else statistics + of_batch
    if statistics is None or not has_observed:
        raise DataError("an observed entry to estimate the noise on", "none", "Every entry of every row is masked.")
    return likelihood.update_noise(statistics)


def _counted(draws: Draws, objective: Objective) -> Tensor:
    """Outputs (K, S, B, *O) that count alike: resampled by how much each draw counts for the objective."""
    assert draws.outputs is not None
    if len(draws.latents) == 1:
        return draws.outputs
    with torch.enable_grad():
        log_likelihood = draws.log_likelihood.detach().requires_grad_()
        value = climbed(objective, replace(draws, log_likelihood=log_likelihood))["decoder"]
        (share,) = torch.autograd.grad(value.sum(), log_likelihood)
    share = share.clamp_min(0)
    if bool((share.max(0).values - share.min(0).values <= 1e-6 * share.max(0).values).all()):
        return draws.outputs
    n, *shape = share.shape
    chosen = torch.multinomial(share.flatten(1).mT, n, replacement=True).mT.unflatten(1, shape)
    index = chosen.reshape(*chosen.shape, *[1] * (draws.outputs.dim() - 3)).expand_as(draws.outputs)
    return draws.outputs.gather(0, index)


@contextmanager
def _evaluating(model: Autoencoder) -> Generator[None, None, None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
