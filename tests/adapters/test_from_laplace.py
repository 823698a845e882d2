"""Whatever laplace-torch fitted predicts the same here."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

import bayesae as bae
from bayesae.adapters import OutputPredictive, from_laplace
from bayesae.adapters.networks import cut_network
from bayesae.errors import NotFittedError, ParameterError, UnsupportedError
from bayesae.families import IndependentNormals
from tests.twins import dense_jacobian

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import laplace
    from laplace import Laplace
    from laplace.curvature import BackPackGGN, CurvlinopsGGN

    from bayesae.adapters.laplace_backend import BayesaeGGN

# BackPACK hooks modules whose inputs need no gradient, which torch 2.15 warns about
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")
CLOSE = {"rtol": 1e-8, "atol": 1e-10}
SUBNET = torch.tensor([40, 3, 17, 5, 44])


def network():
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 5)).double()


@pytest.fixture
def x():
    return torch.rand(7, 5, dtype=torch.float64)


def fitted(net, x, subset="all", structure="diag", y=None, **kwargs):
    likelihood = kwargs.pop("likelihood", "regression")
    kwargs = {"backend": BackPackGGN, "prior_precision": 2.0} | kwargs
    if likelihood == "regression":
        kwargs = {"sigma_noise": 0.3} | kwargs
    la = Laplace(net, likelihood, subset, structure, **kwargs)
    la.fit(DataLoader(TensorDataset(x, x if y is None else y), batch_size=3))
    return la


def assert_same(la, x, predictive=None):
    predictive = from_laplace(la) if predictive is None else predictive
    assert isinstance(predictive, bae.Predictive)
    moments = predictive.moments(x)
    mean, covariance = la(x)
    assert moments.is_exact
    assert_close(moments.mean, mean.detach(), **CLOSE)
    assert_close(moments.weights, covariance.detach().diagonal(dim1=-2, dim2=-1), **CLOSE)
    assert_close(moments.noise, torch.full_like(x, la.sigma_noise.item() ** 2))
    return predictive


CASES = {
    "diag": {"structure": "diag"},
    "kron": {"structure": "kron"},
    "full": {"structure": "full"},
    "diag, default backend": {"structure": "diag", "backend": CurvlinopsGGN},
    "kron, default backend": {"structure": "kron", "backend": CurvlinopsGGN},
    "kron, engine": {"structure": "kron", "backend": BayesaeGGN},
    "diag, prior for each layer": {"structure": "diag", "prior_precision": torch.arange(1.0, 7.0)},
    "kron, prior for each layer": {"structure": "kron", "prior_precision": torch.arange(1.0, 7.0)},
    "diag, prior for each weight": {"structure": "diag", "prior_precision": torch.linspace(1, 9, 49)},
    "full, prior for each weight": {"structure": "full", "prior_precision": torch.linspace(1, 9, 49)},
    "kron, tempered": {"structure": "kron", "temperature": 0.3},
    "full, tempered": {"structure": "full", "temperature": 0.3},
    "kron, damped": {"structure": "kron", "damping": True},
    "sub-network, diag": {"subset": "subnetwork", "structure": "diag", "subnetwork_indices": SUBNET},
    "sub-network, full": {"subset": "subnetwork", "structure": "full", "subnetwork_indices": SUBNET},
    "last layer, diag": {"subset": "last_layer", "structure": "diag"},
    "last layer, kron": {"subset": "last_layer", "structure": "kron"},
    "last layer, full": {"subset": "last_layer", "structure": "full"},
}


@pytest.mark.parametrize("case", CASES)
def test_moments_equal(case, x):
    assert_same(fitted(network(), x, **CASES[case]), x)


@pytest.mark.parametrize("structure", ["diag", "kron", "full"])
def test_as_it_stands_in_the_middle_of_tuning(structure, x):
    """Prior and noise may be leaves of somebody's graph, and may have changed since the fit."""
    la = fitted(network(), x, structure=structure)
    la.prior_precision = torch.full((1,), 3.0, dtype=torch.float64, requires_grad=True)
    la.sigma_noise = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    predictive = from_laplace(la)
    la.sigma_noise = la.sigma_noise.detach()  # of a leaf laplace-torch's own Kronecker prediction warns
    assert_same(la, x, predictive)
    assert not any(leaf.requires_grad for leaf in predictive.weights.sample(1).values())


@pytest.mark.parametrize("structure", ["diag", "kron", "full"])
def test_draws_have_the_covariance(structure, x):
    """Of the functions, so that every family's own sampling is met."""
    torch.manual_seed(1)
    predictive = from_laplace(fitted(network(), x, structure=structure))
    exact = predictive.moments(x)
    drawn = predictive.moments(x, n_weight_draws=1500, seed=0)
    assert_close(drawn.weights, exact.weights, rtol=0.2, atol=0)


