"""The likelihood of a table: every column has a likelihood of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from bayesae.errors import BayesAEError, DataError, ShapeError, UnsupportedError
from bayesae.likelihoods.base import Head, float64_of
from bayesae.likelihoods.bernoulli import Bernoulli
from bayesae.likelihoods.categorical import Categorical
from bayesae.likelihoods.gaussian import Gaussian
from bayesae.likelihoods.noise import NoisyHead
from bayesae.types import BlockHessian, LowRankHessian, OutputHessian

__all__ = ["Mixed"]

_MAX_CLASSES = 10  # of a column that `Mixed.of` takes as classes


class Mixed(Head):
    r"""Columns of a table, independent given the code, each with a likelihood of its own.

    .. math:: \log p(x \mid f) = \sum_c \log p_c(x_c \mid f_{(c)})

    Data are (B, n_columns). Outputs are flat, (B, n_outputs): column after column as many as its likelihood has
    parameters (C for a `Categorical`), so that a decoder ends in a linear layer of ``likelihood.n_outputs``.

    Args:
        columns: A likelihood for every column, in order; one object given for several is copied, so that each learns
            noise of its own. A `Categorical` needs ``values``, so that the column has a mean: ``values=range(C)`` if
            classes are numbered without an order, whose densities do not depend on it.

    The Hessian is a diagonal, with C dense rows more for each categorical column. Noise is learned column by column.

    Exact when: every column's likelihood is; `normal_moments` if all columns have them, else None (a categorical
        column has none, and moments of the table come from draws).
    Biased when: `log_predictive` of a categorical column is a rounded Normal; densities from draws are exact.
    Cost: one pass per column.

    Raises:
        DataError: If there is no column, or a column's data are none of its likelihood's.
        ShapeError: If outputs or rows have another size.
        UnsupportedError: If a column is a categorical one without values, or no likelihood of single numbers.

    References:
        | Handling incomplete heterogeneous data using VAEs (Nazabal et al., 2020)
    """

    def __init__(self, columns: Sequence[Head]) -> None:
        super().__init__()
        if len(columns) == 0:
            raise DataError("at least one column", "none", "Give a likelihood for every column, or use Mixed.of(x).")
        for index, column in enumerate(columns):
            if isinstance(column, Mixed) or not isinstance(column, Head):
                raise UnsupportedError(
                    f"a likelihood of single numbers for column {index}", repr(column), "Give likelihoods.Gaussian()."
                )
            if isinstance(column, Categorical) and column.values is None:
                raise UnsupportedError(
                    f"values for the classes of column {index}",
                    repr(column),
                    f"Give Categorical({column.n_parameters}, values=range({column.n_parameters})), say.",
                )
        # what one column learns is its own, also where one object was given for several
        own = [copy.deepcopy(head) if head in columns[:index] else head for index, head in enumerate(columns)]
        self.columns = nn.ModuleList(own)
        stops = torch.tensor([column.n_parameters for column in columns]).cumsum(0).tolist()
        self._parts = [slice(a, b) for a, b in zip([0, *stops[:-1]], stops, strict=True)]

    @classmethod
    def of(cls, x: Tensor | np.ndarray) -> Mixed:
        r"""Likelihoods guessed from a table: a start, to be read before it is used.

        A column of 0 and 1 is `Bernoulli`; one of whole numbers between 0 and 9 `Categorical` with the values from 0
        to the largest (those that are missing here may come in new rows); any other `Gaussian` with a learned scale.
        NaN count as missing.

        Args:
            x: (N, n_columns).

        Returns:
            The likelihood.

        Raises:
            ShapeError: If it is no table.
            DataError: If a column has no entry, or entries are no numbers.
        """
        table = float64_of("a table of numbers", x)
        if table.dim() != 2:
            raise ShapeError("a table (N, n_columns)", f"shape {tuple(table.shape)}", "Flatten the rows.")
        columns: list[Head] = []
        for index, column in enumerate(table.T):
            found = column[~column.isnan()].unique()
            if len(found) == 0:
                raise DataError(f"entries in column {index}", "none", "Drop the column.")
            if bool(((found == 0) | (found == 1)).all()):
                columns.append(Bernoulli())
            elif len(found) > 1 and bool(((found == found.round()) & (found >= 0) & (found < _MAX_CLASSES)).all()):
                n_classes = int(found.max()) + 1
                columns.append(Categorical(n_classes, range(n_classes)))
            else:
                columns.append(Gaussian())
        return cls(columns)

    @property
    def heads(self) -> list[Head]:
        """The columns' likelihoods."""
        return list(self.columns)  # pyright: ignore[reportReturnType] - checked where they came in

    @property
    def n_outputs(self) -> int:
        """Outputs that the decoder must have."""
        return self._parts[-1].stop

    @property
    def arguments(self) -> dict[str, Any]:
        """Constructor arguments, each column as its name and its own arguments."""
        return {"columns": [[type(head).__name__, head.arguments] for head in self.heads]}

    @property
    def is_fisher(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether any column's Hessian is a Fisher information."""
        return any(head.is_fisher for head in self.heads)

    @property
    def is_learned(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether any column learns noise."""
        return any(head.is_learned for head in self.heads)

    @property
    def is_estimated(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the noise of all columns is known."""
        return all(head.is_estimated for head in self.heads)

    def data_shape(self, output_shape: torch.Size) -> torch.Size:
        """(n_columns,); raises `ShapeError` unless there are ``n_outputs`` flat outputs."""
        if torch.Size(output_shape) != (self.n_outputs,):
            raise ShapeError(
                f"outputs (B, {self.n_outputs}) for {len(self.columns)} columns",
                f"(B, {', '.join(map(str, output_shape))})",
                "End the decoder in a linear layer of likelihood.n_outputs.",
            )
        return torch.Size((len(self.columns),))

    def output_mask(self, mask: Tensor) -> Tensor:
        """(B, n_columns), or rows of another shape with as many numbers, to (B, n_outputs)."""
        sizes = torch.tensor([head.n_parameters for head in self.heads], device=mask.device)
        return mask.flatten(1).repeat_interleave(sizes, -1, output_size=self.n_outputs)

    def check(self, target: Tensor) -> None:
        """Raise unless every column of ``target`` (B, n_columns) suits its likelihood.

        Args:
            target: The table.

        Raises:
            ShapeError: If there are more or fewer columns.
            BayesAEError: A column's own, which it names.
        """
        rows = target.flatten(1)
        if rows.shape[1] != len(self.columns):
            raise ShapeError(f"{len(self.columns)} columns", f"{rows.shape[1]}", "One likelihood for every column.")
        for index, head in enumerate(self.heads):
            with _naming(index):
                head.check(rows[:, index])

    def _outputs(self, outputs: Tensor) -> list[Tensor]:
        """Outputs of every column: (..., B), or (..., B, g)."""
        parts = (outputs[..., part] for part in self._parts)
        return [part if head.n_parameters > 1 else part[..., 0] for head, part in zip(self.heads, parts, strict=True)]

    def _each(self, rule: Callable[..., Tensor], *arguments: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
        """Stack ``rule(head, *columns)`` over columns, (..., B, n_columns)."""
        return torch.stack([rule(*column) for column in zip(self.heads, *arguments, strict=True)], dim=-1)

    def log_density(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Log-density of every number, nats, (..., B, n_columns)."""
        return self._each(lambda head, f, x: head.log_density(f, x), self._outputs(outputs), target.unbind(-1))

    def attainable(self, target: Tensor) -> Tensor:
        """Column by column, (B, n_columns)."""
        return self._each(lambda head, x: head.attainable(x), target.unbind(-1))

    def distribution(self, outputs: Tensor) -> torch.distributions.Distribution:
        """The columns' laws side by side: batch shape (..., B, n_columns)."""
        laws = [head.distribution(f) for head, f in zip(self.heads, self._outputs(outputs), strict=True)]
        return _Columns(laws, torch.Size((*outputs.shape[:-1], len(laws))))

    def mean(self, outputs: Tensor) -> Tensor:
        """Mean of every column, (..., B, n_columns)."""
        return self._each(lambda head, f: head.mean(f), self._outputs(outputs))

    def variance(self, outputs: Tensor) -> Tensor:
        """Noise variance of every column, (..., B, n_columns)."""
        return self._each(lambda head, f: head.variance(f), self._outputs(outputs))

    def output_hessian(self, outputs: Tensor) -> OutputHessian:
        """A diagonal (B, n_outputs), or a `LowRankHessian` where columns have blocks; a Fisher where `is_fisher`."""
        diagonal, rows = torch.zeros_like(outputs), []
        for head, part, own in zip(self.heads, self._parts, self._outputs(outputs), strict=True):
            hessian = head.output_hessian(own)
            if isinstance(hessian, Tensor):
                diagonal[..., part] = hessian.expand(own.shape).reshape(*outputs.shape[:-1], -1)
                continue
            if not isinstance(hessian, BlockHessian):
                raise UnsupportedError("a diagonal or blocks", f"{type(hessian).__name__} of {head}", "Use its own.")
            values, vectors = torch.linalg.eigh(hessian.values)
            factor = outputs.new_zeros(len(outputs), head.n_parameters, self.n_outputs)
            factor[..., part] = values.clamp(min=0).sqrt()[..., None] * vectors.mT
            rows.append(factor)
        return LowRankHessian(torch.cat(rows, 1), diagonal) if rows else diagonal

    def normal_moments(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """Column by column, (..., B, n_columns) each; None if a column has none."""
        parts = zip(self.heads, self._outputs(mean), self._outputs(var), strict=True)
        found = [head.normal_moments(m, v) for head, m, v in parts]
        if any(moments is None for moments in found):
            return None
        first, noise, spread = (torch.stack(part, -1) for part in zip(*found, strict=True))  # pyright: ignore[reportArgumentType]
        return first, noise, spread

    def log_predictive(self, mean: Tensor, var: Tensor, target: Tensor) -> Tensor:
        """Column by column, (B, n_columns)."""
        moments = (part.unbind(-1) for part in (mean, var, target))
        return self._each(lambda head, m, v, x: head.log_predictive(m, v, x), *moments)

    @property
    def _learners(self) -> list[tuple[int, NoisyHead]]:
        return [(i, head) for i, head in enumerate(self.heads) if isinstance(head, NoisyHead) and head.is_learned]

    def start_noise(self) -> None:
        """Set noise that no pass has estimated to 1, in every column."""
        for _, head in self._learners:
            head.start_noise()

    def noise_statistics(self, outputs: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """Statistics of the columns that learn, one after the other.

        Args:
            outputs: (B, n_outputs) or (K, S, B, n_outputs).
            target: (B, n_columns).
            mask: True where a number counts, (B, n_columns).

        Returns:
            Float64, (sum of the columns' own lengths,).
        """
        parts = self._outputs(outputs)
        masks = [None if mask is None else mask[:, i] for i in range(len(parts))]
        return torch.cat([head.noise_statistics(parts[i], target[:, i], masks[i]) for i, head in self._learners])

    def update_noise(self, statistics: Tensor) -> bool:
        """Update every column that learns.

        Args:
            statistics: Sums of `noise_statistics`.

        Returns:
            Whether another pass would move any of them.
        """
        pieces, is_moving = statistics.split([head.n_statistics for _, head in self._learners]), False
        for (index, head), piece in zip(self._learners, pieces, strict=True):
            with _naming(index):
                is_moving |= head.update_noise(piece)
        return is_moving


@contextmanager
def _naming(index: int) -> Generator[None, None, None]:
    """Say in which column an error arose."""
    try:
        yield
    except BayesAEError as error:
        raise type(error)(f"in column {index} {error.expected}", error.got, error.fix) from error


class _Columns(torch.distributions.Distribution):
    """Independent laws side by side along the last axis."""

    def __init__(self, laws: list[torch.distributions.Distribution], shape: torch.Size) -> None:
        self.laws = laws
        super().__init__(shape, validate_args=False)

    @property
    def arg_constraints(self) -> dict[str, constraints.Constraint]:
        return {}

    @property
    def support(self) -> constraints.Constraint:
        return constraints.real

    @property
    def mean(self) -> Tensor:
        return torch.stack([law.mean for law in self.laws], -1)

    @property
    def variance(self) -> Tensor:
        return torch.stack([law.variance for law in self.laws], -1)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return torch.stack([law.sample(torch.Size(sample_shape)) for law in self.laws], -1)

    def log_prob(self, value: Tensor) -> Tensor:
        return torch.stack([law.log_prob(x) for law, x in zip(self.laws, value.unbind(-1), strict=True)], -1)
