"""Signal to noise of gradients: a loop over repeats, closed forms of one draw, and the slopes in K."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

import bayesae as bae
from bayesae.codes.base import draws_of, noise
from bayesae.evaluation import GradientSNR, gradient_snr, snr
from bayesae.objectives import PIWAE, dreg, elbo, iwae, sampled_elbo
from tests.conftest import small_model

PATH = bae.codes.Amortised(gradient="path")
K, R, B, Z = 4, 11, 3, 2


def variational_model():
    torch.manual_seed(0)
    encoder, decoder = bae.nets.mlp(7, [5], (Z, 2)), bae.nets.mlp(Z, [6], 7)
    return bae.Autoencoder(encoder, decoder, bae.likelihoods.Gaussian(0.3)).to(torch.float64).eval()


@pytest.fixture
def rows():
    return torch.rand(B, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Moved:
    """A code posterior with a network of its own, and a penalty."""

    shift: nn.Module

    def __call__(self, model, batch, *, n_latent_draws=1):
        law = bae.codes.amortised.law(model, batch)
        base = law.push(noise(model, batch, n_latent_draws, Z, law.loc))
        latents = base + self.shift(batch.x)  # a shift that is given x has no volume
        draws = draws_of(model, batch, latents, law.log_prob(base))
        return replace(draws, penalty=0.1 * (law.loc**2).sum(-1))


def loop(model, rows, codes, blocks, objective):
    """Mean and variance over repeats of gradients that the module itself collects, one repeat at a time."""
    batch = bae.Batch(rows, index=torch.arange(len(rows)))
    found = []
    eps = torch.cat([torch.randn(K, n, B, Z, dtype=torch.float64) for n in blocks], 1)
    for one in eps.unbind(1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "randn", lambda *shape, one=one, **kwargs: one[:, None])
            draws = codes(model.train().live(), batch, n_latent_draws=K)
        values = objective(draws)
        both = {"decoder": values, "encoder": values} if isinstance(values, torch.Tensor) else values
        penalty = 0.0 if draws.penalty is None else draws.penalty
        parts = {"decoder": [*model.decoder.named_parameters(prefix="decoder")]}
        own = bae.codes.modules_of(codes).named_parameters(prefix="codes")
        parts["encoder"] = [*model.encoder.named_parameters(prefix="encoder"), *own]
        gradients = {}
        for group, named in parts.items():
            leaves = [leaf for _, leaf in named]
            values = torch.autograd.grad((both[group] - penalty).mean(), leaves, retain_graph=True, allow_unused=True)
            gradients |= dict(zip([name for name, _ in named], values, strict=True))
        found.append(gradients)
    model.eval()
    stacked = {name: torch.stack([gradients[name] for gradients in found]) for name in found[0]}
    return {n: v.mean(0) for n, v in stacked.items()}, {n: v.var(0) for n, v in stacked.items()}


@pytest.mark.parametrize("objective", [elbo, iwae, PIWAE(2)])
@pytest.mark.parametrize("blocks", [(R,), (4, 4, 3)])
def test_moments_are_those_of_a_loop(rows, objective, blocks, monkeypatch):
    model = variational_model()
    monkeypatch.setattr(snr, "_ROWS", K * B * blocks[0])
    result = gradient_snr(model, rows, objective, n_latent_draws=K, n_repeats=R, seed=5)
    with bae.random.scope(5):
        mean, var = loop(model, rows, bae.codes.amortised, blocks, objective)
    assert result.mean.keys() == mean.keys() == {name for name, _ in model.network.named_parameters()}
    for name in mean:
        torch.testing.assert_close(result.mean[name], mean[name], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(result.var[name], var[name], rtol=1e-9, atol=1e-10)


def test_networks_of_the_code_posterior_and_penalties_count(rows):
    model = variational_model()
    codes = Moved(nn.Linear(7, Z).to(torch.float64))
    result = gradient_snr(model, rows, PIWAE(2), codes=codes, n_latent_draws=K, n_repeats=R, seed=5)
    with bae.random.scope(5):
        mean, var = loop(model, rows, codes, (1,) * R, PIWAE(2))
    assert result.mean.keys() == mean.keys() and {"codes.0.weight", "codes.0.bias"} < mean.keys()
    for name in mean:
        torch.testing.assert_close(result.mean[name], mean[name], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(result.var[name], var[name], rtol=1e-9, atol=1e-10)
    assert result.pooled().keys() == {"encoder", "decoder", "codes"}


class TestTheCaller:
    def test_model_and_generators_stay(self, rows):
        model = variational_model()
        model.decoder[1].bias.requires_grad_(False)
        before = [leaf.detach().clone() for leaf in model.parameters()]
        state = torch.get_rng_state()
        with torch.no_grad():
            results = [gradient_snr(model, rows, iwae, n_repeats=5, seed=seed) for seed in (0, 0, 1)]
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))
        assert all(leaf.grad is None for leaf in model.parameters()) and not model.training
        first, again, other = ({n: v for n, v in result.mean.items()} for result in results)
        assert "decoder.1.bias" not in first
        assert all(torch.equal(first[n], again[n]) for n in first)
        assert not torch.equal(first["encoder.1.bias"], other["encoder.1.bias"])

    def test_errors(self, rows):
        model = variational_model()
        with pytest.raises(bae.errors.UnsupportedError, match="at least two repeats"):
            gradient_snr(model, rows, iwae, n_repeats=1)
        with pytest.raises(bae.errors.DataError, match="n_latent_draws of at least 1"):
            gradient_snr(model, rows, iwae, n_latent_draws=0)
        with pytest.raises(bae.errors.UnsupportedError, match="has no density"):
            gradient_snr(small_model(), rows, iwae, codes=bae.codes.encode)
        with pytest.raises(bae.errors.NonFiniteError, match="finite gradients"):
            gradient_snr(model, rows, lambda draws: draws.log_ratio.mean(0) / 0, n_repeats=2)
        model.requires_grad_(False)
        with pytest.raises(bae.errors.ParameterError, match="all of them frozen"):
            gradient_snr(model, rows, iwae)


class TestRatios:
    def test_by_hand(self):
        mean = {"encoder.a": torch.tensor([3.0, 0.1, 0.0, 2.0]), "decoder.a": torch.tensor([5.0])}
        var = {"encoder.a": torch.tensor([4.0, 1.0, 0.0, 0.0]), "decoder.a": torch.tensor([1.0])}
        result = GradientSNR(mean, var, 10)
        expected = torch.tensor([((9 - 0.4) / 4) ** 0.5, 0.0, 0.0, math.inf])
        torch.testing.assert_close(result.elementwise()["encoder.a"], expected)
        pooled = result.pooled()
        assert float(pooled["encoder"]) == pytest.approx(((9 - 0.4 + 0.01 - 0.1 + 4) / 5) ** 0.5)
        assert float(pooled["decoder"]) == pytest.approx((25 - 0.1) ** 0.5)

    def test_pooled_noise_does_not_pass_for_signal(self):
        """Elementwise ratios of pure noise stay at sqrt(1 / R); pooling before the root averages it out."""
        gradients = torch.randn(50, 100_000, dtype=torch.float64)
        result = GradientSNR({"encoder.a": gradients.mean(0)}, {"encoder.a": gradients.var(0)}, 50)
        assert float(result.pooled()["encoder"]) < 0.02
        assert float(result.elementwise()["encoder.a"].mean()) > 0.04


def gaussian_world(delta, size):
    """x = z + noise, x = 1: the posterior is N(x / 2, 1 / 2) and q is N(x / 2 + delta, 2 / 3)."""
    encoder = nn.Sequential(nn.Linear(size, 2 * size), nn.Unflatten(1, (size, 2)))
    decoder = nn.Sequential(nn.Linear(size, size))
    model = bae.Autoencoder(encoder, decoder, bae.likelihoods.Gaussian(1.0)).to(torch.float64).eval()
    with torch.no_grad():
        encoder[0].weight.zero_()
        encoder[0].weight[0::2] = torch.eye(size) / 2
        encoder[0].bias[0::2], encoder[0].bias[1::2] = delta, 0.5 * math.log(2 / 3)
        decoder[0].weight.copy_(torch.eye(size))
        decoder[0].bias.zero_()
    return model, torch.ones(1, size, dtype=torch.float64)


def ratios(delta, size, n, n_repeats):
    """Of the decoder's bias (theta) and of q's location (phi), as roots of means of squares over its elements."""
    model, x = gaussian_world(delta, size)

    def run(objective, codes, share):
        options = {"codes": codes, "n_latent_draws": n, "n_repeats": n_repeats // share, "seed": n}
        result = gradient_snr(model, x, objective, **options)
        parts = {"phi": ("encoder.0.bias", slice(0, None, 2)), "theta": ("decoder.0.bias", slice(None))}
        moments = [{p: of[name][cut] for p, (name, cut) in parts.items()} for of in (result.mean, result.var)]
        return {p: float(v) for p, v in GradientSNR(*moments, result.n_repeats).pooled().items()}

    # only phi's ratio is small, and needs many repeats
    others = {name: run(objective, PATH, 10)["phi"] for name, objective in (("STL", iwae), ("DReG", dreg))}
    return run(iwae, bae.codes.amortised, 1) | others


def slopes(found):
    log_n = torch.tensor(list(found), dtype=torch.float64).log()
    centred = log_n - log_n.mean()
    names = next(iter(found.values()))
    values = {name: torch.tensor([found[n][name] for n in found], dtype=torch.float64).log() for name in names}
    return {name: float((centred * value).sum() / (centred**2).sum()) for name, value in values.items()}


EXPECTED = {"theta": 0.5, "phi": -0.5, "STL": 0.5, "DReG": 0.5}


class TestSlopes:
    """Rainforth et al. (2018): theta as K^(1/2), phi as K^(-1/2); doubly reparameterised gradients as K^(1/2)."""

    def test_one_draw_has_closed_forms(self):
        """Derivatives of log w are x - z, -2 delta - 2 s eps and -2 delta - (2 s - 1 / s) eps, s^2 = 2 / 3."""
        s, n_repeats = math.sqrt(2 / 3), 20_000
        found = ratios(-0.3, 2, 1, n_repeats)
        expected = {"theta": 0.8 / s, "phi": 0.6 / (2 * s), "STL": 0.6 / (2 * s - 1 / s), "DReG": 0.6 / (2 * s - 1 / s)}
        for name, value in expected.items():
            n = n_repeats if name in ("theta", "phi") else n_repeats // 10
            error = math.sqrt((1 + value**2 / 2) / (2 * n))  # of mean over sd, two elements
            assert abs(found[name] - value) < 4 * error, name
        assert [round(expected[name], 3) for name in ("theta", "phi", "DReG")] == [0.98, 0.367, 1.47]

    def test_slopes_of_few_draws(self):
        found = {n: ratios(-0.3, 2, n, 10_000) for n in (4, 16)}
        for name, slope in slopes(found).items():
            assert abs(slope - EXPECTED[name]) < 0.15, name

    @pytest.mark.slow
    @pytest.mark.parametrize(("delta", "size"), [(-0.1, 2), (-0.3, 2), (-0.3, 5)])
    def test_slopes(self, delta, size):
        found = {n: ratios(delta, size, n, 100_000) for n in (8, 16, 32, 64, 128)}
        for name, slope in slopes(found).items():
            assert abs(slope - EXPECTED[name]) < 0.1, name
        if (delta, size) == (-0.3, 2):  # published values at 128 draws
            assert found[128]["phi"] == pytest.approx(0.0285, rel=0.2)
            assert found[128]["DReG"] == pytest.approx(10.15, rel=0.02)


def test_sampled_elbo_of_path_draws_sticks_the_landing():
    """At q of the posterior's own location and width there is no noise left; of total gradients there is."""
    model, x = gaussian_world(0.0, 2)
    with torch.no_grad():
        model.encoder[0].bias[1::2] = 0.5 * math.log(1 / 2)
    path, total = (
        gradient_snr(model, x, sampled_elbo, codes=codes, n_latent_draws=3, n_repeats=50, seed=0)
        for codes in (PATH, bae.codes.amortised)
    )
    assert float(path.var["encoder.0.bias"].max()) < 1e-25
    assert float(total.var["encoder.0.bias"].min()) > 0.1
