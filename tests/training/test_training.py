from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, Dataset, SubsetRandomSampler, TensorDataset

import bayesae as bae
from bayesae.data import as_rows, batches, count_rows
from tests.conftest import small_model


class OnlyRows(Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i].numpy(), 0


FORMS = {
    "tensor": lambda rows: rows,
    "float32 tensor": lambda rows: rows.float(),
    "array": lambda rows: rows.numpy(),
    "data set of pairs": OnlyRows,
    "loader of x": lambda rows: DataLoader(rows, batch_size=4),
    "loader of tuples": lambda rows: DataLoader(TensorDataset(rows, rows), batch_size=4),
}


@pytest.mark.parametrize("form", FORMS)
class TestData:
    def test_rows(self, form, rows, model):
        data = FORMS[form](rows)
        assert count_rows(data) == 9
        assert_close(as_rows(data, model.reference).x, rows, rtol=1e-7, atol=1e-7)
        seen = torch.cat([b.x for b in batches(data, model.reference, batch_size=4, is_shuffled=False)])
        assert_close(seen, rows, rtol=1e-7, atol=1e-7)

    def test_whole_path(self, form, rows, model):
        data = FORMS[form](rows)
        bae.fit_model(model, data, epochs=1, batch_size=4)
        weights = bae.fit_weights(bae.weights.Laplace(), model, data, batch_size=4)
        assert bae.Predictive(model, weights).moments(data).mean.shape == (9, 7)


def test_shuffled_batches_carry_row_numbers(rows, model):
    got = list(batches(rows, model.reference, batch_size=4, is_shuffled=True))
    index = torch.cat([batch.index for batch in got])
    assert sorted(index.tolist()) == list(range(9)) and index.tolist() != list(range(9))
    assert torch.equal(torch.cat([batch.x for batch in got]), rows[index])


class TestLoaders:
    def test_n_is_what_the_sampler_gives(self, model, rows):
        """A sampler over 9 of 900 rows: N is 9, and the posterior that of the 9 rows."""
        many = torch.cat([rows, torch.rand(891, 7).double()])
        loader = DataLoader(many, batch_size=4, sampler=SubsetRandomSampler(range(9)))
        got = bae.fit_weights(bae.weights.Laplace(tunes_prior=False), model, loader)
        assert_close(got.var, bae.fit_weights(bae.weights.Laplace(tunes_prior=False), model, rows).var)
        assert count_rows(DataLoader(rows, batch_size=4, drop_last=True)) == 8

    def test_history_is_the_mean_over_rows_that_were_seen(self, rows):
        model = small_model()
        model.requires_grad_(False)
        model.encoder[1].bias.requires_grad_(True)
        loader = DataLoader(rows, batch_size=4, drop_last=True)
        history = bae.fit_model(model, loader, epochs=1, learning_rate=1e-12)
        expected = model.likelihood.log_prob(model(rows[:8]).detach(), rows[:8]).mean()
        assert history.train[0] == pytest.approx(float(expected), rel=1e-6)

    def test_batches_keep_their_masks_and_targets(self, model, rows):
        mask = torch.rand(9, 7) > 0.5
        holed = torch.where(mask, rows, torch.nan)
        loader = DataLoader(range(9), batch_size=3, collate_fn=lambda i: bae.Batch(holed[i], mask[i], target=rows[i]))
        fixed = bae.weights.Laplace(tunes_prior=False)
        got = bae.fit_weights(fixed, model, loader)
        joint = bae.log_joint(model, 9)
        state = fixed.init(bae.functional.parameters_of(model.network), joint)
        state, _ = fixed.update(state, bae.Batch(torch.where(mask, rows, 0), mask, target=rows), joint)
        assert_close(got.var, fixed.posterior(state, joint).var)
        bae.fit_model(small_model(bae.likelihoods.Gaussian()), loader, epochs=1)

    def test_batches_that_somebody_else_cuts_need_n_data(self, model, rows):
        for loader in (DataLoader(rows, batch_sampler=[[3, 1], [0]]), DataLoader([rows], batch_size=None)):
            with pytest.raises(bae.errors.DataError, match="Give n_data="):
                bae.fit_model(model, loader)

    def test_a_stream_that_is_used_up_is_said(self, model, rows):
        class Once(torch.utils.data.IterableDataset):
            left = [rows[0], rows[1]]

            def __iter__(self):
                while self.left:
                    yield self.left.pop()

        with pytest.raises(bae.errors.DataError, match="read once already"):
            bae.fit_model(model, DataLoader(Once(), batch_size=2), n_data=2, epochs=2)

    def test_targets_may_be_missing_where_they_are_masked(self, model, rows):
        mask = torch.rand(9, 7) > 0.5
        holed = torch.where(mask, rows, torch.nan)
        loader = DataLoader(range(9), batch_size=3, collate_fn=lambda i: bae.Batch(holed[i], mask[i], target=holed[i]))
        bae.fit_model(model, loader, epochs=1)
        assert all(bool(p.isfinite().all()) for p in model.parameters())

    def test_noise_of_nothing(self, rows):
        model = small_model(bae.likelihoods.Gaussian())
        none = torch.zeros(9, 7, dtype=torch.bool)
        loader = DataLoader(range(9), batch_size=3, collate_fn=lambda i: bae.Batch(rows[i], none[i]))
        with pytest.raises(bae.errors.DataError, match="observed entry"):
            bae.estimate_noise(model, loader)

    def test_a_stream_needs_its_length_told(self, model, rows):
        class Stream(torch.utils.data.IterableDataset):
            def __iter__(self):
                yield from rows

        loader = DataLoader(Stream(), batch_size=2)
        with pytest.raises(bae.errors.DataError, match="Give n_data="):
            bae.fit_model(model, loader)
        bae.fit_model(model, loader, n_data=9, epochs=1)
        fixed = bae.weights.Laplace(tunes_prior=False)
        assert_close(bae.fit_weights(fixed, model, loader, n_data=9).var, bae.fit_weights(fixed, model, rows).var)


