"""Sums of scores of draws over batches, against the scores of all rows at once."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import bayesae as bae
from bayesae import metrics
from bayesae.metrics import DrawSums

TIGHT = {"rtol": 1e-12, "atol": 1e-12}


def rows(s=7, b=50, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draws, x = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((s, b, 2, 3), (b, 2, 3)))
    return 0.5 * draws + x.flip(0), x


def summed(draws, x, sizes=(7, 43), is_fair=False, mask=None):
    sums = DrawSums.of((2, 3), is_fair=is_fair)
    masks = [None] * len(sizes) if mask is None else mask.split(sizes)
    for batch in zip(draws.split(sizes, 1), x.split(sizes), masks, strict=True):
        sums = sums.update(*batch)
    return sums


@pytest.mark.parametrize("is_fair", [False, True])
def test_sums_are_what_all_rows_at_once_give(is_fair):
    draws, x = rows()
    sums = summed(draws, x, is_fair=is_fair)
    crps, energy = (score(draws, x, is_fair=is_fair) for score in (metrics.crps_of_draws, metrics.energy_score))
    pooled, by_pixel = sums.result(), sums.result(is_pooled=False)
    assert_close(pooled.crps, crps.mean(), **TIGHT)
    assert_close(by_pixel.crps, crps.mean(0), **TIGHT)
    assert_close(pooled.energy, energy.mean(), **TIGHT)
    assert torch.equal(pooled.energy, by_pixel.energy) and pooled.n_rows == by_pixel.n_rows == 50
    first, second = (summed(draws[:, k], x[k], (25,), is_fair) for k in (slice(25), slice(25, None)))
    assert_close(first.merge(second).sums, sums.sums, **TIGHT)


def test_a_mask_leaves_entries_and_rows_out():
    draws, x = rows()
    mask = torch.rand(x.shape, generator=torch.Generator().manual_seed(5)) < 0.6
    mask[:, 1, 2], mask[:5] = False, False
    holed = torch.where(mask, draws, torch.nan), torch.where(mask, x, torch.nan)
    sums = summed(*holed, mask=mask)
    crps = metrics.crps_of_draws(draws, x)
    # the law of what was observed: each row by itself, of its numbers only
    seen = [k for k in range(50) if mask[k].any()]
    energy = [metrics.energy_score(draws[:, k : k + 1, mask[k]], x[k : k + 1, mask[k]]) for k in seen]
    found = sums.result()
    assert found.n_rows == len(seen) <= 45
    assert_close(found.energy, torch.cat(energy).mean(), **TIGHT)
    assert_close(found.crps, crps[mask].mean(), **TIGHT)
    by_pixel = sums.result(is_pooled=False).crps
    assert by_pixel[1, 2].isnan() and by_pixel.isnan().sum() == 1
    assert_close(by_pixel[0, 1], crps[:, 0, 1][mask[:, 0, 1]].mean(), **TIGHT)


def test_rows_of_one_number_have_one_score():
    draws, x = (part[..., 0, 0] for part in rows())
    assert_close(metrics.energy_score(draws, x), metrics.crps_of_draws(draws, x), **TIGHT)
    found = DrawSums.of(()).update(draws, x).result()
    assert_close(found.crps, found.energy, **TIGHT)


def test_an_update_reads_nothing_from_the_device():
    """Tensors without data: whatever asks for a value fails."""
    sums, parts = DrawSums.of((2, 3), device="meta"), [part.to("meta") for part in rows()]
    assert sums.update(*parts, torch.ones(50, 2, 3, dtype=torch.bool, device="meta")).sums.device.type == "meta"


def test_arrays_single_precision_and_no_rows():
    draws, x = rows()
    found = DrawSums.of((2, 3)).update(draws.float().numpy(), x.float().requires_grad_())
    assert found.sums.dtype == torch.float64 and not found.sums.requires_grad
    assert_close(found.sums, summed(draws.float(), x.float()).sums, **TIGHT)
    assert torch.equal(found.update(draws[:, :0], x[:0]).sums, found.sums)


def test_what_is_refused():
    draws, x = rows()
    sums = DrawSums.of((2, 3))
    with pytest.raises(bae.errors.DataError, match="at least one value"):
        sums.result()
    with pytest.raises(bae.errors.NonFiniteError, match="without its mask"):
        sums.update(draws, x * torch.nan).result()
    with pytest.raises(bae.errors.ShapeError, match=r"\(B, 2, 3\)"):
        sums.update(draws[..., 0], x[..., 0])
    with pytest.raises(bae.errors.ShapeError, match=r"draws \('S', 50, 2, 3\), S of 1"):
        sums.update(x, x)
    with pytest.raises(bae.errors.ShapeError, match="S of 2 or more"):
        DrawSums.of((2, 3), is_fair=True).update(draws[:1], x)
    with pytest.raises(bae.errors.ShapeError, match="a mask of dtype bool"):
        sums.update(draws, x, torch.ones_like(x))
    with pytest.raises(bae.errors.ShapeError, match="same settings"):
        sums.merge(DrawSums.of((2, 3), is_fair=True))
    with pytest.raises(bae.errors.ShapeError, match="one number"):
        metrics.energy_score(draws[:, 0, 0, 0], x[0, 0, 0])
