from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch.testing import assert_close

import bayesae as bae

F64 = {"dtype": torch.float64}


def uniform(n, seed):
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), **F64)


def test_curve_against_a_loop():
    errors, scores = uniform(30, 0), uniform(30, 1)
    found = bae.decisions.risk_coverage(errors, scores)
    order = sorted(range(30), key=lambda i: float(scores[i]))
    best = sorted(errors.tolist())
    risks, excess = [], 0.0
    for k in range(1, 31):
        risks.append(sum(float(errors[i]) for i in order[:k]) / k)
        excess += (risks[-1] - sum(best[:k]) / k) / 30
    assert_close(found.risk, torch.tensor(risks, **F64))
    assert_close(found.coverage, torch.arange(1, 31, **F64) / 30)
    assert found.area == pytest.approx(sum(risks) / 30)
    assert found.excess == pytest.approx(excess)


def test_the_errors_themselves_are_the_best_score_and_a_constant_tells_nothing():
    errors = uniform(40, 0) < 0.3
    best = bae.decisions.risk_coverage(errors, errors.double())
    assert best.excess == pytest.approx(0, abs=1e-12)
    blind = bae.decisions.risk_coverage(errors, torch.zeros(40))
    assert blind.area == pytest.approx(float(errors.double().mean()))
    assert bool((blind.risk - blind.risk[0]).abs().max() < 1e-12)


def test_ties_count_with_the_mean_over_their_orders():
    errors, scores = torch.tensor([1.0, 0.0, 0.5, 0.2], **F64), torch.tensor([1.0, 1.0, 0.0, 2.0], **F64)
    one = bae.decisions.risk_coverage(errors, scores + torch.tensor([0, 1e-6, 0, 0]))
    two = bae.decisions.risk_coverage(errors, scores + torch.tensor([1e-6, 0, 0, 0]))
    assert bae.decisions.risk_coverage(errors, scores).area == pytest.approx((one.area + two.area) / 2)


def clopper_pearson(n_wrong, n, level):
    return 1.0 if n_wrong == n else float(stats.beta.ppf(1 - level, n_wrong + 1, n - n_wrong))


def test_threshold_is_the_largest_whose_clopper_pearson_bound_holds():
    scores = uniform(500, 0)
    errors = uniform(500, 1) < scores**2
    found = bae.decisions.selective_threshold(errors, scores, risk=0.15, confidence=0.9, n_thresholds=10)
    smallest = math.ceil(math.log(0.01) / math.log(0.85))
    safe = []
    for j in range(10):
        k = round(smallest + (500 - smallest) * j / 9)
        bar = sorted(scores.tolist())[k] if k < 500 else math.inf
        wrong = int(errors[scores < bar].sum())
        if clopper_pearson(wrong, k, 0.1 / 10) <= 0.15:
            safe.append((k / 500, bar, wrong / k))
    assert safe and len(safe) < 10
    assert (found.coverage, found.threshold, found.risk) == pytest.approx(max(safe))


def hoeffding_bentkus(mean, n, level):
    """By bisection: the risk at which the smaller of the two tails is ``level``."""
    low, high = mean, 1 - 1e-12
    for _ in range(60):
        risk = (low + high) / 2
        divergence = (1 - mean) * math.log((1 - mean) / (1 - risk)) + (mean * math.log(mean / risk) if mean else 0)
        tail = min(math.exp(-n * divergence), math.e * stats.binom.cdf(math.ceil(n * mean - 1e-9), n, risk))
        low, high = (risk, high) if tail > level else (low, risk)
    return high


@pytest.mark.parametrize("risk", [0.1, 0.15, 0.2, 0.3])
def test_shares_keep_the_bound_of_hoeffding_and_bentkus(risk):
    scores = uniform(500, 0)
    errors = uniform(500, 1) * scores**2
    found = bae.decisions.selective_threshold(errors, scores, risk=risk, confidence=0.9, n_thresholds=40)
    smallest = math.ceil(math.log(0.1 / 40) / math.log(1 - risk))
    order = scores.argsort()
    counts = [round(smallest + (500 - smallest) * j / 39) for j in range(40)]
    safe = [k for k in counts if hoeffding_bentkus(float(errors[order[:k]].mean()), k, 0.1 / 40) <= risk]
    assert found.coverage == pytest.approx(max(safe) / 500)


