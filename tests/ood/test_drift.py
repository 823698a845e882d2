"""Bets, and conformal test martingales over streams."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch.testing import assert_close

import bayesae as bae
from bayesae.ood import DriftMonitor, PowerMixture, SimpleJumper, TypicalityMonitor

F64 = {"dtype": torch.float64}
BETS = [SimpleJumper(), SimpleJumper(jump=0.2), PowerMixture()]
STATISTICS = ["martingale", "cusum", "shiryaev-roberts"]


def uniform(*shape):
    return 1 - torch.rand(*shape, **F64)


# bets


@pytest.mark.parametrize("bet", BETS, ids=str)
@pytest.mark.parametrize("n_before", [0, 1, 30])
def test_a_bet_is_fair_whatever_came_before(bet, n_before):
    """The factor has integral 1 over the next p: by quadrature in -log p up to 40, in closed form beyond."""
    past = uniform(n_before) ** 2
    state = bet.update(bet.init(), past)[0] if n_before else bet.init()

    def integrand(surprise):
        p = torch.tensor([math.exp(-surprise)], **F64)
        return float(bet.update(state, p)[1].exp() * p)

    tail = 0.0  # a bounded factor has none; a mixture's is integral e^L (n + 1)! / L^(n + 2), over the capital before
    if isinstance(bet, PowerMixture):
        surprise = -float(past.log().sum())
        log_capital = float(DriftMonitor(bet=bet).log_statistics(past)[-1]) if n_before else 0.0
        log_tail = surprise + math.lgamma(n_before + 1) - (n_before + 1) * math.log(surprise + 40) - log_capital
        tail = math.exp(log_tail)
    assert integrate.quad(integrand, 0, 40, limit=200)[0] + tail == pytest.approx(1, abs=1e-7)


def test_the_jumper_is_the_papers_recursion():
    p, capital, jump = uniform(50).tolist(), [1 / 3] * 3, 0.01
    expected = []
    for value in p:
        total = sum(capital)
        capital = [
            ((1 - jump) * c + jump / 3 * total) * (1 + e * (value - 0.5))
            for c, e in zip(capital, (-1, 0, 1), strict=True)
        ]
        expected.append(math.log(sum(capital)))
    assert_close(DriftMonitor().log_statistics(torch.tensor(p, **F64)), torch.tensor(expected, **F64))


@pytest.mark.parametrize("power", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("n", [1, 7, 60])
def test_the_mixture_is_the_integral_over_powers(n, power):
    """Few small p-values (powers below 1: L below n) and many (above)."""
    p = uniform(n) ** power
    surprise = -float(p.log().sum())
    grid = (np.arange(200_000) + 0.5) / 200_000
    expected = np.log(np.exp(n * np.log(grid) + surprise * (1 - grid)).mean())
    found = DriftMonitor(bet=PowerMixture()).log_statistics(p)[-1]
    assert float(found) == pytest.approx(expected, abs=1e-5)


def test_the_mixture_is_smooth_where_its_formula_changes():
    """Across the switch between series and incomplete gamma function, and at n where the latter underflows."""
    for n in (100, 10_000):
        switch = n + 1 - 4.5 * math.sqrt(n + 1)
        states = torch.tensor([[float(n), switch * (1 + step * 1e-6)] for step in range(-3, 4)], **F64)
        _, factors = PowerMixture().update(states, torch.full((7, 1), 0.5, **F64))
        steps = factors[:, 0].diff()
        assert float((steps - steps.mean()).abs().max()) < 1e-9
    path = DriftMonitor(bet=PowerMixture()).log_statistics(torch.ones(5000, **F64))
    assert_close(path, -torch.arange(2.0, 5002, **F64).log())  # all p of 1: M = 1 / (n + 1)


@pytest.mark.parametrize("bet", BETS, ids=str)
def test_batches_and_streams_side_by_side(bet):
    p = uniform(3, 40)
    state, whole = bet.update(bet.init(), p)
    for row in range(3):
        one, pieces = bet.init(), []
        for piece in p[row].split(7):
            one, log_factors = bet.update(one, piece)
            pieces.append(log_factors)
        assert_close(torch.cat(pieces), whole[row])
        assert_close(one, state[row])


def test_a_jump_must_be_a_share():
    with pytest.raises(bae.errors.DataError, match=r"jump in \[0, 1\]"):
        SimpleJumper(jump=1.5)


# the monitor


def test_p_values_are_ranks_in_the_past():
    """Against a loop, ties included, over several blocks; ties are broken by one uniform number a row."""
    calibration, stream = torch.randint(0, 9, (30,)), torch.randint(0, 9, (2500,))
    state = DriftMonitor().init(calibration, seed=4)
    _, info = DriftMonitor().update(state, stream)
    ties = 1 - torch.rand(2500, generator=torch.Generator().manual_seed(4), **F64)
    seen = calibration.tolist()
    for i in [0, 1, 2, 1023, 1024, 1025, 2499]:
        past, s = np.array(seen + stream[:i].tolist()), int(stream[i])
        expected = ((past > s).sum() + float(ties[i]) * (1 + (past == s).sum())) / (len(past) + 1)
        assert float(info.p_values[i]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("n_levels", [None, 2], ids=["continuous", "ties"])
def test_online_p_values_are_independent_and_uniform(n_levels):
    """Streams of 5 rows after 3 calibration rows: uniform each, and no two rows hang together."""
    scores = torch.distributions.Exponential(1.0).sample((1500, 8))
    scores = scores if n_levels is None else (scores * n_levels).floor()
    monitor = DriftMonitor()
    p = torch.stack([
        monitor.update(monitor.init(row[:3], seed=i), row[3:])[1].p_values for i, row in enumerate(scores)
    ])
    assert stats.kstest(p.flatten().numpy(), "uniform").pvalue > 1e-3
    correlations = np.corrcoef(p.T.numpy())[np.triu_indices(5, 1)]
    assert np.abs(correlations).max() < stats.norm.isf(5e-4 / 10) / math.sqrt(1500)


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("bet", [SimpleJumper(), PowerMixture()], ids=str)
def test_batches_do_not_matter(statistic, bet):
    calibration, stream = torch.randn(20), torch.randn(60) + 2
    monitor = DriftMonitor(level=0.2, statistic=statistic, bet=bet)
    start = monitor.init(calibration, seed=0)
    whole, info = monitor.update(start, stream)
    state, pieces = start, []
    for part in stream.split([1, 1, 17, 5, 36]):
        state, piece = monitor.update(state, part)
        pieces.append(piece)
    assert_close(torch.cat([piece.log_statistics for piece in pieces]), info.log_statistics)
    assert torch.equal(torch.cat([piece.p_values for piece in pieces]), info.p_values)
    assert (state.n_seen, state.alarmed_at) == (whole.n_seen, whole.alarmed_at) == (60, whole.alarmed_at)
    assert whole.alarmed_at == 1 + int((info.log_statistics >= math.log(5)).int().argmax())
    assert_close(monitor.log_statistics(info.p_values), info.log_statistics)


def test_statistics_against_a_loop():
    p = uniform(200) ** 1.3
    factors = SimpleJumper().update(SimpleJumper().init(), p)[1].exp().tolist()
    values, found = {"martingale": 1.0, "cusum": 0.0, "shiryaev-roberts": 0.0}, {name: [] for name in STATISTICS}
    for f in factors:
        values["martingale"] *= f
        values["cusum"] = max(values["cusum"], 1) * f
        values["shiryaev-roberts"] = (values["shiryaev-roberts"] + 1) * f
        for name, value in values.items():
            found[name].append(value)
    for name in STATISTICS:
        path = DriftMonitor(statistic=name).log_statistics(p)
        assert_close(path.exp(), torch.tensor(found[name], **F64))


@pytest.mark.parametrize("bet", [SimpleJumper(), PowerMixture()], ids=str)
def test_false_alarms_of_the_martingale_stay_below_the_level(bet):
    """Ville's inequality, with alarms at *any* of 200 rows of 2,000 streams."""
    ever = DriftMonitor(bet=bet).log_statistics(uniform(2000, 200)).amax(1)
    for level in (0.01, 0.05, 0.2):
        assert int((ever >= -math.log(level)).sum()) <= stats.binom.ppf(0.99, 2000, level)


