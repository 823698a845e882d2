"""The engine as laplace-torch's backend: equal to its own where those run, to brute force where they do not."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from bayesae.errors import UnsupportedError
from tests.twins import dense_jacobian

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from laplace import Laplace
    from laplace.curvature import BackPackGGN, CurvlinopsGGN

    from bayesae.adapters.laplace_backend import BayesaeGGN

# BackPACK hooks modules whose inputs need no gradient, which torch 2.15 warns about
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")
EXACT = {"rtol": 1e-9, "atol": 1e-11}


def dense_network():
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 5)).double()


def conv_network():
    layers = nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 3, 2, stride=2), nn.Flatten(), nn.Linear(12, 3)
    return nn.Sequential(*layers).double()


def image_network():
    """A convolutional autoencoder with an image for output."""
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, stride=2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(8, 2), nn.Tanh(), nn.Linear(2, 8),
        nn.Unflatten(1, (2, 2, 2)), nn.ConvTranspose2d(2, 2, 2, stride=2), nn.Tanh(),
        nn.ConvTranspose2d(2, 1, 3, padding=1),
    ).double()  # fmt: skip


def loader(network, likelihood, n=7, data=(5,)):
    x = torch.rand(n, *data, dtype=torch.float64)
    y = network(x).detach() + 0.3 * torch.randn_like(network(x))
    return DataLoader(TensorDataset(x, y if likelihood == "regression" else y.argmax(-1)), batch_size=3)


def fit(network, likelihood, structure, backend, data, **kwargs):
    la = Laplace(copy.deepcopy(network), likelihood, "all", structure, backend=backend, prior_precision=2.0, **kwargs)
    la.fit(data)
    return la


@pytest.mark.parametrize("likelihood", ["regression", "classification"])
@pytest.mark.parametrize("structure", ["diag", "kron", "full"])
@pytest.mark.parametrize("peer", [BackPackGGN, CurvlinopsGGN])
def test_equals_the_backends_of_laplace_torch(likelihood, structure, peer):
    network = dense_network()
    data = loader(network, likelihood)
    kwargs = {"sigma_noise": 0.4} if likelihood == "regression" else {}
    want, got = (fit(network, likelihood, structure, b, data, **kwargs) for b in (peer, BayesaeGGN))
    # CurvlinopsGGN multiplies by an identity in float32
    close = {"rtol": 1e-5, "atol": 1e-6} if (peer, structure) == (CurvlinopsGGN, "full") else EXACT
    evidence = float(want.log_marginal_likelihood())
    assert float(got.log_marginal_likelihood()) == pytest.approx(evidence, rel=close["rtol"])
    if structure == "kron":
        assert_close(got.H.to_matrix(), want.H.to_matrix(), **close)
    else:
        assert_close(got.H, want.H, **close)
    x = data.dataset.tensors[0]
    if likelihood == "regression":
        for mine, theirs in zip(got(x), want(x), strict=True):
            assert_close(mine, theirs.detach(), **close)
    else:
        assert_close(got(x), want(x).detach(), **close)


def test_equals_its_default_backend_on_convolutions():
    """Kronecker factors of a convolution: mean over positions of inputs, sum over positions of slopes."""
    network = conv_network()
    data = loader(network, "regression", data=(1, 4, 4))
    want, got = (fit(network, "regression", "kron", b, data) for b in (CurvlinopsGGN, BayesaeGGN))
    assert_close(got.H.to_matrix(), want.H.to_matrix(), **EXACT)


@pytest.mark.parametrize("likelihood", ["regression", "classification"])
def test_fits_where_the_others_refuse(likelihood):
    """Transposed convolutions and image-shaped outputs, against brute force."""
    network = image_network()
    if likelihood == "classification":  # a row of class scores for every second pixel
        network.append(nn.Flatten(2)).append(nn.Unflatten(2, (8, 2))).append(nn.Flatten(1, 2))
    data = loader(network, likelihood, data=(1, 4, 4))
    x = data.dataset.tensors[0]
    jacobian, outputs = dense_jacobian(network, x), network(x).detach()
    hessian = torch.eye(16, dtype=torch.float64).expand(7, -1, -1)
    if likelihood == "classification":
        p = outputs.softmax(-1)
        blocks = torch.diag_embed(p) - p[..., None] * p[..., None, :]
        hessian = torch.stack([torch.block_diag(*row) for row in blocks])
    brute = torch.einsum("bop,boq,bqr->pr", jacobian, hessian, jacobian)
    for structure, want in (("full", brute), ("diag", brute.diagonal())):
        la = fit(network, likelihood, structure, BayesaeGGN, data)
        assert_close(la.H, want, **EXACT)
    if likelihood == "regression":
        assert float(la.loss) == pytest.approx(0.5 * float(((outputs - data.dataset.tensors[1]) ** 2).sum()))


def test_predicts_images():
    """By a flat Jacobian: outputs have one axis in laplace-torch."""
    network = image_network()
    data = loader(network, "regression", data=(1, 4, 4))
    x = data.dataset.tensors[0]
    la = fit(network, "regression", "diag", BayesaeGGN, data)
    mean, covariance = la(x)
    jacobian = dense_jacobian(network, x)
    assert_close(mean, network(x).flatten(1).detach(), **EXACT)
    assert_close(covariance, torch.einsum("bop,p,bqp->boq", jacobian, la.posterior_variance, jacobian), **EXACT)


@pytest.mark.parametrize("structure", ["diag", "full"])
def test_sub_network_in_any_order(structure):
    network = dense_network()
    data = loader(network, "regression")
    indices = torch.tensor([40, 3, 17, 5])
    whole = fit(network, "regression", structure, BayesaeGGN, data)
    part = Laplace(network, "regression", "subnetwork", structure, subnetwork_indices=indices, backend=BayesaeGGN)
    part.fit(data)
    assert_close(part.H, whole.H[indices] if structure == "diag" else whole.H[indices][:, indices], **EXACT)
    x = data.dataset.tensors[0]
    jacobian = dense_jacobian(network, x)[..., indices]
    scale = torch.diag_embed(part.posterior_variance) if structure == "diag" else part.posterior_covariance
    assert_close(part(x)[1], jacobian @ scale @ jacobian.mT, **EXACT)


@pytest.mark.parametrize("structure", ["diag", "kron", "full"])
def test_frozen_parameters_are_left_out(structure):
    network = dense_network()
    data = loader(network, "regression")
    network[0].bias.requires_grad_(False)
    network[2].weight.requires_grad_(False)
    keep = torch.cat([torch.full((p.numel(),), p.requires_grad) for p in network.parameters()])
    la = fit(network, "regression", structure, BayesaeGGN, data)
    for parameter in network.parameters():
        parameter.requires_grad_(True)
    whole = fit(network, "regression", structure, BayesaeGGN, data)
    got, want = (a.H.to_matrix() if structure == "kron" else a.H for a in (la, whole))
    assert_close(got, want[keep] if structure == "diag" else want[keep][:, keep], **EXACT)


def test_vectors_of_normalisation_layers_have_their_exact_block():
    network = nn.Sequential(nn.Linear(5, 3), nn.LayerNorm(3), nn.Tanh(), nn.Linear(3, 5)).double()
    data = loader(network, "regression")
    la = fit(network, "regression", "kron", BayesaeGGN, data)
    brute = torch.einsum("bop,boq->pq", *[dense_jacobian(network, data.dataset.tensors[0])] * 2)
    for start in (18, 21):
        part = slice(start, start + 3)
        assert_close(la.H.to_matrix()[part, part], brute[part, part], **EXACT)


def test_follows_weights_that_change_between_fits():
    """laplace-torch writes through ``.data``, which moves no version counter."""
    network = dense_network()
    data = loader(network, "regression")
    la = Laplace(network, "regression", "all", "diag", backend=BayesaeGGN)
    la.fit(data)
    before = la.H
    nn.utils.vector_to_parameters(2 * la.mean, network.parameters())
    la.fit(data)
    assert_close(la.H, fit(network, "regression", "diag", BayesaeGGN, data).H, **EXACT)
    assert not torch.allclose(la.H, before)


def test_stochastic_diagonal_is_unbiased():
    network = dense_network()
    data = loader(network, "regression")
    x, y = data.dataset.tensors
    exact = BayesaeGGN(network, "regression").diag(x, y)[1]
    probes = BayesaeGGN(network, "regression", stochastic=True, num_samples=500)
    draws = torch.stack([probes.diag(x, y)[1] for _ in range(20)])
    error = draws.std(0) / 20**0.5
    assert bool(((draws.mean(0) - exact).abs() <= 6 * error + 1e-12).all())
    for structure in (probes.full, lambda *batch: probes.kron(*batch, N=7)):
        with pytest.raises(UnsupportedError, match="stochastic"):
            structure(x, y)


def test_refusals_say_what_to_do():
    network = dense_network()
    data = loader(network, "regression")
    x, y = data.dataset.tensors
    la = Laplace(network, "regression", "last_layer", "full", backend=BayesaeGGN)
    with pytest.raises(UnsupportedError, match="SubnetLaplace"):
        la.fit(data)
    with pytest.raises(UnsupportedError, match="another backend"):
        BayesaeGGN(network, "regression").diag({"input_ids": x}, y)
    with pytest.raises(UnsupportedError, match="sub-network"):
        BayesaeGGN(network, "regression", subnetwork_indices=torch.tensor([0])).kron(x, y, N=7)
    images = image_network()
    with pytest.raises(UnsupportedError, match="transposed convolution '7'"):
        fit(images, "regression", "kron", BayesaeGGN, loader(images, "regression", data=(1, 4, 4)))
