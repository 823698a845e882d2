"""Labels, covariates and exposures: from the batch to every network, in draws, in closed form and in Laplace."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader

import bayesae as bae
from bayesae import nets
from bayesae.functional import map_over_draws, parameters_of
from tests.twins import dense_jacobian

N = 9
STRUCTURES = ("diagonal", "kronecker", "eigencorrected", "low_rank", "dense")


def conditional(likelihood=None, *, seed=0):
    """A label in the decoder, covariates' place in the encoder taken by the same label."""
    torch.manual_seed(seed)
    encoder = nets.Conditional(nets.mlp(6 + 3, [4], 2), 3)
    decoder = nets.Conditional(nets.mlp(2 + 3, [4], 6), 3)
    likelihood = bae.likelihoods.Gaussian(0.3) if likelihood is None else likelihood
    return bae.Autoencoder(encoder, decoder, likelihood, data_shape=(6,)).double().eval()


@pytest.fixture
def batch():
    return bae.Batch(torch.rand(N, 6, dtype=torch.float64), context=torch.arange(N) % 3)


def test_the_packed_network_is_the_model(batch):
    model = conditional()
    x, context = batch.x, batch.context[:, None].double()
    assert_close(model.network(model.inputs(batch._replace(context=context))), model(x, context))
    assert list(dict(model.network.named_parameters())) == list(dict(model.named_parameters()))
    one_hot = nn.functional.one_hot(batch.context, 3).double()
    z = model.encoder.net(torch.cat([x, one_hot], 1))
    assert_close(model(x, context), model.decoder.net(torch.cat([z, one_hot], 1)))


def test_training_uses_the_label(batch):
    """Rows that are nothing but their label, through a code that an encoder of zeros leaves empty."""
    x = nn.functional.one_hot(batch.context, 6).double()
    model = conditional(bae.likelihoods.Gaussian())
    nn.init.zeros_(model.encoder.net[3].weight)
    model.encoder.requires_grad_(False)
    history = bae.fit_model(
        model, batch._replace(x=x), epochs=100, learning_rate=5e-2, seed=0, progress=False, batch_size=N
    )
    assert history.train[-1] > history.train[0] + 1
    assert float((model(x, batch.context[:, None]) - x).detach().abs().max()) < 0.1
    other = model(x, (batch.context[:, None] + 1) % 3).detach()
    assert_close(other.argmax(1), (batch.context + 1) % 3)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("kind", ["label", "exposure"])
def test_laplace_of_every_structure_in_closed_form_and_in_draws(structure, kind, batch):
    if kind == "label":
        model = conditional()
    else:
        torch.manual_seed(0)
        decoder = nets.Offset(nets.mlp(2, [4], 6))
        model = bae.Autoencoder(nets.mlp(6, [4], 2), decoder, bae.likelihoods.Poisson(), data_shape=(6,)).double()
        model.eval()
        counts = torch.poisson(3 * batch.x)
        batch = bae.Batch(counts, context=1 + batch.x.mean(1))
    inference = bae.weights.Laplace(structure, tunes_prior=False)
    weights = bae.fit_weights(inference, model, batch, batch_size=4, progress=False, seed=0)
    predictive = bae.Predictive(model, weights)
    moments = predictive.moments(batch)
    assert moments.is_exact
    chunked = predictive.moments(batch, chunk_size=2)
    assert_close(chunked.weights, moments.weights)
    # of single rows, whose context is theirs
    one = predictive.moments(bae.Batch(batch.x[4:5], context=batch.context[4:5]))
    assert_close(one.weights, moments.weights[4:5])
    drawn = predictive.moments(batch, n_weight_draws=1000, seed=1)
    assert float(((drawn.mean - moments.mean) / drawn.standard_error).abs().max()) < 4.5


def test_dense_laplace_is_the_brute_force_posterior(batch):
    model = conditional()
    inputs = model.inputs(batch._replace(context=batch.context[:, None].double()))
    jacobian = dense_jacobian(model.network, inputs)
    precision = torch.einsum("bop,boq->pq", jacobian, jacobian) / 0.09 + torch.eye(jacobian.shape[-1]).double()
    expected = torch.einsum("bop,pq,boq->bo", jacobian, torch.linalg.inv(precision), jacobian)
    weights = bae.fit_weights(bae.weights.Laplace("dense", tunes_prior=False), model, batch, progress=False)
    assert_close(bae.Predictive(model, weights).moments(batch).weights, expected, rtol=1e-8, atol=1e-10)


