from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import bayesae as bae
from bayesae import metrics

F64 = {"dtype": torch.float64}


def two_gaussians(shift, n=40_000):
    torch.manual_seed(0)
    return torch.randn(n), torch.randn(n) + shift


def test_auroc_of_two_unit_gaussians():
    shift = 1.3
    exact = float(torch.special.ndtr(torch.tensor(shift / math.sqrt(2))))
    assert metrics.auroc(*two_gaussians(shift)) == pytest.approx(exact, abs=4.5 * 0.5 / math.sqrt(40_000))


def test_auroc_is_higher_for_stranger_and_counts_ties_half():
    assert metrics.auroc(torch.tensor([0.0, 1.0]), torch.tensor([2.0, 3.0])) == 1
    assert metrics.auroc(torch.tensor([2.0, 3.0]), torch.tensor([0.0, 1.0])) == 0
    assert metrics.auroc(torch.ones(5), torch.ones(3)) == 0.5


def test_aupr_by_hand():
    # strange at ranks 1 and 3 from the top: (1/1 + 2/3) / 2
    assert metrics.aupr(torch.tensor([2.0, 0.0]), torch.tensor([3.0, 1.0])) == pytest.approx((1 + 2 / 3) / 2)


def test_fpr_at_tpr_equals_a_loop_over_thresholds():
    familiar, strange = two_gaussians(1.0, 500)
    best = min(float((familiar >= t).double().mean()) for t in strange if float((strange >= t).double().mean()) >= 0.95)
    assert metrics.fpr_at_tpr(familiar, strange) == pytest.approx(best)


@pytest.mark.slow
def test_bootstrap_covers_the_truth_and_leaves_the_generator():
    exact = float(torch.special.ndtr(torch.tensor(0.8 / math.sqrt(2))))
    state, hits = torch.get_rng_state(), 0
    generator = torch.Generator().manual_seed(7)
    for trial in range(30):
        a = torch.randn(120, generator=generator)
        b = torch.randn(120, generator=generator) + 0.8
        interval = metrics.bootstrap_interval(metrics.auroc, a, b, seed=trial, n_resamples=60)
        hits += interval.low <= exact <= interval.high
    assert hits >= 24  # of 30 at 95 %: fewer has probability 6e-4
    assert torch.equal(state, torch.get_rng_state())


def test_an_interval_by_hand_and_of_several_numbers_a_row():
    a, b = torch.tensor([[0.0, 1.0], [2.0, 0.0]]), torch.tensor([[3.0, 3.0]])
    gain = metrics.bootstrap_interval(lambda f, s: float(s.mean() - f[:, 0].mean()), a, b.numpy(), n_resamples=50)
    assert gain.value == 2 and (gain.low, gain.high) == (1, 3)


@pytest.mark.parametrize("metric", [metrics.auroc, metrics.aupr, metrics.fpr_at_tpr])
def test_scores_are_arrays_lists_and_tensors_of_any_kind(metric):
    familiar, strange = two_gaussians(1.0, 50)
    expected = metric(familiar, strange)
    assert metric(familiar.numpy(), strange.double().requires_grad_()) == expected
    assert metric(familiar.tolist(), strange) == expected
    with pytest.raises(bae.errors.ShapeError, match=r"scores \(N,\)"):
        metric(familiar[:, None], strange)
    with pytest.raises(bae.errors.ShapeError, match=r"scores \(N,\)"):
        metric(familiar, strange[0])


def test_arrays_and_gradients_are_pixels_and_covariates_too():
    scores, masks = defects()
    given = scores.numpy(), masks.numpy()
    graph = scores.double().requires_grad_()
    for metric in (metrics.pixel_auroc, metrics.pixel_aupr, metrics.per_region_overlap):
        assert metric(*given) == metric(scores, masks) == metric(graph, masks)
    few = {"n_resamples": 5}
    assert metrics.pixel_auroc_interval(*given, **few) == metrics.pixel_auroc_interval(graph, masks, **few)
    familiar, strange = two_gaussians(1.0, 50)
    by = torch.arange(50) % 3
    expected = metrics.matched_auroc(familiar, strange, by, by)
    assert metrics.matched_auroc(familiar.numpy(), strange.requires_grad_(), by.numpy(), by.double()) == expected


