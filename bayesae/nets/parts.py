"""What the networks are built of: activations, normalisation, residual blocks, one-hot tokens."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bayesae.errors import DataError, ShapeError, UnsupportedError

__all__ = [
    "ACTIVATIONS",
    "LAYERS",
    "FlatRows",
    "MoveAxis",
    "OneHot",
    "Residual",
    "after_layer",
    "halved",
    "normalisation",
    "plain_sizes",
]

ACTIVATIONS: dict[str, type[nn.Module]] = {
    layer.__name__: layer
    for layer in (
        nn.CELU, nn.ELU, nn.GELU, nn.Identity, nn.LeakyReLU, nn.Mish, nn.ReLU, nn.SELU, nn.SiLU, nn.Sigmoid,
        nn.Softplus, nn.Softsign, nn.Tanh,
    )
}  # fmt: skip
"""Activations that a recipe may name."""

LARGEST_SIZE = 2**24  # of one width, axis or number of tokens
LARGEST_COUNT = 64  # layers, axes, residual blocks in a place

_LISTS = {"hidden", "n_out", "channels", "shape", "sizes", "widths"}  # arguments that may be lists

Activation = Callable[[], nn.Module]


def plain_sizes(**sizes: object) -> list[Any]:
    """Sizes as Python's own whole numbers, each from 1 to 2^24, or tuples of at most 64 such numbers.

    Args:
        **sizes: By the name of their argument, numpy's whole numbers too; ``n_residual`` and ``n_context`` may be 0,
            the first at most 64.

    Returns:
        The sizes in their order.

    Raises:
        DataError: Naming the first that is no size.
    """
    plain: list[Any] = []
    for name, value in sizes.items():
        low = 0 if name in {"n_residual", "n_context"} else 1
        high = LARGEST_COUNT if name == "n_residual" else LARGEST_SIZE
        given = value if isinstance(value, (tuple, list)) and name in _LISTS else None
        parts = [_whole(part) for part in ([value] if given is None else given)]
        if len(parts) > LARGEST_COUNT or any(part is None or not low <= part <= high for part in parts):
            shown = repr(value) if len(repr(value)) < 60 else f"{repr(value)[:60]}..."
            fix = f"At most {LARGEST_COUNT} numbers in a list."
            raise DataError(f"whole numbers from {low} to {high} for {name}", shown, fix)
        plain.append(parts[0] if given is None else tuple(parts))
    return plain


def _whole(value: Any) -> int | None:  # noqa: ANN401 - anything a caller or a recipe gives
    """A whole number as Python's own; None if it is none, or a truth value."""
    try:
        return None if isinstance(value, (bool, np.bool_)) else operator.index(value)
    except TypeError:
        return None


def normalisation(norm: str | None, width: int, n_axes: int) -> list[nn.Module]:
    """A normalisation layer for (B, width) or (B, width, positions), or none.

    Args:
        norm: "layer" over all numbers of a row (one group), "group" over groups of channels, at most 8, or None.
        width: Channels.
        n_axes: Axes of positions; 0 for vectors.

    Returns:
        At most one layer.

    Raises:
        DataError: If there is no such normalisation.
    """
    if norm is None:
        return []
    if norm == "layer":
        return [nn.GroupNorm(1, width) if n_axes else nn.LayerNorm(width)]
    if norm == "group" and n_axes:
        return [nn.GroupNorm(math.gcd(8, width), width)]
    known = '"layer", "group" or None' if n_axes else '"layer" or None'
    raise DataError(f"norm={known}", repr(norm), "Batch normalisation makes rows of a batch depend on one another.")


class Residual(nn.Module):
    r"""A residual block with its activations first, x + f(x), on (B, width) or (B, width, \*positions).

    f is twice normalisation, activation and a linear layer (or a convolution of three taps an axis).

    Args:
        width: Channels.
        n_axes: Axes of positions; 0 for vectors.
        norm: As for `normalisation`.
        activation: Makes the activation.

    Raises:
        UnsupportedError: If the activation writes in place: the sum would read what it wrote.

    References:
        | Identity Mappings in Deep Residual Networks (He, Zhang, Ren, Sun, 2016)
    """

    def __init__(self, width: int, n_axes: int, norm: str | None, activation: Activation) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(2):
            linear = LAYERS[n_axes](width, width, 3, padding=1) if n_axes else nn.Linear(width, width)
            layers += [*normalisation(norm, width, n_axes), activation(), linear]
        if any(getattr(layer, "inplace", False) for layer in layers):
            raise UnsupportedError(
                "activations that leave their input as it is, in residual blocks", "inplace=True", "Use inplace=False."
            )
        self.body = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """X + f(x)."""
        return x + self.body(x)


LAYERS = {1: nn.Conv1d, 2: nn.Conv2d}