def test_chunks_and_loaders_change_nothing(batch):
    model = conditional()
    weights = bae.fit_weights(bae.weights.Ensemble(3, epochs=2), model, batch, seed=0, progress=False)
    predictive = bae.Predictive(model, weights)
    whole = predictive(batch, keep_outputs=True)
    assert_close(predictive(batch, keep_outputs=True, chunk_size=2).outputs, whole.outputs)
    rows = [bae.Batch(*(f if f is None else f[i] for f in batch)) for i in range(N)]

    def join(some):
        return bae.Batch(torch.stack([r.x for r in some]), context=torch.stack([r.context for r in some]))

    loader = DataLoader(rows, batch_size=4, collate_fn=join)  # pyright: ignore[reportArgumentType]
    assert_close(predictive(loader, keep_outputs=True).outputs, whole.outputs)
    swapped = predictive(batch._replace(context=(batch.context + 1) % 3), keep_outputs=True)
    assert float((swapped.outputs - whole.outputs).abs().min()) > 0
    # a Python loop over members and rows
    params = weights.sample(3)
    for s in range(3):
        one = {key: leaf[s] for key, leaf in params.items()}
        for b in range(N):
            packed = model.inputs(bae.Batch(batch.x[b : b + 1], context=batch.context[b : b + 1, None].double()))
            assert_close(whole.outputs[0, s, b], torch.func.functional_call(model.network, one, (packed,))[0])


def test_further_code_draws_have_their_rows_context(batch):
    model = conditional()
    params = {key: torch.stack([leaf, 2 * leaf]) for key, leaf in parameters_of(model.network).items()}
    z, context = torch.randn(3, 2, N, 2, dtype=torch.float64), batch.context[:, None].double()
    got = model.at(params).decode(z, context)
    assert got.shape == (3, 2, N, 6)
    for k in range(3):
        for s in range(2):
            own = {key[8:]: leaf[s] for key, leaf in params.items() if key.startswith("decoder.")}
            expected = torch.func.functional_call(model.decoder, own, (z[k, s], context))
            assert_close(got[k, s], expected)


@pytest.mark.parametrize("x_has_draws", [True, False])
def test_mapped_or_in_a_loop(x_has_draws, batch):
    model = conditional()
    params = {key: torch.stack([leaf, 2 * leaf, -leaf]) for key, leaf in parameters_of(model.decoder).items()}
    z = torch.randn(*([3] if x_has_draws else []), N, 2, dtype=torch.float64)
    context = (batch.context[:, None].double(),)
    mapped, looped = (
        map_over_draws(model.decoder, params, z, x_has_draws, use, shared=context) for use in (True, False)
    )
    assert_close(mapped, looped)


def test_the_decoder_of_a_predictive(batch):
    model = conditional()
    for inference in (bae.weights.Laplace(), bae.weights.Ensemble(2, epochs=1)):
        weights = bae.fit_weights(inference, model, batch, seed=0, progress=False)
        predictive, z = bae.Predictive(model, weights), torch.randn(5, 2, dtype=torch.float64)
        one = predictive.decoder(2, context=torch.tensor([[1.0]]), seed=0)(z)
        assert one.shape == (2, 5, 6)
        each = predictive.decoder(2, context=torch.tensor([[0.0], [1], [2], [1], [1]]), seed=0)(z)
        assert_close(each[:, [1, 3, 4]], one[:, [1, 3, 4]])
        assert float((each[:, [0, 2]] - one[:, [0, 2]]).abs().min()) > 0
        with pytest.raises(bae.errors.DataError, match="a context for the decoder"):
            predictive.decoder(2)(z)


def test_exposures_scale_rates():
    decoder = nets.Offset(nets.mlp(2, [4], 6))
    z, exposure = torch.randn(3, 2), torch.tensor([[1.0], [2.0], [0.5]])
    assert_close(decoder(z, exposure).exp(), decoder.net(z).exp() * exposure)
    images = nets.Offset(nets.conv_decoder(2, (1, 4, 4), channels=[2]))
    assert_close(images(z, exposure).exp(), images.net(z).exp() * exposure[:, :, None, None])
    with pytest.raises(bae.errors.DataError, match="positive exposures; got 0"):
        decoder(z, exposure * 0)
    with pytest.raises(bae.errors.UnsupportedError, match="Put all covariates into one Conditional"):
        nets.Offset(nets.Conditional(nets.mlp(3, [], 6)))


