"""What a predictive streams with: running moments, the linearised network, sizes of chunks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from bayesae.data import check_counts
from bayesae.draws import Moments
from bayesae.errors import ShapeError
from bayesae.forward_mode import jvp
from bayesae.types import Batch, Likelihood, Params

__all__ = ["Pool", "check_chunk", "check_size", "chunks", "joined", "linearise", "spread"]

ROWS_AT_ONCE = 4096  # network rows (weight draws times code draws times data rows) in one call


def spread(values: Tensor) -> Tensor:
    """Variance over the first axis, divisor its size: ``var`` takes a hundred forward passes' time over few rows."""
    if len(values) == 1:
        return torch.zeros_like(values[0])
    return (values - values.mean(0)).square_().mean(0)


class Pool:
    """Running means over weight draws, and the running variance of the first, by Chan's update."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, mean: Tensor, noise: Tensor, code: Tensor) -> None:
        r"""Take in draws (S', B, \*O)."""
        new, n_new = (mean.mean(0), noise.mean(0), code.mean(0), spread(mean)), len(mean)
        if self.count == 0:
            self.mean, self.noise, self.code, self.weights = new
        else:
            share = n_new / (self.count + n_new)
            shift = new[0] - self.mean
            self.weights = self.weights + share * (new[3] - self.weights) + share * (1 - share) * shift**2
            self.mean = self.mean + share * shift
            self.noise = self.noise + share * (new[1] - self.noise)
            self.code = self.code + share * (new[2] - self.code)
        self.count += n_new

    def moments(self, likelihood: Likelihood, is_exact: bool) -> Moments:
        """What was taken in; the error of the mean from the spread over weight draws, infinite for one draw."""
        error = None
        if not is_exact:
            unknown = torch.full_like(self.mean, torch.inf)
            error = torch.sqrt(self.weights / (self.count - 1)) if self.count > 1 else unknown
        return Moments(self.mean, self.noise, self.code, self.weights, likelihood, error)


def linearise(run: Callable[[Params], tuple[Tensor, ...]], mean: Params, params: Params) -> tuple[Tensor, ...]:
    r"""First-order expansion of ``run`` around ``mean`` (leaves (1, \*shape)), at every draw: leading axis S."""

    def one(shift: Params) -> tuple[Tensor, ...]:
        value, slope = jvp(run, (mean,), (shift,))
        return tuple(v + s for v, s in zip(value, slope, strict=True))

    shifts = {name: (params[name] - leaf)[:, None] for name, leaf in mean.items()}
    # what is random in there is keyed on the row, and no draw of the weights is to have its own
    return torch.func.vmap(one, randomness="same")(shifts)


def check_chunk(chunk_size: int | None) -> int:
    """Network rows in one call; raises `DataError` unless at least 1."""
    if chunk_size is not None:
        check_counts(chunk_size=chunk_size)
    return ROWS_AT_ONCE if chunk_size is None else chunk_size


def check_size(likelihood: Likelihood, output_shape: torch.Size, rows: Tensor) -> None:
    """Raise `ShapeError` unless outputs explain as many numbers as a row has."""
    shape = likelihood.data_shape(output_shape)
    if math.prod(shape) != math.prod(rows.shape[1:]):
        raise ShapeError(
            f"outputs for rows of shape {tuple(rows.shape[1:])}",
            f"outputs of shape {tuple(output_shape)}, which explain {tuple(shape)}",
            "Give the decoder as many outputs as a row has numbers (times the likelihood's parameters a number).",
        )


def chunks(rows: Batch, n_calls: int, chunk_size: int) -> Iterator[Batch]:
    """Consecutive rows, as many at a time as their ``n_calls`` draws each leave room for, at least one."""
    assert rows.index is not None
    for index in rows.index.split(max(1, chunk_size // n_calls)):
        part = slice(int(index[0]), int(index[-1]) + 1)
        yield Batch(**{name: value[part] for name, value in rows._asdict().items() if value is not None})


def joined(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Results of consecutive rows, (B', ...) each, along the rows; of the names that all parts have."""
    names = [name for name in parts[0] if all(name in part for part in parts)]
    return {name: torch.cat([part[name] for part in parts]) for name in names}
