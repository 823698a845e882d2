"""`fit_model`: train an autoencoder in place."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from bayesae import objectives, random
from bayesae.codes import CodePosterior, encode
from bayesae.data import Data, batches, check_counts, count_rows
from bayesae.draws import Draws
from bayesae.errors import DataError, NonFiniteError, ParameterError, UnsupportedError
from bayesae.joint import IsotropicNormal
from bayesae.likelihoods import Gaussian
from bayesae.models import Autoencoder
from bayesae.types import Batch, WeightPrior

__all__ = ["History", "estimate_noise", "fit_model"]


@dataclass
class History:
    """One record an epoch.

    Args:
        train: Mean objective of the training rows, nats a row.
        validation: Of the validation rows, at the epoch's end; empty without validation data.
        best_epoch: The epoch whose weights were kept, from 0.
    """

    train: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    best_epoch: int = -1


def fit_model(
    model: Autoencoder,
    data: Data,
    *,
    epochs: int = 20,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    objective: Callable[[Draws], Tensor] = objectives.reconstruction,
    codes: CodePosterior = encode,
    weight_prior: WeightPrior | None = None,
    validation: Data | None = None,
    patience: int | None = None,
    n_data: int | None = None,
    seed: int | None = None,
    progress: bool | None = None,
) -> History:
    r"""Train ``model`` **in place** with Adam.

    This and `estimate_noise` are the only functions of the library that touch the caller's module.

    .. math:: \max_\theta\; \tfrac1N \Big(\sum_i \ell(x_i, \theta) + \log p(\theta)\Big)

    A ``Gaussian()`` likelihood with a learned scale is estimated along the way: after each epoch the noise
    variance is the mean squared residual, on the validation rows where there are any (rows that trained the
    network understate the noise of new ones), else on the training rows.

    Args:
        model: The autoencoder. It is left in evaluation mode.
        data: x alone, (N, \*data); see `bayesae.data.Data`.
        epochs: Passes over the data, at most.
        batch_size: Rows a step.
        learning_rate: Of Adam.
        objective: Reduction of draws to (S, B), larger is better.
        codes: How codes are drawn.
        weight_prior: p(theta); N(0, I) if None.
        validation: Held-out rows, for the noise and for stopping early.
        patience: Stop after this many epochs without a better validation objective and go back to the best
            weights; None runs all epochs. Needs ``validation``.
        n_data: N, where the data have no length; it weighs the prior.
        seed: Of the order of rows and any draw; None advances the caller's generator.
        progress: Show a progress bar; None shows it on a terminal only.

    Returns:
        The history.

    Raises:
        DataError: If there are no rows, or they lie outside the likelihood's range.
        NonFiniteError: If the data or the objective are not finite.
        UnsupportedError: If ``patience`` comes without ``validation``.
        ParameterError: If all parameters are frozen.

    Cost: per epoch one pass with gradients, and one without over the rows that fix the noise.
    """
    if patience is not None and validation is None:
        raise UnsupportedError("validation data for early stopping", "patience alone", "Give validation=.")
    check_counts(epochs=epochs, batch_size=batch_size)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise ParameterError("a parameter to train", "a model with all of them frozen", "Set requires_grad.")
    prior = IsotropicNormal() if weight_prior is None else weight_prior
    n_rows = count_rows(data, n_data)
    optimiser = torch.optim.Adam(trainable, lr=learning_rate)
    history, best = History(), None
    noise_data = data if validation is None else validation
    try:
        with random.scope(seed, model.reference.device):
            if _learns_noise(model):
                estimate_noise(model, noise_data, codes=codes)
            bar = tqdm(range(epochs), desc="fit_model", disable=None if progress is None else not progress)
            for epoch in bar:
                model.train()
                total, n_seen = 0.0, 0
                for batch in batches(data, model.reference, batch_size=batch_size, is_shuffled=True):
                    value = _step(model, batch, optimiser, objective, codes, prior, n_rows)
                    total, n_seen = total + value * len(batch.x), n_seen + len(batch.x)
                model.eval()
                if _learns_noise(model):
                    estimate_noise(model, noise_data, codes=codes)
                history.train.append(total / n_seen)
                bar.set_postfix(nats=f"{history.train[-1]:.2f}", refresh=False)
                if validation is not None:
                    history.validation.append(_mean_objective(model, validation, objective, codes))
                if patience is None:
                    history.best_epoch = epoch
                elif history.validation[-1] > max(history.validation[:-1], default=-math.inf):
                    history.best_epoch, best = epoch, copy.deepcopy(model.state_dict())
                elif epoch - history.best_epoch >= patience:
                    break
            if best is not None:
                model.load_state_dict(best)
    finally:
        model.eval()
    return history


def _step(
    model: Autoencoder,
    batch: Batch,
    optimiser: torch.optim.Optimizer,
    objective: Callable[[Draws], Tensor],
    codes: CodePosterior,
    prior: WeightPrior,
    n_data: int,
) -> float:
    """One step of the optimiser; the batch's mean objective before it."""
    model.likelihood.check(batch.explained)
    value = objective(codes(model.live(), batch)).mean()
    params = {name: leaf[None] for name, leaf in model.network.named_parameters()}
    loss = -value - prior.log_prob(params).squeeze(0) / n_data
    if not bool(torch.isfinite(loss)):
        raise NonFiniteError(
            "a finite objective", f"{float(value.detach())}", "Lower learning_rate, or scale the data to about [0, 1]."
        )
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    optimiser.step()
    return float(value.detach())


