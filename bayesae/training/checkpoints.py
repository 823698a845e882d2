"""Checkpoints: a run on disk, which only the same arguments continue."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bayesae import encoding
from bayesae.data import check_counts
from bayesae.errors import FileError, UnsupportedError

__all__ = ["CheckpointFile"]

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
            pairs = [(name, *_short(then.get(name), self.arguments.get(name))) for name in names[:3]]
            differing = [f"{name} {before}, now {now}" for name, before, now in pairs]
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


def _short(*texts: str | None) -> list[str]:
    """Descriptions as far as a message has room; long ones from shortly before they begin to differ."""
    words = [" ".join(str(text).split()) for text in texts]
    if max(map(len, words)) <= _SHOWN:
        return words
    start = max(0, len(os.path.commonprefix(words)) - _SHOWN // 3)
    ends = [(text[start : start + _SHOWN], len(text) > start + _SHOWN) for text in words]
    return [f"{'...' if start else ''}{text}{'...' if is_cut else ''}" for text, is_cut in ends]
