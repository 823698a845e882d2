r"""Normal laws of codes, (S, B) of them: draws from given noise, densities, KL to N(0, I).

Every law is a map from standard normal noise, :math:`z = m + R\varepsilon` with :math:`R R^\top = C`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor

__all__ = ["DiagonalLaw", "Law", "TriangularLaw", "without_gradient"]


class Law(Protocol):
    """A Normal over codes for every row under every weight draw."""

    @property
    def loc(self) -> Tensor:
        """Mean, (S, B, Z)."""
        ...

    def push(self, noise: Tensor) -> Tensor:
        """Standard normal noise (..., S or 1, B, Z) to codes (..., S, B, Z)."""
        ...

    def log_prob(self, latents: Tensor) -> Tensor:
        """Log-density of codes (..., S, B, Z) in nats, (..., S, B)."""
        ...

    def kl(self) -> Tensor:
        """KL to N(0, I) in parts that add up, (S, B, G): one for each independent group of code dimensions."""
        ...

    def covariance(self) -> Tensor:
        """(S, B, Z, Z)."""
        ...


AnyLaw = TypeVar("AnyLaw", bound="_Record")


@dataclass(frozen=True)
class _Record:
    loc: Tensor


def without_gradient(law: AnyLaw) -> AnyLaw:
    """The same law with its parameters cut from the graph: its density then passes gradients to codes alone."""
    held = {one.name: getattr(law, one.name) for one in fields(law)}
    return replace(law, **{name: value.detach() for name, value in held.items() if isinstance(value, Tensor)})


@dataclass(frozen=True)
class DiagonalLaw(_Record):
    r""":math:`\mathcal{N}(m, \operatorname{diag}(e^{2 l}))`.

    Args:
        loc: m, (S, B, Z).
        log_scale: l, log of the standard deviations, (S, B, Z).
    """

    log_scale: Tensor

    def push(self, noise: Tensor) -> Tensor:
        """Z = m + exp(l) * noise."""
        return self.loc + self.log_scale.exp() * noise

    def log_prob(self, latents: Tensor) -> Tensor:
        """Sum over code dimensions."""
        whitened = (latents - self.loc) * (-self.log_scale).exp()
        return -(0.5 * whitened**2 + self.log_scale + _HALF_LOG_2PI).sum(-1)

    def kl(self) -> Tensor:
        r""":math:`\tfrac12 (m_j^2 + e^{2 l_j} - 1) - l_j` for each code dimension, (S, B, Z)."""
        return 0.5 * (self.loc**2 + torch.expm1(2 * self.log_scale)) - self.log_scale

    def covariance(self) -> Tensor:
        """Diagonal matrices."""
        return torch.diag_embed((2 * self.log_scale).exp())


@dataclass(frozen=True)
class TriangularLaw(_Record):
    r""":math:`\mathcal{N}(m, L L^\top)`, by the factor of the covariance or of the precision.

    Args:
        loc: m, (S, B, Z).
        factor: Lower triangular with a positive diagonal, (S, B, Z, Z): L; or with ``is_precision`` the factor of
            :math:`\Lambda = F F^\top`, and draws are :math:`m + F^{-\top} \varepsilon`.
        is_precision: Which of the two.
    """

    factor: Tensor
    is_precision: bool = False

    def push(self, noise: Tensor) -> Tensor:
        """One triangular product, or solution, a code."""
        if not self.is_precision:
            return self.loc + (self.factor @ noise[..., None])[..., 0]
        return self.loc + torch.linalg.solve_triangular(self.factor.mT, noise[..., None], upper=True)[..., 0]

    def log_prob(self, latents: Tensor) -> Tensor:
        """By the same factor."""
        shift = (latents - self.loc)[..., None]
        if self.is_precision:
            whitened = (self.factor.mT @ shift)[..., 0]
        else:
            whitened = torch.linalg.solve_triangular(self.factor, shift, upper=False)[..., 0]
        return -(0.5 * whitened**2 + _HALF_LOG_2PI).sum(-1) - self._half_log_det()

    def kl(self) -> Tensor:
        """One part: the dimensions depend on one another, (S, B, 1)."""
        inverse = _inverse(self.factor) if self.is_precision else self.factor
        trace = (inverse**2).flatten(-2).sum(-1)
        value = 0.5 * ((self.loc**2).sum(-1) + trace - self.loc.shape[-1]) - self._half_log_det()
        return value[..., None]

    def covariance(self) -> Tensor:
        """Products of the factors."""
        factor = _inverse(self.factor).mT if self.is_precision else self.factor
        return factor @ factor.mT

    def _half_log_det(self) -> Tensor:
        """Half the log-determinant of the covariance, (S, B)."""
        value = self.factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return -value if self.is_precision else value


def _inverse(factor: Tensor) -> Tensor:
    eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    return torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=False)


_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
