"""The deterministic encoder."""

from __future__ import annotations

from bayesae.codes.base import CodeModel, draws_of
from bayesae.draws import Draws
from bayesae.errors import UnsupportedError
from bayesae.types import Batch

__all__ = ["encode"]


def encode(model: CodeModel, batch: Batch, *, n_latent_draws: int = 1) -> Draws:
    r"""The code is the encoder's output, :math:`q(z \mid x, \theta) = \delta(z - e(x; \theta))`.

    Args:
        model: The model at S weight draws.
        batch: Rows to encode.
        n_latent_draws: K = 1: a point has nothing to draw.

    Returns:
        `Draws` with K = 1 and ``log_q`` None.

    Exact when: the code is a function of x, as in a plain autoencoder.
    Cost: one forward pass per weight draw.

    Raises:
        UnsupportedError: If more than one draw is asked for.
    """
    if n_latent_draws != 1:
        raise UnsupportedError(
            "n_latent_draws=1 from a deterministic encoder", f"{n_latent_draws}", "Take more weight draws instead."
        )
    return draws_of(model, batch, model.encode(batch.x, batch.context)[None], log_q=None)
