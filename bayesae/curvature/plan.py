"""The planner: which exact route each layer takes, what it costs, and how many rows of data at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from bayesae.curvature.hessian import Hessian
from bayesae.curvature.linear import ConvStep, LinearStep, MatrixStep
from bayesae.curvature.linearisation import cuts
from bayesae.curvature.locality import Field, fields_of, n_colours
from bayesae.curvature.normalised import NormStep
from bayesae.curvature.steps import AffineStep, OpaqueStep, ReshapeStep, SlopeStep, Step
from bayesae.curvature.tail import hessian_at, last_layer

__all__ = ["NUMBERS_IN_CACHE", "Line", "Plan", "make_plan", "operations", "reach_for", "row_numbers"]

NUMBERS_IN_CACHE = 2**20  # of the temporaries of one chunk: beyond, products wait for memory
_NUMBERS_OF_CONVOLUTIONS = 2**22  # of coloured rows: fewer, and calls cost more than what they compute


@dataclass(frozen=True)
class Line:
    """What one layer costs, for one row of data.

    Args:
        name: Of the layer.
        route: How its rows come: "form", "rows", "colours", "columns", or "cut".
        n_rows: How many.
        operations: Multiplications and additions.
        numbers: In the largest temporary.
    """

    name: str
    route: str
    n_rows: int
    operations: float
    numbers: int


@dataclass(frozen=True)
class Plan:
    """Routes of one question for one shape of input.

    Args:
        cut: Index of the step at which the outputs' rows are replaced by columns; None if they are carried through.
        routes: For steps above the cut, by index: "rows", "colours" or "columns".
        fields: The outputs' fields at coloured steps, by index.
        lines: Costs, layer by layer, outputs first.
        chunk: Rows of data at a time.
        itemsize: Bytes of a number.
    """

    cut: int | None
    routes: dict[int, str]
    fields: dict[int, Field]
    lines: list[Line]
    chunk: int
    itemsize: int

    @property
    def operations(self) -> float:
        """For one row of data."""
        return sum(line.operations for line in self.lines)

    @property
    def peak_bytes(self) -> int:
        """Of the temporaries of one chunk."""
        return 2 * self.chunk * self.itemsize * max((line.numbers for line in self.lines), default=0)

    def __str__(self) -> str:
        width = max([len(line.name) for line in self.lines] + [5])
        rows = [f"{'layer':{width}}  route    rows  MFLOP a row of data  kB a row of data"]
        rows += [
            f"{line.name:{width}}  {line.route:7}{line.n_rows:6d}  {line.operations / 1e6:19.3f}"
            f"  {2 * line.numbers * self.itemsize / 1e3:16.1f}"
            for line in self.lines
        ]
        total = f"{self.operations / 1e6:.3f} MFLOP a row, {self.chunk} rows at a time, {self.peak_bytes / 1e6:.1f} MB"
        return "\n".join([*rows, total])


def operations(step: Step) -> float:
    """Of one row of data through a step, or of one row of a factor back through it."""
    if isinstance(step, ConvStep) and step.layout.is_transposed:
        return 2.0 * step.weight.numel() * step.inputs[0, 0].numel()
    if isinstance(step, MatrixStep):
        return 2.0 * step.weight.numel() * step.n_positions
    # memory passes count like arithmetic that they displace
    return (40.0 if isinstance(step, OpaqueStep) else 0.0 if isinstance(step, ReshapeStep) else 8.0) * step.width


def _contribution(step: Step, n_rows: int) -> float:
    """Operations of squared gradients from n_rows rows at a step."""
    if isinstance(step, MatrixStep) and step.n_positions > 1:
        return 2.0 * n_rows * step.weight.numel() * step.n_positions
    return 2.0 * n_rows * step.width if step.names else 0.0


def _is_form_step(step: Step) -> bool:
    if isinstance(step, LinearStep):
        return step.inputs.dim() == 2
    return isinstance(step, (SlopeStep, ReshapeStep)) and not isinstance(step, AffineStep)


def carry_lines(steps: Sequence[Step], start: int, n_rows: int, *, is_form: bool, is_constant: bool) -> list[Line]:
    """What carrying rows from a step back to the input costs, following the rules of the sweep itself.

    Args:
        steps: A trace.
        start: Index of the step.
        n_rows: Rows there.
        is_form: Whether they start as a form.
        is_constant: Whether H is one number for all data.

    Returns:
        One line a layer with parameters.
    """
    lines, through = [], cuts(steps)
    first = next((i for i in range(1, len(steps)) if steps[i].names), len(steps))
    is_shared, has_slope = start == len(steps) - 1, False  # whether all data share the rows
    for i in range(start, 0, -1):
        step = steps[i]
        width, n_in = step.width, steps[step.sources[0]].width if step.sources else step.width
        if i in through and n_rows > width and not is_form:
            lines.append(Line(step.name, "cut", width, 2.0 * n_rows * width**2, n_rows * width))
            n_rows, is_shared = width, False
        is_form = (is_form or i in through) and _is_form_step(step) and all(j in through for j in step.sources)
        cost, numbers = _contribution(step, n_rows), n_rows * width
        if i > first and is_form and isinstance(step, LinearStep):
            if is_shared and not has_slope:
                # computed once for the network
                cost, numbers, n_rows = 2.0 * width, 0, min(n_rows, n_in) if is_constant else n_rows
            else:
                carry = 2.0 * n_rows * width * n_in
                multiply = 2.0 * (n_rows * width**2 + width**2 * n_in + width * n_in**2)
                if n_rows > width and multiply < carry + 2.0 * n_rows * n_in**2:
                    carry, n_rows = multiply, width
                # of a product with shared rows only the other side is ever there as a whole
                cost, numbers = cost + carry, (width if is_shared else n_rows) * n_in
                is_shared = False
            has_slope = False
        elif i > first and not is_form:
            cost, numbers = cost + n_rows * operations(step), n_rows * max(width, n_in)
        has_slope = has_slope or isinstance(step, SlopeStep)
        if step.names:
            lines.append(Line(step.name, "form" if is_form else "rows", n_rows, cost, numbers))
        if i <= first:
            break
    return lines


def row_numbers(steps: Sequence[Step], lowest: int, n_rows: int, *, is_rotated: bool) -> int:
    """Numbers in the largest temporary, for one datum, of carrying rows that mean something back to a step.

    Args:
        steps: A trace.
        lowest: Index of the step.
        n_rows: Rows at the outputs.
        is_rotated: Whether every layer's rows are turned into a basis, too.

    Returns:
        Their number.
    """
    through, most = cuts(steps), 1
    is_form, is_shared, has_slope = True, True, False
    for i in range(len(steps) - 1, lowest, -1):
        step = steps[i]
        width, n_in = step.width, steps[step.sources[0]].width if step.sources else step.width
        is_form = is_form and i in through and _is_form_step(step)
        if not is_form:
            most = max(most, n_rows * max(width, n_in))
        elif isinstance(step, LinearStep) and has_slope:
            # of a product with shared rows only the other side is ever there as a whole
            most = max(most, (width if is_shared else n_rows) * max(n_in, width if is_rotated else 1))
            is_shared, has_slope = False, False
        has_slope = has_slope or isinstance(step, SlopeStep)
    return most


def make_plan(
    steps: Sequence[Step],
    hessian: Hessian,
    layers: dict[str, nn.Module],
    *,
    shared: frozenset[str],
    colours: str,
    memory: int,
    chunk_size: int | None,
) -> Plan:
    """Choose the cheapest exact route.

    Args:
        steps: A trace.
        hessian: H of the outputs.
        layers: The network's modules by name.
        shared: Parameters that no single layer owns.
        colours: What coloured rows serve in the question: squares of gradients in "all" layers, "convolutions" position
            by position, convolutions in a "rotated" basis, or "none".
        memory: Bytes that one chunk may take.
        chunk_size: Rows of data at a time, or None.

    Returns:
        The plan.
    """
    end, at_end = last_layer(steps), hessian_at(hessian, steps)
    itemsize = steps[-1].value.element_size()
    best: tuple[int | None, dict[int, str], dict[int, Field], list[Line]]
    is_form = hessian.blocks is None
    is_constant = hessian.diagonal is not None and hessian.diagonal.dim() == 0
    best = (
        None,
        {},
        {},
        carry_lines(steps, len(steps) - 1, hessian.n_outputs, is_form=is_form, is_constant=is_constant),
    )
    # where a group of outputs does not stand at one position of the last layer, there are only rows
    if not _starts_with_form(steps) and at_end is not None:
        fields = fields_of(steps[: end + 1], layers) if colours != "none" else [None] * (end + 1)
        through = cuts(steps)
        for cut in sorted(through - {0}):
            if cut < end and steps[cut].width < hessian.n_outputs:
                option = _with_cut(steps, at_end, cut, end, fields, colours, shared)
                if sum(line.operations for line in option[3]) < sum(line.operations for line in best[3]):
                    best = option
    numbers = max((line.numbers for line in best[3]), default=1)
    wanted = NUMBERS_IN_CACHE if best[0] is None else _NUMBERS_OF_CONVOLUTIONS
    chunk = max(1, min(wanted, memory // (2 * itemsize)) // max(1, numbers))
    return Plan(*best, chunk_size or chunk, itemsize)


def _starts_with_form(steps: Sequence[Step]) -> bool:
    through, i = cuts(steps), len(steps) - 1
    while i > 0 and i in through and _is_form_step(steps[i]):
        if isinstance(steps[i], LinearStep):
            return True
        (i,) = steps[i].sources
    return False


def reach_for(step: Step, field: Field, colours: str) -> tuple[int, ...]:
    """How far apart two outputs' fields must be at a step for coloured rows to serve a question."""
    wide = field.reach
    if colours == "rotated":
        return wide
    if isinstance(step, ConvStep) and colours == "all":
        strides = step.stride if step.layout.is_transposed else (1,) * len(wide)
        return tuple(r // s * s for r, s in zip(wide, strides, strict=True))
    return (0,) * len(field.reach)


def _with_cut(
    steps: Sequence[Step],
    hessian: Hessian,
    cut: int,
    end: int,
    fields: Sequence[Field | None],
    colours: str,
    shared: frozenset[str],
) -> tuple[int, dict[int, str], dict[int, Field], list[Line]]:
    above = [i for i in range(cut + 1, end + 1) if steps[i].names]
    path = {i: sum(operations(step) for step in steps[i + 1 : end + 1]) for i in [cut, *above]}
    n_outputs, channels = hessian.n_outputs, steps[end].value.shape[1]
    # rows stay the same for all data until they meet the first slope, unless H differs
    is_constant = hessian.diagonal is not None and hessian.diagonal.dim() == 0
    slopes = [
        i for i in range(cut, end + 1) if isinstance(steps[i], (SlopeStep, NormStep, OpaqueStep)) or not is_constant
    ]
    last = max(slopes, default=cut)
    widest = {i: max((step.width for step in steps[i : last + 1]), default=1) for i in [cut, *above]}
    routes, chosen, lines, rows_from, is_cheaper_than_use = {}, {}, [], None, {}
    for i in reversed(above):
        step, field = steps[i], fields[i]
        n_colour = None
        is_served = isinstance(step, MatrixStep) and (
            colours == "all" or isinstance(step, ConvStep) and not shared.intersection(step.names)
        )
        if isinstance(step, ConvStep) and field is not None and field.positions != tuple(step.value.shape[2:]):
            field = None
        if isinstance(step, LinearStep) and step.inputs.dim() > 2:
            field = None
        if field is not None and is_served and hessian.axis == 1:
            n_colour = n_colours(field, reach_for(step, field, colours), channels)
        n_own = step.n_channels * len(step.names) if isinstance(step, (AffineStep, NormStep)) else 0
        bias = step.value.shape[1] if colours == "all" and isinstance(step, ConvStep) and step.bias is not None else 0
        options: dict[str, tuple[int, float]] = {
            "rows": (n_outputs, n_outputs * path[i] + _contribution(step, n_outputs))
        }
        if n_colour is not None and field is not None:
            shares = (
                len(step.shifts(reach_for(step, field, colours), of_weight_only=True))
                if isinstance(step, ConvStep)
                else 1
            )
            cost = n_colour * path[i] + bias * path[i] + shares * (2 * operations(step) + 4.0 * n_colour * step.width)
            options["colours"] = (n_colour, cost)
        if colours != "none" and isinstance(step, (AffineStep, NormStep)):
            options["columns"] = (n_own, n_own * (path[i] + 8.0 * step.width))
        route = min(options, key=lambda name: options[name][1])
        # once the rows come by for a layer below, only what is done with them counts
        is_cheaper_than_use[i] = options.get("colours", (0, math.inf))[1] < _contribution(step, n_outputs)
        routes[i] = route
        if route == "colours":
            assert field is not None
            chosen[i] = field
        if route == "rows":
            rows_from = i
        n_rows, cost = options[route]
        lines.append(Line(step.name, route, n_rows, cost, n_rows * widest[i]))
    if rows_from is not None:
        for i, route in routes.items():
            if i >= rows_from and route != "columns" and not is_cheaper_than_use[i]:
                routes[i] = "rows"
        chosen = {i: field for i, field in chosen.items() if routes[i] == "colours"}
    n_columns = steps[cut].width
    lines.append(
        Line(
            steps[cut].name,
            "cut",
            n_columns,
            n_columns * path[cut] + 2.0 * n_columns**2 * n_outputs,
            n_columns * widest[cut],
        )
    )
    lines += carry_lines(steps, cut, n_columns, is_form=True, is_constant=False)
    return cut, routes, chosen, lines
