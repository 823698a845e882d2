"""What a metric says at a point: Christoffel symbols, volume element, curvature."""

from __future__ import annotations

import torch
from torch import Tensor

from bayesae.errors import DataError, NonFiniteError, ShapeError
from bayesae.geometry.derivatives import check_codes, with_columns
from bayesae.geometry.metrics import Metric, check_metric, check_symmetric

__all__ = [
    "christoffel",
    "gaussian_curvature",
    "log_volume_element",
    "sectional_curvature",
    "symbols_or_nan",
    "volume_element",
]

_PARALLEL = 1e-10  # squared sine between two directions below which they span no plane


def christoffel(metric: Metric, z: Tensor) -> Tensor:
    r"""Christoffel symbols of the second kind.

    .. math:: \Gamma^k_{ij} = \tfrac12 \sum_l G^{kl} (\partial_i G_{jl} + \partial_j G_{il} - \partial_l G_{ij})

    Args:
        metric: G, differentiable in torch.
        z: Codes (B, Z); gradients pass.

    Returns:
        (B, Z, Z, Z), axes k, i, j; one over units of the code.

    Exact when: the metric is differentiable.
    Biased when: the decoder has kinks (ReLU): its metric jumps, and no derivative sees it.
    Cost: 1 + Z evaluations of the metric a code.

    Raises:
        ShapeError: If codes are not (B, Z).
        NonFiniteError: If G is singular at a code, or not finite.
        DataError: If G is not symmetric.
        UnsupportedError: If ``metric`` is none, or torch cannot differentiate the metric.
    """
    check_metric(metric)
    check_codes("codes", z)
    found, is_bad = _symbols(metric, z)
    _raise_if(is_bad)
    return found


def symbols_or_nan(metric: Metric, z: Tensor) -> Tensor:
    """Christoffel symbols, NaN where the metric is singular, indefinite or not finite: an integrator steps back there.

    Args:
        metric: G, differentiable in torch.
        z: Codes (B, Z).

    Returns:
        (B, Z, Z, Z), detached.

    Raises:
        DataError: If it is not symmetric.
    """
    with torch.no_grad():
        found, is_bad = _symbols(metric, z)
    return torch.where(is_bad[:, None, None, None], torch.nan, found)


def _symbols(metric: Metric, z: Tensor) -> tuple[Tensor, Tensor]:
    """Christoffel symbols, and at which codes they are none."""
    matrices, slopes = with_columns(metric, z)  # slopes (l, B, i, j)
    lowered = torch.einsum("ibjl->blij", slopes) + torch.einsum("jbil->blij", slopes)
    lowered = (lowered - torch.einsum("lbij->blij", slopes)) / 2
    factor, is_bad = _factor(matrices)
    flat = torch.cholesky_solve(lowered.flatten(2), factor)
    return flat.unflatten(2, lowered.shape[2:]), is_bad | ~torch.isfinite(flat).flatten(1).all(1)


def log_volume_element(metric: Metric, z: Tensor) -> Tensor:
    r"""Logarithm of the volume element, :math:`\tfrac12 \log\det G(z)`.

    Args:
        metric: G.
        z: Codes (B, Z); gradients pass.

    Returns:
        (B,): how much volume of the outputs a unit of code volume makes, in logarithms.

    Exact when: always.
    Cost: the metric and a Cholesky factor a code.

    Raises:
        ShapeError: If codes are not (B, Z).
        NonFiniteError: If G is singular at a code, or not finite.
        DataError: If G is not symmetric.
        UnsupportedError: If ``metric`` is none.
    """
    check_metric(metric)
    check_codes("codes", z)
    factor, is_bad = _factor(metric(z))
    _raise_if(is_bad)
    return factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def volume_element(metric: Metric, z: Tensor) -> Tensor:
    r"""Volume element :math:`\sqrt{\det G(z)}`, the exponential of `log_volume_element`.

    Args:
        metric: G.
        z: Codes (B, Z); gradients pass.

    Returns:
        (B,), units of the outputs to the power Z over units of the code to the power Z.

    Exact when: always.
    Biased when: Z is large: it leaves the range of the numbers; its logarithm does not.
    Cost: as `log_volume_element`.

    Raises:
        ShapeError: If codes are not (B, Z).
        NonFiniteError: If G is singular at a code, or not finite.
        DataError: If G is not symmetric.
        UnsupportedError: If ``metric`` is none.
    """
    return log_volume_element(metric, z).exp()


