"""Log evidence by importance sampling on probabilistic PCA, where it is known."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

import bayesae as bae
from bayesae.codes import Amortised, Importance, Laplace, amortised
from bayesae.evaluation import log_evidence
from bayesae.evaluation.evidence import BLOCK
from bayesae.evaluation.sums import LogWeights, RunningMean
from bayesae.testing import LinearGaussian
from tests.conftest import small_model

FIELDS = ("log_evidence", "ess", "standard_error", "elbo", "elbo_standard_error", "cubo")


@pytest.fixture
def world():
    return LinearGaussian.make(n_data=9)


def normal(model, var=1e-3, *, is_linearised=False):
    subset = bae.Subset.of(model.network)
    mean = bae.functional.parameters_of(model.network)
    var = torch.full((len(subset),), var, dtype=model.reference.dtype)
    return bae.families.DiagonalNormal(mean, var, subset, is_linearised=is_linearised)


def test_is_exact_when_the_code_is_the_posterior(world):
    found = log_evidence(world.model("full"), world.x, codes=Amortised("full"), n_latent_draws=200, seed=0)
    truth = world.log_evidence()[None]
    for name in ("log_evidence", "elbo", "cubo"):
        torch.testing.assert_close(getattr(found, name), truth, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.ess, torch.full_like(truth, 200), rtol=0, atol=1e-8)
    assert float(found.standard_error.max()) < 1e-6 and float(found.elbo_standard_error.max()) < 1e-10
    assert found.n_draws == 200 and found.annealed is None


def test_standard_errors_are_those_of_the_estimates(world):
    """Seeds' errors over standard errors have mean square 1: not so if blocks of codes shared noise."""
    truth = world.log_evidence()
    z, z_elbo = [], []
    for seed in range(20):
        found = log_evidence(world.model("diagonal"), world.x, codes=amortised, n_latent_draws=4 * BLOCK, seed=seed)
        z.append((found.log_evidence[0] - truth) / found.standard_error[0])
        z_elbo.append((found.elbo[0] - truth + world.mean_field_gap) / found.elbo_standard_error[0])
    for values in (torch.stack(z), torch.stack(z_elbo)):
        assert values.numel() == 180  # mean square of 180: 1 +- 0.11
        assert 0.55 < float((values**2).mean()) < 1.5
        assert abs(float(values.mean())) < 4 / 180**0.5
    assert bool((found.elbo < found.log_evidence).all() and (found.log_evidence < found.cubo).all())


def test_cubo_is_the_chi_square_bound(world):
    """q wider than the posterior by 1.3: log E w^2 in closed form."""
    world = LinearGaussian.make(n_data=3, n_latents=1)
    model, scale = world.model("diagonal"), 1.3
    with torch.no_grad():
        model.encoder[0].bias[1] += math.log(scale)
    n = 20_000
    found = log_evidence(model, world.x, codes=amortised, n_latent_draws=n, seed=0)
    moment = math.log(scale) - 0.5 * math.log(2 - scale**-2)  # log E_q[(p/q)^2] for v = 1
    assert moment == pytest.approx(0.0912, abs=1e-4)
    fourth = 3 * math.log(scale) - 0.5 * math.log(4 - 3 * scale**-2)
    error = 0.5 * math.sqrt((math.exp(fourth - 2 * moment) - 1) / n)
    shift = found.cubo[0] - world.log_evidence() - 0.5 * moment
    assert float(shift.abs().max()) < 4 * error


def test_sums_equal_loops():
    generator = torch.Generator().manual_seed(0)
    values = 3 * torch.randn(7, 2, 3, dtype=torch.float64, generator=generator) - 900
    sums = LogWeights()
    for block in values.split([3, 3, 1]):
        sums.add(block)
    results = dict(zip(FIELDS, sums.results(), strict=True))
    for s in range(2):
        for b in range(3):
            logs = values[:, s, b].tolist()
            w = [math.exp(value + 900) for value in logs]
            mean, n = sum(w) / 7, 7
            spread = math.sqrt(sum((one - mean) ** 2 for one in w) / (n - 1) / n) / mean
            elbo = sum(logs) / n
            expected = {
                "log_evidence": math.log(mean) - 900,
                "ess": sum(w) ** 2 / sum(one**2 for one in w),
                "standard_error": spread,
                "elbo": elbo,
                "elbo_standard_error": math.sqrt(sum((one - elbo) ** 2 for one in logs) / (n - 1) / n),
                "cubo": 0.5 * math.log(sum(one**2 for one in w) / n) - 900,
            }
            for name, value in expected.items():
                assert float(results[name][s, b]) == pytest.approx(value, rel=1e-12, abs=1e-10), name


def test_one_draw_has_no_error_and_no_nan():
    sums = LogWeights()
    sums.add(torch.zeros(1, 2, 3))
    results = dict(zip(FIELDS, sums.results(), strict=True))
    assert bool(results["standard_error"].isinf().all() and results["elbo_standard_error"].isinf().all())
    assert not any(bool(value.isnan().any()) for value in results.values())
    mean = RunningMean()
    mean.add(torch.ones(1, 4))
    assert bool(mean.error().isinf().all())


def test_infinite_weights_are_refused():
    with pytest.raises(bae.errors.NonFiniteError, match="log weights"):
        LogWeights().add(torch.tensor([[[0.0]], [[-torch.inf]]]))


