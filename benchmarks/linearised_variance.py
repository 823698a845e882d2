"""Linearised per-pixel variance of a 784-256-64-2-64-256-784 autoencoder: time, memory, accuracy, and laplace-torch.

Each measurement runs in a process of its own. "Peak" is the largest resident memory above that after the imports: data,
training, the fit of the posterior and the prediction. Accuracy is the largest relative error of our float32 variances
against brute force in float64 (a Jacobian row an output by autograd) at random pixels. Ours takes 64 images;
laplace-torch, with its ``diagonal_output=True``, as many as ``--peer-images`` says (each costs it gigabytes and tens of
seconds), its own fit kept to one image.

Run on a quiet machine: ``python benchmarks/linearised_variance.py --json benchmarks/results/linearised_variance.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bayesae as bae
from bayesae import report

N_IMAGES, N_FIT = 64, 512


def images(n: int) -> Tensor:
    """MNIST where it is at hand, else random images: the cost does not depend on them."""
    if os.environ.get("BAYESAE_DATA"):
        return bae.datasets.load("mnist")[:n]
    return torch.rand(n, 1, 28, 28, generator=torch.Generator().manual_seed(0))


def trained() -> bae.Autoencoder:
    """The network after two passes, enough to leave its initialisation."""
    torch.manual_seed(0)
    encoder, decoder = bae.nets.mlp(784, [256, 64], 2), bae.nets.mlp(2, [64, 256], 784)
    model = bae.Autoencoder(encoder, decoder, bae.likelihoods.Gaussian())
    bae.fit_model(model, images(N_FIT), epochs=2, seed=0)
    return model


def peak_gigabytes() -> float:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def one_output(params: dict[str, Tensor], network: nn.Module, row: Tensor, o: int) -> Tensor:
    """Output ``o`` of one row as a function of the weights."""
    return torch.func.functional_call(network, params, (row,))[0, o]


def ours() -> dict[str, float]:
    """Time, memory and error of `Predictive.moments`."""
    imported = peak_gigabytes()
    model, x = trained(), images(N_IMAGES)
    weights = bae.fit_weights(bae.weights.Laplace(), model, images(N_FIT))
    assert isinstance(weights, bae.families.DiagonalNormal)
    predictive = bae.Predictive(model, weights)
    start = time.perf_counter()
    variance = predictive.moments(x).weights
    seconds, peak = time.perf_counter() - start, peak_gigabytes() - imported

    network, variances = model.network.double(), {k: v.double() for k, v in weights.variances().items()}
    params, worst = bae.functional.parameters_of(network), 0.0
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        i, o = (int(torch.randint(high, (), generator=generator)) for high in (N_IMAGES, 784))
        row = x[i : i + 1].double()
        gradient = torch.func.grad(one_output)(params, network, row, o)
        exact = sum(float((gradient[name] ** 2 * variances[name]).sum()) for name in params)
        worst = max(worst, abs(float(variance[i].flatten()[o]) / exact - 1))
    return {
        "images": N_IMAGES,
        "seconds": seconds,
        "ms an image": 1000 * seconds / N_IMAGES,
        "peak GB above import": peak,
        "largest relative error": worst,
    }


def laplace_torch(n_images: int) -> dict[str, float]:
    """Time and memory of laplace-torch's linearised predictive with a diagonal posterior."""
    warnings.simplefilter("ignore")
    from laplace import Laplace
    from laplace.curvature import BackPackGGN

    imported = peak_gigabytes()
    model, x = trained(), images(n_images).flatten(1)
    network = nn.Sequential(*model.encoder.children(), *list(model.decoder.children())[1:])
    la = Laplace(network, "regression", subset_of_weights="all", hessian_structure="diag", backend=BackPackGGN)
    # the fit is not what is measured, and its cost does not enter the prediction's
    la.fit(DataLoader(TensorDataset(x[:1], x[:1]), batch_size=1))
    start = time.perf_counter()
    variance = la(x, pred_type="glm", diagonal_output=True)[1]
    seconds, peak = time.perf_counter() - start, peak_gigabytes() - imported
    return {
        "images": len(variance),
        "seconds": seconds,
        "ms an image": 1000 * seconds / n_images,
        "peak GB above import": peak,
    }


def main() -> None:
    """Run both in processes of their own and write records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=3, help="runs of ours")
    parser.add_argument("--peer-images", type=int, default=4, help="images for laplace-torch; 0 leaves it out")
    parser.add_argument("--only", choices=["ours", "laplace-torch"], help="internal: measure in this process")
    given = parser.parse_args()
    if given.only:
        print(json.dumps(ours() if given.only == "ours" else laplace_torch(given.peer_images)))
        return
    records = report.Records()
    runs = [("bayesae", "ours", seed) for seed in range(given.repeats)]
    runs += [("laplace-torch", "laplace-torch", 0)] if given.peer_images else []
    for method, only, seed in runs:
        command = [sys.executable, "-W", "ignore", __file__, "--only", only, "--peer-images", str(given.peer_images)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{method} failed:\n{done.stderr}")
        for metric, value in json.loads(done.stdout.splitlines()[-1]).items():
            records.add(data="mnist", setting="784-256-64-2", method=method, metric=metric, seed=seed, value=value)
    if given.peer_images:
        per_image = [records.mean(method=name, metric="ms an image") for name in ("laplace-torch", "bayesae")]
        print(f"laplace-torch / bayesae, time an image: {per_image[0] / per_image[1]:.0f}x")
    print(report.table(records))
    if given.json:
        records.save(given.json)


if __name__ == "__main__":
    main()
