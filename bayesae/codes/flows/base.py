"""What a flow is, what it starts from, and what both need of the encoder."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from bayesae.codes.base import modules_of
from bayesae.codes.laws import Law
from bayesae.errors import ShapeError, UnsupportedError

__all__ = ["Flow", "LawFamily", "check_dtype", "check_is_total"]


class LawFamily(Protocol):
    """Laws of codes made of an encoder's numbers; `codes.Amortised` is one."""

    def n_parameters(self, n_latents: int) -> int:
        """Numbers that the encoder gives for each of Z code dimensions."""
        ...

    def law_from(self, parameters: Tensor) -> Law:
        """The law of raw numbers (S, B, Z, n_parameters)."""
        ...


class Flow(Protocol):
    """A differentiable bijection of codes for every row under every weight draw; it draws no random number."""

    @property
    def n_parameters(self) -> int:
        """Numbers that the encoder gives for each code dimension, beside the law's."""
        ...

    def __call__(self, latents: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Move codes.

        Args:
            latents: (K, S, B, Z).
            parameters: Raw numbers from the encoder, (S, B, Z, n_parameters).

        Returns:
            The new codes, and the log of the absolute determinant of their Jacobian in parts that add up, (K, S, B, G):
            G = Z if part j is that of dimension j given those before it in some order, else G = 1.
        """
        ...


def check_is_total(base: LawFamily) -> None:
    """Raise if log q would have to be taken at parameters without gradients.

    Args:
        base: The law that codes start from.

    Raises:
        UnsupportedError: If its gradient is "path".
    """
    if getattr(base, "gradient", "total") == "path":
        # log q of a given code at held parameters: planar flows have no inverse, autoregressive ones take Z passes
        raise UnsupportedError(
            'a base with gradient="total" under a flow',
            'gradient="path", which needs the density of a given code, and thus the flow\'s inverse',
            "Leave gradient out.",
        )


def check_dtype(flow: object, parameters: Tensor) -> None:
    """Raise unless a flow's own weights have the dtype of the model.

    Args:
        flow: Any.
        parameters: From the encoder.

    Raises:
        ShapeError: If they have another.
    """
    for weight in modules_of(flow).parameters():
        if weight.dtype != parameters.dtype:
            expected = f"a flow with weights of the model's dtype {parameters.dtype}"
            raise ShapeError(expected, f"{weight.dtype}", "Call flow.to(dtype).")
