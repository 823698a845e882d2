"""Gradients of expectations under a Normal, of first and of second order: the rules of stochastic back-propagation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bayesae.errors import UnsupportedError
from bayesae.forward_mode import jvp

__all__ = ["NormalGradients", "normal_gradients"]


@dataclass(frozen=True)
class NormalGradients:
    r"""Estimates of the gradients of E f(z), z ~ N(m, C), C = R R^T.

    Args:
        loc: In m, (..., Z).
        factor: In R, every entry free, (..., Z, Z); of a triangular R the same triangle counts.
        covariance: In C, symmetric, (..., Z, Z); None of first order, which has none without solving for it.
    """

    loc: Tensor
    factor: Tensor
    covariance: Tensor | None


def normal_gradients(
    f: Callable[[Tensor], Tensor],
    loc: Tensor,
    factor: Tensor,
    noise: Tensor,
    *,
    order: Literal["first", "second"] = "first",
) -> NormalGradients:
    r"""Gradients of an expectation under a Normal in its parameters, from draws :math:`z_k = m + R \varepsilon_k`.

    .. math:: \nabla_m \mathbb{E} f = \mathbb{E}\, \nabla f, \qquad
              \nabla_R \mathbb{E} f = \mathbb{E}\, \nabla f\, \varepsilon^\top, \qquad
              \nabla_C \mathbb{E} f = \tfrac12 \mathbb{E}\, \nabla^2 f, \quad
              \nabla_R \mathbb{E} f = \mathbb{E}\, \nabla^2 f\, R

    The first two (Bonnet, and the chain rule) are what automatic differentiation of the draws gives; the others (Price)
    need f to be twice differentiable, and do not multiply by noise.

    Args:
        f: Codes (K, ..., Z) to numbers (K, ...), each of its own code alone.
        loc: m, (..., Z).
        factor: R, (..., Z, Z), of any shape.
        noise: Standard normal, (K, ..., Z).
        order: "first" uses gradients of f, "second" Hessians too.

    Returns:
        Means over the K draws.

    Exact when: in expectation, always; "second" of a quadratic f in C and R, whatever the draws.
    Biased when: f has kinks, as of rectifiers: "second" does not see what their Hessian has there.
    Cost: a gradient of f for every draw; "second" Z Hessian-vector products more.

    Raises:
        UnsupportedError: If the order is unknown.

    References:
        | Stochastic Backpropagation and Approximate Inference in Deep Generative Models (Rezende, Mohamed, Wierstra,
          2014, https://arxiv.org/abs/1401.4082)
    """
    if order not in {"first", "second"}:
        raise UnsupportedError("order, 'first' or 'second'", repr(order), "'first' is the default.")
    latents = loc + (factor @ noise[..., None])[..., 0]
    gradient = torch.func.grad(lambda z: f(z).sum())
    slope = gradient(latents)
    if order == "first":
        return NormalGradients(slope.mean(0), (slope[..., :, None] * noise[..., None, :]).mean(0), None)

    def column(direction: Tensor) -> Tensor:
        change = jvp(gradient, (latents,), (direction.expand_as(latents),))[1]
        return change.mean(0)

    eye = torch.eye(loc.shape[-1], dtype=loc.dtype, device=loc.device)
    hessian = torch.func.vmap(column, out_dims=-1)(eye)
    return NormalGradients(slope.mean(0), hessian @ factor, 0.5 * hessian)
