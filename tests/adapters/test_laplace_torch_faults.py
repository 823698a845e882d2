"""Faults of laplace-torch 0.3 that `adapters` works around; a test that fails here says that one was mended."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from bayesae.adapters import from_laplace

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from laplace import Laplace, marglik_training
    from laplace.curvature import CurvlinopsGGN

    from bayesae.adapters.laplace_backend import BayesaeGGN


def network(*end):
    return nn.Sequential(nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 4), *end).double()


def fitted(net, x, y, structure="diag", **kwargs):
    kwargs = {"backend": CurvlinopsGGN, "sigma_noise": 0.3} | kwargs
    la = Laplace(net, "regression", "all", structure, **kwargs)
    la.fit(DataLoader(TensorDataset(x, y), batch_size=3))
    return la


@pytest.fixture
def x():
    return torch.rand(6, 4, dtype=torch.float64)


def test_the_noise_normaliser_reads_the_last_axis(x):
    """So its evidence of the same network and data differs by shape: not one to tune a noise scale by."""
    flat = network()
    image = nn.Sequential(*flat, nn.Unflatten(1, (2, 2)))
    as_rows, as_images = (
        fitted(flat, x, x, backend=BayesaeGGN),
        fitted(image, x, x.reshape(6, 2, 2), backend=BayesaeGGN),
    )
    assert (as_rows.n_outputs, as_images.n_outputs) == (4, 2)
    assert_close(as_rows.H, as_images.H)
    missing = 6 * 2 * float(torch.log(torch.tensor(0.3 * (2 * torch.pi) ** 0.5)))
    assert float(as_images.log_likelihood - as_rows.log_likelihood) == pytest.approx(missing, rel=1e-5)


def test_it_fits_no_images(x):
    net, images = network(nn.Unflatten(1, (2, 2))), x.reshape(6, 2, 2)
    with pytest.raises(RuntimeError):
        fitted(net, x, images)
    fitted(net, x, images, backend=BayesaeGGN)


def test_a_generator_is_ignored(x):
    la = fitted(network(), x, x)

    def call():
        return la(x, pred_type="nn", link_approx="mc", generator=torch.Generator().manual_seed(0))[0]

    assert not torch.equal(call(), call())
    predictive = from_laplace(la)
    first, second = (predictive.moments(x, n_weight_draws=3, seed=0) for _ in range(2))
    assert torch.equal(first.mean, second.mean)


def test_damping_is_dropped(x):
    plain, damped = (fitted(network(), x, x, "kron", damping=is_on) for is_on in (False, True))
    assert damped.H.damping
    assert not damped.posterior_precision.damping
    assert not plain.posterior_precision.damping


def test_its_dense_curvature_is_in_float32(x):
    """By CurvlinopsGGN, the default: an identity in float32 enters the product."""
    net = network()
    theirs, ours = fitted(net, x, x, "full"), fitted(net, x, x, "full", backend=BayesaeGGN)
    error = float((theirs.H - ours.H).norm() / ours.H.norm())
    assert 1e-10 < error < 1e-5


def test_its_kronecker_factors_take_no_frozen_weights(x):
    net = network()
    net[0].weight.requires_grad_(False)
    with pytest.raises(KeyError):
        fitted(net, x, x, "kron")
    fitted(net, x, x, "kron", backend=BayesaeGGN)


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
@pytest.mark.parametrize(("structure", "is_right"), [("diag", True), ("kron", False)])
def test_its_kronecker_evidence_has_no_gradient_of_the_noise(structure, is_right, x):
    """The factor 1 / sigma^2 goes through ``math.pow``: tuning sigma by gradient forgets the determinant."""
    la = fitted(network(), x, x, structure)
    sigma = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(la.log_marginal_likelihood(sigma_noise=sigma), sigma)
    above, below = (float(la.log_marginal_likelihood(sigma_noise=torch.tensor(0.3 + e))) for e in (1e-3, -1e-3))
    assert (abs(float(slope) - (above - below) / 2e-3) < 1e-2 * abs(float(slope))) == is_right


@pytest.mark.filterwarnings("ignore")
def test_its_evidence_training_makes_the_prior_as_many_times_too_strong_as_there_are_outputs():
    """Its loss is a mean over rows *and outputs*, its prior is divided by rows only; `Evidence` sums over outputs."""
    n, n_in, n_out, sigma, precision = 40, 3, 16, 0.5, 4.0
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(n, n_in, generator=generator, dtype=torch.float64)
    weight = torch.randn(n_in, n_out, generator=generator, dtype=torch.float64)
    targets = inputs @ weight + sigma * torch.randn(n, n_out, generator=generator, dtype=torch.float64)

    def mode(factor):
        eye = torch.eye(n_in, dtype=torch.float64)
        lhs = inputs.mT @ inputs / sigma**2 + factor * precision * eye
        return torch.linalg.solve(lhs, inputs.mT @ targets / sigma**2).mT

    net = nn.Linear(n_in, n_out, bias=False).double()
    _, trained, _, _ = marglik_training(
        net,
        DataLoader(TensorDataset(inputs, targets), batch_size=n),
        likelihood="regression",
        hessian_structure="diag",
        backend=BayesaeGGN,
        optimizer_kwargs={"lr": 0.02},
        n_epochs=600,
        n_epochs_burnin=601,
        prior_structure="scalar",
        prior_prec_init=precision,
        sigma_noise_init=sigma,
        fix_sigma_noise=True,
    )
    got = trained.weight.detach()
    assert_close(got, mode(n_out), rtol=0, atol=1e-4)
    assert float((got - mode(1)).abs().max()) > 0.1
