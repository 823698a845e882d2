"""`Linearisation`: a network at its weights, read once, with what does not change from batch to batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bayesae.curvature.graph import read
from bayesae.curvature.selection import Selection
from bayesae.curvature.steps import OpaqueStep, ReshapeStep, Step
from bayesae.errors import ParameterError, UnsupportedError
from bayesae.functional import at_least_float32, parameters_of
from bayesae.types import Params

__all__ = ["Linearisation", "cuts", "last_spatial", "pull", "push"]

_ROWS_OF_A_TRACE = 256


class Linearisation:
    """A network at given weights: what every question of curvature is asked of.

    It reads the network's operations once (torch.fx; what cannot be read is taken as one operation and costs general
    torch.func products) and keeps what is the same for every batch: the triangular factor of a linear output layer,
    the plan of each input shape. Weights are read at construction: make a new one when they change.

    Args:
        network: Maps (B, ...) to (B, ...), in evaluation mode; gives structure, names and buffers, and is not touched.
        params: Where to linearise, every parameter in its own shape; the module's own by default. Narrower
            floating-point numbers than float32 are widened: curvature is a sum over a data set.
        chunk_size: Data rows at a time; chosen by memory if None. It changes results by rounding only (and which random
            probes a datum gets).
        memory: Bytes that the temporaries of one chunk may take, 256 MB by default.

    Raises:
        UnsupportedError: If a layer has hooks, or random numbers or batch statistics in training mode.
        ParameterError: If ``params`` lacks a parameter.
    """

    def __init__(
        self, network: nn.Module, params: Params | None = None, *, chunk_size: int | None = None, memory: int = 2**28
    ) -> None:
        self.network, self.chunk_size, self.memory = network, chunk_size, memory
        given = parameters_of(network) if params is None else params
        missing = [name for name, _ in network.named_parameters() if name not in given]
        if missing:
            raise ParameterError("every parameter of the network", f"none for {missing}", "See parameters_of(network).")
        self.params = {name: at_least_float32(given[name].detach()) for name, _ in network.named_parameters()}
        self.graph = read(network)
        self.layers = dict(network.named_modules())
        self.plans: dict[Any, Any] = {}
        self._checked: set[torch.Size] = set()
        self._selection: tuple[Mapping[str, Tensor], Selection] | None = None
        self._factored: dict[int, tuple[Tensor, Tensor]] = {}
        self._triangular: dict[int, Tensor] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Linearisation:
        return self  # nothing in it changes

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.network, self.params, self.chunk_size, self.memory)

    def at(self, params: Params) -> Linearisation:
        """The same network at other weights; what was read and planned is not read and planned again.

        Args:
            params: Every parameter in its own shape, and in the dtype of before.

        Returns:
            A linearisation there; this one stays.
        """
        other = object.__new__(Linearisation)
        vars(other).update(vars(self))
        other.params = {name: at_least_float32(params[name].detach()) for name in self.params}
        other._checked, other._selection, other._factored, other._triangular = set(self._checked), None, {}, {}
        return other

    @property
    def shared(self) -> frozenset[str]:
        """Parameters used in several places, which no single layer owns."""
        return self.graph.shared

    def trace(self, x: Tensor) -> list[Step]:
        r"""Run the network on (B, \*data) and keep what its layers did, input first."""
        x = x.to(next(iter(self.params.values())).dtype)
        steps = self.graph.run(self.params, x)
        if x.shape[1:] not in self._checked and len(x):
            steps = self._check(steps, x)
            self._checked.add(x.shape[1:])
        return _without_dead_ends(steps)

    def _check(self, steps: list[Step], x: Tensor) -> list[Step]:
        """Compare what was read with the network itself, once for each shape of input.

        A forward that writes into tensors through aliases looks like another one to torch.fx; such a network is taken
        as one operation.

        Args:
            steps: What was read.
            x: (B, *data).

        Returns:
            The steps, or the network as one.

        Raises:
            UnsupportedError: If the network does not give the same outputs twice.
        """
        whole = replace(self.graph, nodes=None, names={}, shared=frozenset())
        expected, again = (whole.run(self.params, x.clone())[-1].value for _ in range(2))
        # of the largest output, so that small outputs are compared as strictly as large ones
        relative = 1e-4 if x.dtype == torch.float32 else 1e-8
        tolerance = {"rtol": relative, "atol": relative * float(expected.nan_to_num().abs().amax())}
        if not torch.allclose(expected, again, equal_nan=True, **tolerance):
            raise UnsupportedError(
                "a network that gives the same outputs twice", "different ones", "Is there noise in its forward?"
            )
        found = steps[-1].value
        if found.shape == expected.shape and torch.allclose(found, expected, equal_nan=True, **tolerance):
            return steps
        self.graph = whole
        return whole.run(self.params, x)

    def take(self, steps: list[Step], rows: slice) -> list[Step]:
        """A trace of some of the data, without running the network where that is possible."""
        if rows == slice(0, len(steps[0].value)):
            return steps
        if any(isinstance(step, OpaqueStep) and step.is_sized for step in steps):
            return self.trace(steps[0].value[rows])
        return [step.take(rows) for step in steps]

    def batches(self, x: Tensor) -> Iterator[tuple[slice, list[Step]]]:
        """Rows of (N, *data) in pieces, each with its trace."""
        size = self.chunk_size or _ROWS_OF_A_TRACE
        if self.chunk_size is None and len(x) > size:
            size = math.ceil(len(x) / math.ceil(len(x) / size))  # pieces of equal size
        for start in range(0, len(x), size):
            rows = slice(start, min(start + size, len(x)))
            yield rows, self.trace(x[rows])

    def factored(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Q (R, r) and R (r, width) of one of the network's own weights, computed once.

        QR and not Cholesky of the Gram matrix: dead units make that one singular.

        Args:
            weight: A tensor among ``params`` itself, not a copy.

        Returns:
            Orthonormal columns, and an upper triangular factor.
        """
        if id(weight) not in self._factored:
            self._factored[id(weight)] = torch.linalg.qr(weight)
        return self._factored[id(weight)]

    def selection(self, masks: Mapping[str, Tensor]) -> Selection:
        """Chosen weights, read once for masks that come again."""
        if self._selection is None or self._selection[0] is not masks:
            self._selection = masks, Selection(masks, self.params, self.shared)
        return self._selection[1]

    def compressed(self, factor: Tensor) -> Tensor:
        """A factor (R, width) with R > width in width rows; remembered for a weight of the network."""
        if any(factor is leaf for leaf in self.params.values()):
            if id(factor) not in self._triangular:
                self._triangular[id(factor)] = torch.linalg.qr(factor, mode="r").R  # without Q, which costs as much
            return self._triangular[id(factor)]
        return torch.linalg.qr(factor, mode="r").R


