r"""What a layer did to one batch, and how rows go back and tangents forward through it.

Rows are cotangents (B or 1, R, \*out), tangents (B or 1, K, \*in): the axis of size 1 is for what is the same for
every datum. Neither is ever summed over B.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from bayesae.forward_mode import jvp
from bayesae.types import Params

__all__ = [
    "AddStep",
    "AffineStep",
    "FixedLinearStep",
    "InputStep",
    "OpaqueStep",
    "ReshapeStep",
    "SlopeStep",
    "Step",
    "folded",
]

Function = Callable[..., Tensor]


def folded(function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    r"""Apply a function of (N, \*shape) to (B, R, \*shape)."""
    return function(rows.flatten(0, 1)).unflatten(0, rows.shape[:2])


@dataclass(frozen=True)
class Step:
    r"""One layer at one batch.

    Args:
        name: Of the layer, for messages and keys.
        sources: Indices of the steps whose values it took.
        value: What came out, (B, \*out).
    """

    name: str
    sources: tuple[int, ...]
    value: Tensor

    @property
    def names(self) -> Sequence[str]:
        """Names of the parameters of its own."""
        return ()

    @property
    def width(self) -> int:
        """Numbers a row."""
        return self.value[0].numel()

    def pull(self, rows: Tensor) -> tuple[Tensor, ...]:
        r"""Rows at the output to rows at each source, (B or 1, R, \*in)."""
        raise NotImplementedError

    def push(self, tangents: Sequence[Tensor | None]) -> Tensor:
        r"""Tangents at the sources (None for 0) to tangents at the output, (B or 1, K, \*out)."""
        raise NotImplementedError

    def gradients(self, rows: Tensor) -> Params:
        r"""Per datum and row the gradient in its own parameters, {name: (B, R, \*shape)}."""
        raise NotImplementedError

    def push_parameters(self, tangents: Params) -> Tensor:
        r"""Tangents of its own parameters {name: (K, \*shape)} to tangents at the output, (B or 1, K, \*out)."""
        raise NotImplementedError

    def gradient_sums(self, rows: Tensor) -> Params:
        r"""The same summed over data, {name: (R, \*shape)}."""
        return {name: leaf.sum(0) for name, leaf in self.gradients(rows).items()}

    def power_sums(self, rows: Tensor, power: int = 2) -> Params:
        """Sums over data and rows of a power of the gradients, 2 or 4, in the parameters' shapes."""
        return {name: (leaf**power).sum((0, 1)) for name, leaf in self.gradients(rows).items()}

    def take(self, rows: slice) -> Step:
        """The same step for some of the data."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: _rows(v, rows) for k, v in tensors.items() if k in self.per_row})

    @property
    def per_row(self) -> Sequence[str]:
        """Fields with an axis of data."""
        return ("value",)


def _rows(value: Any, rows: slice) -> Any:  # noqa: ANN401 - a tensor or a tuple of them
    if isinstance(value, tuple):
        return tuple(_rows(one, rows) for one in value)
    return value[rows] if value.shape[0] > 1 else value


@dataclass(frozen=True)
class InputStep(Step):
    """The data, or what is computed from them without parameters."""

    def pull(self, rows: Tensor) -> tuple[Tensor, ...]:
        """It has no sources."""
        return ()


@dataclass(frozen=True)
class ReshapeStep(Step):
    r"""The same numbers in the same order in another shape.

    Args:
        shape: Of a row of the source, \*in.
    """

    shape: torch.Size

    def pull(self, rows: Tensor) -> tuple[Tensor, ...]:
        """As it says."""
        return (rows.reshape(*rows.shape[:2], *self.shape),)

    def push(self, tangents: Sequence[Tensor | None]) -> Tensor:
        """As it says."""
        (tangent,) = tangents
        assert tangent is not None
        return tangent.reshape(*tangent.shape[:2], *self.value.shape[1:])


@dataclass(frozen=True)
class SlopeStep(Step):
    r"""An element-wise function.

    Args:
        slope: Its derivative, (B or 1, \*out).
    """

    slope: Tensor

    @property
    def per_row(self) -> Sequence[str]:
        """Value and slope."""
        return ("value", "slope")

    def pull(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Multiplies by the slope."""
        return (rows * self.slope[:, None],)

    def push(self, tangents: Sequence[Tensor | None]) -> Tensor:
        """Multiplies by the slope."""
        (tangent,) = tangents
        assert tangent is not None
        return tangent * self.slope[:, None]


