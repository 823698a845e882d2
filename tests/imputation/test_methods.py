"""Every method against the conditional Normal of probabilistic PCA, in standard errors."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import bayesae as bae
from bayesae.codes import Amortised
from bayesae.codes.base import draws_of, noise
from bayesae.imputation import (
    CodeHMC,
    CodeLaplace,
    FixedPoint,
    ImportanceResampling,
    MetropolisGibbs,
    PseudoGibbs,
)
from tests.imputation.worlds import MISSING, OBSERVED, conditional, mask_of, normal_rows, predictive_of, world


def prior(model, batch, *, n_latent_draws=1):
    """A proposal that does not look at x."""
    latents = noise(model, batch, n_latent_draws, 2, model.encode(batch.x)).expand(-1, 1, -1, -1)
    return draws_of(model, batch, latents, model.log_prior(latents))


# a method, the family of q, and whether the draws are those of the exact posterior
CASES = {
    "Gibbs, exact q": (PseudoGibbs(30, 60), "full"),
    "Metropolis, mean-field q": (MetropolisGibbs(40, 200), "diagonal"),
    "importance, exact q": (ImportanceResampling(200, bae.codes.Laplace(1, "newton")), "location"),
    "importance, the prior": (ImportanceResampling(2000, prior), "location"),
    "Laplace": (CodeLaplace(1), "location"),
    "HMC": (CodeHMC(30, 40), "location"),
}
SHORT = [FixedPoint(20), PseudoGibbs(3, 12), MetropolisGibbs(3, 12), ImportanceResampling(20), CodeLaplace(2),
         CodeHMC(3, 12)]  # fmt: skip


def name_of(method):
    return type(method).__name__


def errors_of(found, mean, cov):
    """Shifts of mean and second moments from the truth, in standard errors over rows that are copies of one."""
    centred = found.draws[..., MISSING].double() - mean
    products = centred[..., :, None] * centred[..., None, :] - cov
    values = torch.cat([centred, products.flatten(2)], -1).mean(0)  # one of each row, independent of the others'
    return values.mean(0) / (values.std(0) / len(values) ** 0.5)


@pytest.mark.filterwarnings("ignore:of the rows imputed:RuntimeWarning")
@pytest.mark.parametrize("name", CASES)
def test_mean_and_covariance_are_those_of_the_conditional_normal(name):
    method, family = CASES[name]
    made, n_rows = world(), 300
    x = made.x[:1].expand(n_rows, 5)
    codes = None if family == "location" else Amortised(family)
    predictive = predictive_of(made.model(family), codes)
    found = bae.impute(predictive, x, mask_of(n_rows), method=method, n_draws=24, seed=1)
    mean, cov = conditional(made, x)
    assert float(errors_of(found, mean, cov).abs().max()) < 4
    # moments are those of the draws' laws: sharper than the draws
    assert_close(found.mean[:, MISSING].mean(0), mean[0], rtol=0, atol=0.06)
    assert_close(found.variance[:, MISSING].mean(0), cov.diagonal(), rtol=0.08, atol=0)
    assert_close(found.moments.noise[:, MISSING], torch.ones(n_rows, 3).double())
    assert not bool(found.moments.weights.any())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:of the rows imputed:RuntimeWarning")
@pytest.mark.parametrize("seed", range(3))
def test_the_plain_chain_is_biased_by_a_mean_field_q_and_the_metropolis_step_repairs_it(seed):
    made, n_rows = world(), 1500
    x = made.x[:1].expand(n_rows, 5)
    predictive = predictive_of(made.model("diagonal"), bae.codes.amortised)
    mean, cov = conditional(made, x)
    errors, ratios = [], []
    for method in (PseudoGibbs(100, 300), MetropolisGibbs(100, 300)):
        found = bae.impute(predictive, x, mask_of(n_rows), method=method, n_draws=30, seed=seed)
        errors.append(float(errors_of(found, mean, cov).abs().max()))
        ratios.append(found.draws[..., MISSING].var((0, 1)) / cov.diagonal())
    assert errors[0] > 10 and errors[1] < 4
    assert bool((ratios[0] > 1.05).all()) and bool(((ratios[1] - 1).abs() < 0.03).all())


@pytest.mark.filterwarnings("ignore:of the rows imputed:RuntimeWarning")
def test_importance_resampling_takes_codes_as_often_as_they_weigh():
    """Of three codes whose weights are known: shares, effective numbers, and the mean."""
    made, logs = world(), torch.tensor([0.0, 1.0, -1.0]).double()
    model = made.model("location")

    def three(bound, batch, *, n_latent_draws=1):
        latents = torch.tensor([-2.0, 0.0, 2.0]).double()[:, None, None, None].expand(3, 1, len(batch.x), 2)
        found = draws_of(bound, batch, latents, None)
        log_q = found.log_likelihood + found.log_prior - logs[:, None, None]
        return draws_of(bound, batch, latents, log_q)

    found = bae.impute(
        predictive_of(model, None), made.x, mask_of(40), method=ImportanceResampling(3, three), n_draws=500, seed=0
    )
    weights = logs.softmax(0)
    effective = float(1 / (weights**2).sum())
    assert_close(found.acceptance, torch.full((40,), effective / 3).double())
    assert_close(found.ess, torch.full((40,), 1 / (1 / 500 + 1 / effective)).double())
    decoded = model.decoder(torch.tensor([[-2.0, -2.0], [0.0, 0.0], [2.0, 2.0]]).double()).detach()
    mean = (weights[:, None] * decoded).sum(0)[MISSING]
    var = (weights[:, None] * decoded**2).sum(0)[MISSING] - mean**2
    assert float(((found.mean[:, MISSING].mean(0) - mean) / (var / 20000).sqrt()).abs().max()) < 4
    assert_close(found.moments.code[:, MISSING].mean(0), var, rtol=0.03, atol=0)


@pytest.mark.parametrize("method", [CodeLaplace(1), ImportanceResampling(50, bae.codes.Laplace(1))], ids=name_of)
def test_weight_draws_have_codes_of_their_own(method):
    """Two networks alike, a code of each: their means differ by the codes alone."""
    predictive = predictive_of(world().model("location"), None, shifts=(0.0, 0.0))
    for size in (None, 1):  # and in blocks of one network each
        options = {"method": method, "n_draws": 2, "seed": 0, "chunk_size": size}
        found = bae.impute(predictive, world().x[:6], mask_of(6), **options)
        assert bool((found.moments.weights[:, MISSING] > 1e-6).all())


@pytest.mark.filterwarnings("ignore:of the rows imputed:RuntimeWarning")
def test_draws_around_a_mode_count_in_full_where_the_posterior_is_normal_only():
    made, mask = world(), mask_of(40)
    linear = bae.impute(predictive_of(made.model("location"), None), made.x, mask, method=CodeLaplace(1), n_draws=20)
    assert_close(linear.ess, torch.full((40,), 20.0).double())
    torch.manual_seed(0)
    bent = bae.Autoencoder(bae.nets.mlp(5, [8], 2), bae.nets.mlp(2, [8], 5), bae.likelihoods.Gaussian(0.1)).double()
    curved = bae.impute(predictive_free(bent.eval()), made.x, mask, method=CodeLaplace(8), n_draws=20, seed=0)
    assert float(curved.ess.median()) < 19 and float(curved.ess.max()) <= 20
    hasty = bae.impute(predictive_free(bent), made.x, mask, method=CodeLaplace(1), n_draws=20, seed=0)
    assert float(hasty.ess.mean()) < float(curved.ess.mean())  # one step does not come to the mode


@pytest.mark.filterwarnings("ignore:of the rows imputed:RuntimeWarning")
def test_figures_of_hamiltonian_chains():
    predictive = predictive_of(world().model("location"), None, shifts=(0.0, 1.0))
    found = bae.impute(predictive, world().x, mask_of(40), method=CodeHMC(50, 60), n_draws=40, seed=0)
    assert found.residual is None and found.n_weight_draws == 2
    assert 0.7 < float(found.acceptance.mean()) < 0.95 and float(found.acceptance.max()) <= 1
    assert not bool(found.n_divergent.any()) and not found.n_divergent.is_floating_point()
    assert float(found.rhat.min()) > 0.98 and float(found.rhat.median()) < 1.1
    assert 20 < float(found.ess.min()) and float(found.ess.max()) <= 40


def test_how_many_network_rows_a_row_takes():
    """K = 5 codes of S = 3 weight draws: what chunks are cut by."""
    sizes = {PseudoGibbs(n_chains=4): 4, MetropolisGibbs(n_chains=4): 4, CodeHMC(n_chains=4): 12,
             ImportanceResampling(70): 70, CodeLaplace(): 5, FixedPoint(): 1}  # fmt: skip
    for method, n in sizes.items():
        assert method.n_parallel(5, 3) == n


def test_a_proposal_that_misses_the_posterior_says_so():
    made = world()
    with pytest.warns(RuntimeWarning, match=r"under 5% of their proposals taken\. Their draws may be far"):
        bae.impute(
            predictive_of(made.model("diagonal"), bae.codes.amortised), made.x, mask_of(40),
            method=ImportanceResampling(500), n_draws=10, seed=0,
        )  # fmt: skip


class TestFixedPoint:
    def test_is_the_conditional_mean_of_a_linear_decoder(self):
        made = world()
        predictive = predictive_of(made.model("location"), None, shifts=(0.0, 0.5))
        found = bae.impute(predictive, made.x, mask_of(40), method=FixedPoint(2000, 1e-10), n_draws=2)
        for s in range(2):  # the encoder knows of the first bias only: its fixed point is another one under the second
            assert_close(found.draws[s, :, OBSERVED], made.x[:, OBSERVED], rtol=0, atol=0)
        assert_close(found.draws[0, :, MISSING], conditional(made, made.x)[0], rtol=0, atol=1e-7)
        assert bool((found.residual <= 1e-10).all()) and not bool(found.moments.noise.any())
        assert bool((found.moments.weights[:, MISSING] > 0).all()) and not bool(found.moments.code.any())

    def test_is_a_fixed_point_and_a_row_does_not_depend_on_the_others(self):
        made = world()
        predictive = predictive_of(made.model("location"), None)
        method = FixedPoint(2000, 1e-8)
        both = [bae.impute(predictive, made.x[:n], mask_of(n), method=method, n_draws=1).draws[0] for n in (7, 3)]
        assert_close(both[0][:3], both[1], rtol=0, atol=1e-12)
        with torch.no_grad():
            again = predictive.model(both[1])
        assert_close(both[1][:, MISSING], again[:, MISSING], rtol=0, atol=1e-7)

    def test_residuals_are_what_each_row_moved_last(self):
        made = world()
        found = bae.impute(
            predictive_of(made.model("location"), None), made.x, mask_of(40), method=FixedPoint(2000, 1e-3), n_draws=1
        )
        assert bool((found.residual > 0).all() and (found.residual <= 1e-3).all())  # nobody's is that of standing still

    def test_noise_is_added_on_request(self):
        made = world()
        predictive = predictive_of(made.model("location"), None)
        x = made.x[:1].expand(2000, 5)
        found = bae.impute(predictive, x, mask_of(2000), method=FixedPoint(500, noise=True), n_draws=2, seed=0)
        mean, _ = conditional(made, x)
        spread = (found.draws[..., MISSING] - mean).std((0, 1))
        assert_close(spread, torch.ones(3).double(), rtol=0, atol=4 / (2 * 4000) ** 0.5)

    def test_says_when_it_did_not_converge(self):
        made = world()
        with pytest.warns(RuntimeWarning, match="40 in all, 40 have not come to a fixed point"):
            found = bae.impute(
                predictive_of(made.model("location"), None), made.x, mask_of(40), method=FixedPoint(1), n_draws=1
            )
        assert bool((found.residual > 1e-4).all())

    def test_needs_data_with_a_mean(self):
        model = bae.Autoencoder(bae.nets.mlp(5, [4], 2), bae.nets.mlp(2, [4], (5, 3)), bae.likelihoods.Categorical(3))
        with pytest.raises(bae.errors.UnsupportedError, match="data with a mean"):
            bae.impute(predictive_free(model.eval()), torch.ones(6, 5), mask_of(6), method=FixedPoint())


def predictive_free(model, codes=None):
    particles = bae.functional.stack_draws([bae.functional.parameters_of(model.network)])
    return bae.Predictive(model, bae.families.Particles(particles), codes=codes)


@pytest.mark.filterwarnings("ignore:of the rows imputed:RuntimeWarning")
@pytest.mark.parametrize("method", SHORT, ids=name_of)
class TestEveryMethod:
    def run(self, method, x, mask, **kwargs):
        predictive = predictive_of(world().model("diagonal"), bae.codes.amortised, shifts=(0.0, 0.3))
        return bae.impute(predictive, x, mask, method=method, **({"n_draws": 8, "seed": 0} | kwargs))

    def test_what_is_missing_does_not_matter_to_the_bit(self, method):
        x, mask = world().x[:6], torch.rand(6, 5) < 0.5
        mask[:, 0] = True
        fillers = [torch.full_like(x, one) for one in (0.0, 1e6, torch.nan, torch.inf)]
        fillers.append(x[torch.randperm(6)])  # values of other rows
        found = [self.run(method, torch.where(mask, x, filler), mask) for filler in fillers]
        for other in found[1:]:
            assert torch.equal(found[0].draws, other.draws) and torch.equal(found[0].variance, other.variance)
            assert torch.equal(found[0].ess, other.ess)

    def test_nan_says_what_is_missing(self, method):
        x, mask = world().x[:6], mask_of(6)
        holed = torch.where(mask, x, torch.nan)
        found = [self.run(method, *given) for given in ((x, mask), (holed, None), (holed.numpy(), None))]
        found += [self.run(method, bae.Batch(x, mask), None), self.run(method, bae.Batch(holed), None)]
        assert all(torch.equal(found[0].draws, other.draws) for other in found[1:])

    def test_keeps_what_was_observed_and_leaves_the_generator(self, method):
        x, mask, state = world().x[:6], mask_of(6), torch.get_rng_state()
        before = x.clone()
        found = self.run(method, x, mask)
        assert torch.equal(state, torch.get_rng_state()) and torch.equal(x, before)
        assert found.draws.shape == (8, 6, 5) and found.ess.shape == (6,) and found.n_weight_draws == 2
        assert torch.equal(found.draws[:, mask], x[mask].expand(8, -1)) and torch.equal(found.mean[mask], x[mask])
        assert not bool(found.variance[mask].any()) and bool((found.variance[~mask] > 0).all())
        assert bool(((found.ess > 0) & (found.ess <= 8)).all())

    def test_weights_are_a_part_of_the_variance(self, method):
        made, mask = world(), mask_of(6)
        predictive = predictive_of(made.model("diagonal"), bae.codes.amortised, shifts=(-10.0, 10.0))
        found = bae.impute(predictive, made.x[:6], mask, method=method, n_draws=8, seed=0)
        parts = found.moments
        assert bool((parts.weights[~mask] > 0.5 * found.variance[~mask]).all())
        assert_close(parts.total, parts.noise + parts.code + parts.weights)
        between = (found.draws[4:].mean(0) - found.draws[:4].mean(0))[~mask]
        assert bool((between.abs() > 3).all())

    def test_completes_images(self, method):
        torch.manual_seed(1)
        model = bae.Autoencoder(bae.nets.mlp(8, [6], (2, 2)), bae.nets.mlp(2, [6], 8), bae.likelihoods.Gaussian(0.3))
        x = torch.rand(5, 1, 2, 4)
        mask = torch.ones(5, 1, 2, 4, dtype=torch.bool)
        mask[:, :, 1] = False
        found = bae.impute(predictive_free(model.eval(), bae.codes.amortised), x, mask, method=method, n_draws=4)
        assert found.draws.shape == (4, 5, 1, 2, 4) and found.mean.shape == x.shape
        assert torch.equal(found.draws[:, mask], x[mask].expand(4, -1))


@pytest.mark.parametrize("method", [ImportanceResampling(200), CodeLaplace(1), CodeHMC(20, 20)], ids=name_of)
def test_squared_error_of_a_normal_with_one_coordinate_missing_is_near_the_least(method):
    """Covariance ((2, 1), (1, 2)): 1.5 at best, 2 by the mean."""
    made = world(n_outputs=2, n_latents=1, n_data=2500)
    made = type(made)(torch.ones(2, 1).double(), torch.zeros(2).double(), 1.0, normal_rows(2500))
    mask = mask_of(2500, 2, [0])
    predictive = predictive_of(made.model("diagonal"), bae.codes.amortised)
    found = bae.impute(predictive, made.x, mask, method=method, n_draws=20, seed=0)
    # of new values given these rows; of the rows' own values it scatters by 0.04 more
    error = 1.5 + (found.mean[:, 1] - 0.5 * made.x[:, 0]).square().mean()
    assert 1.5 <= float(error) < 1.55
    assert 1.4 < float((found.mean - made.x)[:, 1].square().mean()) < 1.70
    assert_close(found.variance[:, 1].mean(), torch.tensor(1.5).double(), rtol=0, atol=0.05)


@pytest.mark.parametrize("method", [MetropolisGibbs(2, 8), ImportanceResampling(20), CodeLaplace(2)], ids=name_of)
@pytest.mark.filterwarnings("ignore:of the rows imputed:RuntimeWarning")
@pytest.mark.parametrize(
    "likelihood",
    [bae.likelihoods.Bernoulli(), bae.likelihoods.Poisson(), bae.likelihoods.Categorical(3)],
    ids=lambda head: type(head).__name__,
)
def test_draws_are_data_of_the_likelihood(method, likelihood):
    torch.manual_seed(0)
    shape = (5, 3) if isinstance(likelihood, bae.likelihoods.Categorical) else 5
    model = bae.Autoencoder(bae.nets.mlp(5, [4], (2, 2)), bae.nets.mlp(2, [4], shape), likelihood).eval()
    x, mask = torch.ones(6, 5), mask_of(6)
    found = bae.impute(predictive_free(model, bae.codes.amortised), x, mask, method=method, n_draws=4, seed=0)
    likelihood.check(found.draws.flatten(0, 1))
    if likelihood.is_nominal:
        assert found.mean.shape == (6, 5, 3)
        assert_close(found.mean.sum(-1), torch.ones(6, 5))
        assert torch.equal(found.mean[mask], torch.tensor([0.0, 1.0, 0.0]).expand(12, 3))
        with pytest.raises(bae.errors.UnsupportedError, match="can be ordered"):
            found.interval()
