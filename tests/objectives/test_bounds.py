"""Every bound against a Python loop, its special cases, and the world where the evidence is known."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace

import pytest
import torch

import bayesae as bae
from bayesae.objectives import (
    CIWAE,
    CUBO,
    ELBO,
    PIWAE,
    AnnealedELBO,
    DReG,
    MultiplyIWAE,
    Renyi,
    WarmUp,
    dreg,
    elbo,
    iwae,
    reweighted_wake_sleep,
    sampled_elbo,
)
from bayesae.testing import LinearGaussian
from tests.objectives.conftest import B, G, K, M, S


def log_mean_exp(values):
    return math.log(sum(math.exp(v) for v in values) / len(values))


def mean(values):
    return sum(values) / len(values)


def softmax(values):
    return [math.exp(v) / sum(math.exp(u) for u in values) for v in values]


def loop(draws, of):
    """A bound row by row, from lists of log p(x | z), log p(z), log q and parts of the KL."""
    out = torch.empty(S, B, dtype=torch.float64)
    for s in range(S):
        for b in range(B):
            lists = [
                [float(t[k, s, b]) for k in range(K)] for t in (draws.log_likelihood, draws.log_prior, draws.log_q)
            ]
            out[s, b] = of(*lists, [float(draws.kl[s, b, g]) for g in range(G)])
    return out


def ratios(likelihood, prior, q):
    return [a + b - c for a, b, c in zip(likelihood, prior, q, strict=True)]


def on_ratios(of):
    return lambda likelihood, prior, q, kl: of(ratios(likelihood, prior, q))


def in_groups(w):
    return mean([log_mean_exp(w[m * (K // M) : (m + 1) * (K // M)]) for m in range(M)])


def annealed(likelihood, prior, q, kl):
    return mean([0.3 * (a + b) - c for a, b, c in zip(likelihood, prior, q, strict=True)])


TWINS = [
    (elbo, lambda likelihood, prior, q, kl: mean(likelihood) - sum(kl)),
    (ELBO(2.5), lambda likelihood, prior, q, kl: mean(likelihood) - 2.5 * sum(kl)),
    (sampled_elbo, on_ratios(mean)),
    (AnnealedELBO(factor=0.3), annealed),
    (iwae, on_ratios(log_mean_exp)),
    (MultiplyIWAE(M), on_ratios(in_groups)),
    (CIWAE(0.3), on_ratios(lambda w: 0.3 * mean(w) + 0.7 * log_mean_exp(w))),
    (Renyi(0.4), on_ratios(lambda w: log_mean_exp([0.6 * v for v in w]) / 0.6)),
    (Renyi(-2.0), on_ratios(lambda w: log_mean_exp([3 * v for v in w]) / 3)),
    (Renyi(1.5), on_ratios(lambda w: -2 * log_mean_exp([-0.5 * v for v in w]))),
    (Renyi(-math.inf), on_ratios(max)),
    (Renyi(math.inf), on_ratios(min)),
]


@pytest.mark.parametrize(("objective", "twin"), TWINS, ids=lambda v: repr(v)[:40] if not callable(v) else None)
def test_bounds_equal_their_loops(draws, objective, twin):
    torch.testing.assert_close(objective(draws), loop(draws, twin), rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:CUBO")
def test_cubo_equals_its_loop(draws):
    expected = loop(draws, on_ratios(lambda w: log_mean_exp([2.5 * v for v in w]) / 2.5))
    torch.testing.assert_close(CUBO(2.5)(draws), expected, rtol=1e-12, atol=1e-12)
    ess = loop(draws, on_ratios(lambda w: 1 / sum(v**2 for v in softmax([2.5 * u for u in w]))))
    torch.testing.assert_close(CUBO(2.5).ess(draws), ess, rtol=1e-12, atol=1e-12)


def test_two_bounds_equal_their_loops(draws):
    both = PIWAE(M)(draws)
    assert list(both) == ["decoder", "encoder"]
    torch.testing.assert_close(both["decoder"], loop(draws, on_ratios(log_mean_exp)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(both["encoder"], loop(draws, on_ratios(in_groups)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("objective", "coefficient", "bound"),
    [
        (dreg, lambda share: share**2, iwae),
        (DReG(0.3), lambda share: 0.3 / K + 0.7 * share**2, CIWAE(0.3)),
        (reweighted_wake_sleep, lambda share: share - share**2, iwae),
    ],
)
def test_surrogates_equal_their_loops(draws, objective, coefficient, bound):
    def of(w):
        return sum(coefficient(share) * v for share, v in zip(softmax(w), w, strict=True))

    both = objective(replace(draws, is_path_gradient=True))
    torch.testing.assert_close(both["encoder"], loop(draws, on_ratios(of)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(both["decoder"], bound(draws), rtol=0, atol=0)


class TestSpecialCases:
    def equal(self, one, other, atol=1e-12):
        torch.testing.assert_close(one, other, rtol=0, atol=atol)

    def test_iwae_of_one_draw_is_the_sampled_elbo(self, draws):
        cut = {name: getattr(draws, name)[:1] for name in ("latents", "log_likelihood", "log_prior", "log_q")}
        one = replace(draws, **cut)
        self.equal(iwae(one), sampled_elbo(one))

    def test_one_group_is_iwae_and_groups_of_one_are_the_sampled_elbo(self, draws):
        self.equal(MultiplyIWAE(1)(draws), iwae(draws))
        self.equal(MultiplyIWAE(K)(draws), sampled_elbo(draws))

    def test_ends_of_ciwae(self, draws):
        self.equal(CIWAE(0.0)(draws), iwae(draws))
        self.equal(CIWAE(1.0)(draws), sampled_elbo(draws))

    def test_piwae_of_one_group_is_iwae_twice(self, draws):
        both = PIWAE(1)(draws)
        self.equal(both["decoder"], iwae(draws))
        self.equal(both["encoder"], iwae(draws))

    def test_renyi_limits(self, draws):
        self.equal(Renyi(0.0)(draws), iwae(draws))
        self.equal(Renyi(1.0)(draws), sampled_elbo(draws))
        self.equal(Renyi(1 - 1e-6)(draws), sampled_elbo(draws), 1e-4)
        self.equal(Renyi(1 + 1e-6)(draws), sampled_elbo(draws), 1e-4)
        for end in (-1e6, 1e6):
            self.equal(Renyi(end)(draws), Renyi(math.copysign(math.inf, end))(draws), 1e-4)

    @pytest.mark.filterwarnings("ignore:CUBO")
    def test_cubo_is_renyi_of_a_negative_order(self, draws):
        self.equal(CUBO(2.0)(draws), Renyi(-1.0)(draws))

    def test_plain_objects_are_the_plain_functions(self, draws):
        self.equal(ELBO()(draws), elbo(draws))
        self.equal(ELBO(warm_up=WarmUp())(draws), elbo(draws))
        self.equal(AnnealedELBO()(draws), sampled_elbo(draws))
        path = replace(draws, is_path_gradient=True)
        self.equal(elbo(path), sampled_elbo(path))
        self.equal(elbo(replace(draws, kl=None)), sampled_elbo(draws))

    def test_same_draws_give_bounds_in_order(self, draws):
        orders = (-math.inf, -4.0, -0.5, 0.0, 0.3, 0.7, 1.0, 1.5, 4.0, math.inf)
        values = torch.stack([Renyi(order)(draws) for order in orders])
        assert bool((values.diff(dim=0) < 0).all())
        values = torch.stack([MultiplyIWAE(n)(draws) for n in (12, 6, 3, 1)])
        assert bool((values.diff(dim=0) > 0).all())


OBJECTIVES = [
    elbo, sampled_elbo, iwae, ELBO(2.0, free_bits=0.2), AnnealedELBO(factor=0.5), MultiplyIWAE(3), CIWAE(0.2), PIWAE(4),
    Renyi(0.5), dreg, DReG(0.5), reweighted_wake_sleep, Renyi(-math.inf),
]  # fmt: skip


@pytest.mark.parametrize("objective", OBJECTIVES)
class TestAllConform:
    def test_maps_pickles_and_keeps_the_axes(self, draws, objective):
        draws = replace(draws, is_path_gradient=True)
        assert pickle.loads(pickle.dumps(objective)) == objective

        def values(log_likelihood):
            found = objective(replace(draws, log_likelihood=log_likelihood))
            return {"decoder": found} if isinstance(found, torch.Tensor) else dict(found)

        stacked = torch.stack([draws.log_likelihood, 2 * draws.log_likelihood, -draws.log_likelihood])
        mapped = torch.func.vmap(values)(stacked)
        for at, one in enumerate(stacked):
            for name, value in values(one).items():
                assert value.shape == (S, B)
                torch.testing.assert_close(mapped[name][at], value, rtol=1e-12, atol=1e-12)

    def test_a_deterministic_code_has_no_bound(self, draws, objective):
        with pytest.raises(bae.errors.UnsupportedError, match="has no density"):
            objective(replace(draws, log_q=None, kl=None))


def exact_draws(n):
    world = LinearGaussian.make(n_data=9, correlation=0.8)
    model = world.model("full")
    params = {name: leaf.detach()[None] for name, leaf in model.network.named_parameters()}
    with bae.random.scope(0), torch.no_grad():
        codes = bae.codes.Amortised("full", gradient="path")
        return world, codes(model.at(params), world.batch, n_latent_draws=n)


def test_all_bounds_are_the_evidence_where_q_is_the_posterior():
    world, draws = exact_draws(12)
    bounds = (elbo, sampled_elbo, iwae, MultiplyIWAE(3), CIWAE(0.4), Renyi(0.5), Renyi(-3.0), Renyi(4.0), CUBO(2.0))
    values = [bound(draws) for bound in (*bounds, Renyi(-math.inf))]
    values += [objective(draws)["decoder"] for objective in (PIWAE(4), dreg, DReG(0.4), reweighted_wake_sleep)]
    for value in [*values, PIWAE(4)(draws)["encoder"]]:
        torch.testing.assert_close(value, world.log_evidence()[None], rtol=0, atol=1e-9)


def test_expected_iwae_rises_with_its_draws_up_to_the_evidence():
    world = LinearGaussian.make(n_data=4, correlation=0.8)
    model = world.model("diagonal")
    params = {name: leaf.detach()[None] for name, leaf in model.network.named_parameters()}
    with bae.random.scope(1), torch.no_grad():
        draws = bae.codes.amortised(model.at(params), world.batch, n_latent_draws=32 * 3000)
    blocks = draws.log_ratio.unflatten(0, (3000, 32))  # 3000 repeats of 32 draws
    bounds = torch.stack([blocks[:, :k].logsumexp(1) - math.log(k) for k in (1, 2, 8, 32)])[:, :, 0]
    torch.testing.assert_close(MultiplyIWAE(3000)(draws)[0], bounds[-1].mean(0))
    steps = bounds.diff(dim=0)
    assert bool((steps.mean(1) > 4 * steps.std(1) / 3000**0.5).all())
    error = bounds[-1].std(0) / 3000**0.5
    assert bool((bounds[-1].mean(0) < world.log_evidence() + 4 * error).all())


class TestErrors:
    @pytest.mark.parametrize(
        ("build", "match"),
        [
            (lambda: ELBO(-1.0), "beta of at least 0"),
            (lambda: ELBO(free_bits=math.nan), "free_bits of at least 0"),
            (lambda: AnnealedELBO(factor=1.5), r"a factor in \[0, 1\]"),
            (lambda: MultiplyIWAE(0), "n_groups of at least 1"),
            (lambda: PIWAE(2.5), "n_groups of at least 1, whole"),
            (lambda: CIWAE(1.1), r"beta in \[0, 1\]"),
            (lambda: DReG(-0.1), r"beta in \[0, 1\]"),
            (lambda: Renyi(math.nan), "alpha, a number"),
            (lambda: CUBO(1.0), "order n above 1"),
            (lambda: WarmUp(0.0), r"share in \(0, 1\]"),
            (lambda: WarmUp(start=1.5), r"start in \[0, 1\]"),
            (lambda: WarmUp(n_cycles=0), "n_cycles of at least 1"),
        ],
    )
    def test_numbers_out_of_range(self, build, match):
        with pytest.raises(bae.errors.DataError, match=match):
            build()

    def test_groups_that_do_not_divide_the_draws(self, draws):
        with pytest.raises(bae.errors.ShapeError, match="5 groups of one size; got K = 12"):
            PIWAE(5)(draws)

    @pytest.mark.parametrize("objective", [dreg, reweighted_wake_sleep])
    def test_surrogates_need_path_gradients(self, draws, objective):
        with pytest.raises(bae.errors.UnsupportedError, match=r'codes.Amortised\(gradient="path"\)'):
            objective(draws)

    def test_wake_sleep_of_one_draw(self):
        with pytest.raises(bae.errors.ShapeError, match="at least two code draws"):
            reweighted_wake_sleep(exact_draws(1)[1])
