"""Passes over the data, and what Laplace refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.testing import assert_close

import bayesae as bae
from bayesae.functional import parameters_of
from bayesae.weights import Laplace, LowRank
from tests.conftest import small_model
from tests.weights.test_structures import STRUCTURES


class TestPasses:
    def start(self, model, structure="eigencorrected", n_data=9):
        method, joint = Laplace(structure), bae.log_joint(model, n_data=n_data)
        return method, joint, method.init(parameters_of(model.network), joint)

    @pytest.mark.parametrize(("structure", "epochs"), [("diagonal", 1), ("eigencorrected", 2), (LowRank(3, 5), 5)])
    def test_epochs(self, structure, epochs):
        assert Laplace(structure).epochs == epochs

    def test_log_likelihood_counts_one_pass(self, model, rows):
        one = bae.fit_weights(Laplace("kronecker", tunes_prior=False), model, rows)
        method, joint, state = self.start(model)
        for _ in range(2):
            for part in rows.split(4):
                state, _ = method.update(state, bae.Batch(part), joint)
            assert state.n_seen == 9
            likelihood = float(model.likelihood.log_prob(model(rows), rows).sum().detach())
            assert state.log_likelihood == pytest.approx(likelihood, rel=1e-12)
        assert one.mean.keys() == method.posterior(state, joint).mean.keys()

    @pytest.mark.parametrize("structure", ["eigencorrected", "low_rank"])
    def test_an_unfinished_pass_is_said(self, model, rows, structure):
        method, joint, state = self.start(model, structure)
        for n_done, n_rows in ((0, 4), (0, 9), (1, 4)):
            part = rows[state.n_seen % 9 : n_rows] if n_done == 0 else rows[:n_rows]
            state, _ = method.update(state, bae.Batch(part), joint)
            with pytest.raises(bae.errors.NotFittedError, match=f"got {n_done} and {n_rows} rows"):
                method.posterior(state, joint)

    def test_a_batch_across_two_passes_is_refused(self, model, rows):
        method, joint, state = self.start(model, n_data=8)
        state, _ = method.update(state, bae.Batch(rows[:5]), joint)
        with pytest.raises(bae.errors.DataError, match="got 10 rows in pass 1"):
            method.update(state, bae.Batch(rows[:5]), joint)

    def test_a_pass_too_many_is_refused(self, model, rows):
        method, joint, state = self.start(model)
        for _ in range(2):
            state, _ = method.update(state, bae.Batch(rows), joint)
        with pytest.raises(bae.errors.DataError, match="got 18 rows in pass 2"):
            method.update(state, bae.Batch(rows), joint)

    @pytest.mark.parametrize("structure", ["kronecker", "dense", LowRank(3, n_passes=1)], ids=str)
    def test_one_pass_pays_for_rows_not_seen(self, model, rows, structure):
        whole = bae.fit_weights(Laplace(structure), model, torch.cat([rows, rows]), batch_size=18)
        method, joint, state = self.start(model, structure, n_data=18)
        state, _ = method.update(state, bae.Batch(rows), joint)
        got = method.posterior(state, joint)
        for name, value in whole.variances().items():
            assert_close(got.variances()[name], value, rtol=1e-7, atol=0)
        assert got.info == pytest.approx(whole.info, rel=1e-8)

    @pytest.mark.parametrize("structure", STRUCTURES, ids=str)
    def test_a_state_is_a_value(self, model, rows, structure):
        """Two batches from one state do not meet, and a copy goes on alike."""
        method, joint, state = self.start(model, structure)
        first, _ = method.update(state, bae.Batch(rows[:4]), joint)
        method.update(first, bae.Batch(rows[:5].flip(1)), joint)
        method.update(state, bae.Batch(rows[4:]), joint)
        results = []
        for start in (first, copy.deepcopy(first)):
            state, _ = method.update(start, bae.Batch(rows[4:]), joint)
            for _ in range(method.epochs - 1):
                state, _ = method.update(state, bae.Batch(rows), joint)
            results.append(method.posterior(state, joint).variances())
        assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])

    def test_no_random_number_of_the_caller_is_used(self, model, rows):
        before = torch.get_rng_state()
        method, joint, state = self.start(model, LowRank(3, n_passes=1))
        method.update(state, bae.Batch(rows), joint)
        assert torch.equal(before, torch.get_rng_state())


class TestRefusals:
    @pytest.mark.parametrize("structure", ["full", ("decoder.**",), bae.Subset({}), 3], ids=lambda v: type(v).__name__)
    def test_another_structure(self, structure):
        with pytest.raises(bae.errors.UnsupportedError, match=r"one of \['diagonal', .* by subset="):
            Laplace(structure)

    def test_ranks(self):
        for wrong in ({"rank": 0}, {"n_passes": 0}):
            with pytest.raises(bae.errors.DataError, match="rank and n_passes of at least 1"):
                LowRank(**wrong)

    def test_a_dense_matrix_that_would_not_fit(self, rows):
        model = small_model(hidden=(2000,))
        with pytest.raises(bae.errors.UnsupportedError, match="at most 16384 weights .* Choose fewer with subset="):
            bae.fit_weights(Laplace("dense"), model, rows)

    @pytest.mark.parametrize("structure", ["kronecker", "eigencorrected"])
    @pytest.mark.parametrize(
        ("pattern", "missing"), [("*.weight", "bias"), ("*.bias", "weight")], ids=["weight", "bias"]
    )
    def test_a_layer_in_part(self, model, rows, structure, pattern, missing):
        with pytest.raises(
            bae.errors.UnsupportedError,
            match=rf"layer 'encoder.1' without all of 'encoder.1.{missing}'.*'encoder.1.\*'",
        ):
            bae.fit_weights(Laplace(structure, subset=(pattern,)), model, rows)
        mask = torch.ones(6, 7, dtype=torch.bool)
        mask[0, 0] = False
        whole = bae.Subset.of(model.network).masks
        with pytest.raises(bae.errors.UnsupportedError, match=r"without all of 'encoder.1.weight'"):
            bae.fit_weights(Laplace(structure, subset=bae.Subset({**whole, "encoder.1.weight": mask})), model, rows)

    def test_a_frozen_bias(self, model, rows):
        model.decoder[1].bias.requires_grad_(False)
        with pytest.raises(bae.errors.UnsupportedError, match="let it require gradients"):
            bae.fit_weights(Laplace("kronecker"), model, rows)
