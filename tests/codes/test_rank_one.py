"""The recognition model of a deep latent Gaussian model: a precision that is diagonal plus rank one in each layer."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch.testing import assert_close

import bayesae as bae
from bayesae.codes import Amortised, RankOneLaw
from bayesae.testing import LinearGaussian

S, B, Z, K = 2, 3, 5, 4
SIZES = [None, (5,), (2, 3), (1, 3, 1), (1,) * 5]


def normal(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def law_of(sizes):
    return RankOneLaw(normal(S, B, Z), normal(S, B, Z, seed=1), 2 * normal(S, B, Z, seed=2), sizes)


def dense(law, s, b):
    """Twin: the precision matrix of one row, entry by entry."""
    block = [g for g, size in enumerate(law.sizes or (Z,)) for _ in range(size)]
    precision = torch.zeros(Z, Z, dtype=torch.float64)
    for i in range(Z):
        for j in range(Z):
            if block[i] == block[j]:
                precision[i, j] = law.direction[s, b, i] * law.direction[s, b, j]
        precision[i, i] += law.log_precision[s, b, i].exp()
    return precision, torch.tensor(block)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
class TestAgainstDenseMatrices:
    def test_covariance_and_density(self, sizes):
        law, latents = law_of(sizes), normal(K, S, B, Z, seed=3)
        got = law.log_prob(latents)
        for s in range(S):
            for b in range(B):
                precision, _ = dense(law, s, b)
                assert_close(law.covariance()[s, b], torch.linalg.inv(precision), rtol=0, atol=1e-12)
                twin = torch.distributions.MultivariateNormal(law.loc[s, b], precision_matrix=precision)
                assert_close(got[:, s, b], twin.log_prob(latents[:, s, b]), rtol=0, atol=1e-12)

    def test_draws_are_a_linear_map_with_that_covariance(self, sizes):
        law, noise = law_of(sizes), normal(K, 1, B, Z, seed=4)
        root = torch.stack([law.push(e.expand(1, 1, Z)) - law.loc for e in torch.eye(Z, dtype=torch.float64)], -1)
        assert_close(law.push(noise), law.loc + torch.einsum("sbij,kbj->ksbi", root, noise[:, 0]), rtol=0, atol=1e-12)
        for s in range(S):
            for b in range(B):
                covariance = torch.linalg.inv(dense(law, s, b)[0])
                assert_close(root[s, b] @ root[s, b].T, covariance, rtol=0, atol=1e-12)

    def test_kl_by_block(self, sizes):
        law = law_of(sizes)
        assert law.kl().shape == (S, B, len(sizes or (Z,)))
        for s in range(S):
            for b in range(B):
                precision, block = dense(law, s, b)
                for g in range(len(sizes or (Z,))):
                    own = block == g
                    size = int(own.sum())
                    twin = torch.distributions.kl_divergence(
                        torch.distributions.MultivariateNormal(
                            law.loc[s, b, own], precision_matrix=precision[own][:, own]
                        ),
                        torch.distributions.MultivariateNormal(
                            torch.zeros(size, dtype=torch.float64), torch.eye(size, dtype=torch.float64)
                        ),
                    )
                    assert_close(law.kl()[s, b, g], twin, rtol=0, atol=1e-12)


class TestLimits:
    def test_without_a_direction_it_is_the_diagonal_law(self):
        law = law_of((2, 3))
        plain = bae.codes.DiagonalLaw(law.loc, -0.5 * law.log_precision)
        noise = normal(K, 1, B, Z, seed=4)
        for length in (0.0, 1e-9):
            near = RankOneLaw(law.loc, law.log_precision, length * law.direction, law.sizes)
            assert_close(near.push(noise), plain.push(noise), rtol=0, atol=1e-12)
            assert_close(near.log_prob(noise), plain.log_prob(noise.expand(K, S, B, Z)), rtol=0, atol=1e-12)
            assert_close(near.kl().sum(-1), plain.kl().sum(-1), rtol=0, atol=1e-12)

    def test_gradients_at_no_direction_are_those_nearby(self):
        law, noise = law_of((2, 3)), normal(K, 1, B, Z, seed=4)

        def value(u):
            at = RankOneLaw(law.loc, law.log_precision, u, law.sizes)
            return at.kl().sum() + (at.push(noise) ** 3).sum() + at.log_prob(noise).sum()

        at_zero, nearby = (torch.func.grad(value)(size * law.direction) for size in (0.0, 1e-10))
        assert bool((at_zero == 0).all())  # all is even in u
        assert_close(nearby, at_zero, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("log_precision", [-40.0, 0.0, 40.0])
    @pytest.mark.parametrize("direction", [0.0, 1e-20, 1.0, 1e12])
    def test_extreme_values_are_finite(self, dtype, log_precision, direction):
        leaves = [torch.full((1, 2, Z), value, dtype=dtype) for value in (1.0, log_precision, direction)]

        def results(loc, logs, u):
            law = RankOneLaw(loc, logs, u, (2, 3))
            latents = law.push(torch.ones(K, 1, 2, Z, dtype=dtype))
            return latents, law.log_prob(loc.expand(K, 1, 2, Z)), law.kl()

        gradients = torch.func.grad(lambda *given: sum(part.sum() for part in results(*given)), (0, 1, 2))(*leaves)
        for part in (*results(*leaves), *gradients):
            assert bool(part.isfinite().all())

    def test_a_direction_that_carries_all_the_precision(self):
        """D alone would have variances of 1e16: differences from 1 would leave noise of that size."""
        law = RankOneLaw(normal(1, 1, 1), torch.full((1, 1, 1), -37.0).double(), torch.full((1, 1, 1), 2.0).double())
        assert_close(law.kl()[0, 0, 0], 0.5 * (law.loc[0, 0, 0] ** 2 + 0.25 - 1) + torch.tensor(2.0).double().log())

    def test_slopes_by_forward_mode_and_over_draws(self):
        """What a linearised predictive does with it."""
        law, noise = law_of((2, 3)), normal(K, 1, B, Z, seed=4)
        tangents = normal(6, S, B, Z, seed=5)

        def value(u):
            at = RankOneLaw(law.loc, law.log_precision, u, law.sizes)
            return at.push(noise).sum() + at.kl().sum() + at.log_prob(noise).sum()

        def push(tangent):
            return torch.func.jvp(value, (law.direction,), (tangent,))[1]

        expected = (tangents * torch.func.grad(value)(law.direction)).flatten(1).sum(1)
        assert_close(torch.func.vmap(push)(tangents), expected)
        step = 1e-6 * tangents[0]
        slope = (value(law.direction + step) - value(law.direction - step)) / 2e-6
        assert_close(slope, expected[0], rtol=1e-6, atol=1e-6)


def rank_one_model(world, precision_diagonal, direction):
    """The world's decoder and an encoder made by hand: exact locations, constant l = log d and u."""
    model, n_latents = world.model("location"), world.n_latents
    gain = model.encoder[0].weight.detach()
    n_outputs = gain.shape[1]
    encoder = bae.nets.mlp(n_outputs, [], (n_latents, 3)).double()
    constants = torch.stack([precision_diagonal.log(), direction], 1)
    with torch.no_grad():
        encoder[1].weight.copy_(torch.cat([gain[:, None], gain.new_zeros(n_latents, 2, n_outputs)], 1).flatten(0, 1))
        encoder[1].bias.copy_(torch.cat([model.encoder[0].bias[:, None], constants], 1).flatten())
    return bae.Autoencoder(encoder, model.decoder, model.likelihood).eval()


