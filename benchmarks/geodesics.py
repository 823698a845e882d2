"""Geodesics of a decoder under weight draws beside the ``stochman`` package, and a distance matrix by the fast route.

``BAYESAE_DATA=... python -m benchmarks.geodesics --json benchmarks/results/geodesics.json``

An autoencoder 784-256-64-2-64-256-784 is trained on MNIST in float32; the draws are 16 of a diagonal Normal around its
weights. Question one: 100 geodesics between random pairs of codes under the expected metric of the draws, with 19
segments, which is the grid of stochman's own solver (``connecting_geodesic``: a spline of 5 nodes, 150 steps of Adam).
Both curves are measured by the same chords at 20 equal times; "energy" is the mean over pairs, "pairs" the share whose
energy is no higher than the other's by 0.1 %. Question two: all distances between 500 codes along a grid, and the error
on those of 200 pairs that the solver certifies with 64 segments ("error_with_uncertified": on all). Peers that are not
installed are left out, and the record says so. ``--questions`` asks some; other records of the file are kept.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bayesae as bae
from bayesae import geometry
from bayesae.functional import parameters_of
from bayesae.geometry.derivatives import Decoder
from benchmarks.records import write

GRID = 20  # points of stochman's curves
SPEED_TARGET, ERROR_TARGET, SECONDS_TARGET = 10.0, 0.05, 300.0


def world(n_rows: int, epochs: int, n_draws: int) -> tuple[Decoder, Tensor]:
    """A decoder under draws, and the codes of the training images."""
    train = bae.datasets.load("mnist")[:n_rows]
    torch.manual_seed(0)
    encoder, decoder = bae.nets.mlp(784, [256, 64], 2), bae.nets.mlp(2, [64, 256], 784)
    model = bae.Autoencoder(encoder, decoder, bae.likelihoods.Gaussian(0.2))
    bae.fit_model(model, train, epochs=epochs, learning_rate=1e-3, batch_size=128, seed=0)
    model.eval()
    subset = bae.Subset.of(model.network)
    variance = torch.full((len(subset),), 1e-4)
    posterior = bae.families.DiagonalNormal(parameters_of(model.network), variance, subset, is_linearised=False)
    with torch.no_grad():
        codes = encoder(train.flatten(1)).reshape(len(train), -1)
    return bae.Predictive(model, posterior).decoder(n_draws, seed=0), codes


def stochman_curves(decoder: Decoder, starts: Tensor, ends: Tensor) -> tuple[float, Tensor]:
    """Seconds, and points at equal times, of stochman's default solver on all pairs at once."""
    manifold = importlib.import_module("stochman.manifold")

    class Outputs(manifold.EmbeddedManifold):
        def embed(self, points: Tensor, jacobian: bool = False) -> Tensor:
            if jacobian:
                raise NotImplementedError("energies need no Jacobian")
            outputs = decoder(points.reshape(-1, points.shape[-1])).flatten(2)
            return (outputs.transpose(0, 1).flatten(1) / len(outputs) ** 0.5).reshape(*points.shape[:-1], -1)

    start = time.perf_counter()
    curve, _ = Outputs().connecting_geodesic(starts, ends)
    seconds = time.perf_counter() - start
    with torch.no_grad():
        points = curve(torch.linspace(0, 1, GRID))
    return seconds, torch.cat([starts[:, None], points[:, 1:-1], ends[:, None]], 1)


