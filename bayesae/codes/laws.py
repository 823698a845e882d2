r"""Normal laws of codes, (S, B) of them: draws from given noise, densities, KL to N(0, I).

Every law is a map from standard normal noise, :math:`z = m + R\varepsilon` with :math:`R R^\top = C`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["DiagonalLaw", "Law", "RankOneLaw", "TriangularLaw", "without_gradient"]


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


@dataclass(frozen=True)
class RankOneLaw(_Record):
    r"""A diagonal precision plus one direction, in every block of code dimensions.

    .. math:: \mathcal{N}(m, C), \quad C^{-1} = D + u u^\top, \quad D = \operatorname{diag}(e^{l})

    With :math:`v = D^{-1/2} u`, :math:`s = v^\top v` and :math:`w = v / \sqrt{1 + s}`, which is shorter than 1,

    .. math:: C = D^{-1/2} (I - w w^\top) D^{-1/2}, \quad
              R = D^{-1/2} \Big(I - \frac{w w^\top}{1 + (1 + s)^{-1/2}}\Big), \quad
              \log |C| = -\log(1 + s) - \sum_j l_j

    Args:
        loc: m, (S, B, Z).
        log_precision: l, (S, B, Z).
        direction: u, (S, B, Z).
        sizes: Code dimensions of each of G blocks, which are independent; None takes all as one.

    Exact when: the precision is diagonal plus a matrix of rank one in each block, as that of two dimensions can be.
    Cost: Z operations a code, but for `covariance`.

    References:
        | Stochastic Backpropagation and Approximate Inference in Deep Generative Models (Rezende, Mohamed, Wierstra,
          2014, https://arxiv.org/abs/1401.4082)
        | Departure: their (1 - sqrt(eta)) / s, eta = 1 / (1 + s), which is 0 / 0 for u = 0, is eta / (1 + sqrt(eta)).
    """

    log_precision: Tensor
    direction: Tensor
    sizes: tuple[int, ...] | None = None

    def push(self, noise: Tensor) -> Tensor:
        """Each block's noise, less a share of what lies along its direction, on the scale of D."""
        root = self._root()
        share = self._share(root)
        along = self._sums(share * noise) / (1 + 1 / root)
        return self.loc + self._scale() * (noise - share * self._spread(along))

    def log_prob(self, latents: Tensor) -> Tensor:
        """By the precision: nothing is inverted."""
        shift = latents - self.loc
        squares = (shift / self._scale()) ** 2 - self.log_precision + 2 * _HALF_LOG_2PI
        along = self._sums(self.direction * shift)
        return -0.5 * squares.sum(-1) + (self._root().log() - 0.5 * along**2).sum(-1)

    def kl(self) -> Tensor:
        r""":math:`\tfrac12 (m^\top m + \operatorname{tr} C - n - \log |C|)` of each block, of size n, (S, B, G)."""
        root = self._root()
        variances = self._scale() ** 2 * self._kept(root)
        return 0.5 * self._sums(self.loc**2 + variances - 1 + self.log_precision) + root.log()

    def covariance(self) -> Tensor:
        """Products of the columns of R."""
        eye = torch.eye(self.loc.shape[-1], dtype=self.loc.dtype, device=self.loc.device)
        columns = self.push(eye[:, None, None]) - self.loc
        return torch.einsum("k...i,k...j->...ij", columns, columns)

    def _scale(self) -> Tensor:
        return (-0.5 * self.log_precision).exp()

    def _root(self) -> Tensor:
        """Square root of 1 + s of each block, (S, B, G); by the largest number, so that no square overflows."""
        v = self.direction * self._scale()
        top = torch.stack([part.abs().amax(-1) for part in self._blocks(v)], -1).clamp(min=1).detach()
        return top * (top**-2 + self._sums((v / self._spread(top)) ** 2)).sqrt()

    def _share(self, root: Tensor) -> Tensor:
        """Direction w, (S, B, Z)."""
        return self.direction * self._scale() / self._spread(root)

    def _kept(self, root: Tensor) -> Tensor:
        """1 - w_j^2 as 1 / (1 + s) and the other squares of the block: a difference would lose them near 0."""
        parts = []
        for squares, own in zip(self._blocks(self._share(root) ** 2), root.split(1, -1), strict=True):
            before = F.pad(squares.cumsum(-1), (1, -1))
            after = F.pad(squares.flip(-1).cumsum(-1), (1, -1)).flip(-1)
            parts.append(own**-2 + before + after)
        return torch.cat(parts, -1)

    def _blocks(self, values: Tensor) -> tuple[Tensor, ...]:
        return values.split([values.shape[-1]] if self.sizes is None else list(self.sizes), -1)

    def _sums(self, values: Tensor) -> Tensor:
        """Over each block, (..., Z) to (..., G)."""
        return torch.stack([part.sum(-1) for part in self._blocks(values)], -1)

    def _spread(self, values: Tensor) -> Tensor:
        """One for each block, (..., G), to one for each of its dimensions, (..., Z)."""
        sizes = [part.shape[-1] for part in self._blocks(self.loc)]
        parts = zip(values.split(1, -1), sizes, strict=True)
        return torch.cat([value.expand(*value.shape[:-1], size) for value, size in parts], -1)


def _inverse(factor: Tensor) -> Tensor:
    eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    return torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=False)


_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
