from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import bayesae as bae
from bayesae import random, testing
from bayesae.errors import DataError, DivergedError, UnsupportedError
from bayesae.functional import parameters_of
from bayesae.objectives import WarmUp
from bayesae.testing import ConjugateRegression
from bayesae.weights import MeanField

ESTIMATORS = ("weights", "local", "flipout")


class SigmaPoints(MeanField):
    """Noise whose first two moments are exact, so that expectations of quadratic functions are."""

    def _noise(self, state):
        n, k = len(state.law.mean), self.rank
        points = math.sqrt(n + k) * torch.eye(n + k, dtype=state.law.mean.dtype)
        points = torch.cat([points, -points])
        return points[:, :n], points[:, n:]


def correlated(**kwargs) -> ConjugateRegression:
    return ConjugateRegression.make(is_orthogonal=False, **{"n_data": 6, **kwargs})


def precision(world) -> torch.Tensor:
    """Lambda over (weight, bias) as `Subset.ravel` orders them: weights output by output, then the biases."""
    n_out, n_in = world.mean["weight"].shape
    one = torch.linalg.inv(world.covariance)
    places = torch.cat(
        [torch.arange(n_out * n_in).reshape(n_out, n_in), n_out * n_in + torch.arange(n_out)[:, None]], 1
    )
    whole = torch.zeros(places.numel(), places.numel(), dtype=one.dtype)
    for own in places:
        whole[own[:, None], own] = one
    return whole


def exact_bound(world, mean, covariance):
    """E_q[log p(D, theta)] + H[q] of a Normal q: log p(D) less the divergence from the posterior, by torch."""
    target = torch.cat([world.mean["weight"].flatten(), world.mean["bias"]])
    posterior = torch.distributions.MultivariateNormal(target, precision_matrix=precision(world))
    law = torch.distributions.MultivariateNormal(mean, covariance)
    return world.log_evidence - torch.distributions.kl_divergence(law, posterior)


def state_at(method, world, mean, rho, factor=None):
    """A run that stands at a law."""
    with random.scope(0):
        state = method.init(dict(world.mean), world.joint)
    for number, value in zip(state.law.numbers, [mean, rho] + ([] if factor is None else [factor]), strict=True):
        number.data.copy_(value)
    return state


def inverse_softplus(scale):
    return scale + torch.log(-torch.expm1(-scale))


def ascent(method, state, batch, joint):
    state.batch_size = state.batch_size or len(batch.x)
    return method._ascent(state, method._noise(state), batch, joint)


