"""The objective of a plain autoencoder."""

from __future__ import annotations

from torch import Tensor

from bayesae.draws import Draws, logmeanexp_over_latents

__all__ = ["reconstruction"]


def reconstruction(draws: Draws) -> Tensor:
    r"""Log-likelihood of each row at its own code: the objective of a plain autoencoder.

    .. math:: \ell(x, \theta) = \log p(x \mid z = e(x; \theta_e), \theta_d)

    Args:
        draws: Draws of a deterministic encoder, K = 1.

    Returns:
        (S, B), in nats.

    Exact when: always; with ``Gaussian`` noise its maximiser is the least-squares autoencoder.
    Biased when: read as log p(x): the code has seen x. A posterior over encoder weights under it is a
        generalised posterior.
    """
    return logmeanexp_over_latents(draws.log_likelihood)
