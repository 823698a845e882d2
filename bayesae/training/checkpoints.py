"""Checkpoints: a run on disk, and the arguments that it must be continued with."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bayesae import encoding
from bayesae.data import check_counts
from bayesae.errors import FileError, UnsupportedError
from bayesae.models import Autoencoder

__all__ = ["CheckpointFile", "describe", "describe_model", "digest"]

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_SHOWN = 80  # characters of an argument in a message


class CheckpointFile:
    """One file that always holds a whole checkpoint of one run: each takes the place of the last in one move.

    Args:
        path: The file; None keeps no checkpoint.
        every: Steps between two checkpoints of an epoch; None writes at the ends of epochs only.
        arguments: What tells this run from others, in words, by name.

    Raises:
        DataError: If ``every`` is less than 1.
        UnsupportedError: If there are steps and no file.
    """

    def __init__(self, path: str | os.PathLike[str] | None, every: int | None, arguments: Mapping[str, str]) -> None:
        if every is not None:
            check_counts(checkpoint_every=every)
            if path is None:
                raise UnsupportedError("a file for checkpoints", "checkpoint_every alone", "Give checkpoint=.")
        self.path, self.every, self.arguments = path, every, dict(arguments)

    def is_due(self, n_steps: int) -> bool:
        """Whether to write after this many steps."""
        return self.every is not None and n_steps % self.every == 0

    def read(self) -> Any:  # noqa: ANN401 - whatever the run has packed
        """The last checkpoint; None if there is none yet.

        Returns:
            What `write` was given.

        Raises:
            FileError: If the file is damaged or no checkpoint, or belongs to a run with other arguments.
        """
        if self.path is None or not Path(self.path).exists():
            return None
        metadata, tensors = encoding.read(self.path)
        if not isinstance(metadata, dict) or metadata.keys() != {"checkpoint", "run"}:
            fix = "Give checkpoint= a file of its own."
            raise FileError("a checkpoint of training", f"{str(self.path)!r}: another file of bayesae", fix)
        then = encoding.unflatten(metadata["checkpoint"], {})
        names = [name for name in {**then, **self.arguments} if then.get(name) != self.arguments.get(name)]
        if names:
            differing = (
                f"{name} {_short(then.get(name))}, now {_short(self.arguments.get(name))}" for name in names[:3]
            )
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            got = f"{str(self.path)!r} of a run with {'; '.join(differing)}{more}"
            raise FileError("a checkpoint of this run", got, "Give the arguments of that run, or another checkpoint=.")
        return encoding.unflatten(metadata["run"], tensors)

    def write(self, pack: Callable[[], Any]) -> None:
        """Put a checkpoint in the place of the last one, or, killed on the way, leave that one as it is.

        Args:
            pack: Gives what `encoding.flatten` takes; not called where no checkpoint is kept.
        """
        if self.path is not None:
            skeleton, tensors = encoding.flatten(pack())
            encoding.write(self.path, tensors, {"checkpoint": encoding.flatten(self.arguments)[0], "run": skeleton})


def describe(argument: object) -> str:
    """An argument in words that are the same in the next process: functions by name, dataclasses by their fields."""
    if isinstance(argument, partial):
        rest = _ADDRESS.sub("", f"{argument.args}, {argument.keywords}")
        return f"partial({describe(argument.func)}, {rest})"
    if argument is None or is_dataclass(argument) or isinstance(argument, (bool, int, float, str, tuple, torch.dtype)):
        return _ADDRESS.sub("", repr(argument))
    named: Any = argument if hasattr(argument, "__qualname__") else type(argument)
    return f"{named.__module__}.{named.__qualname__}"


def describe_model(model: Autoencoder) -> dict[str, str]:
    """Networks, likelihood and the shape of every weight, in words."""
    likelihood = model.likelihood
    words = {
        "encoder": _ADDRESS.sub("", repr(model.encoder)),
        "decoder": _ADDRESS.sub("", repr(model.decoder)),
        "likelihood": f"{type(likelihood).__name__} {getattr(likelihood, 'arguments', '')}".strip(),
    }
    for name, leaf in model.named_parameters():
        words[name] = f"{tuple(leaf.shape)} {leaf.dtype}{'' if leaf.requires_grad else ', frozen'}"
    return words


def digest(named: Mapping[str, Any]) -> str:
    """A checksum of the tensors' names and bits."""
    sums = hashlib.sha256()
    for name, leaf in named.items():
        if isinstance(leaf, Tensor):
            sums.update(name.encode())
            sums.update(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sums.hexdigest()


def _short(text: str | None) -> str:
    words = " ".join(str(text).split())
    return words if len(words) <= _SHOWN else f"{words[:_SHOWN]}..."
