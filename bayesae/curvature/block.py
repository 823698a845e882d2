"""Dense blocks of the generalised Gauss-Newton matrix for any choice of weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bayesae.curvature.diagonal import all_rows
from bayesae.curvature.general import gradients
from bayesae.curvature.hessian import Hessian, HessianFunction, read_hessian
from bayesae.curvature.linear import LinearStep
from bayesae.curvature.linearisation import Linearisation, last_spatial
from bayesae.curvature.quadratic import QuadraticForm
from bayesae.curvature.selection import Selection
from bayesae.curvature.steps import Step
from bayesae.curvature.sweep import carry, narrowest, rows_at_once

__all__ = ["ColumnVisitor", "ggn_block"]


@torch.no_grad()
def ggn_block(
    lin: Linearisation,
    x: Tensor,
    output_hessian: HessianFunction,
    masks: Mapping[str, Tensor],
    *,
    mask: Tensor | None = None,
) -> Tensor:
    r"""The generalised Gauss-Newton matrix of chosen weights, summed over the rows of a batch.

    .. math:: G_{pq} = \sum_b J_{b,:p}^\top H_b J_{b,:q}

    A column of the Jacobian is an input times a column of the Jacobian in a pre-activation. Weights before the code
    meet in its (Z, Z) matrix, and never see the outputs; weights of a linear output layer meet only where they feed
    the same output.

    Args:
        lin: The network at its weights.
        x: (B, \*data).
        output_hessian: As for `ggn_diagonal`.
        masks: The s chosen weights, boolean masks in the parameters' shapes by name; order as in ``Subset.ravel``.
        mask: As for `ggn_diagonal`.

    Returns:
        (s, s), positive semi-definite.

    Exact when: always (to rounding).
    Cost: products over data for pairs of layers; memory s^2 and the temporaries of a chunk.

    Raises:
        ParameterError: If a mask does not belong to the network.
    """
    chosen = lin.selection(masks)
    total = _Blocks()
    for part, steps in lin.batches(x):
        outputs = steps[-1].value
        hessian = read_hessian(output_hessian(outputs), outputs, None if mask is None else mask[part])
        n_rows = hessian.n_outputs if hessian.diagonal is None or hessian.diagonal.dim() else steps[-2].width
        widest = max((step.width for step in steps[1:-1] if step.width < n_rows), default=1)
        size = rows_at_once(lin, 2 * n_rows * widest)  # the rows, and columns of chosen weights beside them
        for start in range(0, len(outputs), size):
            some = slice(start, min(start + size, len(outputs)))
            _add_block(lin, lin.take(steps, some), hessian.take(some), chosen, total)
    return total.matrix(next(iter(lin.params.values())).new_zeros(chosen.size, chosen.size))


class _Blocks:
    """Sums of blocks of a symmetric matrix, which are put in their places once at the end."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def add(self, name: str, rows: Tensor, columns: Tensor, values: Tensor) -> None:
        """Values (r, c) at places rows (r,) and columns (c,), the same ones whenever the name is the same."""
        known = self.sums.get(name)
        self.sums[name] = rows, columns, values if known is None else known[2].add_(values)

    def matrix(self, zeros: Tensor) -> Tensor:
        """The whole."""
        for rows, columns, values in self.sums.values():
            zeros[rows[:, None], columns[None]] += values
            if rows is not columns:
                zeros[columns[:, None], rows[None]] += values.mT
        return zeros


class ColumnVisitor:
    """Collects Jacobian columns of chosen weights from rows of a carry.

    Args:
        chosen: The weights.
    """

    def __init__(self, chosen: Selection) -> None:
        self.chosen = chosen
        self.parts: list[tuple[Tensor, Tensor]] = []

    def form(self, index: int, step: LinearStep, form: QuadraticForm) -> None:
        """Its rows."""
        if self.chosen.has(step):
            self.parts.append(self.chosen.columns(step, form.rows()))

    def rows(self, index: int, step: Step, rows: Tensor) -> None:
        """Of steps with chosen weights."""
        if self.chosen.has(step):
            self.parts.append(self.chosen.columns(step, rows))

    def joined(self, like: Tensor, n_rows: int) -> tuple[Tensor, Tensor]:
        """All columns (B, R, s) and places (s,)."""
        n = len(like)
        if not self.parts:
            return like.new_zeros(n, n_rows, 0), torch.zeros(0, dtype=torch.long, device=like.device)
        columns = [part.expand(n, -1, -1) for part, _ in self.parts]
        return torch.cat(columns, -1), torch.cat([places for _, places in self.parts])


