"""The protocol of a code posterior, its noise, and the one place where outputs meet the likelihood."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from bayesae.codes.laws import Law
from bayesae.draws import Draws
from bayesae.errors import ShapeError, UnsupportedError
from bayesae.random import row_normal
from bayesae.types import Batch, Likelihood, Params

__all__ = [
    "CodeModel",
    "CodePosterior",
    "HasLaw",
    "differentiating",
    "draws_of",
    "law_of",
    "modules_of",
    "noise",
    "score_outputs",
]


class CodeModel(Protocol):
    """What a code posterior needs of a model at S weight draws; `bayesae.models.Bound` is one."""

    likelihood: Likelihood

    @property
    def is_fitting(self) -> bool:
        """Whether noise is to be fresh, and regularisers are to act."""
        ...

    def encode(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        r"""(B, \*data), and (B, ...) for networks that take a context, to (S, B, Z)."""
        ...

    def encode_parameters(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        r"""(B, \*data), and the same context, to the parameters of q(z | x), (S, B, Z, g), the location first."""
        ...

    def decode(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        r"""(..., S, B, Z), and the same context, to (..., S, B, \*O)."""
        ...

    def log_prior(self, latents: Tensor) -> Tensor:
        """(..., Z) to (...)."""
        ...

    def decoder_module(self) -> tuple[nn.Module, Params]:
        r"""The decoder and its weights, by its own names, leaves (S, \*shape)."""
        ...


class CodePosterior(Protocol):
    """q(z | x, theta); pure."""

    def __call__(self, model: CodeModel, batch: Batch, *, n_latent_draws: int = 1) -> Draws:
        """Draw K codes for every row under every weight draw, outputs kept."""
        ...


@runtime_checkable
class HasLaw(Protocol):
    """A code posterior whose q(z | x, theta) is a Normal that can be had without drawing."""

    def law(self, model: CodeModel, batch: Batch) -> Law:
        """Law of every row under every weight draw, (S, B)."""
        ...


def law_of(codes: CodePosterior, model: CodeModel, batch: Batch) -> Law:
    """The Normal q(z | x, theta) of a code posterior that has one.

    Args:
        codes: The code posterior.
        model: At S weight draws.
        batch: The rows.

    Returns:
        The law, of batch shape (S, B).

    Raises:
        UnsupportedError: If it has none.
    """
    if not isinstance(codes, HasLaw):
        got = getattr(codes, "__name__", type(codes).__name__)
        raise UnsupportedError("a Normal code posterior", got, "Use codes.amortised, or codes.Amortised(family).")
    return codes.law(model, batch)


def noise(model: CodeModel, batch: Batch, n_latent_draws: int, size: int, like: Tensor) -> Tensor:
    """Standard normal noise of stochastic codes: keyed on the row and shared by weight draws, fresh while fitting.

    Call it once for all that a code posterior draws: a second call with the same size gives the same numbers.

    Args:
        model: Says whether something is being fitted.
        batch: Its ``index`` are the keys; positions are, without one.
        n_latent_draws: K.
        size: Numbers a code, Z for a plain one.
        like: Gives S as its first axis, B as its second, dtype and device.

    Returns:
        (K, S, B, size) while fitting, else (K, 1, B, size).
    """
    if model.is_fitting:
        return torch.randn(n_latent_draws, *like.shape[:2], size, dtype=like.dtype, device=like.device)
    index = torch.arange(len(batch.x)) if batch.index is None else batch.index
    return row_normal(index, (n_latent_draws, 1), size, like)


@contextmanager
def differentiating() -> Generator[None]:
    """Say of a decoder that writes to itself, as batch normalisation in training mode does, what is the matter.

    Yields:
        None.

    Raises:
        UnsupportedError: If ``torch.func`` met such a write inside.
        RuntimeError: Any other, as it came.
    """
    try:
        yield
    except RuntimeError as error:
        if "mutate a captured Tensor" not in str(error):
            raise
        fix = "Take norm='layer' or 'group' in place of batch normalisation, or put it in evaluation mode."
        raise UnsupportedError("a decoder that does not write to itself", "one that does", fix) from error


def modules_of(codes: object) -> nn.ModuleList:
    """The networks that a code posterior brings along, such as an autoregressive flow's.

    Args:
        codes: A code posterior: a function, a dataclass whose fields may be networks or code posteriors, or a module.

    Returns:
        The networks, in the order of the fields.
    """
    return nn.ModuleList(_modules(codes))


def _modules(value: object) -> Iterator[nn.Module]:
    if isinstance(value, nn.Module):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _modules(part)
    elif is_dataclass(value) and not isinstance(value, type):
        for one in fields(value):
            yield from _modules(getattr(value, one.name))


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
    target, mask = target_of(likelihood, outputs.shape[3:], batch)
    return likelihood.log_prob(outputs, target, mask)


def target_of(likelihood: Likelihood, output_shape: torch.Size, batch: Batch) -> tuple[Tensor, Tensor | None]:
    r"""What outputs (\*O) explain, (B, \*D), and which of it counts.

    Args:
        likelihood: The head.
        output_shape: Of one row's outputs.
        batch: As for `score_outputs`.

    Returns:
        Target and mask, in the likelihood's shape.

    Raises:
        ShapeError: If the numbers do not match.
    """
    target, shape = batch.explained, likelihood.data_shape(output_shape)
    if target[0].numel() != math.prod(shape):
        raise ShapeError(
            f"outputs for rows of shape {tuple(target.shape[1:])}",
            f"outputs of shape {tuple(output_shape)}, which explain {tuple(shape)}",
            "Give the decoder as many outputs as a row has numbers (times the likelihood's parameters a number).",
        )
    mask = None if batch.mask is None else batch.mask.reshape(-1, *shape)
    return target.reshape(-1, *shape), mask


def draws_of(
    model: CodeModel,
    batch: Batch,
    latents: Tensor,
    log_q: Tensor | None,
    kl: Tensor | None = None,
    *,
    is_path_gradient: bool = False,
) -> Draws:
    """Decode codes and score the outputs.

    Args:
        model: The model at S weight draws.
        batch: The rows.
        latents: Codes, (K, S, B, Z).
        log_q: Their log-density, (K, S, B), or None.
        kl: KL to the prior in parts, (S, B, G), where known.
        is_path_gradient: Whether ``log_q`` was taken at parameters without gradients.

    Returns:
        `Draws` with outputs.
    """
    outputs = model.decode(latents, batch.context)
    log_likelihood = score_outputs(model.likelihood, outputs, batch)
    log_prior = model.log_prior(latents)
    return Draws(
        latents, log_likelihood, log_prior, log_q, model.likelihood, kl, outputs, is_path_gradient, mask=batch.mask
    )
