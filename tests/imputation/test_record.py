"""`Imputations`: intervals, parts of the variance, pooled estimates; and pooling by itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import bayesae as bae
from bayesae.imputation import CodeLaplace, FixedPoint, Pooled, pool
from bayesae.imputation.assembling import split_variance
from tests.imputation.worlds import MISSING, conditional, mask_of, predictive_of, world


def found(n_draws=39, shifts=(0.0,), n_rows=None, **kwargs):
    made = world()
    x = made.x if n_rows is None else made.x[:1].expand(n_rows, 5)
    predictive = predictive_of(made.model("location"), None, shifts=shifts)
    options = {"method": CodeLaplace(1), "n_draws": n_draws, "seed": 0} | kwargs
    return bae.impute(predictive, x, mask_of(len(x)), **options), x


class TestIntervals:
    def test_are_order_statistics(self):
        draws = found(39)[0]
        low, high = draws.interval(0.9)
        ordered = draws.draws.sort(0).values
        assert_close(low, ordered[1], rtol=0, atol=1e-12)
        assert_close(high, ordered[-2], rtol=0, atol=1e-12)
        low_half, high_half = draws.interval(0.885)  # place 2.3
        assert_close(low_half, 0.7 * ordered[1] + 0.3 * ordered[2], rtol=0, atol=1e-12)
        assert_close(high_half, 0.7 * ordered[-2] + 0.3 * ordered[-3], rtol=0, atol=1e-12)
        assert bool((low[draws.mask] == high[draws.mask]).all())

    @pytest.mark.parametrize(("level", "n_draws"), [(0.9, 19), (0.5, 39), (0.8, 29)])
    def test_cover_what_comes_from_where_the_draws_do(self, level, n_draws):
        draws, x = found(n_draws, n_rows=1500)
        mean, cov = conditional(world(), x)
        truth = mean[:, 0] + cov[0, 0].sqrt() * torch.randn(1500).double()
        low, high = (bound[:, MISSING[0]] for bound in draws.interval(level))
        coverage = float(((low <= truth) & (truth <= high)).double().mean())
        assert abs(coverage - level) < 4 * (level * (1 - level) / 1500) ** 0.5

    def test_of_a_fixed_point_leave_the_code_out_and_those_of_its_laplace_approximation_do_not(self):
        """Rows of the model: the fixed point is the conditional mean, its spread the noise's and not the law's."""
        made, n_rows = world(), 2000
        generator = torch.Generator().manual_seed(1)
        z, noise = (torch.randn(n_rows, size, generator=generator).double() for size in (2, 5))
        x, mask = z @ made.weight.T + made.bias + made.noise_var**0.5 * noise, mask_of(n_rows)
        ratio = (made.noise_var / conditional(made, x)[1].diagonal()).sqrt()
        expected = torch.erf(1.644854 * ratio / 2**0.5).mean()
        assert 0.67 < float(expected) < 0.71  # the 69 % of the docstrings
        for method, nominal in ((None, expected), (CodeLaplace(1), 0.9)):
            predictive = predictive_of(made.model("location"), None)
            found = bae.impute(predictive, x, mask, method=method, n_draws=99, seed=0)
            low, high = found.interval(0.9)
            inside = ((low <= x) & (x <= high))[:, MISSING].double().mean()
            assert abs(float(inside - nominal)) < 0.02
            assert bool(found.moments.code[:, MISSING].any()) == (method is not None)

    def test_the_whole_range_and_too_few_draws(self):
        draws = found(19)[0]
        low, high = draws.interval(0.9)
        assert_close(low, draws.draws.amin(0))
        assert_close(high, draws.draws.amax(0))
        with pytest.raises(bae.errors.DataError, match="39 draws or more for intervals of 0.95; got 19"):
            draws.interval(0.95)
        with pytest.raises(bae.errors.DataError, match=r"level of intervals in \(0, 1\)"):
            draws.interval(1.0)


class TestDensities:
    def test_are_those_of_the_conditional_normals_and_0_where_x_was_observed(self):
        made = world()
        draws, x = found(4000, n_rows=6)
        mean, cov = conditional(made, x)
        truth = x + torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).double()
        expected = torch.distributions.Normal(mean, cov.diagonal().sqrt()).log_prob(truth[:, MISSING])
        density = draws.log_prob(truth)
        assert density.shape == (6, 5) and not bool(density[draws.mask].any())
        assert_close(density[:, MISSING], expected, rtol=0.03, atol=0.03)
        assert torch.equal(density[~draws.mask], draws.moments.log_prob(truth)[~draws.mask])
        assert bool(draws.moments.log_prob(x)[draws.mask].isnan().all())  # what it is there for
        holed = torch.where(draws.mask, torch.nan, truth)
        assert torch.equal(draws.log_prob(holed), density) and torch.equal(draws.log_prob(truth.numpy()), density)

    @pytest.mark.parametrize(
        ("likelihood", "shape", "row"),
        [
            (bae.likelihoods.Bernoulli(), 5, [1.0, 0, 1, 1, 0]),
            (bae.likelihoods.Poisson(), 5, [2.0, 0, 1, 5, 3]),
            (bae.likelihoods.Categorical(3), (5, 3), [2.0, 0, 1, 1, 0]),
            (bae.likelihoods.Categorical(3, [1, 2, 4]), (5, 3), [4.0, 1, 2, 2, 1]),
            (bae.likelihoods.StudentT(6.0, scale=0.5), 5, [1.0, -0.5, 0.3, 2.0, 0.0]),
        ],
        ids=["Bernoulli", "Poisson", "Categorical", "values", "StudentT"],
    )
    def test_of_every_likelihood(self, likelihood, shape, row):
        torch.manual_seed(0)
        model = bae.Autoencoder(bae.nets.mlp(5, [4], (2, 2)), bae.nets.mlp(2, [4], shape), likelihood).double().eval()
        leaves = bae.functional.stack_draws([bae.functional.parameters_of(model.network)])
        predictive = bae.Predictive(model, bae.families.Particles(leaves), codes=bae.codes.amortised)
        x = torch.tensor(row).double().expand(3, 5)
        draws = bae.impute(predictive, x, mask_of(3), method=CodeLaplace(2), n_draws=20, seed=0)
        density = draws.log_prob(torch.where(draws.mask, torch.nan, x))
        assert density.shape == (3, 5) and not bool(density[draws.mask].any())
        assert bool((density[~draws.mask] < 0).all() and density.isfinite().all())
        if likelihood.is_nominal:
            share = draws.mean.gather(-1, x.long()[..., None])[..., 0]
            assert_close(density[~draws.mask], share[~draws.mask].log())

    def test_errors(self):
        draws, x = found(4, n_rows=3)
        with pytest.raises(bae.errors.ShapeError, match=r"x of shape \(3, 5\)"):
            draws.log_prob(x[:2])
        with pytest.raises(bae.errors.NonFiniteError, match="values of missing entries; got 9 NaN"):
            draws.log_prob(torch.full_like(x, torch.nan))
        points, _ = found(4, n_rows=3, method=FixedPoint(500))
        with pytest.raises(bae.errors.UnsupportedError, match=r"with a variance; got 9 that are points.*noise=True"):
            points.log_prob(x)


class TestParts:
    def test_are_those_of_the_conditional_normals(self):
        """Noise 1, code W S W^T, weights the variance of the conditional means."""
        made = world()
        draws, x = found(3000, shifts=(-1.0, 0.5, 3.0), n_rows=4, seed=1)
        means = torch.stack([conditional(made, x, shift=shift)[0] for shift in (-1.0, 0.5, 3.0)])
        cov = conditional(made, x)[1].diagonal()
        parts = draws.moments
        assert_close(parts.noise[:, MISSING], torch.ones(4, 3).double())
        assert_close(parts.code[:, MISSING].mean(0), cov - 1, rtol=0.1, atol=0)
        assert_close(parts.weights[:, MISSING], means.var(0, correction=0), rtol=0.1, atol=0)

    def test_of_nested_means_have_the_right_expectation(self):
        weights = torch.randn(4000, generator=torch.Generator().manual_seed(7)).double()
        means = weights + 2 * torch.randn(3, 4000).double()
        mean, code, between = split_variance(means)
        assert_close(code + between, means.var(correction=0))
        assert_close(mean, means.mean())
        assert abs(float(between) - 1) < 0.25 and abs(float(code) - 4) < 0.3

    def test_of_two_weight_draws_are_halved_and_hold_nothing_of_the_codes(self):
        """Divisor S; a scatter of codes that the correction took off S times over would show."""
        generator = torch.Generator().manual_seed(7)
        weights = 10 * torch.randn(2, 400_000, generator=generator).double()
        codes = 4 * torch.randn(2, 2, 400_000, generator=generator).double()
        ours, alone = (split_variance(weights + scale * codes)[2].mean() for scale in (1.0, 0.0))
        assert_close(alone, torch.tensor(50.0).double(), rtol=0.01, atol=0)
        # of the same weights: less of the noise; the maximum with 0 adds about a hundredth
        assert -0.2 < float(ours - alone) < 1.5

    def test_of_one_code_a_draw_all_goes_to_the_weights(self):
        means = torch.randn(1, 7, 2)
        _, code, between = split_variance(means)
        assert not bool(code.any())
        assert_close(between, means[0].var(0, correction=0))

    def test_of_the_weights_is_never_below_0_and_the_sum_stays(self):
        means = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])  # two codes under two networks whose means agree
        _, code, weights = split_variance(means)
        assert float(weights) == 0 and float(code) == 1

    def test_the_standard_error_is_that_of_the_mean(self):
        made = world()
        draws, x = found(40, n_rows=1500)
        shift = (draws.mean - conditional(made, x)[0].mean(0).new_zeros(5))[:, MISSING] - conditional(made, x)[0]
        ratio = shift.std(0) / draws.moments.standard_error[:, MISSING].square().mean(0).sqrt()
        assert_close(ratio, torch.ones(3).double(), rtol=0, atol=0.1)


class TestPool:
    def test_rubins_rules_by_hand(self):
        estimates, variances = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0.5, 0.7, 0.6])
        pooled = pool(estimates, variances)
        between = (4 + 1 + 9) / 2
        total = 0.6 + (1 + 1 / 3) * between
        assert float(pooled.estimate) == pytest.approx(3)
        assert float(pooled.var) == pytest.approx(total)
        assert float(pooled.dof) == pytest.approx(2 * (1 + 0.6 / (4 / 3 * between)) ** 2)
        assert float(pooled.missing_share) == pytest.approx(4 / 3 * between / total)
        low, high = pooled.interval(0.9)
        from scipy.stats import t

        half = t.ppf(0.95, float(pooled.dof)) * total**0.5
        assert (float(low), float(high)) == pytest.approx((3 - half, 3 + half))

    def test_small_samples_have_fewer_degrees_of_freedom(self):
        estimates, variances = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0.5, 0.7, 0.6])
        plain, small = pool(estimates, variances), pool(estimates, variances, complete_dof=5.0)
        observed = 6 / 8 * 5 * (1 - float(plain.missing_share))
        assert float(small.dof) == pytest.approx(1 / (1 / float(plain.dof) + 1 / observed))

    def test_completions_that_agree_leave_the_complete_data_variance(self):
        pooled = pool(torch.full((4, 2), 3.0), torch.full((4, 2), 0.2))
        assert_close(pooled.var, torch.full((2,), 0.2).double(), rtol=1e-6, atol=0)
        assert bool(pooled.dof.isinf().all()) and not bool(pooled.missing_share.any())
        assert_close(pooled.interval(0.95)[1], torch.full((2,), 3 + 1.959964 * 0.2**0.5).double(), rtol=1e-6, atol=0)

    def test_nested_rules_by_hand(self):
        q, u = torch.tensor([1.0, 2.0, 5.0, 7.0, 0.0, 1.0]), torch.full((6,), 0.5)
        pooled = pool(q, u, n_nests=3)
        between, within = 2 * torch.tensor([1.5, 6.0, 0.5]).var(), torch.tensor([0.5, 2.0, 0.5]).mean()
        terms = [0.5 * (1 + 1 / 3) * between, 0.5 * within]
        total = 0.5 + sum(terms)
        assert float(pooled.var) == pytest.approx(float(total))
        assert float(pooled.dof) == pytest.approx(
            float(1 / ((terms[0] / total) ** 2 / 2 + (terms[1] / total) ** 2 / 3))
        )

    def test_of_one_completion_a_nest_is_the_plain_rule(self):
        q, u = torch.randn(6, 2), torch.rand(6, 2)
        for name in ("var", "dof", "estimate"):
            for n_nests in (1, 6):
                assert_close(getattr(pool(q, u, n_nests=n_nests), name), getattr(pool(q, u), name))

    def test_intervals_are_those_of_students_law(self):
        from scipy.stats import t

        for dof in (1.5, 7.0, 80.0, 1e5):
            one = Pooled(torch.zeros(1).double(), torch.full((1,), 4.0).double(), torch.full((1,), dof).double(), 0.5)
            assert float(one.interval(0.9)[1]) == pytest.approx(2 * t.ppf(0.95, dof), rel=1e-9)

    def test_without_degrees_of_freedom_an_interval_is_infinite_and_no_nan(self):
        pooled = pool(torch.tensor([1.0, 2.0, 6.0]), torch.zeros(3), complete_dof=5.0)
        assert float(pooled.dof) == 0 and float(pooled.missing_share) == 1
        low, high = pooled.interval()
        assert float(low) == -torch.inf and float(high) == torch.inf

    def test_takes_arrays_and_numbers(self):
        draws = found(12)[0]
        table = draws.draws.numpy()
        arrays = pool(table.mean(1), table.var(1, ddof=1) / table.shape[1])
        assert_close(arrays.var, draws.pool(lambda x: (x.mean(0), x.var(0) / len(x))).var)
        one = draws.pool(lambda x: (float(x[:, 1].mean()), np.float64(x[:, 1].var() / len(x))))
        assert_close(one.var, arrays.var[1], rtol=1e-6, atol=0)

    @pytest.mark.slow
    def test_intervals_of_a_mean_cover(self):
        """Means of a column with two thirds missing, completed by the true model: 95 % of 400 tables."""
        inside, n_rows = [], 40
        generator = torch.Generator().manual_seed(0)
        for table in range(400):
            made = world(n_data=n_rows)
            x = torch.randn(n_rows, 2, generator=generator).double() @ made.weight.T + made.bias
            x = x + torch.randn(n_rows, 5, generator=generator).double()
            mask = torch.ones(n_rows, 5, dtype=torch.bool)
            mask[: 2 * n_rows // 3, MISSING] = False
            predictive = predictive_of(made.model("location"), None)
            draws = bae.impute(predictive, x, mask, method=CodeLaplace(1), n_draws=20, seed=table)
            low, high = draws.pool(lambda one: (one.mean(0), one.var(0) / len(one))).interval(0.95)
            inside.append((low <= made.bias) & (made.bias <= high))
        assert float(torch.stack(inside).double().mean()) > 0.93

    def test_a_record_pools_in_nests(self):
        draws = found(12, shifts=(0.0, 2.0, 4.0))[0]
        pooled = draws.pool(lambda x: (x.mean(0), x.var(0) / len(x)))
        stacked = draws.draws.mean(1), draws.draws.var(1) / draws.draws.shape[1]
        assert draws.n_weight_draws == 3
        assert_close(pooled.var, pool(*stacked, n_nests=3).var)
        assert bool((pooled.var > pool(*stacked).var)[MISSING].all())

    def test_errors(self):
        ones = torch.ones(4)
        with pytest.raises(bae.errors.ShapeError, match="M >= 2"):
            pool(ones[:1], ones[:1])
        with pytest.raises(bae.errors.ShapeError, match="of one shape"):
            pool(ones, ones[:2])
        with pytest.raises(bae.errors.DataError, match="variances of at least 0"):
            pool(ones, -ones)
        with pytest.raises(bae.errors.DataError, match="n_nests that divides the 4"):
            pool(ones, ones, n_nests=3)
        with pytest.raises(bae.errors.DataError, match="complete_dof above 0"):
            pool(ones, ones, complete_dof=0.0)
        with pytest.raises(bae.errors.NonFiniteError, match="estimates and variances"):
            pool(ones * torch.nan, ones)
