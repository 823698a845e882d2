"""What a metric says at a point: Christoffel symbols, volume element, curvature."""

from __future__ import annotations

import torch
from torch import Tensor

from bayesae.errors import NonFiniteError, ShapeError
from bayesae.geometry.derivatives import with_columns
from bayesae.geometry.metrics import Metric

__all__ = ["christoffel", "gaussian_curvature", "log_volume_element", "volume_element"]


def christoffel(metric: Metric, z: Tensor) -> Tensor:
    r"""Christoffel symbols of the second kind.

    .. math:: \Gamma^k_{ij} = \tfrac12 \sum_l G^{kl} (\partial_i G_{jl} + \partial_j G_{il} - \partial_l G_{ij})

    Args:
        metric: G.
        z: Codes (B, Z).

    Returns:
        (B, Z, Z, Z), axes k, i, j.

    Exact when: always.
    Cost: 1 + Z evaluations of the metric a code.

    Raises:
        NonFiniteError: If G is singular at a code, or not finite.
    """
    matrices, slopes = with_columns(metric, z)  # slopes (l, B, i, j)
    lowered = torch.einsum("ibjl->blij", slopes) + torch.einsum("jbil->blij", slopes)
    lowered = (lowered - torch.einsum("lbij->blij", slopes)) / 2
    factor = _factor(matrices)
    flat = torch.cholesky_solve(lowered.flatten(2), factor)
    return flat.unflatten(2, lowered.shape[2:])


def log_volume_element(metric: Metric, z: Tensor) -> Tensor:
    r"""Logarithm of the volume element, :math:`\tfrac12 \log\det G(z)`.

    Args:
        metric: G.
        z: Codes (B, Z).

    Returns:
        (B,): how much volume of the outputs a unit of code volume makes, in logarithms.

    Exact when: always.
    Cost: the metric and a Cholesky factor a code.

    Raises:
        NonFiniteError: If G is singular at a code, or not finite.
    """
    return _factor(metric(z)).diagonal(dim1=-2, dim2=-1).log().sum(-1)


def volume_element(metric: Metric, z: Tensor) -> Tensor:
    r"""Volume element :math:`\sqrt{\det G(z)}`, the exponential of `log_volume_element`.

    Args:
        metric: G.
        z: Codes (B, Z).

    Returns:
        (B,), units of the outputs to the power Z over units of the code to the power Z.

    Exact when: always.
    Cost: as `log_volume_element`.

    Raises:
        NonFiniteError: If G is singular at a code, or not finite.
    """
    return log_volume_element(metric, z).exp()


def gaussian_curvature(metric: Metric, z: Tensor) -> Tensor:
    r"""Gaussian (sectional) curvature of a code space of two dimensions, by Brioschi's formula.

    .. math:: K = \frac{1}{(E G - F^2)^2} \left(
              \begin{vmatrix} F_{uv} - \frac12 E_{vv} - \frac12 G_{uu} & \frac12 E_u & F_u - \frac12 E_v \\
              F_v - \frac12 G_u & E & F \\ \frac12 G_v & F & G \end{vmatrix} -
              \begin{vmatrix} 0 & \frac12 E_v & \frac12 G_u \\ \frac12 E_v & E & F \\ \frac12 G_u & F & G \end{vmatrix}
              \right)

    for the metric ((E, F), (F, G)) in codes (u, v).

    Args:
        metric: G, twice differentiable in torch.
        z: Codes (B, 2).

    Returns:
        (B,), one over squared units of the outputs: 1 on the unit sphere, 0 where geodesics are as in a plane.

    Exact when: the metric is twice differentiable.
    Biased when: the decoder has kinks (ReLU), whose curvature sits on lines that no derivative sees.
    Cost: (1 + Z)^2 evaluations of the metric a code.

    Raises:
        ShapeError: If codes are not (B, 2).
        NonFiniteError: If G is singular at a code, or not finite.
    """
    if z.dim() != 2 or z.shape[1] != 2:
        fix = "In more dimensions curvature belongs to planes: take a two-dimensional surface of codes."
        raise ShapeError("codes (B, 2)", f"{tuple(z.shape)}", fix)

    def with_slopes(codes: Tensor) -> Tensor:
        values, slopes = with_columns(metric, codes)
        return torch.cat([values[None], slopes]).transpose(0, 1)  # (B, 3, 2, 2): value, d/du, d/dv

    first, second = with_columns(with_slopes, z)
    _factor(first[:, 0])
    (e, f, g), (e_u, f_u, g_u), (e_v, f_v, g_v) = (_entries(first[:, i]) for i in range(3))
    g_uu = second[0, :, 1, 1, 1]
    f_uv = second[1, :, 1, 0, 1]
    e_vv = second[1, :, 2, 0, 0]
    one = [[f_uv - e_vv / 2 - g_uu / 2, e_u / 2, f_u - e_v / 2], [f_v - g_u / 2, e, f], [g_v / 2, f, g]]
    other = [[torch.zeros_like(e), e_v / 2, g_u / 2], [e_v / 2, e, f], [g_u / 2, f, g]]
    return (_determinant(one) - _determinant(other)) / (e * g - f**2) ** 2


def _entries(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return matrices[:, 0, 0], matrices[:, 0, 1], matrices[:, 1, 1]


def _determinant(rows: list[list[Tensor]]) -> Tensor:
    return torch.linalg.det(torch.stack([torch.stack(row, -1) for row in rows], -2))


def _factor(matrices: Tensor) -> Tensor:
    """Cholesky factors, lower."""
    factor, info = torch.linalg.cholesky_ex(matrices)
    is_bad = (info > 0) | ~torch.isfinite(factor).flatten(1).all(1)
    if is_bad.any():
        got = f"{int(is_bad.sum())} of {len(matrices)} that are singular, indefinite or not finite"
        fix = "Does the decoder change along every code dimension there, and are its outputs finite?"
        raise NonFiniteError("positive definite metrics", got, fix)
    return factor