class TestTheBound:
    @pytest.mark.parametrize("rank", [0, 2])
    @pytest.mark.parametrize("estimator", ESTIMATORS)
    def test_value_and_gradient_are_those_of_the_exact_bound(self, rank, estimator):
        world = correlated()
        method = SigmaPoints(rank=rank, estimator=estimator)
        mean, rho = torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
        factor = torch.randn(rank, 8, dtype=torch.float64)
        numbers = [mean, rho] + ([factor] if rank else [])
        for number in numbers:
            number.requires_grad_()
        covariance = torch.diag(F.softplus(rho) ** 2) + factor.mT @ factor
        expected = exact_bound(world, mean, covariance)
        state = state_at(method, world, *[number.detach() for number in numbers])
        log_likelihood, kl, gradients = ascent(method, state, world.batch, world.joint)
        assert_close(log_likelihood - kl, expected.detach(), rtol=1e-10, atol=1e-10)
        for got, wanted in zip(gradients, torch.autograd.grad(expected, numbers), strict=True):
            assert_close(got, wanted, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("estimator", ESTIMATORS)
    @pytest.mark.parametrize("n_batches", [1, 3, 6])
    def test_batches_of_any_number_estimate_the_same_gradient(self, n_batches, estimator):
        world, method = correlated(), SigmaPoints(estimator=estimator)
        state = state_at(method, world, torch.randn(8), torch.randn(8))
        whole = ascent(method, state, world.batch, world.joint)
        parts = [ascent(method, state, batch, world.joint) for batch in world.batches(n_batches)]
        assert len(parts) == n_batches
        assert_close(sum(part[0] for part in parts) / n_batches, whole[0], rtol=1e-12, atol=1e-12)
        for place, wanted in enumerate(whole[2]):
            assert_close(sum(part[2][place] for part in parts) / n_batches, wanted, rtol=1e-11, atol=1e-11)

    def test_temperature_divides_the_log_joint_and_not_the_entropy(self):
        world, method = correlated().with_temperature(0.3), SigmaPoints()
        scale = (world.joint.temperature / precision(correlated()).diagonal()).sqrt()
        mean = torch.cat([world.mean["weight"].flatten(), world.mean["bias"]])
        state = state_at(method, world, mean, inverse_softplus(scale))
        for gradient in ascent(method, state, world.batch, world.joint)[2]:
            assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-8)

    @pytest.mark.parametrize("temperature", [1.0, 0.3])
    def test_an_update_tells_the_log_joint_and_not_the_bound(self, temperature):
        world, method = correlated().with_temperature(temperature), MeanField(initial_scale=1e-9)
        state = method.init(parameters_of(world.joint.network), world.joint)
        draws = {name: leaf[None] for name, leaf in parameters_of(world.joint.network).items()}
        _, info = method.update(state, world.batch, world.joint)
        assert info.log_joint == pytest.approx(float(world.joint.estimate(draws, world.batch)), rel=1e-5)

    def test_a_mixture_of_two_equal_scales_is_one_normal(self):
        world, method = correlated(), SigmaPoints()
        scale = 2.0**-0.5
        mixed = dataclasses.replace(world.joint, prior=bae.ScaleMixture(0.3, (scale, scale)))
        named = {"weight": 2.0, "bias": torch.full((2,), 2.0)}
        independent = dataclasses.replace(world.joint, prior=bae.IndependentNormal(named))
        state = state_at(method, world, torch.randn(8), torch.randn(8))
        first, *others = (ascent(method, state, world.batch, joint) for joint in (world.joint, mixed, independent))
        for other in others:
            assert_close(other[1], first[1], rtol=1e-10, atol=1e-10)
            for got, wanted in zip(other[2], first[2], strict=True):
                assert_close(got, wanted, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("rank", [0, 3])
    def test_divergence_is_that_of_torch(self, rank):
        world, method = correlated(), MeanField(rank=rank)
        mean, rho, factor = torch.randn(8), torch.randn(8), torch.randn(rank, 8)
        state = state_at(method, world, mean, rho, *([factor] if rank else []))
        kl = ascent(method, state, world.batch, world.joint)[1]
        covariance = torch.diag(F.softplus(rho) ** 2) + factor.mT @ factor
        law = torch.distributions.MultivariateNormal(mean.double(), covariance.double())
        prior = torch.distributions.MultivariateNormal(torch.zeros(8).double(), torch.eye(8).double() / 2.0)
        assert_close(kl, torch.distributions.kl_divergence(law, prior), rtol=1e-5, atol=1e-5)
        draws = law.sample((40_000,))
        ratios = law.log_prob(draws) - prior.log_prob(draws)
        assert abs(float(ratios.mean() - kl)) < 4 * float(ratios.std()) / 200

    def test_what_is_not_chosen_has_no_divergence(self):
        world = correlated()
        method = MeanField(subset=("bias",))
        with random.scope(0):
            state = method.init(dict(world.mean), world.joint)
        kl = ascent(method, state, world.batch, world.joint)[1]
        law = torch.distributions.Normal(world.mean["bias"], method.initial_scale)
        prior = torch.distributions.Normal(torch.zeros(2).double(), 2.0**-0.5)
        assert_close(kl, torch.distributions.kl_divergence(law, prior).sum(), rtol=1e-10, atol=1e-10)


class TestTheOptimum:
    def test_its_precision_is_the_diagonal_of_the_posterior_s(self):
        world, method = correlated(), SigmaPoints()
        mean = torch.cat([world.mean["weight"].flatten(), world.mean["bias"]])
        by_precision = precision(world).diagonal() ** -0.5
        by_variance = torch.linalg.inv(precision(world)).diagonal().sqrt()
        assert bool((by_variance / by_precision > 1.1).any())  # a world in which they differ
        state = state_at(method, world, mean, inverse_softplus(by_precision))
        for gradient in ascent(method, state, world.batch, world.joint)[2]:
            assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-8)
        state = state_at(method, world, mean, inverse_softplus(by_variance))
        assert float(ascent(method, state, world.batch, world.joint)[2][1].abs().max()) > 0.05

    def test_a_run_reaches_it(self):
        world = correlated()
        method = SigmaPoints(epochs=400, learning_rate=5e-2, schedule="cosine", initial_scale=0.1)
        posterior = testing.run_inference(method, world)
        expected = 1 / precision(world).diagonal()
        assert_close(posterior.var, expected, rtol=1e-4, atol=0)
        assert_close(posterior.subset.ravel(posterior.mean), posterior.subset.ravel(world.mean), rtol=1e-4, atol=1e-5)
        bound = exact_bound(world, posterior.subset.ravel(posterior.mean), torch.diag(posterior.var))
        assert_close(posterior.info["bound"], float(bound), rtol=0, atol=1e-6)
        assert posterior.info["bound"] < world.log_evidence - 0.01

    def test_a_sampled_run_reaches_it(self):
        world = ConjugateRegression.make(is_orthogonal=False)
        method = MeanField(epochs=250, learning_rate=3e-2, schedule="cosine", n_weight_draws=256, initial_scale=0.1)
        posterior = testing.run_inference(method, world, n_batches=1)
        expected = 1 / precision(world).diagonal()
        # a decayed Adam leaves about 2 % of a variance and a fortieth of a deviation of the mean
        assert_close(posterior.var, expected, rtol=0.04, atol=0)
        error = posterior.subset.ravel(posterior.mean) - posterior.subset.ravel(world.mean)
        assert float((error / expected.sqrt()).abs().max()) < 0.1

    def test_of_an_orthogonal_design_the_bound_is_the_evidence(self):
        world, method = ConjugateRegression.make(), SigmaPoints()
        mean = torch.cat([world.mean["weight"].flatten(), world.mean["bias"]])
        state = state_at(method, world, mean, inverse_softplus(precision(world).diagonal() ** -0.5))
        log_likelihood, kl, gradients = ascent(method, state, world.batch, world.joint)
        assert_close(float(log_likelihood - kl), world.log_evidence, rtol=0, atol=1e-9)
        assert all(float(gradient.abs().max()) < 1e-8 for gradient in gradients)

    def test_factors_of_enough_rank_are_the_dense_posterior(self):
        world = correlated(n_in=2, n_out=1)
        covariance = torch.linalg.inv(precision(world))
        values, vectors = torch.linalg.eigh(covariance)
        # the smallest eigenvalue everywhere, and two directions that add the rest
        factor = ((values[1:] - values[0]).sqrt() * vectors[:, 1:]).mT
        rho = inverse_softplus(values[0].sqrt()).expand(3)
        mean = torch.cat([world.mean["weight"].flatten(), world.mean["bias"]])
        method = SigmaPoints(rank=2)
        log_likelihood, kl, gradients = ascent(
            method, state_at(method, world, mean, rho, factor), world.batch, world.joint
        )
        assert_close(float(log_likelihood - kl), world.log_evidence, rtol=0, atol=1e-9)
        assert all(float(gradient.abs().max()) < 1e-8 for gradient in gradients)

    def test_a_run_with_factors_reaches_the_dense_posterior(self):
        world = correlated(n_in=2, n_out=1)
        method = SigmaPoints(epochs=400, learning_rate=5e-2, schedule="cosine", initial_scale=0.3, rank=2)
        posterior = testing.run_inference(method, world)
        covariance = torch.diag(posterior.var) + posterior.factor.mT @ posterior.factor
        assert_close(covariance, torch.linalg.inv(precision(world)), rtol=2e-2, atol=1e-3)
        assert_close(posterior.info["bound"], world.log_evidence, rtol=0, atol=1e-3)


