"""Convolutional networks for images and series of any size."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import nn

from bayesae.errors import DataError
from bayesae.nets.parts import LAYERS, FlatRows, MoveAxis, after_layer, halved, plain_sizes
from bayesae.nets.recipe import can_be_built, remember

__all__ = ["channels_of", "conv_decoder", "conv_encoder", "down", "up"]

_TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d}
_SMALLEST = 8  # an axis that is still halved by default
_FIRST, _MOST = 32, 128  # channels by default

Activation = Callable[[], nn.Module]


def channels_of(given: object, sizes: Sequence[int], *, is_decoder: bool) -> tuple[int, ...]:
    """The caller's channels, checked, or the default for axes of these sizes.

    Args:
        given: What the caller gave; None for the default: every axis is halved while all have 8 or more.
        sizes: Of the axes.
        is_decoder: Whether the default starts at the smallest image.

    Returns:
        At least one number.

    Raises:
        DataError: If these are no channels.
    """
    if given is not None:
        (channels,) = plain_sizes(channels=given)
        if not isinstance(channels, tuple) or not channels:
            raise DataError("channels of at least one layer, in a list", repr(given), "Use mlp for no convolution.")
        return channels
    n = max(1, int(math.log2(min(sizes) / _SMALLEST)) + 1 if min(sizes) >= _SMALLEST else 1)
    channels = tuple(min(_FIRST * 2**i, _MOST) for i in range(n))
    return channels[::-1] if is_decoder else channels


def down(
    n_channels: int,
    sizes: Sequence[int],
    n_out: int,
    channels: Sequence[int],
    norm: str | None,
    n_residual: int,
    activation: Activation,
) -> list[nn.Module]:
    r"""Layers from (B, C, \*sizes) to (B, n_out), every convolution halving the axes.

    Args:
        n_channels: C.
        sizes: Of the axes.
        n_out: Outputs.
        channels: Of every convolution.
        norm: As for `conv_encoder`.
        n_residual: Likewise.
        activation: Likewise.

    Returns:
        The layers.
    """
    stages = halved(sizes, len(channels))
    layers: list[nn.Module] = []
    for before, after, stage in zip([n_channels, *channels[:-1]], channels, stages[1:], strict=True):
        layers.append(LAYERS[len(sizes)](before, after, 4, stride=2, padding=1))
        layers += after_layer(after, stage, norm, n_residual, activation)
    return [*layers, nn.Flatten(), nn.Linear(channels[-1] * math.prod(stages[-1]), n_out)]


def up(
    n_in: int,
    n_channels: int,
    sizes: Sequence[int],
    channels: Sequence[int],
    upsampling: str,
    norm: str | None,
    n_residual: int,
    activation: Activation,
) -> list[nn.Module]:
    r"""Layers from (B, n_in) to (B, C, \*sizes), the axes doubled as often as there are ``channels``.

    Args:
        n_in: Inputs.
        n_channels: C.
        sizes: Of the axes.
        channels: Of the smallest image first.
        upsampling: As for `conv_decoder`.
        norm: Likewise.
        n_residual: Likewise.
        activation: Likewise.

    Returns:
        The layers.

    Raises:
        DataError: If there is no such up-sampling.
    """
    if upsampling not in {"transposed", "nearest"}:
        raise DataError('upsampling="transposed" or "nearest"', repr(upsampling), "Both end in the same shape.")
    n_axes, stages = len(sizes), halved(sizes, len(channels))[::-1]
    layers: list[nn.Module] = [
        nn.Linear(n_in, channels[0] * math.prod(stages[0])),
        nn.Unflatten(1, (channels[0], *stages[0])),
        *after_layer(channels[0], stages[0], norm, n_residual, activation),
    ]
    for i, (before, after) in enumerate(zip(channels, [*channels[1:], n_channels], strict=True)):
        size = stages[i + 1]
        if upsampling == "nearest":
            layers += [nn.Upsample(size=size), LAYERS[n_axes](before, after, 3, padding=1)]
        else:
            odd = tuple(n % 2 for n in size)
            layers.append(_TRANSPOSED[n_axes](before, after, 4, stride=2, padding=1, output_padding=odd))
        if i + 1 < len(channels):
            layers += after_layer(after, size, norm, n_residual, activation)
    return layers


@can_be_built
def conv_encoder(
    shape: Sequence[int],
    n_out: int,
    *,
    channels: Sequence[int] | None = None,
    norm: str | None = None,
    n_residual: int = 0,
    activation: Callable[[], nn.Module] = nn.Tanh,
) -> nn.Sequential:
    r"""Convolutions that halve every axis, and a linear output layer, (B, \*shape) to (B, n_out).

    Args:
        shape: Of a row: (C, H, W) for images, (C, L) for series; any sizes, powers of two or not. Rows of it are
            taken, with or without axes of 1, and flat rows; `ShapeError` else, of channels last, say.
        n_out: Outputs.
        channels: Of every convolution (four taps an axis, stride 2). None: 32, doubled by every layer up to 128, as
            long as every axis has 8 or more to halve: (32, 64) for 28 x 28, four layers for 64 x 64.
        norm: "layer" (all numbers of a row), "group" (at most 8 groups of channels) or None.
        n_residual: Residual blocks after every convolution.
        activation: As for `mlp`.

    Returns:
        ``nn.Sequential``, initialised as torch does.

    Raises:
        DataError: If a size is no positive whole number, there are more layers than the axes can be halved, or fewer
            than 3 numbers to normalise in a group.
    """
    shape, sizes = _shape_and_sizes(shape)
    n_out, n_residual = plain_sizes(n_out=n_out, n_residual=n_residual)
    channels = channels_of(channels, sizes, is_decoder=False)
    layers = down(shape[0], sizes, n_out, channels, norm, n_residual, activation)
    net = nn.Sequential(FlatRows(shape), nn.Unflatten(1, shape), *layers)
    arguments = {"shape": shape, "n_out": n_out, "channels": channels, "norm": norm, "n_residual": n_residual}
    return remember(net, "conv_encoder", {**arguments, "activation": activation})


@can_be_built
def conv_decoder(
    n_in: int,
    shape: Sequence[int],
    *,
    channels: Sequence[int] | None = None,
    upsampling: str = "transposed",
    norm: str | None = None,
    n_residual: int = 0,
    n_parameters: int = 1,
    activation: Callable[[], nn.Module] = nn.Tanh,
) -> nn.Sequential:
    r"""A linear layer and convolutions that double every axis, (B, n_in) to (B, \*shape) or (B, \*shape, g).

    Args:
        n_in: Inputs: the code's size (and that of a context).
        shape: Of a row: (C, H, W) for images, (C, L) for series; any sizes.
        channels: Of the smallest image first, one for every doubling. None: `conv_encoder`'s, reversed.
        upsampling: "transposed" convolutions (four taps, stride 2: no chequer-board), or "nearest" neighbours followed
            by a convolution of three taps.
        norm: As for `conv_encoder`.
        n_residual: Residual blocks at every size but the last.
        n_parameters: g, of the likelihood for each number: a trailing axis if there are several.
        activation: As for `mlp`.

    Returns:
        ``nn.Sequential``, initialised as torch does.

    Raises:
        DataError: If a size is no positive whole number, there are more layers than the axes can be halved, or fewer
            than 3 numbers to normalise in a group.
    """
    shape, sizes = _shape_and_sizes(shape)
    n_in, n_residual, n_parameters = plain_sizes(n_in=n_in, n_residual=n_residual, n_parameters=n_parameters)
    channels = channels_of(channels, sizes, is_decoder=True)
    layers = up(n_in, shape[0] * n_parameters, sizes, channels, upsampling, norm, n_residual, activation)
    if n_parameters > 1:
        layers += [nn.Unflatten(1, (shape[0], n_parameters)), MoveAxis(2)]
    arguments = {"n_in": n_in, "shape": shape, "channels": channels, "upsampling": upsampling, "norm": norm}
    rest = {"n_residual": n_residual, "n_parameters": n_parameters, "activation": activation}
    return remember(nn.Sequential(*layers), "conv_decoder", arguments | rest)


def _shape_and_sizes(shape: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    (plain,) = plain_sizes(shape=shape)
    if not isinstance(plain, tuple) or len(plain) not in (2, 3):
        raise DataError("a shape (C, H, W) or (C, L)", repr(shape), "Use mlp for rows without positions.")
    return plain, plain[1:]
