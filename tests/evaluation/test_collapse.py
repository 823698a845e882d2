"""Information and collapse on probabilistic PCA, with a dead code dimension beside."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import bayesae as bae
from bayesae.codes import Amortised, Importance, amortised
from bayesae.evaluation import active_units, collapse_report, mutual_information
from bayesae.evaluation import information as module
from bayesae.testing import LinearGaussian


@pytest.fixture
def world():
    return LinearGaussian.make(n_data=60)


def particles(model, scales):
    params = bae.functional.parameters_of(model.network)
    return bae.families.Particles({k: torch.stack([s * v for s in scales]) for k, v in params.items()})


def with_dead_dimension(world):
    """The world with a column of zeros in W: the posterior of that dimension is the prior."""
    return replace(world, weight=torch.cat([world.weight, torch.zeros_like(world.weight[:, :1])], 1))


class TestInformation:
    def test_encloses_the_closed_form(self):
        world = LinearGaussian.make(n_data=1500, n_latents=2, noise_var=1.0)
        truth = 0.5 * float(torch.logdet(world.precision))
        found = mutual_information(world.model("full"), world.x, codes=Amortised("full"), n_latent_draws=2, seed=0)
        assert found.n_rows == 1500 and 1.0 < truth < math.log(1500) - 3
        error = 4 * float(found.standard_error)
        assert float(found.lower) - error < truth < float(found.upper) + error
        assert float(found.upper - found.lower) < 0.05
        assert error < 0.15

    def test_no_more_than_the_rows_can_tell_apart(self, world):
        few = LinearGaussian.make(n_data=12, noise_var=1e-4)
        found = mutual_information(few.model("full"), few.x, codes=Amortised("full"), seed=0)
        assert float(found.lower) == pytest.approx(math.log(12), abs=1e-6)
        assert float(found.upper) > 10

    @pytest.mark.parametrize("family", ["diagonal", "full"])
    def test_equals_loops(self, world, family, monkeypatch):
        monkeypatch.setattr(module, "_NUMBERS", 100)  # several chunks of rows
        model, codes, n = world.model(family), Amortised(family), 2
        predictive = bae.Predictive(model, particles(model, (1.0, 1.2, 0.9)), codes)
        x = world.x[:7]
        found = mutual_information(predictive, x, n_latent_draws=n, seed=4)
        latents = predictive(x, n_latent_draws=n, seed=4).latents
        law = codes.law(model.at(predictive.weights.sample(3)), bae.Batch(x))
        for s in range(3):
            laws = [torch.distributions.MultivariateNormal(law.loc[s, i], law.covariance()[s, i]) for i in range(7)]
            lower, upper = [], []
            for i in range(7):
                terms = []
                for k in range(n):
                    logs = [float(one.log_prob(latents[k, s, i])) for one in laws]
                    others = [value for j, value in enumerate(logs) if j != i]
                    mixture = math.log(sum(map(math.exp, logs)) / 7)
                    rest = math.log(sum(map(math.exp, others)) / 6)
                    terms.append((logs[i] - mixture, logs[i] - rest))
                lower.append(sum(one for one, _ in terms) / n)
                upper.append(sum(two for _, two in terms) / n)
            assert float(found.lower[s]) == pytest.approx(sum(lower) / 7, abs=1e-8)
            assert float(found.upper[s]) == pytest.approx(sum(upper) / 7, abs=1e-8)
            spread = float(torch.tensor(lower, dtype=torch.float64).std())
            assert float(found.standard_error[s]) == pytest.approx(spread / 7**0.5, abs=1e-8)

    def test_the_mixture_keeps_the_rest_of_the_kl(self, world):
        """The mean KL is information plus KL(q(z) || p): the latter is small where the model made the rows."""
        report = collapse_report(world.model("full"), world.x, codes=Amortised("full"), seed=0)
        total = float(Amortised("full").law(world.model("full").live(), world.batch).kl().detach().sum(-1).mean())
        assert float(report.total_kl) == pytest.approx(total)
        assert float(report.information.lower) < total


class TestActiveUnits:
    def test_by_the_variance_of_the_mean(self, world):
        model = world.model("diagonal")
        variance = world.posterior_mean().var(0)
        threshold = float(variance.sort().values[:2].mean())
        found = active_units(model, world.x, codes=amortised, threshold=threshold)
        assert found.shape == (1, 3) and torch.equal(found[0], variance > threshold)
        assert torch.equal(active_units(world.model("location"), world.x, threshold=threshold), found)

    def test_of_codes_without_a_law_draws_are_taken_off(self, world):
        """The dead dimension's mean of 20 draws has variance 1/20, five times the threshold."""
        model = with_dead_dimension(world).model("diagonal")
        x = world.x.repeat(40, 1)
        found = active_units(model, x, codes=Importance(amortised, 1), n_latent_draws=20, seed=0)
        assert found.tolist() == [[True, True, True, False]]

    def test_of_each_weight_draw_and_of_linearised_ones(self, world):
        model = world.model("diagonal")
        predictive = bae.Predictive(model, particles(model, (1.0, 0.01)), amortised)
        found = active_units(predictive, world.x)
        assert found.tolist() == [[True] * 3, [False] * 3]
        subset, mean = bae.Subset.of(model.network), bae.functional.parameters_of(model.network)
        var = torch.full((len(subset),), 1e-8, dtype=torch.float64)
        weights = bae.families.DiagonalNormal(mean, var, subset, is_linearised=True)
        found = active_units(bae.Predictive(model, weights, amortised), world.x, n_weight_draws=2, n_latent_draws=8)
        assert found.tolist() == [[True] * 3] * 2


