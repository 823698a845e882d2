from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import bayesae as bae
from bayesae import curvature, testing
from bayesae.functional import parameters_of
from bayesae.testing import ConjugateRegression
from bayesae.weights import OnlineLaplace
from tests.conftest import small_model


def started(world, *, at=0.0):
    """The world with its run starting elsewhere: `run_inference` starts at ``mean``."""
    return dataclasses.replace(world, mean={name: leaf + at for name, leaf in world.mean.items()})


def flat(params):
    return torch.cat([leaf.flatten() for leaf in params.values()])


def expected_variance(world):
    variance = world.covariance.diagonal()
    n_out = len(world.mean["bias"])
    return torch.cat([variance[:-1].repeat(n_out), variance[-1:].repeat(n_out)])


def steps(method, model, batches, *, n_data, seed=0, joint=None, **options):
    joint = bae.log_joint(model, n_data, **options) if joint is None else joint
    with bae.random.scope(seed):
        state = method.init(parameters_of(model.network), joint)
        for batch in batches:
            state, _ = method.update(state, batch, joint)
    return state, joint


class TestConjugate:
    @pytest.mark.parametrize("at", [0.0, 5.0])
    @pytest.mark.parametrize("options", [{"curvature": "exact"}, {"curvature": "approximate"}, {"n_weight_draws": 3}])
    def test_precision_is_exact_at_once_whatever_the_start(self, at, options):
        # of one output a number probes of signs are exact too
        world = ConjugateRegression.make()
        posterior = testing.run_inference(OnlineLaplace(epochs=1, **options), started(world, at=at))
        assert_close(posterior.var, expected_variance(world), rtol=1e-10, atol=0)

    @pytest.mark.parametrize("memory", [0.0, 0.5, 0.999])
    def test_precision_of_unequal_batches(self, memory):
        """The average is over rows: with a memory of everything, batches of 7, 7, 7, 3 give the whole sum."""
        world = ConjugateRegression.make()
        method = OnlineLaplace(epochs=1, curvature="exact", memory=memory)
        posterior = testing.run_inference(method, world, n_batches=4)
        parts = [batch.x for batch in world.batches(4)]
        with_ones = [torch.cat([x, torch.ones_like(x[:, :1])], 1).square().sum(0) / 0.25 for x in parts]
        weights = [memory ** (len(parts) - 1 - t) for t in range(len(parts))]
        # the first batch counts twice: at the mean, before anything is drawn, and at what was drawn
        weights[0] += memory ** len(parts)
        total = sum(w * d for w, d in zip(weights, with_ones, strict=True))
        average = total / sum(w * len(x) for w, x in zip(weights, parts, strict=True))
        variance = 1 / (24 * average + 2)
        expected = torch.cat([variance[:-1].repeat(2), variance[-1:].repeat(2)])
        assert_close(posterior.var, expected, rtol=1e-10, atol=0)

    def test_temperature_and_a_prior_by_weight(self):
        world = ConjugateRegression.make()
        joint = dataclasses.replace(
            world.joint, prior=bae.IndependentNormal({"weight": 2.0, "bias": torch.full((2,), 2.0)}), temperature=0.25
        )
        posterior = testing.run_inference(OnlineLaplace(epochs=1), dataclasses.replace(world, joint=joint))
        assert_close(posterior.var, 0.25 * expected_variance(world), rtol=1e-10, atol=0)

    @pytest.mark.slow
    def test_mean_converges_to_the_posteriors(self):
        """From five away to within a tenth of a standard deviation, as the rate goes to 0: Adam's last average."""
        world = ConjugateRegression.make()
        method = OnlineLaplace(epochs=6000, learning_rate=0.1, schedule="cosine")
        posterior = testing.run_inference(method, started(world, at=5.0))
        error = (flat(posterior.mean) - flat(world.mean)) / expected_variance(world).sqrt()
        assert float(error.abs().max()) < 0.1

    @pytest.mark.slow
    def test_draws_are_those_of_the_posterior(self):
        """A run's own draws, by their full covariance, within four standard errors."""
        world, draws = ConjugateRegression.make(), []
        method = OnlineLaplace(epochs=1, learning_rate=1e-12, n_weight_draws=4000, curvature="approximate")

        def keep(params, batch):
            draws.append(torch.cat([leaf.detach().flatten(1) for leaf in params.values()], 1))
            return per_example(params, batch)

        per_example = world.joint.per_example
        joint = dataclasses.replace(world.joint, per_example=keep)
        testing.run_inference(method, dataclasses.replace(world, joint=joint))
        deviation = (draws[0] - flat(world.mean)) / expected_variance(world).sqrt()
        found = deviation.mT @ deviation / len(deviation)
        error = torch.where(torch.eye(len(found), dtype=torch.bool), math.sqrt(2 / 4000), math.sqrt(1 / 4000))
        assert float(((found - torch.eye(len(found))) / error).abs().max()) < 4