def draw(model, codes, batch, n, seed=0):
    params = {name: leaf.detach()[None] for name, leaf in model.network.named_parameters()}
    with bae.random.scope(seed), torch.no_grad():
        return codes(model.at(params), batch, n_latent_draws=n)


def check_is_exact(world, model):
    draws = draw(model, Amortised("rank_one"), world.batch, 5)
    expected = world.log_evidence().expand(5, 1, -1)
    assert_close(draws.log_ratio, expected, rtol=0, atol=1e-9)
    assert world.mean_field_gap > 0.1


class TestItClosesTheMeanFieldGap:
    @pytest.mark.parametrize("seed", range(3))
    def test_of_two_latents(self, seed):
        world = LinearGaussian.make(seed=seed, n_latents=2, correlation=0.9)
        precision = world.precision
        (a, c), (_, b) = precision.tolist()
        first = (abs(c) * (a / b) ** 0.5) ** 0.5
        direction = torch.tensor([first, c / first], dtype=torch.float64)
        check_is_exact(world, rank_one_model(world, precision.diagonal() - direction**2, direction))

    def test_of_columns_with_one_direction_in_common(self):
        n_outputs, n_latents, noise_var = 9, 5, 0.3
        basis = torch.linalg.qr(normal(n_outputs, n_latents + 1))[0]
        own, common = normal(n_latents, seed=1), normal(n_latents, seed=2)
        weight = basis[:, :-1] * own + basis[:, -1:] * common
        world = LinearGaussian(weight, normal(n_outputs, seed=3), noise_var, normal(7, n_outputs, seed=4))
        check_is_exact(world, rank_one_model(world, 1 + own**2 / noise_var, common / noise_var**0.5))


