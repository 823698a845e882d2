"""Derivatives in the code by forward mode: Z tangents at a time, never a row for each output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import grad, vmap

from bayesae.errors import BayesAEError, DataError, NonFiniteError, ShapeError, UnsupportedError
from bayesae.forward_mode import jvp

__all__ = [
    "Decoder",
    "DecoderDraws",
    "by_parts",
    "check_codes",
    "check_outputs",
    "checked_points",
    "columns_and_bending",
    "flat_outputs",
    "gradient_and_hessian",
    "rows_at_once",
    "with_columns",
]

# of outputs and derivatives at once: on a CPU larger blocks are handed back to the system each time, and cost twice
_NUMBERS_ON_CPU, _NUMBERS_ON_DEVICE = 2**22, 2**25
_FEW = 64  # codes that are not worth a look at how large an output is

Decoder = Callable[[Tensor], Tensor]
r"""Codes (B, Z) to outputs (S, B, \*D) of S weight draws, as `Predictive.decoder` makes it."""


@dataclass(frozen=True)
class DecoderDraws:
    r"""Networks, one a weight draw, as one decoder: the members of an ensemble, or a plain network alone.

    .. math:: f(z) = (f_1(z), \dots, f_S(z))

    Args:
        networks: S of them, each codes (B, Z) to outputs (B, \*D) of one shape, in evaluation mode: dropout is refused
            where derivatives are taken.

    Exact when: always.
    Cost: one pass of each network.
    Raises: DataError if there is no network.
    """

    networks: Sequence[Callable[[Tensor], Tensor]]

    def __post_init__(self) -> None:
        if not self.networks:
            raise DataError("one network or more", "none", "Give the members of an ensemble.")

    def __call__(self, z: Tensor) -> Tensor:
        r"""Outputs (S, B, \*D) of codes (B, Z)."""
        return torch.stack([network(z) for network in self.networks])

    @property
    def singles(self) -> tuple[DecoderDraws, ...]:
        """Decoders of one network each: a draw's own geodesics need no other (`distance_draws`)."""
        return tuple(DecoderDraws((network,)) for network in self.networks)


def check_codes(name: str, points: Tensor) -> None:
    """Whether there is a row of floating numbers for every code.

    Args:
        name: What they are called in a message.
        points: (B, Z).

    Raises:
        ShapeError: If they are no matrix of floating numbers.
    """
    if points.dim() != 2 or not points.is_floating_point() or 0 in points.shape:
        got = f"{tuple(points.shape)} of {points.dtype}"
        raise ShapeError(f"{name} (B, Z) of floating numbers", got, "Give a row for every code.")


def checked_points(name: str, points: Tensor) -> Tensor:
    """Codes as solvers take them: floating, finite, a row each; detached from the caller's graph.

    Args:
        name: What they are called in a message.
        points: (B, Z).

    Returns:
        The same numbers.

    Raises:
        ShapeError: If they are no matrix of floating numbers.
        NonFiniteError: If one is not finite.
    """
    check_codes(name, points)
    points = points.detach()
    if not bool(torch.isfinite(points).all()):
        n_bad = int((~torch.isfinite(points)).sum())
        got = f"{n_bad} NaN or infinite values of {points.numel()}"
        raise NonFiniteError(f"finite {name}", got, "Were they encoded by a network that diverged?")
    return points


def check_outputs(outputs: Tensor, n_codes: int) -> None:
    r"""Whether outputs have an axis of weight draws and one of codes.

    Args:
        outputs: (S, B, \*D).
        n_codes: B.

    Raises:
        ShapeError: If not.
    """
    if outputs.dim() < 3 or outputs.shape[1] != n_codes:
        fix = "Give the decoder an axis of weight draws in front: DecoderDraws([network]) for a plain network."
        raise ShapeError(f"outputs (S, {n_codes}, *D) of the decoder", f"{tuple(outputs.shape)}", fix)


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
    check_outputs(outputs, len(z))
    return outputs.flatten(2)


