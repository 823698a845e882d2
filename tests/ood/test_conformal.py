"""Thresholds, conformal p-values, their combination and false discovery rates."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
import torch
from scipy import optimize, stats
from torch.testing import assert_close

import bayesae as bae
from bayesae.ood import CombinedCalibration, ConformalCalibration

F64 = {"dtype": torch.float64}


def exchangeable(n_worlds, n, n_levels=None):
    """Calibration (n_worlds, n) and one new score a world; skewed, with ties if there are levels."""
    scores = torch.distributions.Exponential(1.0).sample((n_worlds, n + 1)).double()
    scores = scores if n_levels is None else (scores * n_levels).floor()
    return scores[:, :-1], scores[:, -1:]


def binomial_interval(n, p, level=0.99):
    return stats.binom.ppf([(1 - level) / 2, (1 + level) / 2], n, p)


# threshold


def test_the_threshold_is_the_kth_largest():
    scores = torch.arange(1.0, 20)  # 19 of them: k = 1 at 5 %, 2 at 10 %
    assert bae.ood.threshold(scores, 0.05) == 19
    assert bae.ood.threshold(scores.flip(0), 0.1) == 18
    assert bae.ood.threshold(scores.numpy(), 0.149) == 18


@pytest.mark.parametrize("n_levels", [None, 2], ids=["continuous", "ties"])
def test_beyond_the_threshold_is_a_small_p_value(n_levels):
    """The two decisions are one, at rates on the lattice too, whose products with n + 1 round either way."""
    for n in (9, 28, 99):
        calibration, _ = exchangeable(1, n, n_levels)
        new = torch.cat([calibration[0], torch.rand(50, **F64) * 4])
        p = ConformalCalibration.fit(calibration[0]).p_values(new)
        for k in range(1, n + 1):
            rate = k / (n + 1)
            assert torch.equal(new > bae.ood.threshold(calibration[0], rate), p <= rate)


def test_the_rate_holds_for_every_order_of_the_rows():
    """All orders of five rows: exactly k / 5 of them have the last one beyond the threshold of the others."""
    rows = torch.tensor([3.0, 1.0, 4.0, 1.5, 9.0])
    orders = [rows[list(order)] for order in permutations(range(5))]
    for rate, k in ((0.2, 1), (0.39, 1), (0.4, 2), (0.8, 4)):
        alarms = [float(order[-1]) > bae.ood.threshold(order[:-1], rate) for order in orders]
        assert np.mean(alarms) == pytest.approx(k / 5)


def test_the_rate_given_the_calibration_rows_is_beta():
    """What the docstring warns of: the mean is right, and its standard deviation at n = 1000 is 0.7 %."""
    calibration = torch.rand(2000, 1000, **F64)
    rates = torch.tensor([1 - bae.ood.threshold(row, 0.05) for row in calibration])
    assert stats.kstest(rates.numpy(), stats.beta(50, 951).cdf).pvalue > 1e-3
    assert stats.beta(50, 951).std() == pytest.approx(0.007, abs=2e-4)


def test_too_few_rows_for_a_rate():
    with pytest.raises(bae.errors.DataError, match=r"99 calibration scores for a rate of 0.01; got 98. Take 99"):
        bae.ood.threshold(torch.rand(98), 0.01)
    assert bae.ood.threshold(torch.arange(99), 0.01) == 98
    for n in (48, 97, 102, 106):  # where the inverse of 1 / (n + 1) rounds to above n + 1
        assert bae.ood.threshold(torch.arange(n), 1 / (n + 1)) == n - 1
        with pytest.raises(bae.errors.DataError, match=f"Take {n} calibration rows"):
            bae.ood.threshold(torch.arange(n - 1), 1 / (n + 1))
    with pytest.raises(bae.errors.DataError, match=r"rate in \(0, 1\)"):
        bae.ood.threshold(torch.rand(9), 1.0)


# p-values


def test_against_a_loop():
    calibration, new = torch.randint(0, 6, (40,)).double(), torch.arange(-1.0, 7, **F64)
    groups, new_groups = torch.arange(40) % 3, torch.arange(8) % 3
    found = ConformalCalibration.fit(calibration, groups).p_values(new, new_groups)
    two_sided = ConformalCalibration.fit(calibration, two_sided=True).p_values(new)
    for i, (s, g) in enumerate(zip(new.tolist(), new_groups.tolist(), strict=True)):
        own = [c for c, h in zip(calibration.tolist(), groups.tolist(), strict=True) if h == g]
        assert float(found[i]) == (1 + sum(c >= s for c in own)) / (len(own) + 1)
        high = (1 + sum(c >= s for c in calibration.tolist())) / 41
        low = (1 + sum(c <= s for c in calibration.tolist())) / 41
        assert float(two_sided[i]) == min(1, 2 * min(high, low))


@pytest.mark.parametrize("n", [50, 1000])
@pytest.mark.parametrize("two_sided", [False, True], ids=["one-sided", "two-sided"])
@pytest.mark.parametrize("n_levels", [None, 2], ids=["continuous", "ties"])
def test_smoothed_p_values_are_uniform(n, two_sided, n_levels):
    p = []
    for number, (rows, new) in enumerate(zip(*exchangeable(1000, n, n_levels), strict=True)):
        calibration = ConformalCalibration.fit(rows, two_sided=two_sided)
        p.append(float(calibration.smoothed_p_values(new, seed=number)[0]))
    assert stats.kstest(p, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("n", [50, 1000])
def test_p_values_have_their_discrete_law(n):
    """Uniform on k / (n + 1), k from 1 to n + 1, by a chi-squared test."""
    p = torch.cat([
        ConformalCalibration.fit(rows).p_values(new) for rows, new in zip(*exchangeable(1500, n), strict=True)
    ])
    k = (p * (n + 1)).round().long()
    assert_close(k / (n + 1.0), p.float())
    assert 1 <= int(k.min()) and int(k.max()) <= n + 1
    cells = (k - 1) * 17 // (n + 1)  # 51 = 3 * 17; of 1001 values cells hold 58 or 59
    expected = torch.bincount(torch.arange(n + 1) * 17 // (n + 1)).double() * len(p) / (n + 1)
    assert stats.chisquare(torch.bincount(cells, minlength=17).numpy(), expected.numpy()).pvalue > 1e-3


def test_two_sided_p_values_have_their_discrete_law():
    """Every rank once: each of 2 k / (n + 1) comes twice; the middle one of an odd number gives 1."""
    for n, expected in ((3, [0.5, 1.0, 1.0, 0.5]), (4, [0.4, 0.8, 1.0, 0.8, 0.4])):
        rows = torch.arange(n + 1.0)
        calibrations = [ConformalCalibration.fit(rows[rows != row], two_sided=True) for row in rows]
        assert_close(
            torch.cat([c.p_values(rows[i : i + 1]) for i, c in enumerate(calibrations)]), torch.tensor(expected, **F64)
        )


def test_equal_scores_say_nothing():
    calibration = ConformalCalibration.fit(torch.ones(20))
    assert torch.equal(calibration.p_values(torch.ones(3)), torch.ones(3, **F64))
    p = calibration.smoothed_p_values(torch.ones(2000), seed=0)
    assert stats.kstest(p.numpy(), "uniform").pvalue > 1e-3
    assert bae.ood.threshold(torch.ones(20), 0.05) == 1  # nothing equal to it is beyond


def test_a_rate_holds_within_each_group():
    """Two classes of other scales: without groups all alarms fall on the wide one."""
    groups = torch.arange(4000) % 2
    scores = torch.randn(4000) * torch.where(groups == 0, 1.0, 5.0)
    calibrated, tested = slice(0, 2000), slice(2000, 4000)
    p = ConformalCalibration.fit(scores[calibrated], groups[calibrated]).p_values(scores[tested], groups[tested])
    q = ConformalCalibration.fit(scores[calibrated]).p_values(scores[tested])
    # given 1,000 calibration rows the number of alarms among 1,000 rows is beta-binomial: k = 100 of 1001
    low, high = stats.betabinom.ppf([0.005, 0.995], 1000, 100, 901)
    for group in (0, 1):
        of_group = groups[tested] == group
        assert low <= int((p[of_group] <= 0.1).sum()) <= high
        assert not low <= int((q[of_group] <= 0.1).sum()) <= high


def test_seeds_and_the_callers_generator():
    calibration, new = ConformalCalibration.fit(torch.ones(5)), torch.ones(4)
    before = torch.get_rng_state()
    first, again, other = (calibration.smoothed_p_values(new, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_bad_input():
    with pytest.raises(bae.errors.DataError, match="at least one score"):
        ConformalCalibration.fit(torch.empty(0))
    with pytest.raises(bae.errors.NonFiniteError, match="1 NaN"):
        ConformalCalibration.fit(torch.tensor([1.0, math.nan]))
    with pytest.raises(bae.errors.ShapeError, match=r"scores \(N,\)"):
        ConformalCalibration.fit(torch.rand(3, 2))
    grouped = ConformalCalibration.fit(torch.rand(4), torch.tensor([0, 0, 2, 2]))
    with pytest.raises(bae.errors.DataError, match=r"rows of groups \[0, 2\]; got rows of groups \[1\]"):
        grouped.p_values(torch.rand(2), torch.tensor([0, 1]))
    with pytest.raises(bae.errors.DataError, match="got no groups"):
        grouped.p_values(torch.rand(2))
    with pytest.raises(bae.errors.DataError, match="expected no groups"):
        ConformalCalibration.fit(torch.rand(4)).p_values(torch.rand(2), torch.tensor([0, 1]))
    with pytest.raises(bae.errors.ShapeError, match=r"whole numbers of shape \(2,\)"):
        grouped.p_values(torch.rand(2), torch.rand(2))
    infinite = ConformalCalibration.fit(torch.rand(9)).p_values(torch.tensor([math.inf, -math.inf]))
    assert_close(infinite, torch.tensor([0.1, 1.0], **F64))


# combination


def dependent_scores(n):
    """Three scores of a row that share most of what they see, on scales far apart."""
    common = torch.randn(n, 1, **F64)
    return (common + 0.5 * torch.randn(n, 3, **F64)) * torch.tensor([1.0, 100.0, 0.01], **F64)


@pytest.mark.parametrize("rule", ["fisher", "harmonic", "minimum"])
def test_combined_p_values_are_uniform_under_dependence(rule):
    p = []
    for number in range(600):
        rows = dependent_scores(41)
        calibration = CombinedCalibration.fit(rows[:40], rule, seed=number)
        p.append((calibration.smoothed_p_values(rows[40:], seed=number), calibration.p_values(rows[40:])))
    smoothed, plain = (torch.cat(part) for part in zip(*p, strict=True))
    assert stats.kstest(smoothed.numpy(), "uniform").pvalue > 1e-3
    for rate in (0.05, 0.1, 0.3):
        assert int((plain <= rate).sum()) <= stats.binom.ppf(0.995, 600, rate)


def test_fisher_without_calibration_is_not_valid_under_dependence():
    """The reason for the second half: Fisher's chi-squared law takes the p-values as independent."""
    rows = dependent_scores(4000)
    p = torch.stack([ConformalCalibration.fit(c[:2000]).p_values(c[2000:]) for c in rows.T], 1)
    fisher = stats.chi2.sf(-2 * p.log().sum(1).numpy(), 6)
    assert (fisher <= 0.01).mean() > 0.03


