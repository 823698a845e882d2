"""Automatic relevance of code dimensions, and models without those that nothing needs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bayesae as bae
from bayesae.testing import LinearGaussian

FULL = bae.codes.Amortised("full")


class TestRelevance:
    def test_it_is_the_fixed_point_of_complete_information(self):
        mode = LinearGaussian.make(n_data=120, n_outputs=5, n_latents=2, noise_var=0.5, seed=3)
        model = mode.model("full")
        found = bae.evaluation.code_relevance(model, mode.x, FULL, n_latent_draws=300, batch_size=50, seed=0)
        mean, cov = mode.posterior_mean(), mode.covariance
        information = (mean**2 + cov.diagonal()).sum(0) / mode.noise_var
        squares = (mode.weight**2).sum(0)
        for j in range(2):
            precision = 1.0
            for _ in range(200):
                precision = 5 * float(information[j] / (information[j] + precision)) / float(squares[j])
            assert float(found.precision[j]) == pytest.approx(precision, rel=1e-3)
        torch.testing.assert_close(found.precision * squares, found.n_effective, rtol=1e-6, atol=0)
        assert bool(found.is_active.all())
        assert set(found.prior.precisions) == {name for name, _ in model.network.named_parameters()}

    @pytest.mark.slow
    def test_training_with_it_finds_the_dimension_and_pruning_keeps_the_outputs(self):
        world = LinearGaussian.make(n_data=200, n_outputs=8, n_latents=2, noise_var=0.3, seed=2)
        torch.manual_seed(0)
        encoder, decoder = bae.nets.mlp(8, [], (5, 2)), bae.nets.mlp(5, [], 8)
        model = bae.Autoencoder(encoder, decoder, bae.likelihoods.Gaussian()).double()
        history = bae.fit_model(
            model,
            world.x,
            epochs=150,
            batch_size=50,
            learning_rate=2e-2,
            schedule="cosine",
            objective=bae.objectives.elbo,
            codes=bae.codes.amortised,
            evidence=bae.evaluation.CodeRelevance(burn_in=20, every=5),
            seed=0,
            progress=False,
        )
        found = bae.evaluation.code_relevance(model, world.x, weight_prior=history.weight_prior, seed=0)
        assert int(found.is_active.sum()) == 2
        pruned = bae.evaluation.prune_codes(model, found.is_active)
        assert pruned.decoder[1].in_features == 2
        with torch.no_grad():
            before, after = model(world.x), pruned(world.x)
        assert float((after - before).abs().max()) < 0.02 * float(before.std())


class TestPruning:
    @pytest.mark.parametrize("family", ["location", "diagonal", "full"])
    def test_outputs_stay_where_the_cut_columns_are_zero(self, family, rows):
        torch.manual_seed(1)
        codes = bae.codes.Amortised("diagonal" if family == "location" else family)
        n_out = 4 if family == "location" else (4, codes.n_parameters(4))
        model = bae.Autoencoder(bae.nets.mlp(7, [6], n_out), bae.nets.mlp(4, [5], 7), bae.likelihoods.Gaussian(0.3))
        model = model.double().eval()
        model.decoder[1].weight.data[:, [0, 2]] = 0
        keep = torch.tensor([False, True, False, True])
        small = bae.evaluation.prune_codes(model, keep, codes)
        torch.testing.assert_close(small(rows), model(rows), rtol=0, atol=1e-12)
        assert small.decoder[1].in_features == 2
        assert small.likelihood is not model.likelihood
        assert small.decoder[1].weight.requires_grad
        rebuilt = [bae.nets.build(net.recipe) for net in (small.encoder, small.decoder)]
        for net, old in zip(rebuilt, (small.encoder, small.decoder), strict=True):
            assert [p.shape for p in net.parameters()] == [p.shape for p in old.parameters()]
        if family != "location":
            batch = bae.Batch(rows, index=torch.arange(len(rows)))
            laws = [codes.law(m.live(), batch) for m in (model, small)]
            own = "log_scale" if family == "diagonal" else "factor"
            kept = getattr(laws[0], own)[..., [1, 3]]
            kept = kept if family == "diagonal" else kept[..., [1, 3], :]
            torch.testing.assert_close(getattr(laws[1], own), kept)
            torch.testing.assert_close(laws[1].loc, laws[0].loc[..., [1, 3]])

    def test_the_global_generator_is_left_alone(self, model):
        before = torch.get_rng_state()
        bae.evaluation.prune_codes(model, [True, False])
        assert torch.equal(before, torch.get_rng_state())


class TestErrors:
    def test_pruning(self, model):
        prune = bae.evaluation.prune_codes
        with pytest.raises(bae.errors.ShapeError, match=r"keep of shape \(2,\)"):
            prune(model, [True, False, True])
        with pytest.raises(bae.errors.ShapeError, match="dtype bool"):
            prune(model, [0, 1])
        with pytest.raises(bae.errors.DataError, match="that stays"):
            prune(model, [False, False])
        odd = bae.Autoencoder(model.encoder, nn.Sequential(nn.Tanh(), nn.Linear(2, 7)).double(), model.likelihood)
        with pytest.raises(bae.errors.UnsupportedError, match="begins with"):
            prune(odd, [True, False])
        odd = bae.Autoencoder(nn.Sequential(nn.Linear(7, 2), nn.Tanh()).double(), model.decoder, model.likelihood)
        with pytest.raises(bae.errors.UnsupportedError, match="ends in"):
            prune(odd, [True, False])
        vae = LinearGaussian.make().model("full")
        with pytest.raises(bae.errors.UnsupportedError, match="4 numbers a dimension"):
            prune(vae, [True, False, True])

    def test_relevance_counts(self):
        with pytest.raises(bae.errors.DataError, match="burn_in"):
            bae.evaluation.CodeRelevance(burn_in=-1)

    def test_a_prior_that_is_no_normal(self):
        world = LinearGaussian.make()
        with pytest.raises(bae.errors.UnsupportedError, match="a Normal prior"):
            bae.evaluation.code_relevance(world.model(), world.x, FULL, weight_prior=object())

    def test_a_decoder_that_takes_a_context(self):
        encoder = bae.nets.Conditional(bae.nets.mlp(4 + 1, [], (2, 2)))
        decoder = bae.nets.Conditional(bae.nets.mlp(2 + 1, [], 4))
        model = bae.Autoencoder(encoder, decoder, bae.likelihoods.Gaussian(0.3), data_shape=(4,)).eval()
        with pytest.raises(bae.errors.UnsupportedError, match="codes alone"):
            bae.evaluation.code_relevance(model, bae.Batch(torch.rand(3, 4), context=torch.rand(3, 1)))