class TestAmortised:
    def test_the_encoder_gives_location_log_d_and_u(self):
        parameters = normal(S, B, Z, 3)
        law = Amortised("rank_one", layers=(2, 3)).law_from(parameters)
        assert isinstance(law, RankOneLaw) and law.sizes == (2, 3)
        assert_close(torch.stack([law.loc, law.log_precision, law.direction], -1), parameters, rtol=0, atol=0)
        assert Amortised("rank_one").law_from(parameters).sizes is None

    def test_pickles(self):
        codes = Amortised("rank_one", layers=(2, 3))
        assert pickle.loads(pickle.dumps(codes)) == codes and "(2, 3)" in repr(codes)

    def test_path_gradients(self):
        world = LinearGaussian.make(n_latents=3)
        model = rank_one_model(world, torch.ones(3).double(), torch.ones(3).double()).train()
        draws = Amortised("rank_one", "path")(model.live(), world.batch, n_latent_draws=2)
        assert draws.is_path_gradient and draws.kl.shape == (1, 40, 1)
        draws.log_ratio.sum().backward()
        assert bool(model.encoder[1].weight.grad.isfinite().all())

    def test_errors(self):
        with pytest.raises(bae.errors.UnsupportedError, match="layers of a 'rank_one' Normal"):
            Amortised("diagonal", layers=(2, 3))
        for layers in ((2, 0), (1.5,)):
            with pytest.raises(bae.errors.DataError, match="layers"):
                Amortised("rank_one", layers=layers)
        with pytest.raises(bae.errors.ShapeError, match=r"add up to a code of 5"):
            Amortised("rank_one", layers=(2, 2)).law_from(normal(S, B, Z, 3))
        with pytest.raises(bae.errors.ShapeError, match="3 numbers for each of 5"):
            Amortised("rank_one").law_from(normal(S, B, Z, 2))


def fitted_gap(family, seed):
    """Log p(x) less the ELBO of an encoder trained on a fixed linear decoder of 784 outputs, nats, on new rows.

    The encoder is linear in the coordinates of x along the columns of W, which are all that the posterior depends on.
    """
    world = LinearGaussian.make(
        seed=seed, n_data=5000, n_outputs=784, n_latents=8, noise_var=200.0, correlation=0.8, dtype=torch.float32
    )
    fixed, codes = world.model("location"), Amortised(family)
    basis = torch.linalg.qr(world.weight)[0]
    coordinates = torch.nn.Linear(784, 8)
    with torch.no_grad():
        scale = ((world.x - world.bias) @ basis).std(0)
        coordinates.weight.copy_((basis / scale).T)
        coordinates.bias.copy_(-coordinates.weight @ world.bias)
    torch.manual_seed(seed)
    encoder = torch.nn.Sequential(coordinates, *bae.nets.mlp(8, [], (8, codes.n_parameters(8))))
    if family == "rank_one":  # as the docstring of Amortised says: else rows stay with directions of both signs
        with torch.no_grad():
            encoder[-2].weight.unflatten(0, (8, 3))[:, 2] = 0
            encoder[-2].bias.unflatten(0, (8, 3))[:, 2] = torch.randn(8).sign()
    model = bae.Autoencoder(encoder, fixed.decoder, fixed.likelihood)
    for frozen in (coordinates, model.decoder):
        frozen.requires_grad_(False)
    settings = {"objective": bae.objectives.elbo, "codes": codes, "schedule": "cosine", "batch_size": 100}
    bae.fit_model(model, world.x[1000:], epochs=40, learning_rate=2e-2, seed=seed, progress=False, **settings)
    test = world.x[:1000]
    draws = draw(model, codes, bae.Batch(test), 50)
    return float((world.log_evidence(test) - bae.objectives.elbo(draws)[0]).mean()), world.mean_field_gap


@pytest.mark.slow
def test_a_trained_rank_one_encoder_comes_within_a_tenth_of_a_nat():
    gap, mean_field = fitted_gap("diagonal", 0)
    assert mean_field - 0.05 < gap < mean_field + 0.2 and mean_field > 2
    assert fitted_gap("rank_one", 0)[0] < 0.1
