"""Seeding: one seed at the door, the caller's generators put back afterwards."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["derived_seed", "per_draw", "row_normal", "scope"]

_MAX_SEED = 2**62


@contextmanager
def scope(seed: int | None, device: torch.device | str = "cpu") -> Generator[None]:
    """Run a block under ``seed`` and restore the global generators afterwards.

    ``torch.distributions`` takes no generator, so randomness inside the library comes from the global one;
    this context is opened once, by the outermost call. Generators of other devices are not touched.

    Args:
        seed: The seed; None takes one from the caller's generator, which thereby advances as in any torch call.
        device: Where numbers are drawn; its generator is seeded and restored too.

    Yields:
        None.
    """
    if seed is None:
        seed = int(torch.randint(_MAX_SEED, ()))
    device = torch.device(device)
    is_cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if is_cuda else []):
        # not torch.manual_seed: that seeds every device, and only these are restored
        torch.default_generator.manual_seed(seed)
        if is_cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def derived_seed(number: int) -> int:
    """A seed that is a function of the enclosing `scope`'s and of a number, and uses up no global random number.

    Noise keyed on the seed (`row_normal`) is the same whenever it is asked for within one scope. Where a second,
    independent one is needed, draw it under ``scope(derived_seed(1))``.

    Args:
        number: At least 0; each gives another seed.

    Returns:
        The seed.
    """
    # not a sum: seed 0 and number 1 would be seed 1 and number 0
    mixed = (torch.initial_seed() * 0xD1342543DE82EF95 + number) % _MAX_SEED
    return int(torch.randint(_MAX_SEED, (), generator=torch.Generator().manual_seed(mixed)))


def per_draw(n: int, draw: Callable[[torch.Generator], Tensor], device: torch.device | str = "cpu") -> Tensor:
    """Stack ``n`` draws that each have a generator of their own, (S = n, ...).

    Every draw's seed is taken from the global generator first, so the first n of 2n draws are the n draws, in one
    call or in several: asking for more refines a result and never replaces it.

    Args:
        n: Number of draws.
        draw: Makes one draw from the generator that it is handed.
        device: Device of the generators.

    Returns:
        The draws, stacked along a new first axis.
    """
    seeds = torch.randint(_MAX_SEED, (n,)).tolist()
    return torch.stack([draw(torch.Generator(device).manual_seed(seed)) for seed in seeds])


def row_normal(index: Tensor, draws: tuple[int, ...], size: int, like: Tensor) -> Tensor:
    r"""Standard normal noise for stochastic codes, (\*draws, B, size): a function of the seed and of the row only.

    Every row has a generator of its own, keyed on the seed of the enclosing `scope` and the row's number, so the
    noise does not depend on how rows are put into chunks. No global random number is used up. With draws of (K, 1)
    all weight draws share it (common random numbers): what then differs between weight draws is due to the weights,
    and no division of weight draws into blocks changes it; (K, S) gives each draw of a block its own.

    Args:
        index: Row numbers, (B,), as in ``Batch.index``.
        draws: Sizes of the draw axes, (K, 1) or (K, S).
        size: Numbers a row and draw.
        like: Gives dtype and device.

    Returns:
        The noise.
    """
    key = torch.initial_seed()
    rows = []
    for row in index.tolist():
        # an odd multiplier keeps (key, row) apart from (key + 1, row - 1)
        generator = torch.Generator().manual_seed((key * 0x9E3779B97F4A7C15 + row) % _MAX_SEED)
        rows.append(torch.randn(*draws, size, generator=generator, dtype=torch.float64))
    return torch.stack(rows, -2).to(like)
