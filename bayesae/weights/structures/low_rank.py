"""The structure that keeps the strongest directions of the curvature and its diagonal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bayesae.curvature import Linearisation, ggn_diagonal, ggn_product
from bayesae.distributed import add_over_ranks
from bayesae.errors import DataError
from bayesae.families import LowRankNormal
from bayesae.families.base import Normal
from bayesae.functional import check_finite
from bayesae.subset import Subset
from bayesae.types import HessianFunction, Params
from bayesae.weights.structures.base import Precision, zeros

__all__ = ["LowRank", "LowRankCurvature"]

_OVERSAMPLING = 10
_SEED = 0  # of the first probes: the method is deterministic, whoever calls it


@dataclass(frozen=True)
class LowRank:
    r"""The strongest ``rank`` directions of the curvature, and what they leave of its diagonal.

    .. math:: G \approx V \operatorname{diag}(l) V^\top + \operatorname{diag}(d), \qquad
              d = \operatorname{diag}(G) - \operatorname{diag}(V \operatorname{diag}(l) V^\top) \ge 0

    so that the diagonal of the precision is exact. V and l come from a randomised Nystroem approximation,
    :math:`G \Omega (\Omega^\top G \Omega)^{-1} \Omega^\top G`, cut to ``rank``, with ten directions more while
    sketching. In the first pass :math:`\Omega` is an orthonormalised Gaussian; in each further pass it is the
    orthonormalised :math:`G \Omega` of the pass before (subspace iteration).

    Args:
        rank: Directions that are kept.
        n_passes: Passes over the data. One is good where the spectrum falls fast and the network is float64: the second
            also makes rounding harmless.

    Exact when: the rank of G is at most ``rank``.
    Cost: rank + 10 products with G a pass, and one exact diagonal in the last; memory 2 (rank + 10) P.

    Raises:
        DataError: If rank or n_passes is below 1.

    References:
        | Fixed-Rank Approximation of a Positive-Semidefinite Matrix from Streaming Data (Tropp et al., 2017): the
          shift
        | SLANG: Fast Structured Covariance Approximations (Mishkin et al., 2018): the diagonal of what is left
    """

    rank: int = 20
    n_passes: int = 2

    def __post_init__(self) -> None:
        if self.rank < 1 or self.n_passes < 1:
            raise DataError("rank and n_passes of at least 1", f"{self.rank} and {self.n_passes}", "Try 20 and 2.")

    def start(self, linearisation: Linearisation, subset: Subset) -> _Sketch:
        """Gaussian probes, from a generator of their own."""
        size = len(subset)
        generator = torch.Generator().manual_seed(_SEED)
        gaussian = torch.randn(min(self.rank + _OVERSAMPLING, size), size, generator=generator, dtype=torch.float64)
        like = zeros(linearisation, size)
        return _Sketch.of(gaussian.to(like.device), self.n_passes - 1)

    def add(
        self,
        sums: _Sketch,
        linearisation: Linearisation,
        subset: Subset,
        x: Tensor,
        hessian: HessianFunction,
        mask: Tensor | None,
    ) -> _Sketch:
        """Products of the probes with the curvature of the batch; its diagonal too in the last pass."""
        if not len(subset):
            return sums
        leaves = {name: torch.zeros_like(leaf) for name, leaf in linearisation.params.items()}
        vectors = subset.scatter(sums.probes.to(subset.ravel(leaves).dtype), leaves)
        product = subset.ravel(ggn_product(linearisation, x, hessian, vectors, mask=mask))
        sums = replace(
            sums,
            products=sums.products + product,
            rounding=torch.finfo(product.dtype).eps,
        )
        if sums.n_passes_left:
            return sums
        diagonal = ggn_diagonal(linearisation, x, hessian, mask=mask)
        return replace(sums, diagonal=sums.diagonal + subset.ravel(diagonal))

    def over_ranks(self, sums: _Sketch) -> _Sketch:
        """Products and diagonal, added."""
        products, diagonal = add_over_ranks([sums.products, sums.diagonal])
        return replace(sums, products=products, diagonal=diagonal)

    def next_pass(self, sums: _Sketch, subset: Subset) -> _Sketch:
        """The products, orthonormalised, as probes."""
        return _Sketch.of(sums.products, sums.n_passes_left - 1)

    def finish(self, sums: _Sketch, subset: Subset, share: float) -> LowRankCurvature:
        """The sketch cut to the rank, and the rest of the diagonal."""
        factor = math.sqrt(share) * sums.factor(self.rank)
        # never below 0 but by rounding, because the sketch is at most G
        diagonal = (sums.diagonal * share - (factor**2).sum(0)).clamp(min=0)
        return LowRankCurvature(diagonal, factor, subset)


@dataclass(frozen=True)
class _Sketch:
    """What is known of G: orthonormal rows (K, P), G times them, its diagonal (P,)."""

    probes: Tensor
    products: Tensor
    diagonal: Tensor
    n_passes_left: int
    rounding: float = 0.0

    @classmethod
    def of(cls, rows: Tensor, n_passes_left: int) -> _Sketch:
        probes = torch.linalg.qr(rows.mT).Q.mT.contiguous()
        return cls(probes, torch.zeros_like(probes), probes.new_zeros(probes.shape[1]), n_passes_left)

    def factor(self, rank: int) -> Tensor:
        """F (K, P), K <= rank, with F.T @ F the Nystroem approximation of G cut to its largest eigenvalues."""
        check_finite({"G": self.products}, "products with the curvature", "Did the training diverge?")
        norm = float(torch.linalg.vector_norm(self.products))
        if norm == 0:
            return self.products[:0]
        # G + shift I is sketched and the shift taken off the eigenvalues: else a G of lower rank than the sketch
        # gives a singular core (Tropp et al., section 3.3)
        shift = math.sqrt(self.probes.shape[1]) * self.rounding * norm
        while True:
            shifted = self.products + shift * self.probes
            core = shifted @ self.probes.mT
            root, info = torch.linalg.cholesky_ex(0.5 * (core + core.mT))
            if not int(info):
                break
            shift *= 10
        half = torch.linalg.solve_triangular(root, shifted, upper=False)
        _, singular, directions = torch.linalg.svd(half, full_matrices=False)
        values = (singular[:rank] ** 2 - shift).clamp(min=0)
        return values.sqrt()[:, None] * directions[:rank]


@dataclass(frozen=True)
class LowRankCurvature:
    """diag(d) + F.T @ F; everything by Woodbury with the (K, K) core I + F diag(1 / (d + lambda)) F.T."""

    diagonal: Tensor
    factor: Tensor
    subset: Subset

    def _core(self, precision: Precision) -> tuple[Tensor, Tensor, Tensor]:
        total = self.diagonal + precision
        scaled = self.factor / total
        eye = torch.eye(len(scaled), dtype=scaled.dtype, device=scaled.device)
        return total, scaled, torch.linalg.cholesky(eye + scaled @ self.factor.mT)

    def effective(self, precision: Precision) -> Tensor:
        """Of every weight, by Woodbury."""
        total, scaled, root = self._core(precision)
        solved = torch.linalg.solve_triangular(root, scaled, upper=False)
        # of 1 - lambda (G + Lambda)^-1 with the 1s taken out, which would cancel
        return self.diagonal / total + precision * (solved**2).sum(0)

    def log_det(self, precision: Precision) -> float:
        """Of the diagonal, and of the core."""
        total, _scaled, root = self._core(precision)
        return float(total.log().sum() + 2 * root.diagonal().log().sum())

    def posterior(self, mean: Params, precision: Precision, temperature: float, info: Mapping[str, float]) -> Normal:
        """The same factor beside a raised diagonal."""
        diagonal, factor = (self.diagonal + precision) / temperature, self.factor / math.sqrt(temperature)
        return LowRankNormal(mean, diagonal, factor, self.subset, is_linearised=True, info=info)
