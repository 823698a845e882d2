"""Graphs in a code space whose edges are as long as the metric says: the fast route to distances, and starts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bayesae.errors import DataError, ShapeError
from bayesae.geometry.curves import checked_squares, chord_length, straight_lines
from bayesae.geometry.derivatives import checked_points
from bayesae.geometry.metrics import Metric, check_matrices, check_metric

__all__ = ["CodeGraph", "graph_starts", "grid_graph", "neighbour_graph"]

_MOVES = ((1, 0), (0, 1), (1, 1), (1, -1), (1, 2), (2, 1), (1, -2), (2, -1), (1, 3), (3, 1), (1, -3), (3, -1), (2, 3),
          (3, 2), (2, -3), (3, -2))  # fmt: skip


@dataclass(frozen=True)
class CodeGraph:
    """Codes joined by edges.

    Args:
        nodes: (M, Z); the codes that distances are asked for come first.
        edges: Pairs of node numbers, each once, (E, 2).
        lengths: Of the edges, (E,), float64.
    """

    nodes: Tensor
    edges: Tensor
    lengths: Tensor

    def distances(self, sources: Tensor) -> tuple[Tensor, Tensor]:
        """Shortest paths from some nodes to all, by Dijkstra's method.

        Args:
            sources: Node numbers, (A,).

        Returns:
            Lengths (A, M), infinite where no path is, and the node before each on its path (A, M), negative for none.

        Exact when: always, as paths along edges; as distances they are never too short, but for the edges' own error.
        Cost: A times M log M.
        """
        from scipy.sparse import csr_array
        from scipy.sparse.csgraph import dijkstra

        first, second = self.edges.cpu().numpy().T
        shape = (len(self.nodes), len(self.nodes))
        matrix = csr_array((self.lengths.cpu().numpy(), (first, second)), shape=shape)
        found, before = dijkstra(matrix, directed=False, indices=sources.cpu().numpy(), return_predecessors=True)
        return torch.as_tensor(found), torch.as_tensor(before.astype(np.int64))

    def path(self, before: Tensor, target: int) -> Tensor:
        """The nodes on the way to one of them.

        Args:
            before: A row (M,) of what `distances` returns second.
            target: Node number.

        Returns:
            Codes (m + 1, Z) from the source to the target.
        """
        numbers = [target]
        while int(before[numbers[-1]]) >= 0:
            numbers.append(int(before[numbers[-1]]))
        return self.nodes[numbers[::-1]]


def grid_graph(metric: Metric, codes: Tensor, *, n_cells: int = 100, margin: float = 0.1) -> CodeGraph:
    r"""A grid over codes of two dimensions with the codes hung into it; edges by the metric at their ends.

    Two dimensions only: in more a grid has too many nodes, and `neighbour_graph` is the fast route.

    An edge from a to b is :math:`\tfrac12 \big(\sqrt{\Delta^\top G(a) \Delta} + \sqrt{\Delta^\top G(b) \Delta}\big)`
    long, so that the metric is evaluated once a node: it is interpolated along edges. A node has 32 neighbours, up to
    three cells away.

    Args:
        metric: G.
        codes: (N, 2).
        n_cells: Cells along the longer side; they are squares in the code, so that a side a hundredth as long has one.
        margin: How far the grid reaches beyond the codes, a share of their range.

    Returns:
        The graph; its first N nodes are the codes.

    Exact when: never; paths of 32 directions are longer than a straight line by up to 1.4 % where the metric is
        isotropic, more where it is not.
    Biased when: the metric changes within a cell, or shortest curves leave the grid.
    Cost: the metric at ``n_cells`` squared nodes or fewer.

    Raises:
        ShapeError: If codes have not two dimensions.
        DataError: If all codes lie on an axis, the numbers are out of range, or the metric is not symmetric and
            positive definite.
        NonFiniteError: If a code is not finite, or the metric at a node.
        UnsupportedError: If ``metric`` is none, such as `IndependentDraws`.
    """
    check_metric(metric)
    codes = checked_points("codes", codes)
    if codes.shape[1] != 2:
        raise ShapeError("codes (N, 2)", f"{tuple(codes.shape)}", "Use neighbour_graph in other dimensions.")
    low, high = codes.amin(0), codes.amax(0)
    if n_cells < 4 or margin < 0 or bool((high <= low).any()):
        got = f"n_cells={n_cells}, margin={margin}, ranges {(high - low).tolist()}"
        raise DataError("n_cells >= 4, margin >= 0 and codes that differ in both dimensions", got, "Check the codes.")
    low, high = low - margin * (high - low), high + margin * (high - low)
    cell = (high - low).amax() / n_cells
    n_x, n_y = (int(size) for size in ((high - low) / cell).ceil().long() + 1)
    steps = torch.cartesian_prod(torch.arange(n_x), torch.arange(n_y)).to(codes.device)
    nodes = torch.cat([codes, low + cell * steps])
    number = torch.arange(n_x * n_y).reshape(n_x, n_y)
    pairs = [_shifted(number, *move) for move in _MOVES]
    corner = ((codes - low) / cell).floor().long().cpu()
    for i in range(-1, 3):
        for j in range(-1, 3):  # a code meets the 16 nodes around it
            x, y = (corner[:, 0] + i).clamp(0, n_x - 1), (corner[:, 1] + j).clamp(0, n_y - 1)
            pairs.append(torch.stack([torch.arange(len(codes)) - len(codes), number[x, y]], 1))
    edges = (torch.cat(pairs) + len(codes)).unique(dim=0).to(codes.device)
    return CodeGraph(nodes, edges, _trapezoid(metric, nodes, edges))


def neighbour_graph(metric: Metric, codes: Tensor, *, n_neighbours: int = 10, n_segments: int = 8) -> CodeGraph:
    """Codes joined to their nearest ones by straight lines, which the metric measures.

    Neighbours are those of the code space; bridges of a minimum spanning tree join what would fall apart.

    Args:
        metric: What measures them; of `IndependentDraws` its ``as_metric()``: its spread counts once a segment, so
            that paths would be the longer the more edges they have.
        codes: (N, Z), N >= 2.
        n_neighbours: Of each code.
        n_segments: Of a line.

    Returns:
        The graph of N nodes.

    Exact when: never; paths run through codes only.
    Biased when: codes are few in the region: paths are then too long.
    Cost: ``n_neighbours * n_segments`` decodings a code, and N squared distances of codes.

    Raises:
        ShapeError: If codes are no matrix.
        DataError: If there are fewer than two codes, no neighbours are asked for, or the metric is not symmetric and
            positive definite.
        NonFiniteError: If a code is not finite, or a length.
        UnsupportedError: If ``metric`` is none, such as `IndependentDraws`.
    """
    from scipy.sparse.csgraph import minimum_spanning_tree

    check_metric(metric)
    codes = checked_points("codes", codes)
    if len(codes) < 2 or n_neighbours < 1:
        got = f"{len(codes)} codes, n_neighbours={n_neighbours}"
        raise DataError("two codes and one neighbour or more", got, "Encode more data.")
    apart = torch.cdist(codes.double(), codes.double(), compute_mode="donot_use_mm_for_euclid_dist")
    nearest = apart.topk(min(n_neighbours + 1, len(codes)), largest=False).indices[:, 1:]
    pairs = torch.stack([torch.arange(len(codes)).to(nearest)[:, None].expand_as(nearest), nearest], -1).flatten(0, 1)
    tree = minimum_spanning_tree(apart.clamp(min=1e-300).cpu().numpy()).tocoo()  # 0 would be no edge
    bridges = torch.as_tensor(np.stack([tree.row, tree.col], 1).astype(np.int64)).to(pairs)
    edges = torch.cat([pairs, bridges]).sort(1).values.unique(dim=0)
    lines = straight_lines(codes[edges[:, 0]], codes[edges[:, 1]], n_segments)
    lengths = torch.cat([chord_length(metric, part) for part in lines.split(4096)])
    return CodeGraph(codes, edges, lengths)


def graph_starts(graph: CodeGraph, starts: Tensor, ends: Tensor, *, n_segments: int = 32) -> Tensor:
    """Curves along shortest paths of a graph, for `geodesics` to start from.

    Each end joins the node that is nearest in code; paths are cut into steps that are equally long in code.

    Args:
        graph: Such as `neighbour_graph` of encoded data.
        starts: (P, Z).
        ends: (P, Z).
        n_segments: Of the curves.

    Returns:
        (P, n + 1, Z).

    Exact when: never; it is a start.
    Cost: one shortest-path search a pair.

    Raises:
        ShapeError: If the graph's nodes have another number of dimensions.
        DataError: If no path joins a pair.
    """
    if graph.nodes.shape[1:] != starts.shape[1:]:
        got = f"nodes {tuple(graph.nodes.shape)} and codes {tuple(starts.shape)}"
        raise ShapeError("a graph of codes of as many dimensions", got, "Build it of encoded data of this model.")
    nearest = [torch.cdist(part.double(), graph.nodes.double()).argmin(1) for part in (starts, ends)]
    found, before = graph.distances(nearest[0])
    curves = []
    for row, (start, end, target) in enumerate(zip(starts, ends, nearest[1].tolist(), strict=True)):
        if not bool(torch.isfinite(found[row, target])):
            got = f"none for pair {row}"
            raise DataError("a path between every pair", got, "Join the graph: more neighbours, or a grid.")
        way = torch.cat([start[None], graph.path(before[row], target).to(start), end[None]])
        curves.append(_evenly(way, n_segments))
    return torch.stack(curves)


def _evenly(way: Tensor, n_segments: int) -> Tensor:
    """Points at equal steps of code along a polygon."""
    lengths = (way[1:] - way[:-1]).norm(dim=1)
    reached = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    wanted = torch.linspace(0, 1, n_segments + 1).to(way) * reached[-1]
    cell = (torch.searchsorted(reached, wanted, right=True) - 1).clamp(0, len(lengths) - 1)
    share = (wanted - reached[cell]) / lengths[cell].clamp(min=torch.finfo(way.dtype).tiny)
    inner = (way[cell] + share[:, None] * (way[cell + 1] - way[cell]))[1:-1]
    return torch.cat([way[:1], inner, way[-1:]])


def _shifted(number: Tensor, right: int, up: int) -> Tensor:
    """Pairs of grid nodes that lie (right, up) from one another, right >= 0; none if the grid is smaller than that."""
    n_x, n_y = number.shape
    here = number[: max(0, n_x - right), max(0, -up) : max(0, n_y - max(0, up))]
    there = number[right:, max(0, up) : max(0, n_y - max(0, -up))]
    return torch.stack([here.flatten(), there.flatten()], 1)


def _trapezoid(metric: Metric, nodes: Tensor, edges: Tensor) -> Tensor:
    with torch.no_grad():
        matrices = torch.cat([metric(part) for part in nodes.split(1024)]).double()
    total = torch.zeros(len(edges), dtype=torch.float64, device=nodes.device)
    step = (nodes[edges[:, 1]] - nodes[edges[:, 0]]).double()
    for end in (0, 1):
        squared = torch.einsum("ei,eij,ej->e", step, matrices[edges[:, end]], step)
        total += checked_squares(squared, "at nodes of the grid").sqrt() / 2
    check_matrices(matrices, "at nodes of the grid")
    return total