def test_a_bias_with_a_basis_of_its_own(x):
    """No backend is bound to give a bias the output factor of its weight."""
    la = fitted(network(), x, structure="kron")
    factor = torch.randn(2, 2, dtype=torch.float64)
    la.H_facs.kfacs[3] = [factor @ factor.T]
    la.H = la.H_facs.decompose()
    predictive = assert_same(la, x)
    assert isinstance(predictive.weights, IndependentNormals)
    exact, drawn = predictive.moments(x), predictive.moments(x, n_weight_draws=1500, seed=0)
    assert_close(drawn.weights, exact.weights, rtol=0.2, atol=0)
    torch.manual_seed(3)
    four = predictive.weights.sample(4)
    torch.manual_seed(3)
    again = predictive.weights.sample(2), predictive.weights.sample(2)
    assert all(torch.equal(leaf, torch.cat([a[name] for a in again])) for name, leaf in four.items())


def test_low_rank(x):
    """laplace-torch cannot build one without a package that PyPI does not have, so its own fields are set by hand."""
    net = network()
    la = object.__new__(laplace.LowRankLaplace)
    vars(la).update(vars(fitted(net, x, backend=CurvlinopsGGN)))
    vectors = torch.linalg.qr(torch.randn(49, 3, dtype=torch.float64))[0]
    la.H = (vectors, torch.tensor([3.0, 1.0, 0.2], dtype=torch.float64))
    moments = from_laplace(la).moments(x)
    want = la.functional_variance(dense_jacobian(net, x)).diagonal(dim1=-2, dim2=-1)
    assert_close(moments.weights, want, **CLOSE)
    la.H = (vectors, torch.tensor([3.0, 1.0, -0.2], dtype=torch.float64))
    with pytest.raises(UnsupportedError, match="negative"):
        from_laplace(la)


class Pair(nn.Module):
    def __init__(self, encoder, decoder):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(self, x):
        return self.decoder(self.encoder(x))


class Squashed(Pair):
    def forward(self, x):
        return self.decoder(self.encoder(x)).tanh()


class Branching(Pair):
    def forward(self, x):
        return self.decoder(self.encoder(x)) if x.sum() > 0 else x


def images():
    encoder = nn.Sequential(nn.Conv2d(1, 2, 3, stride=2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(8, 2))
    decoder = nn.Sequential(
        nn.Linear(2, 8), nn.Unflatten(1, (2, 2, 2)), nn.ConvTranspose2d(2, 2, 2, stride=2), nn.Tanh(),
        nn.Conv2d(2, 1, 3, padding=1),
    )  # fmt: skip
    return Pair(encoder, decoder).double()


@pytest.mark.parametrize("structure", ["diag", "full"])
@pytest.mark.parametrize("is_flat", [False, True])
def test_images(structure, is_flat):
    """Fitted and predicted without flattening, which no backend of laplace-torch's own can."""
    x, net = torch.rand(5, 1, 4, 4, dtype=torch.float64), images()
    if is_flat:
        net.decoder.append(nn.Flatten())
    la = fitted(net, x, structure=structure, y=x.flatten(1) if is_flat else x, backend=BayesaeGGN)
    mean, covariance = la(x)
    moments = from_laplace(la).moments(x)
    assert moments.mean.shape == x.shape
    assert_close(moments.mean, mean.reshape(x.shape), **CLOSE)
    assert_close(moments.weights, covariance.diagonal(dim1=-2, dim2=-1).reshape(x.shape), **CLOSE)


def test_frozen_parameters_stay_at_their_value(x):
    net = network()
    net[2].weight.requires_grad_(False)
    net[4].bias.requires_grad_(False)
    for structure in ("diag", "kron", "full"):
        predictive = assert_same(fitted(net, x, structure=structure, backend=BayesaeGGN), x)
        drawn = predictive.weights.sample(3)["encoder.2.weight"]
        assert torch.equal(drawn, net[2].weight.detach().expand(3, -1, -1))


def test_the_mean_is_the_posteriors_and_not_the_networks(x):
    """A saved posterior does not restore the network: laplace-torch then predicts with other weights' outputs."""
    net = network()
    la = fitted(net, x, structure="kron")
    want = la(x)[0].detach()
    other = Laplace(network(), "regression", "all", "kron", backend=BackPackGGN)
    other.load_state_dict(la.state_dict())
    assert not torch.allclose(other(x)[0], want)
    assert_close(from_laplace(other).moments(x).mean, want, **CLOSE)
    assert_close(from_laplace(other).model(x), want, **CLOSE)


def test_neither_object_nor_network_is_touched(x):
    net = network()
    la = fitted(net, x, structure="kron")
    net(x)  # BackPACK's hooks now leave a graph on the layers, which deepcopy refuses
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(net)
    state, before = copy.deepcopy(net.state_dict()), {k: v for k, v in vars(la).items() if k != "_backend"}
    hooks = [len(m._forward_hooks) for m in net.modules()]
    predictive = from_laplace(la)
    with torch.no_grad():
        predictive.model.encoder[0].weight.mul_(2)
    predictive.weights.mean["encoder.0.weight"].mul_(2)
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in state.items())
    assert all(vars(la)[name] is value for name, value in before.items())
    assert hooks == [len(m._forward_hooks) for m in net.modules()]


