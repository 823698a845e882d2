"""Networks for sequences of tokens: proteins, DNA, text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from bayesae.nets.conv import channels_of, down, up
from bayesae.nets.parts import MoveAxis, OneHot, plain_sizes
from bayesae.nets.recipe import can_be_built, remember

__all__ = ["sequence_decoder", "sequence_encoder"]


@can_be_built
def sequence_encoder(
    n_tokens: int,
    length: int,
    n_out: int,
    *,
    n_embedding: int = 16,
    channels: Sequence[int] | None = None,
    norm: str | None = None,
    n_residual: int = 0,
    n_context: int = 0,
    activation: Callable[[], nn.Module] = nn.Tanh,
) -> nn.Sequential:
    r"""Tokens, embedded, through convolutions along the sequence, (B, L) to (B, n_out).

    A token's embedding is its unit vector times a matrix (a convolution of one tap): the numbers of a table look-up,
    and a layer whose curvature is exact like any other's.

    Args:
        n_tokens: Tokens are whole numbers from 0 to n_tokens - 1, of any dtype.
        length: L; any number.
        n_out: Outputs.
        n_embedding: Numbers a token is turned into.
        channels: As for `conv_encoder`.
        norm: Likewise.
        n_residual: Likewise.
        n_context: Numbers of a context that `Conditional` adds to every position.
        activation: As for `mlp`.

    Returns:
        ``nn.Sequential``, initialised as torch does; it raises `DataError` of rows that are no tokens.

    Raises:
        DataError: If a size is no positive whole number, or there are more layers than the sequence can be halved.
    """
    n_tokens, length, n_out, n_embedding, n_residual, n_context = plain_sizes(
        n_tokens=n_tokens,
        length=length,
        n_out=n_out,
        n_embedding=n_embedding,
        n_residual=n_residual,
        n_context=n_context,
    )
    channels = channels_of(channels, (length,), is_decoder=False)
    layers = down(n_embedding, (length,), n_out, channels, norm, n_residual, activation)
    net = nn.Sequential(OneHot(n_tokens), nn.Conv1d(n_tokens + n_context, n_embedding, 1), *layers)
    arguments = {"n_tokens": n_tokens, "length": length, "n_out": n_out, "n_embedding": n_embedding}
    rest = {"channels": channels, "norm": norm, "n_residual": n_residual, "n_context": n_context}
    return remember(net, "sequence_encoder", {**arguments, **rest, "activation": activation})


@can_be_built
def sequence_decoder(
    n_in: int,
    length: int,
    n_tokens: int,
    *,
    channels: Sequence[int] | None = None,
    upsampling: str = "transposed",
    norm: str | None = None,
    n_residual: int = 0,
    activation: Callable[[], nn.Module] = nn.Tanh,
) -> nn.Sequential:
    r"""Logits of every token at every position, (B, n_in) to (B, L, n_tokens), for `likelihoods.Categorical`.

    Args:
        n_in: Inputs: the code's size (and that of a context).
        length: L; any number.
        n_tokens: Tokens.
        channels: As for `conv_decoder`.
        upsampling: Likewise.
        norm: Likewise.
        n_residual: Likewise.
        activation: As for `mlp`.

    Returns:
        ``nn.Sequential``, initialised as torch does.

    Raises:
        DataError: If a size is no positive whole number, or there are more layers than the sequence can be halved.
    """
    n_in, length, n_tokens, n_residual = plain_sizes(n_in=n_in, length=length, n_tokens=n_tokens, n_residual=n_residual)
    channels = channels_of(channels, (length,), is_decoder=True)
    layers = up(n_in, n_tokens, (length,), channels, upsampling, norm, n_residual, activation)
    arguments = {"n_in": n_in, "length": length, "n_tokens": n_tokens, "channels": channels, "upsampling": upsampling}
    rest = {"norm": norm, "n_residual": n_residual, "activation": activation}
    return remember(nn.Sequential(*layers, MoveAxis(1)), "sequence_decoder", {**arguments, **rest})
