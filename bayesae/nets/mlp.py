"""Multi-layer perceptrons."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import nn

from bayesae.nets.parts import after_layer, plain_sizes
from bayesae.nets.recipe import can_be_built, remember

__all__ = ["mlp"]


@can_be_built
def mlp(
    n_in: int,
    hidden: Sequence[int],
    n_out: int | Sequence[int],
    *,
    activation: Callable[[], nn.Module] = nn.Tanh,
    norm: str | None = None,
    n_residual: int = 0,
) -> nn.Sequential:
    r"""A multi-layer perceptron with a linear output layer, (B, \*in) to (B, n_out).

    Rows of any shape are flattened first, so that images go in as they are.

    Args:
        n_in: Numbers in a row of the input.
        hidden: Widths of the hidden layers; an empty sequence gives one linear map.
        n_out: Outputs: a number, or a shape such as (784, 2) for a likelihood with two parameters a number.
        activation: Makes the activation after every hidden layer. Tanh is smooth, so that linearising in the
            weights means something, and is what the Laplacian autoencoder papers use.
        norm: "layer" normalises the numbers of a row before every activation; None does not.
        n_residual: Residual blocks of two layers after every hidden layer.

    Returns:
        ``nn.Sequential`` of flatten, linear layers and activations, initialised as torch does.

    Raises:
        DataError: If a size is no positive whole number, there is no such normalisation, or it has fewer than 3
            numbers to normalise, of which it would leave signs at most.
    """
    n_in, hidden, n_out, n_residual = plain_sizes(n_in=n_in, hidden=hidden, n_out=n_out, n_residual=n_residual)
    widths = [n_in, *hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for narrow, wide in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(narrow, wide), *after_layer(wide, (), norm, n_residual, activation)]
    if isinstance(n_out, int):
        layers.append(nn.Linear(widths[-1], n_out))
    else:
        layers += [nn.Linear(widths[-1], math.prod(n_out)), nn.Unflatten(1, tuple(n_out))]
    arguments = {"n_in": n_in, "hidden": hidden, "n_out": n_out, "activation": activation, "norm": norm}
    return remember(nn.Sequential(*layers), "mlp", {**arguments, "n_residual": n_residual})
