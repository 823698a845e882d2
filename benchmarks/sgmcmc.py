"""What chains cost together: eight by one mapped gradient a step, beside a Python loop over eight single ones.

``python -m benchmarks.sgmcmc --threads 1 --json benchmarks/results/sgmcmc.json``

The mirrored network 64-32-2-32-64 with tanh, 800 random rows in batches of 100 (HMC: all), float32. After a round to
warm up, rounds of one run each, both ways in turn; the ratio is the median over rounds of the loop's time over that of
the eight chains together. They are also compared with as many epochs of `fit_model`: a run's cost in trainings.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import bayesae as bae
from bayesae.weights import HMC, SGHMC, SGLD, SGNHT, RMSProp, ScaleAdaptation
from benchmarks.records import write

N_CHAINS, N_ROWS, BATCH_SIZE = 8, 800, 100
SAMPLERS: dict[str, tuple[Callable[..., Any], int]] = {
    "SGLD": (partial(SGLD, 1e-7), BATCH_SIZE),
    "SGLD, preconditioned": (partial(SGLD, 1e-8, preconditioner=RMSProp()), BATCH_SIZE),
    "SGHMC": (partial(SGHMC, 1e-7), BATCH_SIZE),
    "SGHMC, scale-adapted": (partial(SGHMC, 1e-6, preconditioner=ScaleAdaptation()), BATCH_SIZE),
    "SGNHT": (partial(SGNHT, 1e-7), BATCH_SIZE),
    "HMC": (partial(HMC, 1e-4, 8, adapts=False), N_ROWS),
}
TARGETS = {"SGHMC": 2.0}  # at least


def model() -> bae.Autoencoder:
    """64-32-2-32-64."""
    torch.manual_seed(0)
    encoder = bae.nets.mlp(64, [32], 2, activation=nn.Tanh)
    return bae.Autoencoder(encoder, bae.nets.mlp(2, [32], 64, activation=nn.Tanh), bae.likelihoods.Gaussian(0.3)).eval()


def seconds_of(build: Callable[..., Any], batch_size: int, chains: list[int], epochs: int) -> float:
    """One run for each number of chains, one after the other."""
    network, rows = model(), torch.rand(N_ROWS, 64, generator=torch.Generator().manual_seed(0))
    start = time.perf_counter()
    for seed, n in enumerate(chains):
        method = build(n_chains=n, epochs=epochs, burn_in=0.5, thinning=4 if batch_size < N_ROWS else 1)
        bae.fit_weights(method, network, rows, batch_size=batch_size, seed=seed, progress=False)
    return time.perf_counter() - start


def adam(epochs: int) -> float:
    """As many epochs of `fit_model`."""
    network, rows = model(), torch.rand(N_ROWS, 64, generator=torch.Generator().manual_seed(0))
    start = time.perf_counter()
    bae.fit_model(network, rows, epochs=epochs, batch_size=BATCH_SIZE, seed=0, progress=False)
    return time.perf_counter() - start


def measure(rounds: int, epochs: int) -> list[dict[str, Any]]:
    """One record a sampler."""
    times: dict[str, list[tuple[float, ...]]] = {name: [] for name in SAMPLERS}
    for number in range(rounds + 1):
        for name, (build, batch_size) in SAMPLERS.items():
            together = seconds_of(build, batch_size, [N_CHAINS], epochs)
            loop = seconds_of(build, batch_size, [1] * N_CHAINS, epochs)
            trained = adam(epochs)
            if number:
                times[name].append((together, loop, trained))
    records = []
    for name, found in times.items():
        ratios = [loop / together for together, loop, _trained in found]
        ratio, target = statistics.median(ratios), TARGETS.get(name)
        records.append({
            "question": f"{N_CHAINS} chains together",
            "method": name,
            "seconds": statistics.median(together for together, _, _ in found),
            "loop_seconds": statistics.median(loop for _, loop, _ in found),
            "ratio": ratio,
            "ratio_low": min(ratios),
            "ratio_high": max(ratios),
            "over_training": statistics.median(together / trained for together, _, trained in found),
            "target": target,
            "reached": None if target is None else ratio >= target,
        })
    return records


def main() -> None:
    """Measure, print a line a sampler, write the records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--fast", action="store_true", help="one round of two epochs: that it runs, not how fast")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    records = measure(1, 2) if given.fast else measure(given.rounds, given.epochs)
    for record in records:
        low, high = record["ratio_low"], record["ratio_high"]
        print(
            f"{record['method']:22} {record['seconds']:.3f} s, loop {record['loop_seconds']:.3f} s: "
            f"{record['ratio']:.2f} x ({low:.2f} to {high:.2f}); {record['over_training']:.2f} x fit_model"
        )
    if given.json:
        write(given.json, given.threads, records)


if __name__ == "__main__":
    main()
