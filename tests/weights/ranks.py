"""Run every weight method on two gloo ranks and write what rank 0 got; started by `test_distributed.py`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import distributed as dist

import bayesae as bae
from tests.cases import WEIGHT_CASES
from tests.conftest import small_model


def posterior_of(method, rows):
    return bae.fit_weights(method, small_model(), rows, batch_size=4, seed=3, progress=False)


def numbers(posterior):
    """What two runs are compared by: the mean, and draws (whose seed is the caller's)."""
    with bae.random.scope(5):
        draws = posterior.sample(posterior.n_atoms or 3)
    return {"mean": dict(posterior.mean), "draws": draws}


def all_rows():
    return torch.rand(9, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


if __name__ == "__main__":
    rank, n_ranks, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=n_ranks)
    found = {str(case): numbers(posterior_of(case.quick(), all_rows())) for case in WEIGHT_CASES}
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()