def test_one_score_combined_is_the_score():
    """With one column every rule ranks as the column does, up to the first half's resolution."""
    rows = torch.randperm(200).double()[:, None]
    for rule in ("fisher", "harmonic", "minimum"):
        p = CombinedCalibration.fit(rows, rule).p_values(torch.tensor([[-1.0], [100.5], [500.0]]))
        assert_close(p, torch.tensor([1.0, 0.5, 1 / 101], **F64), rtol=0, atol=0.1)


@pytest.mark.parametrize(("rule", "sees"), [("fisher", "all"), ("minimum", "one")])
def test_each_rule_is_for_what_its_docstring_says(rule, sees):
    torch.manual_seed(1)
    familiar, strange = torch.randn(4000, 4), torch.randn(1000, 4)
    strange = strange + (1.5 if sees == "all" else torch.tensor([4.0, 0, 0, 0]))
    power = {
        name: float((CombinedCalibration.fit(familiar, name).p_values(strange) <= 0.01).double().mean())
        for name in ("fisher", "minimum")
    }
    assert max(power, key=power.__getitem__) == rule


def test_combination_of_bad_input():
    with pytest.raises(bae.errors.DataError, match="two calibration rows"):
        CombinedCalibration.fit(torch.rand(1, 3))
    with pytest.raises(bae.errors.ShapeError, match="3 scores a row; got 2"):
        CombinedCalibration.fit(torch.rand(9, 3)).p_values(torch.rand(4, 2))
    with pytest.raises(
        bae.errors.UnsupportedError, match=r"rule, one of \['fisher', 'harmonic', 'minimum'\]; got 'mean'"
    ):
        CombinedCalibration.fit(torch.rand(9, 3), "mean")


