"""Scores of the code: closed forms, invariance, a fitted density against the true one."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

import bayesae as bae
from bayesae import ood

F64 = {"dtype": torch.float64}


def draws(latents):
    values = torch.zeros(latents.shape[:3], **F64)
    return bae.Draws(latents, values, values, None, bae.likelihoods.Gaussian(1.0))


def test_covariance_against_numpy():
    import numpy as np

    torch.manual_seed(0)
    latents = torch.randn(3, 4, 5, 2, **F64)
    found = ood.code_covariance(draws(latents))
    for b in range(5):
        assert_close(found[b].numpy(), np.cov(latents[:, :, b].reshape(12, 2).numpy().T, bias=True))
    assert_close(ood.code_variance(draws(latents)), found.diagonal(dim1=1, dim2=2).sum(1))


def test_volume_is_the_entropy_of_a_normal_and_ranks_alike_under_linear_maps():
    torch.manual_seed(1)
    latents, matrix = torch.randn(3, 4, 5, 2, **F64), torch.randn(2, 2, **F64)
    covariance = ood.code_covariance(draws(latents))
    entropy = torch.distributions.MultivariateNormal(torch.zeros(5, 2, **F64), covariance).entropy()
    volume = ood.code_volume(draws(latents))
    assert_close(volume, entropy)
    moved = ood.code_volume(draws(latents @ matrix))
    assert_close(moved - volume, torch.linalg.slogdet(matrix).logabsdet.expand(5))


def test_volume_does_not_depend_on_the_units_of_a_dimension():
    latents, units = torch.randn(1, 9, 3, 2, **F64), torch.tensor([1.0, 1e-12], **F64)
    shift = ood.code_volume(draws(latents * units)) - ood.code_volume(draws(latents))
    assert_close(shift, torch.full((3,), math.log(1e-12), **F64))


def test_codes_that_nearly_hang_together_are_not_judged_by_rounding():
    """A covariance in float32 would lose what z2 has beyond 3 z1; what float32 codes lose themselves is no volume."""
    first, own = torch.randn(2, 1, 8, 3, 1)
    latents = torch.cat([first, 3 * first + 0.7 + 1e-4 * own], -1)
    assert_close(ood.code_volume(draws(latents)).double(), ood.code_volume(draws(latents.double())), rtol=1e-5, atol=0)
    assert ood.code_covariance(draws(latents)).dtype == torch.float32
    with pytest.raises(bae.errors.NonFiniteError, match="3 rows whose do not"):
        ood.code_volume(draws(torch.cat([first, 3 * first + 0.7], -1)))


def test_draws_that_are_too_few():
    with pytest.raises(bae.errors.UnsupportedError, match="two draws of the code"):
        ood.code_variance(draws(torch.zeros(1, 1, 2, 2, **F64)))
    with pytest.raises(bae.errors.UnsupportedError, match="more than 3 draws"):
        ood.code_volume(draws(torch.randn(1, 3, 2, 3, **F64)))
    with pytest.raises(bae.errors.NonFiniteError, match="span all 3 dimensions"):
        ood.code_volume(draws(torch.zeros(1, 5, 2, 3, **F64)))


class TestMahalanobis:
    def test_is_half_the_whitened_distance(self):
        torch.manual_seed(0)
        codes, new = torch.randn(200, 3, **F64) @ torch.randn(3, 3, **F64), torch.randn(7, 3, **F64)
        precision = torch.linalg.inv(codes.T.cov())
        difference = new - codes.mean(0)
        expected = 0.5 * torch.einsum("bi,ij,bj->b", difference, precision, difference)
        score = ood.Mahalanobis.fit(codes)
        assert_close(score(new), expected)
        assert_close(score(new.expand(2, 4, 7, 3)), expected)

    def test_takes_the_nearest_class(self):
        torch.manual_seed(0)
        labels = torch.arange(200) % 2
        codes = torch.randn(200, 2, **F64) + 20 * labels[:, None]
        score = ood.Mahalanobis.fit(codes, labels)
        centres = torch.stack([codes[labels == c].mean(0) for c in (0, 1)])
        assert_close(score(centres), torch.zeros(2, **F64))
        assert float(score(centres.mean(0, keepdim=True))) > 20

    @pytest.mark.parametrize("offset", [0.0, 300.0])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("n", [20, 5000])
    def test_a_dimension_that_follows_from_others_but_for_rounding(self, n, dtype, offset):
        """In units of the codes' own dtype: what it has beyond the others by more than rounding counts."""
        first, second, own = (torch.randn(n, 1, dtype=dtype) + offset for _ in range(3))
        units = torch.tensor([1.0, 1e3, 1e-3], dtype=dtype)
        follows = torch.cat([first, second, first + second], 1) * units
        for codes in (follows, follows @ torch.randn(3, 3, dtype=dtype)):
            with pytest.raises(bae.errors.DataError, match="span all 3 dimensions; got .* of rank 2 in 1 classes"):
                ood.Mahalanobis.fit(codes)
        own_share = 1e-4 * (1 + offset)
        free = torch.cat([first, second, first + second + own_share * (own - offset)], 1) * units
        distances = ood.Mahalanobis.fit(free)(free).double()
        assert float(distances.mean()) == pytest.approx(1.5 * (n - 1) / n, rel=1e-2)  # the trace of the identity

    def test_a_dimension_that_stands_still_somewhere(self):
        codes = torch.randn(50, 2, **F64)
        codes[:, 1] = 0.1
        with pytest.raises(bae.errors.DataError, match="50 codes of rank 1 in 1 classes"):
            ood.Mahalanobis.fit(codes)

    @pytest.mark.parametrize(
        ("codes", "labels", "match"),
        [
            (torch.ones(5, 2), None, "span all 2 dimensions"),
            (torch.ones(0, 2), None, "at least one row"),
            (torch.ones(5, 0), None, "at least one row"),
            (torch.tensor([[1e200], [0.0], [-1e200]], **F64), None, "finite covariances"),
            (torch.randn(9, 2), torch.zeros(3), "9 labels"),
            (torch.full((5, 2), math.nan), None, "diverge"),
            (torch.randn(1, 1, 5, 2), None, "mean over draws"),
        ],
    )
    def test_bad_input(self, codes, labels, match):
        with pytest.raises(bae.errors.BayesAEError, match=match):
            ood.Mahalanobis.fit(codes, labels)

    def test_codes_of_another_network(self):
        with pytest.raises(bae.errors.ShapeError, match="the same network"):
            ood.Mahalanobis.fit(torch.randn(9, 2))(torch.randn(3, 4))

    def test_codes_that_cannot_be_scored(self):
        flow = ood.CodeFlow.fit(torch.randn(20, 2), hidden=(4,), n_transforms=1, epochs=1)
        for score in (ood.Mahalanobis.fit(torch.randn(20, 2)), flow):
            with pytest.raises(bae.errors.DataError, match="at least one code; got none"):
                score(torch.zeros(1, 3, 0, 2))
            with pytest.raises(bae.errors.NonFiniteError, match="2 NaN or infinite values in 'latents'"):
                score(torch.tensor([[0.0, math.nan], [math.inf, 0.0]]))

    def test_arrays_and_whole_numbers(self):
        codes, labels = torch.randint(0, 50, (40, 2)), torch.arange(40) % 2
        expected = ood.Mahalanobis.fit(codes.double(), labels)(codes.double())
        assert_close(ood.Mahalanobis.fit(codes.numpy(), labels.numpy())(codes.numpy()), expected)


