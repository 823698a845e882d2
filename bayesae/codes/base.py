"""The protocol of a code posterior, and the one place where outputs meet the likelihood."""

from __future__ import annotations

import math
from typing import Protocol

from torch import Tensor

from bayesae.draws import Draws
from bayesae.errors import ShapeError
from bayesae.types import Batch, Likelihood

__all__ = ["CodeModel", "CodePosterior", "draws_of", "score_outputs"]


class CodeModel(Protocol):
    """What a code posterior needs of a model at S weight draws; `bayesae.models.Bound` is one."""

    likelihood: Likelihood

    def encode(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        r"""(B, \*data), and (B, ...) for networks that take a context, to (S, B, Z)."""
        ...

    def decode(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        r"""(..., S, B, Z), and the same context, to (..., S, B, \*O)."""
        ...

    def log_prior(self, latents: Tensor) -> Tensor:
        """(..., Z) to (...)."""
        ...


class CodePosterior(Protocol):
    """q(z | x, theta); pure."""

    def __call__(self, model: CodeModel, batch: Batch, *, n_latent_draws: int = 1) -> Draws:
        """Draw K codes for every row under every weight draw, outputs kept."""
        ...


def score_outputs(likelihood: Likelihood, outputs: Tensor, batch: Batch) -> Tensor:
    r"""Log p(x_observed | outputs), (K, S, B).

    Args:
        likelihood: The head.
        outputs: (K, S, B, \*O).
        batch: Its ``target`` (or ``x``) has as many numbers a row as the outputs explain, in any shape.

    Returns:
        Log-likelihood in nats.

    Raises:
        ShapeError: If the numbers do not match.
    """
    target, shape = batch.explained, likelihood.data_shape(outputs.shape[3:])
    if target[0].numel() != math.prod(shape):
        raise ShapeError(
            f"outputs for rows of shape {tuple(target.shape[1:])}",
            f"outputs of shape {tuple(outputs.shape[3:])}, which explain {tuple(shape)}",
            "Give the decoder as many outputs as a row has numbers (times the likelihood's parameters a number).",
        )
    mask = None if batch.mask is None else batch.mask.reshape(-1, *shape)
    return likelihood.log_prob(outputs, target.reshape(-1, *shape), mask)


def draws_of(model: CodeModel, batch: Batch, latents: Tensor, log_q: Tensor | None, kl: Tensor | None = None) -> Draws:
    """Decode codes and score the outputs.

    Args:
        model: The model at S weight draws.
        batch: The rows.
        latents: Codes, (K, S, B, Z).
        log_q: Their log-density, (K, S, B), or None.
        kl: Closed-form KL to the prior, (S, B), where known.

    Returns:
        `Draws` with outputs.
    """
    outputs = model.decode(latents, batch.context)
    log_likelihood = score_outputs(model.likelihood, outputs, batch)
    return Draws(latents, log_likelihood, model.log_prior(latents), log_q, model.likelihood, kl, outputs)
