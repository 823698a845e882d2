from __future__ import annotations

import copy
import dataclasses
import inspect

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import bayesae as bae
from bayesae import encoding, files
from bayesae.errors import FileError, NonFiniteError, ParameterError, ShapeError, UnsupportedError
from bayesae.functional import dtype_of, parameters_of
from tests.conftest import small_model
from tests.files.cases import (
    FAMILIES,
    LIKELIHOODS,
    NETS,
    BatchNormEncoder,
    image_model,
    laplace,
    particles,
    rows,
    with_likelihood,
    with_nets,
)
from tests.test_encoding import check_same


def through_a_file(predictive, path, **kwargs):
    files.save(predictive, path)
    return files.load(path, **kwargs)


def check_predicts_the_same_bits(a, b, x):
    for kwargs in ({}, {"n_weight_draws": 4}):
        one, other = (p.moments(x, seed=3, **kwargs) for p in (a, b))
        for name in ("mean", "noise", "code", "weights"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
        assert one.is_exact == other.is_exact
    # outputs of components with noise of their own are not joined
    keeps = len({repr(own.model.likelihood) for own, _ in a._shares(5)}) < 2
    one, other = (p(x, n_weight_draws=5, seed=4, keep_outputs=keeps) for p in (a, b))
    for name in ("latents", "log_likelihood", *(["outputs"] if keeps else [])):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def check_same_model(a, b):
    check_same(dict(a.state_dict()), dict(b.state_dict()))
    assert repr(a) == repr(b) and a.data_shape == b.data_shape
    for (name, one), (other_name, other) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        assert name == other_name and one.requires_grad == other.requires_grad
        assert isinstance(other, nn.Parameter) and other.is_leaf
    assert [m.training for m in a.modules()] == [m.training for m in b.modules()]
    assert [getattr(net, "recipe", None) for net in (a.encoder, a.decoder)] == [
        getattr(net, "recipe", None) for net in (b.encoder, b.decoder)
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_comes_back(name, tmp_path):
    before = FAMILIES[name]()
    after = through_a_file(before, tmp_path / "file")
    check_same(before.weights, after.weights)
    check_same_model(before.model, after.model)
    assert (before.linearised, before.codes) == (after.linearised, after.codes)
    check_predicts_the_same_bits(before, after, rows())


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_every_likelihood_comes_back(name, tmp_path):
    before, x, decoder = with_likelihood(name)
    after = through_a_file(before, tmp_path / "file", decoder=None if hasattr(decoder, "recipe") else decoder)
    one, other = before.model.likelihood, after.model.likelihood
    assert (one.arguments, one.is_learned, one.is_estimated) == (other.arguments, other.is_learned, other.is_estimated)
    check_same_model(before.model, after.model)
    check_predicts_the_same_bits(before, after, x)


def test_nothing_of_a_predictive_is_forgotten():
    assert [field.name for field in dataclasses.fields(bae.Predictive)] == ["model", "weights", "codes", "linearised"]
    parameters = list(inspect.signature(bae.Autoencoder).parameters)
    assert parameters == ["encoder", "decoder", "likelihood", "data_shape"]


def test_no_family_is_forgotten():
    assert {type(make().weights).__name__ for make in FAMILIES.values()} == set(bae.families.__all__)


def test_no_likelihood_is_forgotten():
    assert {name.split(",")[0] for name in LIKELIHOODS} == set(bae.likelihoods.NAMES)


def test_noise_that_nobody_has_estimated_stays_unknown(tmp_path):
    before = particles(small_model(bae.likelihoods.Gaussian()))
    assert not through_a_file(before, tmp_path / "file").model.likelihood.is_estimated


@pytest.mark.parametrize("name", NETS)
def test_networks_with_a_recipe_come_back_from_the_file_alone(name, tmp_path):
    before, batch = with_nets(name)
    after = through_a_file(before, tmp_path / "file")
    check_same_model(before.model, after.model)
    check_predicts_the_same_bits(before, after, batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_networks_of_other_dtypes_come_back(dtype, tmp_path):
    before, batch = with_nets("conv", dtype)
    after = through_a_file(before, tmp_path / "file")
    assert dtype_of(after.model) is dtype
    check_same_model(before.model, after.model)
    check_predicts_the_same_bits(before, after, batch)


def test_a_network_of_one_s_own_is_passed_in_and_not_touched(tmp_path):
    before = particles(image_model())
    encoder = BatchNormEncoder()
    encoder(torch.randn(2, 1, 4, 4)).sum().backward()
    decoder = nn.Sequential(nn.Linear(2, 32), nn.Unflatten(1, (2, 4, 4)), nn.Tanh(), nn.Conv2d(2, 1, 3, padding=1))
    given = copy.deepcopy((encoder.state_dict(), decoder.state_dict()))
    after = through_a_file(before, tmp_path / "file", encoder=encoder, decoder=decoder)
    check_same((dict(encoder.state_dict()), dict(decoder.state_dict())), tuple(map(dict, given)))
    assert all(parameter.requires_grad for parameter in encoder.parameters())
    check_same_model(before.model, after.model)
    assert not after.model.encoder.conv.bias.requires_grad and after.model.decoder[3].training
    assert not after.model.encoder.norm.training
    assert all(parameter.grad is None for parameter in after.model.parameters())
    check_predicts_the_same_bits(before, after, rows(5, 1, 4, 4))


def test_shared_weights_inside_a_network_stay_shared(tmp_path):
    def make():
        net = nn.Sequential(nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 7), nn.Linear(7, 2))
        net[2].weight = net[0].weight
        return net

    before = particles(bae.Autoencoder(make(), bae.nets.mlp(2, [], 7), bae.likelihoods.Gaussian(0.2)).double().eval())
    after = through_a_file(before, tmp_path / "file", encoder=make())
    assert after.model.encoder[2].weight is after.model.encoder[0].weight
    check_predicts_the_same_bits(before, after, rows())
    untied = nn.Sequential(nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 7), nn.Linear(7, 2))
    with pytest.raises(ParameterError, match="shared"):
        files.load(tmp_path / "file", encoder=untied)


def test_a_missing_network_is_named(tmp_path):
    files.save(particles(image_model()), tmp_path / "file")
    with pytest.raises(UnsupportedError, match=r"encoder=net.*BatchNormEncoder.*conv\.weight"):
        files.load(tmp_path / "file")
    with pytest.raises(UnsupportedError, match="decoder="):
        files.load(tmp_path / "file", encoder=BatchNormEncoder())


def test_a_network_that_does_not_fit_is_named(tmp_path):
    files.save(particles(), tmp_path / "file")
    with pytest.raises(ShapeError, match=r"1\.weight.*\(6, 7\).*\(5, 7\)"):
        files.load(tmp_path / "file", encoder=bae.nets.mlp(7, [5, 4], 2))
    with pytest.raises(ParameterError, match=r"7\.weight"):
        files.load(tmp_path / "file", encoder=bae.nets.mlp(7, [6, 4, 4], 2))


def test_a_network_that_was_changed_after_its_recipe_counts_as_one_s_own(tmp_path):
    model = small_model()
    model.encoder[2] = nn.ReLU()
    before = particles(model)
    files.save(before, tmp_path / "file")
    with pytest.raises(UnsupportedError, match="encoder="):
        files.load(tmp_path / "file")
    check_predicts_the_same_bits(before, files.load(tmp_path / "file", encoder=model.encoder), rows())
    for change in ({"net": "mlp", "arguments": {}}, {"net": "none", "arguments": {}}, 3):
        model = small_model()
        model.encoder.recipe = change
        files.save(particles(model), tmp_path / "file")
        with pytest.raises(UnsupportedError, match="encoder="):
            files.load(tmp_path / "file")


def test_what_has_no_name_in_a_file_is_named(tmp_path):
    class MyLikelihood(bae.likelihoods.Gaussian):
        pass

    class Gaussian(bae.likelihoods.Gaussian):
        """Another with a known name."""

        arguments = None

    class MyAutoencoder(bae.Autoencoder):
        pass

    class MyPosterior(bae.families.Particles):
        pass

    def my_codes(model, batch, *, n_latent_draws=1):
        return bae.codes.encode(model, batch)

    model = small_model()
    mine = MyAutoencoder(model.encoder, model.decoder, model.likelihood)
    for bad, name in (
        (particles(small_model(MyLikelihood(0.2))), "MyLikelihood"),
        (particles(small_model(Gaussian(0.2))), "Gaussian"),
        (particles(codes=my_codes), "my_codes"),
        (particles(mine), "MyAutoencoder"),
        (bae.Predictive(model, MyPosterior(particles(model).weights.atoms)), "MyPosterior"),
    ):
        with pytest.raises(UnsupportedError, match=name):
            files.save(bad, tmp_path / "file")
    assert not (tmp_path / "file").exists()


def test_saving_and_loading_touch_nothing_of_the_caller(tmp_path):
    before = laplace("kronecker")
    state = copy.deepcopy(before.model.state_dict())
    generator = torch.get_rng_state()
    threads = torch.get_default_dtype()
    through_a_file(before, tmp_path / "file")
    assert torch.equal(generator, torch.get_rng_state()) and torch.get_default_dtype() is threads
    check_same(dict(state), dict(before.model.state_dict()))


def test_the_default_dtype_of_the_reader_does_not_matter(tmp_path):
    before, batch = with_nets("conv", torch.float32)
    torch.set_default_dtype(torch.float64)
    try:
        after = through_a_file(before, tmp_path / "file")
    finally:
        torch.set_default_dtype(torch.float32)
    check_same_model(before.model, after.model)
    check_predicts_the_same_bits(before, after, batch)


@pytest.mark.parametrize("name", [*FAMILIES])
def test_a_float64_file_as_float32(name, tmp_path):
    before = FAMILIES[name]()
    after = through_a_file(before, tmp_path / "file", dtype=torch.float32)
    assert dtype_of(after.model) is torch.float32
    weights = after.weights
    assert {leaf.dtype for leaf in weights.mean.values()} == {torch.float32}
    for part in getattr(weights, "parts", [weights]):
        for field in ("var", "diagonal", "factor", "precision"):
            if hasattr(part, field):
                assert getattr(part, field).dtype is torch.float64
    one, other = before.moments(rows(), seed=1), after.moments(rows().float(), seed=1)
    assert other.mean.dtype is torch.float32
    if name in {"SWAG-diagonal", "mixture of unlike families"}:  # torch draws other numbers in float32
        assert_close({k: v.double() for k, v in weights.mean.items()}, dict(before.weights.mean), rtol=1e-5, atol=1e-6)
        wide = {k: v.double() for k, v in weights.variances().items()}
        assert_close(wide, dict(before.weights.variances()), rtol=1e-4, atol=1e-8)
        return
    assert_close(other.mean.double(), one.mean, rtol=1e-5, atol=1e-5)
    assert_close(other.weights.double(), one.weights, rtol=1e-4, atol=1e-6)


def test_a_float64_file_as_bfloat16_and_as_float16(tmp_path):
    before = particles()
    for dtype in (torch.bfloat16, torch.float16):
        after = through_a_file(before, tmp_path / "file", dtype=dtype)
        assert_close(after.moments(rows().to(dtype)).mean.double(), before.moments(rows()).mean, rtol=0.05, atol=0.05)
    before.weights.atoms["decoder.1.bias"][:] = 1e5
    with pytest.raises(NonFiniteError):
        through_a_file(before, tmp_path / "file", dtype=torch.float16)


def test_parts_that_share_a_mean_share_it_after_loading(tmp_path):
    for dtype in (None, torch.float32):
        after = through_a_file(FAMILIES["side by side"](), tmp_path / "file", dtype=dtype)
        one, other = (part.mean for part in after.weights.parts)
        assert all(one[name] is other[name] for name in one)


def test_the_posterior_and_the_model_do_not_share_memory_after_loading(tmp_path):
    model = small_model()
    before = bae.Predictive(model, bae.families.Particles({k: v[None] for k, v in model.network.named_parameters()}))
    after = through_a_file(before, tmp_path / "file")
    with torch.no_grad():
        next(after.model.parameters()).zero_()
    check_same(before.weights.sample(1), after.weights.sample(1))


def test_devices_and_dtypes_that_are_none(tmp_path):
    files.save(particles(), tmp_path / "file")
    for device in ("meta", "nowhere"):
        with pytest.raises(UnsupportedError, match="cuda"):
            files.load(tmp_path / "file", device=device)
    with pytest.raises(UnsupportedError, match="float32"):
        files.load(tmp_path / "file", dtype=torch.int64)


def test_a_description_for_people(tmp_path):
    files.save(laplace("kronecker"), tmp_path / "file")
    found = files.describe(tmp_path / "file")
    assert found["encoder"]["recipe"]["net"] == "mlp"
    assert found["encoder"]["state"]["1.weight"] == "float64 (6, 7)"
    assert found["weights"]["type"] == "KroneckerNormal" and found["weights"]["info"]["prior_precision"] > 0
    assert found["likelihood"] == {"name": "Gaussian", "arguments": found["likelihood"]["arguments"], "state": {
        "_extra_state": "float64 ()"
    }}  # fmt: skip
    assert found["versions"]["torch"] == torch.__version__


def test_another_file_of_the_library_is_no_predictive(tmp_path):
    encoding.write(tmp_path / "file", {}, {"kind": "checkpoint", "value": None})
    for function in (files.load, files.describe):
        with pytest.raises(FileError, match="checkpoint"):
            function(tmp_path / "file")


def test_the_parameters_of_the_model_and_of_the_posterior_may_differ(tmp_path):
    before = laplace("diagonal")
    with torch.no_grad():
        for parameter in before.model.parameters():
            parameter += 1
    after = through_a_file(before, tmp_path / "file")
    check_same(parameters_of(before.model), parameters_of(after.model))
    check_same(before.weights.mean, after.weights.mean)
