"""Exact variance of a network's outputs, linearised in its weights."""

from __future__ import annotations

import torch
from torch import Tensor

from bayesae.curvature.block import ColumnVisitor
from bayesae.curvature.covariances import (
    DenseCovariance,
    DiagonalCovariance,
    KroneckerCovariance,
    LowRankCovariance,
    RotatedBlock,
)
from bayesae.curvature.general import gradients, row_chunks
from bayesae.curvature.hessian import cholesky
from bayesae.curvature.linear import LinearStep, MatrixStep
from bayesae.curvature.linearisation import Linearisation, push
from bayesae.curvature.plan import row_numbers
from bayesae.curvature.products import parameter_tangents
from bayesae.curvature.quadratic import QuadraticForm, SharedProduct
from bayesae.curvature.selection import Selection
from bayesae.curvature.steps import Step
from bayesae.curvature.sweep import carry, narrowest, rows_at_once
from bayesae.errors import ParameterError, ShapeError
from bayesae.types import Params

__all__ = ["output_variance"]

Covariance = DiagonalCovariance | KroneckerCovariance | DenseCovariance | LowRankCovariance


@torch.no_grad()
def output_variance(
    lin: Linearisation, x: Tensor, covariance: Covariance, *, directions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r"""Outputs, and the variance of each one, or along directions, when the weights move by a covariance.

    .. math:: v_o = J_{o:} \Sigma J_{o:}^\top, \qquad
              v_o = \sum_l \sum_i \Big(\frac{\partial f_o}{\partial h_{l,i}}\Big)^2 s_{l,i}, \quad
              s_{l,i} = \sum_j a_{l,j}^2 \operatorname{Var}[W_{l,ij}] + \operatorname{Var}[b_{l,i}]

    the second for independent weights; for Kronecker blocks the same holds in their eigenbasis. No Jacobian in the
    weights: layer l contributes through its inputs a and the Jacobian of the outputs in its pre-activations h.
    Everything before the narrowest layer is first summed into that layer's own (Z, Z) covariance, so that the encoder
    costs Z rows and not one row an output.

    Args:
        lin: The network at its weights.
        x: (N, \*data).
        covariance: Of the weights.
        directions: v, (D, \*O) or (N, D, \*O); every output by itself if None.

    Returns:
        Outputs (N, \*O), and variances: (N, \*O), or of v^T f, (N, D).

    Exact when: always (to rounding), for the linearised network.
    Cost: outputs * width * width operations a row and layer after the narrowest, for independent weights; a few times
        that for Kronecker blocks; s^2 an output for a dense covariance of s weights.

    Raises:
        ParameterError: If the covariance names unknown parameters.
        ShapeError: If directions do not fit the outputs.

    References:
        | Improving predictions of Bayesian neural nets via local linearization (Immer, Korzepa, Bauer, 2021)
    """
    reader = _reader(lin, covariance)
    outputs, variances = [], []
    for part, steps in lin.batches(x):
        value = steps[-1].value
        some = None
        if directions is not None:
            is_common = directions.dim() == value.dim()
            lead = directions.shape[: -(value.dim() - 1)] if value.dim() > 1 else directions.shape
            is_fitting = directions.shape[len(lead) :] == value.shape[1:]
            if not is_fitting or not (is_common or len(lead) == 2 and lead[0] == len(x)):
                raise ShapeError(
                    f"directions of shape (D, *O) or (N, D, *O) with O = {tuple(value.shape[1:])}",
                    f"{tuple(directions.shape)}",
                    "Give each direction the shape of the outputs.",
                )
            some = (directions[None] if is_common else directions[part]).to(value)
        n_rows = value[0].numel() if some is None else some.shape[1]
        lowest = narrowest(steps, n_rows) if some is None else 0
        numbers = row_numbers(steps, lowest, n_rows, is_rotated=bool(reader.blocks))
        size = rows_at_once(lin, numbers if reader.dense is None else max(numbers, n_rows * reader.dense[0].size))
        for start in range(0, len(value), size):
            rows = slice(start, min(start + size, len(value)))
            here = lin.take(steps, rows)
            if some is None:
                variances.append(_marginal(lin, here, reader).reshape(here[-1].value.shape))
            else:
                variances.append(_directional(lin, here, reader, some if len(some) == 1 else some[rows]))
        outputs.append(value)
    if not outputs:
        empty = lin.trace(x)[-1].value
        return empty, empty.clone() if directions is None else empty.new_zeros(0, directions.shape[-empty.dim()])
    return torch.cat(outputs), torch.cat(variances)


def _marginal(lin: Linearisation, steps: list[Step], reader: _Reader) -> Tensor:
    value, end = steps[-1].value, len(steps) - 1
    n_outputs = value[0].numel()
    cut = narrowest(steps, n_outputs)
    form = QuadraticForm(n_outputs, value.new_ones(()), keeps_rows=True)
    visitor = reader.visitor(value, n_outputs)
    if cut and not any(reader.has(step) for step in steps[cut + 1 :]):
        # nothing after the cut is uncertain: columns through the decoder are cheaper than rows
        eye = torch.eye(steps[cut].width, dtype=value.dtype, device=value.device)
        columns = push(steps, {cut: eye.reshape(1, -1, *steps[cut].value.shape[1:])})
        assert columns is not None
        jacobian = columns.flatten(2).mT
    else:
        state = carry(lin, steps, end, form, visitor, stop=cut)
        jacobian = None if not cut or state is None else _rows_of(state)
    if jacobian is not None:
        jacobian = jacobian.expand(len(value), -1, -1)
        before = reader.visitor(value, steps[cut].width, keeps_pairs=True)
        carry(lin, steps, cut, QuadraticForm(steps[cut].width, value.new_ones(()), keeps_rows=True), before)
        visitor.add_before(jacobian, before)
    return _total(reader, lin, steps, visitor, None)


def _directional(lin: Linearisation, steps: list[Step], reader: _Reader, rows: Tensor) -> Tensor:
    value = steps[-1].value
    visitor = reader.visitor(value, rows.shape[1])
    form = QuadraticForm(value[0].numel(), value.new_ones(()), rows.flatten(2), keeps_rows=True)
    carry(lin, steps, len(steps) - 1, form, visitor)
    return _total(reader, lin, steps, visitor, rows)


def _total(
    reader: _Reader, lin: Linearisation, steps: list[Step], visitor: _Rows | _DenseRows, rows: Tensor | None
) -> Tensor:
    """What the layers gave, and what no layer owns; rows at the outputs, None for every output."""
    value = steps[-1].value
    blocks = reader.blocks_of_no_layer(lin, steps)
    names = list(reader.shared) if reader.dense is None else reader.dense[0].shared
    names = [*names, *(name for block in blocks for name in block.layout.names)]
    total = value.new_zeros(())
    if names:
        if rows is None:
            n = value[0].numel()
            rows_here = torch.eye(n, dtype=value.dtype, device=value.device).reshape(1, n, *value.shape[1:])
        else:
            rows_here = rows
        if isinstance(visitor, _DenseRows):
            leaves = gradients(lin, steps[0].value, rows_here, names)
            visitor.parts.append(visitor.chosen.pick_shared(leaves))
        else:
            pieces = []
            for some in row_chunks(lin, names, len(value), rows_here.shape[1]):
                leaves = gradients(lin, steps[0].value, rows_here[:, some], names)
                own = [(leaves[name] ** 2 * leaf).flatten(2).sum(-1) for name, leaf in reader.shared.items()]
                for block in blocks:
                    u, v, values = (part.to(value) for part in (block.outputs, block.inputs, block.values))
                    turned = u.mT @ block.layout.join(leaves) @ v
                    own.append((turned**2 * values).flatten(2).sum(-1))
                pieces.append(sum(own[1:], own[0]))
            total = torch.cat(pieces, 1)
    total = total + visitor.variances()
    if reader.factor:
        moved = parameter_tangents(lin, steps, reader.factor).flatten(2)  # (B, K, O)
        along = moved if rows is None else moved @ rows.flatten(2).mT
        total = (total + reader.sign * (along**2).sum(1)).clamp(min=0)
    return total


def _reader(lin: Linearisation, covariance: Covariance) -> _Reader:
    if isinstance(covariance, KroneckerCovariance):
        return _Reader(lin, {block.layout.weight: block for block in covariance.blocks}, dict(covariance.rest))
    if isinstance(covariance, DenseCovariance):
        return _Reader(
            lin, {}, {}, (lin.selection(covariance.masks), cholesky(covariance.matrix.double(), "covariance"))
        )
    if isinstance(covariance, LowRankCovariance):
        return _Reader(lin, {}, covariance.diagonal, factor=covariance.factor, sign=covariance.sign)
    return _Reader(lin, {}, covariance.variances)


def _rows_of(state: QuadraticForm | Tensor) -> Tensor:
    return state.rows() if isinstance(state, QuadraticForm) else state.flatten(2)


class _Reader:
    """A covariance as the engine asks for it.

    Args:
        lin: The network.
        blocks: By name of the layer's weight: layers whose weights are independent in some basis.
        variances: Of other parameters, by name.
        dense: Chosen weights and a factor L of their covariance, (s, s).
        factor: Low-rank factor F, leaves (K, *shape).
        sign: Of F^T F.
    """

    def __init__(
        self,
        lin: Linearisation,
        blocks: dict[str, RotatedBlock],
        variances: Params,
        dense: tuple[Selection, Tensor] | None = None,
        factor: Params | None = None,
        sign: int = 1,
    ) -> None:
        names = [*variances, *(factor or {}), *(name for block in blocks.values() for name in block.layout.names)]
        unknown = [name for name in names if name not in lin.params]
        if unknown:
            raise ParameterError(f"some of {sorted(lin.params)}", f"{sorted(unknown)}", "See named_parameters().")
        self.blocks, self.dense, self.sign, self.shared_names = blocks, dense, sign, lin.shared
        self.factor = {name: leaf.to(lin.params[name]) for name, leaf in (factor or {}).items()}
        self.variances = {
            name: leaf.to(lin.params[name]) for name, leaf in variances.items() if bool((leaf != 0).any())
        }
        self.shared = {name: leaf for name, leaf in self.variances.items() if name in lin.shared}
        self._joined: dict[str, tuple[Tensor | None, Tensor | None, Tensor]] = {}

    def has(self, step: Step) -> bool:
        """Whether a step has uncertain weights of its own."""
        if self.dense is not None:
            return self.dense[0].has(step)
        return any(n in self.variances and n not in self.shared for n in step.names) or self._block(step) is not None

    def _block(self, step: Step) -> RotatedBlock | None:
        if not isinstance(step, MatrixStep) or self.shared_names.intersection(step.names):
            return None
        return self.blocks.get(step.layout.weight)

    def blocks_of_no_layer(self, lin: Linearisation, steps: list[Step]) -> list[RotatedBlock]:
        """Blocks whose weights no step owns as a matrix: layers of other kinds, or used more than once."""
        owned = {
            step.layout.weight
            for step in steps
            if isinstance(step, MatrixStep) and not lin.shared.intersection(step.names)
        }
        return [block for name, block in self.blocks.items() if name not in owned]

    def basis(self, step: MatrixStep) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """Bases of outputs and inputs, None for the weights' own, and variances (g, C, J)."""
        if step.name not in self._joined:
            block = self._block(step)
            if block is not None and block.layout != step.layout:
                raise ParameterError(
                    f"a block of {step.layout} for {step.name!r}",
                    f"{block.layout}",
                    "Weight and bias stand in one block; give the bias the last column, of variance 0 if it is fixed.",
                )
            if block is not None:
                parts = block.outputs.to(step.weight), block.inputs.to(step.weight), block.values.to(step.weight)
                self._joined[step.name] = parts
            else:
                own = {step.layout.weight: step.weight}
                if step.layout.bias is not None and step.bias is not None:
                    own[step.layout.bias] = step.bias
                mine = {
                    n: self.variances[n] if n in self.variances and n not in self.shared else torch.zeros_like(leaf)
                    for n, leaf in own.items()
                }
                self._joined[step.name] = None, None, step.layout.join(mine)
        return self._joined[step.name]

    def visitor(self, like: Tensor, n_rows: int, *, keeps_pairs: bool = False) -> _Rows | _DenseRows:
        """A fresh collector for one chunk."""
        if self.dense is not None:
            return _DenseRows(*self.dense, like, n_rows)
        return _Rows(self, like, n_rows, keeps_pairs)


class _Rows:
    """Variances of rows under independent weights or Kronecker blocks, one layer after another."""

    def __init__(self, reader: _Reader, like: Tensor, n_rows: int, keeps_pairs: bool) -> None:
        self.reader, self.total = reader, like.new_zeros(len(like), n_rows)
        # rows themselves, where a covariance between rows will be asked for and not only their variances
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.keeps_pairs = keeps_pairs

    def variances(self) -> Tensor:
        """(B, R)."""
        return self.total

    def add_before(self, jacobian: Tensor, before: _Rows | _DenseRows) -> None:
        """What reaches the rows through a narrow layer: diag(J C J^T), C the covariance there."""
        assert isinstance(before, _Rows)
        covariance = jacobian.new_zeros(len(jacobian), jacobian.shape[2], jacobian.shape[2])
        for rows, weights in before.pairs:
            covariance = covariance + (rows * weights[:, None]) @ rows.mT
        self.total = self.total + ((jacobian @ covariance) * jacobian).sum(-1)

    def form(self, index: int, step: LinearStep, form: QuadraticForm) -> None:
        """Of a Linear layer: s = V^2 a^2 in the basis, and squares of the rows in it."""
        if not self.reader.has(step):
            return
        turn, basis, values = self.reader.basis(step)
        patches = step.patches()[:, 0, :, 0]
        spread = (patches if basis is None else patches @ basis[0]) ** 2 @ values[0].mT
        turned = form if turn is None else form.through_linear(turn[0])
        self._add(turned, spread)

    def _add(self, form: QuadraticForm, spread: Tensor) -> None:
        if self.keeps_pairs:
            self.pairs.append((form.rows(), spread))
            return
        weighted = spread if form.slope is None else spread * form.slope**2
        factor = form.factor
        if factor is None:
            self.total = self.total + weighted
        elif isinstance(factor, SharedProduct):
            self.total = self.total + factor.row_norms(weighted)
        elif factor.dim() == 2:
            self.total = self.total + weighted @ (factor**2).mT
        else:
            self.total = self.total + ((factor**2) @ weighted[:, :, None])[..., 0]

    def rows(self, index: int, step: Step, rows: Tensor) -> None:
        """Of any other step: squared gradients times variances."""
        if not self.reader.has(step):
            return
        if isinstance(step, MatrixStep):
            turn, basis, values = self.reader.basis(step)
            gradient = step.matrix_gradients(rows)
            gradient = gradient if turn is None else turn.mT @ gradient
            gradient = gradient if basis is None else gradient @ basis
            pieces = [(gradient.flatten(2), values.flatten())]
        else:
            leaves = step.gradients(rows)
            pieces = [
                (leaf.flatten(2), self.reader.variances[n].flatten())
                for n, leaf in leaves.items()
                if n in self.reader.variances
            ]
        for flat, variance in pieces:
            if self.keeps_pairs:
                self.pairs.append((flat, variance[None]))
            else:
                self.total = self.total + flat**2 @ variance


class _DenseRows(ColumnVisitor):
    """The same under a dense covariance: columns of all layers must meet."""

    def __init__(self, chosen: Selection, factor: Tensor, like: Tensor, n_rows: int) -> None:
        super().__init__(chosen)
        self.factor, self.like, self.n_rows = factor.to(like), like, n_rows

    def add_before(self, jacobian: Tensor, before: _Rows | _DenseRows) -> None:
        """Columns of weights before a narrow layer."""
        assert isinstance(before, _DenseRows)
        columns, places = before.joined(self.like, before.n_rows)
        self.parts.append((jacobian @ columns, places))

    def variances(self) -> Tensor:
        """|L^T J^T|^2, (B, R)."""
        columns, places = self.joined(self.like, self.n_rows)
        return torch.linalg.vector_norm(columns @ self.factor[places], dim=-1) ** 2
