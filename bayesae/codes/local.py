"""The decoder around a code: gradient of the log-likelihood in the code, and its Gauss-Newton curvature."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bayesae.codes.base import CodeModel, differentiating, score_outputs
from bayesae.curvature.elementwise import ELEMENTWISE
from bayesae.forward_mode import jvp
from bayesae.types import Batch, BlockHessian, LowRankHessian, OutputHessian, Params

__all__ = ["Expansion", "Local"]

_NAMES = ("weight", "bias")
_SAME = (nn.Identity, nn.Flatten)
# from the value itself; of the others by forward differentiation
_SLOPES: dict[type[nn.Module], Callable[[Tensor], Tensor]] = {
    nn.ReLU: lambda y: (y > 0).to(y.dtype),
    nn.Tanh: lambda y: 1 - y * y,
    nn.Sigmoid: lambda y: y * (1 - y),
}


@dataclass(frozen=True)
class Expansion:
    r"""log p(x | z) to second order around a code, with the Gauss-Newton matrix for the Hessian.

    Args:
        gradient: :math:`J^\top \nabla_f \log p(x \mid f)`, (S, B, Z).
        curvature: :math:`J^\top H J`, (S, B, Z, Z), positive semi-definite.
    """

    gradient: Tensor
    curvature: Tensor


class Local:
    r"""Expansions of log p(x | z) of every row under every weight draw, differentiable in weights and code.

    Tangents of the Z code dimensions are pushed through the decoder. Where it is a chain of linear and element-wise
    layers they stop before the last linear layer V, whose :math:`V^\top H V` is formed once for all rows and codes if H
    is a multiple of the identity: no (B, O, Z) Jacobian is. Any other decoder is pushed through by ``torch.func.jvp``.

    Args:
        model: The model at S weight draws.
        batch: The rows that the outputs explain.

    Cost: Z tangents through the decoder an expansion; memory B Z times its widest layer that they pass.
    """

    def __init__(self, model: CodeModel, batch: Batch) -> None:
        self.model, self.batch = model, batch
        decoder, params = model.decoder_module()
        self._chain = None if batch.context is not None else _chain(decoder)
        self._params = params
        self._gram: Tensor | None = None
        self._mode: Tensor | None = None

    def __call__(self, z: Tensor) -> Expansion:
        """The expansion around z (S, B, Z)."""
        if self._chain is None:
            outputs, tangents = self._columns(z)
            score, hessian = self._outputs(outputs)
            gradient = (tangents * score[:, :, None]).flatten(3).sum(-1)
            return Expansion(gradient, _weighted_gram(tangents, hessian))
        layers, last, shape = self._chain
        hidden, tangents = _push(layers, self._params, z)
        weight, bias = _weights(self._params, last)
        outputs = hidden @ weight.mT if bias is None else torch.baddbmm(bias[:, None], hidden, weight.mT)
        score, hessian = self._outputs(outputs.unflatten(2, shape))
        gradient = (tangents @ (score.flatten(2) @ weight)[..., None])[..., 0]
        if isinstance(hessian, Tensor) and hessian.dim() == 0 and weight.shape[1] > weight.shape[2]:
            if self._gram is None:
                self._gram = weight.mT @ weight
            return Expansion(gradient, hessian * (_times(tangents, self._gram) @ tangents.mT))
        rows = _times(tangents, weight.mT).unflatten(3, shape)
        return Expansion(gradient, _weighted_gram(rows, hessian))

    def _outputs(self, outputs: Tensor) -> tuple[Tensor, OutputHessian]:
        r"""Gradient (S, B, \*O) of the log-likelihood in the outputs, and the Hessian of S B rows."""
        likelihood = self.model.likelihood
        hessian = likelihood.output_hessian(outputs.flatten(0, 1))
        if isinstance(hessian, Tensor) and self._mode is not None:
            return hessian * (self._mode - outputs), hessian
        score = torch.func.grad(lambda f: score_outputs(likelihood, f[None], self.batch).sum())(outputs)
        is_constant = isinstance(hessian, Tensor) and hessian.dim() == 0
        if is_constant and not likelihood.is_fisher and self.batch.mask is None:
            # log p is quadratic in the outputs: where it is largest says all that later codes need
            self._mode = outputs + score / hessian
        if self.batch.mask is not None:
            mask = likelihood.output_mask(self.batch.mask).reshape(1, *outputs.shape[1:]).expand(outputs.shape)
            hessian = _masked(hessian, mask.flatten(0, 1).to(outputs.dtype))
        return score, hessian

    def _columns(self, z: Tensor) -> tuple[Tensor, Tensor]:
        r"""Outputs (S, B, \*O) and their derivatives in each code dimension, (S, B, Z, \*O)."""

        def decode(at: Tensor) -> Tensor:
            return self.model.decode(at, self.batch.context)

        def column(direction: Tensor) -> tuple[Tensor, Tensor]:
            return jvp(decode, (z,), (direction.expand_as(z),))

        eye = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)
        with differentiating():
            return torch.func.vmap(column, out_dims=(None, 2))(eye)  # pyright: ignore[reportArgumentType]


Layer = tuple[str, nn.Module]
Chain = tuple[Sequence[Layer], str, tuple[int, ...]]


def _chain(decoder: nn.Module) -> Chain | None:
    """Layers before the last linear one, its name and the shape of the outputs; None if it is no such chain."""
    if type(decoder) is not nn.Sequential or any(module._forward_hooks for module in decoder.modules()):
        return None
    layers = [(name, layer) for name, layer in decoder.named_children() if type(layer) not in _SAME]
    sizes: tuple[Any, ...] = ()
    if layers and isinstance(unflatten := layers[-1][1], nn.Unflatten):
        layers.pop()
        given: Any = unflatten.unflattened_size
        sizes = tuple(given)
        if unflatten.dim != 1 or not all(isinstance(n, int) and n > 0 for n in sizes):
            return None
    if not layers or not isinstance(layers[0][1], nn.Linear) or not isinstance(linear := layers[-1][1], nn.Linear):
        return None
    known = (nn.Linear, *(layer for layer in ELEMENTWISE if layer is not nn.RReLU))
    if any(type(layer) not in known for _, layer in layers):
        return None
    return layers[:-1], layers[-1][0], sizes or (linear.out_features,)


def _weights(params: Params, name: str) -> tuple[Tensor, Tensor | None]:
    weight, bias = (params.get(f"{name}.{part}") for part in _NAMES)
    assert weight is not None
    return weight, bias


def _times(tangents: Tensor, matrix: Tensor) -> Tensor:
    """(S, B, Z, H) times (S, H, H'), as one product a weight draw."""
    return (tangents.flatten(1, 2) @ matrix).unflatten(1, tangents.shape[1:3])


def _push(layers: Sequence[Layer], params: Params, z: Tensor) -> tuple[Tensor, Tensor]:
    """Values (S, B, H) after the layers, and their derivatives in each code dimension, (S, B, Z, H)."""
    value, size = z, z.shape[-1]
    tangents = torch.eye(size, dtype=z.dtype, device=z.device).expand(*z.shape[:2], size, size)
    is_constant = True
    for name, layer in layers:
        if isinstance(layer, nn.Linear):
            weight, bias = _weights(params, name)
            value = value @ weight.mT if bias is None else torch.baddbmm(bias[:, None], value, weight.mT)
            if is_constant:  # the same for every row so far
                columns = (tangents[:, :1].flatten(1, 2) @ weight.mT)[:, None]
                tangents = columns.expand(-1, z.shape[1], -1, -1)
            else:
                tangents = _times(tangents, weight.mT)
        else:
            value, slope = _slope(layer, value)
            tangents, is_constant = tangents * slope[:, :, None], False
    return value, tangents


def _slope(layer: nn.Module, value: Tensor) -> tuple[Tensor, Tensor]:
    if (slope_of := _SLOPES.get(type(layer))) is not None:
        after = layer(value.clone() if getattr(layer, "inplace", False) else value)
        return after, slope_of(after)
    after, slope = jvp(lambda x: layer(x.clone()), (value,), (torch.ones_like(value),))
    return after, slope


def _masked(hessian: OutputHessian, mask: Tensor) -> OutputHessian:
    if isinstance(hessian, BlockHessian):
        counts = mask.movedim(hessian.axis, -1)
        return BlockHessian(hessian.values * (counts[..., None] * counts[..., None, :]), hessian.axis)
    if isinstance(hessian, LowRankHessian):
        diagonal = None if hessian.diagonal is None else hessian.diagonal * mask
        return LowRankHessian(hessian.factor * mask[:, None], diagonal)
    return hessian * mask


def _weighted_gram(rows: Tensor, hessian: OutputHessian) -> Tensor:
    r"""Rows (S, B, Z, \*O) times H times their transpose, (S, B, Z, Z)."""
    lead, flat = rows.shape[:2], rows.flatten(0, 1)
    if isinstance(hessian, BlockHessian):
        grouped = flat.movedim(hessian.axis + 1, -1)
        weighted = (grouped[..., None, :] @ hessian.values[:, None])[..., 0, :]
        return (grouped.flatten(2) @ weighted.flatten(2).mT).unflatten(0, lead)
    if isinstance(hessian, LowRankHessian):
        projected = flat.flatten(2) @ hessian.factor.flatten(2).mT
        dense = (projected @ projected.mT).unflatten(0, lead)
        return dense if hessian.diagonal is None else dense + _weighted_gram(rows, hessian.diagonal)
    if hessian.dim() == 0:
        return hessian * (flat.flatten(2) @ flat.flatten(2).mT).unflatten(0, lead)
    weighted = flat * hessian[:, None]
    return (flat.flatten(2) @ weighted.flatten(2).mT).unflatten(0, lead)