def rows_at_once(decoder: Decoder, code: Tensor, n_passes: int) -> int:
    r"""How many codes may be decoded at once, so that memory stays bounded.

    Args:
        decoder: Codes (B, Z) to outputs (S, B, \*D).
        code: One, (1, Z), which is decoded to see how large an output is.
        n_passes: Values and derivatives of each.

    Returns:
        At least 1.
    """
    with torch.no_grad():
        numbers = flat_outputs(decoder, code).numel() * n_passes
    return max(1, (_NUMBERS_ON_CPU if code.device.type == "cpu" else _NUMBERS_ON_DEVICE) // numbers)


def by_parts(function: Callable[[Tensor], Tensor], decoder: Decoder, z: Tensor) -> Tensor:
    r"""A function of codes and their 1 + Z values and derivatives, some codes at a time, so that memory stays bounded.

    Args:
        function: Of (B, Z), row by row, to (B, \*).
        decoder: Codes (B, Z) to outputs (S, B, \*D), which it differentiates.
        z: (B, Z).

    Returns:
        (B, \*).
    """
    if len(z) <= _FEW:
        return function(z)
    parts = z.split(rows_at_once(decoder, z[:1], 1 + z.shape[1]))
    return torch.cat([function(part) for part in parts])


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
    values, columns = _along_columns(lambda tangent: jvp(function, (z,), (tangent,))[:2], function, z)
    return values[0], columns  # values know of no tangent: they are computed once


def gradient_and_hessian(function: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient (B, Z) and Hessian (B, Z, Z) of a function that is a sum over rows: forward over reverse.

    Args:
        function: Of (B, Z) to ().
        z: (B, Z).

    Returns:
        Both; the Hessian symmetric.

    Raises:
        UnsupportedError: If torch cannot differentiate the function twice.
    """
    slope = grad(function)
    gradient, columns = _along_columns(lambda tangent: jvp(slope, (z,), (tangent,))[:2], function, z)
    hessian = columns.permute(1, 2, 0)
    return gradient[0].detach(), ((hessian + hessian.mT) / 2).detach()


def columns_and_bending(function: Callable[[Tensor], Tensor], z: Tensor, pull: Tensor) -> tuple[Tensor, Tensor]:
    r"""Derivatives along every code dimension, and the second ones summed against fixed numbers, in one pass.

    Args:
        function: Of (B, Z), row by row, to (S, B, D).
        z: (B, Z).
        pull: (S, B, D).

    Returns:
        Derivatives (Z, S, B, D), and the Hessian (B, Z, Z) of each row's :math:`\sum_{sd} pull_{sd} f_{sd}(z)`.

    Raises:
        UnsupportedError: If torch cannot differentiate the function twice.
    """

    def pulled(codes: Tensor) -> tuple[Tensor, Tensor]:
        outputs = function(codes)
        return (outputs * pull).sum(), outputs

    slope = grad(pulled, has_aux=True)
    second, columns = _along_columns(lambda tangent: jvp(slope, (z,), (tangent,))[1], function, z)
    hessian = second.permute(1, 2, 0)
    return columns.detach(), ((hessian + hessian.mT) / 2).detach()


def _along_columns(
    product: Callable[[Tensor], tuple[Tensor, Tensor]], function: Callable[[Tensor], Tensor], z: Tensor
) -> tuple[Tensor, Tensor]:
    """A product with a tangent (B, Z), along every code dimension at once; ``function`` is what it differentiates."""
    tangents = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)[:, None].expand(-1, len(z), -1)
    try:
        return vmap(product)(tangents)
    except BayesAEError:
        raise
    except RuntimeError as error:
        function(z)  # an error that has nothing to do with derivatives comes as it is
        fix = "Write it in torch operations on its argument, without NumPy, .item(), dropout or branches on its values."
        raise UnsupportedError("a function that torch.func differentiates", f"{error}", fix) from error