@pytest.mark.parametrize("n_scores", [2, 3])
@pytest.mark.parametrize("rule", ["bonferroni", "harmonic", "mean"])
def test_merged_p_values_hold_under_the_worst_dependence(rule, n_scores):
    """The dependence of uniform p-values that makes alarms most frequent, found by linear programming."""
    m = 20 if n_scores == 3 else 60
    grid = torch.cartesian_prod(*[torch.arange(1, m + 1, **F64) / m] * n_scores)
    merged = bae.ood.merge_p_values(grid, rule).numpy()
    margins = np.concatenate([grid[:, j].numpy() == np.arange(1, m + 1)[:, None] / m for j in range(n_scores)])
    for rate in (0.1, 0.3):
        is_alarm = (merged <= rate + 1e-12).astype(float)
        worst = -optimize.linprog(-is_alarm, A_eq=margins, b_eq=np.full(len(margins), 1 / m)).fun
        assert worst <= rate + 1e-9
        if rule == "bonferroni" and rate * m / n_scores == pytest.approx(round(rate * m / n_scores)):
            assert worst == pytest.approx(rate)  # no smaller multiple would do


def test_merging_one_p_value_and_bad_ones():
    p = torch.tensor([[0.2], [1.0]], **F64)
    for rule in ("bonferroni", "harmonic", "mean"):
        assert_close(bae.ood.merge_p_values(p, rule), p[:, 0])
    with pytest.raises(bae.errors.ShapeError, match=r"p-values \(N, J\)"):
        bae.ood.merge_p_values(p[:, 0], "mean")
    for wrong in (0.0, 1.5, math.nan):
        with pytest.raises(bae.errors.DataError, match=r"p-values in \(0, 1\]"):
            bae.ood.merge_p_values(torch.tensor([[wrong]]), "mean")
    with pytest.raises(bae.errors.UnsupportedError, match="rule, one of .*; got 'fisher'"):
        bae.ood.merge_p_values(p, "fisher")