@pytest.mark.parametrize("n", [1, 20])
def test_the_martingales_mean_is_one(n):
    """In closed form at the first row, within standard errors later: the jumper's factors are bounded."""
    values = DriftMonitor().log_statistics(uniform(20_000, n))[:, -1].exp()
    assert abs(float(values.mean()) - 1) < 4 * float(values.std()) / math.sqrt(20_000)


@pytest.mark.parametrize("statistic", ["cusum", "shiryaev-roberts"])
def test_the_mean_run_length_is_at_least_one_over_the_level(statistic):
    """Streams of 2,000 rows, a run without alarm counted as 2,000: a lower bound of the mean."""
    is_alarm = DriftMonitor(0.02, statistic).log_statistics(uniform(500, 2000)) >= math.log(50)
    first = torch.where(is_alarm.any(1), is_alarm.int().argmax(1) + 1, 2000).double()
    assert float(first.mean()) - 2.6 * float(first.std()) / math.sqrt(500) >= 50


@pytest.mark.parametrize("statistic", ["cusum", "shiryaev-roberts"])
def test_false_alarms_among_n_rows(statistic):
    """At most n times the level: R_t - t is a martingale, and C_t is no larger than R_t."""
    ever = DriftMonitor(statistic=statistic).log_statistics(uniform(2000, 50)).amax(1)
    for level in (0.002, 0.01):
        assert int((ever >= -math.log(level)).sum()) <= stats.binom.ppf(0.99, 2000, 50 * level)


