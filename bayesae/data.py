"""What people call data, turned into `Batch`: tensors, arrays, data sets and loaders."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SequentialSampler

from bayesae.errors import DataError, ShapeError, UnsupportedError
from bayesae.functional import check_finite
from bayesae.types import Batch

__all__ = ["Data", "as_rows", "batches", "check_choice", "check_counts", "check_rises", "count_rows"]

Data: TypeAlias = Tensor | np.ndarray | Batch | Dataset | DataLoader
"""x alone, (N, \\*data): a tensor, an array, a data set, or a loader. Of (x, ...) tuples the first part is read. A
`Batch` of all rows, or a loader whose collation gives `Batch`, brings masks, contexts and targets along. Streams
(an `IterableDataset`, given directly or in a loader) are read from their start in every pass, as far as n_data rows."""


def check_counts(**counts: int) -> None:
    """Raise unless every count is a whole number of at least 1.

    Args:
        **counts: Counts by the name of their argument.

    Raises:
        DataError: Naming those that are not.
    """

    def is_count(value: int) -> bool:
        try:
            return operator.index(value) >= 1
        except TypeError:
            return False

    bad = {name: value for name, value in counts.items() if not is_count(value)}
    if bad:
        raise DataError(f"{', '.join(bad)} of at least 1, whole", f"{bad}", "Leave them out for their defaults.")


def check_choice(name: str, value: str, known: Sequence[str]) -> None:
    """Raise unless a closed choice is one of those there are.

    Args:
        name: Of the argument.
        value: What was given.
        known: The choices, as ``typing.get_args`` reads them off the type.

    Raises:
        UnsupportedError: If it is none of them.
    """
    if value not in known:
        raise UnsupportedError(f"{name}, one of {list(known)}", repr(value), f"Try {known[0]!r}.")


def check_rises(**tensors: Tensor) -> None:
    """Raise unless numbers rise, or stay, along the first axis.

    Args:
        **tensors: Numbers (n, ...), n of at least 1, by the name of their argument; infinite ones are numbers.

    Raises:
        DataError: Naming the first that do not, are none, or hold a NaN.
    """
    for name, values in tensors.items():
        if values.dim() == 0 or values.numel() == 0 or bool(values.isnan().any() | (values.diff(dim=0) < 0).any()):
            raise DataError(f"{name} that rise along their first axis", "others", "Take them as a fit gives them.")


def as_tensor(x: object) -> Tensor:
    """A tensor from a tensor or anything that numpy reads, whatever its byte order, strides or flags.

    Args:
        x: A tensor, an array, or nested numbers.

    Returns:
        The tensor; it may share memory with ``x`` and is never written to.

    Raises:
        DataError: If it holds no numbers.
    """
    if isinstance(x, Tensor):
        return x
    array = np.asarray(x)
    if array.dtype.kind not in "biuf":
        raise DataError("an array of numbers", f"dtype {array.dtype}", "Convert it, with .astype(float) say.")
    native = array.astype(array.dtype.newbyteorder("="), order="C", copy=not array.flags.writeable)
    return torch.from_numpy(np.ascontiguousarray(native))


def _checked(batch: Batch, like: Tensor) -> Batch:
    """A batch on the device and in the dtype of ``like``; entries that were not observed are set to 0."""
    _check_lengths(batch)
    # targets keep float32 at least, in which likelihoods score: bfloat16 would make a count of 257 one of 256
    scored = torch.promote_types(like.dtype, torch.float32)
    x, mask, target = as_tensor(batch.x).to(like), batch.mask, batch.target
    if target is None and scored != like.dtype:
        target = batch.x
    if x.dim() < 2 or len(x) == 0:
        raise (DataError if x.dim() and len(x) == 0 else ShapeError)(
            "at least one row, of shape (N, *data)", f"shape {tuple(x.shape)}", "A single row needs a first axis of 1."
        )
    if mask is not None:
        mask = as_tensor(mask).to(like.device)
        if mask.shape != x.shape or mask.dtype != torch.bool:
            raise ShapeError(
                f"a mask of shape {tuple(x.shape)} and dtype bool",
                f"{tuple(mask.shape)} and {mask.dtype}",
                "True where an entry was observed.",
            )
        x = torch.where(mask, x, 0)
    named = {"x": x}
    if target is not None:
        target = as_tensor(target).to(device=like.device, dtype=scored)
        if mask is not None:
            if target[0].numel() != mask[0].numel():
                raise ShapeError(
                    f"a target of {mask[0].numel()} numbers a row, as x has, where there is a mask",
                    f"{target[0].numel()}",
                    "Set unobserved entries of x to 0 yourself and leave the mask out.",
                )
            target = torch.where(mask.reshape(target.shape), target, 0)
        named["target"] = target
    check_finite(named, "data", "Remove those rows, fill those entries in, or mask them.")
    context = batch.context
    if context is not None:
        context = as_tensor(context).to(device=like.device, dtype=like.dtype)
        context = context[:, None] if context.dim() == 1 else context.flatten(1)
        check_finite({"context": context}, "context", "Fill those entries in.")
    return Batch(x, mask, context, target, batch.index)


def _check_lengths(batch: Batch) -> None:
    """Raise unless all fields have a row for every row of x: cut to size, they would be other rows' own."""
    n_rows = next(iter(as_tensor(batch.x).shape), 0)
    for name, value in batch._asdict().items():
        if name != "x" and value is not None and as_tensor(value).shape[:1] != (n_rows,):
            got = f"{len(value)}" if as_tensor(value).dim() else "a single number"
            raise ShapeError(f"a {name} of {n_rows} rows", got, "One for every row of x.")