@dataclass(frozen=True)
class AffineStep(SlopeStep):
    r"""An element-wise function that is linear in a scale and a shift of its own, one a channel.

    Batch normalisation in evaluation mode; PReLU, whose scale multiplies min(x, 0).

    Args:
        weight: Name of the scale, or None.
        bias: Name of the shift, or None.
        scaled: What the scale multiplies, (B, C, \*positions).
        n_channels: Length of scale and shift: C, or 1 where all channels share it.
    """

    weight: str | None
    bias: str | None
    scaled: Tensor
    n_channels: int

    @property
    def per_row(self) -> Sequence[str]:
        """Value, slope and what is scaled."""
        return ("value", "slope", "scaled")

    @property
    def names(self) -> Sequence[str]:
        """Scale and shift."""
        return [name for name in (self.weight, self.bias) if name is not None]

    def _by_channel(self, values: Tensor) -> Tensor:
        values = values.expand(len(self.value), *values.shape[1:])
        values = values.flatten(3).sum(-1) if values.dim() > 3 else values
        return values if self.n_channels > 1 else values.sum(-1, keepdim=True)

    def gradients(self, rows: Tensor) -> Params:
        """Sums over positions."""
        result = {}
        if self.weight is not None:
            result[self.weight] = self._by_channel(rows * self.scaled[:, None])
        if self.bias is not None:
            result[self.bias] = self._by_channel(rows)
        return result

    def push_parameters(self, tangents: Params) -> Tensor:
        """Per channel."""
        shape = (1, -1, self.n_channels, *[1] * (self.value.dim() - 2))
        total = self.value.new_zeros(1, 1, *self.value.shape[1:])
        if self.weight is not None and self.weight in tangents:
            total = total + tangents[self.weight].reshape(shape) * self.scaled[:, None]
        if self.bias is not None and self.bias in tangents:
            total = total + tangents[self.bias].reshape(shape)
        return total


