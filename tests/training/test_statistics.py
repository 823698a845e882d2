"""Running statistics of weight draws, against a plain loop over a module of its own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import bayesae as bae
from bayesae.errors import DataError, UnsupportedError
from bayesae.functional import parameters_of
from tests.conftest import small_model


def normalised_model():
    torch.manual_seed(2)
    encoder = nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2))
    decoder = nn.Sequential(nn.Linear(2, 6), nn.BatchNorm1d(6, affine=False), nn.ReLU(), nn.Linear(6, 7))
    return bae.Autoencoder(encoder, decoder, bae.likelihoods.Gaussian(0.3)).double().eval()


def atoms_of(model, n=1):
    return bae.families.Particles({
        name: torch.stack([leaf * (1 + s) for s in range(n)]) for name, leaf in parameters_of(model.network).items()
    })


def swag(model, rows, **kwargs):
    method = bae.weights.SWAG(rank=2, epochs=6, learning_rate=1e-3, **kwargs)
    with pytest.warns(UserWarning, match=r"encoder\.1, decoder\.1 .* bayesae\.recompute_statistics"):
        return bae.fit_weights(method, model, rows, seed=0, batch_size=4)


@pytest.fixture
def data():
    return torch.rand(40, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * 3


def test_statistics_are_those_of_a_plain_pass(data):
    """One batch: the moments of each layer's own inputs."""
    model = normalised_model()
    before = copy.deepcopy(model.state_dict())
    posterior = swag(model, data)
    particles = bae.recompute_statistics(posterior, model, data, 3, batch_size=40, seed=1)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items()) and not model.training
    with bae.random.scope(1):
        draws = posterior.sample(3)
    for s in range(3):
        twin = copy.deepcopy(model)
        twin.load_state_dict({name: leaf[s] for name, leaf in draws.items()}, strict=False)
        twin.encoder.train()
        twin.decoder.train()
        h = twin.encoder[0](data)
        assert_close(particles.atoms["encoder.1.running_mean"][s], h.mean(0).detach(), rtol=1e-12, atol=1e-12)
        assert_close(particles.atoms["encoder.1.running_var"][s], h.var(0).detach(), rtol=1e-12, atol=1e-12)
        h = twin.decoder[0](twin.encoder(data))
        assert_close(particles.atoms["decoder.1.running_mean"][s], h.mean(0).detach(), rtol=1e-10, atol=1e-12)
        assert_close(particles.atoms["decoder.1.running_var"][s], h.var(0).detach(), rtol=1e-10, atol=1e-12)
        for name, leaf in draws.items():
            assert torch.equal(particles.atoms[name][s], leaf[s])


def test_batches_count_by_their_rows(data):
    """A plain loop with the average weighted by rows, the last batch smaller than the others."""
    model = normalised_model()
    particles = bae.recompute_statistics(atoms_of(model), model, data, batch_size=15, seed=1)
    with bae.random.scope(1):
        parts = data[torch.randperm(40)].split(15)
    hidden = [model.encoder[0](part).detach() for part in parts]
    expected = sum(len(h) * h.var(0) for h in hidden) / 40
    assert_close(particles.atoms["encoder.1.running_var"][0], expected, rtol=1e-12, atol=1e-12)
    assert_close(
        particles.atoms["encoder.1.running_mean"][0], model.encoder[0](data).mean(0).detach(), rtol=1e-12, atol=0
    )


def test_a_stream_is_read_for_one_pass_of_n_data(data):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(data)

    model = normalised_model()
    particles = bae.recompute_statistics(atoms_of(model), model, Stream(), batch_size=10, n_data=20)
    h = model.encoder[0](data[:20]).detach()
    assert_close(particles.atoms["encoder.1.running_mean"][0], h.mean(0), rtol=1e-12, atol=1e-12)


def test_draws_are_all_particles_or_32(data):
    model = normalised_model()
    particles = bae.recompute_statistics(atoms_of(model, 2), model, data, seed=1)
    assert particles.n_atoms == 2
    for name, leaf in atoms_of(model, 2).atoms.items():
        assert torch.equal(particles.atoms[name], leaf)
    subset, mean = bae.Subset.of(model.network), parameters_of(model.network)
    posterior = bae.families.DiagonalNormal(mean, subset.ravel(mean) ** 2, subset)
    assert bae.recompute_statistics(posterior, model, data, seed=1).n_atoms == 32
    for wrong in ({"n_draws": 0}, {"batch_size": 0}):
        with pytest.raises(DataError, match=f"{next(iter(wrong))}.*0"):
            bae.recompute_statistics(posterior, model, data, **wrong)


