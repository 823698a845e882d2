"""One pass over a batch that shows every layer the rows, or whatever is cheaper, of the outputs' curvature."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from bayesae.curvature.hessian import Hessian, HessianFunction, read_hessian
from bayesae.curvature.linear import ConvStep, LinearStep
from bayesae.curvature.linearisation import Linearisation, cuts, pull, push
from bayesae.curvature.locality import Field, colour_masks
from bayesae.curvature.normalised import NormStep
from bayesae.curvature.plan import NUMBERS_IN_CACHE, Plan, make_plan, reach_for
from bayesae.curvature.quadratic import QuadraticForm
from bayesae.curvature.steps import AffineStep, ReshapeStep, SlopeStep, Step
from bayesae.curvature.tail import hessian_at, last_layer

__all__ = ["Visitor", "carry", "narrowest", "plan", "plan_of", "rows_at_once", "sweep", "unit_rows"]


class RowVisitor(Protocol):
    """What a carry shows to. Rows' Gram matrix is M = J^T H J of the layer's output."""

    def form(self, index: int, step: LinearStep, form: QuadraticForm) -> None:
        """M in a form, at a Linear layer."""
        ...

    def rows(self, index: int, step: Step, rows: Tensor) -> None:
        r"""Rows (B or 1, R, \*out) whose Gram matrix is M."""
        ...


class Visitor(RowVisitor, Protocol):
    """A question: what it wants of each layer."""

    colours: str
    """What rows serve in which several outputs stand apart; see `make_plan`."""

    def start(self, part: slice) -> None:
        """The next chunk of the batch's rows."""
        ...

    def finish(self) -> None:
        """The end of the batch."""
        ...

    def coloured(self, index: int, step: Step, rows: Tensor, field: Field) -> None:
        """Rows whose Gram matrix is M between positions of one output's field, and wrong elsewhere."""
        ...

    def columns(self, index: int, name: str, norms: Tensor) -> None:
        """Diagonal of the curvature of a parameter itself, summed over data."""
        ...


def sweep(
    lin: Linearisation,
    x: Tensor,
    output_hessian: HessianFunction,
    mask: Tensor | None,
    make_visitor: Callable[[list[Step]], Visitor],
) -> None:
    """Run a question over all rows, in chunks.

    Args:
        lin: The network.
        x: (N, *data).
        output_hessian: From outputs to H.
        mask: True where an output counts, or None.
        make_visitor: From the trace of a batch to the visitor of its chunks.
    """
    for rows, steps in lin.batches(x):
        outputs = steps[-1].value
        hessian = read_hessian(output_hessian(outputs), outputs, None if mask is None else mask[rows])
        visitor = make_visitor(steps)
        _batch(lin, steps, hessian, visitor)


def _batch(lin: Linearisation, steps: list[Step], hessian: Hessian, visitor: Visitor) -> None:
    routes = plan_of(lin, steps, hessian, visitor.colours)
    n = len(steps[0].value)
    for start in range(0, n, routes.chunk):
        part = slice(start, min(start + routes.chunk, n))
        visitor.start(part)
        _chunk(lin, lin.take(steps, part), hessian if part == slice(0, n) else hessian.take(part), visitor, routes)
    visitor.finish()


def plan_of(lin: Linearisation, steps: Sequence[Step], hessian: Hessian, colours: str) -> Plan:
    """The plan for this shape of input, made once."""
    is_constant = hessian.diagonal is not None and hessian.diagonal.dim() == 0
    key = (tuple(steps[0].value.shape[1:]), colours, is_constant, hessian.blocks is None, hessian.axis)
    if key not in lin.plans:
        lin.plans[key] = make_plan(
            steps,
            hessian,
            lin.layers,
            shared=lin.shared,
            colours=colours,
            memory=lin.memory,
            chunk_size=lin.chunk_size,
        )
    return lin.plans[key]