def after_layer(
    width: int, sizes: Sequence[int], norm: str | None, n_residual: int, activation: Activation
) -> list[nn.Module]:
    """What follows a hidden layer: residual blocks, normalisation, activation.

    Args:
        width: Channels.
        sizes: Of the axes of positions; none for vectors.
        norm: As for `normalisation`.
        n_residual: Blocks.
        activation: Makes the activation.

    Returns:
        The layers.

    Raises:
        DataError: If a normalisation would leave nothing of what it normalises.
    """
    norms = normalisation(norm, width, len(sizes))
    for layer in norms:
        n = width * math.prod(sizes) // getattr(layer, "num_groups", 1)
        if n < 3:
            # one number becomes 0 and two become -1 and 1, whatever they were
            at = f"{width} channels at {math.prod(sizes)} positions" if sizes else f"a layer of width {width}"
            fix = "Use wider or fewer layers, norm=None" + (', or norm="layer".' if norm == "group" else ".")
            raise DataError(f"at least 3 numbers to normalise with norm={norm!r}", f"{n}, of {at}", fix)
    blocks = [Residual(width, len(sizes), norm, activation) for _ in range(n_residual)]
    return [*blocks, *norms, activation()]


class FlatRows(nn.Module):
    r"""Flattens rows of one shape, (B, \*shape) to (B, n).

    Args:
        shape: Of a row; rows may lack its axes of 1, or be flat. Others of as many numbers, with channels last say,
            would be read in a wrong order.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        """The same numbers in one axis.

        Args:
            x: Rows.

        Returns:
            (B, n).

        Raises:
            ShapeError: If they have another shape.
        """
        given = tuple(x.shape[1:])
        if len(given) != 1 and [n for n in given if n > 1] != [n for n in self.shape if n > 1]:
            fix = "Put channels first, x.movedim(-1, 1) say, or make the encoder for this shape."
            raise ShapeError(f"rows of shape {self.shape}, or flat", f"{given}", fix)
        return x.flatten(1)

    def extra_repr(self) -> str:
        """The shape."""
        return f"{self.shape}"


class MoveAxis(nn.Module):
    r"""Moves an axis of (B, ...) to the end.

    Args:
        axis: Of the input, the batch counted: at least 1.
    """

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        """The same numbers, one axis moved."""
        return x.movedim(self.axis, -1)

    def extra_repr(self) -> str:
        """The axis."""
        return f"{self.axis}"


class OneHot(nn.Module):
    r"""Tokens or labels as unit vectors, (B, \*positions) to (B, n, \*positions), in the input's dtype.

    Args:
        n: Number of tokens; inputs are 0 to n - 1, as numbers of any dtype.
    """

    def __init__(self, n: int) -> None:
        super().__init__()
        (self.n,) = plain_sizes(n=n)

    def forward(self, x: Tensor) -> Tensor:
        """Unit vectors along axis 1.

        Args:
            x: Whole numbers from 0 to n - 1.

        Returns:
            0 and 1.

        Raises:
            DataError: If a number is none of them, or the dtype cannot tell them apart.
        """
        if x.is_floating_point() and self.n > 2 / torch.finfo(x.dtype).eps:
            raise DataError(f"numbers of a dtype that tells {self.n} tokens apart", f"{x.dtype}", "Use float32.")
        tokens = torch.arange(self.n, device=x.device, dtype=x.dtype).reshape(-1, *[1] * (x.dim() - 1))
        is_token = x[:, None] == tokens
        if not holds(is_token.any(1)):
            found = f"values from {float(x.min()):.4g} to {float(x.max()):.4g}, or fractions"
            raise DataError(f"whole numbers from 0 to {self.n - 1}", found, "Number tokens and labels from 0 on.")
        return is_token.to(x.dtype)

    def extra_repr(self) -> str:
        """The number of tokens."""
        return f"{self.n}"


def holds(condition: Tensor) -> bool:
    """Whether all of it is true; inside ``torch.func.vmap``, where nobody may look, taken to be."""
    try:
        return bool(condition.all())
    except RuntimeError:
        return True


def halved(sizes: Sequence[int], n: int) -> list[tuple[int, ...]]:
    """Sizes of an image before and after each of n halvings, rounded down.

    Args:
        sizes: Of the axes.
        n: How often.

    Returns:
        n + 1 sizes, largest first.

    Raises:
        DataError: If an axis has nothing left to halve.
    """
    result = [tuple(sizes)]
    for _ in range(n):
        if min(result[-1]) < 2:
            got = f"{n} halvings of {tuple(sizes)}"
            raise DataError("an axis of at least 2 before every halving", got, "Give fewer channels.")
        result.append(tuple(size // 2 for size in result[-1]))
    return result
