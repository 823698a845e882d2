"""laplace-torch and BackPACK agree where they run."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

import bayesae as bae
from bayesae.curvature import Linearisation, ggn_diagonal
from tests.conftest import small_model

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from backpack import backpack, extend
    from backpack.extensions import DiagGGNExact
    from laplace import Laplace as PeerLaplace
    from laplace.curvature import BackPackGGN

# BackPACK hooks modules whose inputs need no gradient, which torch 2.15 warns about
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")


def test_backpack_diagonal(rows):
    model = small_model(activation=nn.Sigmoid)
    plain = nn.Sequential(*model.encoder, *list(model.decoder)[1:])
    network = extend(copy.deepcopy(plain))  # it hangs hooks on the layers, which our engine refuses
    # MSELoss(sum) is twice the negative log-density of unit noise
    loss = extend(nn.MSELoss(reduction="sum"))(network(rows), rows)
    with backpack(DiagGGNExact()):
        loss.backward()
    got = ggn_diagonal(Linearisation(plain), rows, lambda _: torch.tensor(2.0))
    for name, parameter in network.named_parameters():
        assert_close(got[name], parameter.diag_ggn_exact, rtol=1e-8, atol=1e-10)


@pytest.fixture
def peer(rows):
    model = small_model(bae.likelihoods.Gaussian(0.3))
    layers = [*model.encoder, *list(model.decoder)[1:]]  # BackPACK takes no second Flatten on a flat code
    network = copy.deepcopy(nn.Sequential(*layers))
    la = PeerLaplace(
        network, "regression", subset_of_weights="all", hessian_structure="diag", sigma_noise=0.3,
        prior_precision=5.0, backend=BackPackGGN,
    )  # fmt: skip
    la.fit(DataLoader(TensorDataset(rows, rows), batch_size=4))
    return model, la


def test_laplace_torch_diagonal_and_evidence(peer, rows):
    """With flat outputs its noise normaliser counts them rightly."""
    model, la = peer
    inference = bae.weights.Laplace(tunes_prior=False)
    posterior = bae.fit_weights(inference, model, rows, weight_prior=bae.IsotropicNormal(5.0), batch_size=5)
    # la.H is of half the squared error; ours has the noise in it
    assert_close(1 / posterior.var - 5.0, la.H.double() / 0.3**2, rtol=1e-8, atol=1e-8)
    assert posterior.info["log_evidence"] == pytest.approx(float(la.log_marginal_likelihood()), rel=1e-10)


def test_laplace_torch_linearised_variance(peer, rows):
    model, la = peer
    posterior = bae.fit_weights(
        bae.weights.Laplace(tunes_prior=False), model, rows, weight_prior=bae.IsotropicNormal(5.0)
    )
    mean, covariance = la(rows, pred_type="glm")
    moments = bae.Predictive(model, posterior).moments(rows)
    assert_close(moments.mean, mean.detach(), rtol=1e-10, atol=1e-12)
    assert_close(moments.weights, covariance.detach().diagonal(dim1=-2, dim2=-1), rtol=1e-8, atol=1e-12)
