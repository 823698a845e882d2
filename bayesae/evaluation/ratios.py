"""Log p(x, z) - log q(z) at codes made of given noise, for a Normal q: what is averaged, climbed or annealed."""

from __future__ import annotations

from torch import Tensor

from bayesae.codes import Law
from bayesae.codes.base import CodeModel, score_outputs
from bayesae.types import Batch

__all__ = ["log_ratio"]


def log_ratio(model: CodeModel, batch: Batch, law: Law, noise: Tensor, *, density: Law | None = None) -> Tensor:
    """The log weight of the codes that a law makes of noise.

    Args:
        model: The model at S weight draws.
        batch: The rows.
        law: q, of batch shape (S, B).
        noise: (K, S, B, Z), or (K, 1, B, Z) shared by weight draws.
        density: What log q is taken of; ``law`` itself if None.

    Returns:
        (K, S, B), nats.
    """
    latents = law.push(noise)
    log_likelihood = score_outputs(model.likelihood, model.decode(latents, batch.context), batch)
    return log_likelihood + model.log_prior(latents) - (law if density is None else density).log_prob(latents)