def as_rows(data: Data, like: Tensor, mask: Tensor | None = None) -> Batch:
    """All rows as one batch of the dtype and device of ``like``, with row numbers.

    Args:
        data: Anything of `Data`; a loader must go through its rows in order.
        like: A parameter of the network that will see them.
        mask: True where x was observed; other entries may be NaN and are set to 0. It takes the place of the data's
            own masks.

    Returns:
        The rows; the caller's own tensor where nothing had to change. Where only some batches of a loader have a mask,
        the others are observed throughout. Of a network narrower than float32 there is always a target, in float32.

    Raises:
        DataError: If a loader shuffles (the caller could not tell which score is whose), or only some of its batches
            have a context or a target.
        ShapeError: If rows, mask, context and target do not fit one another.
    """
    if isinstance(data, IterableDataset):
        data = DataLoader(data)
    if isinstance(data, DataLoader):
        if not isinstance(data.dataset, IterableDataset) and not isinstance(_sampler(data), SequentialSampler):
            kind = type(_sampler(data) or data.batch_sampler).__name__
            raise DataError("rows in their own order", f"a loader with {kind}", "Use shuffle=False.")
        rows = _joined(list(_given(data)), like, mask)
    elif isinstance(data, Dataset):
        rows = Batch(torch.stack([_row(data, i) for i in range(count_rows(data))]))
    else:
        rows = data if isinstance(data, Batch) else Batch(as_tensor(data))
    if mask is not None:
        rows = rows._replace(mask=mask)
    rows = _checked(rows, like)
    return rows._replace(index=torch.arange(len(rows.x)))


def _joined(pieces: list[Batch], like: Tensor, mask: Tensor | None) -> Batch:
    """Batches of a loader as one, each checked; ``mask`` of all rows takes the place of their own."""
    if mask is not None:
        sizes = [len(piece.x) for piece in pieces]
        _check_lengths(Batch(torch.empty(sum(sizes)), mask))
        parts = as_tensor(mask).split(sizes)
        pieces = [piece._replace(mask=part) for piece, part in zip(pieces, parts, strict=True)]
    for name in ("context", "target"):
        n = sum(getattr(piece, name) is not None for piece in pieces)
        if n not in (0, len(pieces)):
            fix = "Let the loader's collation give it always or never."
            raise DataError(f"a {name} with every batch, or with none", f"{n} of {len(pieces)} with one", fix)
    pieces = [_checked(piece, like) for piece in pieces]
    if any(piece.mask is not None for piece in pieces):  # a collation may give one only where something is missing
        pieces = [
            piece._replace(mask=torch.ones_like(piece.x, dtype=torch.bool)) if piece.mask is None else piece
            for piece in pieces
        ]
    fields = {name: [getattr(piece, name) for piece in pieces] for name in ("x", "mask", "context", "target")}
    return Batch(**{name: torch.cat(parts) for name, parts in fields.items() if parts[0] is not None})


