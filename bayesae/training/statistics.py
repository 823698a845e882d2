"""`recompute_statistics`: draws of weights with running statistics of their own."""

from __future__ import annotations

import copy
import warnings

import torch
from torch import nn

from bayesae import random
from bayesae.codes import CodePosterior, encode
from bayesae.data import Data, batches, check_counts, count_rows
from bayesae.errors import UnsupportedError
from bayesae.families import Mixture, Particles
from bayesae.functional import select_draws, stack_draws
from bayesae.models import Autoencoder
from bayesae.types import Params, WeightPosterior

__all__ = ["recompute_statistics"]


@torch.no_grad()
def recompute_statistics(
    posterior: WeightPosterior,
    model: Autoencoder,
    data: Data,
    n_draws: int | None = None,
    *,
    batch_size: int = 128,
    codes: CodePosterior = encode,
    n_data: int | None = None,
    seed: int | None = None,
) -> Particles:
    r"""Draws of a weight posterior, each with the running means and variances that its own activations have.

    A network with batch normalisation belongs to the statistics of its weights. Those that training left are the
    trained network's; under other weights activations lie elsewhere, and outputs are wrong in scale. Every draw
    is run over the data once with its normalisation layers in training mode,

    .. math:: m \leftarrow m + \frac{b}{n + b} (m_{batch} - m), \qquad n \leftarrow n + b,

    b the rows of a batch and n those before, and the variances likewise.

    Args:
        posterior: q(theta), from `weights.SWAG` say.
        model: The model that it is over; it is only read.
        data: x alone, (N, \*data): the training rows.
        n_draws: S; None takes all particles once, or 32 draws of a continuous posterior.
        batch_size: Rows a batch; as in training, because a layer normalises by its batch's statistics.
        codes: How codes are drawn.
        n_data: N, where the data have no length.
        seed: Of draws and of the order of rows; None advances the caller's generator.

    Returns:
        Particles whose atoms hold the statistics beside the parameters, for `Predictive` and files; not noise that the
        posterior learned, which it warns of.

    Exact when: there is one batch of all rows; with several, the statistics are their average, as in training.
    Cost: S passes over the data, memory of S networks.

    Raises:
        UnsupportedError: If no layer of the model has running statistics.

    References:
        | A Simple Baseline for Bayesian Uncertainty in Deep Learning (Maddox et al., 2019)
    """
    n_draws = (posterior.n_atoms or 32) if n_draws is None else n_draws
    check_counts(n_draws=n_draws, batch_size=batch_size)
    network = copy.deepcopy(model).eval()
    layers = {
        name: layer
        for name, layer in network.network.named_modules()
        if isinstance(layer, nn.modules.batchnorm._NormBase) and layer.running_mean is not None
    }
    if not layers:
        fix = "Use the posterior as it is."
        raise UnsupportedError("a model with running statistics, such as nn.BatchNorm1d", "none", fix)
    n_data = count_rows(data, n_data)
    network.training = True  # of the model itself: codes then draw fresh noise
    for layer in layers.values():
        layer.train()
    with random.scope(seed, model.reference.device):
        draws = posterior.sample(n_draws)
        whole = [_with_statistics(network, layers, draws, s, data, batch_size, codes, n_data) for s in range(n_draws)]
    is_mixed = isinstance(posterior, Mixture) and posterior.has_own_noise
    if is_mixed or getattr(posterior, "noise", None) is not None:
        text = "Particles do not hold noise that a posterior learned: predict with model.with_noise(posterior.noise)"
        warnings.warn(f"{text}, of a mixture with that of a component.", stacklevel=3)
    info = getattr(posterior, "info", {})
    return Particles(stack_draws(whole), info=dict(info))


def _with_statistics(
    network: Autoencoder,
    layers: dict[str, nn.modules.batchnorm._NormBase],
    draws: Params,
    place: int,
    data: Data,
    batch_size: int,
    codes: CodePosterior,
    n_data: int,
) -> Params:
    """One draw with its statistics, every tensor in its own shape."""
    own = {name: leaf[0] for name, leaf in select_draws(draws, slice(place, place + 1)).items()}
    tree = network.network
    for name, parameter in tree.named_parameters():
        parameter.copy_(own[name])
    n_seen = 0
    for batch in batches(data, network.reference, batch_size=batch_size, is_shuffled=True, n_data=n_data):
        for layer in layers.values():
            layer.momentum = len(batch.x) / (n_seen + len(batch.x))
        codes(network.live(), batch, n_latent_draws=1)
        n_seen += len(batch.x)
    names = {f"{name}.{kind}" for name in layers for kind in ("running_mean", "running_var")}
    statistics = {name: value.clone() for name, value in tree.named_buffers() if name in names}
    return {name: own[name] for name, _ in tree.named_parameters()} | statistics