class TestSchedules:
    def test_halving_is_blundell_s(self):
        world, method = correlated(), MeanField(kl_schedule="halving")
        with random.scope(0):
            state = method.init(dict(world.mean), world.joint)
        for n_batches in (1, 3, 6):
            factors = []
            for batch in world.batches(n_batches):
                state.batch_size = len(batch.x) if not factors else state.batch_size
                factors.append(method._kl_factor(state, world.joint))
                state.n_seen += len(batch.x)
            expected = [n_batches * 2 ** (n_batches - i) / (2**n_batches - 1) for i in range(1, n_batches + 1)]
            assert factors == pytest.approx(expected, rel=1e-14)
            assert sum(factors) / n_batches == pytest.approx(1.0, rel=1e-14)

    def test_halving_over_thousands_of_batches_is_finite(self):
        world, method = correlated(), MeanField(kl_schedule="halving")
        with random.scope(0):
            state = method.init(dict(world.mean), world.joint)
        state.batch_size = 1
        assert method._kl_factor(state, dataclasses.replace(world.joint, n_data=3000)) == 1500.0

    def test_the_factor_is_the_divergence_s_alone(self):
        world = correlated()
        mean, rho = torch.randn(8), torch.randn(8)
        steps = []
        for factor in (0.0, 0.25, 1.0):
            method = SigmaPoints(kl_schedule=lambda progress, factor=factor: 1.0 if progress == 1 else factor)
            steps.append(ascent(method, state_at(method, world, mean, rho), world.batch, world.joint))
        for none, quarter, whole in zip(*[step[2] for step in steps], strict=True):
            assert not torch.equal(none, whole)
            assert_close(quarter, 0.75 * none + 0.25 * whole, rtol=1e-12, atol=1e-12)
        assert steps[0][:2] == steps[1][:2] == steps[2][:2]  # the bound that is told is the whole one

    def test_warm_up_grows_to_one(self):
        world, method = correlated(), MeanField(epochs=10, kl_schedule=WarmUp(0.5))
        with random.scope(0):
            state = method.init(dict(world.mean), world.joint)
        factors = []
        for state.n_seen in range(0, 60, 6):
            factors.append(method._kl_factor(state, world.joint))
        assert factors == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1, 1])