def odd_arrays(rows):
    array = rows.numpy()
    frozen = array.copy()
    frozen.flags.writeable = False
    return {
        "reversed twice": array[::-1].copy()[::-1],
        "big endian": array.astype(">f8"),
        "read only": frozen,
        "fortran": np.asfortranarray(array),
        "list": array.tolist(),
    }


@pytest.mark.parametrize("kind", ["reversed twice", "big endian", "read only", "fortran", "list"])
def test_any_array_of_numbers(kind, rows, model):
    assert_close(as_rows(odd_arrays(rows)[kind], model.reference).x, rows, rtol=0, atol=0)


def test_bytes_are_numbers(model):
    images = np.random.default_rng(0).integers(0, 256, (3, 7), np.uint8)
    assert torch.equal(as_rows(images, model.reference).x, torch.as_tensor(images).double())


class TestFitModel:
    def test_linear_autoencoder_reaches_the_principal_subspace(self):
        """Of centred data the best squared error is the sum of the discarded eigenvalues."""
        rows = torch.randn(200, 5, dtype=torch.float64) * torch.tensor([3.0, 2.0, 0.3, 0.2, 0.1], dtype=torch.float64)
        rows -= rows.mean(0)
        model = bae.Autoencoder(bae.nets.mlp(5, (), 2), bae.nets.mlp(2, (), 5), bae.likelihoods.Gaussian()).double()
        bae.fit_model(
            model, rows, epochs=400, batch_size=200, learning_rate=2e-2, weight_prior=bae.IsotropicNormal(1e-6), seed=0
        )
        best = torch.linalg.eigvalsh(rows.mT @ rows / 200)[:3].sum() / 5
        assert model.likelihood.noise_var == pytest.approx(float(best), rel=1e-3)

    def test_noise_is_the_residual_of_validation_rows(self, rows):
        model = small_model(bae.likelihoods.Gaussian())
        bae.fit_model(model, rows[:6], validation=rows[6:], epochs=2)
        assert model.likelihood.noise_var == pytest.approx(float((model(rows[6:]) - rows[6:]).detach().pow(2).mean()))

    def test_same_seed_same_bits_and_the_generator_stays(self, rows):
        state = torch.get_rng_state()
        models = [small_model() for _ in range(2)]
        state = torch.get_rng_state()
        for model in models:
            bae.fit_model(model, rows, epochs=3, batch_size=2, seed=5)
        assert torch.equal(state, torch.get_rng_state())
        assert torch.equal(models[0].encoder[1].weight, models[1].encoder[1].weight)

    def test_prior_is_in_the_objective(self, rows):
        weak, strong = small_model(), small_model()
        for model, precision in ((weak, 1e-3), (strong, 1e3)):
            bae.fit_model(
                model, rows, epochs=50, learning_rate=1e-2, weight_prior=bae.IsotropicNormal(precision), seed=0
            )
        norms = [sum(float((p.detach() ** 2).sum()) for p in m.parameters()) for m in (weak, strong)]
        assert norms[1] < 0.5 * norms[0]

    def test_early_stop_keeps_the_best_weights(self, rows):
        model = small_model()
        history = bae.fit_model(
            model, rows[:3], validation=rows[3:], epochs=400, patience=5, learning_rate=3e-2, batch_size=3, seed=0
        )
        assert len(history.validation) < 400
        assert history.best_epoch == int(np.argmax(history.validation)) == len(history.validation) - 6
        value = model.likelihood.log_prob(model(rows[3:]).detach(), rows[3:]).mean()
        assert float(value) == pytest.approx(history.validation[history.best_epoch])

    def test_leaves_evaluation_mode_and_flags(self, rows):
        model = bae.Autoencoder(
            nn.Sequential(nn.Linear(7, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)),
            nn.Linear(2, 7),
            bae.likelihoods.Gaussian(),
        )
        model.encoder[0].bias.requires_grad_(False)
        frozen = model.encoder[0].bias.clone()
        bae.fit_model(model, rows.float(), epochs=2)
        assert not model.training and torch.equal(frozen, model.encoder[0].bias)
        assert model.encoder[1].num_batches_tracked == 2

    def test_bernoulli(self):
        model = small_model(bae.likelihoods.Bernoulli())
        rows = (torch.rand(30, 7) > 0.5).double()
        history = bae.fit_model(model, rows, epochs=60, learning_rate=1e-2, seed=0)
        assert history.train[-1] > history.train[0]