@dataclass(frozen=True)
class FixedLinearStep(Step):
    r"""A linear function without parameters: up-sampling, average pooling, padding.

    Args:
        function: Of (N, \*in).
        transpose: Of (N, \*out), back to (N, \*in).
    """

    function: Callable[[Tensor], Tensor]
    transpose: Callable[[Tensor], Tensor]

    def pull(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Its transpose."""
        return (folded(self.transpose, rows),)

    def push(self, tangents: Sequence[Tensor | None]) -> Tensor:
        """The function itself."""
        (tangent,) = tangents
        assert tangent is not None
        return folded(self.function, tangent)


@dataclass(frozen=True)
class AddStep(Step):
    """A sum of sources of one shape, each times a number: residual and skip connections.

    Args:
        signs: One number a source.
    """

    signs: tuple[float, ...]

    def pull(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Copies."""
        return tuple(rows if sign == 1 else rows * sign for sign in self.signs)

    def push(self, tangents: Sequence[Tensor | None]) -> Tensor:
        """Sums."""
        given = [t if s == 1 else t * s for t, s in zip(tangents, self.signs, strict=True) if t is not None]
        return sum(given[1:], given[0])


@dataclass(frozen=True)
class OpaqueStep(Step):
    r"""Anything else: products with its Jacobian come from torch.func.

    Args:
        function: Of parameters by their names and the sources' values.
        inputs: The sources' values, each (B, \*in).
        params: Parameters of its own, by name in the network.
        is_sized: Whether it may hold the number of data, so that it does not serve fewer of them.
    """

    function: Function
    inputs: tuple[Tensor, ...]
    params: Params
    is_sized: bool = False

    @property
    def per_row(self) -> Sequence[str]:
        """Value and inputs."""
        return ("value", "inputs")

    @property
    def names(self) -> Sequence[str]:
        """Every parameter it was given."""
        return list(self.params)

    def pull(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Vector-Jacobian products, mapped over rows."""
        rows = rows.expand(len(self.value), *rows.shape[1:])
        vjp = torch.func.vjp(lambda *inputs: self.function(self.params, *inputs), *self.inputs)[1]
        return mapped(vjp, 1, rows)

    def push(self, tangents: Sequence[Tensor | None]) -> Tensor:
        """Jacobian-vector products, mapped over tangents."""
        n = next(t.shape[1] for t in tangents if t is not None)
        full = tuple(
            (value.new_zeros(1, 1, *value.shape[1:]) if t is None else t).expand(len(value), n, *value.shape[1:])
            for t, value in zip(tangents, self.inputs, strict=True)
        )

        def along(*one: Tensor) -> Tensor:
            return jvp(lambda *inputs: self.function(self.params, *inputs), self.inputs, one)[1]

        return mapped(along, 1, *full)

    def gradients(self, rows: Tensor) -> Params:
        """Vector-Jacobian products of single data, mapped over data and rows."""
        rows = rows.expand(len(self.value), *rows.shape[1:])

        def of_one(some: Tensor, *inputs: Tensor) -> Params:
            def run(params: Params) -> Tensor:
                return self.function(params, *(value[None] for value in inputs))[0]

            vjp = torch.func.vjp(run, self.params)[1]
            return mapped(lambda row: vjp(row)[0], 0, some)

        return mapped(of_one, 0, rows, *self.inputs)

    def push_parameters(self, tangents: Params) -> Tensor:
        """Jacobian-vector products, mapped over tangents."""
        n = next(iter(tangents.values())).shape[0]
        full = {k: tangents[k] if k in tangents else v.new_zeros(n, *v.shape) for k, v in self.params.items()}

        def along(one: Params) -> Tensor:
            return jvp(lambda params: self.function(params, *self.inputs), (self.params,), (one,))[1]

        moved = mapped(lambda *leaves: along(dict(zip(full, leaves, strict=True))), 0, *full.values())
        return moved.movedim(0, 1)


def mapped(function: Callable[..., Any], axis: int, *tensors: Tensor) -> Any:  # noqa: ANN401 - a tree of tensors
    """vmap, or a loop where a layer does not allow it."""
    try:
        with warnings.catch_warnings():
            # of torch's own internals: a layer without a batching rule is looped over, which is what is wanted
            warnings.filterwarnings("ignore", message="There is a performance drop")
            warnings.filterwarnings("ignore", message=".*torch.jit.script. is deprecated")
            return torch.func.vmap(function, in_dims=axis, out_dims=axis)(*tensors)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        results = [function(*(t.select(axis, i) for t in tensors)) for i in range(tensors[0].shape[axis])]
        leaves = [tree_flatten(result)[0] for result in results]
        stacked = [torch.stack(list(some), axis) for some in zip(*leaves, strict=True)]
        return tree_unflatten(stacked, tree_flatten(results[0])[1])


def module_function(module: nn.Module, local: dict[str, str], others: dict[str, Tensor]) -> Function:
    """A module as a function of parameters named as in the network, for `OpaqueStep`.

    Args:
        module: Any module.
        local: Name in the network of each of its parameters, by its own name.
        others: Buffers, by the module's own names.

    Returns:
        The function.
    """

    def function(params: Params, *inputs: Tensor) -> Tensor:
        values = {mine: params[name] for mine, name in local.items()}
        return torch.func.functional_call(module, values | others, inputs)

    return function
