"""What a step of online Laplace costs: beside a step of torch.optim.Adam on the plain network, in one process.

``python -m benchmarks.online_laplace --json benchmarks/results/online_laplace.json``

The network 784-256-64-2, mirrored, tanh, Gaussian output of learned noise, batches of 128 random images, float32. Adam
as ``torch.optim.Adam(parameters)`` makes it (on a CPU: a loop over parameters), its step with the forward pass, the
log-likelihood and the backward pass. Steps come in turn, so that all meet the same machine; the ratio is the median
over rounds of a method's step over Adam's of the same round.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import bayesae as bae
from bayesae.functional import parameters_of
from benchmarks.records import write

METHODS = {
    "Monte Carlo": bae.weights.OnlineLaplace(),
    "exact": bae.weights.OnlineLaplace(curvature="exact"),
    "approximate": bae.weights.OnlineLaplace(curvature="approximate"),
}
TARGETS = {"Monte Carlo": 3.0, "exact": 6.0}
N_DATA = 60_000


def make_model(hidden: tuple[int, ...]) -> bae.Autoencoder:
    """Fresh, with a noise scale."""
    torch.manual_seed(0)
    likelihood = bae.likelihoods.Gaussian()
    likelihood.start_noise()
    return bae.Autoencoder(bae.nets.mlp(784, hidden, 2), bae.nets.mlp(2, hidden[::-1], 784), likelihood).eval()


def plain(model: bae.Autoencoder) -> Callable[[torch.Tensor], None]:
    """A step of Adam."""
    optimiser = torch.optim.Adam(model.network.parameters())

    def step(x: torch.Tensor) -> None:
        optimiser.zero_grad()
        (-model.likelihood.log_prob(model.network(x), x).mean()).backward()
        optimiser.step()

    return step


def online(method: bae.weights.OnlineLaplace, model: bae.Autoencoder) -> Callable[[torch.Tensor], None]:
    """A step of the method."""
    joint = bae.log_joint(model, N_DATA)
    state = method.init(parameters_of(model.network), joint)

    def step(x: torch.Tensor) -> None:
        method.update(state, bae.Batch(x), joint)

    return step


def measure(hidden: tuple[int, ...], rounds: int) -> list[dict[str, Any]]:
    """One record a method."""
    batches = torch.rand(8, 128, 784, generator=torch.Generator().manual_seed(0))
    steps = {"Adam": plain(make_model(hidden))}
    steps |= {name: online(method, make_model(hidden)) for name, method in METHODS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 3):
        for name, step in steps.items():
            start = time.perf_counter()
            step(batches[number % len(batches)])
            if number >= 3:  # the first read the network and warm caches up
                seconds[name].append(time.perf_counter() - start)
    records = []
    for name, values in seconds.items():
        ratios = [value / base for value, base in zip(values, seconds["Adam"], strict=True)]
        low, ratio, high = statistics.quantiles(ratios, n=4, method="inclusive")
        target = TARGETS.get(name)
        records.append({
            "question": "a step of 784-256-64-2, batch 128",
            "method": name,
            "seconds": statistics.median(values),
            "over_adam": ratio,
            "over_adam_quartiles": [low, high],
            "target": target,
            "reached": None if target is None else ratio <= target,
        })
    return records


def main() -> None:
    """Measure, print a line a method, write the records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="a small network and few rounds: checks the code")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    records = measure((16,), 5) if given.fast else measure((256, 64), given.rounds)
    for record in records:
        low, high = record["over_adam_quartiles"]
        milliseconds = 1000 * record["seconds"]
        print(
            f"{record['method']:12} {milliseconds:6.2f} ms {record['over_adam']:5.2f} x Adam ({low:.2f} to {high:.2f})"
        )
    if given.json:
        write(given.json, given.threads, records)


if __name__ == "__main__":
    main()
