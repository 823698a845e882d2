"""Per-datum gradients of whole networks by torch.func, for parameters that no single layer owns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bayesae.curvature.linearisation import Linearisation
from bayesae.types import Params

__all__ = ["gradients", "row_chunks"]

_NUMBERS = 2**24  # of gradients at a time


def gradients(lin: Linearisation, x: Tensor, rows: Tensor, names: Sequence[str]) -> Params:
    r"""Gradients of rows^T f in some parameters: {name: (B, R, \*shape)}.

    Args:
        lin: The network.
        x: (B, \*data).
        rows: (B or 1, R, \*O).
        names: Parameters.

    Returns:
        One gradient a datum and row, by vector-Jacobian products mapped over both.
    """
    chosen = {name: lin.params[name] for name in names}
    others = {name: leaf for name, leaf in lin.params.items() if name not in chosen}
    buffers = {name: b.to(x.dtype) if b.is_floating_point() else b for name, b in lin.network.named_buffers()}
    rows = rows.expand(len(x), *rows.shape[1:])

    def of_one(row: Tensor, some: Tensor) -> Params:
        def run(params: Params) -> Tensor:
            return torch.func.functional_call(lin.network, params | others | buffers, (row[None],))[0]

        vjp = torch.func.vjp(run, chosen)[1]
        return torch.func.vmap(lambda one: vjp(one)[0])(some)

    return torch.func.vmap(of_one)(x, rows)


def row_chunks(lin: Linearisation, names: Sequence[str], n_data: int, n_rows: int) -> Iterator[slice]:
    """Pieces of the R rows whose gradients fit in memory.

    Args:
        lin: The network.
        names: Parameters.
        n_data: B.
        n_rows: R.

    Yields:
        Slices of range(R).
    """
    per_row = n_data * sum(lin.params[name].numel() for name in names)
    size = max(1, min(_NUMBERS, lin.memory // 8) // max(1, per_row))
    for start in range(0, n_rows, size):
        yield slice(start, start + size)
