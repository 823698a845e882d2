"""`prune_codes`: an autoencoder without the code dimensions that nothing needs."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from bayesae.codes import amortised
from bayesae.errors import DataError, ShapeError, UnsupportedError
from bayesae.models import Autoencoder

__all__ = ["first_linear", "prune_codes"]


class _Sized(Protocol):
    def n_parameters(self, n_latents: int) -> int: ...


def prune_codes(model: Autoencoder, keep: Tensor | Sequence[bool], codes: _Sized = amortised) -> Autoencoder:
    r"""A copy of a model without some of its code dimensions.

    .. math:: e'(x) = e(x)_{keep}, \qquad W_1' = W_{1, :, keep}

    with the last linear layer of the encoder and the first of the decoder, :math:`W_1` (H, Z), cut. The likelihood and
    its noise are copied. Train it on for a few epochs, or use it as it is.

    Args:
        model: Networks that are ``nn.Sequential``, such as `nets.mlp`: the encoder ends in a linear layer, or one and
            ``nn.Unflatten(1, (Z, g))``; the decoder begins with a linear layer.
        keep: True where a dimension stays, (Z,), as `Relevance.is_active`.
        codes: The code posterior, which says how many numbers g the encoder gives for each dimension. Of
            ``codes.Amortised("full")`` the rows and columns of the Cholesky factor are cut.

    Returns:
        A new autoencoder, in evaluation mode.

    Exact when: the cut columns of :math:`W_1` are 0: outputs are then those of before, to rounding. With "full", the
        dimensions that stay must not depend on earlier ones that go, given x, as is so at the true posterior.
    Biased when: a column is not 0: the outputs lose what it added.

    Raises:
        ShapeError: If ``keep`` has another length.
        DataError: If nothing would stay.
        UnsupportedError: If a network is of another form, or the number g of parameters does not fit ``codes``.
    """
    decoder_at, first = first_linear(model.decoder)
    kept = torch.as_tensor(keep)
    n_latents = first.in_features
    if kept.dtype != torch.bool or kept.shape != (n_latents,):
        got = f"{kept.dtype} of shape {tuple(kept.shape)}"
        raise ShapeError(f"keep of shape ({n_latents},) and dtype bool", got, "True where a dimension stays.")
    places = kept.nonzero()[:, 0].tolist()
    if not places:
        raise DataError("a code dimension that stays", "none", "A model without a code has nothing to say of x.")
    encoder = _cut_encoder(model.encoder, n_latents, places, codes)
    decoder = _with(model.decoder, {decoder_at: _linear(first.weight[:, places], first.bias)}, {"n_in": len(places)})
    likelihood = copy.deepcopy(model.likelihood)
    return Autoencoder(encoder, decoder, likelihood, data_shape=model.data_shape).eval()


def first_linear(decoder: nn.Module) -> tuple[int, nn.Linear]:
    """The linear layer that sees the code itself.

    Args:
        decoder: A network.

    Returns:
        Its place among the layers, and the layer.

    Raises:
        UnsupportedError: If the decoder does not begin with one.
    """
    for at, layer in enumerate(decoder if isinstance(decoder, nn.Sequential) else []):
        if type(layer) is nn.Linear:
            return at, layer
        if not isinstance(layer, (nn.Flatten, nn.Identity)):
            break
    fix = "nets.mlp and nets.conv_decoder begin with one."
    raise UnsupportedError("a decoder, nn.Sequential, that begins with nn.Linear", type(decoder).__name__, fix)


def _cut_encoder(encoder: nn.Module, n_latents: int, places: list[int], codes: _Sized) -> nn.Sequential:
    layers = list(encoder) if isinstance(encoder, nn.Sequential) else []
    last, n_parameters, at = (layers[-1] if layers else None), 1, len(layers) - 1
    if isinstance(last, nn.Unflatten) and len(layers) > 1:
        n_parameters, at, last = int(last.unflattened_size[-1]), at - 1, layers[-2]
    if type(last) is not nn.Linear or last.out_features != n_latents * n_parameters:
        got = f"one that ends in {[type(layer).__name__ for layer in layers[-2:]] or type(encoder).__name__}"
        fix = "nets.mlp and nets.conv_encoder end so."
        expected = f"an encoder, nn.Sequential, that ends in nn.Linear for {n_latents} code dimensions"
        raise UnsupportedError(expected, got, fix)
    columns, is_plain = list(range(n_parameters)), n_parameters == 1
    if not is_plain and codes.n_parameters(n_latents) != n_parameters:
        expected = f"codes whose encoder gives {n_parameters} numbers a dimension"
        raise UnsupportedError(expected, f"{codes!r}", "Give codes=, as in fit_model.")
    if not is_plain and codes.n_parameters(len(places)) != n_parameters:
        if n_parameters != 1 + n_latents or codes.n_parameters(len(places)) != 1 + len(places):
            raise UnsupportedError("codes of a family that can be cut", f"{codes!r}", "Train a smaller model anew.")
        columns = [0, *[1 + place for place in places]]
    index = torch.tensor([[place * n_parameters + column for column in columns] for place in places]).flatten()
    new: dict[int, nn.Module] = {at: _linear(last.weight[index], None if last.bias is None else last.bias[index])}
    shape = (len(places),) if is_plain else (len(places), len(columns))
    if not is_plain:
        new[at + 1] = nn.Unflatten(1, shape)
    return _with(encoder, new, {"n_out": len(places) if is_plain else list(shape)})


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A layer of these weights, on their device; the global generator is not used."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta", dtype=weight.dtype)
    values = {"weight": weight} | ({} if bias is None else {"bias": bias})
    for name, value in values.items():
        setattr(layer, name, nn.Parameter(value.detach().clone()))
    return layer


def _with(network: nn.Module, layers: dict[int, nn.Module], sizes: dict[str, object]) -> nn.Sequential:
    """A copy with other layers in some places, and a recipe that says so."""
    new = copy.deepcopy(network)
    assert isinstance(new, nn.Sequential)
    for at, layer in layers.items():
        new[at] = layer
    recipe = vars(new).get("recipe")
    if recipe is not None:
        recipe["arguments"] |= sizes
    return new
