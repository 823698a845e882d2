"""What metrics ask of their arguments: tensors apart from any graph, of shapes that are one and not broadcast."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from bayesae.data import as_tensor, check_counts
from bayesae.errors import DataError, ShapeError

__all__ = ["Numbers", "check_resampling", "check_rows", "check_share", "law_of", "tensor_of", "values_of"]

Numbers: TypeAlias = Tensor | np.ndarray


def tensor_of(values: Numbers | float, like: Tensor | None = None) -> Tensor:
    """The tensor itself, or one of what numpy reads, on the device of ``like``; truth values are 0 and 1 there."""
    tensor = values if isinstance(values, Tensor) else as_tensor(values).reshape(np.shape(values))
    if like is None:
        return tensor
    return tensor.to(like.device, like.dtype if tensor.dtype == torch.bool else None)


def values_of(values: Numbers, what: str = "scores") -> Tensor:
    """One number a row, (N,), on the CPU and apart from any graph."""
    tensor = tensor_of(values).detach().cpu()
    if tensor.dim() != 1:
        raise ShapeError(f"{what} (N,), one a row", f"{tuple(tensor.shape)}", "Reduce or flatten them.")
    return tensor


def law_of(mean: Numbers, var: Numbers | float, x: Numbers) -> tuple[Tensor, Tensor, Tensor]:
    """Moments of a law and what came; of means (B, 1) and data (B,) nobody means B squared numbers."""
    mean = tensor_of(mean)
    var, x = tensor_of(var, mean), tensor_of(x, mean)
    if mean.shape != x.shape or (var.dim() > 0 and var.shape != x.shape):
        got = ", ".join(f"{tuple(part.shape)}" for part in (mean, var, x))
        raise ShapeError("mean, variance and x of one shape", got, "Reshape x as the moments have it.")
    return mean, var, x


def check_rows(x: Tensor, is_pooled: bool) -> None:
    """Raise if numbers by pixel are asked for where there are no rows to average over."""
    if not is_pooled and x.dim() == 0:
        raise ShapeError("rows (B, ...) for numbers by pixel", "one number, ()", "Pool it, or give rows.")


def check_share(name: str, value: float) -> None:
    """Raise unless a level is in (0, 1)."""
    if not 0 < value < 1:
        raise DataError(f"{name} in (0, 1)", f"{value}", "0.95 is 95 %.")


def check_resampling(level: float, n_resamples: int) -> None:
    """Raise unless a percentile interval of so many resamples is one."""
    check_share("a level", level)
    check_counts(n_resamples=n_resamples)