# many rows


def test_benjamini_hochberg_is_scipys():
    p = torch.rand(200, **F64) ** 2
    assert_close(bae.ood.benjamini_hochberg(p), torch.from_numpy(stats.false_discovery_control(p.numpy())))
    ties = (p * 20).ceil() / 20
    assert_close(bae.ood.benjamini_hochberg(ties), torch.from_numpy(stats.false_discovery_control(ties.numpy())))


def test_benjamini_hochberg_is_the_step_up_procedure():
    """Adjusted values at most q are the k smallest, with k the last i where p_(i) <= q i / N."""
    p = (torch.rand(60, **F64) ** 3).tolist()
    for q in (0.05, 0.2):
        ordered = sorted(p)
        k = max((i for i, value in enumerate(ordered, 1) if value <= q * i / 60), default=0)
        flagged = bae.ood.benjamini_hochberg(torch.tensor(p, **F64)) <= q
        assert sorted(torch.tensor(p, **F64)[flagged].tolist()) == ordered[:k]


def test_a_share_of_familiar_rows_multiplies_what_is_adjusted():
    p = torch.rand(200, **F64) ** 2 * 0.1
    adjusted = bae.ood.benjamini_hochberg(p)
    assert float(adjusted.max()) < 1
    assert_close(bae.ood.benjamini_hochberg(p, null_share=0.4), 0.4 * adjusted)


