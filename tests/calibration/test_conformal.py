"""Split conformal intervals: the guarantee, in closed form and by repetition."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

import bayesae as bae
from bayesae.calibration import SplitConformal
from tests.calibration.worlds import F64, moments_of, normal

N, D, LEVEL, N_TRIALS = 9, 5, 0.85, 1500


def one_like(x):
    return moments_of(torch.zeros_like(x), torch.ones_like(x))


def images(n, share, generator):
    """Pixels of unit variance that have ``share`` of it in common within an image, more so in some images."""
    common, own = (torch.randn(n, size, generator=generator, **F64) for size in (1, D))
    return (math.sqrt(share) * common + math.sqrt(1 - share) * own) * (0.5 + torch.rand(n, 1, generator=generator))


def coverages(unit, share, level):
    """Of one new image for each of many calibration sets, (N_TRIALS, D)."""
    generator, found = torch.Generator().manual_seed(1), []
    for _ in range(N_TRIALS):
        x = images(N + 1, share, generator)
        low, high = SplitConformal(unit).fit(one_like(x[:N]), x[:N]).interval(one_like(x[N:]), level)
        found.append(((x[N:] >= low) & (x[N:] <= high))[0])
    return torch.stack(found).double()


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.0, 0.7, 1.0])
def test_coverage_at_ten_images(share):
    rank, spread = math.ceil((N + 1) * LEVEL) / (N + 1), 4 * 0.5 / math.sqrt(N_TRIALS)
    each = coverages("position", share, LEVEL).mean(0)
    assert (each - rank).abs().max() < spread  # exactly the rank, 0.9, at every position
    whole = coverages("image", share, LEVEL).amin(1).mean()
    assert abs(float(whole) - rank) < spread
    pixel = coverages("pixel", share, LEVEL).mean(1)
    assert float(pixel.mean()) > LEVEL - 4 * float(pixel.std()) / math.sqrt(N_TRIALS)


def test_expected_coverage_in_closed_form():
    """Calibration scores are order statistics: q of rank k covers k / (N + 1) on average over calibration sets."""
    n_sets, generator = 4000, torch.Generator().manual_seed(2)
    x = torch.randn(N, n_sets, generator=generator, **F64)  # a position for every calibration set
    found = SplitConformal("position").fit(one_like(x), x)
    ends = found.quantile(one_like(x), (1 + LEVEL) / 2)[0]
    covered = 2 * torch.special.ndtr(ends) - 1
    assert abs(float(covered.mean()) - 0.9) < 4 * float(covered.std()) / math.sqrt(n_sets)


def test_pixel_is_the_weighted_quantile_of_its_definition():
    x = images(N, 0.5, torch.Generator().manual_seed(3))
    fitted = SplitConformal().fit(one_like(x), x)
    for level in (0.1, 0.5, 0.8, 0.9):
        inside = [s for s in x.abs().flatten().tolist() if float((x.abs() <= s).double().sum()) / D / (N + 1) >= level]
        assert float(fitted.interval(one_like(x), level)[1][0, 0]) == pytest.approx(min(inside))


def test_images_of_equal_pixels_count_once():
    """Where pixels are copies, pixels are no more data than images: the rank is that of N images, not of N D pixels."""
    x = torch.arange(1.0, N + 1, **F64)[:, None].expand(N, D)
    by_pixel, by_position = (SplitConformal(unit).fit(one_like(x), x) for unit in ("pixel", "position"))
    assert_close(by_pixel.interval(one_like(x), LEVEL), by_position.interval(one_like(x), LEVEL))
    naive = math.ceil((N * D + 1) * LEVEL)  # the pooled rank would stop one image short
    assert float(by_pixel.interval(one_like(x), LEVEL)[1][0, 0]) == 9 > float(x.flatten()[naive - 1])


def test_scores_are_in_deviations():
    moments, x = normal(50)
    fitted = SplitConformal("image").fit(moments, x)
    inside = [((x >= low) & (x <= high)).flatten(1).all(1) for low, high in [fitted.interval(moments, 0.8)]][0]
    assert int(inside.sum()) == math.ceil(51 * 0.8)


def test_the_middle_is_the_mean():
    moments, x = normal(20)
    assert torch.equal(SplitConformal().fit(moments, x).quantile(moments, 0.5), moments.mean)


@pytest.mark.parametrize("unit", ["pixel", "position", "image"])
def test_levels_need_images(unit):
    x = torch.randn(N, D, **F64)
    fitted = SplitConformal(unit).fit(one_like(x), x)
    assert torch.isfinite(fitted.interval(one_like(x), 0.9)[1]).all()
    with pytest.raises(bae.errors.DataError, match="19 calibration images for a level of 0.95; got 9"):
        fitted.interval(one_like(x), 0.95)


def test_units_that_there_are():
    with pytest.raises(bae.errors.UnsupportedError, match="unit, one of .*; got 'row'"):
        SplitConformal("row")


def test_positions_need_their_pixels():
    moments, x = normal(30)
    with pytest.raises(bae.errors.ShapeError, match=r"rows of shape \(2, 3\)"):
        SplitConformal("position").fit(moments, x)(moments_of(moments.mean[:, 0], moments.noise[:, 0]))


def half_seen(x, generator):
    """More is missing in images whose pixels are large: what is missing says something of the image."""
    return torch.rand(x.shape, generator=generator) < 1 / (1 + 0.3 * x.abs().mean(1, keepdim=True))


@pytest.mark.slow
def test_coverage_of_what_was_observed():
    generator, spread = torch.Generator().manual_seed(6), 4 * 0.5 / math.sqrt(N_TRIALS)
    inside = {unit: [] for unit in ("pixel", "position", "image")}
    for _ in range(N_TRIALS):
        x = images(N + 1, 0.5, generator)
        mask = half_seen(x, generator)
        mask[:, 0] = True
        for unit, found in inside.items():
            low, high = SplitConformal(unit).fit(one_like(x[:N]), x[:N], mask[:N]).interval(one_like(x[N:]), 0.5)
            found.append(((x[N:] >= low) & (x[N:] <= high))[0][mask[N]].double())
    rank = math.ceil((N + 1) * 0.5) / (N + 1)
    whole = torch.stack([one.amin() for one in inside["image"]])
    assert abs(float(whole.mean()) - rank) < spread
    first = torch.stack([one[0] for one in inside["position"]])  # pixel 0 is always observed
    assert abs(float(first.mean()) - rank) < spread
    pixel = torch.stack([one.mean() for one in inside["pixel"]])
    assert float(pixel.mean()) > 0.5 - 4 * float(pixel.std()) / math.sqrt(N_TRIALS)


def test_masked_pixels_share_their_image():
    """The weighted quantile of its definition, each image's mass over the pixels that were observed."""
    generator = torch.Generator().manual_seed(7)
    x = images(N, 0.5, generator)
    mask = half_seen(x, generator)
    mask[0] = False
    n_images = int(mask.any(1).sum())
    fitted = SplitConformal().fit(one_like(x), x, mask)
    for level in (0.1, 0.5, 0.8):
        share = [sum(float((r[m].abs() <= s).double().mean()) for r, m in zip(x, mask, strict=True) if m.any())
                 for s in x[mask].abs().tolist()]  # fmt: skip
        inside = [s for s, n in zip(x[mask].abs().tolist(), share, strict=True) if n / (n_images + 1) >= level - 1e-9]
        assert float(fitted.interval(one_like(x), level)[1][0, 0]) == pytest.approx(min(inside))


def test_positions_count_the_images_in_which_they_were_observed():
    x = torch.arange(1.0, N + 1, **F64)[:, None].expand(N, 2)
    mask = torch.ones(N, 2, dtype=torch.bool)
    mask[::2, 1] = False  # of the second position 2, 4, 6 and 8 are left
    ends = SplitConformal("position").fit(one_like(x), x, mask).interval(one_like(x), 0.5)[1][0]
    assert ends.tolist() == [5.0, 6.0]
    with pytest.raises(bae.errors.DataError, match="9 calibration images for a level of 0.9; got 4"):
        SplitConformal("position").fit(one_like(x), x, mask).interval(one_like(x), 0.9)


def test_scores_that_no_fit_gives_are_refused():
    rising = torch.tensor([1.0, 2.0], **F64)
    with pytest.raises(bae.errors.DataError, match="scores that rise"):
        bae.calibration.ConformalQuantiles(rising.flip(0), rising)
    with pytest.raises(bae.errors.ShapeError, match="one shape"):
        bae.calibration.ConformalQuantiles(rising, rising[:1])
