"""Linear layers, convolutions and transposed convolutions: one rule for all."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from bayesae.curvature.layout import Layout
from bayesae.curvature.steps import Step, folded
from bayesae.types import Params

__all__ = ["ConvStep", "LinearStep", "MatrixStep", "channels_last", "times_shifted"]


@dataclass(frozen=True)
class MatrixStep(Step):
    r"""Pre-activations = [W, b] [a, 1] at every position, as `Layout` says.

    Args:
        layout: Names and shape.
        weight: In its own shape.
        bias: Or None.
        inputs: (B, \*in).
    """

    layout: Layout
    weight: Tensor
    bias: Tensor | None
    inputs: Tensor

    @property
    def names(self) -> Sequence[str]:
        """Weight and bias."""
        return self.layout.names

    @property
    def per_row(self) -> Sequence[str]:
        """Value and inputs."""
        return ("value", "inputs")

    @property
    def n_positions(self) -> int:
        """T: how often the matrix is applied to one row."""
        return self.width // (self.layout.groups * self.layout.n_out)

    def patches(self) -> Tensor:
        """[a, 1]: (B, g, J, T)."""
        patches = self.weight_patches()
        return patches if self.bias is None else torch.cat([patches, torch.ones_like(patches[:, :, :1])], 2)

    def weight_patches(self) -> Tensor:
        """The same without the 1."""
        raise NotImplementedError

    def by_channel(self, rows: Tensor) -> Tensor:
        r"""Rows (B, R, \*out) as (B, R, g, C, T)."""
        raise NotImplementedError

    def gradients(self, rows: Tensor) -> Params:
        """Per datum and row, one matrix product over positions."""
        return self.layout.split(self.matrix_gradients(rows))

    def matrix_gradients(self, rows: Tensor) -> Tensor:
        """Gradients in [W, b]: (B, R, g, C, J)."""
        weight = self.weight_gradients(rows)
        if self.bias is None:
            return weight
        return torch.cat([weight, self._bias_gradients(rows)[..., None].expand(*weight.shape[:-1], 1)], -1)

    def weight_gradients(self, rows: Tensor) -> Tensor:
        """The same without the last column."""
        rows, patches = self.by_channel(rows), self.weight_patches()
        if rows.shape[-1] == 1:
            return rows * patches.mT[:, None]
        rows = rows.movedim(1, 2).flatten(2, 3).expand(len(patches), -1, -1, -1)  # (B, g, R C, T)
        return (rows @ patches.mT).unflatten(2, (-1, self.layout.n_out)).movedim(2, 1)

    def _bias_gradients(self, rows: Tensor) -> Tensor:
        return self.by_channel(rows).sum(-1)

    def power_sums(self, rows: Tensor, power: int = 2) -> Params:
        """Sums before parameters get their own shapes, so that little is copied."""
        square = self.weight_gradients(rows).square_()
        value = (square if power == 2 else square.square_()).sum((0, 1))
        result = replace(self.layout, bias=None).split(value)
        if self.layout.bias is not None:
            bias = self._bias_gradients(rows).expand(len(self.value), -1, -1, -1)
            result[self.layout.bias] = (bias**power).sum((0, 1)).flatten()
        return result

    def gradient_sums(self, rows: Tensor) -> Params:
        """Summed over data within one product."""
        rows, patches = self.by_channel(rows), self.patches()
        n = rows.shape[1]
        rows = (
            rows.expand(len(patches), -1, -1, -1, -1).permute(2, 1, 3, 0, 4).flatten(3).flatten(1, 2)
        )  # (g, R C, B T)
        sums = rows @ patches.permute(1, 0, 3, 2).flatten(1, 2)
        return self.layout.split(sums.unflatten(1, (n, -1)).movedim(1, 0))


@dataclass(frozen=True)
class LinearStep(MatrixStep):
    """A Linear layer, on rows (B, in) or on any positions (B, ..., in)."""

    def weight_patches(self) -> Tensor:
        """Inputs, position last."""
        return self.inputs.reshape(len(self.inputs), 1, -1, self.inputs.shape[-1]).mT

    def by_channel(self, rows: Tensor) -> Tensor:
        """Channels before positions."""
        return rows.reshape(*rows.shape[:2], 1, -1, rows.shape[-1]).mT

    def pull(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Rows W."""
        return (rows @ self.weight,)

    def push(self, tangents: Sequence[Tensor | None]) -> Tensor:
        """W tangents."""
        (tangent,) = tangents
        assert tangent is not None
        return tangent @ self.weight.mT

    def power_sums(self, rows: Tensor, power: int = 2) -> Params:
        """One product over data where the layer is applied once a row: sum_b |rows_bi|^2 a_bj^2."""
        if self.inputs.dim() > 2:
            return super().power_sums(rows, power)
        rows = rows.expand(len(self.inputs), -1, -1)
        rows, inputs = rows * rows, self.inputs * self.inputs
        if power == 4:
            rows, inputs = rows * rows, inputs * inputs
        return self._product(rows[:, 0] if rows.shape[1] == 1 else rows.sum(1), inputs)

    def sums_of_norms(self, norms: Tensor) -> Params:
        """The same from squared column norms (B or 1, out)."""
        return self._product(norms.expand(len(self.inputs), -1), self.inputs**2)

    def sums_of_constant_norms(self, norms: Tensor) -> Params:
        """The same where all data have one and the same, (out,)."""
        result = {self.layout.weight: torch.outer(norms, (self.inputs**2).sum(0))}
        if self.layout.bias is not None:
            result[self.layout.bias] = norms * len(self.inputs)
        return result

    def _product(self, rows: Tensor, inputs: Tensor) -> Params:
        result = {self.layout.weight: rows.mT @ inputs}
        if self.layout.bias is not None:
            result[self.layout.bias] = rows.sum(0)
        return result

    def push_parameters(self, tangents: Params) -> Tensor:
        """DW a + db."""
        total = self.value.new_zeros(1, 1, *self.value.shape[1:])
        if self.layout.weight in tangents:
            total = total + torch.einsum("b...i,koi->bk...o", self.inputs, tangents[self.layout.weight])
        if self.layout.bias is not None and self.layout.bias in tangents:
            bias = tangents[self.layout.bias]
            total = total + bias.reshape(1, len(bias), *[1] * (self.value.dim() - 2), -1)
        return total


