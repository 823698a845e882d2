"""Run every weight method on two gloo ranks and write what rank 0 got; started by `test_distributed.py`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import distributed as dist

import bayesae as bae
from tests.cases import WEIGHT_CASES
from tests.conftest import small_model


def posterior_of(case, rows):
    size = len(rows) if case.needs_all_rows else 4  # the last batch has one row, and so none for the second rank
    return bae.fit_weights(case.quick(), small_model(), rows, batch_size=size, seed=3, progress=False)


def drops_with_drawn_codes():
    torch.manual_seed(0)
    encoder, decoder = bae.nets.mlp(7, [6], (2, 2)), bae.nets.mlp(2, [6], 7)
    model = bae.Autoencoder(encoder, decoder, bae.likelihoods.Gaussian(0.3))
    options = {"codes": bae.codes.amortised, "objective": bae.objectives.elbo, "batch_size": 4}
    method = bae.weights.Dropout(0.3, epochs=3)
    return bae.fit_weights(method, model.double().eval(), all_rows(), seed=3, progress=False, **options)


def numbers(posterior):
    """What two runs are compared by: the mean and the atoms, or the marginal variances.

    Not draws of a Normal: those go by eigenvectors, which rounding turns where eigenvalues are near one another.
    """
    spread = posterior.sample(posterior.n_atoms) if posterior.n_atoms else posterior.variances()
    return {"mean": dict(posterior.mean), "spread": spread}


def all_rows():
    return torch.rand(9, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


if __name__ == "__main__":
    rank, n_ranks, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=n_ranks)
    found = {str(case): numbers(posterior_of(case, all_rows())) for case in WEIGHT_CASES}
    first, again = (
        bae.fit_weights(bae.weights.Laplace(), small_model(), all_rows(), checkpoint=folder / "run.safetensors")
        for _ in range(2)
    )
    found["without a seed"], found["from its checkpoint"] = numbers(first), numbers(again)
    found["drawn codes"] = numbers(drops_with_drawn_codes())
    try:
        bae.fit_weights(bae.weights.MAP(), small_model(seed=rank), all_rows())
    except bae.errors.DataError as error:
        found["other weights"] = str(error)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()