def _add_block(lin: Linearisation, steps: list[Step], hessian: Hessian, chosen: Selection, total: _Blocks) -> None:
    outputs, last = steps[-1].value, steps[last_spatial(steps)]
    is_plain = hessian.blocks is None and hessian.dense is None and not chosen.shared
    if is_plain and isinstance(last, LinearStep) and last.inputs.dim() == 2 and len(steps) > 2:
        _with_output_layer(lin, steps, last, hessian, chosen, total)
        return
    for part, rows in enumerate(all_rows(hessian, outputs)):
        visitor, cut = ColumnVisitor(chosen), narrowest(steps, rows.shape[1])
        flat = rows.reshape(*rows.shape[:2], *last.value.shape[1:])
        form = QuadraticForm(last.width, flat.new_ones(()), flat.flatten(2), keeps_rows=True)
        at_cut = carry(lin, steps, last_spatial(steps), form, visitor, stop=cut)
        if chosen.shared:
            leaves = gradients(lin, steps[0].value, rows, chosen.shared)
            visitor.parts.append(chosen.pick_shared(leaves))
        columns, places = visitor.joined(outputs, rows.shape[1])
        flat = columns.flatten(0, 1)
        total.add(f"after, {part}", places, places, flat.mT @ flat)
        if at_cut is not None:
            jacobian = _as_rows(at_cut, outputs)
            later = {f"after, {part}": (columns.mT @ jacobian, places)}
            _add_before(lin, steps, cut, jacobian, chosen, later, total)


def _as_rows(state: QuadraticForm | Tensor, outputs: Tensor) -> Tensor:
    rows = state.rows() if isinstance(state, QuadraticForm) else state.flatten(2)
    return rows.expand(len(outputs), -1, -1)


def _add_before(
    lin: Linearisation,
    steps: list[Step],
    cut: int,
    jacobian: Tensor,
    chosen: Selection,
    later: dict[str, tuple[Tensor, Tensor]],
    total: _Blocks,
) -> None:
    """Weights before the cut, among themselves and with later ones.

    Args:
        lin: The network.
        steps: A trace.
        cut: Index of the step that every path passes.
        jacobian: Rows at it, (B, R, Z).
        chosen: The weights.
        later: Columns of weights after the cut times ``jacobian``, (B, s, Z), and the weights' places, by name.
        total: Added to.
    """
    visitor, width = ColumnVisitor(chosen), steps[cut].width
    carry(lin, steps, cut, QuadraticForm(width, jacobian.new_ones(()), keeps_rows=True), visitor)
    before, places = visitor.joined(jacobian, width)  # (B, Z, s)
    if not len(places):
        return
    moved = jacobian.mT @ (jacobian @ before) if before.shape[-1] < width else (jacobian.mT @ jacobian) @ before
    flat = before.flatten(0, 1)
    total.add(f"before, {list(later)}", places, places, flat.mT @ moved.flatten(0, 1))
    for name, (met, others) in later.items():
        if len(others):
            total.add(f"{name} and before", others, places, met.mT.flatten(0, 1).mT @ flat)


def _with_output_layer(
    lin: Linearisation, steps: list[Step], last: LinearStep, hessian: Hessian, chosen: Selection, total: _Blocks
) -> None:
    """A linear output layer: its weights' columns have one entry, the others' are carried in a smaller basis."""
    assert hessian.diagonal is not None
    scale = hessian.diagonal.sqrt()
    inputs = last.inputs
    entries, places = chosen.of(last)
    outs, ins = entries[:, 1], entries[:, 2]
    ones = torch.cat([inputs, torch.ones_like(inputs[:, :1])], 1) if last.bias is not None else inputs
    if scale.dim():
        scale = scale.flatten(1)
        seen = ones[:, ins] * scale[:, outs]
        basis = None
        form = QuadraticForm(inputs.shape[1], scale.new_ones(()), last.weight * scale[:, :, None], keeps_rows=True)
    else:
        seen = ones[:, ins] * scale
        q, r = lin.factored(last.weight)
        basis = q[outs]
        form = QuadraticForm(inputs.shape[1], scale**2, r, keeps_rows=True, is_triangular=True)
    same = outs[:, None] == outs[None]
    total.add("outputs", places, places, (seen.mT @ seen) * same)
    visitor, cut = ColumnVisitor(chosen), narrowest(steps, hessian.n_outputs)
    start = last.sources[0]
    at_cut = carry(lin, steps, start, form, visitor, stop=min(cut, start))
    n_rows = len(last.weight) if basis is None else basis.shape[1]
    columns, others = visitor.joined(inputs, n_rows)
    flat = columns.flatten(0, 1)
    total.add("after", others, others, flat.mT @ flat)

    def met(rows: Tensor) -> Tensor:
        """Columns of the output layer times rows (B, R, m): (B, s, m)."""
        return (rows[:, outs] if basis is None else basis @ rows) * seen[:, :, None]

    if len(others) and len(places):
        total.add("outputs and after", places, others, met(columns).sum(0))
    if at_cut is not None:
        jacobian = _as_rows(at_cut, inputs)
        later = {"after": (columns.mT @ jacobian, others), "outputs": (met(jacobian), places)}
        _add_before(lin, steps, min(cut, start), jacobian, chosen, later, total)