def sectional_curvature(metric: Metric, z: Tensor, first: Tensor, second: Tensor) -> Tensor:
    r"""Curvature of the geodesic surface through a code along two directions, in any number of code dimensions.

    .. math:: K(u, v) = \frac{\partial_u \partial_v G(u, v) - \tfrac12 \partial_u^2 G(v, v)
              - \tfrac12 \partial_v^2 G(u, u) + \langle \Gamma(u, v), \Gamma(u, v) \rangle
              - \langle \Gamma(u, u), \Gamma(v, v) \rangle}{G(u, u)\, G(v, v) - G(u, v)^2}

    with the directions held as the code moves, and inner products by G.

    Args:
        metric: G, twice differentiable in torch.
        z: Codes (B, Z), Z of 2 or more; gradients pass.
        first: u, (B, Z); only the plane of u and v matters.
        second: v, (B, Z).

    Returns:
        (B,), one over squared units of the outputs: 1 on the unit sphere, 0 where geodesics are as in a plane, below 0
        where they part.

    Exact when: the metric is twice differentiable.
    Biased when: the decoder has kinks (ReLU), whose curvature sits on lines that no derivative sees.
    Cost: (1 + Z)^2 evaluations of the metric a code.

    Raises:
        ShapeError: If codes and directions are not (B, Z) alike.
        DataError: If two directions are parallel, as all are for Z = 1, or G is not symmetric.
        NonFiniteError: If G is singular at a code, or not finite.
        UnsupportedError: If ``metric`` is none, or torch cannot differentiate the metric twice.
    """
    check_metric(metric)
    check_codes("codes", z)
    if first.shape != z.shape or second.shape != z.shape:
        got = f"{tuple(first.shape)} and {tuple(second.shape)}"
        raise ShapeError(f"directions {tuple(z.shape)}", got, "Give two for every code.")

    def with_slopes(codes: Tensor) -> Tensor:
        values, slopes = with_columns(metric, codes)
        return torch.cat([values[None], slopes]).transpose(0, 1)  # (B, 1 + Z, Z, Z): value, then derivatives

    near, far = with_columns(with_slopes, z)
    matrices, slopes, bending = near[:, 0], near[:, 1:], far[:, :, 1:]
    factor, is_bad = _factor(matrices)
    _raise_if(is_bad)

    def along(a: Tensor, b: Tensor) -> Tensor:
        """The symbols of the first kind on two directions, (B, Z)."""
        turned = torch.einsum("bi,bijl,bj->bl", a, slopes, b) + torch.einsum("bi,bijl,bj->bl", b, slopes, a)
        return (turned - torch.einsum("bi,blij,bj->bl", a, slopes, b)) / 2

    def raised(a: Tensor, b: Tensor) -> Tensor:
        return (a * torch.cholesky_solve(b[..., None], factor)[..., 0]).sum(-1)

    def bent(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        return torch.einsum("mbnij,bm,bn,bi,bj->b", bending, a, b, c, d)

    def product(a: Tensor, b: Tensor) -> Tensor:
        return torch.einsum("bi,bij,bj->b", a, matrices, b)

    u, v = first, second
    squares = product(u, u) * product(v, v)
    area = squares - product(u, v) ** 2
    if bool((area <= _PARALLEL * squares).any()):
        got = f"parallel ones at {int((area <= _PARALLEL * squares).sum())} of {len(z)} codes"
        raise DataError("two directions that span a plane", got, "In one dimension there is no curvature.")
    mixed = along(u, v)
    total = bent(u, v, u, v) - (bent(u, u, v, v) + bent(v, v, u, u)) / 2
    return (total + raised(mixed, mixed) - raised(along(u, u), along(v, v))) / area


def gaussian_curvature(metric: Metric, z: Tensor) -> Tensor:
    r"""Gaussian curvature of a code space of two dimensions: `sectional_curvature` of its only plane.

    Args:
        metric: G, twice differentiable in torch.
        z: Codes (B, 2); gradients pass.

    Returns:
        (B,), one over squared units of the outputs: 1 on the unit sphere, 0 where geodesics are as in a plane.

    Exact when: the metric is twice differentiable.
    Biased when: the decoder has kinks (ReLU), whose curvature sits on lines that no derivative sees.
    Cost: nine evaluations of the metric a code.

    Raises:
        ShapeError: If codes are not (B, 2).
        NonFiniteError: If G is singular at a code, or not finite.
        DataError: If G is not symmetric.
        UnsupportedError: If ``metric`` is none, or torch cannot differentiate the metric twice.
    """
    if z.dim() != 2 or z.shape[1] != 2:
        fix = "In more dimensions curvature belongs to planes: use sectional_curvature."
        raise ShapeError("codes (B, 2)", f"{tuple(z.shape)}", fix)
    across, up = (unit.expand_as(z) for unit in torch.eye(2).to(z))
    return sectional_curvature(metric, z, across, up)


def _factor(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky factors, lower, and which of the matrices have none; raises if one is not symmetric."""
    check_symmetric(matrices, "at codes")
    factor, info = torch.linalg.cholesky_ex(matrices)
    return factor, (info > 0) | ~torch.isfinite(factor).flatten(1).all(1)


def _raise_if(is_bad: Tensor) -> None:
    if is_bad.any():
        got = f"{int(is_bad.sum())} of {len(is_bad)} that are singular, indefinite or not finite"
        fix = "Does the decoder change along every code dimension there, and are its outputs finite?"
        raise NonFiniteError("positive definite metrics", got, fix)