def conv_model(scale=0.3):
    torch.manual_seed(1)
    encoder = nn.Sequential(
        nn.Conv2d(1, 3, 3, 2, 1), nn.Tanh(), nn.Conv2d(3, 4, 3, 2, 1), nn.Tanh(), nn.Flatten(), nn.Linear(16, 2)
    )
    decoder = nn.Sequential(
        nn.Linear(2, 16), nn.Tanh(), nn.Unflatten(1, (4, 2, 2)), nn.ConvTranspose2d(4, 3, 4, 2, 1), nn.Tanh(),
        nn.Upsample(scale_factor=2), nn.Conv2d(3, 1, 3, padding=1),
    )  # fmt: skip
    return bae.Autoencoder(encoder, decoder, bae.likelihoods.Gaussian(scale)).eval()


def first_draw(method, state):
    """The weights that the next step draws: the generator's first numbers."""
    generator = torch.Generator().manual_seed((state.seed * 0x9E3779B97F4A7C15 + state.n_steps) % 2**62)
    mean = state.mean.detach()
    return mean + torch.empty_like(mean).normal_(generator=generator) * method._precision(state).rsqrt()


class TestGradient:
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-10)])
    def test_is_that_at_the_drawn_weights_of_a_convolutional_autoencoder(self, dtype, tolerance):
        model = conv_model().to(dtype)
        x = torch.rand(6, 1, 8, 8, dtype=dtype)
        method = OnlineLaplace(learning_rate=1e-2)
        state, joint = steps(method, model, [bae.Batch(x)], n_data=60)
        theta = first_draw(method, state)
        before = state.mean.detach().clone()
        state, _ = method.update(state, bae.Batch(x), joint)
        # by hand: copies of the layers, weights put in, squared errors, the prior
        own = copy.deepcopy(model)
        nn.utils.vector_to_parameters(theta, own.network.parameters())
        loss = 10 * ((own.decoder(own.encoder(x)) - x) ** 2).sum() / (2 * 0.3**2)
        loss = loss + sum((p**2).sum() for p in own.network.parameters()) / 2
        loss.backward()
        expected = torch.cat([p.grad.flatten() for p in own.network.parameters()]) / 60
        assert_close(state.mean.grad, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
        # and the step is Adam's: of the second step, from the moments of both gradients
        assert float((state.mean.detach() - before).abs().max()) > 1e-3

    def test_of_the_published_code_is_another_for_convolutions(self):
        """Weights put back before the backward pass: the test above would see it."""
        model = conv_model().double()
        x = torch.rand(6, 1, 8, 8, dtype=torch.float64)
        mean = nn.utils.parameters_to_vector(model.network.parameters()).detach()
        theta = mean + 0.3 * torch.randn(len(mean), dtype=torch.float64, generator=torch.Generator().manual_seed(0))

        def gradient(swaps_back):
            own = copy.deepcopy(model)
            for p, value in zip(own.network.parameters(), split(own, theta), strict=True):
                p.data = value
            loss = ((own.decoder(own.encoder(x)) - x) ** 2).sum()
            if swaps_back:
                for p, value in zip(own.network.parameters(), split(own, mean), strict=True):
                    p.data.copy_(value)  # what a convolution saved for its input's gradient changes with it
            loss.backward()
            return torch.cat([p.grad.flatten() for p in own.network.parameters()])

        def split(own, vector):
            sizes = [p.numel() for p in own.network.parameters()]
            parts = zip(vector.split(sizes), own.network.parameters(), strict=True)
            return [part.view_as(p).clone() for part, p in parts]

        right, wrong = gradient(False), gradient(True)
        assert float((wrong - right).norm() / right.norm()) > 0.1

    def test_steps_are_adams(self, model, rows):
        """Five steps against torch.optim.Adam over the same gradients."""
        method = OnlineLaplace(learning_rate=1e-2, schedule="cosine", epochs=5)
        joint = bae.log_joint(model, 9)
        state = method.init(parameters_of(model.network), joint)
        twin = state.mean.detach().clone().requires_grad_()
        optimiser = torch.optim.Adam([twin], lr=1e-2)
        for step in range(5):
            state, _ = method.update(state, bae.Batch(rows), joint)
            twin.grad = state.mean.grad.clone()
            optimiser.param_groups[0]["lr"] = 1e-2 * bae.schedules.cosine(step / 5)
            optimiser.step()
        assert_close(state.mean, twin, rtol=1e-12, atol=1e-14)


class TestAccumulation:
    def test_average_forgets_its_start(self, rows):
        """Curvature at weights far away is gone after some memories; the rule of a sum keeps its start."""
        model = small_model()
        far = copy.deepcopy(model)
        with torch.no_grad():
            for p in far.parameters():
                p.mul_(30)
        method = OnlineLaplace(learning_rate=1e-12, curvature="exact", memory=0.5)
        batches, cold = [bae.Batch(rows)] * 60, {"temperature": 1e-12}  # draws are the mean
        state, joint = steps(method, model, batches, n_data=9, **cold)
        other, _ = steps(method, far, batches[:1], n_data=9, **cold)
        assert float((other.total / other.weight - state.total / state.weight).abs().max()) > 1
        other.mean.data.copy_(state.mean.data)
        with bae.random.scope(0):
            for batch in batches[1:]:
                other, _ = method.update(other, batch, joint)
        assert_close(other.total / other.weight, state.total / state.weight, rtol=1e-6, atol=1e-8)

    @pytest.mark.parametrize("curve", ["monte_carlo", "exact", "approximate"])
    def test_leaky_sum_is_the_published_rule(self, curve, rows):
        model = small_model(bae.likelihoods.Gaussian(1.0))
        method = OnlineLaplace(learning_rate=1e-2, curvature=curve, memory=0.9, accumulation="leaky_sum")
        joint = bae.log_joint(model, 90)
        state = method.init(parameters_of(model.network), joint)
        h = torch.full_like(state.mean, 90.0).detach()
        mean = state.mean.detach().clone().requires_grad_()
        adam = torch.optim.Adam([mean], lr=1e-2)
        for step in range(4):
            generator = torch.Generator().manual_seed((state.seed * 0x9E3779B97F4A7C15 + step) % 2**62)
            eps = torch.empty_like(h).normal_(generator=generator)
            theta = (mean + eps / torch.sqrt(h + 1)).detach()
            params = state.chosen.params(theta)
            leaves = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
            outputs = torch.func.functional_call(model.network, leaves, (rows,))
            (0.5 * ((outputs - rows) ** 2).sum() / 9).backward()  # no prior
            mean.grad = torch.cat([leaf.grad.flatten() for leaf in leaves.values()])
            adam.step()
            jacobian = torch.func.jacrev(lambda p: torch.func.functional_call(model.network, p, (rows,)))(params)
            exact = torch.cat([(leaf**2).sum((0, 1)).flatten() for leaf in jacobian.values()])
            state, _ = method.update(state, bae.Batch(rows), joint)
            if curve == "exact":
                h = 0.9 * h + 0.5 * (90 / 9) * exact
                assert_close(state.total, h, rtol=1e-9, atol=1e-9)
            else:
                assert bool((state.total >= 0.9 * h - 1e-9).all())
                h = state.total.clone()
            assert_close(state.mean.detach(), mean.detach(), rtol=1e-7, atol=1e-9)
        with pytest.warns(RuntimeWarning, match="about 5 times that of the posterior, and 59 of it is what is left"):
            posterior = method.posterior(state, joint)
        assert_close(posterior.var, 1 / (h + 1), rtol=1e-9, atol=0)

    def test_monte_carlo_is_unbiased(self, rows):
        """Averages of a run at a fixed mean and no memory to speak of, against the exact diagonal at the mean."""
        model = small_model(bae.likelihoods.Gaussian(1.0))
        cold = {"temperature": 1e-12}  # draws are the mean
        method = OnlineLaplace(learning_rate=1e-14, memory=1 - 2**-53)
        joint, totals = bae.log_joint(model, 9, **cold), []
        state = method.init(parameters_of(model.network), joint)
        for _ in range(200):
            state, _ = method.update(state, bae.Batch(rows), joint)
            totals.append(state.total.clone())
        found = torch.stack(totals).diff(dim=0)
        lin = curvature.Linearisation(model.network)
        exact = flat(curvature.ggn_diagonal(lin, rows, model.likelihood.output_hessian))
        error = found.std(0) / math.sqrt(len(found))
        assert float(((found.mean(0) - exact) / error.clamp_min(1e-9)).abs().max()) < 4


class TestNoise:
    def test_is_the_residual_variance_at_the_drawn_weights(self, rows):
        model = small_model(bae.likelihoods.Gaussian())
        method = OnlineLaplace(learning_rate=1e-3, memory=0.8)
        joint = bae.log_joint(model, 9)
        with bae.random.scope(0):
            state = method.init(parameters_of(model.network), joint)
            residuals, density = [float(((model(rows) - rows) ** 2).mean().detach())], state.joint.per_example

            def keep(params, batch):
                own = {name: leaf[0].detach() for name, leaf in params.items()}
                outputs = torch.func.functional_call(model.network, own, (rows,))
                residuals.append(float(((outputs - rows) ** 2).mean()))
                return density(params, batch)

            state.joint = dataclasses.replace(state.joint, per_example=keep)
            for _ in range(5):
                state, _ = method.update(state, bae.Batch(rows), joint)
        weights = [0.8**k for k in range(len(residuals))][::-1]
        expected = sum(w * r for w, r in zip(weights, residuals, strict=True)) / sum(weights)
        posterior = method.posterior(state, joint)
        assert float(posterior.noise["_extra_state"]) == pytest.approx(expected, rel=1e-9)
        assert posterior.info["noise_scale"] == pytest.approx(math.sqrt(expected), rel=1e-9)
        with pytest.raises(bae.errors.NotFittedError):  # the model's own stays unknown
            model.likelihood.log_prob(rows, rows)

    @pytest.mark.parametrize(
        "likelihood",
        [
            bae.likelihoods.Gaussian(per_output=True),
            bae.likelihoods.StudentT(),
            bae.likelihoods.Mixed([bae.likelihoods.Gaussian()] * 4 + [bae.likelihoods.Bernoulli()] * 3),
        ],
        ids=lambda one: type(one).__name__,
    )
    def test_of_other_likelihoods_and_missing_entries(self, likelihood, rows):
        rows = rows.round() if isinstance(likelihood, bae.likelihoods.Mixed) else rows
        model = small_model(likelihood)
        mask = torch.rand(rows.shape) > 0.3
        data = bae.Batch(torch.where(mask, rows, math.nan), mask=mask)
        posterior = bae.fit_weights(OnlineLaplace(epochs=3), model, data, batch_size=4, seed=0)
        moments = bae.Predictive(model, posterior).moments(rows, seed=0)
        assert bool(moments.total.isfinite().all())

    def test_stays_where_it_is_given_or_not_wanted(self, model, rows):
        assert bae.fit_weights(OnlineLaplace(epochs=1), model, rows, seed=0).noise is None
        learned = small_model(bae.likelihoods.Gaussian())
        bae.estimate_noise(learned, rows)
        posterior = bae.fit_weights(OnlineLaplace(epochs=1, learns_noise=False), learned, rows, seed=0)
        assert posterior.noise is None
        assert posterior.info["noise_scale"] == pytest.approx(learned.likelihood.scale)


class TestUse:
    def test_dead_inputs_keep_the_prior(self, rows):
        model = small_model(bae.likelihoods.Gaussian())
        rows = rows.clone()
        rows[:, 2] = 0
        prior = bae.IsotropicNormal(3.0)
        posterior = bae.fit_weights(OnlineLaplace(epochs=3), model, rows, weight_prior=prior, seed=0)
        variance = posterior.variances()["encoder.1.weight"]
        assert_close(variance[:, 2], torch.full_like(variance[:, 2], 1 / 3), rtol=1e-12, atol=0)
        others = torch.cat([variance[:, :2], variance[:, 3:]], 1)
        assert float(others.max()) < 1 / 3 - 1e-4

    @pytest.mark.slow
    def test_trains_a_network_from_nothing(self):
        data = bae.datasets.load("digits", split=("train",))[0][:600].flatten(1)
        torch.manual_seed(0)
        model = bae.Autoencoder(bae.nets.mlp(64, [32], 4), bae.nets.mlp(4, [32], 64), bae.likelihoods.Gaussian()).eval()
        posterior = bae.fit_weights(OnlineLaplace(epochs=40, learning_rate=5e-3), model, data, batch_size=50, seed=0)
        mean = bae.Predictive(model, posterior).moments(data, n_weight_draws=16, seed=0).mean
        assert float(((mean - data) ** 2).mean()) < 0.85 * float(data.var(0, correction=0).mean())

    @pytest.mark.parametrize("curve", ["monte_carlo", "exact", "approximate"])
    def test_convolutions_and_a_subset(self, curve):
        model = conv_model()
        x = torch.rand(6, 1, 8, 8)
        method = OnlineLaplace(epochs=2, curvature=curve, subset=("decoder.**",))
        posterior = bae.fit_weights(method, model, x, batch_size=4, seed=0)
        draws = posterior.sample(2)
        for name, leaf in model.network.named_parameters():
            moved = not torch.equal(posterior.mean[name], leaf)
            differ = not torch.equal(draws[name][0], draws[name][1])
            assert moved == differ == name.startswith("decoder")

    def test_a_checkpoint_goes_on_to_the_same_bits(self, rows, tmp_path, monkeypatch):
        model, method = small_model(bae.likelihoods.Gaussian()), OnlineLaplace(epochs=4, n_weight_draws=2)
        whole = bae.fit_weights(method, model, rows, batch_size=4, seed=0)
        arguments = {"batch_size": 4, "seed": 0, "checkpoint": tmp_path / "run", "checkpoint_every": 1}
        update, calls = OnlineLaplace.update, []

        def stopping(self, state, batch, joint):
            calls.append(len(batch.x))
            if len(calls) == 8:
                raise KeyboardInterrupt
            return update(self, state, batch, joint)

        with monkeypatch.context() as patch:
            patch.setattr(OnlineLaplace, "update", stopping)
            with pytest.raises(KeyboardInterrupt):
                bae.fit_weights(method, model, rows, **arguments)
        resumed = bae.fit_weights(method, model, rows, **arguments)
        assert torch.equal(resumed.var, whole.var)
        assert all(torch.equal(resumed.mean[name], leaf) for name, leaf in whole.mean.items())
        assert torch.equal(resumed.noise["_extra_state"], whole.noise["_extra_state"])

    def test_two_shares_of_a_batch_have_the_probes_of_the_whole(self, model, rows):
        lin, hessian = curvature.Linearisation(model.network), model.likelihood.output_hessian

        def found(x, place):
            generator = torch.Generator().manual_seed(3)
            return flat(curvature.monte_carlo_diagonal(lin, x, hessian, generator=generator, place=place).mean)

        shares = [found(rows[k::2], (9, slice(k, None, 2))) for k in range(2)]
        assert_close(shares[0] + shares[1], found(rows, None), rtol=1e-12, atol=1e-14)


def stochastic_model(likelihood=None):
    torch.manual_seed(2)
    likelihood = bae.likelihoods.Gaussian(0.5) if likelihood is None else likelihood
    return bae.Autoencoder(bae.nets.mlp(7, [6], (2, 2)), bae.nets.mlp(2, [5], 7), likelihood).double().eval()


class TestStochasticCode:
    options = {"codes": bae.codes.amortised, "objective": bae.objectives.elbo}

    @pytest.mark.slow
    def test_curvature_is_that_through_the_draws(self, rows):
        """Against Jacobians of outputs and codes with the codes' noise held, averaged over that noise."""
        model = stochastic_model()
        method = OnlineLaplace(learning_rate=1e-14, memory=1 - 2**-53)
        state, _ = steps(method, model, [bae.Batch(rows)] * 800, n_data=9, temperature=1e-12, **self.options)
        params = parameters_of(model.network)
        total, n = torch.zeros_like(state.total), 60
        generator = torch.Generator().manual_seed(4)
        for _ in range(n):
            noise = torch.randn(9, 2, dtype=torch.float64, generator=generator)

            def run(p, noise=noise):
                own = {k[8:]: v for k, v in p.items() if k.startswith("encoder")}
                loc, log_scale = torch.func.functional_call(model.encoder, own, (rows,)).unbind(-1)
                z = loc + noise * log_scale.exp()
                own = {k[8:]: v for k, v in p.items() if k.startswith("decoder")}
                return torch.func.functional_call(model.decoder, own, (z,)) / 0.5, z

            for jacobian in torch.func.jacrev(run)(params):
                total += torch.cat([(leaf**2).sum((0, 1)).flatten() for leaf in jacobian.values()])
        found, expected = state.total / state.weight, total / n / 9
        # a probe's square has a relative standard error of sqrt(2 / 800)
        assert float((found / expected - 1).abs().max()) < 0.25
        assert float((found / expected).log().mean().abs()) < 0.03

    def test_is_fitted_with_noise_masks_and_several_draws(self, rows):
        model = stochastic_model(bae.likelihoods.Gaussian())
        mask = torch.rand(rows.shape) > 0.2
        options = {**self.options, "n_latent_draws": 3}
        method = OnlineLaplace(epochs=3)
        posterior = bae.fit_weights(method, model, bae.Batch(rows, mask=mask), batch_size=4, seed=0, **options)
        draws = bae.Predictive(model, posterior, codes=bae.codes.amortised)(rows, n_weight_draws=3, seed=0)
        assert float(draws.latents.std(1).min()) > 0
        assert float(posterior.noise["_extra_state"]) > 0

    def test_has_no_exact_diagonal(self, rows):
        with pytest.raises(bae.errors.UnsupportedError, match="monte_carlo"):
            bae.fit_weights(OnlineLaplace(curvature="exact"), stochastic_model(), rows, **self.options)


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "error"),
        [
            ({"epochs": 0}, bae.errors.DataError),
            ({"learning_rate": 0.0}, bae.errors.DataError),
            ({"learning_rate": -1e-3}, bae.errors.DataError),
            ({"n_weight_draws": 0}, bae.errors.DataError),
            ({"memory": 1.0}, bae.errors.DataError),
            ({"memory": -0.1}, bae.errors.DataError),
            ({"curvature": "full"}, bae.errors.UnsupportedError),
            ({"accumulation": "sum"}, bae.errors.UnsupportedError),
            ({"schedule": "linear"}, bae.errors.UnsupportedError),
        ],
    )
    def test_options(self, options, error):
        with pytest.raises(error):
            OnlineLaplace(**options)

    def test_zero_temperature(self, model, rows):
        with pytest.raises(bae.errors.DataError, match="positive temperature"):
            bae.fit_weights(OnlineLaplace(), model, rows, temperature=0.0)

    def test_a_prior_without_precisions(self, model, rows):
        class Other:
            def log_prob(self, params):
                return torch.zeros(1)

        with pytest.raises(bae.errors.UnsupportedError, match="IsotropicNormal"):
            bae.fit_weights(OnlineLaplace(), model, rows, weight_prior=Other())

    def test_no_step(self, model):
        method, joint = OnlineLaplace(), bae.log_joint(model, 9)
        with pytest.raises(bae.errors.NotFittedError, match="at least one step"):
            method.posterior(method.init(parameters_of(model.network), joint), joint)

    def test_a_run_that_leaves_the_numbers(self, model, rows):
        with pytest.raises(bae.errors.NonFiniteError, match="finite"):
            bae.fit_weights(OnlineLaplace(learning_rate=1e200), model, rows, seed=0)


