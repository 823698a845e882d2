"""`Loop`: where a run stands in its passes over the data, and how a later run comes back to that place."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from bayesae.data import Data, batches, count_rows
from bayesae.errors import DataError
from bayesae.training.generators import find_generators, get_state, set_state
from bayesae.types import Batch

__all__ = ["Loop", "rows_of_pass"]


class Loop:
    """Passes over the data in a new order each, counted.

    A pass is drawn from the generators as they stood at its start. A resumed one is drawn from that state anew, the
    batches that were done are read and thrown away, and the generators are set to where the run had left them.

    Args:
        data: Anything of `Data`.
        like: A parameter of the network: gives device and dtype.
        batch_size: Rows a batch.
        n_data: N: where a pass over a stream ends.
        n_accumulate: Batches a step.
        **drawing: What else may draw from generators of its own, by name.
    """

    def __init__(
        self, data: Data, like: Tensor, batch_size: int, n_data: int, n_accumulate: int = 1, **drawing: object
    ) -> None:
        self.data, self.like, self.batch_size = data, like, batch_size
        self.n_data, self.n_accumulate = n_data, n_accumulate
        self.n_pass = rows_of_pass(data, n_data)
        self.drawing = {"data": data, **drawing}
        self.epoch = self.n_batches = self.n_seen = self.n_steps = 0  # all but the last begin at 0 in every epoch
        self.started: dict[str, Tensor | str] | None = None

    @property
    def is_at_start(self) -> bool:
        """Whether nothing has been done yet."""
        return self.n_steps == 0

    def groups(self) -> Iterator[list[Batch]]:
        """What is left of this epoch, ``n_accumulate`` batches at a time; call `took` after each.

        Yields:
            The batches of one step.

        Raises:
            DataError: If the data end before the place where the run stands.
        """
        now = self._generators()
        source = batches(self.data, self.like, batch_size=self.batch_size, is_shuffled=True, n_data=self.n_data)
        if self.n_batches == 0:
            self.started = now
        else:
            assert self.started is not None
            self._set_generators(self.started)
            n_skipped = sum(1 for _ in islice(source, self.n_batches))
            if n_skipped < self.n_batches:
                got = f"{n_skipped}, and a checkpoint written after {self.n_batches}"
                raise DataError("the batches of the run that is resumed", got, "Give the same data.")
            self._set_generators(now)
        while group := list(islice(source, self.n_accumulate)):
            yield group

    def took(self, group: list[Batch]) -> None:
        """Count the batches of a step that is done."""
        self.n_batches, self.n_steps = self.n_batches + len(group), self.n_steps + 1
        self.n_seen += sum(len(batch.x) for batch in group)

    def end_epoch(self) -> None:
        """Stand at the start of the next epoch."""
        self.epoch, self.n_batches, self.n_seen = self.epoch + 1, 0, 0

    def progress(self, epochs: int) -> float:
        """Share of a run of ``epochs`` passes that is done, by rows, in [0, 1]."""
        return (self.epoch + min(self.n_seen / self.n_pass, 1.0)) / epochs

    def pack(self) -> dict[str, Any]:
        """The place and the generators' states, for `encoding.flatten`."""
        counts = {name: getattr(self, name) for name in _COUNTS}
        return counts | {"now": self._generators(), "started": self.started if self.n_batches else None}

    def unpack(self, packed: dict[str, Any]) -> None:
        """Go to a packed place; sets the generators.

        Raises:
            DataError: If a generator of the run is not there.
        """
        for name in _COUNTS:
            setattr(self, name, packed[name])
        self.started = packed["started"]
        missing = sorted(packed["now"].keys() - self._generators().keys() - {"cuda"})
        if missing:
            expected = "data and functions with the generators of the run that is resumed"
            raise DataError(expected, f"none at {', '.join(missing)}", "Make generators before training starts.")
        self._set_generators(packed["now"])

    def _generators(self) -> dict[str, Tensor | str]:
        states: dict[str, Tensor | str] = {"cpu": torch.get_rng_state()}
        if self.like.is_cuda:
            states["cuda"] = torch.cuda.get_rng_state(self.like.device)
        return states | {path: get_state(own) for path, own in find_generators(**self.drawing).items()}

    def _set_generators(self, states: dict[str, Any]) -> None:
        torch.set_rng_state(states["cpu"])
        if self.like.is_cuda and "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"], self.like.device)
        for path, own in find_generators(**self.drawing).items():
            if path in states:  # one that the data made while they were read is missing before that
                set_state(own, states[path])


_COUNTS = ("epoch", "n_batches", "n_seen", "n_steps")


def rows_of_pass(data: Data, n_data: int) -> int:
    """Rows that one pass reads: what the data say themselves, else ``n_data``, where a stream is cut."""
    is_stream = isinstance(data.dataset if isinstance(data, DataLoader) else data, IterableDataset)
    try:
        return n_data if is_stream else count_rows(data)
    except DataError:  # a loader whose batches somebody else cuts
        return n_data
