"""Seeding: one seed at the door, the caller's generators put back afterwards."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["per_draw", "scope"]


@contextmanager
def scope(seed: int | None, device: torch.device | str = "cpu") -> Generator[None, None, None]:
    """Run a block under ``seed`` and restore the global generators afterwards.

    ``torch.distributions`` takes no generator, so randomness inside the library comes from the global one;
    this context is opened once, by the outermost call.

    Args:
        seed: The seed; None leaves the caller's generator to advance as any torch call would.
        device: Where numbers are drawn; its generator is restored too.

    Yields:
        None.
    """
    if seed is None:
        yield
        return
    device = torch.device(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def per_draw(n: int, draw: Callable[[torch.Generator], Tensor], device: torch.device | str = "cpu") -> Tensor:
    """Stack ``n`` draws that each have a generator of their own, (S = n, ...).

    Every draw's seed is taken from the global generator first, so the first n of 2n draws are the n draws:
    asking for more refines a result and never replaces it.

    Args:
        n: Number of draws.
        draw: Makes one draw from the generator that it is handed.
        device: Device of the generators.

    Returns:
        The draws, stacked along a new first axis.
    """
    seeds = torch.randint(2**62, (n,)).tolist()
    return torch.stack([draw(torch.Generator(device).manual_seed(seed)) for seed in seeds])
