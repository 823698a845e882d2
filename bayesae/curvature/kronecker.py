"""Exact Kronecker factors, and the exact diagonal in their eigenbasis."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bayesae.curvature.covariances import RotatedBlock
from bayesae.curvature.diagonal import DiagonalVisitor, shared_diagonal
from bayesae.curvature.hessian import HessianFunction
from bayesae.curvature.layout import Layout
from bayesae.curvature.linear import ConvStep, LinearStep, MatrixStep, times_shifted
from bayesae.curvature.linearisation import Linearisation
from bayesae.curvature.locality import Field
from bayesae.curvature.plan import reach_for
from bayesae.curvature.quadratic import QuadraticForm
from bayesae.curvature.steps import Step
from bayesae.curvature.sweep import sweep
from bayesae.types import Params

__all__ = ["KroneckerCurvature", "KroneckerFactors", "eigencorrection", "kronecker_factors"]


@dataclass(frozen=True)
class KroneckerFactors:
    r"""Factors of one layer, as sums over data; its curvature is outputs (x) inputs / count.

    Args:
        layout: Where weight and bias stand in the matrix [W, b].
        inputs: Sum of [a, 1][a, 1]^T over data and positions, (g, J, J).
        outputs: Sum of M over data and positions, (g, C, C).
        count: Data times positions.
    """

    layout: Layout
    inputs: Tensor
    outputs: Tensor
    count: float

    def __add__(self, other: KroneckerFactors) -> KroneckerFactors:
        return replace(
            self,
            inputs=self.inputs + other.inputs,
            outputs=self.outputs + other.outputs,
            count=self.count + other.count,
        )


@dataclass(frozen=True)
class KroneckerCurvature:
    """Factors of every layer that has a matrix, the exact diagonal for the rest; sums over data, so that they add.

    Args:
        blocks: By the layer's dotted name.
        rest: Diagonal for the parameters of no block, in their shapes.
    """

    blocks: dict[str, KroneckerFactors]
    rest: Params

    def __add__(self, other: KroneckerCurvature) -> KroneckerCurvature:
        # an empty batch has met no layer, and counts all parameters among the rest
        blocks, rest = dict(self.blocks), dict(self.rest)
        for name, block in other.blocks.items():
            blocks[name] = blocks[name] + block if name in blocks else block
        for name, leaf in other.rest.items():
            rest[name] = rest[name] + leaf if name in rest else leaf
        inside = {name for block in blocks.values() for name in block.layout.names}
        return KroneckerCurvature(blocks, {name: leaf for name, leaf in rest.items() if name not in inside})

    def scaled(self, share: float) -> KroneckerCurvature:
        """As if every datum stood for ``share`` of them."""
        blocks = {
            name: replace(b, inputs=b.inputs * share, outputs=b.outputs * share, count=b.count * share)
            for name, b in self.blocks.items()
        }
        return KroneckerCurvature(blocks, {name: leaf * share for name, leaf in self.rest.items()})


@torch.no_grad()
def kronecker_factors(
    lin: Linearisation, x: Tensor, output_hessian: HessianFunction, *, mask: Tensor | None = None
) -> KroneckerCurvature:
    r"""Kronecker factors of the generalised Gauss-Newton matrix, weight and bias of a layer joined.

    .. math:: G_l \approx \Big(\sum_{b,t} M_{b,tt}\Big) \otimes \Big(\sum_{b,t} [a_{bt}, 1][a_{bt}, 1]^\top\Big)
                           \Big/ \sum_{b,t} 1

    with M = J^T H J of the layer's pre-activations, exact and not sampled, and positions t of a convolution taken as
    if they were data (the "expand" form; Grosse and Martens' KFC). Parameters outside Linear layers and convolutions,
    and shared ones, get their exact diagonal.

    Args:
        lin: The network at its weights.
        x: (B, \*data).
        output_hessian: As for `ggn_diagonal`.
        mask: As for `ggn_diagonal`.

    Returns:
        Factors as sums over data.

    Exact when: the network is one Linear layer and H is the same for every datum; or there is one datum, and every
        layer is applied once.
    Cost: a few forward passes; with H that varies by datum and hundreds of outputs tens.

    References:
        | Optimizing Neural Networks with Kronecker-factored Approximate Curvature (Martens, Grosse, 2015)
        | A Kronecker-factored approximate Fisher matrix for convolution layers (Grosse, Martens, 2016)
    """
    sums: dict[str, KroneckerFactors] = {}
    rest: Params = {}

    def visitor(steps: list[Step]) -> _FactorVisitor:
        return _FactorVisitor(steps, lin.shared, sums, rest)

    sweep(lin, x, output_hessian, mask, visitor)
    if lin.shared:
        rest.update(shared_diagonal(lin, x, output_hessian, mask))
    inside = {name for block in sums.values() for name in block.layout.names}
    for name, leaf in lin.params.items():
        if name not in inside and name not in rest:
            rest[name] = torch.zeros_like(leaf)
    return KroneckerCurvature(sums, rest)


class _MatrixVisitor(DiagonalVisitor):
    """Steps with a matrix of their own go to `matrix_form` and `matrix_rows`, others to the diagonal."""

    colours = "convolutions"

    def has_block(self, step: Step) -> bool:
        return isinstance(step, MatrixStep) and not self.left_out.intersection(step.names)

    def form(self, index: int, step: LinearStep, form: QuadraticForm) -> None:
        if self.has_block(step):
            self.matrix_form(index, step, form)
        else:
            super().form(index, step, form)

    def rows(self, index: int, step: Step, rows: Tensor) -> None:
        if isinstance(step, MatrixStep) and self.has_block(step):
            self.matrix_rows(index, step, rows)
        else:
            super().rows(index, step, rows)

    def coloured(self, index: int, step: Step, rows: Tensor, field: Field) -> None:
        self.rows(index, step, rows)

    def matrix_form(self, index: int, step: LinearStep, form: QuadraticForm) -> None:
        raise NotImplementedError

    def matrix_rows(self, index: int, step: MatrixStep, rows: Tensor) -> None:
        raise NotImplementedError


class _FactorVisitor(_MatrixVisitor):
    """Sums of M, and of the inputs' second moments once a batch."""

    def __init__(
        self, steps: list[Step], left_out: frozenset[str], sums: dict[str, KroneckerFactors], rest: Params
    ) -> None:
        super().__init__(steps, left_out, rest)
        self.sums = sums
        for step in steps:
            if isinstance(step, MatrixStep) and self.has_block(step):
                patches = step.patches().permute(1, 2, 0, 3).flatten(2)  # (g, J, B T)
                outputs = patches.new_zeros(step.layout.groups, step.layout.n_out, step.layout.n_out)
                count = float(len(step.value) * step.n_positions)
                self._sum(step, KroneckerFactors(step.layout, patches @ patches.mT, outputs, count))

    def _sum(self, step: Step, new: KroneckerFactors) -> None:
        self.sums[step.name] = self.sums[step.name] + new if step.name in self.sums else new

    def _sum_outputs(self, step: MatrixStep, outputs: Tensor) -> None:
        self.sums[step.name].outputs.add_(outputs)  # a buffer of this call's own

    def matrix_form(self, index: int, step: LinearStep, form: QuadraticForm) -> None:
        self._sum_outputs(step, form.gram_sum(len(step.value))[None])

    def matrix_rows(self, index: int, step: MatrixStep, rows: Tensor) -> None:
        by_channel = step.by_channel(rows)
        flat = by_channel.permute(2, 3, 0, 1, 4).flatten(2)  # (g, C, B R T)
        copies = len(step.value) // len(by_channel)  # rows that are the same for all data count once for each
        self._sum_outputs(step, flat @ flat.mT * copies)


@torch.no_grad()
def eigencorrection(
    lin: Linearisation,
    x: Tensor,
    output_hessian: HessianFunction,
    bases: Mapping[str, RotatedBlock],
    *,
    mask: Tensor | None = None,
) -> dict[str, Tensor]:
    r"""The exact diagonal of the GGN in the eigenbasis of Kronecker factors, summed over data.

    .. math:: d_{ij} = \sum_b \big[(U_i \otimes V_j)^\top G_b\, (U_i \otimes V_j)\big]

    In this basis it is the best diagonal there is (in Frobenius norm), where the factors' own eigenvalues are not.

    Args:
        lin: The network at its weights.
        x: (B, \*data).
        output_hessian: As for `ggn_diagonal`.
        bases: By layer, orthogonal U (g, C, C) and V (g, J, J); their ``values`` are not read.
        mask: As for `ggn_diagonal`.

    Returns:
        (g, C, J) for every layer of ``bases``.

    Exact when: always (to rounding), whatever the bases.
    Cost: that of the diagonal, and one product with U and V for each row that is carried.

    References:
        | Fast Approximate Natural Gradient Descent in a Kronecker-factored Eigenbasis (George et al., 2018)
    """
    total: dict[str, Tensor] = {}

    def visitor(steps: list[Step]) -> _RotatedVisitor:
        return _RotatedVisitor(steps, lin.shared, bases, total)

    sweep(lin, x, output_hessian, mask, visitor)
    return total


class _RotatedVisitor(_MatrixVisitor):
    """Squares of gradients U^T G V."""

    colours = "rotated"

    def __init__(
        self,
        steps: list[Step],
        left_out: frozenset[str],
        bases: Mapping[str, RotatedBlock],
        rotated: dict[str, Tensor],
    ) -> None:
        super().__init__(steps, left_out, {})
        self.bases, self.rotated = bases, rotated

    def has_block(self, step: Step) -> bool:
        return step.name in self.bases

    def finish(self) -> None:
        for index, norms in self.norms.items():
            step = self.steps[index]
            if isinstance(step, LinearStep) and self.has_block(step):
                self._sum(step, (norms.mT @ self._patches(step)[:, 0, :, 0] ** 2)[None])

    def _patches(self, step: MatrixStep) -> Tensor:
        return self.bases[step.name].inputs.to(step.value).mT @ step.patches()

    def _sum(self, step: Step, value: Tensor) -> None:
        self.rotated[step.name] = self.rotated[step.name] + value if step.name in self.rotated else value

    def matrix_form(self, index: int, step: LinearStep, form: QuadraticForm) -> None:
        turned = form.through_linear(self.bases[step.name].outputs[0].to(step.value))
        self._add_norms(index, step, turned.diagonal())

    def matrix_rows(self, index: int, step: MatrixStep, rows: Tensor) -> None:
        block = self.bases[step.name]
        outputs, inputs = block.outputs.to(step.value), block.inputs.to(step.value)
        if isinstance(step, LinearStep) and step.inputs.dim() == 2:
            # applied once a row, the gradient is a product, and its two sides turn apart
            self._add_norms(index, step, (rows @ outputs[0]).square_().sum(1))
            return
        turned = outputs.mT @ step.matrix_gradients(rows) @ inputs
        self._sum(step, (turned**2).sum((0, 1)))

    def coloured(self, index: int, step: Step, rows: Tensor, field: Field) -> None:
        if not (isinstance(step, ConvStep) and self.has_block(step)):
            return
        positions = step.value.shape[2:]
        turned = (self.bases[step.name].outputs.to(step.value).mT @ step.by_channel(rows)).unflatten(-1, positions)
        patches = self._patches(step).unflatten(-1, positions)
        for shift in step.shifts(reach_for(step, field, self.colours), of_weight_only=False):
            gram = times_shifted(turned, shift, 4).sum(1).flatten(3)  # (B or 1, g, C, T)
            products = times_shifted(patches, shift, 3).flatten(3)  # (B, g, J, T)
            value = (gram @ products.mT).sum(0)
            self._sum(step, value if not any(shift) else 2 * value)