@torch.no_grad()
def plan(lin: Linearisation, x: Tensor, output_hessian: HessianFunction) -> Plan:
    r"""The routes that `ggn_diagonal` would take: print it to see layers, operations and bytes before anything runs.

    Args:
        lin: The network at its weights.
        x: Rows like those to come, (B, \*data); one is enough, its values do not matter.
        output_hessian: As for `ggn_diagonal`.

    Returns:
        The plan.
    """
    steps = lin.trace(x[:1])
    outputs = steps[-1].value
    return plan_of(lin, steps, read_hessian(output_hessian(outputs), outputs, None), "all")


def _chunk(lin: Linearisation, steps: list[Step], hessian: Hessian, visitor: Visitor, plan: Plan) -> None:
    if hessian.dense is not None:
        carry(lin, steps, len(steps) - 1, hessian.dense, visitor)
    if plan.cut is None:
        if hessian.blocks is not None:
            carry(lin, steps, len(steps) - 1, unit_rows(hessian, steps[-1].value), visitor)
        else:
            assert hessian.diagonal is not None
            diagonal = hessian.diagonal
            core = diagonal if diagonal.dim() == 0 else diagonal.flatten(1)
            carry(lin, steps, len(steps) - 1, QuadraticForm(hessian.n_outputs, core), visitor)
        return
    at_end = hessian_at(hessian, steps)
    assert at_end is not None  # else there were no plan with a cut
    _above(steps[: last_layer(steps) + 1], at_end, visitor, plan)
    columns = push(steps, {plan.cut: _unit_columns(steps[plan.cut].value)})
    assert columns is not None
    flat = columns.flatten(2)
    moved = Hessian(hessian.shape, hessian.diagonal, hessian.blocks, hessian.axis).apply(columns).flatten(2)
    carry(lin, steps, plan.cut, QuadraticForm.of_gram(flat, moved), visitor)


def unit_rows(hessian: Hessian, outputs: Tensor) -> Tensor:
    """One row an output, scaled by H: (B or 1, O, *O), the dense part left out."""
    shape = list(outputs.shape[1:])
    if hessian.blocks is not None:
        shape[hessian.axis - 1] = 1
    n = torch.Size(shape).numel()
    return hessian.seeds(torch.eye(n, dtype=outputs.dtype, device=outputs.device).reshape(n, *shape))


def _unit_columns(value: Tensor) -> Tensor:
    n = value[0].numel()
    return torch.eye(n, dtype=value.dtype, device=value.device).reshape(1, n, *value.shape[1:])


def _above(steps: list[Step], hessian: Hessian, visitor: Visitor, plan: Plan) -> None:
    """Layers between the outputs and the cut."""
    assert plan.cut is not None
    end = len(steps) - 1
    by_field: dict[tuple[int, ...], list[int]] = {}
    for i, field in plan.fields.items():
        by_field.setdefault(field.periods(reach_for(steps[i], field, visitor.colours)), []).append(i)
    for indices in by_field.values():
        lowest = min(indices)
        field = plan.fields[lowest]
        group = hessian.axis if hessian.blocks is not None else None
        masks = colour_masks(field, reach_for(steps[lowest], field, visitor.colours), steps[end].value, group)

        def show(i: int, rows: Tensor, wanted: Sequence[int] = indices) -> None:
            if i in wanted:
                visitor.coloured(i, steps[i], rows, plan.fields[i])

        pull(steps, hessian.seeds(masks), end, show, lowest)
    if "rows" in plan.routes.values():

        def show_rows(i: int, rows: Tensor) -> None:
            if plan.routes.get(i) == "rows":
                visitor.rows(i, steps[i], rows)

        lowest = min(i for i, route in plan.routes.items() if route == "rows")
        pull(steps, unit_rows(hessian, steps[end].value), end, show_rows, lowest)
    for i, route in plan.routes.items():
        step = steps[i]
        if route == "columns":
            assert isinstance(step, (AffineStep, NormStep))
            eye = torch.eye(step.n_channels, dtype=step.value.dtype, device=step.value.device)
            for name in step.names:
                _show_columns(steps, hessian, visitor, i, name, step.push_parameters({name: eye}))
        elif route == "colours" and isinstance(step, ConvStep) and step.layout.bias is not None:
            if visitor.colours == "all":
                # gradients of a bias sum over a whole field; its few columns are cheaper than wider gaps
                eye = torch.eye(step.value.shape[1], dtype=step.value.dtype, device=step.value.device)
                tangents = step.push_parameters({step.layout.bias: eye})
                _show_columns(steps, hessian, visitor, i, step.layout.bias, tangents)


