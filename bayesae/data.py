"""What people call data, turned into `Batch`: tensors, arrays, data sets and loaders of x alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bayesae.errors import DataError
from bayesae.functional import check_finite
from bayesae.types import Batch

__all__ = ["Data", "as_rows", "batches", "count_rows"]

Data: TypeAlias = Tensor | np.ndarray | Dataset | DataLoader
r"""x alone, (N, \*data): a tensor, an array, a data set, or a loader; of (x, ...) tuples the first part is read."""


def _first(item: object) -> Tensor:
    x = item[0] if isinstance(item, (tuple, list)) else item
    if not isinstance(x, Tensor):
        x = torch.as_tensor(np.asarray(x))
    return x


def _checked(x: Tensor, like: Tensor) -> Tensor:
    x = x.to(device=like.device, dtype=like.dtype)
    if len(x) == 0:
        raise DataError("at least one row", f"a tensor of shape {tuple(x.shape)}", "Give data with N >= 1.")
    check_finite({"x": x}, "data", "Remove those rows, or fill those entries in.")
    return x


def as_rows(data: Data, like: Tensor) -> Tensor:
    r"""All rows as one tensor (N, \*data) of the dtype and device of ``like``.

    Args:
        data: Anything of `Data`.
        like: A parameter of the network that will see them.

    Returns:
        The rows; the caller's own tensor where nothing had to change.
    """
    if isinstance(data, (Tensor, np.ndarray)):
        return _checked(torch.as_tensor(data), like)
    return torch.cat([batch.x for batch in batches(data, like, batch_size=1024, is_shuffled=False)])


def count_rows(data: Data) -> int:
    """Number N of rows.

    Args:
        data: Anything of `Data`.

    Returns:
        N.

    Raises:
        DataError: If there are none, or the number cannot be known.
    """
    rows = data.dataset if isinstance(data, DataLoader) else data
    if not isinstance(rows, Sized):
        raise DataError("data of known length", f"{type(rows).__name__} without len()", "Wrap it in a tensor.")
    if len(rows) == 0:
        raise DataError("at least one row", f"an empty {type(data).__name__}", "Give data with N >= 1.")
    return len(rows)


def batches(data: Data, like: Tensor, *, batch_size: int, is_shuffled: bool) -> Iterator[Batch]:
    """One pass over ``data``.

    Args:
        data: Anything of `Data`. A loader keeps its own batch size, order and collation.
        like: A parameter of the network: gives device and dtype.
        batch_size: Rows per batch.
        is_shuffled: A new order from the global generator.

    Yields:
        `Batch` with x and, where the order is ours, the row numbers.

    Raises:
        DataError: If there are no rows.
    """
    n_data = count_rows(data)
    if isinstance(data, DataLoader):
        seen = 0
        for item in data:
            x = _checked(_first(item), like)
            seen += len(x)
            yield Batch(x)
        if seen == 0:
            raise DataError("at least one batch", "a loader that gave none", "Is drop_last dropping all of it?")
        return
    order = torch.randperm(n_data) if is_shuffled else torch.arange(n_data)
    for index in order.split(batch_size):
        yield Batch(_checked(_rows(data, index), like), index=index)


def _rows(data: Tensor | np.ndarray | Dataset, index: Tensor) -> Tensor:
    if isinstance(data, Tensor):
        return data[index.to(data.device)]
    if isinstance(data, np.ndarray):
        return torch.as_tensor(data[index.numpy()])
    items: Iterable[int] = index.tolist()
    return torch.stack([_first(data[i]) for i in items])