class TestErrors:
    @pytest.mark.parametrize(
        "empty",
        [torch.zeros(0, 7), np.zeros((0, 7)), DataLoader(TensorDataset(torch.zeros(0, 7)))],
        ids=["t", "a", "l"],
    )
    def test_no_rows(self, model, empty):
        for fit in (bae.fit_model, lambda m, d: bae.fit_weights(bae.weights.Laplace(), m, d)):
            with pytest.raises(bae.errors.DataError, match="at least one row"):
                fit(model, empty)

    def test_a_loader_that_drops_everything(self, model, rows):
        loader = DataLoader(rows, batch_size=100, drop_last=True)
        with pytest.raises(bae.errors.DataError, match="drop_last"):
            bae.fit_model(model, loader)

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    def test_not_finite(self, model, rows, bad):
        rows[4, 2] = bad
        for fit in (bae.fit_model, lambda m, d: bae.fit_weights(bae.weights.Laplace(), m, d)):
            with pytest.raises(bae.errors.NonFiniteError, match="1 NaN or infinite values in 'x'"):
                fit(model, rows)

    def test_bernoulli_range(self, rows):
        model = small_model(bae.likelihoods.Bernoulli())
        for fit in (bae.fit_model, lambda m, d: bae.fit_weights(bae.weights.Laplace(), m, d)):
            with pytest.raises(bae.errors.DataError, match=r"\[0, 1\]"):
                fit(model, rows * 3)

    def test_a_loss_that_is_not_finite(self, model, rows):
        with pytest.raises(bae.errors.NonFiniteError, match="Lower learning_rate"):
            bae.fit_model(model, rows, epochs=20, learning_rate=1e200)

    def test_after_an_error_the_model_is_in_evaluation_mode(self, model, rows):
        with pytest.raises(bae.errors.NonFiniteError):
            bae.fit_model(model, rows, epochs=20, learning_rate=1e200)
        assert not model.training

    def test_everything_frozen(self, model, rows):
        with pytest.raises(bae.errors.ParameterError, match="all of them frozen"):
            bae.fit_model(model.requires_grad_(False), rows)

    def test_words_and_single_rows(self, model):
        with pytest.raises(bae.errors.DataError, match="array of numbers"):
            bae.fit_model(model, np.array([["a"] * 7], dtype=object))
        with pytest.raises(bae.errors.ShapeError, match="A single row needs a first axis"):
            bae.fit_model(model, torch.zeros(7))

    def test_patience_without_validation(self, model, rows):
        with pytest.raises(bae.errors.UnsupportedError, match="validation data"):
            bae.fit_model(model, rows, patience=3)

    def test_counts(self, model, rows):
        with pytest.raises(bae.errors.DataError, match="epochs of at least 1"):
            bae.fit_model(model, rows, epochs=0)
        with pytest.raises(bae.errors.DataError, match="batch_size of at least 1"):
            bae.fit_weights(bae.weights.MAP(), model, rows, batch_size=0)

    def test_noise_of_a_likelihood_that_has_none(self, model, rows):
        with pytest.raises(bae.errors.UnsupportedError, match="Its scale is given"):
            bae.estimate_noise(model, rows)

    def test_weights_that_are_not_finite(self, model, rows):
        with torch.no_grad():
            model.encoder[1].bias[0] = torch.nan
        with pytest.raises(bae.errors.NonFiniteError, match="encoder.1.bias"):
            bae.fit_weights(bae.weights.MAP(), model, rows)

    def test_train_mode_running_statistics(self, rows):
        model = bae.Autoencoder(
            nn.Sequential(nn.Linear(7, 2), nn.BatchNorm1d(2)), nn.Linear(2, 7), bae.likelihoods.Gaussian(1.0)
        )
        with pytest.raises(bae.errors.UnsupportedError, match="running statistics"):
            bae.log_joint(model, 9)

    def test_two_outputs_too_few(self, rows):
        model = bae.Autoencoder(nn.Linear(7, 2), nn.Linear(2, 5), bae.likelihoods.Gaussian(1.0)).double()
        with pytest.raises(bae.errors.ShapeError, match="outputs for rows of shape"):
            bae.fit_model(model, rows)


def test_a_joint_pickles(model, rows):
    joint = pickle.loads(pickle.dumps(bae.log_joint(model, 9)))
    params = {name: leaf[None] for name, leaf in bae.functional.parameters_of(model.network).items()}
    expected = bae.log_joint(model, 9).estimate(params, bae.Batch(rows))
    assert torch.equal(joint.estimate(params, bae.Batch(rows)), expected)