@pytest.mark.parametrize("is_linearised", [False, True])
def test_chunks_do_not_matter(world, is_linearised):
    model = world.model("diagonal")
    predictive = bae.Predictive(model, normal(model, is_linearised=is_linearised), amortised)
    sizes = {"n_latent_draws": 150, "n_weight_draws": 4, "seed": 3}
    one, other = (log_evidence(predictive, world.x, chunk_size=size, **sizes) for size in (None, 400))
    for name in FIELDS:
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=0, atol=1e-9)
    assert one.log_evidence.shape == (4, 9)
    torch.testing.assert_close(one.over_weights(), one.log_evidence.logsumexp(0) - math.log(4))


def test_equals_one_call_of_a_predictive_for_each_block(world):
    model = world.model("diagonal")
    params = {
        name: torch.stack([leaf.detach(), 1.1 * leaf.detach()]) for name, leaf in model.network.named_parameters()
    }
    predictive = bae.Predictive(model, bae.families.Particles(params), amortised)
    parts = []
    for start, n in ((0, BLOCK), (BLOCK, BLOCK), (2 * BLOCK, 44)):
        with bae.random.scope(5):
            seed = bae.random.derived_seed(start)
        parts.append(predictive(world.x, n_latent_draws=n, seed=seed).log_ratio)
    found = log_evidence(predictive, world.x, n_latent_draws=2 * BLOCK + 44, seed=5)
    expected = torch.cat(parts).logsumexp(0) - math.log(2 * BLOCK + 44)
    torch.testing.assert_close(found.log_evidence, expected, rtol=0, atol=1e-10)


def test_linearised_weights_agree_to_first_order(world):
    model = world.model("diagonal")
    one, other = (
        log_evidence(
            bae.Predictive(model, normal(model, 1e-8), amortised, linearised=linearised),
            world.x, n_latent_draws=50, n_weight_draws=3, seed=1,
        )
        for linearised in (False, True)
    )  # fmt: skip
    assert float((one.log_evidence - one.log_evidence[0]).abs().max()) > 1e-4
    torch.testing.assert_close(one.log_evidence, other.log_evidence, rtol=0, atol=1e-5)


def test_leaves_everything_as_it_was(world):
    model = world.model("diagonal")
    before, state = bae.functional.parameters_of(model), torch.get_rng_state()
    first, second = (log_evidence(model, world.x, codes=amortised, n_latent_draws=150, seed=4) for _ in range(2))
    assert torch.equal(first.log_evidence, second.log_evidence)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], leaf) for name, leaf in model.named_parameters())
    assert not torch.equal(log_evidence(model, world.x, codes=amortised, n_latent_draws=150).elbo, first.elbo)


def test_masked_rows_have_the_evidence_of_what_is_observed(world):
    observed = torch.tensor([True, False, True, True, False, True, True])
    x = torch.where(observed, world.x, torch.nan)
    found = log_evidence(world.model(), x, observed.expand_as(x), codes=Laplace(), n_latent_draws=9, seed=0)
    part = LinearGaussian(world.weight[observed], world.bias[observed], world.noise_var, world.x[:, observed])
    torch.testing.assert_close(found.log_evidence[0], part.log_evidence(), rtol=0, atol=1e-9)


def test_resampled_codes_are_a_proposal(world):
    codes = Importance(amortised, 5)
    found = log_evidence(world.model("diagonal"), world.x, codes=codes, n_latent_draws=800, seed=0)
    z = (found.log_evidence[0] - world.log_evidence()) / found.standard_error[0]
    assert float(z.abs().max()) < 4


def test_single_precision(world):
    model = world.model("diagonal").float()
    found = log_evidence(model, world.x.float(), codes=amortised, n_latent_draws=300, seed=0)
    wide = log_evidence(world.model("diagonal"), world.x, codes=amortised, n_latent_draws=300, seed=0)
    assert found.log_evidence.dtype == torch.float32
    torch.testing.assert_close(found.log_evidence.double(), wide.log_evidence, rtol=0, atol=1e-3)


def test_few_effective_draws_warn(world):
    model = world.model("diagonal")
    with torch.no_grad():
        model.encoder[0].bias += 3
    with pytest.warns(RuntimeWarning, match="effective sample size is near 1 of 100 for 100%"):
        found = log_evidence(model, world.x, codes=amortised, n_latent_draws=100, seed=0)
    assert not any(bool(getattr(found, name).isnan().any()) for name in FIELDS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log_evidence(model, world.x, codes=amortised, n_latent_draws=1, seed=0)


def test_reads_in_one_line(world):
    text = str(log_evidence(world.model(), world.x, codes=Amortised("full"), n_latent_draws=20, seed=0))
    assert f"log p(x) {float(world.log_evidence().mean()):.3f} +- 0.000 nats a row" in text
    assert "9 rows, 1 weight draws, 20 codes each, median ESS/K 1" in text


class TestErrors:
    def test_deterministic_codes(self, world, rows):
        model = small_model()
        weights = bae.families.Particles({k: v.detach()[None] for k, v in model.network.named_parameters()})
        for given in (model, bae.Predictive(model, weights), bae.Predictive(model, weights, bae.codes.encode)):
            with pytest.raises(bae.errors.UnsupportedError, match="deterministic encoder"):
                log_evidence(given, rows)

    def test_counts(self, world):
        with pytest.raises(bae.errors.DataError, match="n_latent_draws"):
            log_evidence(world.model(), world.x, codes=Amortised("full"), n_latent_draws=0)


def test_seeds_of_numbers_differ():
    seeds = set()
    for seed in range(30):
        with bae.random.scope(seed):
            state = torch.get_rng_state()
            seeds |= {bae.random.derived_seed(number) for number in range(30)}
            assert torch.equal(state, torch.get_rng_state())
    assert len(seeds) == 900
