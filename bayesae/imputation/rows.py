"""Rows with entries missing as one batch with a mask, whatever they come from."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from bayesae.data import Data, as_rows, as_tensor, count_rows
from bayesae.errors import DataError, UnsupportedError
from bayesae.predictive import Predictive
from bayesae.types import Batch

__all__ = ["incomplete_rows", "rows_observed"]


def incomplete_rows(predictive: Predictive, x: Data, mask: Tensor | np.ndarray | None) -> Batch:
    r"""Rows with a mask, checked, 0 where an entry is missing.

    Args:
        predictive: Whose model will see them.
        x: Rows (N, \*data), anything of `Data`.
        mask: True where x is observed; None: the mask that the rows bring along, and where they bring none, where x is
            not NaN.

    Returns:
        The rows, with row numbers.

    Raises:
        DataError: If nothing is missing, or rows lie outside the likelihood's range.
        UnsupportedError: If rows have a target of their own, or the networks are narrower than float32.
    """
    reference = predictive.model.reference
    rows = as_rows(_marked(x), reference) if mask is None else as_rows(x, reference, as_tensor(mask))
    if rows.mask is None or bool(rows.mask.all()):
        raise DataError("a missing entry", "rows without any", "Mark missing entries by NaN, or by False in mask=.")
    if rows.target is not None:
        dtype = reference.dtype
        if torch.finfo(dtype).bits < 32:  # rows of these networks have their unrounded numbers as a target
            raise UnsupportedError("networks of float32 or float64", f"{dtype}", "Use model.float().")
        raise UnsupportedError("rows that explain themselves", "a target of their own", "Leave it out of the Batch.")
    predictive.model.likelihood.check(rows.x)
    return rows


def rows_observed(rows: Batch) -> Tensor:
    """Whether a row has any observed entry, (N,)."""
    assert rows.mask is not None
    return rows.mask.flatten(1).any(1)


def _marked(data: Data) -> Data:
    """The same rows, with a mask that says where they are NaN wherever they have none."""
    if isinstance(data, IterableDataset):
        data = DataLoader(data)
    if isinstance(data, DataLoader):
        loader: Any = copy.copy(data)
        loader.collate_fn = _Marking(data.collate_fn)
        loader._iterator = None  # workers that persist have the other collation
        return loader
    if isinstance(data, Dataset):
        items = [data[i] for i in range(count_rows(data))]
        if any(isinstance(item, Batch) for item in items):
            return data  # which `as_rows` refuses
        data = torch.stack([as_tensor(_first(item)) for item in items])
    return _with_mask(data if isinstance(data, Batch) else Batch(as_tensor(data)))


@dataclass(frozen=True)
class _Marking:
    """A loader's collation and then a mask, as an object that goes to workers."""

    collate: Callable[[Any], Any]

    def __call__(self, items: object) -> Batch:
        given = self.collate(items)
        return _with_mask(given if isinstance(given, Batch) else Batch(as_tensor(_first(given))))


def _with_mask(batch: Batch) -> Batch:
    return batch if batch.mask is not None else batch._replace(mask=~torch.isnan(as_tensor(batch.x)))


def _first(item: object) -> object:
    return item[0] if isinstance(item, (tuple, list)) else item
