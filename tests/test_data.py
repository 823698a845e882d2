"""What people call data: fields of one length, masks that meet what they mask, loaders, narrow networks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

import bayesae as bae
from bayesae import nets
from bayesae.data import as_rows, batches
from bayesae.functional import parameters_of
from tests.conftest import small_model


def predictive(model):
    """Of one particle, the model's own weights."""
    params = {name: leaf[None] for name, leaf in parameters_of(model.network).items()}
    return bae.Predictive(model, bae.families.Particles(params))


def read(data, model):
    return list(batches(data, model.reference, batch_size=4, is_shuffled=False))


def collate(**fields):
    """A collation that turns rows (x, number) into a `Batch`, with fields made of x where they are wanted."""

    def join(rows):
        x = torch.stack([row[0] for row in rows])
        first = int(rows[0][1])
        return bae.Batch(x, **{name: make(x, first) for name, make in fields.items()})

    return join


def loader(rows, **fields):
    return DataLoader(TensorDataset(rows, torch.arange(len(rows))), batch_size=2, collate_fn=collate(**fields))


class TestLoaders:
    @pytest.mark.parametrize("at", [0, 4])
    def test_a_mask_only_where_something_is_missing(self, model, rows, at):
        rows[at, 2] = math.nan
        missing = loader(rows, mask=lambda x, _: ~x.isnan() if bool(x.isnan().any()) else None)
        got, expected = predictive(model)(missing), predictive(model)(rows, ~rows.isnan())
        assert_close(got.log_likelihood, expected.log_likelihood)
        assert_close(as_rows(missing, model.reference).mask, ~rows.isnan())

    @pytest.mark.parametrize("name", ["context", "target"])
    @pytest.mark.parametrize("is_first", [True, False])
    def test_a_context_or_target_with_some_batches(self, model, rows, name, is_first):
        some = loader(rows, **{name: lambda x, first: x if (first == 0) == is_first else None})
        with pytest.raises(bae.errors.DataError, match=f"a {name} with every batch, or with none; got . of 5 with one"):
            as_rows(some, model.reference)

    def test_a_mask_of_all_rows_beside_a_loader(self, model, rows):
        mask = rows > 0.3
        plain = DataLoader(torch.where(mask, rows, math.nan), batch_size=2)  # pyright: ignore[reportArgumentType]
        expected = predictive(model)(rows, mask).log_likelihood
        assert_close(predictive(model)(plain, mask).log_likelihood, expected)
        assert_close(predictive(model)(plain, mask.numpy()).log_likelihood, expected)
        # it takes the place of the loader's own, under which nothing would be observed
        nothing = loader(torch.where(mask, rows, math.nan), mask=lambda x, _: torch.zeros_like(x, dtype=torch.bool))
        assert_close(predictive(model)(nothing, mask).log_likelihood, expected)
        for bad in (mask[:8], torch.cat([mask, mask])):
            with pytest.raises(bae.errors.ShapeError, match=f"a mask of 9 rows; got {len(bad)}"):
                as_rows(plain, model.reference, bad)

    def test_items_that_are_batches_need_a_collation(self, model, rows):
        items = [bae.Batch(row, mask=row > 0.3) for row in rows]

        class Items(torch.utils.data.Dataset):
            def __len__(self):
                return len(items)

            def __getitem__(self, i):
                return items[i]

        for call in (lambda: as_rows(Items(), model.reference), lambda: read(Items(), model)):
            with pytest.raises(bae.errors.DataError, match=r"got a Batch, whose mask.*collate_fn"):
                call()


class TestLengths:
    @pytest.mark.parametrize("name", ["mask", "index", "context", "target"])
    @pytest.mark.parametrize("n", [8, 12])
    def test_every_field_has_a_row_for_every_row(self, model, rows, name, n):
        value = {"mask": torch.ones(n, 7, dtype=torch.bool), "index": torch.arange(n)}.get(name, torch.ones(n, 7))
        batch = bae.Batch(rows, **{name: value})
        for call in (lambda: as_rows(batch, model.reference), lambda: read(batch, model)):
            with pytest.raises(bae.errors.ShapeError, match=f"a {name} of 9 rows; got {n}. One for every row of x"):
                call()


