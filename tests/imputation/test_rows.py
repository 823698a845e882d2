"""What can say which entries are missing: every kind of data, with NaN or a mask of its own."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import bayesae as bae
from bayesae.imputation import CodeLaplace
from tests.imputation.worlds import mask_of, predictive_of, world


class Table(Dataset):
    """Items that are arrays, with labels."""

    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i].numpy(), i


class Stream(IterableDataset):
    def __init__(self, x):
        self.x = x

    def __iter__(self):
        return iter(self.x)


def holed(n=8):
    return torch.where(mask_of(n), world().x[:n], torch.nan)


def imputed(x, mask=None, **kwargs):
    predictive = predictive_of(world().model("location"), None)
    return bae.impute(predictive, x, mask, **({"method": CodeLaplace(1), "n_draws": 4, "seed": 0} | kwargs))


def as_batches(items):
    """Some batches of a loader have a mask of their own, others NaN."""
    x = torch.stack([item[0] for item in items])
    if bool(x[:, 0].eq(holed()[0, 0]).any()):
        return bae.Batch(torch.nan_to_num(x), ~x.isnan())
    return bae.Batch(x)


SOURCES = {
    "array": lambda x: x.numpy(),
    "lists": lambda x: x.tolist(),
    "batch": bae.Batch,
    "data set": TensorDataset,
    "data set of arrays": Table,
    "loader": lambda x: DataLoader(TensorDataset(x), batch_size=3),
    "loader of arrays": lambda x: DataLoader(Table(x), batch_size=3),
    "loader of single rows": lambda x: DataLoader(TensorDataset(x), batch_sampler=None, batch_size=1),
    "loader of batches": lambda x: DataLoader(TensorDataset(x), batch_size=3, collate_fn=as_batches),
    "stream": Stream,
    "loader of a stream": lambda x: DataLoader(Stream(x), batch_size=3),
}


@pytest.mark.parametrize("name", SOURCES)
def test_nan_says_what_is_missing_wherever_rows_come_from(name):
    x = holed()
    state, expected = torch.get_rng_state(), imputed(x)
    found = imputed(SOURCES[name](x))
    assert torch.equal(found.mask, mask_of(8)) and torch.equal(found.draws, expected.draws)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", SOURCES)
def test_a_mask_takes_the_place_of_nan(name):
    mask = mask_of(8)
    mask[:, 0] = False
    found = imputed(SOURCES[name](holed()), mask)
    assert torch.equal(found.mask, mask) and torch.equal(found.draws, imputed(world().x[:8], mask).draws)


def test_workers_have_the_mask_too_and_the_loader_is_left_alone():
    loader = DataLoader(TensorDataset(holed()), batch_size=3, num_workers=1, persistent_workers=True)
    collate = loader.collate_fn
    before = next(iter(loader))[0]
    found = imputed(loader)
    assert torch.equal(found.draws, imputed(holed()).draws) and loader.collate_fn is collate
    assert torch.equal(before.isnan(), next(iter(loader))[0].isnan())


def test_what_is_no_missing_entry_is_still_refused():
    with pytest.raises(bae.errors.DataError, match="a missing entry; got rows without any"):
        imputed(TensorDataset(world().x))
    with pytest.raises(bae.errors.DataError, match="rows in their own order"):
        imputed(DataLoader(TensorDataset(holed()), shuffle=True))
    infinite = holed()
    infinite[2, 0] = torch.inf
    for source in (TensorDataset, DataLoader):
        with pytest.raises(bae.errors.NonFiniteError, match="1 NaN or infinite values in 'x'"):
            imputed(source(infinite) if source is TensorDataset else source(TensorDataset(infinite), batch_size=8))
    with pytest.raises(bae.errors.NonFiniteError, match="finite data"):  # its own mask says that NaN was observed
        imputed(bae.Batch(holed(), torch.ones(8, 5).bool()))
    with pytest.raises(bae.errors.DataError, match=r"items x or \(x, ...\) of a data set; got a Batch"):

        class Items(Table):
            def __getitem__(self, i):
                return bae.Batch(self.x[i])

        imputed(Items(holed()))