def _rebuild(network: nn.Module, params: Params, chunk_size: int | None, memory: int) -> Linearisation:
    return Linearisation(network, params, chunk_size=chunk_size, memory=memory)


def _without_dead_ends(steps: list[Step]) -> list[Step]:
    """Only steps that reach the outputs, indices renewed."""
    alive = {0, len(steps) - 1}
    for i in range(len(steps) - 1, 0, -1):
        if i in alive:
            alive.update(steps[i].sources)
    if len(alive) == len(steps):
        return steps
    index = {old: new for new, old in enumerate(sorted(alive))}
    return [replace(steps[i], sources=tuple(index[j] for j in steps[i].sources)) for i in sorted(alive)]


def cuts(steps: Sequence[Step]) -> set[int]:
    """Steps that every path from the input to the outputs passes."""
    result, earliest = set(), len(steps)
    for i in range(len(steps) - 1, -1, -1):
        if earliest >= i:
            result.add(i)
        earliest = min([earliest, *steps[i].sources])
    return result


def last_spatial(steps: Sequence[Step]) -> int:
    """Index of the last step that is more than a reshaping of the outputs."""
    i = len(steps) - 1
    while isinstance(steps[i], ReshapeStep):
        (i,) = steps[i].sources
    return i


def push(steps: Sequence[Step], tangents: dict[int, Tensor]) -> Tensor | None:
    r"""Carry tangents forward.

    Args:
        steps: A trace.
        tangents: At some steps' outputs, {index: (B or 1, K, \*out)}.

    Returns:
        (B or 1, K, \*O), or None if nothing arrives.
    """
    end = len(steps) - 1
    known: dict[int, Tensor | None] = dict(tangents)
    for i in range(1, end + 1):
        coming = [known.get(j) for j in steps[i].sources]
        if any(t is not None for t in coming):
            moved = steps[i].push(coming)
            own = known.get(i)
            known[i] = moved if own is None else moved + own
    return known.get(end)


def pull(
    steps: Sequence[Step],
    rows: Tensor,
    start: int,
    visit: Callable[[int, Tensor], None],
    lowest: int | None = None,
) -> None:
    r"""Carry rows back from a step, and show them to every step with parameters on the way.

    Args:
        steps: A trace.
        rows: (B or 1, R, \*out) at step ``start``.
        start: Its index.
        visit: Called with the index and rows of a step that has parameters.
        lowest: Index of the last step to visit; the first of the network with parameters by default.
    """
    waiting: dict[int, Tensor] = {start: rows}
    if lowest is None:
        lowest = next((i for i in range(1, start + 1) if steps[i].names), start + 1)
    for i in range(start, lowest - 1, -1):
        if (here := waiting.pop(i, None)) is None:
            continue
        if steps[i].names:
            visit(i, here)
        if i > lowest:
            for j, back in zip(steps[i].sources, steps[i].pull(here), strict=True):
                waiting[j] = waiting[j] + back if j in waiting else back
