"""How many weight draws and codes make how many draws, and that code and weights are told apart whatever M is."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import bayesae as bae
from bayesae.imputation import CodeLaplace, FixedPoint, ImportanceResampling, pool
from bayesae.imputation.base import shares
from bayesae.imputation.door import _numbers
from tests.imputation.worlds import MISSING, conditional, mask_of, predictive_of, world


def particles(n, **kwargs):
    return predictive_of(world().model("location"), None, shifts=(0.0,) * n, **kwargs)


def continuous():
    model = world().model("location")
    subset = bae.Subset.of(model.network)
    var = torch.full((len(subset),), 1e-4, dtype=torch.float64)
    return bae.Predictive(model, bae.families.DiagonalNormal(bae.functional.parameters_of(model.network), var, subset))


@pytest.mark.parametrize(
    ("n_draws", "n_weights", "expected"),
    [(50, 3, [16, 17, 17]), (51, 3, [17, 17, 17]), (7, 5, [1, 1, 2, 1, 2]), (5, 5, [1] * 5), (9, 1, [9])],
)
def test_shares_differ_by_one_and_the_smaller_ones_are_spread(n_draws, n_weights, expected):
    assert shares(n_draws, n_weights) == expected


@pytest.mark.parametrize(
    ("n_draws", "n_atoms", "expected"),
    [(50, 1, (1, 50)), (50, 5, (5, 10)), (50, 3, (3, 17)), (5, 3, (3, 2)), (4, 3, (3, 2)), (3, 3, (3, 1)),
     (2, 3, (2, 2)), (50, 200, (50, 2)), (50, None, (10, 5)), (99, None, (11, 9)), (20, None, (4, 5)),
     (22, None, (2, 11)), (49, None, (7, 7)), (39, None, (8, 5)), (19, None, (4, 5)), (11, None, (3, 4)),
     (10, None, (2, 5)), (9, None, (9, 2)), (1, None, (1, 2))],
)  # fmt: skip
def test_weight_draws_and_codes(n_draws, n_atoms, expected):
    predictive = continuous() if n_atoms is None else particles(n_atoms)
    n_weights, n_codes = _numbers(predictive, CodeLaplace(1), n_draws, None)
    assert (n_weights, n_codes) == expected
    assert n_weights * n_codes >= n_draws and (n_codes > 1 or n_draws == n_weights)


def test_points_take_a_code_for_every_draw_and_no_more():
    numbers = {n: _numbers(continuous(), FixedPoint(), n, None) for n in (1, 7, 12)}
    assert numbers == {1: (1, 1), 7: (7, 1), 12: (12, 1)}
    assert _numbers(particles(3), FixedPoint(), 7, None) == (3, 3)
    assert _numbers(particles(3), FixedPoint(), 2, None) == (2, 1)


@pytest.mark.parametrize("n_draws", [50, 51, 2])
def test_networks_that_are_alike_have_no_part_of_the_variance(n_draws):
    """Of rows that are copies of one: the parts of the closed form, but for the maximum with 0 of what weights do."""
    made, n_rows = world(), 400
    x = made.x[:1].expand(n_rows, 5)
    found = bae.impute(particles(3), x, mask_of(n_rows), method=CodeLaplace(1), n_draws=n_draws, seed=0)
    of_code = conditional(made, x)[1].diagonal() - 1
    parts = found.moments
    assert_close(parts.noise[:, MISSING], torch.ones(n_rows, 3).double())
    if n_draws > 2:
        assert_close(parts.code[:, MISSING].mean(0), of_code, rtol=0.05, atol=0)
        assert bool((parts.weights[:, MISSING].mean(0) < 0.03 * of_code).all())
    else:  # S = K = 2: two codes under two networks, and still nearly all of it the code's
        assert bool((parts.code[:, MISSING].mean(0) > 4 * parts.weights[:, MISSING].mean(0)).all())


@pytest.mark.parametrize("method", [CodeLaplace(1), FixedPoint(500, 1e-2)], ids=["drawn", "points"])
def test_draws_come_from_every_network_as_evenly_as_may_be(method):
    """Biases far apart: whose a draw is, is seen from where it lies."""
    made = world()
    predictive = predictive_of(made.model("location"), None, shifts=(-1e3, 0.0, 1e3))
    found = bae.impute(predictive, made.x[:4], mask_of(4), method=method, n_draws=11, seed=0)
    assert found.draws.shape == (11, 4, 5) and found.n_weight_draws == 3
    means = found.draws[:, :, MISSING].mean((1, 2))
    nests = means.split([3, 4, 4])
    assert all(float(nest.max() - nest.min()) < 10 for nest in nests)
    centres = [float(nest.mean()) for nest in nests]
    assert min(abs(one - other) for one, other in zip(centres, centres[1:] + centres[:1], strict=True)) > 20


@pytest.mark.filterwarnings("ignore:of the rows imputed:RuntimeWarning")
def test_moments_and_figures_are_of_all_codes_kept_or_not():
    made = world()
    predictive = predictive_of(made.model("diagonal"), bae.codes.amortised, shifts=(0.0, 0.5, 1.0))
    options = {"method": ImportanceResampling(300, bae.codes.Laplace(1)), "seed": 0, "chunk_size": 1500}
    few, all_of_them = (bae.impute(predictive, made.x, mask_of(40), n_draws=n, **options) for n in (10, 12))
    for name in ("mean", "variance", "ess", "acceptance"):
        assert torch.equal(getattr(few, name), getattr(all_of_them, name)), name
    kept = [0, 1, 2, 4, 5, 6, 8, 9, 10, 11]  # three, three and four of four each
    assert torch.equal(few.draws, all_of_them.draws[kept])
    assert 10 < float(few.ess.max()) <= 12


def test_a_record_with_uneven_networks_pools_as_many_draws_of_each():
    made = world()
    predictive = predictive_of(made.model("location"), None, shifts=(0.0, 2.0, 4.0))
    found = bae.impute(predictive, made.x, mask_of(40), method=CodeLaplace(1), n_draws=11, seed=0)
    pooled = found.pool(lambda x: (x.mean(0), x.var(0) / len(x)))
    even = found.draws[[0, 1, 2, 3, 4, 5, 7, 8, 9]]
    assert_close(pooled.var, pool(even.mean(1), even.var(1) / 40, n_nests=3).var)
    assert_close(pooled.estimate, even.mean((0, 1)))
    with pytest.raises(bae.errors.DataError, match="n_nests that divides the 11 completions"):
        pool(found.draws.mean(1), found.draws.var(1), n_nests=3)


def test_a_warning_counts_all_codes():
    """One code of the proposal for every network: three that count, of 51."""
    method = ImportanceResampling(1, bae.codes.Laplace(1))
    with pytest.warns(RuntimeWarning, match="4 in all, 4 have an effective sample size below 10% of their 51 codes"):
        bae.impute(particles(3), world().x[:4], mask_of(4), method=method, n_draws=50, seed=0)


def test_codes_of_rows_without_an_observed_entry_have_the_priors_variance():
    made, nothing = world(), torch.zeros(100, 5).bool()
    with pytest.warns(RuntimeWarning, match="100 of 100 rows have no observed entry"):
        found = bae.impute(particles(1), torch.zeros(100, 5), nothing, method=CodeLaplace(1), n_draws=200, seed=0)
    expected = made.weight.square().sum(1)
    assert_close(found.moments.code.mean(0) * 200 / 199, expected, rtol=4 * (2 / 20_000) ** 0.5, atol=0)


@pytest.mark.parametrize("of_method", [1, 30])
def test_chunks_leave_room_for_the_draws_and_for_the_methods_own_calls(of_method):
    """60 network rows: of 10 draws for six rows at a time, of a method that takes 30 a row for two."""
    seen = []

    class Seen(CodeLaplace):
        def n_parallel(self, n_codes, n_weight_draws):
            return of_method

        def __call__(self, problem, n_codes):
            seen.append(len(problem.rows.x))
            return super().__call__(problem, n_codes)

    options = {"n_draws": 9, "seed": 0, "chunk_size": 60}  # 2 of 5 are 10 codes
    bae.impute(particles(2), world().x[:12], mask_of(12), method=Seen(1), **options)
    assert set(seen) == {6 if of_method == 1 else 2}
