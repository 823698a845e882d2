"""A predictive of a hundred weight draws beside a hundred plain forward passes of the same rows, in one process.

``python -m benchmarks.predictive --json benchmarks/results/predictive.json``

The network 784-256-64-2-64-256-784 in float32, 10,000 rows in batches of 2,000, a diagonal Normal over all weights,
100 draws. The plain passes run the network itself a hundred times over the five batches, at fixed weights and without
scoring anything. "moments" is mean and variance in parts, "densities" the log-density of every row under every draw.
Rounds in turn, medians of ratios; memory is the highest of a process of its own, above that of one with 10 draws.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bayesae as bae
from bayesae.functional import parameters_of
from benchmarks.measure import resident
from benchmarks.records import write

TARGET = 2.0
DRAWS = (10, 100, 400)  # of two batches of rows


def predictive_of(n_rows: int) -> tuple[bae.Predictive, Tensor]:
    """The network under a diagonal posterior, and rows."""
    torch.manual_seed(0)
    encoder, decoder = bae.nets.mlp(784, [256, 64], 2), bae.nets.mlp(2, [64, 256], 784)
    model = bae.Autoencoder(encoder, decoder, bae.likelihoods.Gaussian(0.2)).eval()
    subset = bae.Subset.of(model.network)
    posterior = bae.families.DiagonalNormal(
        parameters_of(model.network), torch.full((len(subset),), 1e-4), subset, is_linearised=False
    )
    return bae.Predictive(model, posterior), torch.rand(n_rows, 784)


def contenders(n_rows: int, batch: int, n_draws: int) -> dict[str, Callable[[], object]]:
    """What is timed, the plain passes first."""
    predictive, rows = predictive_of(n_rows)

    @torch.no_grad()
    def plain() -> None:
        for part in rows.split(batch):
            for _ in range(n_draws):
                predictive.model(part)

    options: dict[str, Any] = {"n_weight_draws": n_draws, "seed": 0, "chunk_size": batch}
    return {
        "forward passes": plain,
        "moments": lambda: predictive.moments(rows, **options),
        "densities": lambda: predictive(rows, **options),
    }


def measure(n_rows: int, batch: int, n_draws: int, rounds: int) -> list[dict[str, Any]]:
    """One record a contender."""
    runs = contenders(n_rows, batch, n_draws)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):  # the first warms up
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - start)
    base = seconds["forward passes"]
    records = []
    for name, values in seconds.items():
        ratios = [value / other for value, other in zip(values, base, strict=True)]
        ratio, is_base = statistics.median(ratios), name == "forward passes"
        records.append({
            "question": "100 draws of 10,000 rows",
            "method": name,
            "seconds": statistics.median(values),
            "over_forward": ratio,
            "over_forward_low": min(ratios),
            "over_forward_high": max(ratios),
            "target": None if is_base else TARGET,
            "reached": None if is_base else ratio <= TARGET,
        })
    return records


def memory(n_rows: int, batch: int, threads: int) -> list[dict[str, Any]]:
    """Highest memory of processes with ever more draws, MB above the first."""
    peaks = []
    for n_draws in DRAWS:
        words = ["--peak-of", str(n_draws), "--rows", str(n_rows), "--batch", str(batch), "--threads", str(threads)]
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.predictive", *words], capture_output=True, text=True, check=True
        )
        peaks.append(float(done.stdout))
    return [
        {"question": "memory of moments", "method": f"{n} draws", "peak_mb_above_10_draws": peak - peaks[0]}
        for n, peak in zip(DRAWS, peaks, strict=True)
    ]


def main() -> None:
    """Measure, print a line a contender, write the records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=2_000)
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peak-of", type=int, help="only print the highest memory, MB, of moments with so many draws")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.peak_of:
        contenders(given.rows, given.batch, given.peak_of)["moments"]()
        print(resident())
        return
    records = measure(given.rows, given.batch, given.draws, given.rounds)
    for record in records:
        low, high = record["over_forward_low"], record["over_forward_high"]
        ratio = f"{record['over_forward']:.2f} ({low:.2f} to {high:.2f})"
        print(f"{record['method']:16} {record['seconds']:.2f} s {ratio} x forward passes")
    records += memory(min(given.rows, 2 * given.batch), given.batch, given.threads)
    for record in records[3:]:
        print(f"{record['method']:16} {record['peak_mb_above_10_draws']:+.1f} MB")
    if given.json:
        write(given.json, given.threads, records)


if __name__ == "__main__":
    main()