@pytest.mark.parametrize("bet", [SimpleJumper(), PowerMixture()], ids=str)
def test_the_run_length_of_shiryaev_roberts_is_little_above_one_over_the_level(bet):
    """Optional stopping: its mean is that of the statistic at the alarm, at or above 20 at a level of 0.05."""
    path = DriftMonitor(0.05, "shiryaev-roberts", bet).log_statistics(uniform(2000, 400))
    first = (path >= math.log(20)).int().argmax(1)
    assert bool((path.amax(1) >= math.log(20)).all())
    length, statistic = (first + 1).double(), path[torch.arange(2000), first].exp()
    apart = length - statistic
    assert abs(float(apart.mean())) < 4 * float(apart.std()) / math.sqrt(2000)
    error = float(length.std()) / math.sqrt(2000)
    assert 20 - 2.6 * error <= float(length.mean()) <= 1.25 * 20 + 2.6 * error
    assert float(statistic.min()) >= 20


def test_the_default_level_is_made_for_the_martingale():
    """Familiar streams of 200 rows: nearly all alarm with Shiryaev-Roberts, unless the level is a chance over rows."""
    p = uniform(1000, 200)
    ever = {name: DriftMonitor(statistic=name).log_statistics(p).amax(1) for name in STATISTICS}
    default = DriftMonitor().log_limit
    assert float((ever["shiryaev-roberts"] >= default).double().mean()) > 0.95
    assert int((ever["martingale"] >= default).sum()) <= stats.binom.ppf(0.99, 1000, 0.01)
    for name in ("cusum", "shiryaev-roberts"):
        alarms = int((ever[name] >= DriftMonitor(0.05 / 200, name).log_limit).sum())
        assert alarms <= stats.binom.ppf(0.99, 1000, 0.05)


def test_the_shiryaev_roberts_statistic_grows_by_one_a_row_in_the_mean():
    values = DriftMonitor(statistic="shiryaev-roberts").log_statistics(uniform(20_000, 15))[:, -1].exp()
    assert abs(float(values.mean()) - 15) < 4 * float(values.std()) / math.sqrt(20_000)


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("bet", [SimpleJumper(), PowerMixture()], ids=str)
def test_a_shift_is_found(statistic, bet):
    calibration, familiar, shifted = torch.randn(200), torch.randn(50), torch.randn(100) + 2
    monitor = DriftMonitor(0.001, statistic, bet)
    state, before = monitor.update(monitor.init(calibration, seed=0), familiar)
    state, after = monitor.update(state, shifted)
    assert not bool(before.is_alarm.any()) and bool(after.is_alarm.any())
    assert state.alarmed_at is not None and 50 < state.alarmed_at <= 110