def test_all_rows_are_answered_where_nothing_is_wrong():
    found = bae.decisions.selective_threshold(torch.zeros(200, dtype=torch.bool), uniform(200, 0), risk=0.05)
    assert found == (math.inf, 1.0, 0.0)


def threshold_of(errors, scores, **options):
    """Minus infinity where no row may be answered."""
    try:
        return bae.decisions.selective_threshold(errors, scores, **options).threshold
    except bae.errors.DataError:
        return -math.inf


@pytest.mark.parametrize("kind", ["binary", "shares"])
def test_risk_is_kept_where_it_rises_with_the_score(kind):
    """Scores t are uniform and the mean error at t is t, so that the true risk below a threshold is half of it."""
    broken, answered = 0, 0
    for seed in range(200):
        scores, noise = uniform(300, seed), uniform(300, 10_000 + seed)
        errors = noise < scores
        if kind == "shares":
            errors = 0.9 * errors + 0.1 * scores  # of mean t too, and never 1
        threshold = threshold_of(errors, scores, risk=0.3, confidence=0.8)
        answered += threshold > 0
        broken += min(threshold, 1.0) / 2 > 0.3
    assert answered > 180
    assert broken <= stats.binom.ppf(0.999, 200, 0.2)


def test_risk_is_kept_where_every_threshold_is_just_too_bold():
    """Errors of a rate above the level, whatever the score: any answer is as rare as the confidence says."""
    broken = sum(
        threshold_of(uniform(300, 10_000 + seed) < 0.3 + 1e-9, uniform(300, seed), risk=0.3, confidence=0.8) > 0
        for seed in range(200)
    )
    assert 0 < broken <= stats.binom.ppf(0.999, 200, 0.2)


def test_ties_break_no_promise():
    """Scores of three values: the true risk is known for every threshold."""
    rates = torch.tensor([0.02, 0.2, 0.8], **F64)
    broken = 0
    for seed in range(200):
        scores = (uniform(300, seed) * 3).long()
        errors = uniform(300, 10_000 + seed) < rates[scores]
        threshold = threshold_of(errors, scores, risk=0.105, confidence=0.8)
        broken += (
            float(rates[: (3 if threshold == math.inf else int(threshold))].mean()) > 0.105 if threshold > 0 else False
        )
    assert broken <= stats.binom.ppf(0.999, 200, 0.2)


def test_errors():
    scores = uniform(30, 0)
    wrong = torch.zeros(30, dtype=torch.bool)
    with pytest.raises(bae.errors.DataError, match="at least 117 calibration rows"):
        bae.decisions.selective_threshold(wrong, scores, risk=0.05)
    with pytest.raises(bae.errors.DataError, match="none: the lowest mean error of those tried is 1"):
        bae.decisions.selective_threshold(~wrong, scores, risk=0.5)
    with pytest.raises(bae.errors.DataError, match=r"errors in \[0, 1\]"):
        bae.decisions.selective_threshold(2 * scores + 1, scores, risk=0.5)
    with pytest.raises(bae.errors.DataError, match=r"a risk in \(0, 1\)"):
        bae.decisions.selective_threshold(wrong, scores, risk=0)
    with pytest.raises(bae.errors.DataError, match=r"a confidence in \(0, 1\)"):
        bae.decisions.selective_threshold(wrong, scores, risk=0.5, confidence=95)
    with pytest.raises(bae.errors.DataError, match="at least two thresholds"):
        bae.decisions.selective_threshold(wrong, scores, risk=0.5, n_thresholds=1)
    with pytest.raises(bae.errors.ShapeError, match=r"errors and scores \(N,\)"):
        bae.decisions.risk_coverage(wrong, scores[:4])
    with pytest.raises(bae.errors.DataError, match="at least one row"):
        bae.decisions.risk_coverage(wrong[:0], scores[:0])
    with pytest.raises(bae.errors.NonFiniteError, match="errors and scores"):
        bae.decisions.risk_coverage(wrong, scores * torch.nan)
