r"""Encoder gradients of low variance, from draws whose density passes gradients to the codes alone.

Both give the encoder :math:`\sum_k c_k\, (\partial \log w_k / \partial z_k)(\partial z_k / \partial \phi)` with
coefficients that are held fixed, a function of the normalised weights :math:`\tilde w_k = w_k / \sum_j w_j`. What they
return for "encoder" is a surrogate with that gradient: its value says nothing. Training reports the decoder's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bayesae.draws import Draws
from bayesae.errors import ShapeError, UnsupportedError
from bayesae.objectives.base import Grouped
from bayesae.objectives.importance import CIWAE, iwae

__all__ = ["DReG", "dreg", "reweighted_wake_sleep"]


@dataclass(frozen=True)
class DReG:
    r"""The doubly reparameterised gradient of the importance-weighted bound, or of its combination with the ELBO.

    The decoder climbs `CIWAE`, which is `iwae` for beta = 0; the encoder has coefficients

    .. math:: c_k = \beta / K + (1 - \beta)\, \tilde w_k^2

    Args:
        beta: As for `CIWAE`, in [0, 1]; 1 is sticking the landing.

    Exact when: always, in expectation: the encoder's gradient has the mean of the bound's own. It is 0 in every draw
        where q is the true posterior. Signal to noise grows as :math:`\sqrt K` (`evaluation.gradient_snr`).

    Raises:
        DataError: If beta lies outside [0, 1].
        UnsupportedError: When called, if the draws are not those of ``codes.Amortised(gradient="path")`` or its like.

    References:
        | Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives (Tucker et al., 2019,
          https://arxiv.org/abs/1810.04152)
    """

    beta: float = 0.0

    def __post_init__(self) -> None:
        CIWAE(self.beta)  # the one check of beta

    def __call__(self, draws: Draws) -> Grouped:
        """The decoder's bound and the encoder's surrogate, (S, B) each."""
        share = _normalised_weights(draws)
        coefficient = self.beta / len(share) + (1 - self.beta) * share**2
        return {"decoder": CIWAE(self.beta)(draws), "encoder": (coefficient * draws.log_ratio).sum(0)}


dreg = DReG()
"""`DReG` of the plain importance-weighted bound."""


def reweighted_wake_sleep(draws: Draws) -> Grouped:
    r"""The decoder climbs `iwae`; the encoder descends the forward KL(p(z | x) || q(z | x)), the *wake* phase.

    .. math:: \nabla_\phi = \mathbb{E} \sum_k \tilde w_k \nabla_\phi \log q(z \mid x) \big|_{z = z_k}
              = \mathbb{E} \sum_k c_k \frac{\partial \log w_k}{\partial z_k} \frac{\partial z_k}{\partial \phi}, \qquad
              c_k = \tilde w_k - \tilde w_k^2

    The second form, doubly reparameterised, is the one in use. It follows from the first: both differ from the
    gradient of `iwae` by terms that are known.

    Args:
        draws: Draws of ``codes.Amortised(gradient="path")`` or its like, K > 1.

    Returns:
        The decoder's bound and the encoder's surrogate, (S, B) each.

    Exact when: K goes to infinity.
    Biased when: K is finite: by O(1 / K) towards no gradient, for the weights are normalised by themselves.

    Raises:
        UnsupportedError: If the draws' density passes gradients to the parameters of q.
        ShapeError: If K is 1: the encoder would never move.

    References:
        | Reweighted Wake-Sleep (Bornschein, Bengio, 2015, https://arxiv.org/abs/1406.2751)
        | Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives (Tucker et al., 2019,
          https://arxiv.org/abs/1810.04152)
    """
    share = _normalised_weights(draws)
    if len(share) == 1:
        raise ShapeError("at least two code draws", "K = 1, which gives the encoder no gradient", "Try 16.")
    return {"decoder": iwae(draws), "encoder": ((share - share**2) * draws.log_ratio).sum(0)}


def _normalised_weights(draws: Draws) -> Tensor:
    """Shares of the draws that sum to 1 over them, held fixed, (K, S, B)."""
    log_ratio = draws.log_ratio
    if not draws.is_path_gradient:
        got = "draws whose log q passes gradients to the parameters of q"
        raise UnsupportedError("draws with path gradients", got, 'Give codes=codes.Amortised(gradient="path").')
    return torch.softmax(log_ratio.detach(), 0)
