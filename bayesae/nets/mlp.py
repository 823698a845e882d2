"""Multi-layer perceptrons."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

__all__ = ["mlp"]


def mlp(
    n_in: int, hidden: Sequence[int], n_out: int, *, activation: Callable[[], nn.Module] = nn.Tanh
) -> nn.Sequential:
    r"""A multi-layer perceptron with a linear output layer, (B, \*in) to (B, n_out).

    Rows of any shape are flattened first, so that images go in as they are.

    Args:
        n_in: Numbers in a row of the input.
        hidden: Widths of the hidden layers; an empty sequence gives one linear map.
        n_out: Outputs.
        activation: Makes the activation after every hidden layer. Tanh is smooth, so that linearising in the
            weights means something, and is what the Laplacian autoencoder papers use.

    Returns:
        ``nn.Sequential`` of flatten, linear layers and activations, initialised as torch does.
    """
    widths = [n_in, *hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for narrow, wide in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(narrow, wide), activation()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], n_out))