def test_intervals_that_are_none_are_refused():
    familiar, strange = two_gaussians(1.0, 20)
    scores, masks = defects()
    for level in (95, -0.5, 0.0, 1.0, math.nan):
        with pytest.raises(bae.errors.DataError, match=r"a level in \(0, 1\)"):
            metrics.bootstrap_interval(metrics.auroc, familiar, strange, level=level)
        with pytest.raises(bae.errors.DataError, match=r"a level in \(0, 1\)"):
            metrics.pixel_auroc_interval(scores, masks, level=level)
    with pytest.raises(bae.errors.DataError, match="n_resamples of at least 1"):
        metrics.bootstrap_interval(metrics.auroc, familiar, strange, n_resamples=0)
    with pytest.raises(bae.errors.DataError, match="n_resamples of at least 1"):
        metrics.pixel_auroc_interval(scores, masks, n_resamples=0)
    with pytest.raises(bae.errors.DataError, match="scores of both kinds; got 0 and 20"):
        metrics.bootstrap_interval(metrics.auroc, familiar[:0], strange)
    with pytest.raises(bae.errors.ShapeError, match="scores of rows"):
        metrics.bootstrap_interval(metrics.auroc, familiar[0], strange)
    with pytest.raises(bae.errors.NonFiniteError, match="a metric that is finite; got 3 of 3"):
        metrics.bootstrap_interval(lambda a, b: math.nan, familiar, strange, n_resamples=2)
    with pytest.raises(bae.errors.DataError, match="both kinds; got none"):
        metrics.pixel_auroc_interval(scores[:0], masks[:0])
    found = metrics.bootstrap_interval(lambda a, b: b.mean() - a.mean(), familiar, strange.requires_grad_())
    assert all(isinstance(number, float) for number in found)


@pytest.mark.parametrize("bad", [(torch.zeros(0), torch.ones(2)), (torch.tensor([torch.nan]), torch.ones(2))])
def test_bad_scores(bad):
    with pytest.raises(bae.errors.BayesAEError, match="scores"):
        metrics.auroc(*bad)


def test_nll_is_the_normal_density():
    mean, var, x = torch.randn(5, **F64), torch.rand(5, **F64) + 0.1, torch.randn(5, **F64)
    assert_close(metrics.gaussian_nll(mean, var, x), -torch.distributions.Normal(mean, var.sqrt()).log_prob(x))


def test_crps_is_its_integral():
    mean, var, x = 0.3, 0.49, 1.1
    grid = np.linspace(-12, 12, 200_001)
    cdf = torch.special.ndtr(torch.as_tensor((grid - mean) / math.sqrt(var))).numpy()
    integral = np.trapezoid((cdf - (grid >= x)) ** 2, grid)
    got = metrics.gaussian_crps(*(torch.tensor(v, **F64) for v in (mean, var, x)))
    assert float(got) == pytest.approx(integral, rel=1e-4)


def test_calibration_of_a_calibrated_predictive_and_of_two_that_are_not():
    torch.manual_seed(0)
    mean, x = torch.zeros(200_000, **F64), torch.randn(200_000, **F64)
    good = metrics.quantile_calibration(mean, torch.ones_like(x), x)
    assert good.error < 4.5 * 0.5 / math.sqrt(200_000)
    assert_close(good.levels, torch.arange(1, 20, **F64) / 20)
    wide = metrics.quantile_calibration(mean, torch.full_like(x, 1e8), x).error
    narrow = metrics.quantile_calibration(mean, torch.full_like(x, 1e-8), x).error
    assert wide == pytest.approx(float((good.levels - 0.5).abs().clamp(max=1).mean()), abs=0.03)
    assert narrow == pytest.approx(wide, abs=0.01) and narrow > 0.2