@pytest.mark.parametrize("statistic", STATISTICS)
def test_an_alarm_is_a_statistic_at_the_limit(statistic):
    """Levels a hair to either side of one over the largest value of a stream."""
    calibration, stream = torch.randn(30), torch.randn(40) + 2
    start = DriftMonitor().init(calibration, seed=0)
    p_values = DriftMonitor().update(start, stream)[1].p_values
    path = DriftMonitor(statistic=statistic).log_statistics(p_values)
    for hair, alarmed_at in ((-1e-9, 1 + int(path.argmax())), (1e-9, None)):
        monitor = DriftMonitor(math.exp(-float(path.max()) - hair), statistic)
        assert monitor.update(monitor.init(calibration, seed=0), stream)[0].alarmed_at == alarmed_at


def test_only_the_jumper_sees_scores_that_are_too_familiar():
    calibration, stream = torch.randn(200), torch.randn(150) - 1.5
    for bet, is_seen in ((SimpleJumper(), True), (PowerMixture(), False)):
        monitor = DriftMonitor(0.01, bet=bet)
        assert (monitor.update(monitor.init(calibration, seed=0), stream)[0].alarmed_at is not None) == is_seen


@pytest.mark.slow
def test_real_streams_raise_no_more_false_alarms_than_the_level():
    """End to end, on 1,000 permutations of one set of skewed, tied scores."""
    scores = (torch.distributions.Exponential(1.0).sample((250,)) * 10).floor()
    monitor = DriftMonitor(0.05)
    n_alarms = 0
    for number in range(1000):
        order = torch.randperm(250, generator=torch.Generator().manual_seed(number))
        state, _ = monitor.update(monitor.init(scores[order[:50]], seed=number), scores[order[50:]])
        n_alarms += state.alarmed_at is not None
    assert n_alarms <= stats.binom.ppf(0.99, 1000, 0.05)


def test_states_are_new_and_the_callers_generator_is_left_alone():
    calibration, stream = torch.randn(9), torch.randn(5)
    copies, before = (calibration.clone(), stream.clone()), torch.get_rng_state()
    monitor = DriftMonitor()
    state = monitor.init(calibration, seed=0)
    first, again = (monitor.update(state, stream)[1] for _ in range(2))
    assert torch.equal(first.p_values, again.p_values) and state.n_seen == 0 and len(state.scores) == 9
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(calibration, copies[0]) and torch.equal(stream, copies[1])
    with pytest.raises(FrozenInstanceError):
        monitor.level = 0.5  # pyright: ignore[reportAttributeAccessIssue]


def test_constant_and_infinite_scores():
    """Equal scores are exchangeable: no evidence. An infinite one is the strangest."""
    monitor = DriftMonitor(0.05)
    state, info = monitor.update(monitor.init(torch.ones(50), seed=0), torch.ones(200))
    assert state.alarmed_at is None and stats.kstest(info.p_values.numpy(), "uniform").pvalue > 1e-3
    _, info = monitor.update(monitor.init(torch.arange(99), seed=0), torch.tensor([math.inf]))
    assert 0 < float(info.p_values[0]) <= 0.01


@pytest.mark.parametrize("monitor", [DriftMonitor(), TypicalityMonitor()], ids=lambda m: type(m).__name__)
def test_monitors_refuse_bad_scores(monitor):
    with pytest.raises(bae.errors.DataError, match="at least one score"):
        monitor.init(torch.empty(0), seed=0)
    with pytest.raises(bae.errors.NonFiniteError, match="NaN"):
        monitor.init(torch.tensor([math.nan]), seed=0)
    state = monitor.init(torch.rand(9), seed=0)
    with pytest.raises(bae.errors.NonFiniteError, match="2 NaN"):
        monitor.update(state, torch.tensor([0.0, math.nan, math.nan]))
    with pytest.raises(bae.errors.ShapeError, match=r"scores \(N,\)"):
        monitor.update(state, torch.rand(2, 2))
    with pytest.raises(bae.errors.DataError, match=r"level in \(0, 1\)"):
        type(monitor)(level=0.0)


def test_a_statistic_that_there_is_not():
    with pytest.raises(bae.errors.UnsupportedError, match="statistic, one of .*; got 'sr'"):
        DriftMonitor(statistic="sr")