class TestErrors:
    def test_rows_without_a_context(self, batch):
        model, bare = conditional(), bae.Batch(batch.x)
        weights = bae.fit_weights(bae.weights.Laplace(), model, batch, progress=False)
        predictive = bae.Predictive(model, weights)
        for call in (predictive, predictive.moments, lambda x: bae.fit_weights(bae.weights.Laplace(), model, x)):
            with pytest.raises(bae.errors.DataError, match="a context for the encoder; got rows without one"):
                call(bare)
        with pytest.raises(bae.errors.DataError, match="a context for the encoder"):
            bae.fit_model(conditional(), batch.x, epochs=1, progress=False)

    def test_labels_that_are_no_classes(self, batch):
        model = conditional()
        for bad in (batch.context + 1, batch.context - 1, batch.context + 0.5):
            with pytest.raises(bae.errors.DataError, match="whole numbers from 0 to 2"):
                bae.fit_weights(bae.weights.Laplace(), model, batch._replace(context=bad), progress=False)

    def test_other_sizes(self, batch):
        for context in (batch.context[:8], batch.context.repeat(2)):
            with pytest.raises(bae.errors.ShapeError, match=f"a context of 9 rows; got {len(context)}"):
                bae.fit_weights(bae.weights.Laplace(), conditional(), batch._replace(context=context), progress=False)
        encoder = nets.Conditional(nets.mlp(8, [4], 2))
        model = bae.Autoencoder(encoder, nets.mlp(2, [4], 6), bae.likelihoods.Gaussian(1.0), data_shape=(6,)).double()
        with pytest.raises(bae.errors.ShapeError, match="rows that the encoder takes"):
            bae.fit_model(model, batch, epochs=1, progress=False)

    def test_a_shape_is_needed(self):
        decoder = nets.Conditional(nets.mlp(3, [], 6))
        with pytest.raises(bae.errors.UnsupportedError, match="the shape of a row for networks that take a context"):
            bae.Autoencoder(nets.mlp(6, [], 2), decoder, bae.likelihoods.Bernoulli())

    def test_labels_beyond_a_narrow_dtype(self):
        with pytest.raises(bae.errors.DataError, match="tells 300 tokens apart; got torch.bfloat16"):
            nets.OneHot(300)(torch.zeros(2, 1, dtype=torch.bfloat16))


def test_digits_given_their_label():
    """End to end with convolutions: the code need not hold the label, which the decoder is told."""
    x, labels = bae.datasets.load("digits", labels=True)
    x, labels = x.reshape(-1, 1, 8, 8)[:256], labels[:256]
    batch = bae.Batch(x, context=labels)
    torch.manual_seed(0)
    encoder = nets.Conditional(nets.conv_encoder((11, 8, 8), 2, channels=[8]), 10)
    decoder = nets.Conditional(nets.conv_decoder(12, (1, 8, 8), channels=[8]), 10)
    model = bae.Autoencoder(encoder, decoder, bae.likelihoods.Gaussian(), data_shape=(1, 8, 8))
    history = bae.fit_model(model, batch, epochs=8, learning_rate=1e-2, batch_size=64, seed=0, progress=False)
    assert history.train[-1] > history.train[0]
    weights = bae.fit_weights(bae.weights.Laplace(), model, batch, progress=False)
    predictive = bae.Predictive(model, weights)
    told = bae.ood.negative_log_density(predictive.moments(batch), x)
    lied = bae.ood.negative_log_density(predictive.moments(batch._replace(context=(labels + 1) % 10)), x)
    assert float((lied > told).float().mean()) > 0.9


class TestOneNumberARow:
    """Where a network reads one number of the context, more are refused and not left out."""

    def test_labels(self):
        torch.manual_seed(0)
        net, z, labels = nets.Conditional(nets.mlp(5, [4], 2), 3), torch.randn(3, 2), torch.arange(3.0)
        assert_close(net(z, labels), net(z, labels[:, None]))
        for bad in (torch.eye(3), torch.stack([labels, labels], 1), torch.zeros(3, 1, 1)):
            with pytest.raises(bae.errors.ShapeError, match=r"a context \(B, 1\).*use n_classes=None"):
                net(z, bad)

    def test_exposures(self):
        torch.manual_seed(0)
        net, z, exposure = nets.Offset(nets.mlp(2, [4], 3)), torch.randn(3, 2), torch.tensor([1.0, 2.0, 3.0])
        assert_close(net(z, exposure), net(z, exposure[:, None]))
        for n in (2, 3):
            with pytest.raises(bae.errors.ShapeError, match=rf"a context \(B, 1\); got \(3, {n}\). Give one exposure"):
                net(z, exposure[:, None].expand(3, n))

    def test_in_every_fit(self, batch):
        both = batch._replace(context=torch.stack([batch.context, batch.context], 1))
        for call in (
            lambda: bae.fit_model(conditional(), both, epochs=1, progress=False),
            lambda: bae.fit_weights(bae.weights.Laplace(), conditional(), both, progress=False),
        ):
            with pytest.raises(bae.errors.ShapeError, match=r"a context \(B, 1\); got \((9|1), 2\)"):
                call()