def digits_fit(rows, method, scale, seed):
    torch.manual_seed(seed)
    encoder, decoder = bae.nets.mlp(64, [64, 32], 2), bae.nets.mlp(2, [32, 64], 64)
    model = bae.Autoencoder(encoder, decoder, bae.likelihoods.Gaussian(scale)).eval()
    return bae.Predictive(model, bae.fit_weights(method, model, rows, batch_size=50, seed=seed))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the published leaky sum")
def test_the_mechanism_on_digits():
    """core.md A.3: an average with running noise trains, and tells permuted digits; noise fixed at 1 does not."""
    train, test = (x.flatten(1) for x in bae.datasets.load("digits", split=("train", "test")))
    generator = torch.Generator().manual_seed(0)
    strange = test.gather(1, torch.rand(test.shape, generator=generator).argsort(1))
    methods = {
        "leaky": (OnlineLaplace(epochs=60, accumulation="leaky_sum"), 1.0),
        "fixed": (OnlineLaplace(epochs=60), 1.0),
        "running": (OnlineLaplace(epochs=60), None),
    }
    error, auroc = {}, {}
    for name, (method, scale) in methods.items():
        predictive = digits_fit(train, method, scale, 0)
        with torch.no_grad():
            mean = {k: leaf[None] for k, leaf in predictive.weights.mean.items()}
            bound = predictive.model.at(mean)
            error[name] = float(((bound.decode(bound.encode(test))[0] - test) ** 2).sum(1).mean())
        sd = [predictive(x, n_weight_draws=30, seed=0).latents[0].std(0).sum(1) for x in (test, strange)]
        auroc[name] = bae.metrics.auroc(*sd)
    assert error["running"] < 1.5 * error["leaky"]
    assert auroc["running"] > 0.95
    assert error["fixed"] > 1.2 * error["running"]


def test_a_run_that_diverges_keeps_the_normal_of_the_step_before():
    model = small_model()
    rows = torch.rand(9, 7, dtype=torch.float64)
    method = OnlineLaplace(epochs=3)
    state, joint = steps(method, model, [bae.Batch(rows)] * 2, n_data=9)
    before = method.posterior(state, joint)
    with pytest.raises(bae.errors.DivergedError, match="at step 2") as caught:
        method.update(state, bae.Batch(rows * 1e300), joint)
    kept = caught.value.posterior
    assert torch.equal(kept.var, before.var) and all(torch.equal(kept.mean[n], before.mean[n]) for n in kept.mean)
    with pytest.raises(bae.errors.DivergedError, match="at step 0") as caught:
        steps(method, model, [bae.Batch(rows * 1e300)], n_data=9)
    assert caught.value.posterior is None