class TestMasksAndTargets:
    def test_a_target_of_another_size_takes_no_mask(self, rows):
        torch.manual_seed(0)
        model = bae.Autoencoder(nets.mlp(7, [4], 2), nets.mlp(2, [4], 3), bae.likelihoods.Gaussian(0.3)).double().eval()
        learned = bae.Autoencoder(model.encoder, model.decoder, bae.likelihoods.Gaussian()).double().eval()
        for n in (1, 9):
            batch = bae.Batch(rows[:n], rows[:n] > 0.5, target=rows[:n, :3])
            for call in (
                lambda batch=batch: predictive(model)(batch),
                lambda batch=batch: predictive(model).moments(batch),
                lambda batch=batch: bae.fit_weights(bae.weights.Laplace(), model, batch, progress=False),
                lambda batch=batch: bae.fit_model(model, batch, epochs=1, progress=False),
                lambda batch=batch: bae.estimate_noise(learned, batch),
            ):
                with pytest.raises(bae.errors.ShapeError, match="a target of 7 numbers a row.*; got 3. Set unobserved"):
                    call()

    def test_the_mask_leaves_out_a_target_of_the_same_size_too(self, model, rows):
        """And without a mask, x's missing entries set to 0, all of the target counts: the two ways of `Batch`."""
        mask, clean = rows > 0.3, rows + 1
        masked = predictive(model)(bae.Batch(rows, mask, target=clean)).log_likelihood
        seen = torch.where(mask, rows, 0)
        density = torch.distributions.Normal(model(seen).detach(), 0.3).log_prob(clean)
        assert_close(masked[0, 0], torch.where(mask, density, 0).sum(1))
        assert_close(predictive(model)(bae.Batch(seen, target=clean)).log_likelihood[0, 0], density.sum(1))


class TestNarrowNetworks:
    @pytest.mark.parametrize(
        "likelihood",
        [bae.likelihoods.Poisson(), bae.likelihoods.Categorical(300)],
        ids=lambda like: type(like).__name__,
    )
    @pytest.mark.parametrize("form", ["tensor", "loader", "target", "masked"])
    def test_counts_and_classes_are_scored_unrounded(self, likelihood, form):
        """257 is no number of bfloat16."""
        torch.manual_seed(0)
        n_out = 3 if likelihood.n_parameters == 1 else (3, likelihood.n_parameters)
        model = bae.Autoencoder(nets.mlp(3, [4], 2), nets.mlp(2, [4], n_out), likelihood).to(torch.bfloat16).eval()
        x = torch.tensor([[257.0, 3.0, 259.0], [0.0, 261.0, 1.0]])
        mask = torch.tensor([[True, False, True], [False, True, True]]) if form == "masked" else None
        data = {"loader": DataLoader(x.double(), batch_size=1), "target": bae.Batch(x, target=x.long())}.get(form, x)
        draws = predictive(model)(data, mask, keep_outputs=True)
        expected = likelihood.log_prob(draws.outputs.float(), x, mask)
        assert_close(draws.log_likelihood, expected)
        assert (
            float((expected - likelihood.log_prob(draws.outputs.float(), x.bfloat16().float(), mask)).abs().min()) > 0
        )
        for batch in read(x.numpy(), model):
            assert batch.x.dtype == torch.bfloat16 and torch.equal(batch.explained, x)

    def test_wide_ones_have_no_second_copy(self, model, rows):
        assert as_rows(rows, model.reference).target is None
        assert as_rows(rows.numpy(), small_model(dtype=torch.float32).reference).target is None


def test_labels_for_the_decoder_of_a_predictive():
    torch.manual_seed(0)
    encoder = nets.Conditional(nets.mlp(6 + 3, [5], 2), 3)
    decoder = nets.Conditional(nets.mlp(2 + 3, [5], 6), 3)
    model = bae.Autoencoder(encoder, decoder, bae.likelihoods.Gaussian(0.3), data_shape=(6,)).eval()
    z, labels = torch.randn(3, 2), torch.tensor([0, 1, 2])
    expected = model.decoder(z, labels[:, None].float()).detach()
    for context in (labels, labels[:, None], np.array([0, 1, 2])):
        assert_close(predictive(model).decoder(context=context)(z)[0], expected)
    for context in (torch.tensor([1]), torch.tensor([[1.0]])):
        assert_close(predictive(model).decoder(context=context)(z)[0], model.decoder(z, torch.ones(3, 1)).detach())
    for context in (labels[:2], torch.zeros(4, 1)):
        with pytest.raises(bae.errors.ShapeError, match=f"contexts of 3 codes; got {len(context)}"):
            predictive(model).decoder(context=context)(z)
