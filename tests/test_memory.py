"""The claim that makes the library possible, as a bound (the figures are in ``benchmarks/``)."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import resource, torch, bayesae as bae
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
torch.manual_seed(0)
model = bae.Autoencoder(bae.nets.mlp(784, [256, 64], 2), bae.nets.mlp(2, [64, 256], 784), bae.likelihoods.Gaussian(0.2))
model.eval()
x = torch.rand(64, 1, 28, 28)
weights = bae.fit_weights(bae.weights.Laplace(), model, x)
moments = bae.Predictive(model, weights).moments(x)
assert moments.is_exact and moments.weights.shape == x.shape
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) / 2**20)
"""


@pytest.mark.slow
def test_linearised_variance_of_64_images_stays_under_a_gigabyte():
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", SCRIPT], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 1.0
