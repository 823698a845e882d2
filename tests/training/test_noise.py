from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader

import bayesae as bae
from tests.conftest import small_model

likelihoods = bae.likelihoods


class TestGaussian:
    def test_mean_squared_residual(self, rows):
        model = small_model(likelihoods.Gaussian())
        scale = bae.estimate_noise(model, rows)
        assert scale == pytest.approx(float((model(rows) - rows).detach().pow(2).mean().sqrt()), rel=1e-12)
        assert scale == math.sqrt(model.likelihood.noise_var)

    def test_of_every_number(self, rows):
        model = small_model(likelihoods.Gaussian(per_output=True))
        mask = torch.rand(9, 7, generator=torch.Generator().manual_seed(0)) > 0.3
        scale = bae.estimate_noise(model, bae.Batch(rows, mask))
        hidden = torch.where(mask, rows, 0)
        squares = (model(hidden) - rows).detach().pow(2)
        for d in range(7):
            expected = squares[mask[:, d], d].mean().sqrt()
            assert_close(scale[d], expected, rtol=1e-10, atol=0)

    def test_batches_add_up(self, rows):
        whole, parts = small_model(likelihoods.Gaussian()), small_model(likelihoods.Gaussian())
        a, b = bae.estimate_noise(whole, rows), bae.estimate_noise(parts, DataLoader(rows, batch_size=2))
        assert a == pytest.approx(b, rel=1e-12)


class TestOthers:
    @pytest.mark.parametrize("per_output", [False, True])
    def test_student_t_is_at_its_maximum(self, rows, per_output):
        """The slow twin: the likelihood of a grid of scales around what was found."""
        model = small_model(likelihoods.StudentT(4.0, per_output=per_output))
        scale = torch.as_tensor(bae.estimate_noise(model, rows), dtype=torch.float64)
        outputs = model(rows).detach()

        def log_prob(scale):
            return torch.distributions.StudentT(4.0, outputs, scale).log_prob(rows).sum()

        for factor in (0.99, 1.01):
            assert log_prob(scale * factor) < log_prob(scale)
        step = 1e-5
        slope = (log_prob(scale * (1 + step)) - log_prob(scale * (1 - step))) / (2 * step)
        assert abs(float(slope)) < 1e-4

    def test_negative_binomial_has_no_scale(self, rows):
        counts = torch.poisson(rows * 8, generator=torch.Generator().manual_seed(0))
        model = small_model(likelihoods.NegativeBinomial())
        assert bae.estimate_noise(model, counts) is None and model.likelihood.is_estimated

    def test_fit_model_takes_one_pass_an_epoch(self, rows, monkeypatch):
        calls, update = [], likelihoods.StudentT.update_noise
        monkeypatch.setattr(likelihoods.StudentT, "update_noise", lambda *args: calls.append(0) or update(*args))
        model = small_model(likelihoods.StudentT())
        bae.fit_model(model, rows, epochs=3)
        assert len(calls) == 4, "one before the first epoch"
        bae.estimate_noise(model, rows)
        assert 5 < len(calls) < 104

    @pytest.mark.parametrize(
        "make",
        [
            lambda: likelihoods.StudentT(per_output=True),
            likelihoods.NegativeBinomial,
            lambda: likelihoods.Mixed(
                [likelihoods.Gaussian()] * 2 + [likelihoods.Bernoulli()] * 4 + [likelihoods.StudentT()]
            ),
        ],
        ids=["StudentT", "NegativeBinomial", "Mixed"],
    )
    def test_fit_model_improves_them(self, make):
        rows = (torch.rand(40, 7, generator=torch.Generator().manual_seed(2)) > 0.6).double()
        model = small_model(make())
        history = bae.fit_model(model, rows, epochs=30, learning_rate=1e-2, seed=0)
        assert model.likelihood.is_estimated and history.train[-1] > history.train[0]

    def test_dropout_is_off_and_training_mode_stays(self, rows):
        model = small_model(likelihoods.Gaussian())
        model.encoder.insert(1, nn.Dropout(0.9))
        model.train()
        first, second = bae.estimate_noise(model, rows), bae.estimate_noise(model, rows)
        assert first == second and all(module.training for module in model.encoder.modules())

    def test_contexts_reach_the_networks(self, rows):
        class Shift(nn.Module):
            takes_context = True

            def __init__(self):
                super().__init__()
                self.inner = nn.Linear(2, 7).double()

            def forward(self, z, context):
                return self.inner(z) + context

        model = bae.Autoencoder(nn.Linear(7, 2).double(), Shift(), likelihoods.Gaussian(), data_shape=(7,)).eval()
        context = torch.arange(9.0).double()[:, None]
        scale = bae.estimate_noise(model, bae.Batch(rows, context=context))
        residual = model(rows, context).detach() - rows
        assert scale == pytest.approx(float(residual.pow(2).mean().sqrt()), rel=1e-12)
        bae.fit_model(model, bae.Batch(rows, context=context), epochs=2, n_accumulate=2, batch_size=4)

    def test_those_that_do_not_learn(self, rows):
        for likelihood in (likelihoods.Bernoulli(), likelihoods.StudentT(scale=1.0)):
            with pytest.raises(bae.errors.UnsupportedError, match="Its scale is given"):
                bae.estimate_noise(small_model(likelihood), rows)