@pytest.mark.parametrize("q", [0.1, 0.4])
def test_independent_uniform_p_values_have_the_rate_times_their_share(q):
    """Not only at most, as 15 of 20 rows are familiar: whatever the law of the others."""
    shares = []
    for p in torch.rand(3000, 20, **F64):
        p[15:] = p[15:] ** 4
        flagged = bae.ood.benjamini_hochberg(p) <= q
        shares.append(int(flagged[:15].sum()) / max(1, int(flagged.sum())))
    assert abs(np.mean(shares) - 0.75 * q) < 3.5 * np.std(shares) / math.sqrt(len(shares))


def false_discoveries(shift, n_worlds, share):
    """False-discovery proportions at q = 0.2 with 0.3 of 60 rows strange, all against one calibration set a world."""
    proportions = []
    for _ in range(n_worlds):
        calibration = ConformalCalibration.fit(torch.randn(300))
        p = calibration.p_values(torch.randn(60) + torch.where(torch.arange(60) < 18, shift, 0.0))
        share_used = bae.ood.null_share(p) if share == "storey" else 1.0
        flagged = bae.ood.benjamini_hochberg(p, null_share=share_used) <= 0.2
        proportions.append(int(flagged[18:].sum()) / max(1, int(flagged.sum())))
    return np.array(proportions)


@pytest.mark.parametrize("share", ["one", "storey"])
def test_the_false_discovery_rate_holds_with_a_shared_calibration_set(share):
    found = false_discoveries(3.0, 800, share)
    error = found.std() / math.sqrt(len(found))
    assert found.mean() <= (0.2 * 42 / 60 if share == "one" else 0.2) + 2.6 * error
    assert found.mean() > 0.08  # and is not so for want of flags


def test_with_familiar_rows_only_any_flag_is_false():
    """The rate is then the chance of any flag, a binomial count over worlds."""
    n_flagged = int((false_discoveries(0.0, 800, "one") > 0).sum())
    assert n_flagged <= binomial_interval(800, 0.2)[1]


def test_null_share_is_that_of_a_uniform_part():
    p = torch.cat([(torch.arange(700, **F64) + 0.5) / 700, torch.full((300,), 1e-3, **F64)])
    assert bae.ood.null_share(p) == pytest.approx((1 + 350) / 500)
    assert bae.ood.null_share(p, level=0.8) == pytest.approx((1 + 140) / 200)
    assert bae.ood.null_share(torch.ones(3)) == 1
    with pytest.raises(bae.errors.DataError, match=r"level in \(0, 1\)"):
        bae.ood.null_share(p, level=1.0)
    with pytest.raises(bae.errors.DataError, match=r"null_share in \(0, 1\]"):
        bae.ood.benjamini_hochberg(p, null_share=0.0)
    with pytest.raises(bae.errors.ShapeError, match=r"p-values \(N,\)"):
        bae.ood.benjamini_hochberg(p[None])


# real images


@pytest.mark.slow
@pytest.mark.data
def test_false_alarms_on_held_out_garments():
    """One network, n = 1,999 calibration and 2,000 test images.

    Given one calibration set the number of alarms is beta-binomial (the rate itself is drawn); over splits of the same
    images one test image each is a Bernoulli trial, and the count of alarms binomial.
    """
    train = bae.datasets.load("fashion-mnist")[:2000]
    images = bae.datasets.load("fashion-mnist", split="test")[:3999]
    model = bae.Autoencoder(bae.nets.mlp(784, [64], 8), bae.nets.mlp(8, [64], 784), bae.likelihoods.Gaussian())
    bae.fit_model(model, train, epochs=3, seed=0)
    predictive = bae.Predictive(model, bae.fit_weights(bae.weights.MAP(), model, train))
    scores = bae.ood.negative_log_density(predictive.moments(images), images)
    for rate in (0.01, 0.05, 0.1):
        k = round(2000 * rate)
        alarms, single = [], 0
        for number in range(500):
            order = torch.randperm(3999, generator=torch.Generator().manual_seed(number))
            beyond = scores[order[1999:]] > bae.ood.threshold(scores[order[:1999]], rate)
            alarms.append(int(beyond.sum()))
            single += int(beyond[0])
        law = stats.betabinom(2000, k, 2000 - k)
        assert law.ppf(0.005) <= alarms[0] <= law.ppf(0.995)
        assert abs(np.mean(alarms) - 2000 * rate) < 2.6 * law.std() / math.sqrt(500)
        low, high = binomial_interval(500, rate)
        assert low <= single <= high
