"""Planar and radial flows: the encoder gives all of their parameters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from bayesae.data import check_counts

__all__ = ["Planar", "Radial"]


def _slope(raw: Tensor) -> Tensor:
    r"""Any number to a positive one, 0 to 1: :math:`s(a) = (1 + \log(1 + e^a)) / (1 + \log(1 + e^{-a}))`."""
    # it falls as 1 / (1 - a) and not as e^a: no raw number of moderate size makes a map singular
    return (1 + F.softplus(raw)) / (1 + F.softplus(-raw))


@dataclass(frozen=True)
class _Elementary:
    n_steps: int = 1

    def __post_init__(self) -> None:
        check_counts(n_steps=self.n_steps)

    @property
    def n_parameters(self) -> int:
        """Three for each step."""
        return 3 * self.n_steps

    def __call__(self, latents: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Move codes by every step in turn.

        Args:
            latents: (K, S, B, Z).
            parameters: (S, B, Z, 3 T); all zero are the identity.

        Returns:
            The new codes, and log-determinants (K, S, B, 1).
        """
        log_det = latents.new_zeros(())
        for step in parameters.unflatten(-1, (self.n_steps, 3)).unbind(-2):
            latents, added = self._step(latents, *step.unbind(-1))
            log_det = log_det + added
        return latents, log_det[..., None]

    def _step(self, z: Tensor, first: Tensor, second: Tensor, third: Tensor, /) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


@dataclass(frozen=True)
class Planar(_Elementary):
    r"""Planar steps, which stretch codes across hyperplanes.

    .. math:: f(z) = z + \hat u \tanh(w^\top z + b), \quad \log |\det| = \log(1 + (1 - \tanh^2) w^\top \hat u), \quad
              \hat u = \frac{u}{1 + \log(1 + e^{-w^\top u})}

    so that :math:`w^\top \hat u > -1` whatever the encoder gives: u and w (Z,), and b as the mean of Z numbers.

    Args:
        n_steps: T; each moves codes along one direction only, so that many are needed where there are many dimensions.

    Exact when: never a bijection less, and every planar bijection is one of them.
    Cost: 3 T numbers a code dimension from the encoder, Z operations a step and code.

    Raises:
        DataError: If ``n_steps`` is no whole number of at least 1.

    References:
        | Variational Inference with Normalizing Flows (Rezende, Mohamed, 2015, https://arxiv.org/abs/1505.05770)
        | Departure: u is scaled; adding a multiple of w to it divides by the square of w, and is no identity at u = 0.
    """

    def _step(self, z: Tensor, u: Tensor, w: Tensor, b: Tensor, /) -> tuple[Tensor, Tensor]:
        along = (w * u).sum(-1)
        height = torch.tanh((w * z).sum(-1) + b.mean(-1))
        u = u / (1 + F.softplus(-along))[..., None]
        # 1 + w u is the slope of ``along``: a sum of positive terms, where 1 + h' w u would cancel
        return z + u * height[..., None], torch.log(height**2 + (1 - height**2) * _slope(along))


@dataclass(frozen=True)
class Radial(_Elementary):
    r"""Radial steps, which draw codes to a centre or push them away.

    .. math:: f(z) = z + \rho g (z - c), \quad g = \frac{\alpha}{\alpha + \lVert z - c \rVert}, \quad
              \log |\det| = (Z - 1) \log(1 + \rho g) + \log(1 + \rho g^2)

    with c (Z,), and :math:`\alpha = s(a) > 0` and :math:`\rho = s(r) - 1 > -1` of the means a, r of Z numbers each,
    where :math:`s(a) = (1 + \log(1 + e^a)) / (1 + \log(1 + e^{-a}))`. The paper's :math:`\beta` is :math:`\rho \alpha`.

    Args:
        n_steps: T.

    Exact when: never a bijection less, and every radial bijection is one of them.
    Cost: 3 T numbers a code dimension from the encoder, Z operations a step and code.

    Raises:
        DataError: If ``n_steps`` is no whole number of at least 1.

    References:
        | Variational Inference with Normalizing Flows (Rezende, Mohamed, 2015, https://arxiv.org/abs/1505.05770)
    """

    def _step(self, z: Tensor, centre: Tensor, width: Tensor, strength: Tensor, /) -> tuple[Tensor, Tensor]:
        shift = z - centre
        # the smallest number, because a root has no slope at 0
        radius = ((shift**2).sum(-1) + torch.finfo(z.dtype).tiny).sqrt()
        alpha, slope = _slope(width.mean(-1)), _slope(strength.mean(-1))
        near, far = alpha / (alpha + radius), radius / (alpha + radius)
        across = far + near * slope  # 1 + rho g, without a difference
        along = far * (1 + near) + near**2 * slope
        log_det = (z.shape[-1] - 1) * across.log() + along.log()
        return z + ((slope - 1) * near)[..., None] * shift, log_det
