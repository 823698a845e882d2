"""Jacobian-vector products that every torch this library works with can take, in every mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["jvp"]


def jvp(function: Callable[..., Any], primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
    """``torch.func.jvp``, under ``torch.inference_mode`` too, where torch 2.11 has no rule for it inside ``vmap``.

    Args:
        function: Of tensors, or trees of them.
        primals: Where.
        tangents: Along what, like the primals.

    Returns:
        Values, and their derivatives along the tangents.

    Exact when: always.
    Cost: twice that of the function.
    """
    is_recorded = torch.is_grad_enabled()  # leaving inference mode would switch it on
    with torch.inference_mode(False), torch.set_grad_enabled(is_recorded):
        return torch.func.jvp(function, primals, tangents)  # pyright: ignore[reportReturnType] - no aux
