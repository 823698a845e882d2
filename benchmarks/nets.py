"""The networks, batches and posteriors of the benchmarks: random, since no cost depends on the values."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from bayesae.likelihoods import Bernoulli, Gaussian
from bayesae.types import Params

__all__ = ["KroneckerPosterior", "Problem", "conv", "mlp", "upsample"]


def mlp(widths: Sequence[int] = (784, 256, 64, 2)) -> nn.Sequential:
    """Linear and tanh layers from ``widths[0]`` down to the code ``widths[-1]`` and back."""
    layers: list[nn.Module] = []
    for side in (widths, widths[::-1]):
        for n_in, n_out in zip(side[:-1], side[1:], strict=True):
            layers += [nn.Linear(n_in, n_out), nn.Tanh()]
        layers.pop()  # the code and the outputs are linear
    return nn.Sequential(*layers)


def _encoder(channels: int, side: int, code: int) -> list[nn.Module]:
    strided = [nn.Conv2d(channels, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU(), nn.Flatten()]
    return [*strided, nn.Linear(32 * (side // 4) ** 2, code)]


def _head(side: int, code: int) -> list[nn.Module]:
    return [nn.Linear(code, 32 * (side // 4) ** 2), nn.ReLU(), nn.Unflatten(1, (32, side // 4, side // 4))]


def conv(channels: int = 1, side: int = 28, code: int = 16) -> nn.Sequential:
    """Two convolutions of stride 2 and two transposed ones, kernel 4."""
    decoder = [nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(16, channels, 4, 2, 1)]
    return nn.Sequential(*_encoder(channels, side, code), *_head(side, code), *decoder)


def upsample(channels: int = 1, side: int = 28, code: int = 16) -> nn.Sequential:
    """The same encoder; the decoder doubles twice and convolves with kernel 3."""
    first = [nn.Upsample(scale_factor=2), nn.Conv2d(32, 16, 3, padding=1), nn.ReLU()]
    second = [nn.Upsample(scale_factor=2), nn.Conv2d(16, channels, 3, padding=1)]
    return nn.Sequential(*_encoder(channels, side, code), *_head(side, code), *first, *second)


@dataclass(frozen=True)
class KroneckerPosterior:
    """Kronecker-factored curvature of weights; biases apart, in the basis of their layer's outputs; prior precision 1.

    Args:
        bases: Orthogonal (C, C) and (J, J) by the name of the weight.
        values: Eigenvalues (C,) and (J,) of the two curvature factors, likewise.
        biases: Eigenvalues (C,) by the name of the bias.
    """

    bases: dict[str, tuple[Tensor, Tensor]]
    values: dict[str, tuple[Tensor, Tensor]]
    biases: Params


@dataclass(frozen=True)
class Problem:
    r"""What everybody gets.

    Args:
        network: Layers in one ``nn.Sequential``.
        batches: (n, B, \*data).
        likelihood: Gives the Hessian in the outputs.
    """

    network: nn.Sequential
    batches: Tensor
    likelihood: Gaussian | Bernoulli

    @cached_property
    def params(self) -> Params:
        """The weights, detached."""
        return {name: value.detach() for name, value in self.network.named_parameters()}

    def flat(self) -> nn.Sequential:
        """A copy whose outputs are (B, O): the peers take no images, and hang hooks on the layers."""
        layers = list(copy.deepcopy(self.network))
        return nn.Sequential(*layers, *([] if isinstance(layers[-1], nn.Linear) else [nn.Flatten()]))

    def by_name(self, vector: Tensor) -> Params:
        """A vector over all parameters, in their order, as parameters."""
        parts = vector.split([leaf.numel() for leaf in self.params.values()])
        return {name: part.view_as(leaf) for (name, leaf), part in zip(self.params.items(), parts, strict=True)}

    def chosen(self, n_chosen: int) -> Tensor:
        """Places of a random sub-network in the vector over all parameters, ascending."""
        n_weights = sum(leaf.numel() for leaf in self.params.values())
        places = torch.randperm(n_weights, generator=torch.Generator().manual_seed(1))
        return places[:n_chosen].sort().values.to(self.batches.device)

    @cached_property
    def variances(self) -> Params:
        """A diagonal posterior, variances between 1 / 101 and 1."""
        generator = torch.Generator().manual_seed(2)
        return {k: (1 / (1 + 100 * torch.rand(v.shape, generator=generator))).to(v) for k, v in self.params.items()}

    @cached_property
    def kronecker(self) -> KroneckerPosterior:
        """A Kronecker posterior of linear layers."""
        generator = torch.Generator().manual_seed(3)
        bases: dict[str, tuple[Tensor, Tensor]] = {}
        values: dict[str, tuple[Tensor, Tensor]] = {}
        biases: Params = {}
        for name, leaf in self.params.items():
            if leaf.dim() == 1:
                biases[name] = (100 * torch.rand(leaf.shape, generator=generator)).to(leaf)
                continue
            n_out, n_in = leaf.shape
            outputs, inputs = (torch.linalg.qr(torch.randn(n, n, generator=generator))[0] for n in (n_out, n_in))
            bases[name] = outputs.to(leaf), inputs.to(leaf)
            of_outputs, of_inputs = (10 * torch.rand(n, generator=generator) for n in (n_out, n_in))
            values[name] = of_outputs.to(leaf), of_inputs.to(leaf)
        return KroneckerPosterior(bases, values, biases)