def _show_columns(
    steps: list[Step], hessian: Hessian, visitor: Visitor, index: int, name: str, tangents: Tensor
) -> None:
    columns = push(steps, {index: tangents})
    assert columns is not None
    norms = (columns * hessian.apply(columns)).flatten(2).sum(-1)  # (B or 1, K)
    visitor.columns(index, name, norms.expand(hessian.shape[0], -1).sum(0))


def narrowest(steps: Sequence[Step], n_rows: int) -> int:
    """The narrowest step that every path passes and that has weights before it; 0 if none is narrower than n_rows."""
    first = next((i for i in range(1, len(steps)) if steps[i].names), len(steps))
    candidates = [i for i in cuts(steps) if first <= i < last_layer(steps) and steps[i].width < n_rows]
    return min(candidates, key=lambda i: (steps[i].width, -i), default=0)


def rows_at_once(lin: Linearisation, numbers: int) -> int:
    """Rows of data at a time, with so many numbers each in the largest temporary."""
    return lin.chunk_size or max(1, min(NUMBERS_IN_CACHE, lin.memory // 16) // numbers)


def carry(
    lin: Linearisation,
    steps: Sequence[Step],
    start: int,
    state: QuadraticForm | Tensor,
    visitor: RowVisitor,
    *,
    stop: int = 0,
) -> QuadraticForm | Tensor | None:
    """Carry M from a step back, as a form while layers allow it, else as rows.

    Args:
        lin: The network.
        steps: A trace.
        start: Index of the step.
        state: M at its output: a form, or rows (B or 1, R, *out). A form that ``keeps_rows`` is never compressed.
        visitor: Is shown every step with parameters.
        stop: Index of a step that every path passes, where to stop; 0 goes as far as there are parameters.

    Returns:
        The state at ``stop``, None where it was not needed.
    """
    through = cuts(steps)
    states: dict[int, QuadraticForm | Tensor] = {start: state}
    first = next((i for i in range(1, len(steps)) if steps[i].names), len(steps))
    keeps_rows = isinstance(state, QuadraticForm) and state.keeps_rows
    for i in range(start, max(first - 1, stop), -1):
        if (here := states.pop(i, None)) is None:
            continue
        step = steps[i]
        is_single = i in through and all(j in through for j in step.sources)
        if i in through and isinstance(here, Tensor) and here.shape[1] > step.width and not keeps_rows:
            flat = here.flatten(2).mT
            here = QuadraticForm.of_gram(flat, flat)
        if isinstance(here, QuadraticForm):
            if is_single and isinstance(step, LinearStep) and step.inputs.dim() == 2:
                visitor.form(i, step, here)
                if i > first:
                    states[step.sources[0]] = here.through_linear(step.weight, lin.compressed)
                continue
            if is_single and isinstance(step, (SlopeStep, ReshapeStep)) and not isinstance(step, AffineStep):
                slope = step.slope.flatten(1) if isinstance(step, SlopeStep) else None
                states[step.sources[0]] = here if slope is None else here.through_slope(slope)
                continue
            if here.n_rows > step.width and not keeps_rows:
                here = here.multiplied_out()
            here = here.rows()
            here = here.reshape(*here.shape[:2], *step.value.shape[1:])
        if step.names:
            visitor.rows(i, step, here)
        if i > first or stop > 0:
            for j, back in zip(step.sources, step.pull(here), strict=True):
                known = states.get(j)
                states[j] = back if known is None else known + back  # pyright: ignore[reportOperatorIssue] - never a form
    return states.get(stop)