@dataclass(frozen=True)
class ConvStep(MatrixStep):
    """A convolution or transposed convolution over 1 to 3 axes, padded with zeros.

    Args:
        stride: One number an axis.
        padding: Likewise.
        dilation: Likewise.
        output_padding: Likewise; 0 unless transposed.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]

    @property
    def kernel(self) -> tuple[int, ...]:
        """Taps an axis."""
        return tuple(self.weight.shape[2:])

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return torch.convolution(
            channels_last(x), channels_last(weight), bias, self.stride, self.padding, self.dilation,
            self.layout.is_transposed, self.output_padding, self.layout.groups,
        )  # fmt: skip

    def _adjoint(self, rows: Tensor) -> Tensor:
        """Rows (N, *out) to (N, *in)."""
        rows, weight = channels_last(rows), channels_last(self.weight)
        if self.layout.is_transposed:
            zeros = [0] * len(self.stride)
            back = torch.convolution(
                rows, weight, None, self.stride, self.padding, self.dilation, False, zeros, self.layout.groups
            )
            # output_padding beyond a stride leaves positions that no input reaches
            return back[(..., *(slice(0, n) for n in self.inputs.shape[2:]))]
        reach = [
            (o - 1) * s - 2 * p + d * (k - 1) + 1
            for o, s, p, d, k in zip(rows.shape[2:], self.stride, self.padding, self.dilation, self.kernel, strict=True)
        ]
        missing = [n - r for n, r in zip(self.inputs.shape[2:], reach, strict=True)]
        if set(self.stride) == {1} and self.layout.groups == 1:
            # the same as an ordinary convolution with flipped taps, four times as fast on a CPU
            axes = tuple(range(2, rows.dim()))
            edges = [d * (k - 1) - p for d, k, p in zip(self.dilation, self.kernel, self.padding, strict=True)]
            if min(edges) >= 0:
                flipped = channels_last(self.weight.transpose(0, 1).flip(axes))
                return torch.convolution(
                    rows, flipped, None, self.stride, edges, self.dilation, False, [0] * len(axes), 1
                )
        return torch.convolution(
            rows, weight, None, self.stride, self.padding, self.dilation, True, missing, self.layout.groups
        )

    def pull(self, rows: Tensor) -> tuple[Tensor, ...]:
        """The adjoint convolution."""
        # from one channel a convolution does not know that the caller wants channels last
        return (folded(lambda flat: channels_last(self._adjoint(flat)), rows),)

    def push(self, tangents: Sequence[Tensor | None]) -> Tensor:
        """The convolution itself."""
        (tangent,) = tangents
        assert tangent is not None
        return folded(self._columns if self._has_few_channels else lambda x: self._convolve(x, self.weight), tangent)

    @property
    def _has_few_channels(self) -> bool:
        layout, is_reached = self.layout, all(o < s for o, s in zip(self.output_padding, self.stride, strict=True))
        return (
            layout.is_transposed and len(self.stride) == 2 and layout.groups == 1 and layout.n_out <= 4 and is_reached
        )

    def _columns(self, x: Tensor) -> Tensor:
        """A transposed convolution as a matrix product and a fold: on a CPU 8 times as fast to one channel."""
        taps = self.weight.flatten(1).mT @ x.flatten(2)
        return F.fold(taps, self.value.shape[2:], self.kernel, self.dilation, self.padding, self.stride)

    def by_channel(self, rows: Tensor) -> Tensor:
        """Groups and channels apart, positions in one."""
        return rows.flatten(3).unflatten(2, (self.layout.groups, -1))

    def push_parameters(self, tangents: Params) -> Tensor:
        """One convolution for all tangents, which stand in the channels."""
        layout, n = self.layout, next(iter(tangents.values())).shape[0]
        total = self.value.new_zeros(1, 1, *self.value.shape[1:])
        if layout.weight in tangents:
            weight = tangents[layout.weight]
            moves = [self._convolve(self.inputs, one) for one in weight] if layout.groups > 1 else None
            if moves is None:
                joined = weight.transpose(0, 1).flatten(1, 2) if layout.is_transposed else weight.flatten(0, 1)
                total = total + self._convolve(self.inputs, joined).unflatten(1, (n, -1))
            else:
                total = total + torch.stack(moves, 1)
        if layout.bias is not None and layout.bias in tangents:
            bias = tangents[layout.bias]
            total = total + bias.reshape(1, n, -1, *[1] * len(self.stride))
        return total

    def weight_gradients(self, rows: Tensor) -> Tensor:
        """As of any matrix; transposed, the rows are unfolded, which have no zeros between them, and not the inputs."""
        if not self.layout.is_transposed:
            return super().weight_gradients(rows)
        n, g = rows.shape[1], self.layout.groups
        after = [
            s * (i - 1) + d * (k - 1) + 1 - p - o
            for s, i, d, k, p, o in zip(
                self.stride,
                self.inputs.shape[2:],
                self.dilation,
                self.kernel,
                self.padding,
                rows.shape[3:],
                strict=True,
            )
        ]
        seen = _unfold(rows.flatten(0, 1), self.kernel, self.stride, self.dilation, self.padding, after)
        seen = seen.reshape(-1, n, g, self.layout.n_out, *seen.shape[2:])  # (B, R, g, C, taps, T)
        seen = seen.movedim(1, 2).flatten(2, 4).expand(len(self.inputs), -1, -1, -1)
        inputs = self.inputs.flatten(2).unflatten(1, (g, -1))
        matrix = (seen @ inputs.mT).unflatten(2, (n, self.layout.n_out, -1)).movedim(2, 1)  # (B, R, g, C, taps, in)
        return matrix.mT.flatten(4)

    def weight_patches(self) -> Tensor:
        """What every tap sees at every position of the output."""
        x = self.inputs
        if self.layout.is_transposed:
            # the same convolution written as an ordinary one, over inputs with zeros between
            n = [(s - 1) * st + 1 for s, st in zip(x.shape[2:], self.stride, strict=True)]
            spread = x.new_zeros(*x.shape[:2], *n)
            spread[(..., *(slice(None, None, st) for st in self.stride))] = x
            before = [d * (k - 1) - p for d, k, p in zip(self.dilation, self.kernel, self.padding, strict=True)]
            after = [b + o for b, o in zip(before, self.output_padding, strict=True)]
            x, stride = spread, (1,) * len(self.stride)
        else:
            before = after = list(self.padding)
            stride = self.stride
        x = _unfold(x, self.kernel, stride, self.dilation, before, after)  # (B, in, taps, T)
        if self.layout.is_transposed:
            x = x.flip(2)
        return x.reshape(len(x), self.layout.groups, -1, x.shape[-1])

    def shifts(self, reach: Sequence[int], *, of_weight_only: bool) -> list[tuple[int, ...]]:
        """Shifts between two output positions, up to ``reach`` an axis, that can share a tap; one of each +- pair.

        Args:
            reach: Largest shift an axis.
            of_weight_only: Whether only equal taps count, which in a transposed convolution are a stride apart.

        Returns:
            Shifts, the zero shift first.
        """
        steps = self.stride if of_weight_only and self.layout.is_transposed else (1,) * len(self.stride)
        axes = [range(-(r // s) * s, r + 1, s) for r, s in zip(reach, steps, strict=True)]
        zero = (0,) * len(axes)
        return [zero, *(shift for shift in itertools.product(*axes) if shift > zero)]

    def banded_square_sums(self, rows: Tensor, shifts: Sequence[tuple[int, ...]]) -> Tensor:
        r"""The weight's sum of squares from rows that hold several outputs apart from one another.

        .. math:: \sum_o \Big(\sum_q S_{oq} a_{q+k}\Big)^2
                  = \sum_\delta \sum_q \Big(\sum_o S_{oq} S_{o,q+\delta}\Big) a_{q+k} a_{q+\delta+k}

        Each shift is one weight gradient of the convolution, with products of inputs for inputs.

        Args:
            rows: (B or 1, colours, channels, \*positions).
            shifts: Those within one output's field, as `shifts` gives them.

        Returns:
            In the weight's shape.
        """
        total = torch.zeros_like(self.weight)
        for shift in shifts:
            gram = times_shifted(rows, shift, 3).sum(1)
            if self.layout.is_transposed:
                moved = tuple(d // s for d, s in zip(shift, self.stride, strict=True))
            else:
                moved = tuple(d * s for d, s in zip(shift, self.stride, strict=True))
            inputs = times_shifted(self.inputs, moved, 2)
            gradient = torch.ops.aten.convolution_backward(
                gram.expand(len(inputs), *gram.shape[1:]).contiguous(), inputs, self.weight, None, self.stride,
                self.padding, self.dilation, self.layout.is_transposed, self.output_padding, self.layout.groups,
                [False, True, False],
            )[1]  # fmt: skip
            total = total + (gradient if not any(shift) else 2 * gradient)
        return total


def channels_last(x: Tensor) -> Tensor:
    """Images with channels innermost, in which convolutions and up-sampling run up to seven times as fast on a CPU."""
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def _unfold(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    before: Sequence[int],
    after: Sequence[int],
) -> Tensor:
    """Windows of (N, C, *positions), padded: (N, C, taps, T)."""
    x = F.pad(x, [n for pair in zip(reversed(before), reversed(after), strict=True) for n in pair])
    for axis, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True), start=2):
        x = x.unfold(axis, d * (k - 1) + 1, s)[..., ::d]
    n_axes = len(kernel)
    taps = tuple(range(2 + n_axes, 2 + 2 * n_axes))
    x = x.movedim(taps, tuple(range(2, 2 + n_axes)))  # (N, C, *taps, *positions)
    return x.reshape(*x.shape[:2], x.shape[2 : 2 + n_axes].numel(), -1)


def times_shifted(x: Tensor, shift: Sequence[int], first_axis: int) -> Tensor:
    """X at q times x at q + shift, 0 beyond the edges."""
    if not any(shift):
        return x**2
    if any(abs(d) >= n for n, d in zip(x.shape[first_axis:], shift, strict=True)):
        return torch.zeros_like(x)
    here, there, edges = [slice(None)] * first_axis, [slice(None)] * first_axis, []
    for n, d in zip(x.shape[first_axis:], shift, strict=True):
        here.append(slice(max(0, -d), max(0, n - max(0, d))))
        there.append(slice(max(0, d), max(0, n + min(0, d))))
        edges = [max(0, -d), max(0, d), *edges]
    return F.pad(x[tuple(here)] * x[tuple(there)], edges)
