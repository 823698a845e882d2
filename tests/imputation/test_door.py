"""`impute`: what it takes, what it refuses, linearised weights, rows without anything observed."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from torch.testing import assert_close

import bayesae as bae
from bayesae.imputation import CodeHMC, CodeLaplace, FixedPoint, ImportanceResampling, MetropolisGibbs, PseudoGibbs
from bayesae.imputation.base import Problem
from bayesae.imputation.door import _warn
from bayesae.imputation.linearised import Linearised
from tests.conftest import small_model
from tests.imputation.worlds import MISSING, conditional, leaves_of, mask_of, predictive_of, world


def normal_weights(model, var=1.0, *, is_linearised):
    subset = bae.Subset.of(model.network, ["decoder.**"])
    mean = bae.functional.parameters_of(model.network)
    variances = torch.full((len(subset),), var, dtype=torch.float64)
    return bae.families.DiagonalNormal(mean, variances, subset, is_linearised=is_linearised)


class TestLinearisedWeights:
    @pytest.mark.parametrize(
        "method",
        [CodeLaplace(2), CodeHMC(5, 10), ImportanceResampling(50), MetropolisGibbs(3, 10), FixedPoint(20)],
        ids=lambda method: type(method).__name__,
    )
    @pytest.mark.filterwarnings("ignore:of the rows imputed:RuntimeWarning")
    def test_change_nothing_where_outputs_are_linear_in_them(self, method):
        made = world()
        model, mask = made.model("diagonal"), mask_of(6)
        found = []
        for is_linearised in (True, False):
            predictive = bae.Predictive(
                model, normal_weights(model, is_linearised=is_linearised), codes=bae.codes.amortised
            )
            found.append(bae.impute(predictive, made.x[:6], mask, method=method, n_draws=10, seed=0))
        assert found[0].n_weight_draws == (2 if method.draws_codes else 10)
        assert_close(found[0].draws, found[1].draws, rtol=0, atol=1e-8)
        assert bool((found[0].moments.weights[:, MISSING] > 0).any())

    def test_equal_a_loop_of_products(self):
        model = small_model()
        mean = {name: leaf[None] for name, leaf in bae.functional.parameters_of(model.network).items()}
        params = {name: leaf + 0.1 * torch.randn(3, *leaf.shape[1:]).double() for name, leaf in mean.items()}
        bound, z = Linearised(model, mean, params), torch.randn(4, 3, 5, 2).double()
        outputs = bound.decode(z)
        assert outputs.shape == (4, 3, 5, 7)
        for s in range(3):
            shift = {name: params[name][s : s + 1] - leaf for name, leaf in mean.items()}
            for k in range(4):

                def run(p, z=z[k, s]):
                    return model.at(p).decode(z[None])[0]

                value, slope = torch.func.jvp(run, (mean,), (shift,))
                assert_close(outputs[k, s], value + slope, rtol=0, atol=1e-12)

    def test_are_what_methods_run_where_the_predictive_is_linearised(self):
        model = small_model()
        for is_linearised in (True, False):
            weights = normal_weights(model, 0.1, is_linearised=is_linearised)
            rows = bae.Batch(torch.ones(2, 7).double(), torch.ones(2, 7).bool(), index=torch.arange(2))
            problem = Problem(bae.Predictive(model, weights), weights.sample(3), rows, 0)
            assert isinstance(problem.model, Linearised) == is_linearised
            assert [one.first for one in problem.singles()] == [0, 1, 2]

    @pytest.mark.filterwarnings("ignore:of the rows imputed:RuntimeWarning")
    def test_of_a_laplace_posterior_in_six_lines(self):
        made = world()
        model = bae.Autoencoder(bae.nets.mlp(5, [8], 2), bae.nets.mlp(2, [8], 5), bae.likelihoods.Gaussian()).double()
        bae.fit_model(model, made.x, epochs=3, seed=0, progress=False)
        weights = bae.fit_weights(bae.weights.Laplace(), model, made.x, progress=False)
        found = bae.impute(bae.Predictive(model, weights), made.x, mask_of(40), n_draws=20, seed=0)
        assert found.n_weight_draws == 20 and found.draws.shape == (20, 40, 5)
        assert bool((found.moments.weights[:, MISSING] > 0).all() and (found.moments.noise[:, MISSING] > 0).all())


class TestRowsWithNothingObserved:
    @pytest.mark.filterwarnings("ignore:of the rows imputed:RuntimeWarning")
    @pytest.mark.parametrize(
        "method",
        [FixedPoint(noise=True), PseudoGibbs(2, 8), CodeLaplace(1), CodeHMC(3, 8)],
        ids=lambda m: type(m).__name__,
    )
    def test_are_drawn_from_the_prior(self, method):
        made = world()
        x = made.x[:1].expand(400, 5)
        mask = mask_of(400)
        mask[::2] = False
        predictive = predictive_of(made.model("diagonal"), bae.codes.amortised)
        with pytest.warns(RuntimeWarning, match="200 of 400 rows have no observed entry"):
            found = bae.impute(predictive, x, mask, method=method, n_draws=5, seed=0, chunk_size=500)
        drawn = found.draws[:, ::2].flatten(0, 1)
        cov = made.weight @ made.weight.T + torch.eye(5).double()
        shift = (drawn - made.bias).mean(0) / (cov.diagonal() / 1000).sqrt()
        assert float(shift.abs().max()) < 4
        assert float(((drawn - made.bias).square().mean(0) / cov.diagonal() - 1).abs().max()) < 4 * (2 / 1000) ** 0.5
        assert bool((found.ess[::2] == 5).all()) and torch.equal(found.draws[:, mask], x[mask].expand(5, -1))

    def test_alone_are_all_there_is(self):
        made = world()
        with pytest.warns(RuntimeWarning, match="3 of 3 rows"):
            found = bae.impute(
                predictive_of(made.model("location"), None), torch.full((3, 5), torch.nan), method=CodeHMC(), n_draws=5
            )
        assert found.draws.shape == (5, 3, 5) and found.rhat is None and bool(found.draws.isfinite().all())


class TestNumbersOfDraws:
    def n_weights(self, n_draws, method, n_atoms=None, given=None):
        made = world()
        model = made.model("diagonal")
        if n_atoms is None:
            predictive = bae.Predictive(
                model, normal_weights(model, 1e-4, is_linearised=False), codes=bae.codes.amortised
            )
        else:
            predictive = predictive_of(model, bae.codes.amortised, shifts=(0.0,) * n_atoms)
        options = {"method": method, "n_draws": n_draws, "n_weight_draws": given, "seed": 0}
        return bae.impute(predictive, made.x[:2], mask_of(2), **options).n_weight_draws

    def test_of_weights(self):
        laplace = CodeLaplace(1)
        assert self.n_weights(50, laplace) == 10 and self.n_weights(20, laplace) == 4
        assert self.n_weights(7, laplace) == 7  # nothing divides it
        assert self.n_weights(50, laplace, n_atoms=1) == 1 and self.n_weights(50, laplace, n_atoms=5) == 5
        assert self.n_weights(50, laplace, n_atoms=3) == 3
        assert self.n_weights(50, laplace, given=25) == 25
        assert self.n_weights(12, FixedPoint(500, 1e-3)) == 12

    def test_chunks_bound_memory_and_change_no_law(self):
        made = world()
        predictive = predictive_of(made.model("location"), None)
        options = {"method": CodeLaplace(1), "n_draws": 400, "seed": 0}
        whole, parts = (
            bae.impute(predictive, made.x[:5], mask_of(5), chunk_size=size, **options) for size in (None, 400)
        )
        assert_close(whole.moments.total, parts.moments.total, rtol=0, atol=1e-10)  # codes are keyed on rows
        assert not torch.equal(whole.draws, parts.draws)

    @pytest.mark.filterwarnings("ignore:of the rows imputed:RuntimeWarning")
    def test_without_draws_mean_variance_and_figures_are_the_same(self):
        made = world()
        predictive = predictive_of(made.model("diagonal"), bae.codes.amortised, shifts=(0.0, 0.5))
        options = {"method": CodeHMC(3, 10), "n_draws": 40, "seed": 0, "chunk_size": 160}
        whole, short = (
            bae.impute(predictive, made.x, mask_of(40), keep_draws=keep, **options) for keep in (True, False)
        )
        assert short.draws.shape == (0, 40, 5) and short.draws.untyped_storage().nbytes() == 0
        for name in ("mean", "variance", "ess", "rhat", "acceptance", "n_divergent", "n_weight_draws"):
            assert torch.equal(torch.as_tensor(getattr(whole, name)), torch.as_tensor(getattr(short, name))), name
        for read in (short.interval, lambda: short.pool(lambda x: (x.mean(0), x.var(0)))):
            with pytest.raises(bae.errors.DataError, match=r"draws that were kept; got .*\(keep_draws=True"):
                read()

    def test_that_are_all_particles_leave_no_error_of_the_weights(self):
        """Of a mixture too: one draw of two networks is not all of them."""
        made = world()
        model = made.model("location")
        parts = [bae.families.Particles(bae.functional.stack_draws([leaves_of(model, shift)])) for shift in (0.0, 3.0)]
        predictive = bae.Predictive(model, bae.families.Mixture(parts))
        options = {"method": CodeLaplace(1), "n_draws": 12, "seed": 0}
        for n, share in ((1, torch.inf), (2, 0.0), (3, 1 / 2), (4, 0.0)):
            found = bae.impute(predictive, made.x[:4], mask_of(4), n_weight_draws=n, **options)
            parts = found.moments
            of_weights = torch.zeros_like(parts.mean) if n % 2 == 0 else share * parts.weights.clamp(min=1e-9)
            expected = (parts.code / found.ess[:, None] + of_weights).sqrt()
            assert_close(parts.standard_error[:, MISSING], expected[:, MISSING])
            assert not bool(parts.standard_error[:, [0, 2]].any())

    def test_a_mixture_completes_with_the_noise_of_its_components(self):
        made = world()
        model = made.model("full")
        subset, parts = bae.Subset.of(model.network), []
        for scale in (1e-6, 1e3):
            noise = bae.likelihoods.Gaussian(scale).double().state_dict()
            zeros = torch.zeros(len(subset), dtype=torch.float64)
            parts.append(bae.families.DiagonalNormal(leaves_of(model), zeros, subset, noise=noise))
        predictive = bae.Predictive(model, bae.families.Mixture(parts), codes=bae.codes.Amortised("full"))
        x = made.x[:1].expand(40, 5)
        found = bae.impute(predictive, x, mask_of(40), method=CodeLaplace(1), n_draws=20, n_weight_draws=2, seed=0)
        assert_close(found.moments.noise[:, MISSING], torch.full((40, 3), 5e5).double())
        spread = found.draws[..., MISSING].std(1).amax(-1)
        assert bool((spread[:10] < 20).all()) and bool((spread[10:] > 300).all())


def test_without_a_method_it_follows_the_code():
    made = world()
    x, mask = made.x[:1].expand(300, 5), mask_of(300)
    mean, cov = conditional(made, x)
    cases = (("location", None), ("location", bae.codes.encode), ("diagonal", bae.codes.amortised))
    for family, codes in cases:
        found = bae.impute(predictive_of(made.model(family), codes), x, mask, n_draws=30, seed=0)
        assert (found.residual is None) == (family == "diagonal")
        assert_close(found.mean[:, MISSING].mean(0), mean[0], rtol=0, atol=0.1)
        assert_close(found.moments.noise[:, MISSING], torch.ones(300, 3).double())
    assert bool((found.acceptance > 0.99).all())  # a Laplace proposal is exact here, the encoder's is not
    assert_close(found.variance[:, MISSING].mean(0), cov.diagonal(), rtol=0.1, atol=0)


class TestWarnings:
    def said(self, n_bad, method, **figures):
        n, ess = 100, figures.pop("ess", (50.0, 50.0))

        def column(good, bad):
            return torch.cat([torch.full((n - n_bad,), good), torch.full((n_bad,), bad)])

        named = {name: column(*values) for name, values in figures.items()}
        zeros = torch.zeros(n, 1)
        moments = bae.Moments(zeros, zeros, zeros, zeros, bae.likelihoods.Bernoulli())
        found = bae.Imputations(torch.zeros(50, n, 1), zeros.bool(), moments, 1, column(*ess), **named)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            _warn(found, torch.ones(n).bool(), method, 50)
        return [str(one.message) for one in caught]

    @pytest.mark.parametrize(
        ("figures", "match"),
        [
            ({"ess": (6.0, 4.0)}, "an effective sample size below 10% of their 50 codes"),
            ({"rhat": (1.09, 1.11)}, r"a split R-hat above 1\.1"),
            ({"rhat": (1.0, torch.inf)}, "a split R-hat"),
            ({"acceptance": (0.06, 0.04)}, "under 5% of their proposals taken"),
        ],
    )
    def test_say_what_more_than_a_twentieth_of_the_rows_has_where_it_is_an_estimate(self, figures, match):
        (text,) = self.said(6, CodeHMC(), **figures)
        assert re.search(f"of the rows imputed by CodeHMC, 100 in all, 6 have {match}", text)
        assert self.said(5, CodeHMC(), **figures) == []

    @pytest.mark.parametrize(
        ("method", "figures", "match"),
        [
            (CodeHMC(), {"n_divergent": (0.0, 1.0)}, "chains that diverged"),
            (FixedPoint(), {"residual": (1e-4, 1.1e-4)}, "not come to a fixed point"),
            (FixedPoint(tolerance=1e-2), {"residual": (1e-2, 1.1e-2)}, "not come to a fixed point"),
        ],
    )
    def test_count_every_row_where_it_is_no_chance(self, method, figures, match):
        (text,) = self.said(1, method, **figures)
        assert re.search(f"100 in all, 1 have {match}. Their draws may be far", text)
        assert self.said(0, method, **figures) == []

    def test_name_the_one_row_of_many_that_did_not_converge(self):
        """A row a million times as far away as the others."""
        made = world()
        x = torch.cat([made.x[:1].expand(39, 5), 1e6 * made.x[5:6]])
        with pytest.warns(RuntimeWarning, match=r"by FixedPoint, 40 in all, 1 have not come to a fixed point\. Their"):
            found = bae.impute(
                predictive_of(made.model("location"), None), x, mask_of(40), method=FixedPoint(60), n_draws=2
            )
        assert int((found.residual > 1e-4).sum()) == 1 and float(found.residual[-1]) > 1

    def test_point_at_the_caller(self):
        made = world()
        predictive, nothing = predictive_of(made.model("location"), None), torch.zeros(40, 5).bool()
        with pytest.warns(RuntimeWarning) as caught:
            bae.impute(predictive, made.x, nothing, method=CodeLaplace(1), n_draws=1)
            bae.impute(predictive, made.x, mask_of(40), method=FixedPoint(1), n_draws=1)
        assert [one.filename for one in caught] == [__file__, __file__]


class TestErrors:
    def run(self, x=None, mask=None, codes=None, **kwargs):
        made = world()
        x = made.x if x is None else x
        predictive = predictive_of(made.model("location"), codes)
        return bae.impute(predictive, x, mask, **({"method": CodeLaplace(1), "n_draws": 4} | kwargs))

    def test_rows_and_masks(self):
        x, mask = world().x, mask_of(40)
        with pytest.raises(bae.errors.DataError, match="a missing entry; got rows without any"):
            self.run(x)
        with pytest.raises(bae.errors.DataError, match="a missing entry"):
            self.run(x, torch.ones_like(mask))
        with pytest.raises(bae.errors.ShapeError, match="a mask of"):
            self.run(x, mask[:, :4])
        with pytest.raises(bae.errors.ShapeError, match="a mask of"):
            self.run(x, mask.float())
        infinite = torch.where(mask, x, torch.nan)
        infinite[3, 0] = torch.inf
        with pytest.raises(bae.errors.NonFiniteError, match="1 NaN or infinite values in 'x'"):
            self.run(infinite)
        with pytest.raises(bae.errors.NonFiniteError, match="finite data"):
            self.run(torch.where(mask, torch.nan, x), mask)
        with pytest.raises(bae.errors.UnsupportedError, match="explain themselves"):
            self.run(bae.Batch(x, mask, target=x))
        narrow = bae.Autoencoder(bae.nets.mlp(5, [4], 2), bae.nets.mlp(2, [4], 5), bae.likelihoods.Gaussian(1.0))
        particles = bae.functional.stack_draws([bae.functional.parameters_of(narrow.bfloat16().eval().network)])
        with pytest.raises(bae.errors.UnsupportedError, match=r"networks of float32 or float64; got torch.bfloat16"):
            bae.impute(bae.Predictive(narrow, bae.families.Particles(particles)), x.bfloat16(), mask)
        with pytest.raises(bae.errors.DataError, match="at least one row"):
            self.run(x[:0], mask[:0])
        model = bae.Autoencoder(bae.nets.mlp(5, [4], 2), bae.nets.mlp(2, [4], 5), bae.likelihoods.Bernoulli()).eval()
        particles = bae.functional.stack_draws([bae.functional.parameters_of(model.network)])
        with pytest.raises(bae.errors.DataError, match="Bernoulli"):
            bae.impute(bae.Predictive(model, bae.families.Particles(particles)), torch.full((40, 5), 2.0), mask)

    def test_arguments(self):
        x, mask = world().x, mask_of(40)
        with pytest.raises(bae.errors.UnsupportedError, match="a method of imputation"):
            self.run(x, mask, method=CodeLaplace)
        with pytest.raises(bae.errors.DataError, match="n_draws of at least 1"):
            self.run(x, mask, n_draws=0)
        with pytest.raises(bae.errors.DataError, match="n_weight_draws that divides the 4 draws"):
            self.run(x, mask, n_weight_draws=3)
        with pytest.raises(bae.errors.UnsupportedError, match="a Normal code posterior"):
            self.run(x, mask, method=PseudoGibbs())
        with pytest.raises(bae.errors.UnsupportedError, match="a proposal with a density"):
            self.run(x, mask, method=ImportanceResampling())
        with pytest.raises(bae.errors.DataError, match="n_steps of at least 8 for 16 codes of 2 chains"):
            self.run(x, mask, method=CodeHMC(1, 4), n_draws=16)
        for bad in (lambda: CodeHMC(n_chains=0), lambda: PseudoGibbs(n_steps=0), lambda: CodeLaplace(0)):
            with pytest.raises(bae.errors.DataError, match="of at least 1"):
                bad()
        with pytest.raises(bae.errors.DataError, match="tolerance, a number above 0"):
            FixedPoint(tolerance=0.0)
        with pytest.raises(bae.errors.DataError, match="n of at least 1"):
            ImportanceResampling(0)

    def test_a_decoder_that_overflows_says_so(self):
        made = world()
        predictive = predictive_of(made.model("location"), None, shifts=(1e200,))
        with pytest.raises(bae.errors.NonFiniteError, match="where chains start"):
            bae.impute(predictive, made.x, mask_of(40), method=CodeHMC(1, 4), n_draws=4)
        with pytest.raises(bae.errors.NonFiniteError, match="finite imputations"):
            nowhere = predictive_of(made.model("location"), None, shifts=(1.5e308,))
            bae.impute(nowhere, made.x, mask_of(40), method=FixedPoint(3), n_draws=4)
        wide = predictive.model.with_noise(bae.likelihoods.Gaussian(1e154).double().state_dict())  # 4 of 1e308 overflow
        with pytest.raises(bae.errors.NonFiniteError, match="values in 'noise'.*two moments"):
            bae.impute(predictive_of(wide, None), made.x, mask_of(40), method=FixedPoint(1, noise=True), n_draws=4)
        options = {"method": ImportanceResampling(5, bae.codes.Laplace(0)), "n_draws": 4}
        with pytest.raises(bae.errors.NonFiniteError, match="importance weights; got NaN, or nothing above 0, in 40"):
            bae.impute(predictive, made.x, mask_of(40), **options)