@torch.no_grad()
def estimate_noise(model: Autoencoder, data: Data, *, codes: CodePosterior = encode) -> float:
    """Set a learned Gaussian noise variance to the mean squared residual, **in place**, floor applied.

    For networks trained elsewhere; `fit_model` does it by itself.

    Args:
        model: An autoencoder with a ``Gaussian()`` likelihood.
        data: Rows, best ones that did not train the network.
        codes: How codes are drawn.

    Returns:
        The noise scale, units of x.

    Raises:
        UnsupportedError: If the likelihood has no noise to learn.
        DataError: If no entry is observed.
    """
    likelihood = model.likelihood
    if not isinstance(likelihood, Gaussian) or not likelihood.is_learned:
        raise UnsupportedError("Gaussian() with a learned scale", repr(likelihood), "Its scale is given.")
    if not likelihood.is_estimated:
        likelihood.set_noise_var(1.0)  # residuals do not depend on it, but the draws' densities ask for one
    squares, count = 0.0, 0
    with _evaluating(model):
        for batch in batches(data, model.reference, batch_size=1024, is_shuffled=False):
            outputs = codes(model.live(), batch).outputs
            assert outputs is not None
            shape = outputs.shape[3:]
            residual = outputs.double() - batch.explained.reshape(-1, *shape)
            observed = torch.ones_like(residual) if batch.mask is None else batch.mask.reshape(-1, *shape)
            squares += float((residual**2 * observed).sum())
            count += int(observed.expand_as(residual).sum())
    if count == 0:
        raise DataError("an observed entry to estimate the noise on", "none", "Every entry of every row is masked.")
    likelihood.set_noise_var(squares / count)
    return math.sqrt(likelihood.noise_var)


def _learns_noise(model: Autoencoder) -> bool:
    return isinstance(model.likelihood, Gaussian) and model.likelihood.is_learned


@torch.no_grad()
def _mean_objective(
    model: Autoencoder, data: Data, objective: Callable[[Draws], Tensor], codes: CodePosterior
) -> float:
    total, count = 0.0, 0
    for batch in batches(data, model.reference, batch_size=1024, is_shuffled=False):
        model.likelihood.check(batch.explained)
        total += float(objective(codes(model.live(), batch)).double().sum())
        count += len(batch.x)
    return total / count


@contextmanager
def _evaluating(model: Autoencoder) -> Generator[None, None, None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
