"""Every score of 10,000 images in one pass: what it costs beside plain forward passes, and what it keeps in memory.

``python -m benchmarks.scores --json benchmarks/results/scores.json``

A VAE (784-256-64-2, mirrored, tanh, float32) under a diagonal Normal over all weights; 32 weight draws, 16 code draws,
10,000 images of MNIST where they are at hand (uniform noise else). "every score of Draws" is
`Predictive.reduce(ood.all_scores)`: predictive, expected and typical log-densities, WAIC, disagreement, entropy,
deviation, information gain (which reads outputs), variance and volume of the code; typicality is centred on the first
1,000 rows. "the decoder alone" is as many plain decoder passes. Priced apart, under the mean weights: likelihood regret
(20 steps, 2 directions), a background model's densities and its training (20 epochs of 10,000 rows), and input
complexity. Memory is the highest of a process of its own that scores all rows.
"""

from __future__ import annotations

import argparse
import copy
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bayesae as bae
from bayesae import ood
from bayesae.functional import parameters_of
from benchmarks.measure import resident
from benchmarks.records import write

LIKELIHOODS: dict[str, Callable[[], Any]] = {
    "Gaussian": lambda: bae.likelihoods.Gaussian(0.2),
    "Bernoulli": bae.likelihoods.Bernoulli,
}
SECONDS, MEGABYTES = 120.0, 2_000.0


def images(n: int) -> tuple[Tensor, str]:
    """Rows and what they are."""
    try:
        return bae.datasets.load("mnist", split="test")[:n].flatten(1), "mnist"
    except bae.errors.DataError:
        return torch.rand(n, 784, generator=torch.Generator().manual_seed(0)), "uniform noise"


def contenders(
    likelihood: str, n_rows: int, n_weight_draws: int, n_latent_draws: int
) -> dict[str, Callable[[], object]]:
    """What is timed."""
    torch.manual_seed(0)
    encoder, decoder = bae.nets.mlp(784, [256, 64], (2, 2)), bae.nets.mlp(2, [64, 256], 784)
    model = bae.Autoencoder(encoder, decoder, LIKELIHOODS[likelihood]()).eval()
    subset = bae.Subset.of(model.network)
    mean = parameters_of(model.network)
    weights = bae.families.DiagonalNormal(mean, torch.full((len(subset),), 1e-4), subset, is_linearised=False)
    point = bae.families.Particles({name: leaf[None] for name, leaf in mean.items()})
    refined = bae.codes.Refined(n_steps=20, learning_rate=0.02, n_directions=2)
    predictive, start, climbed = (
        bae.Predictive(model, one, codes)
        for one, codes in ((weights, bae.codes.amortised), (point, bae.codes.amortised), (point, refined))
    )
    rows, _ = images(n_rows)
    codes: dict[str, Any] = {"n_latent_draws": n_latent_draws, "seed": 0}
    of_weights = {"n_weight_draws": n_weight_draws, **codes}
    familiar = ood.negative_log_predictive(predictive(rows[:1_000], **of_weights))

    @torch.no_grad()
    def alone() -> None:
        latents = torch.randn(n_latent_draws * 128, 2)
        for _ in range(n_weight_draws * n_rows // 128):
            model.decoder(latents)

    def trained() -> None:
        learn: dict[str, Any] = {"objective": bae.objectives.elbo, "codes": bae.codes.amortised, "progress": False}
        bae.fit_model(copy.deepcopy(model), rows, epochs=20, seed=0, **learn)

    return {
        "the decoder alone": alone,
        "every score of Draws": lambda: predictive.reduce(lambda d: ood.all_scores(d, familiar), rows, **of_weights),
        "likelihood regret": lambda: ood.likelihood_regret(start(rows, **codes), climbed(rows, **codes)),
        "background model's densities": lambda: start(rows, **codes),
        "background model's training": trained,
        "input complexity": lambda: ood.input_complexity(rows),
    }


def main() -> None:
    """Measure, print a line a contender, write the records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--weight-draws", type=int, default=32)
    parser.add_argument("--latent-draws", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peak-of", choices=list(LIKELIHOODS), help="only print the highest memory, MB, of all scores")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    sizes = given.rows, given.weight_draws, given.latent_draws
    if given.peak_of:
        contenders(given.peak_of, *sizes)["every score of Draws"]()
        print(resident())
        return
    records = []
    for likelihood in LIKELIHOODS:
        words = ["--rows", sizes[0], "--weight-draws", sizes[1], "--latent-draws", sizes[2], "--threads", given.threads]
        command = [sys.executable, "-m", "benchmarks.scores", "--peak-of", likelihood, *map(str, words)]
        peak = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        for name, run in contenders(likelihood, *sizes).items():
            contenders(likelihood, 100, *sizes[1:])[name]()  # warms up
            seconds = []
            for _ in range(given.rounds):
                start = time.perf_counter()
                run()
                seconds.append(time.perf_counter() - start)
            is_whole = name == "every score of Draws"
            records.append({
                "data": images(1)[1], "outputs": likelihood, "method": name, "rows": sizes[0],
                "seconds": min(seconds), "seconds_high": max(seconds), "peak_mb": peak if is_whole else None,
                "target_seconds": SECONDS if is_whole else None,
                "reached": min(seconds) <= SECONDS and peak <= MEGABYTES if is_whole else None,
            })  # fmt: skip
            memory = f", {peak:.0f} MB at most" if is_whole else ""
            print(f"{likelihood:10} {name:28} {min(seconds):7.1f} s{memory}", flush=True)
    if given.json:
        write(given.json, given.threads, records)


if __name__ == "__main__":
    main()
