"""The evidence lower bound."""

from __future__ import annotations

from torch import Tensor

from bayesae.draws import Draws

__all__ = ["elbo"]


def elbo(draws: Draws) -> Tensor:
    r"""Evidence lower bound, by the closed-form KL where there is one.

    .. math:: \mathcal{L}(x) = \tfrac1K \sum_k \log p(x \mid z_k) - \operatorname{KL}(q(z \mid x) \| p(z))

    Args:
        draws: Draws of a stochastic code; any K.

    Returns:
        (S, B), in nats.

    Exact when: q is the true posterior, where it is log p(x).

    Raises:
        UnsupportedError: If the code is deterministic.
    """
    if draws.kl is None or draws.is_path_gradient:
        return draws.log_ratio.mean(0)
    return draws.log_likelihood.mean(0) - draws.kl.sum(-1)