class TestCodeFlow:
    def test_finds_the_density_of_a_normal(self):
        generator = torch.Generator().manual_seed(0)
        codes = 3 + 2 * torch.randn(1000, 1, generator=generator)
        before = torch.get_rng_state()
        score = ood.CodeFlow.fit(codes, hidden=(16,), n_transforms=1, epochs=40, learning_rate=5e-2, seed=0)
        assert torch.equal(before, torch.get_rng_state())
        new = torch.linspace(-1, 7, 9)[:, None]
        expected = -torch.distributions.Normal(3.0, 2.0).log_prob(new)[:, 0]
        assert float((score(new) - expected).abs().max()) < 0.1
        assert_close(score(new.expand(2, 3, 9, 1)), score(new))
        again = ood.CodeFlow.fit(codes, hidden=(16,), n_transforms=1, epochs=40, learning_rate=5e-2, seed=0)
        assert torch.equal(again(new), score(new))

    def test_the_epoch_that_held_out_codes_like_best_is_kept(self):
        """Few codes and a wide network: what comes after the first epochs is learnt by heart, and dropped."""
        codes, options = torch.randn(30, 2), {"hidden": (32,), "n_transforms": 1, "learning_rate": 3e-2, "seed": 0}
        few, many = (ood.CodeFlow.fit(codes, epochs=epochs, **options)(codes) for epochs in (10, 40))
        assert torch.equal(few, many)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("default", [torch.float32, torch.float64], ids=lambda v: f"default-{v}")
    @pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
    def test_fits_in_every_mode_and_default_dtype(self, mode, default, dtype):
        options = {"hidden": (8,), "n_transforms": 1, "epochs": 30, "learning_rate": 5e-2, "seed": 0}
        codes = 3 + 2 * torch.randn(300, 1, dtype=dtype)
        before, usual, mode_before = torch.get_rng_state(), torch.get_default_dtype(), torch.is_grad_enabled()
        torch.set_default_dtype(default)
        try:
            with mode():
                score = ood.CodeFlow.fit(codes.clone(), **options)
                found = score(codes)
            assert torch.is_grad_enabled() == mode_before
            plain = ood.CodeFlow.fit(codes, **options)(codes)
        finally:
            torch.set_default_dtype(usual)
        assert torch.equal(before, torch.get_rng_state())
        assert torch.equal(found, plain) and found.dtype == dtype
        assert {value.dtype for value in score.flow.state_dict().values() if value.is_floating_point()} == {dtype}
        law = torch.distributions.Normal(codes.mean().double(), codes.std().double())
        assert float((found + law.log_prob(codes.double())[:, 0]).abs().mean()) < 0.15

    def test_too_few_codes_or_a_dead_dimension(self):
        with pytest.raises(bae.errors.DataError, match="all dimensions moving"):
            ood.CodeFlow.fit(torch.randn(5, 2))
        with pytest.raises(bae.errors.DataError, match="all dimensions moving"):
            ood.CodeFlow.fit(torch.ones(50, 2))
        for wrong in ({"epochs": 0}, {"batch_size": 0}, {"n_transforms": 0}):
            with pytest.raises(bae.errors.DataError, match=f"{next(iter(wrong))} of at least 1"):
                ood.CodeFlow.fit(torch.randn(50, 2), **wrong)

    @pytest.mark.slow
    def test_finds_a_density_that_is_normal_given_the_dimensions_before(self):
        """Not Normal in two dimensions: z2 has its mean and its deviation from z1."""
        generator = torch.Generator().manual_seed(0)
        first, noise = torch.randn(2, 4000, 1, generator=generator)

        def law(z1):
            return torch.distributions.Normal(z1.sin(), (0.5 * z1).exp())

        codes = torch.cat([first, law(first).loc + law(first).scale * noise], 1)
        score = ood.CodeFlow.fit(codes[:3000], n_transforms=1, epochs=40, seed=0)
        z1, z2 = codes[3000:].unbind(1)
        expected = -torch.distributions.Normal(0.0, 1.0).log_prob(z1) - law(z1).log_prob(z2)
        plain = ood.Mahalanobis.fit(codes[:3000])(codes[3000:])
        found = (score(codes[3000:]) - expected).abs().mean()
        assert float(found) < 0.1
        assert float((plain - plain.mean() - expected + expected.mean()).abs().mean()) > 3 * float(found)