class TestReport:
    def test_names_what_collapsed(self, world):
        dead = with_dead_dimension(world)
        model = dead.model("diagonal")
        report = collapse_report(model, world.x, codes=amortised, seed=0)
        torch.testing.assert_close(report.mean_variance[0, :3], world.posterior_mean().var(0))
        law = amortised.law(model.live(), world.batch)
        torch.testing.assert_close(report.kl, law.kl().mean(1).detach(), rtol=0, atol=1e-12)
        assert float(report.kl[0, 3].abs()) < 1e-12
        assert report.collapsed == [3] and report.is_active.tolist() == [[True] * 3 + [False]]
        text = str(report)
        assert "3 of 4 dimensions active (Var E[z|x] > 0.01); collapsed: 3" in text
        (line,) = [line for line in text.splitlines() if line.split()[0] == "3" and "collapsed" in line.split()]
        assert line.endswith("0.000  collapsed")
        assert text.count("\n") == 7

    def test_marginal_kl_of_a_full_law(self, world):
        codes = Amortised("full")
        report = collapse_report(world.model("full"), world.x, codes=codes, seed=0)
        var, mean = world.covariance.diagonal(), world.posterior_mean()
        expected = (0.5 * (mean**2 + var - 1) - 0.5 * var.log()).mean(0)
        torch.testing.assert_close(report.kl[0], expected, rtol=0, atol=1e-10)
        assert float(report.kl.sum()) < float(report.total_kl)

    def test_codes_from_the_prior_in_place(self, world):
        n = 400
        report = collapse_report(world.model("full"), world.x[:4], codes=Amortised("full"), n_latent_draws=n, seed=0)
        fit = ((world.x[:4] - world.bias - world.posterior_mean(world.x[:4]) @ world.weight.mT) ** 2).sum(1)
        own = fit + torch.trace(world.weight @ world.covariance @ world.weight.mT)
        swapped = ((world.x[:4] - world.bias) ** 2).sum(1) + torch.trace(world.weight @ world.weight.mT)
        constant = -0.5 * len(world.bias) * math.log(2 * math.pi * world.noise_var)
        scale = 0.5 / world.noise_var
        torch.testing.assert_close(report.log_likelihood[0], constant - scale * own, rtol=0, atol=0.5)
        torch.testing.assert_close(report.swapped[0], constant - scale * swapped, rtol=0.15, atol=0)
        assert bool((report.swapped < report.log_likelihood - 5).all())

    def test_a_decoder_that_does_not_listen(self, world):
        dead = replace(world, weight=torch.zeros_like(world.weight))
        report = collapse_report(dead.model("diagonal"), world.x, codes=amortised, seed=0)
        assert torch.equal(report.log_likelihood, report.swapped)
        assert report.collapsed == [0, 1, 2]
        assert float(report.information.lower) == pytest.approx(0, abs=1e-12)

    def test_weight_draws_chunks_masks_and_purity(self, world):
        model = world.model("diagonal")
        predictive = bae.Predictive(model, particles(model, (1.0, 0.01, 0.9)), amortised)
        state, observed = torch.get_rng_state(), torch.rand(world.x.shape) < 0.7
        torch.set_rng_state(state)
        x = torch.where(observed, world.x, torch.nan)
        one, other = (
            collapse_report(predictive, x, observed, seed=1, n_latent_draws=2, chunk_size=size) for size in (None, 31)
        )
        assert torch.equal(state, torch.get_rng_state())
        assert one.log_likelihood.shape == (3, 60) and one.kl.shape == (3, 3)
        for name in ("mean_variance", "kl", "total_kl", "log_likelihood", "swapped"):
            torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=0, atol=1e-9)
        torch.testing.assert_close(one.information.lower, other.information.lower, rtol=0, atol=1e-9)
        assert one.collapsed == [] and not bool(one.is_active[1].any())

    def test_single_precision(self, world):
        report = collapse_report(world.model("diagonal").float(), world.x.float(), codes=amortised, seed=0)
        wide = collapse_report(world.model("diagonal"), world.x, codes=amortised, seed=0)
        torch.testing.assert_close(report.kl.double(), wide.kl, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(report.information.lower.double(), wide.information.lower, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_twenty_codes_of_five_dimensional_data_leave_five_active():
    """Noise a quarter above the truth: a learned one keeps directions in which 1000 rows happen to vary more."""
    world = LinearGaussian.make(n_data=1000, n_outputs=20, n_latents=5, noise_var=1.0, dtype=torch.float32)
    scale = 1.25
    assert int((torch.linalg.eigvalsh(torch.cov(world.x.mT)) > scale**2).sum()) == 5
    torch.manual_seed(0)
    encoder = torch.nn.Sequential(torch.nn.Linear(20, 40), torch.nn.Unflatten(1, (20, 2)))
    model = bae.Autoencoder(encoder, torch.nn.Linear(20, 20), bae.likelihoods.Gaussian(scale))
    options = {"codes": amortised, "objective": bae.objectives.elbo, "batch_size": 1000, "progress": False}
    for seed in range(4):  # Adam anew, which else remembers the first steep gradients
        bae.fit_model(model, world.x, epochs=200, learning_rate=0.02, seed=seed, **options)
    report = collapse_report(model, world.x, codes=amortised, seed=0)
    assert int(active_units(model, world.x, codes=amortised).sum()) == 5
    assert len(report.collapsed) == 15
    assert float(report.kl[0][report.is_active[0]].min()) > 0.5
    assert float(report.kl[0][~report.is_active[0]].max()) < 0.05


class TestErrors:
    def test_one_row(self, world):
        for measure in (active_units, mutual_information, collapse_report):
            with pytest.raises(bae.errors.DataError, match="two rows"):
                measure(world.model("diagonal"), world.x[:1], codes=amortised)

    def test_codes_without_a_law(self, world):
        for measure in (mutual_information, collapse_report):
            with pytest.raises(bae.errors.UnsupportedError, match="a Normal code posterior"):
                measure(world.model("diagonal"), world.x, codes=Importance(amortised, 2))
            with pytest.raises(bae.errors.UnsupportedError, match="deterministic"):
                measure(world.model("location"), world.x)