def test_sharpness():
    var = torch.tensor([1.0, 7.0], requires_grad=True)
    assert metrics.sharpness(var) == metrics.sharpness(np.array([[1.0], [7.0]])) == pytest.approx(2.0)
    with pytest.raises(bae.errors.DataError, match="at least one variance"):
        metrics.sharpness(torch.zeros(0))
    with pytest.raises(bae.errors.NonFiniteError, match="roots of variances"):
        metrics.sharpness(torch.tensor([1.0, -1.0]))


def test_a_share_is_a_share():
    with pytest.raises(bae.errors.DataError, match=r"tpr=95"):
        metrics.fpr_at_tpr(torch.zeros(2), torch.ones(2), tpr=95)


def test_calibration_of_nonsense_is_refused():
    with pytest.raises(bae.errors.NonFiniteError, match="standardised errors"):
        metrics.quantile_calibration(torch.full((3,), torch.nan), torch.ones(3), torch.zeros(3))


def defects(n=6, side=7, seed=0):
    """Scores with ties and masks of several components, corners that touch included; one image is clean."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(n, 1, side, side, generator=generator) < 0.25
    masks[0] = False
    scores = torch.randint(0, 9, masks.shape, generator=generator) + 2.0 * masks
    return scores, masks


def test_pixel_auroc_and_aupr_by_hand():
    scores = torch.tensor([[[3.0, 1.0], [2.0, 0.0]], [[5.0, 6.0], [7.0, 8.0]]])
    masks = torch.tensor([[[True, False], [False, False]], [[False, True], [False, False]]])
    # within the images 1 and 1/3; among all pixels 3 beats {1, 2, 0} and 6 beats {1, 2, 0, 5} of {1, 2, 0, 5, 7, 8}
    assert metrics.pixel_auroc(scores, masks) == pytest.approx(7 / 12)
    assert metrics.pixel_auroc(scores, masks, is_pooled=False) == pytest.approx((1 + 1 / 3) / 2)
    # precisions at the defect pixels: 6 is third, 3 is fifth of all; first and third within
    assert metrics.pixel_aupr(scores, masks) == pytest.approx((1 / 3 + 2 / 5) / 2)
    assert metrics.pixel_aupr(scores, masks, is_pooled=False) == pytest.approx((1 + 1 / 3) / 2)


def test_pixel_auroc_is_a_count_of_pairs_and_leaves_clean_images_out_of_the_average():
    scores, masks = defects()
    pairs = scores[masks][:, None] - scores[~masks]
    assert metrics.pixel_auroc(scores, masks) == pytest.approx(
        float((pairs > 0).double().mean() + 0.5 * (pairs == 0).double().mean())
    )
    each = [metrics.auroc(s[~m], s[m]) for s, m in zip(scores[1:], masks[1:], strict=True)]
    assert metrics.pixel_auroc(scores, masks, is_pooled=False) == pytest.approx(sum(each) / 5)


def test_interval_of_pixels_resamples_images():
    scores, masks = defects(12)
    state = torch.get_rng_state()
    got = metrics.pixel_auroc_interval(scores, masks, n_resamples=40, seed=3)
    generator = torch.Generator().manual_seed(3)
    values = []
    for _ in range(40):
        index = torch.randint(12, (12,), generator=generator)
        values.append(metrics.pixel_auroc(scores[index], masks[index]))
    expected = [metrics.pixel_auroc(scores, masks), *np.quantile(values, [0.025, 0.975])]
    assert list(got) == pytest.approx(expected)
    assert torch.equal(state, torch.get_rng_state())


def test_interval_of_a_gain_is_paired():
    scores, masks = defects(12)
    same = metrics.pixel_auroc_interval(scores, masks, baseline=scores**3, n_resamples=20)
    assert list(same) == pytest.approx([0, 0, 0], abs=1e-12)
    gain = metrics.pixel_auroc_interval(scores + 5 * masks, masks, baseline=scores, n_resamples=20)
    assert gain.value == pytest.approx(
        metrics.pixel_auroc(scores + 5 * masks, masks) - metrics.pixel_auroc(scores, masks)
    )
    assert 0 < gain.low <= gain.value <= gain.high


def components(mask):
    """Sets of pixels that touch, by flooding."""
    left, found = {tuple(p) for p in mask.nonzero().tolist()}, []
    while left:
        todo, region = [left.pop()], set()
        while todo:
            i, j = todo.pop()
            region.add((i, j))
            near = {(i + a, j + b) for a in (-1, 0, 1) for b in (-1, 0, 1)} & left
            left -= near
            todo += near
        found.append(region)
    return found


@pytest.mark.parametrize("max_fpr", [0.1, 0.3, 1.0])
def test_region_overlap_is_its_definition(max_fpr):
    scores, masks = defects()
    regions = [(n, region) for n, mask in enumerate(masks[:, 0]) for region in components(mask)]
    assert len({len(region) for _, region in regions}) > 2
    rates, overlaps = [0.0], [0.0]
    for threshold in sorted(set(scores.flatten().tolist()), reverse=True):
        is_flagged = scores[:, 0] >= threshold
        rates.append(float(is_flagged[~masks[:, 0]].double().mean()))
        shares = [sum(bool(is_flagged[n, i, j]) for i, j in region) / len(region) for n, region in regions]
        overlaps.append(sum(shares) / len(shares))
    grid = np.linspace(0, max_fpr, 200_001)
    expected = np.trapezoid(np.interp(grid, rates, overlaps), grid) / max_fpr
    assert metrics.per_region_overlap(scores, masks, max_fpr=max_fpr) == pytest.approx(expected, abs=1e-5)


def test_region_overlap_of_a_perfect_and_of_a_blind_score():
    _, masks = defects()
    assert metrics.per_region_overlap(masks.float(), masks) == pytest.approx(1)
    assert metrics.per_region_overlap(torch.ones(masks.shape), masks) == pytest.approx(0.15)
    assert metrics.per_region_overlap(-masks.float(), masks) == 0


def test_a_small_defect_counts_as_much_as_a_large_one():
    masks = torch.zeros(1, 6, 6, dtype=torch.bool)
    masks[0, :3, :4], masks[0, 5, 5] = True, True
    scores = torch.zeros(1, 6, 6)
    scores[0, 5, 5] = 1  # the small one is found, nothing else before all else
    chance = 0.3 / 2
    assert metrics.per_region_overlap(scores, masks) == pytest.approx(0.5 + 0.5 * chance)


def test_pixels_that_cannot_be_compared():
    scores, masks = defects()
    for metric in (metrics.pixel_auroc, metrics.pixel_aupr, metrics.pixel_auroc_interval, metrics.per_region_overlap):
        with pytest.raises(bae.errors.ShapeError, match="dtype bool"):
            metric(scores, masks.float())
        with pytest.raises(bae.errors.ShapeError, match=r"scores' shape|Components"):
            metric(scores[:, :, :2], masks)
        with pytest.raises(bae.errors.NonFiniteError, match="pixels"):
            metric(torch.where(masks, torch.nan, scores), masks)
        with pytest.raises(bae.errors.DataError, match="both kinds"):
            metric(scores, torch.zeros_like(masks))
    with pytest.raises(bae.errors.DataError, match="both kinds"):
        metrics.pixel_auroc(scores[:1], masks[:1], is_pooled=False)
    with pytest.raises(bae.errors.DataError, match="max_fpr=30"):
        metrics.per_region_overlap(scores, masks, max_fpr=30)
    with pytest.raises(bae.errors.ShapeError, match="need images"):
        metrics.per_region_overlap(scores.flatten(1), masks.flatten(1))


def test_auroc_is_that_of_scikit_learn_with_ties_and_without():
    from sklearn.metrics import roc_auc_score

    rng = np.random.RandomState(0)
    for n_values in (1, 2, 5, 10**9):
        for n_familiar, n_strange in ((1, 1), (3, 40), (50, 7)):
            familiar, strange = (rng.randint(n_values, size=n).astype(float) for n in (n_familiar, n_strange))
            expected = roc_auc_score(np.r_[np.zeros(n_familiar), np.ones(n_strange)], np.r_[familiar, strange])
            assert metrics.auroc(familiar, strange) == pytest.approx(expected, abs=1e-15)