def test_only_normalisation_layers_are_in_training_mode(data):
    """Dropout is not: the moments are those of the inputs as they are, though the model comes in training mode."""
    model = normalised_model()
    dropping = bae.Autoencoder(nn.Sequential(nn.Dropout(0.5), *model.encoder), model.decoder, model.likelihood).train()
    particles = bae.recompute_statistics(atoms_of(dropping), dropping, data, seed=1, batch_size=40)
    h = model.encoder[0](data).detach()
    assert_close(particles.atoms["encoder.2.running_mean"][0], h.mean(0), rtol=1e-12, atol=1e-12)
    assert dropping.training and dropping.encoder[0].training and dropping.encoder[2].momentum == 0.1


def test_noise_that_was_learned_is_not_lost_in_silence(data):
    model = normalised_model()
    subset, mean = bae.Subset.of(model.network), parameters_of(model.network)
    noise = bae.likelihoods.Gaussian(0.7).double().state_dict()
    posterior = bae.families.DiagonalNormal(mean, subset.ravel(mean) ** 2, subset, noise=noise)
    for one in (posterior, bae.families.Mixture([posterior, posterior])):
        with pytest.warns(UserWarning, match=r"model\.with_noise\(posterior\.noise\)") as caught:
            bae.recompute_statistics(one, model, data, 2, seed=1)
        assert caught[0].filename == __file__
    silent = bae.families.DiagonalNormal(mean, subset.ravel(mean) ** 2, subset)  # a warning would be an error
    assert bae.recompute_statistics(bae.families.Mixture([silent, silent]), model, data, 2, seed=1).n_atoms == 2


def test_predictions_use_them(data, tmp_path):
    model = normalised_model()
    posterior = swag(model, data)
    particles = bae.recompute_statistics(posterior, model, data, 3, seed=1)
    assert particles.info["n_collected"] == 3
    draws = bae.Predictive(model, particles)(data, keep_outputs=True)
    for s in range(3):
        twin = copy.deepcopy(model)
        twin.load_state_dict({name: leaf[s] for name, leaf in particles.atoms.items()}, strict=False)
        assert_close(draws.outputs[0, s], twin(data).detach(), rtol=1e-10, atol=1e-12)
    stale = bae.Predictive(
        model, bae.families.Particles({k: v for k, v in particles.atoms.items() if "running" not in k})
    )
    assert float((stale(data, keep_outputs=True).outputs - draws.outputs).abs().max()) > 0.1
    bae.save(bae.Predictive(model, particles), tmp_path / "file")
    loaded = bae.load(tmp_path / "file", encoder=model.encoder, decoder=model.decoder)
    assert torch.equal(loaded(data).log_likelihood, draws.log_likelihood)


def test_a_stochastic_code_draws_while_statistics_are_taken(data):
    torch.manual_seed(2)
    encoder = nn.Sequential(nn.Linear(7, 4), nn.Unflatten(1, (2, 2)))
    decoder = nn.Sequential(nn.Linear(2, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 7))
    model = bae.Autoencoder(encoder, decoder, bae.likelihoods.Gaussian(0.3)).double().eval()
    weights = bae.fit_weights(bae.weights.MAP(), model, data)
    plain, drawn = (
        bae.recompute_statistics(weights, model, data, codes=codes, seed=0).atoms["decoder.1.running_var"]
        for codes in (bae.codes.encode, bae.codes.amortised)
    )
    assert bool((drawn > plain).all())
    # fresh noise for every draw of the weights: those of one network twice have statistics of their own
    twice = bae.families.Particles({name: leaf.expand(2, *leaf.shape) for name, leaf in weights.mean.items()})
    atoms = bae.recompute_statistics(twice, model, data, codes=bae.codes.amortised, batch_size=40, seed=0).atoms
    assert float((atoms["decoder.1.running_var"][0] / atoms["decoder.1.running_var"][1] - 1).abs().min()) > 1e-4


def test_a_network_without_statistics_is_refused(rows):
    without = nn.Sequential(nn.Linear(7, 2), nn.BatchNorm1d(2, track_running_stats=False))
    other = bae.Autoencoder(without, nn.Linear(2, 7), bae.likelihoods.Gaussian(0.3)).double().eval()
    for model in (small_model(), other):
        with pytest.raises(UnsupportedError, match="running statistics"):
            bae.recompute_statistics(atoms_of(model), model, rows)
