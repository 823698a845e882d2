"""Distances between all codes of a set: the fast route with its error, neighbours, medoids, means."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesae.errors import DataError, NonFiniteError, ShapeError
from bayesae.geometry.derivatives import checked_points
from bayesae.geometry.geodesics import solved
from bayesae.geometry.graph import CodeGraph
from bayesae.geometry.maps import exponential, logarithm
from bayesae.geometry.metrics import Metric, check_metric

__all__ = ["Distances", "Medoids", "distance_matrix", "frechet_mean", "geodesic_neighbours", "k_medoids"]

_ASYMMETRIC = 1e-5  # share of the largest squared distance by which two ways may differ


@dataclass(frozen=True)
class Distances:
    """Distances of N codes by the fast route, and what the solver says of some of them.

    Args:
        matrix: (N, N), float64, symmetric.
        pairs: Pairs that were checked, (R, 2).
        solved: Their lengths by `geodesics` with the graph's paths as a second start, (R,).
        has_converged: Whether the solver converged on each, (R,).
    """

    matrix: Tensor
    pairs: Tensor
    solved: Tensor
    has_converged: Tensor

    @property
    def relative_errors(self) -> Tensor:
        """Of the checked pairs, fast over solved minus 1, (R,)."""
        return self.matrix[self.pairs[:, 0], self.pairs[:, 1]] / self.solved - 1


def distance_matrix(
    metric: Metric,
    graph: CodeGraph,
    n_codes: int,
    *,
    n_checked: int = 200,
    n_segments: int = 32,
    tolerance: float = 1e-6,
    max_iterations: int = 100,
    seed: int = 0,
) -> Distances:
    """Distances between codes along a graph, checked against the solver on pairs drawn at random.

    Args:
        metric: G, for the check; no `IndependentDraws`, whose lengths depend on the number of segments.
        graph: `grid_graph` (Z = 2 only) or `neighbour_graph` (any Z) of the codes, which are its first nodes.
        n_codes: How many of the nodes, N >= 2.
        n_checked: Pairs R that the solver checks, drawn with replacement; 0 for none.
        n_segments: Of the solver's curves.
        tolerance: Of `geodesics`.
        max_iterations: Of `geodesics`.
        seed: Of the pairs.

    Returns:
        The matrix, and the check.

    Exact when: never; ``relative_errors`` say how far it is.
    Biased when: paths bend along edges: too long.
    Cost: N shortest-path searches, and two geodesics for each checked pair.

    Raises:
        DataError: If N does not fit the graph, or codes are in parts that no path joins.
        UnsupportedError: If ``metric`` is none, such as `IndependentDraws`.
    """
    check_metric(metric)
    if not 2 <= n_codes <= len(graph.nodes) or n_checked < 0:
        got = f"n_codes={n_codes}, n_checked={n_checked}, {len(graph.nodes)} nodes"
        raise DataError(
            "two codes or more, all of them nodes, and n_checked >= 0", got, "Build the graph of the codes."
        )
    found, _ = graph.distances(torch.arange(n_codes))
    matrix = found[:, :n_codes]
    if not bool(torch.isfinite(matrix).all()):
        n_bad = int((~torch.isfinite(matrix)).sum()) // 2
        raise DataError("a path between all codes", f"none for {n_bad} pairs", "Give the codes more neighbours.")
    matrix = (matrix + matrix.T) / 2
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.randint(n_codes, (n_checked, 2), generator=generator)
    pairs = pairs[(graph.nodes[pairs[:, 0]] != graph.nodes[pairs[:, 1]]).any(1).cpu()]
    if not len(pairs):
        return Distances(matrix, pairs, torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.bool))
    starts, ends = graph.nodes[pairs[:, 0]], graph.nodes[pairs[:, 1]]
    curves = solved(
        metric, starts, ends, n_segments=n_segments, graph=graph, tolerance=tolerance, max_iterations=max_iterations
    )
    return Distances(matrix, pairs, curves.length.cpu(), curves.has_converged.cpu())


def geodesic_neighbours(matrix: Tensor, k: int) -> Tensor:
    """The k nearest others of every code, nearest first.

    Args:
        matrix: Distances (N, N), as `Distances.matrix`.
        k: At most N - 1.

    Returns:
        Row numbers, (N, k).

    Exact when: always, given the distances; equal ones stand in the order of their numbers.
    Cost: N sorts.

    Raises:
        ShapeError: If the matrix is not square.
        DataError: If k is not between 1 and N - 1, or a distance is below 0 or another on the way back.
        NonFiniteError: If a distance is not finite.
    """
    matrix = _checked_matrix(matrix)
    if not 1 <= k < len(matrix):
        raise DataError(f"k from 1 to {len(matrix) - 1}", f"{k}", "A code is no neighbour of its own.")
    others = matrix.clone().fill_diagonal_(math.inf)
    return others.argsort(dim=1, stable=True)[:, :k]


@dataclass(frozen=True)
class Medoids:
    """Clusters around some of the codes.

    Args:
        indices: Row numbers of the medoids, (k,), ascending.
        labels: Which of the k each code is nearest to, (N,).
        cost: Sum of the distances to them, in units of the outputs.
    """

    indices: Tensor
    labels: Tensor
    cost: float


def k_medoids(matrix: Tensor, k: int, *, n_starts: int = 5, seed: int = 0) -> Medoids:
    """The k codes with the least sum of distances to their nearest, by swaps from several starts.

    Args:
        matrix: Distances (N, N).
        k: Medoids, 1 to N.
        n_starts: Random starts, of which the best is kept.
        seed: Of the starts.

    Returns:
        The medoids.

    Exact when: k = 1; else no single swap lowers the cost.
    Biased when: the starts all lead to one local minimum.
    Cost: k N^2 a sweep of swaps.

    Raises:
        ShapeError: If the matrix is not square.
        DataError: If k is not between 1 and N, there is no start, or a distance is below 0 or another on the way back.
        NonFiniteError: If a distance is not finite.

    References:
        | Finding Groups in Data, chapter 2 (Kaufman and Rousseeuw, 1990)
    """
    matrix = _checked_matrix(matrix)
    n = len(matrix)
    if not 1 <= k <= n or n_starts < 1:
        raise DataError(f"k from 1 to {n} and n_starts >= 1", f"k={k}, n_starts={n_starts}", "Choose fewer medoids.")
    generator = torch.Generator().manual_seed(seed)
    best, least = torch.arange(k), math.inf
    for _ in range(n_starts):
        chosen = torch.randperm(n, generator=generator)[:k]
        cost = float(matrix[chosen].amin(0).sum())
        while True:
            swaps = []
            for place in range(k):
                rest = torch.cat([chosen[:place], chosen[place + 1 :]])
                kept = matrix[rest].amin(0) if k > 1 else torch.full((n,), math.inf).to(matrix)
                costs = torch.minimum(kept, matrix).sum(1)
                swaps.append((float(costs.min()), place, int(costs.argmin())))
            lowest, place, row = min(swaps)
            if not cost - lowest > 1e-12 * abs(cost):
                break  # costs only fall, and there are finitely many sets
            cost, chosen = lowest, torch.cat([chosen[:place], torch.tensor([row]), chosen[place + 1 :]])
        if cost < least:
            best, least = chosen.sort().values, cost
    return Medoids(best, matrix[best].argmin(0), least)


def frechet_mean(
    metric: Metric,
    codes: Tensor,
    *,
    weights: Tensor | None = None,
    start: Tensor | None = None,
    tolerance: float = 1e-5,
    max_iterations: int = 50,
) -> Tensor:
    r"""The code with the least sum of squared distances to others, by steps along the mean logarithm.

    .. math:: m \leftarrow \exp_m \Big( \sum_i w_i \log_m z_i \Big), \qquad w_i = \tfrac1N
              \text{ or the weights over their sum}

    Args:
        metric: G, differentiable in torch.
        codes: (N, Z).
        weights: Of the codes' squared distances, (N,), at least 0; all alike if None.
        start: Where to begin, (Z,); the (weighted) arithmetic mean of the codes if None.
        tolerance: Length of the mean logarithm, a share of the root mean squared distance, that counts as 0; never
            below a thousand roundings of the dtype (1e-4 in float32).
        max_iterations: Steps.

    Returns:
        (Z,).

    Exact when: the metric is constant: the arithmetic mean. Else to ``tolerance``.
    Biased when: codes are spread wider than a ball without conjugate points, where several means may exist.
    Cost: N logarithms a step, three to ten steps.

    Raises:
        ShapeError: If codes are no matrix, the start is not one of them, or there is not a weight for each.
        NonFiniteError: If a code is not finite, or the metric along a step is not, or is singular.
        DataError: If the steps do not come to rest, or a weight is below 0, or all are 0.
        UnsupportedError: If a `logarithm` does not hit its end.
    """
    codes = checked_points("codes", codes)
    if start is not None and start.shape != codes.shape[1:]:
        raise ShapeError(f"a start ({codes.shape[1]},)", f"{tuple(start.shape)}", "Give one code.")
    shares = torch.full_like(codes[:, 0], 1 / len(codes)) if weights is None else _checked_shares(weights, codes)
    codes, shares = codes[shares > 0], shares[shares > 0]
    mean = shares @ codes if start is None else checked_points("start", start[None])[0].to(codes)
    tolerance = max(tolerance, 1000 * torch.finfo(codes.dtype).eps)
    share = math.inf
    for _ in range(max_iterations):
        is_other = (codes != mean).any(1)
        others, own = codes[is_other], shares[is_other]
        if not len(others):
            return mean
        here = mean.expand(len(others), -1)
        logs = logarithm(metric, here, others)
        step = own @ logs
        matrix = metric(mean[None])[0].detach()
        spread = own @ torch.einsum("ni,ij,nj->n", logs, matrix, logs)
        share = float((step @ matrix @ step / spread).clamp(min=0).sqrt())
        if share <= tolerance:
            return mean
        mean = exponential(metric, mean[None], step[None])[0][0]
    got = f"a mean logarithm of {share:.2g} of the spread after {max_iterations} steps"
    raise DataError("steps that come to rest", got, "Start nearer, or split the codes: they may have several means.")


def _checked_shares(weights: Tensor, codes: Tensor) -> Tensor:
    weights = weights.detach().to(codes)
    if weights.shape != codes.shape[:1]:
        raise ShapeError(f"weights ({len(codes)},)", f"{tuple(weights.shape)}", "Give one for every code.")
    if not bool((weights >= 0).all() & torch.isfinite(weights.sum()) & (weights.sum() > 0)):
        got = f"{weights.amin():.4g} to {weights.amax():.4g}"
        raise DataError("finite weights of at least 0, one of them above", got, "Leave them out for equal ones.")
    return weights / weights.sum()


def _checked_matrix(matrix: Tensor) -> Tensor:
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ShapeError("distances (N, N)", f"{tuple(matrix.shape)}", "Give a row and a column for every code.")
    if not bool(torch.isfinite(matrix).all()):
        raise NonFiniteError("finite distances", "NaN or infinite ones", "Are all codes joined in the graph?")
    matrix = matrix.detach().double().cpu()
    if bool((matrix < 0).any()):
        got = f"{int((matrix < 0).sum())} of {matrix.numel()} below 0"
        raise DataError("distances of at least 0", got, "Give distances, no similarities or their logarithms.")
    squares = matrix.square()  # in which what rounding does to a short distance is small
    if bool(((squares - squares.T).abs() > _ASYMMETRIC * squares.amax()).any()):
        got = f"some that differ by up to {float((matrix - matrix.T).abs().max()):.4g} from one way to the other"
        raise DataError("symmetric distances", got, "Use (D + D.T) / 2 if that is what is meant.")
    return matrix
