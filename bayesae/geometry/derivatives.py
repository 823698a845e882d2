"""Derivatives in the code by forward mode: Z tangents at a time, never a row for each output."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

from bayesae.errors import NonFiniteError, ShapeError, UnsupportedError

__all__ = ["Decoder", "checked_points", "columns_and_bending", "flat_outputs", "gradient_and_hessian", "with_columns"]

Decoder = Callable[[Tensor], Tensor]
r"""Codes (B, Z) to outputs (S, B, \*D) of S weight draws, as `Predictive.decoder` makes it."""


def checked_points(name: str, points: Tensor) -> Tensor:
    """Codes as geometry takes them: floating, finite, a row each; detached from the caller's graph.

    Args:
        name: What they are called in a message.
        points: (B, Z).

    Returns:
        The same numbers.

    Raises:
        ShapeError: If they are no matrix of floating numbers.
        NonFiniteError: If one is not finite.
    """
    if points.dim() != 2 or not points.is_floating_point() or 0 in points.shape:
        got = f"{tuple(points.shape)} of {points.dtype}"
        raise ShapeError(f"{name} (B, Z) of floating numbers", got, "Give a row for every code.")
    return _finite(points.detach(), name, "Were they encoded by a network that diverged?")


def _finite(values: Tensor, what: str, fix: str) -> Tensor:
    if not bool(torch.isfinite(values).all()):
        n_bad = int((~torch.isfinite(values)).sum())
        raise NonFiniteError(f"finite {what}", f"{n_bad} NaN or infinite values of {values.numel()}", fix)
    return values


def flat_outputs(decoder: Decoder, z: Tensor) -> Tensor:
    r"""Outputs with one axis a row, (S, B, D).

    Args:
        decoder: Codes (B, Z) to outputs (S, B, \*D).
        z: (B, Z).

    Returns:
        The outputs.

    Raises:
        ShapeError: If the outputs are not (S, B, \*D).
    """
    outputs = decoder(z)
    if outputs.dim() < 3 or outputs.shape[1] != len(z):
        fix = "Give the decoder an axis of weight draws in front: decoder(z)[None] for a plain network."
        raise ShapeError(f"outputs (S, {len(z)}, *D) of the decoder", f"{tuple(outputs.shape)}", fix)
    return outputs.flatten(2)


def with_columns(function: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    r"""Values and their derivatives along every code dimension, in one forward pass of 1 + Z rows a row.

    Args:
        function: Of (B, Z), row by row, to (..., \*) of any shape.
        z: (B, Z).

    Returns:
        Values, and derivatives with an axis Z in front of theirs.

    Raises:
        ShapeError: If the function raises it.
        UnsupportedError: If torch cannot differentiate the function forwards.
    """
    tangents = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)[:, None].expand(-1, len(z), -1)

    def along(tangent: Tensor) -> tuple[Tensor, Tensor]:
        return jvp(function, (z,), (tangent,))[:2]

    try:
        values, columns = vmap(along)(tangents)
    except ShapeError:
        raise
    except RuntimeError as error:
        fix = "Write it in torch operations on its argument, without NumPy, .item() or data-dependent branches."
        raise UnsupportedError("a function that torch.func differentiates", f"{error}", fix) from error
    return values[0], columns  # values know of no tangent: they are computed once


def gradient_and_hessian(function: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient (B, Z) and Hessian (B, Z, Z) of a function that is a sum over rows: forward over reverse.

    Args:
        function: Of (B, Z) to ().
        z: (B, Z).

    Returns:
        Both; the Hessian symmetric.
    """
    gradient, columns = with_columns(grad(function), z)
    hessian = columns.permute(1, 2, 0)
    return gradient.detach(), ((hessian + hessian.mT) / 2).detach()


def columns_and_bending(function: Callable[[Tensor], Tensor], z: Tensor, pull: Tensor) -> tuple[Tensor, Tensor]:
    r"""Derivatives along every code dimension, and the second ones summed against fixed numbers, in one pass.

    Args:
        function: Of (B, Z), row by row, to (S, B, D).
        z: (B, Z).
        pull: (S, B, D).

    Returns:
        Derivatives (Z, S, B, D), and the Hessian (B, Z, Z) of each row's :math:`\sum_{sd} pull_{sd} f_{sd}(z)`.
    """

    def pulled(codes: Tensor) -> tuple[Tensor, Tensor]:
        outputs = function(codes)
        return (outputs * pull).sum(), outputs

    tangents = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)[:, None].expand(-1, len(z), -1)
    second, columns = vmap(lambda tangent: jvp(grad(pulled, has_aux=True), (z,), (tangent,))[1])(tangents)
    hessian = second.permute(1, 2, 0)
    return columns.detach(), ((hessian + hessian.mT) / 2).detach()
