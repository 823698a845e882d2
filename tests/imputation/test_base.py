"""What methods share: which draws of chains are kept, what chains are worth, parts of rows and weights put together."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import bayesae as bae
from bayesae.imputation import Found
from bayesae.imputation.assembling import assembled, merged
from bayesae.imputation.base import diagnose, joined, picks


class TestPicks:
    def test_take_turns_between_chains_and_go_back_in_even_strides(self):
        chains, steps = picks(5, 2, 6)
        assert chains.tolist() == [0, 1, 0, 1, 0] and steps.tolist() == [5, 5, 3, 3, 1]

    @pytest.mark.parametrize(("n_codes", "n_chains", "n_steps"), [(1, 3, 4), (12, 3, 4), (10, 3, 7), (8, 1, 8)])
    def test_never_the_same_twice(self, n_codes, n_chains, n_steps):
        chains, steps = picks(n_codes, n_chains, n_steps)
        assert len(set(zip(chains.tolist(), steps.tolist(), strict=True))) == n_codes
        assert 0 <= int(steps.min()) and int(steps.max()) == n_steps - 1 and int(chains.max()) < n_chains

    def test_chains_that_are_too_short(self):
        with pytest.raises(bae.errors.DataError, match="n_steps of at least 5 for 9 codes of 2 chains; got 4"):
            picks(9, 2, 4)
        with pytest.raises(bae.errors.DataError, match="n_steps of at least 4"):
            picks(1, 2, 3)


class TestDiagnose:
    def test_is_the_worst_of_the_dimensions_and_no_more_than_the_draws_kept(self):
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(2, 100, 1, 3, 2, generator=generator).double()
        latents[:, :, 0, 1, 1] = latents[:, :, 0, 1, 1].cumsum(1)  # a random walk
        latents[1, :, 0, 2, 0] += 10  # chains apart
        sizes, rhat = diagnose(latents, 1000)
        assert sizes.shape == rhat.shape == (1, 3)
        assert_close(sizes, bae.metrics.ess(latents).amin(-1))
        assert_close(rhat, bae.metrics.split_rhat(latents).amax(-1))
        assert float(sizes[0, 1]) < 30 < 100 < float(sizes[0, 0])
        assert float(rhat[0, 0]) < 1.1 < 3 < float(rhat[0, 2])
        assert_close(diagnose(latents, 7)[0][0, 0], torch.tensor(7.0).double())

    def test_chains_that_never_move_are_one_draw(self):
        latents = torch.randn(2, 10, 1, 2, 2, generator=torch.Generator().manual_seed(0))
        latents[:, :, :, 1, 0] = 0.5
        sizes, rhat = diagnose(latents, 10)
        assert float(sizes[0, 1]) == 1 and float(rhat[0, 1]) == torch.inf
        assert float(sizes[0, 0]) > 1 and float(rhat[0, 0]) < torch.inf


def found(n_rows, start, **figures):
    values = torch.arange(2 * 3 * n_rows * 4.0).reshape(2, 3, n_rows, 4) + start
    named = {name: torch.full((3, n_rows), value) for name, value in figures.items()}
    return Found(values, torch.full((3, n_rows), 2.0), **named)


class TestRowsAndWeightsTogether:
    def test_rows_of_the_prior_stand_where_they_were_and_are_at_rest(self):
        observed = torch.tensor([False, True, True, False, True])
        mine, prior = found(3, 0.0, rhat=1.5, acceptance=0.3), found(2, 1000.0)
        both = merged(mine, prior, observed)
        assert torch.equal(both.outputs[:, :, observed], mine.outputs)
        assert torch.equal(both.outputs[:, :, ~observed], prior.outputs)
        assert both.rhat is not None and both.acceptance is not None
        assert_close(both.rhat[0], torch.tensor([1.0, 1.5, 1.5, 1.0, 1.5]))
        assert_close(both.acceptance[2], torch.tensor([1.0, 0.3, 0.3, 1.0, 0.3]))
        assert both.residual is None and both.n_divergent is None

    def test_figures_of_a_row_are_those_over_its_weight_draws(self):
        x, mask = torch.zeros(2, 4), torch.tensor([[True, False, False, False]] * 2)
        over = {
            "rhat": [1.0, 3.0, 2.0],
            "acceptance": [0.1, 0.2, 0.6],
            "n_divergent": [1, 0, 4],
            "residual": [0.3, 0.1, 0.2],
        }
        named = {name: torch.tensor(values)[:, None].expand(3, 2) for name, values in over.items()}
        outputs = torch.randn(5, 3, 2, 4, generator=torch.Generator().manual_seed(0))
        given = Found(outputs, torch.tensor([1.0, 2.0, 4.0])[:, None].expand(3, 2), **named)
        rows = bae.Batch(x, mask, index=torch.arange(2))
        found = assembled([(bae.likelihoods.Gaussian(0.5), given)], rows, False, None, 15)
        for name, value in {"rhat": 3.0, "acceptance": 0.3, "n_divergent": 5, "residual": 0.3, "ess": 7.0}.items():
            assert_close(getattr(found, name).float(), torch.full((2,), float(value)))
        # weight draws after one another, without noise
        hidden = outputs.transpose(0, 1).flatten(0, 1)[..., 1:]
        assert torch.equal(found.draws[..., 1:], hidden) and not bool(found.draws[..., 0].any())
        parts = found.moments
        assert_close(parts.total[:, 1:], hidden.var(0, correction=0))
        assert_close(parts.standard_error[:, 1:], (parts.code / 7 + parts.weights / 2).sqrt()[:, 1:])

    def test_weight_draws_follow_one_another(self):
        parts = [found(2, 0.0, residual=0.1), found(2, 500.0, residual=0.2)]
        both = joined(parts)
        assert torch.equal(both.outputs, torch.cat([part.outputs for part in parts], 1))
        assert both.residual is not None and both.residual.shape == both.ess.shape == (6, 2)
        assert both.rhat is None
