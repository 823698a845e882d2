"""What each code posterior costs: an epoch of `fit_model` beside the plain VAE's, side by side in one process.

``python -m benchmarks.codes --json benchmarks/results/codes.json``

The network of the digits, 64-64-64-8-64-64-64 with ReLU, Gaussian output of learned scale, 1,438 rows in batches of
128, Adam. After an epoch to warm up, rounds of one epoch each, every method once a round in turn; the ratio is the
median over rounds of a method's epoch over the VAE's of the same round. An epoch has 12 steps and the pass that sets
the noise.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import bayesae as bae
from bayesae import codes, objectives
from benchmarks.records import write

N_LATENTS = 8
TARGETS = {"Variational Laplace, 4 steps": 10.0}
AIMS = {"Variational Laplace, 4 steps": 6.0}


@dataclass(frozen=True)
class Entrant:
    """A method.

    Args:
        codes: Makes its code posterior.
        n_parameters: Numbers that it wants of the encoder for each code dimension.
        objective: What is climbed.
        n_latent_draws: K.
    """

    codes: Callable[[], Any]
    n_parameters: int = 2
    objective: Any = objectives.elbo
    n_latent_draws: int = 1


def _flow(flow: Callable[[], Any]) -> Entrant:
    made = codes.Flowed(codes.amortised, flow())
    return Entrant(lambda: codes.Flowed(codes.amortised, flow()), made.n_parameters(N_LATENTS))


ENTRANTS = {
    "VAE": Entrant(lambda: codes.amortised),
    "VAE, full covariance": Entrant(lambda: codes.Amortised("full"), 1 + N_LATENTS),
    "DLGM, rank-one precision": Entrant(lambda: codes.Amortised("rank_one"), 3),
    "IWAE 16": Entrant(lambda: codes.amortised, objective=objectives.iwae, n_latent_draws=16),
    "PIWAE (4, 4)": Entrant(lambda: codes.amortised, objective=objectives.PIWAE(4), n_latent_draws=16),
    "planar x 10": _flow(lambda: codes.Planar(10)),
    "IAF x 4": _flow(lambda: codes.AutoregressiveFlow(N_LATENTS, 4, hidden=(64,))),
    "Hamiltonian x 4": Entrant(lambda: codes.Hamiltonian(codes.amortised, codes.Leapfrog(N_LATENTS, 4))),
    "semi-amortised, 5 steps": Entrant(lambda: codes.Refined(codes.amortised, n_steps=5, n_directions=2)),
    "Variational Laplace, 1 step": Entrant(lambda: codes.Laplace(1), 1),
    "Variational Laplace, 4 steps": Entrant(lambda: codes.Laplace(4), 1),
}


def model_of(entrant: Entrant) -> bae.Autoencoder:
    """The digits' network."""
    torch.manual_seed(0)
    size = (N_LATENTS, entrant.n_parameters) if entrant.n_parameters > 1 else N_LATENTS
    encoder = bae.nets.mlp(64, [64, 64], size, activation=nn.ReLU)
    decoder = bae.nets.mlp(N_LATENTS, [64, 64], 64, activation=nn.ReLU)
    return bae.Autoencoder(encoder, decoder, bae.likelihoods.Gaussian())


def measure(rounds: int) -> list[dict[str, Any]]:
    """One record a method."""
    (rows,) = bae.datasets.load("digits", split=("train",))
    models = {name: (model_of(entrant), entrant.codes()) for name, entrant in ENTRANTS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ENTRANTS}
    for number in range(rounds + 1):
        for name, (model, own) in models.items():
            entrant = ENTRANTS[name]
            start = time.perf_counter()
            bae.fit_model(
                model,
                rows,
                epochs=1,
                objective=entrant.objective,
                codes=own,
                n_latent_draws=entrant.n_latent_draws,
                seed=number,
                progress=False,
            )
            if number:
                seconds[name].append(time.perf_counter() - start)
    records = []
    for name, values in seconds.items():
        ratios = [value / base for value, base in zip(values, seconds["VAE"], strict=True)]
        ratio = statistics.median(ratios)
        records.append({
            "question": "epoch of the digits",
            "method": name,
            "seconds": statistics.median(values),
            "over_vae": ratio,
            "over_vae_low": min(ratios),
            "over_vae_high": max(ratios),
            "target": TARGETS.get(name),
            "aim": AIMS.get(name),
            "reached": None if name not in TARGETS else ratio <= TARGETS[name],
        })
    return records


def main() -> None:
    """Measure, print a line a method, write the records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    records = measure(given.rounds)
    for record in records:
        low, high = record["over_vae_low"], record["over_vae_high"]
        print(
            f"{record['method']:32} {record['seconds']:.3f} s {record['over_vae']:5.2f} x VAE ({low:.2f} to {high:.2f})"
        )
    if given.json:
        write(given.json, given.threads, records)


if __name__ == "__main__":
    main()