def _sampler(loader: DataLoader) -> object:
    """What gives row numbers to a loader; None if only its author knows (a batch sampler or batches of their own)."""
    return loader.sampler if type(loader.batch_sampler) is BatchSampler else None


def count_rows(data: Data, n_data: int | None = None) -> int:
    """Number N of rows that one pass gives.

    Args:
        data: Anything of `Data`.
        n_data: The caller's own word, where the data have no length.

    Returns:
        N; of a loader what its sampler gives, less what ``drop_last`` drops.

    Raises:
        DataError: If there are none, or the number cannot be known.
    """
    if n_data is not None:
        check_counts(n_data=n_data)
        return n_data
    rows: Any = _sampler(data) if isinstance(data, DataLoader) else data.x if isinstance(data, Batch) else data
    try:
        n = len(rows)
    except TypeError as error:  # a stream, or batches that somebody else cuts
        kind = f"{type(data).__name__} without a length of rows"
        raise DataError("data of known length", kind, "Give n_data=.") from error
    if isinstance(data, DataLoader) and data.drop_last and data.batch_size:
        n -= n % data.batch_size
    if n == 0:
        dropped = isinstance(data, DataLoader) and data.drop_last
        fix = "Is drop_last dropping all of it?" if dropped else "Give data with N >= 1."
        raise DataError("at least one row", f"a {type(data).__name__} that gives none", fix)
    return n


def batches(
    data: Data, like: Tensor, *, batch_size: int, is_shuffled: bool, n_data: int | None = None
) -> Iterator[Batch]:
    """One pass over ``data``.

    Args:
        data: Anything of `Data`. A loader keeps its own batch size, order and collation.
        like: A parameter of the network: gives device and dtype.
        batch_size: Rows per batch.
        is_shuffled: A new order from the global generator; a loader and a stream keep theirs.
        n_data: Where a pass over a stream ends, if the stream does not end before; None reads all of it.

    Yields:
        `Batch` with x and, where the order is ours, the row numbers.

    Raises:
        DataError: If a loader gives nothing.
    """
    if isinstance(data, IterableDataset):
        data = DataLoader(data, batch_size=batch_size)
    if isinstance(data, DataLoader):
        n_left = n_data if isinstance(data.dataset, IterableDataset) else None
        for given in _given(data):
            batch = _checked(given, like)
            yield batch if n_left is None else _first_rows(batch, n_left)
            if n_left is not None and (n_left := n_left - len(batch.x)) <= 0:
                return  # a stream without an end is not asked for one more batch
        return
    n_data = count_rows(data)
    order = torch.randperm(n_data) if is_shuffled else torch.arange(n_data)
    if isinstance(data, Dataset):
        for index in order.split(batch_size):
            rows = torch.stack([_row(data, i) for i in index.tolist()])
            yield _checked(Batch(rows, index=index), like)
        return
    given = data if isinstance(data, Batch) else Batch(as_tensor(data))
    _check_lengths(given)
    fields = {name: as_tensor(value) for name, value in given._asdict().items() if value is not None}
    for index in order.split(batch_size):
        some = {name: value[index.to(value.device)] for name, value in fields.items()}
        yield _checked(Batch(**{"index": index, **some}), like)


def _given(loader: DataLoader) -> Iterator[Batch]:
    """What a loader gives, unchecked."""
    is_empty = True
    for item in loader:
        is_empty = False
        yield item if isinstance(item, Batch) else Batch(as_tensor(_first(item)))
    if is_empty:
        raise DataError("at least one batch", "a loader that gave none", "Was it a stream, read once already?")


def _row(data: Dataset, i: int) -> Tensor:
    """X of one item of a data set."""
    item = data[i]
    if isinstance(item, Batch):
        got = "a Batch, whose mask, context and target would be lost"
        fix = "Give one Batch of all rows, or a DataLoader whose collate_fn makes a Batch of such items."
        raise DataError("items x or (x, ...) of a data set", got, fix)
    return as_tensor(_first(item))


def _first_rows(batch: Batch, n: int) -> Batch:
    """The first ``n`` rows, if there are more."""
    return Batch(**{name: field[:n] for name, field in batch._asdict().items() if field is not None})


def _first(item: object) -> object:
    return item[0] if isinstance(item, (tuple, list)) else item
