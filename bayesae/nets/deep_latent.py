"""The generative network of a deep latent Gaussian model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from bayesae.errors import DataError
from bayesae.nets.mlp import mlp
from bayesae.nets.parts import plain_sizes
from bayesae.nets.recipe import can_be_built, remember

__all__ = ["deep_latent_decoder"]


@can_be_built
def deep_latent_decoder(
    sizes: Sequence[int],
    hidden: Sequence[int],
    n_out: int | Sequence[int],
    *,
    widths: Sequence[int] | None = None,
    activation: Callable[[], nn.Module] = nn.Tanh,
) -> nn.Module:
    r"""Layers of Gaussian innovations and the networks between them, as one decoder of all innovations.

    .. math:: h_L = G_L \xi_L, \quad h_l = T_l(h_{l+1}) + G_l \xi_l, \quad f = T_0(h_1), \qquad
              z = [\xi_1, \dots, \xi_L] \sim \mathcal{N}(0, I)

    Written in the innovations the prior of the code is the standard Normal of every `Autoencoder`, and no layer's noise
    depends on another's: the hierarchy is in the decoder. ``codes.Amortised("rank_one", layers=sizes)`` is the
    recognition model that belongs to it.

    Args:
        sizes: Innovations of each of L layers, the one next to the data first: the code has their sum.
        hidden: Widths of the hidden layers of every T, which are perceptrons; an empty sequence makes them linear.
        n_out: Outputs of T_0, a number or a shape, as for `mlp`.
        widths: Of h_1, ..., h_L; as ``sizes`` if None.
        activation: Makes the activation after every hidden layer.

    Returns:
        A module, (B, Z) to (B, n_out), initialised as torch does. G_l are linear layers without a bias.

    Raises:
        DataError: If a size is no positive whole number, or there are no layers, or not as many widths.

    References:
        | Stochastic Backpropagation and Approximate Inference in Deep Generative Models (Rezende, Mohamed, Wierstra,
          2014, https://arxiv.org/abs/1401.4082)
    """
    widths = sizes if widths is None else widths
    sizes, hidden, n_out, widths = plain_sizes(sizes=sizes, hidden=hidden, n_out=n_out, widths=widths)
    if not isinstance(sizes, tuple) or not isinstance(widths, tuple) or not 0 < len(sizes) == len(widths):
        fix = "sizes=(16, 8) are two layers, of 16 and 8 innovations."
        raise DataError("a size, and a width, for every layer", f"sizes={sizes!r}, widths={widths!r}", fix)
    net = _DeepLatent(sizes, hidden, n_out, widths, activation)
    arguments = {"sizes": sizes, "hidden": hidden, "n_out": n_out, "widths": widths, "activation": activation}
    return remember(net, "deep_latent_decoder", arguments)


class _DeepLatent(nn.Module):
    """See `deep_latent_decoder`."""

    def __init__(
        self,
        sizes: tuple[int, ...],
        hidden: Sequence[int],
        n_out: int | Sequence[int],
        widths: tuple[int, ...],
        activation: Callable[[], nn.Module],
    ) -> None:
        super().__init__()
        self.sizes = sizes
        pairs = zip(sizes, widths, strict=True)
        self.innovations = nn.ModuleList(nn.Linear(size, width, bias=False) for size, width in pairs)
        outs = (n_out, *widths[:-1])
        self.transforms = nn.ModuleList(
            mlp(width, hidden, out, activation=activation) for width, out in zip(widths, outs, strict=True)
        )

    def forward(self, code: Tensor) -> Tensor:
        r"""Codes (B, Z) to outputs (B, \*O)."""
        above, stop = None, sum(self.sizes)
        for size, innovation, transform in list(zip(self.sizes, self.innovations, self.transforms, strict=True))[::-1]:
            layer = innovation(code[:, stop - size : stop])  # torch.fx cannot count the parts of a split
            above = transform(layer if above is None else above + layer)
            stop -= size
        assert above is not None
        return above
