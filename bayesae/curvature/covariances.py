"""Covariances of weights, as the output variance reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from bayesae.curvature.layout import Layout
from bayesae.types import Params

__all__ = ["DenseCovariance", "DiagonalCovariance", "KroneckerCovariance", "LowRankCovariance", "RotatedBlock"]


@dataclass(frozen=True)
class DiagonalCovariance:
    r"""Independent weights.

    Args:
        variances: Variance of every parameter in its own shape; 0, or left out, where a weight is fixed.
    """

    variances: Params


@dataclass(frozen=True)
class RotatedBlock:
    r"""One layer whose weights are independent in a Kronecker basis.

    .. math:: \operatorname{Cov}[\operatorname{vec} [W, b]_g] =
              (U_g \otimes V_g) \operatorname{diag}(v_g) (U_g \otimes V_g)^\top

    Args:
        layout: Where the layer's weight and bias stand in the matrix.
        outputs: U, (g, C, C), orthogonal.
        inputs: V, (g, J, J), orthogonal.
        values: v, (g, C, J): of a covariance here, of a curvature elsewhere.
    """

    layout: Layout
    outputs: Tensor
    inputs: Tensor
    values: Tensor


@dataclass(frozen=True)
class KroneckerCovariance:
    """Blocks of layers, and independent weights for what is in none.

    Args:
        blocks: One a layer.
        rest: Variances of the other parameters, each in its own shape; fixed ones are left out.
    """

    blocks: Sequence[RotatedBlock]
    rest: Params = field(default_factory=dict)


@dataclass(frozen=True)
class DenseCovariance:
    """Any covariance of a few weights.

    Args:
        masks: The uncertain weights: boolean masks in the parameters' shapes, by name; they give the order.
        matrix: (s, s).
    """

    masks: Mapping[str, Tensor]
    matrix: Tensor


@dataclass(frozen=True)
class LowRankCovariance:
    r"""diag(d) + sign F^T F.

    Args:
        diagonal: d, every parameter in its own shape; fixed ones may be left out.
        factor: F, leaves (K, \*shape), 0 or left out where d is.
        sign: 1, or -1 for the inverse of a precision that is diagonal plus low rank.
    """

    diagonal: Params
    factor: Params
    sign: int = 1
