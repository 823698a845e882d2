from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.testing import assert_close

import bayesae as bae

F64 = {"dtype": torch.float64}


def grams_of(n_rows, *, n_draws=5, n_outputs=2, scale=1.0, seed=0):
    rows = scale * torch.randn(n_rows, n_draws, n_outputs, generator=torch.Generator().manual_seed(seed), **F64)
    return rows @ rows.mT


def information(grams, rows):
    return float(bae.ood.joint_information(grams[list(rows)]))


def greedy(grams, n):
    """The twin that is not lazy: every row is looked at in every step."""
    chosen = []
    for _ in range(n):
        rest = [row for row in range(len(grams)) if row not in chosen]
        chosen.append(max(rest, key=lambda row: information(grams, [*chosen, row])))
    return chosen


@pytest.mark.parametrize("seed", range(5))
def test_lazy_is_greedy(seed):
    grams = grams_of(20, seed=seed)
    found = bae.decisions.acquire(grams, 8)
    assert found.rows.tolist() == greedy(grams, 8)
    together = [information(grams, found.rows[: k + 1].tolist()) for k in range(8)]
    assert_close(found.gains.cumsum(0), torch.tensor(together, **F64), rtol=1e-10, atol=0)
    assert bool((found.gains.diff() <= 1e-12).all())


@pytest.mark.parametrize("at_once", [1, 3, 7])
def test_lazy_is_greedy_over_many_blocks(at_once, monkeypatch):
    """Rows of few directions, so that bounds of the last step are far off; in blocks smaller than the candidates."""
    looks = []

    def counted(grams):
        looks.append(len(grams))
        return bae.ood.joint_information(grams)

    monkeypatch.setattr("bayesae.decisions.acquisition._ROWS_AT_ONCE", at_once)
    monkeypatch.setattr("bayesae.decisions.acquisition.joint_information", counted)
    grams = grams_of(40, n_draws=3, n_outputs=1, scale=2.0)
    assert bae.decisions.acquire(grams, 8).rows.tolist() == greedy(grams, 8)
    assert sum(looks) < 40 * 8 / 2  # and most rows are not looked at again


@pytest.mark.parametrize("seed", range(5))
def test_at_least_63_percent_of_the_best_batch(seed):
    grams = grams_of(9, n_outputs=1, scale=3.0, seed=seed)
    for n in (1, 2, 3):
        best = max(information(grams, rows) for rows in itertools.combinations(range(9), n))
        found = information(grams, bae.decisions.acquire(grams, n).rows.tolist())
        assert (1 - 1 / math.e) * best <= found <= best + 1e-10
        if n == 1:
            assert found == pytest.approx(best, abs=1e-12)


def test_rows_of_their_own_are_all_chosen_by_what_they_tell():
    """Orthogonal Gram matrices: greedy is exact, and the order is that of the single gains."""
    values = torch.tensor([0.5, 4.0, 1.0, 9.0, 0.1], **F64)
    grams = torch.diag_embed(torch.diag(values))
    found = bae.decisions.acquire(grams, 3)
    assert found.rows.tolist() == [3, 1, 2]
    assert_close(found.gains, 0.5 * torch.log1p(values[[3, 1, 2]]), rtol=1e-12, atol=0)


def test_a_duplicated_row_is_worth_what_is_left():
    """A row with eigenvalue 9, twice, and one of its own with 1.5: log(19 / 10) < log 2.5, so the copy comes last."""
    grams = torch.diag_embed(torch.tensor([[9.0, 0.0], [9.0, 0.0], [0.0, 1.5]], **F64))
    single = bae.ood.joint_information(grams[:, None])
    assert single.topk(2).indices.sort().values.tolist() == [0, 1]
    found = bae.decisions.acquire(grams, 3)
    assert found.rows.tolist() == [0, 2, 1]
    assert_close(found.gains, 0.5 * torch.tensor([10.0, 2.5, 1.9], **F64).log(), rtol=1e-12, atol=0)


def test_float32_grams_and_the_callers_tensor():
    grams = grams_of(6).float()
    before = grams.clone()
    found = bae.decisions.acquire(grams, 6)
    assert sorted(found.rows.tolist()) == list(range(6))
    assert found.gains.dtype == torch.float64
    assert torch.equal(grams, before)


def test_errors():
    grams = grams_of(4)
    with pytest.raises(bae.errors.DataError, match="n from 1 to the 4 candidates"):
        bae.decisions.acquire(grams, 5)
    with pytest.raises(bae.errors.DataError, match="n=0"):
        bae.decisions.acquire(grams, 0)
    with pytest.raises(bae.errors.ShapeError, match=r"\(N, S, S\)"):
        bae.decisions.acquire(grams[0], 1)
    with pytest.raises(bae.errors.NonFiniteError, match="Gram matrices"):
        bae.decisions.acquire(grams * torch.nan, 1)