def geodesics(decoder: Decoder, codes: Tensor, n_pairs: int, rounds: int) -> list[dict[str, Any]]:
    """One record a solver."""
    generator = torch.Generator().manual_seed(1)
    chosen = torch.randperm(len(codes), generator=generator)[: 2 * n_pairs]
    starts, ends = codes[chosen].chunk(2)
    metric = geometry.Pullback(decoder)
    own: list[float] = []
    their: list[float] = []
    found, theirs, reason = None, None, None
    for number in range(rounds):
        if number == 0:
            geometry.geodesics(metric, starts[:2], ends[:2], n_segments=GRID - 1)  # what torch compiles and imports
        start = time.perf_counter()
        found = geometry.geodesics(metric, starts, ends, n_segments=GRID - 1)
        own.append(time.perf_counter() - start)
        try:
            seconds, theirs = stochman_curves(decoder, starts, ends)
            their.append(seconds)
        except ImportError as error:
            reason = str(error)
    if found is None:
        raise bae.errors.DataError("one round or more", f"{rounds}", "Give --rounds 1.")
    question = f"{n_pairs} geodesics"
    straight = geometry.chord_energy(metric, geometry.straight_lines(starts, ends, GRID - 1))
    records: list[dict[str, Any]] = [
        {
            "question": question,
            "method": "bayesae",
            "seconds": min(own),
            "energy": float(found.energy.mean()),
            "converged": float(found.has_converged.double().mean()),
            "iterations": float(found.n_iterations.double().mean()),
        }
    ]
    if theirs is not None:
        energy = geometry.chord_energy(metric, theirs)
        records[0]["pairs"] = float((found.energy <= 1.001 * energy).double().mean())
        ratios = sorted(slow / fast for slow, fast in zip(their, own, strict=True))
        lowest, highest = ratios[0], ratios[-1]
        records[0] |= {"speed_up": statistics.median(ratios), "speed_up_low": lowest, "speed_up_high": highest}
        records[0]["reached"] = lowest >= SPEED_TARGET and records[0]["energy"] <= float(energy.mean())
        pairs = float((energy <= 1.001 * found.energy).double().mean())
        peer = {"seconds": min(their), "energy": float(energy.mean()), "pairs": pairs}
        records.append({"question": question, "method": "stochman", **peer})
    else:
        records.append({"question": question, "method": "stochman", "seconds": None, "reason": reason})
    records.append({"question": question, "method": "straight lines", "energy": float(straight.mean())})
    return records


def distances(decoder: Decoder, codes: Tensor, n_codes: int, n_cells: int, n_checked: int) -> dict[str, Any]:
    """The record of the matrix."""
    metric, some = geometry.Pullback(decoder), codes[:n_codes]
    start = time.perf_counter()
    graph = geometry.grid_graph(metric, some, n_cells=n_cells)
    geometry.distance_matrix(metric, graph, n_codes, n_checked=0)
    seconds = time.perf_counter() - start
    found = geometry.distance_matrix(metric, graph, n_codes, n_checked=n_checked, n_segments=64)
    every = found.relative_errors.abs()
    errors = every[found.has_converged]
    return {
        "question": f"{n_codes} x {n_codes} distances",
        "method": f"grid of {n_cells} cells",
        "seconds": seconds,
        "error_median": float(errors.median()),
        "error_95": float(errors.quantile(0.95)),
        "error_largest": float(errors.max()),
        "n_checked": len(every),
        "n_converged": len(errors),
        "error_with_uncertified": float(every.max()),
        "reached": seconds < SECONDS_TARGET and float(every.max()) < ERROR_TARGET,
    }


def main() -> None:
    """Measure, print the records, write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--draws", type=int, default=16)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--codes", type=int, default=500)
    parser.add_argument("--cells", type=int, default=200)
    parser.add_argument("--checked", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--questions", nargs="+", choices=("curves", "matrix"), default=["curves", "matrix"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    decoder, codes = world(given.rows, given.epochs, given.draws)
    records: list[dict[str, Any]] = []
    if "curves" in given.questions:
        records += geodesics(decoder, codes, given.pairs, given.rounds)
    if "matrix" in given.questions:
        records.append(distances(decoder, codes, given.codes, given.cells, given.checked))
    for record in records:
        print(" ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in record.items()), flush=True)
    if given.json:
        asked = {record["question"] for record in records}
        old = json.loads(given.json.read_text())["records"] if given.json.exists() else []
        write(given.json, given.threads, [one for one in old if one["question"] not in asked] + records)


if __name__ == "__main__":
    main()
