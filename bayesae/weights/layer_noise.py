"""Weights that every row of a batch draws for itself, inside the layers: local reparameterisation and Flipout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bayesae.errors import UnsupportedError

__all__ = ["NoisyWeight", "RowNoise"]

_CONVOLUTIONS = {
    F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d,
}  # fmt: skip


@dataclass(frozen=True)
class RowNoise:
    """Random numbers of the rows of one batch.

    Args:
        how: "local" or "flipout".
        n_rows: Rows of the whole batch.
        own: Those that this rank works on: numbers are drawn for all, so that ranks together make one process.
        generator: Advances with every layer.
    """

    how: Literal["local", "flipout"]
    n_rows: int
    own: slice
    generator: torch.Generator

    @property
    def n_own(self) -> int:
        """Rows of this rank."""
        return len(range(self.n_rows)[self.own])

    def normal(self, size: int, like: Tensor) -> Tensor:
        """Standard normal numbers (B, size)."""
        shape, options = (self.n_rows, size), {"dtype": like.dtype, "device": like.device}
        numbers = torch.randn(shape, generator=self.generator, **options)
        return numbers[self.own]

    def signs(self, size: int, like: Tensor) -> Tensor:
        """Independent signs (B, size)."""
        bits = torch.randint(2, (self.n_rows, size), generator=self.generator, device=like.device)
        return (2 * bits - 1)[self.own].to(like)


@dataclass
class _Uses:
    """Where one weight has been used in one evaluation: all uses by a row must see the same weight."""

    is_local: bool = False
    is_flipout: bool = False
    is_shared: bool = False
    signs: dict[str, Tensor] = field(default_factory=dict)


class NoisyWeight(Tensor):
    r"""One draw of a weight that is Normal and independent of all others, and the means to draw it anew for every row.

    To any function of torch it is the draw, the same for all rows. Layers draw for every row of the batch,
    which has the same law for each row and less noise in their sum:

    "flipout"
        :math:`W_n = M + (W - M) \circ r_n s_n^\top` with signs over output and input channels, in Linear layers and
        (transposed) convolutions, in groups too: the law of all outputs of a row is exact, whatever its positions.
    "local"
        :math:`h_n \sim \mathcal{N}(M x_n + m,\; V x_n^2 + v)` in Linear layers on rows (B, D) whose weight is used
        once. A convolution, or a Linear layer over positions (B, L, D), shares its weight between positions, which
        independent noise would ignore: these use Flipout.

    A layer whose input does not begin with the rows of the batch (several codes a row, positions among rows) uses the
    shared draw.

    Args (of `of`):
        mean: M, (1, \*shape) or (\*shape).
        scale: Standard deviations, of that shape.
        draw: W, of that shape.
        noise: Rows and their numbers.

    References:
        | Variational Dropout and the Local Reparameterization Trick (Kingma, Salimans, Welling, 2015)
        | Flipout: Efficient Pseudo-Independent Weight Perturbations on Mini-Batches (Wen et al., 2018)
        | Departure: signs are those of the weight, not of the call, so that a weight used twice is one weight.
    """

    _parts: tuple[Tensor, Tensor, Tensor, RowNoise, _Uses]

    @classmethod
    def of(cls, mean: Tensor, scale: Tensor, draw: Tensor, noise: RowNoise) -> NoisyWeight:
        """See the class."""
        return cls._with(mean, scale, draw, noise, _Uses())

    @classmethod
    def _with(cls, mean: Tensor, scale: Tensor, draw: Tensor, noise: RowNoise, uses: _Uses) -> NoisyWeight:
        weight = draw.as_subclass(cls)
        weight._parts = (mean, scale, draw, noise, uses)
        return weight

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever the function gives
        kwargs = kwargs or {}
        if func is Tensor.__getitem__ and isinstance(args[1], int):
            mean, scale, draw, noise, uses = args[0]._parts
            return cls._with(mean[args[1]], scale[args[1]], draw[args[1]], noise, uses)
        if func is F.linear or func in _CONVOLUTIONS:
            result = _layer(func, *args, **kwargs)
            if result is not None:
                return result
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        if isinstance(result, Tensor | tuple | list) and not isinstance(result, torch.Size):
            for weight in (*args, *kwargs.values()):
                if isinstance(weight, NoisyWeight):
                    _take_shared(weight._parts[-1])
        return result


def _take_shared(uses: _Uses) -> None:
    if uses.is_local or uses.is_flipout:
        raise _twice("in a layer, by rows, and then in another way")
    uses.is_shared = True


def _twice(got: str) -> UnsupportedError:
    fix = "Take estimator='flipout', or 'weights' if it already is."
    return UnsupportedError("a weight that a row uses in one way", f"one used {got}", fix)


def _layer(
    func: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None = None, *rest: object, **options: object
) -> Tensor | None:
    """Outputs with weights drawn for every row; None where they are to be shared."""
    noisy = [one for one in (weight, bias) if isinstance(one, NoisyWeight)]
    if isinstance(x, NoisyWeight) or not noisy:
        return None
    noise = noisy[0]._parts[3]
    is_linear = func is F.linear
    n_axes = 2 if is_linear else weight.dim()
    has_rows = x.dim() >= 2 if is_linear else x.dim() == n_axes
    if not has_rows or len(x) != noise.n_own or any(one._parts[-1].is_shared for one in noisy):
        return None
    mean_weight, mean_bias = (one._parts[0] if isinstance(one, NoisyWeight) else one for one in (weight, bias))
    outputs = func(x, mean_weight, mean_bias, *rest, **options)
    if noise.how == "local" and is_linear and x.dim() == 2:
        var = outputs.new_zeros(())
        for one in noisy:
            uses = one._parts[-1]
            if uses.is_local or uses.is_flipout:
                raise _twice("in two layers, under local reparameterisation")
            uses.is_local = True
        if isinstance(weight, NoisyWeight):
            var = F.linear(x**2, weight._parts[1] ** 2)
        if isinstance(bias, NoisyWeight):
            var = var + bias._parts[1] ** 2
        # the root of 0 has no gradient: a row of zeros under a layer whose bias is certain
        scale = var.clamp_min(torch.finfo(var.dtype).tiny).sqrt()
        return outputs + scale * noise.normal(outputs.shape[-1], outputs)
    axis = -1 if is_linear else 1
    for one in noisy:
        mean, _scale, draw, _noise, uses = one._parts
        if uses.is_local:
            raise _twice("in two layers, under local reparameterisation")
        uses.is_flipout = True
        if one is weight:
            signs = _signs(uses, noise, "in", x, axis)
            turned = func(x * signs, draw - mean, None, *rest, **options)
        else:
            turned = (draw - mean).reshape(-1, *[1] * (0 if is_linear else outputs.dim() - 2))
        outputs = outputs + turned * _signs(uses, noise, "out", outputs, axis)
    return outputs


def _signs(uses: _Uses, noise: RowNoise, side: str, like: Tensor, axis: int) -> Tensor:
    """Signs of the channels of every row, (B, 1, ..., C) or (B, C, 1, ...)."""
    n_channels = like.shape[axis]
    if side not in uses.signs:
        uses.signs[side] = noise.signs(n_channels, like)
    shape = [len(like), *[1] * (like.dim() - 1)]
    shape[axis] = n_channels
    return uses.signs[side].reshape(shape)