class TestParts:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_scales_neither_overflow_nor_lose_their_logarithm(self, dtype):
        world, method = correlated(dtype=dtype), MeanField()
        rho = torch.tensor([-500.0, -200.0, -40.0, -1.0, 0.0, 30.0, 300.0, 1000.0], dtype=dtype)
        state = state_at(method, world, torch.zeros(8), rho)
        law = state.law
        assert_close(law.scale[-2:], rho[-2:])
        entropy = law.entropy()
        (gradient,) = torch.autograd.grad(entropy, law.rho)
        expected = rho[:3].sum() + sum(math.log(math.log1p(math.exp(r))) for r in (-1, 0, 30, 300)) + math.log(1000)
        assert_close(entropy.detach(), expected + 4 * (1 + math.log(2 * math.pi)), rtol=1e-6, atol=1e-6)
        assert_close(gradient[:3], torch.ones(3, dtype=dtype), rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("rank", [0, 2])
    def test_starts_at_the_network_with_the_initial_scale(self, model, rank):
        method = MeanField(initial_scale=0.05, rank=rank)
        joint = bae.log_joint(model, 9)
        with random.scope(0):
            state = method.init(parameters_of(model.network), joint)
        posterior = method.posterior(state, joint)
        assert all(torch.equal(posterior.mean[k], v) for k, v in model.network.named_parameters())
        variances = torch.cat([leaf.flatten() for leaf in posterior.variances().values()])
        assert float(variances.mean()) == pytest.approx(0.05**2, rel=0.3 if rank else 1e-9)

    def test_mixture_of_scales_is_that_of_torch_at_any_weight(self):
        prior = bae.ScaleMixture(0.25, (1.0, 1e-3))
        leaf = torch.tensor([[0.0, 1e-4, 2e-3, 1.0, -50.0, 1e4]], dtype=torch.float64).requires_grad_()
        law = torch.distributions.MixtureSameFamily(
            torch.distributions.Categorical(torch.tensor([0.25, 0.75], dtype=torch.float64)),
            torch.distributions.Normal(torch.zeros(2).double(), torch.tensor([1.0, 1e-3]).double()),
        )
        value = prior.log_prob({"a": leaf, "b": leaf.reshape(1, 2, 3)})
        assert_close(value, 2 * law.log_prob(leaf).sum(1), rtol=1e-12, atol=1e-12)
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
        assert bool(gradient.isfinite().all())

    @pytest.mark.parametrize(
        "make, error, message",
        [
            (lambda: MeanField(epochs=0), DataError, "epochs"),
            (lambda: MeanField(n_weight_draws=0), DataError, "n_weight_draws"),
            (lambda: MeanField(rank=-1), DataError, "rank"),
            (lambda: MeanField(learning_rate=0.0), DataError, "learning_rate"),
            (lambda: MeanField(initial_scale=-1.0), DataError, "initial_scale"),
            (lambda: MeanField(initial_scale=math.nan), DataError, "initial_scale"),
            (lambda: MeanField(estimator="naive"), UnsupportedError, "an estimator"),
            (lambda: MeanField(schedule="linear"), UnsupportedError, "a schedule"),
            (lambda: MeanField(kl_schedule="blundell"), UnsupportedError, "a kl_schedule"),
            (lambda: MeanField(kl_schedule=lambda progress: 0.5), DataError, "1 at the end"),
            (lambda: bae.ScaleMixture(1.0), DataError, "a share"),
            (lambda: bae.ScaleMixture(0.5, (1.0, 0.0)), DataError, "scales"),
            (lambda: bae.ScaleMixture(0.5, (1.0,)), DataError, "scales"),
        ],
    )
    def test_refuses(self, make, error, message):
        with pytest.raises(error, match=message):
            make()

    def test_a_diverging_run_keeps_the_last_law(self):
        world = correlated()
        with random.scope(0):
            state = MeanField().init(dict(world.mean), world.joint)
            state, _ = MeanField().update(state, world.batch, world.joint)
            broken = world.batch._replace(target=world.batch.target * math.inf)
            with pytest.raises(DivergedError, match="finite bound") as caught:
                MeanField().update(state, broken, world.joint)
        assert isinstance(caught.value.posterior, bae.families.DiagonalNormal)


@pytest.mark.parametrize("estimator", ESTIMATORS)
class TestOnAutoencoders:
    @pytest.mark.slow
    @pytest.mark.parametrize("n_latent_draws", [1, 3])
    def test_full_variational_bayes_of_a_variational_autoencoder(self, estimator, n_latent_draws):
        torch.manual_seed(0)
        encoder, decoder = bae.nets.mlp(7, [6], (2, 2)), bae.nets.mlp(2, [6], 7)
        model = bae.Autoencoder(encoder, decoder, bae.likelihoods.Gaussian(0.3)).double().eval()
        x = torch.rand(12, 7, dtype=torch.float64)
        options = {"codes": bae.codes.amortised, "n_latent_draws": n_latent_draws, "seed": 0, "batch_size": 5}
        method = MeanField(epochs=40, estimator=estimator, learning_rate=1e-2)
        run = bae.fit_weights(method, model, x, objective=bae.objectives.elbo, **options)
        short = dataclasses.replace(method, epochs=1)
        start = bae.fit_weights(short, model, x, objective=bae.objectives.elbo, **options)
        assert run.info["bound"] > start.info["bound"] + 5
        assert run.info["kl"] > 0

    def test_decoder_alone(self, estimator, model, rows):
        method = MeanField(epochs=2, estimator=estimator, subset=("decoder.**",))
        posterior = bae.fit_weights(method, model, rows, seed=0, batch_size=4)
        for name, parameter in model.network.named_parameters():
            assert (name.startswith("encoder") and torch.equal(posterior.mean[name], parameter)) or (
                name.startswith("decoder") and not torch.equal(posterior.mean[name], parameter)
            )

    def test_half_a_tensor(self, estimator, model, rows):
        mask = torch.zeros_like(model.decoder[-1].weight, dtype=torch.bool)
        mask[::2, 0] = True
        method = MeanField(epochs=2, estimator=estimator, subset=bae.Subset({"decoder.5.weight": mask}))
        posterior = bae.fit_weights(method, model, rows, seed=0)
        moved = posterior.mean["decoder.5.weight"] != model.decoder[-1].weight
        assert torch.equal(moved, mask) and torch.equal(posterior.variances()["decoder.5.weight"] > 0, mask)

    def test_images(self, estimator):
        torch.manual_seed(0)
        encoder = bae.nets.conv_encoder((1, 8, 8), 2, channels=[3, 4], norm="group")
        decoder = bae.nets.conv_decoder(2, (1, 8, 8), channels=[4])
        model = bae.Autoencoder(encoder, decoder, bae.likelihoods.Bernoulli(), data_shape=(1, 8, 8)).eval()
        x = torch.rand(6, 1, 8, 8).round()
        posterior = bae.fit_weights(MeanField(epochs=2, estimator=estimator, n_weight_draws=2), model, x, seed=0)
        assert math.isfinite(posterior.info["bound"])
