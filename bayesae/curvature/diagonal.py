"""The exact diagonal of the generalised Gauss-Newton matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from bayesae.curvature.general import gradients, row_chunks
from bayesae.curvature.hessian import Hessian, HessianFunction, read_hessian
from bayesae.curvature.linear import ConvStep, LinearStep
from bayesae.curvature.linearisation import Linearisation
from bayesae.curvature.locality import Field
from bayesae.curvature.plan import reach_for
from bayesae.curvature.quadratic import QuadraticForm
from bayesae.curvature.steps import Step
from bayesae.curvature.sweep import sweep, unit_rows
from bayesae.types import Params

__all__ = ["DiagonalVisitor", "ggn_diagonal", "shared_diagonal"]


@torch.no_grad()
def ggn_diagonal(
    lin: Linearisation, x: Tensor, output_hessian: HessianFunction, *, mask: Tensor | None = None
) -> Params:
    r"""Diagonal of the generalised Gauss-Newton matrix, summed over the rows of a batch.

    .. math:: G = \sum_{b=1}^{B} J_b^\top H_b J_b, \qquad
              G_{(i,j),(i,j)} = \sum_b a_{b,j}^2 \, (M_b)_{ii}

    for entry (i, j) of a linear layer with inputs a and M = J^T H J with respect to its pre-activations. M is carried
    back from the outputs as a factor or as a Gram matrix, whichever is smaller, so that before the narrowest layer no
    more than its width of rows is carried, whatever the number of outputs. Convolutional decoders: outputs whose
    fields at a layer do not meet share a row; the code gets its matrix by forward mode. `plan` shows the routes.

    Args:
        lin: The network at its weights.
        x: (B, \*data).
        output_hessian: From outputs (B, \*O) to the Hessian of -log p in them: () for a multiple of the identity, its
            diagonal (B, \*O), a `BlockHessian` or a `LowRankHessian`.
        mask: True where an output counts, as many numbers as outputs; None if all do.

    Returns:
        Non-negative, in the shape of every parameter, units 1 / (units of theta) squared.

    Exact when: always (to rounding).
    Cost: a few forward passes (see benchmarks); a layer without a rule of its own costs torch.func products.

    Raises:
        UnsupportedError: If a layer's output is not one tensor with a row for every datum.

    References:
        | Fast Curvature Matrix-Vector Products for Second-Order Gradient Descent (Schraudolph, 2002)
        | Practical Gauss-Newton Optimisation for Deep Learning (Botev, Ritter, Barber, 2017): the recursion
        | Curtis, Powell, Reid (1974): colouring of sparse Jacobians
    """
    total: Params = {}

    def visitor(steps: list[Step]) -> DiagonalVisitor:
        return DiagonalVisitor(steps, lin.shared, total)

    sweep(lin, x, output_hessian, mask, visitor)
    if lin.shared:
        for name, value in shared_diagonal(lin, x, output_hessian, mask).items():
            total[name] = value
    return {name: total[name] if name in total else torch.zeros_like(leaf) for name, leaf in lin.params.items()}


class DiagonalVisitor:
    """Sums of squared gradients of every layer.

    Args:
        steps: Trace of a whole batch.
        left_out: Names of parameters that somebody else accounts for.
        total: Sums so far, by name; added to.
    """

    colours = "all"

    def __init__(self, steps: list[Step], left_out: frozenset[str], total: Params) -> None:
        self.steps, self.left_out, self.total = steps, left_out, total
        self.part = slice(None)
        # squared norms of the columns at Linear layers, whose products over data are done once a batch
        self.norms: dict[int, Tensor] = {}
        self.constants: dict[int, Tensor] = {}

    def start(self, part: slice) -> None:
        """The next chunk."""
        self.part = part

    def finish(self) -> None:
        """End of the batch."""
        for index, norms in self.norms.items():
            step = self.steps[index]
            assert isinstance(step, LinearStep)
            self._add(step.sums_of_norms(norms))
        for index, norms in self.constants.items():
            step = self.steps[index]
            assert isinstance(step, LinearStep)
            self._add(step.sums_of_constant_norms(norms))

    def _add(self, sums: Params) -> None:
        for name, value in sums.items():
            if name not in self.left_out:
                self.total[name] = self.total[name] + value if name in self.total else value

    def _add_norms(self, index: int, step: Step, norms: Tensor) -> None:
        if index not in self.norms:
            n = len(self.steps[index].value)
            self.norms[index] = norms.new_zeros(n, step.width)
        self.norms[index][self.part] += norms

    def form(self, index: int, step: LinearStep, form: QuadraticForm) -> None:
        """Only the diagonal of M is read."""
        if form.is_shared:
            self.constants[index] = form.diagonal()[0]  # of the network, not of its data: the same in every chunk
        else:
            self._add_norms(index, step, form.diagonal())

    def rows(self, index: int, step: Step, rows: Tensor) -> None:
        """Squared gradients."""
        if isinstance(step, LinearStep) and step.inputs.dim() == 2:
            self._add_norms(index, step, (rows * rows).sum(1))
        else:
            self._add(step.power_sums(rows))

    def coloured(self, index: int, step: Step, rows: Tensor, field: Field) -> None:
        """Of a Linear layer the same norms; of a convolution a band of products."""
        if isinstance(step, ConvStep):
            shifts = step.shifts(reach_for(step, field, self.colours), of_weight_only=True)
            self._add({step.layout.weight: step.banded_square_sums(rows, shifts)})
        else:
            self.rows(index, step, rows)

    def columns(self, index: int, name: str, norms: Tensor) -> None:
        """As they come."""
        self._add({name: norms})


def shared_diagonal(
    lin: Linearisation,
    x: Tensor,
    output_hessian: HessianFunction,
    mask: Tensor | None,
) -> Params:
    """The diagonal for parameters that stand in several places, one vector-Jacobian product an output."""
    names = sorted(lin.shared)
    total = {name: torch.zeros_like(lin.params[name]) for name in names}
    for part, steps in lin.batches(x):
        outputs = steps[-1].value
        hessian = read_hessian(output_hessian(outputs), outputs, None if mask is None else mask[part])
        for rows in all_rows(hessian, outputs):
            for some in row_chunks(lin, names, len(outputs), rows.shape[1]):
                for name, g in gradients(lin, steps[0].value, rows[:, some], names).items():
                    total[name] = total[name] + (g**2).sum((0, 1))
    return total


def all_rows(hessian: Hessian, outputs: Tensor) -> list[Tensor]:
    """Rows whose Gram matrices add up to H."""
    rows = [unit_rows(hessian, outputs)]
    return rows if hessian.dense is None else [*rows, hessian.dense]
