"""Noise of a likelihood's own: one positive number, or one for every number of a row, given or learned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from bayesae.errors import DataError, NotFittedError, ShapeError
from bayesae.likelihoods.base import Head, float64_of

__all__ = ["NoisyHead", "NoisyLikelihood", "Positive", "check_positive", "log", "root"]

Positive = float | np.number | Sequence[float] | np.ndarray | Tensor
"""What people give as positive numbers."""


@runtime_checkable
class NoisyLikelihood(Protocol):
    """A likelihood with noise of its own: what those who learn it ask of it."""

    is_learned: bool
    is_estimated: bool

    def start_noise(self) -> None:
        """Make densities possible before the first estimate."""
        ...

    def noise_statistics(self, outputs: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """Float64 sums of one batch; those of batches add up."""
        ...

    def update_noise(self, statistics: Tensor) -> bool:
        """Set the noise from the sums of one pass; whether another pass would move it."""
        ...


class NoisyHead(Head):
    r"""A head with a positive noise number, or one for every number of a row, that is given or learned.

    Learning is a fixed point over passes: `start_noise` before the first, `noise_statistics` of every batch added up,
    `update_noise` of the sums, until it returns False. `bayesae.estimate_noise` does so.

    A shared number is a Python float: a float32 buffer would be off by 1e-8 in a model that is cast to float64. Those
    of every number are a float64 tensor (D,), flat in the order of the row's numbers, outside the module's buffers for
    the same reason.

    Args:
        given: What the caller gave, in the units of his argument.
        name: Of that argument.
        per_output: Whether every number of a row has its own.
        power: What turns the argument into what is stored (2 for a scale that is stored as a variance).
    """

    n_statistics: int = 2
    """Statistics for every noise number."""

    def __init__(self, given: Positive | None, name: str, per_output: bool, power: int = 1) -> None:
        super().__init__()
        self.per_output, self.is_learned, self._name, self._given = per_output, given is None, name, given
        self._noise: float | Tensor | None = None
        if given is None:
            return
        values = float64_of(f"a positive, finite {name}", given)
        if values.dim() == 0 or (values.numel() == 1 and not per_output):
            shared = values.item()
            check_positive(name, shared)
            try:  # a power of the float itself, so that no tensor rounds it
                self._noise, self._given = shared**power, shared
            except OverflowError as error:
                fix = f"Give the {name} in the units of the data, and scale these."
                raise DataError(f"a {name} whose square is finite", f"{given}", fix) from error
        else:
            if not per_output:
                raise DataError(
                    f"one {name} for all outputs",
                    f"{values.numel()} of them",
                    "Give per_output=True if every number of a row has its own.",
                )
            if values.numel() == 0 or not _is_positive(values):
                raise DataError(f"positive, finite {name}s", f"{given}", f"Give {name}s in the units of the data.")
            self._noise, self._given = values.flatten() ** power, values.tolist()

    @property
    def is_estimated(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the noise is known."""
        return self._noise is not None

    @property
    def _known(self) -> float | Tensor:
        if self._noise is None:
            name = type(self).__name__
            raise NotFittedError(
                f"a noise {self._name}",
                f"{name}() whose {self._name} was never estimated",
                f"Call fit_model or estimate_noise(model, data), or give {name}({self._name}=...).",
            )
        return self._noise

    def log_prob(self, outputs: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        r"""Log-density of a row, nats, (..., B); raises `ShapeError` unless there is noise for each of its numbers."""
        noise = self._known
        if isinstance(noise, Tensor) and noise.numel() not in {1, target[0].numel()}:
            raise ShapeError(
                f"a {self._name} for each of the {target[0].numel()} numbers of a row",
                f"{noise.numel()} of them",
                f"Give as many {self._name}s as a row has numbers.",
            )
        return super().log_prob(outputs, target, mask)

    def start_noise(self) -> None:
        """Set noise that is not known yet to 1: outputs can then be scored while statistics are gathered."""
        if self._noise is None:
            self._noise = 1.0

    def noise_statistics(self, outputs: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        r"""Sums over rows and draws that `update_noise` turns into noise; those of batches add up.

        Args:
            outputs: (B, \*O) or (K, S, B, \*O).
            target: (B, \*D), D as the outputs explain it.
            mask: True where a number counts, (B, \*D).

        Returns:
            (n_statistics * D,) for noise of every number, (n_statistics,) for shared noise; float64.
        """
        outputs, target = outputs.double(), target.double()
        if mask is not None:
            outputs = torch.where(self.output_mask(mask), outputs, 0.0)
            target = torch.where(mask, target, 0.0)
        terms = self._terms(outputs, target)  # (n_statistics, ..., B, *D)
        if mask is not None:
            terms = torch.where(mask, terms, 0.0)
        terms = terms.reshape(self.n_statistics, -1, target[0].numel()).sum(1)
        return (terms if self.per_output else terms.sum(-1)).flatten()

    def update_noise(self, statistics: Tensor) -> bool:
        """Set the noise from the sums of one pass; returns whether another pass would move it."""
        raise NotImplementedError

    def _terms(self, outputs: Tensor, target: Tensor) -> Tensor:
        r"""What every number adds to the statistics, (n_statistics, ..., B, \*D)."""
        raise NotImplementedError

    def _totals(self, statistics: Tensor, count: int) -> Tensor:
        """Statistics (n_statistics, D or 1), numbers that nobody observed filled with the sums over the others."""
        sums = statistics.detach().double().cpu().reshape(self.n_statistics, -1)
        whole = sums.sum(1, keepdim=True)
        if not bool(whole[count] > 0):
            raise DataError("an observed entry to estimate the noise on", "none", "Every entry of every row is masked.")
        return torch.where(sums[count] > 0, sums, whole)

    def _store(self, noise: Tensor) -> None:
        self._noise = noise.clone() if self.per_output else float(noise)

    def _like(self, outputs: Tensor) -> float | Tensor:
        r"""The noise as it multiplies numbers (..., B, \*D) of this dtype and device."""
        noise = self._known
        if not isinstance(noise, Tensor):
            return noise
        if noise.numel() == 1:
            return noise.to(outputs).reshape(())
        for n_axes in range(1, outputs.dim()):
            shape = outputs.shape[-n_axes:]
            if shape.numel() == noise.numel():
                return noise.to(outputs).reshape(shape)
        raise ShapeError(
            f"a {self._name} for each of the numbers of a row",
            f"{noise.numel()} of them for numbers (..., B, *D) of shape {tuple(outputs.shape)}",
            f"Give as many {self._name}s as a row has numbers.",
        )

    def get_extra_state(self) -> Tensor:
        """The noise for ``state_dict``, () or (D,), float64; NaN while unknown."""
        noise = math.nan if self._noise is None else self._noise
        return torch.as_tensor(noise, dtype=torch.float64).clone()

    def set_extra_state(self, state: Tensor) -> None:
        """Take the noise from a ``state_dict``; raises `DataError` if it is no noise."""
        state = torch.as_tensor(state, dtype=torch.float64).detach().cpu()
        if state.dim() and not self.per_output:
            raise ShapeError("one noise number", f"{state.numel()} in the state", "Give per_output=True, as was saved.")
        is_unknown = state.dim() == 0 and bool(state.isnan())
        if not is_unknown and not _is_positive(state):
            raise DataError(f"positive, finite {self._name}s in the state", f"{state}", "Was the file damaged?")
        self._noise = None if is_unknown else state.clone() if state.dim() else float(state)

    @property
    def arguments(self) -> dict[str, Any]:
        """Constructor arguments as JSON can write them; what was learned travels in ``state_dict`` instead."""
        return {self._name: self._given, "per_output": self.per_output}


def check_positive(name: str, value: float) -> None:
    """Raise unless ``value`` is positive and finite.

    Args:
        name: Of the argument.
        value: Its value.

    Raises:
        DataError: Naming both.
    """
    if not (0 < value < math.inf):
        raise DataError(f"a positive, finite {name}", repr(value), f"Give {name} in the units of the data.")


def _is_positive(values: Tensor) -> bool:
    return bool(((values > 0) & values.isfinite()).all())


def log(value: float | Tensor) -> float | Tensor:
    """Natural logarithm of either."""
    return value.log() if isinstance(value, Tensor) else math.log(value)


def root(value: float | Tensor) -> float | Tensor:
    """Square root of either."""
    return value.sqrt() if isinstance(value, Tensor) else math.sqrt(value)
