"""Ranks of `torch.distributed`: rows or members divided between them, sums and members brought together again.

Without a process group there is one rank, and every function here does nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch import distributed as dist

from bayesae.types import Batch

__all__ = [
    "add_over_ranks",
    "are_the_same",
    "gather_members",
    "n_ranks",
    "own_members",
    "own_rows",
    "rank",
    "same_generator",
    "same_seed",
]


def n_ranks() -> int:
    """Processes in the group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process; 0 without a group."""
    return dist.get_rank() if n_ranks() > 1 else 0


def own_members(n: int) -> slice:
    """Which of n members, such as chains, this rank works on: a run of them, as even as n allows.

    Args:
        n: Members in all.

    Returns:
        Their places; empty where there are more ranks than members.
    """
    return slice(rank() * n // n_ranks(), (rank() + 1) * n // n_ranks())


def own_rows(batch: Batch) -> Batch:
    """The rows of a batch that this rank works on: every ``n_ranks``-th.

    Args:
        batch: The same one on every rank.

    Returns:
        A batch of its rows, maybe of none.
    """
    if n_ranks() == 1:
        return batch
    part = slice(rank(), None, n_ranks())
    return Batch(**{name: value[part] for name, value in batch._asdict().items() if value is not None})


def add_over_ranks(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Sums over ranks, the same bits on each.

    Args:
        tensors: Of one device, of the same shapes on every rank; they stay as they are.

    Returns:
        Their sums; the tensors themselves where there is one rank.
    """
    if n_ranks() == 1:
        return list(tensors)
    sums = []
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):  # one call a dtype
        flat = torch.cat([tensor.flatten() for tensor in tensors if tensor.dtype == dtype])
        dist.all_reduce(flat)
        sums.append((dtype, flat))
    pieces = {dtype: iter(flat.split([t.numel() for t in tensors if t.dtype == dtype])) for dtype, flat in sums}
    return [next(pieces[tensor.dtype]).reshape(tensor.shape) for tensor in tensors]


def same_seed(seed: int | None) -> int | None:
    """A seed that is the same on every rank: the given one, or without one a number that rank 0 draws.

    Args:
        seed: Of the caller; the same on every rank.

    Returns:
        It; None where there is one rank and no seed.
    """
    if seed is not None or n_ranks() == 1:
        return seed
    drawn = torch.randint(2**62, ())
    return int(add_over_ranks([drawn if rank() == 0 else torch.zeros_like(drawn)])[0])


def same_generator() -> None:
    """Set the global generator of the CPU to where it stands on rank 0.

    Ranks with other rows or members draw other numbers of codes for them; what all draw alike, such as the order of
    rows, must not feel it.
    """
    if n_ranks() > 1:
        state = torch.get_rng_state()
        torch.set_rng_state(add_over_ranks([state if rank() == 0 else torch.zeros_like(state)])[0])


def are_the_same(number: float) -> bool:
    """Whether all ranks have the same number."""
    numbers = torch.zeros(n_ranks(), dtype=torch.float64)
    numbers[rank()] = number
    numbers = add_over_ranks([numbers])[0]
    return bool((numbers == numbers[0]).all())


def gather_members(own: Tensor, n: int) -> Tensor:
    r"""All members from the ranks that hold them.

    Args:
        own: Those of `own_members`, (n_own, \*shape).
        n: Members in all.

    Returns:
        (n, \*shape), the same on every rank; ``own`` itself where there is one rank.
    """
    if n_ranks() == 1:
        return own
    whole = own.new_zeros(n, *own.shape[1:])
    whole[own_members(n)] = own
    dist.all_reduce(whole)  # to what every rank has zeros of: gloo and nccl both take it, whatever the shares
    return whole
