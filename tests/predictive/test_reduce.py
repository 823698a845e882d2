"""`Predictive.reduce`: scores of draws that nobody keeps are those of draws that are kept."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import bayesae as bae
from bayesae import families, ood
from tests.predictive.test_predictive import normal


@pytest.fixture
def model():
    torch.manual_seed(0)
    encoder, decoder = bae.nets.mlp(7, [6], (2, 2)), bae.nets.mlp(2, [6], 7)
    return bae.Autoencoder(encoder, decoder, bae.likelihoods.Gaussian(0.4)).double().eval()


OPTIONS = {"n_weight_draws": 4, "n_latent_draws": 3, "seed": 3}


@pytest.mark.parametrize("kind", ["sampled", "linearised", "mixture"])
@pytest.mark.parametrize("chunk_size", [1, 60, None])
def test_every_score_is_that_of_a_call(model, rows, kind, chunk_size):
    weights = normal(model, is_linearised=kind == "linearised")
    weights = families.Mixture([weights, normal(model, 0.1)]) if kind == "mixture" else weights
    predictive = bae.Predictive(model, weights, bae.codes.amortised)
    # what a block of weights holds depends on the chunk, and with it the order of draws of a mixture's parts
    kept = predictive(rows, keep_outputs=True, chunk_size=chunk_size, **OPTIONS)
    expected = ood.all_scores(kept)
    found = predictive.reduce(ood.all_scores, rows, chunk_size=chunk_size, **OPTIONS)
    assert found.keys() == expected.keys() >= {"waic", "largest_weight", "information_gain", "code_volume"}
    for name, score in found.items():
        assert_close(score, expected[name], rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize(("chunk_size", "n_rows"), [(5, [1] * 9), (12, [1] * 9), (60, [5, 4]), (None, [9])])
def test_no_more_than_a_chunk_is_held(model, rows, chunk_size, n_rows):
    """All weight draws of as many rows as the chunk has room for, and of one at least."""
    held = []

    def reduction(draws):
        held.append(tuple(draws.outputs.shape[:3]))
        return {"waic": ood.waic(draws)}

    bae.Predictive(model, normal(model), bae.codes.amortised).reduce(reduction, rows, chunk_size=chunk_size, **OPTIONS)
    assert held == [(3, 4, n) for n in n_rows]


def test_densities_that_are_not_finite_are_refused(model, rows):
    with pytest.raises(bae.errors.NonFiniteError, match="outside the training range"):
        bae.Predictive(model, normal(model)).reduce(ood.all_scores, 1e200 * rows, n_weight_draws=2, seed=0)


def test_masks_and_particles(model, rows):
    weights = families.Particles(normal(model).sample(3))
    predictive = bae.Predictive(model, weights)
    mask = torch.rand(rows.shape, generator=torch.Generator().manual_seed(0)) < 0.7
    found = predictive.reduce(ood.all_scores, rows, mask, seed=0)
    assert_close(found["waic"], ood.waic(predictive(rows, mask, seed=0)))


@pytest.mark.parametrize("kind", ["sampled", "linearised", "mixture"])
@pytest.mark.parametrize("chunk_size", [1, None])
def test_rows_with_missing_entries_are_scored_on_what_is_there(model, rows, kind, chunk_size):
    """Draws say what was observed, in chunks and in a mixture too."""
    weights = normal(model, is_linearised=kind == "linearised")
    weights = families.Mixture([weights, normal(model, 0.1)]) if kind == "mixture" else weights
    predictive = bae.Predictive(model, weights, bae.codes.amortised)
    mask = torch.rand(rows.shape, generator=torch.Generator().manual_seed(0)) < 0.7
    mask[0] = True
    kept = predictive(rows, mask, keep_outputs=True, chunk_size=chunk_size, **OPTIONS)
    assert torch.equal(kept.mask, mask)
    found = predictive.reduce(ood.all_scores, rows, mask, chunk_size=chunk_size, **OPTIONS)["information_gain"]
    assert_close(found, ood.information_gain(kept, mask))
    complete = ood.information_gain(kept, torch.ones_like(mask))
    assert found[0] == complete[0] and bool((found[1:] < complete[1:]).all())


def test_a_name_that_some_rows_lack_is_left_out(model, rows):
    """As in a call over all rows, whose codes have a volume only if each of them moves."""

    def reduction(draws):
        names = {"waic", "last"} if draws.latents.shape[2] == 1 else {"waic", "first"}
        return {name: ood.waic(draws) for name in sorted(names)}

    found = bae.Predictive(model, normal(model)).reduce(reduction, rows, n_weight_draws=2, chunk_size=8, seed=0)
    assert list(found) == ["waic"] and found["waic"].shape == (9,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_codes_that_weight_draws_share_count_once(model, rows, dtype):
    """Under weights of the decoder alone two code draws stay two, which have no volume in two dimensions."""
    model = model.to(dtype)
    predictive = bae.Predictive(model, normal(model, patterns=("decoder.**",)), bae.codes.amortised)
    for n_latent_draws, has_volume in ((2, False), (3, True)):
        found = predictive.reduce(ood.all_scores, rows.to(dtype), **(OPTIONS | {"n_latent_draws": n_latent_draws}))
        assert ("code_volume" in found) == has_volume
    with pytest.raises(bae.errors.NonFiniteError, match="span all 2 dimensions"):
        ood.code_volume(predictive(rows.to(dtype), **(OPTIONS | {"n_latent_draws": 2})))


def test_codes_that_never_move_have_no_volume(model, rows):
    predictive = bae.Predictive(model, normal(model, patterns=("decoder.**",)))
    found = predictive.reduce(ood.all_scores, rows, **(OPTIONS | {"n_latent_draws": 1}))
    assert "code_volume" not in found
    assert float(found["code_variance"].max()) < 1e-25
