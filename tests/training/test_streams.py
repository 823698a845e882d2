from __future__ import annotations

import itertools

import pytest
import torch
from torch.testing import assert_close
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

import bayesae as bae
from bayesae.data import as_rows, batches, count_rows
from tests.conftest import small_model


class Stream(IterableDataset):
    """Rows in their order, once or without an end; workers share them out. It counts what is asked of it."""

    def __init__(self, rows, is_endless=False):
        self.rows, self.is_endless, self.n_read = rows, is_endless, 0

    def __iter__(self):
        info = get_worker_info()
        start, step = (0, 1) if info is None else (info.id, info.num_workers)
        rows = itertools.cycle(self.rows[start::step]) if self.is_endless else self.rows[start::step]
        for row in rows:
            self.n_read += 1
            yield row


def read(data, model, **kwargs):
    return list(batches(data, model.reference, batch_size=4, is_shuffled=True, **kwargs))


class TestOnePass:
    def test_a_stream_is_its_rows(self, rows, model):
        for data in (Stream(rows), DataLoader(Stream(rows), batch_size=4)):
            got = read(data, model, n_data=9)
            assert [len(batch.x) for batch in got] == [4, 4, 1]
            assert torch.equal(torch.cat([batch.x for batch in got]), rows)

    def test_it_ends_after_n_data_rows(self, rows, model):
        for is_endless, n_data in ((True, 14), (False, 6)):
            got = torch.cat([batch.x for batch in read(Stream(rows, is_endless), model, n_data=n_data)])
            assert torch.equal(got, torch.cat([rows, rows])[:n_data])

    def test_no_row_beyond_the_last_batch_is_asked_for(self, rows, model):
        stream = Stream(rows, is_endless=True)
        read(stream, model, n_data=8)
        assert stream.n_read == 8

    def test_a_stream_that_ends_earlier_ends_the_pass(self, rows, model):
        assert sum(len(batch.x) for batch in read(Stream(rows), model, n_data=100)) == 9

    def test_every_pass_begins_at_the_start(self, rows, model):
        stream = Stream(rows, is_endless=True)
        first, second = (torch.cat([batch.x for batch in read(stream, model, n_data=6)]) for _ in range(2))
        assert torch.equal(first, second)

    def test_a_loader_of_known_length_is_not_cut(self, rows, model):
        """n_data weighs the prior only, where the loader says what a pass is."""
        assert sum(len(batch.x) for batch in read(DataLoader(rows, batch_size=4), model, n_data=3)) == 9

    def test_masks_and_targets_are_cut_too(self, rows, model):
        class Batches(IterableDataset):
            def __iter__(self):
                while True:
                    yield bae.Batch(rows, rows > 0.5, target=rows)

        (got,) = read(DataLoader(Batches(), batch_size=None), model, n_data=5)
        assert len(got.x) == len(got.mask) == len(got.target) == 5 and got.context is None

    @pytest.mark.slow
    def test_workers(self, rows, model):
        loader = DataLoader(Stream(rows), batch_size=2, num_workers=2)
        seen = torch.cat([batch.x for batch in read(loader, model, n_data=9)])
        assert torch.equal(seen.sort(0).values, rows.sort(0).values)
        history = bae.fit_model(model, DataLoader(Stream(rows, True), batch_size=2, num_workers=2), n_data=9, epochs=2)
        assert len(history.train) == 2


class TestFits:
    def test_a_stream_needs_n_data(self, rows, model):
        with pytest.raises(bae.errors.DataError, match="Give n_data="):
            bae.fit_model(model, Stream(rows))
        with pytest.raises(bae.errors.DataError, match="Give n_data="):
            bae.fit_weights(bae.weights.MAP(), model, Stream(rows))

    def test_training_is_that_on_its_rows_in_order(self, rows):
        """An endless stream of 9 rows, and a loader of the same rows without shuffling."""
        a, b = small_model(), small_model()
        settings = {"epochs": 3, "seed": 0, "schedule": "one_cycle"}
        first = bae.fit_model(a, Stream(rows, is_endless=True), n_data=9, batch_size=4, **settings)
        second = bae.fit_model(b, DataLoader(rows, batch_size=4), **settings)
        assert first.train == second.train
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))

    @pytest.mark.parametrize("structure", ["diagonal", "eigencorrected"])
    def test_laplace_of_an_endless_stream(self, rows, model, structure):
        """Batches of 4 end within 9 rows: the second pass of two begins at the first row again."""
        inference = bae.weights.Laplace(structure, tunes_prior=False)
        got = bae.fit_weights(inference, model, Stream(rows, is_endless=True), n_data=9, batch_size=4)
        expected = bae.fit_weights(inference, model, rows, batch_size=9)
        for name, leaf in expected.variances().items():
            assert_close(got.variances()[name], leaf, rtol=1e-8, atol=1e-12)

    def test_noise_of_an_endless_stream(self, rows):
        a, b = small_model(bae.likelihoods.Gaussian()), small_model(bae.likelihoods.Gaussian())
        scale = bae.estimate_noise(a, Stream(rows, is_endless=True), n_data=9)
        assert scale == pytest.approx(bae.estimate_noise(b, rows), rel=1e-12)

    def test_all_rows_of_a_stream_that_ends(self, rows, model):
        assert torch.equal(as_rows(Stream(rows), model.reference).x, rows)
        weights = bae.fit_weights(bae.weights.MAP(), model, rows)
        assert bae.Predictive(model, weights).moments(Stream(rows)).mean.shape == (9, 7)

    def test_a_stream_with_a_length_is_counted(self, rows, model):
        class Known(Stream):
            def __len__(self):
                return 9

        assert count_rows(Known(rows)) == 9
        assert len(bae.fit_model(model, Known(rows), epochs=2).train) == 2