def test_where_a_sequential_is_cut(x):
    la = fitted(network(), x)
    assert len(from_laplace(la).model.encoder) == 3
    for cut in (1, "1", 4):
        predictive = assert_same(la, x, from_laplace(la, cut=cut))
        assert len(predictive.model.encoder) == int(cut)
    assert predictive.decoder(n_weight_draws=2)(torch.zeros(3, 2, dtype=torch.float64)).shape == (2, 3, 5)
    layers = list(network())
    nested = nn.Sequential(OrderedDict(down=nn.Sequential(*layers[:3]), up=nn.Sequential(*layers[3:])))
    nested_la = fitted(nested, x, backend=CurvlinopsGGN)
    for cut in (None, "up"):
        predictive = assert_same(nested_la, x, from_laplace(nested_la, cut=cut))
        assert list(predictive.weights.mean)[0] == "encoder.down.0.weight"
    for cut in (0, 5, "decoder"):
        with pytest.raises(ParameterError, match="cut"):
            from_laplace(la, cut=cut)


def test_encoder_and_decoder_attributes(x):
    parts = network()
    pair = Pair(parts[:3], parts[3:])
    predictive = assert_same(fitted(pair, x, structure="kron", backend=CurvlinopsGGN), x)
    assert len(predictive.model.encoder) == 3
    with pytest.raises(ParameterError, match="Drop it"):
        from_laplace(fitted(pair, x, backend=CurvlinopsGGN), cut=1)
    model = bae.Autoencoder(parts[:3], parts[3:], bae.likelihoods.Gaussian(0.5))
    assert_same(fitted(model, x, backend=CurvlinopsGGN), x)


def test_a_forward_that_does_more_gives_outputs_only(x):
    parts = network()
    la = fitted(Squashed(parts[:3], parts[3:]), x, backend=BayesaeGGN)
    predictive = from_laplace(la)
    assert isinstance(predictive, OutputPredictive)
    mean, covariance = la(x)
    moments = predictive.moments(x)
    assert_close(moments.mean, mean, **CLOSE)
    assert_close(moments.weights, covariance.diagonal(dim1=-2, dim2=-1), **CLOSE)
    with pytest.raises(UnsupportedError, match="encoder -> decoder -> tanh"):
        predictive.decoder()


def test_a_forward_that_cannot_be_read_is_not_cut():
    parts = network()
    with pytest.raises(UnsupportedError, match="cannot be traced"):
        cut_network(Branching(parts[:3], parts[3:]), None)
    with pytest.raises(UnsupportedError, match="none before the last"):
        cut_network(nn.Sequential(nn.Tanh(), nn.Linear(2, 2)), None)
    with pytest.raises(UnsupportedError, match="which has neither"):
        cut_network(nn.Linear(2, 2), None)


def test_a_supervised_regression_has_outputs_only(x):
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    la = fitted(net, x, structure="kron", y=x[:, :2])
    predictive = from_laplace(la)
    assert isinstance(predictive, OutputPredictive)
    mean, covariance = la(x)
    moments = predictive.moments(x)
    assert_close(moments.mean, mean.detach(), **CLOSE)
    assert_close(moments.weights, covariance.detach().diagonal(dim1=-2, dim2=-1), **CLOSE)
    assert_close(moments.noise, torch.full_like(mean, 0.09).detach())
    with pytest.raises(UnsupportedError, match="5 inputs and 2 outputs"):
        predictive.decoder()


def test_a_classifier_has_logits_only(x):
    net = nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 5)).double()
    la = fitted(net, x, structure="kron", y=torch.arange(7) % 5, likelihood="classification")
    predictive = from_laplace(la)
    mean, variance = predictive.outputs(x)
    want_mean, want = la._glm_predictive_distribution(x)
    assert_close(mean, want_mean, **CLOSE)
    assert_close(variance, want.diagonal(dim1=-2, dim2=-1), **CLOSE)
    for refused in (lambda: predictive.moments(x), predictive.decoder):
        with pytest.raises(UnsupportedError, match="classifier"):
            refused()


def test_the_likelihood_can_be_another(x):
    likelihood = bae.likelihoods.Gaussian(0.7)
    predictive = from_laplace(fitted(network(), x), likelihood=likelihood)
    assert_close(predictive.moments(x).noise, torch.full_like(x, 0.49))


def test_refusals(x):
    unfitted = Laplace(network(), "regression", "all", "diag", backend=BackPackGGN)
    with pytest.raises(NotFittedError, match=r"la\.fit"):
        from_laplace(unfitted)
    functional = Laplace(network(), "regression", "all", "gp", n_subset=3)
    with pytest.raises(UnsupportedError, match="FunctionalLaplace"):
        from_laplace(functional)
    la = fitted(network(), x)
    la.model[0] = nn.Linear(5, 4).double()
    with pytest.raises(ParameterError, match="Fit again"):
        from_laplace(la)
