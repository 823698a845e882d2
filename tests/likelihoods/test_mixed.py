from __future__ import annotations

import copy
import json
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import bayesae as bae
from bayesae import likelihoods as L
from bayesae.types import Likelihood, LowRankHessian
from tests.likelihoods.cases import F64


def simple():
    """Columns with moments in closed form, one and two parameters."""
    return L.Mixed([L.Gaussian(0.3), L.HeteroscedasticGaussian(), L.Bernoulli(), L.Poisson(), L.StudentT(5.0, 0.2)])


def full():
    return L.Mixed([L.Categorical(3, range(3)), L.Gaussian(0.3), L.NegativeBinomial(2.0), L.Categorical(2, [1, 4])])


def table(head, n):
    """Data that suit any of these columns."""
    columns = [
        torch.randint(3, (n,)), torch.randn(n), torch.poisson(torch.full((n,), 2.0)), 1 + 3 * torch.randint(2, (n,))
    ] if len(head.columns) == 4 else [
        torch.randn(n), torch.randn(n), torch.randint(2, (n,)), torch.poisson(torch.full((n,), 2.0)), torch.randn(n)
    ]  # fmt: skip
    return torch.stack([column.double() for column in columns], -1)


@pytest.fixture(params=[simple, full], ids=["simple", "full"])
def head(request):
    return request.param()


@pytest.fixture
def outputs(head):
    return 0.5 * torch.randn(2, 3, 7, head.n_outputs, **F64)


def test_is_a_likelihood(head):
    assert isinstance(head, Likelihood)
    assert not list(head.parameters())


def test_log_prob_is_the_sum_over_columns(head, outputs):
    x = table(head, 7)
    total, start = 0.0, 0
    for i, column in enumerate(head.columns):
        g = column.n_parameters
        own = outputs[..., start : start + g] if g > 1 else outputs[..., start]
        total, start = total + column.log_prob(own, x[:, i]), start + g
    assert start == head.n_outputs
    assert_close(head.log_prob(outputs, x), total, rtol=1e-12, atol=1e-12)
    law = head.distribution(outputs)
    assert law.batch_shape == (2, 3, 7, len(head.columns))
    assert_close(law.log_prob(x).sum(-1), total, rtol=1e-12, atol=1e-12)
    assert_close(law.mean, head.mean(outputs), rtol=1e-12, atol=1e-12)
    assert_close(law.variance, head.variance(outputs), rtol=1e-12, atol=1e-12)
    assert law.sample((2,)).shape == (2, *law.batch_shape)


def test_hessian(head, outputs):
    """Rows and diagonal together, against autograd where there is a Hessian and the columns' own where not."""
    x, f = table(head, 7), outputs[0, 0]
    given = head.output_hessian(f)
    assert isinstance(given, LowRankHessian) is (len(head.columns) == 4)
    if isinstance(given, LowRankHessian):
        given = given.factor.mT @ given.factor + torch.diag_embed(given.diagonal)
    else:
        given = torch.diag_embed(given)
    hessian = torch.func.hessian(lambda row, at: -head.log_prob(row[None], at[None])[0])
    exact = torch.stack([hessian(*pair) for pair in zip(f, x, strict=True)])
    start = 0
    for column in head.columns:
        own = slice(start, start + column.n_parameters)
        if column.is_fisher:
            fisher = column.output_hessian(f[:, own] if column.n_parameters > 1 else f[:, start])
            exact[:, own, own] = torch.diag_embed(fisher.expand(7, *fisher.shape[1:]).reshape(7, -1))
        start = own.stop
    assert head.is_fisher
    assert_close(given, exact, rtol=1e-9, atol=1e-10)


def test_masks(head, outputs):
    x, mask = table(head, 7), torch.rand(7, len(head.columns)) > 0.4
    assert head.output_mask(mask).shape == (7, head.n_outputs)
    expected = torch.where(mask, head.log_density(outputs, x), 0.0).sum(-1)
    spoilt = outputs.masked_fill(~head.output_mask(mask), 1e9).requires_grad_()
    got = head.log_prob(spoilt, torch.where(mask, x, torch.nan), mask)
    assert_close(got, expected, rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(got.sum(), spoilt)
    assert bool(gradient.isfinite().all())
    assert bool(((gradient != 0) <= head.output_mask(mask)).all())


def test_moments_are_the_columns_own():
    head = simple()
    mean, var = torch.randn(5, head.n_outputs, **F64), torch.rand(5, head.n_outputs, **F64)
    got = head.normal_moments(mean, var)
    assert_close(got[1][:, 1], head.columns[1].normal_moments(mean[:, 1:3], var[:, 1:3])[1])
    assert_close(got[2][:, 2], head.columns[2].normal_moments(mean[:, 3], var[:, 3])[2])
    assert full().normal_moments(torch.randn(5, 7), torch.rand(5, 7)) is None
    x = table(head, 5)
    density = head.log_predictive(got[0], got[1] + got[2], x)
    assert_close(density[:, 3], head.columns[3].log_predictive(got[0][:, 3], (got[1] + got[2])[:, 3], x[:, 3]))


@pytest.mark.parametrize("way", ["state", "deepcopy", "pickle"])
def test_learned_columns(way):
    torch.manual_seed(1)
    head = L.Mixed([L.Gaussian(), L.Bernoulli(), L.StudentT(), L.NegativeBinomial(), L.Gaussian(0.5)])
    assert head.is_learned and not head.is_estimated
    f = 0.5 * torch.randn(400, 5, **F64)
    x = torch.stack(
        [f[:, 0] + 0.3 * torch.randn(400), torch.bernoulli(f[:, 1].sigmoid()), f[:, 2] + 0.1 * torch.randn(400),
         torch.poisson(f[:, 3].exp() * (1 + torch.rand(400))), f[:, 4]], -1,
    )  # fmt: skip
    mask = torch.rand(400, 5) > 0.2
    head.start_noise()
    n_passes = 1
    while head.update_noise(sum(head.noise_statistics(f[s], x[s], mask[s]) for s in (slice(100), slice(100, 400)))):
        n_passes += 1
    assert 2 < n_passes < 40
    for i, column in enumerate(head.columns):
        if not column.is_learned:
            continue
        alone = type(column)()
        alone.start_noise()
        while alone.update_noise(alone.noise_statistics(f[:, i], x[:, i], mask[:, i])):
            pass
        assert_close(torch.tensor(alone._noise), torch.tensor(column._noise), rtol=1e-6, atol=0)
    assert head.columns[4].noise_var == 0.25
    if way == "state":
        other = L.build("Mixed", json.loads(json.dumps(head.arguments)))
        assert not other.is_estimated
        other.load_state_dict(head.state_dict())
    else:
        other = copy.deepcopy(head) if way == "deepcopy" else pickle.loads(pickle.dumps(head))
    assert other.is_estimated and other.arguments == head.arguments
    assert_close(other.log_prob(f, x, mask), head.log_prob(f, x, mask), rtol=0, atol=0)


def test_guesses_columns_from_a_table():
    x = torch.tensor([[0.0, 2.0, 0.5, 12.0], [1.0, 7.0, 2.0, 3.0], [1.0, torch.nan, -1.0, 5.0]])
    head = L.Mixed.of(x)
    assert [type(c).__name__ for c in head.columns] == ["Bernoulli", "Categorical", "Gaussian", "Gaussian"]
    assert head.columns[1].values == tuple(range(8))
    head.check(torch.tensor([[1.0, 5.0, 0.1, 4.0]]))  # a class that no row above has
    head.check(torch.where(x.isnan(), 0.0, x))
    assert [type(c).__name__ for c in L.Mixed.of(x.numpy()).columns] == [type(c).__name__ for c in head.columns]
    with pytest.raises(bae.errors.DataError, match="entries in column 0; got none"):
        L.Mixed.of(torch.full((3, 1), torch.nan))
    with pytest.raises(bae.errors.ShapeError, match="a table"):
        L.Mixed.of(torch.zeros(3))
    with pytest.raises(bae.errors.DataError, match="a table of numbers"):
        L.Mixed.of(np.array([["a", 1.0]], dtype=object))


def test_one_object_for_several_columns_learns_noise_for_each():
    head = L.Mixed([L.Gaussian()] * 3)
    x, f = torch.randn(400, 3, **F64) * torch.tensor([0.1, 1.0, 10.0], **F64), torch.zeros(400, 3, **F64)
    head.start_noise()
    head.update_noise(head.noise_statistics(f, x))
    assert_close(torch.tensor([column.noise_var for column in head.columns], **F64), (x**2).mean(0))


def test_laplace_of_rows_with_an_axis_of_one():
    """Rows (B, C, 1) and (B, C), with a mask, are the same table."""
    head = full()
    x, mask = table(head, 12), torch.rand(12, 4) > 0.3
    decoder = nn.Linear(2, head.n_outputs)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    model = bae.Autoencoder(encoder, decoder, head).double().eval()
    spoilt = torch.where(mask, x, torch.nan)
    flat, deep = (
        bae.fit_weights(bae.weights.Laplace(tunes_prior=False), model, batch)
        for batch in (bae.Batch(spoilt, mask), bae.Batch(spoilt[..., None], mask[..., None]))
    )
    for name, variance in flat.variances().items():
        assert_close(deep.variances()[name], variance, rtol=1e-12, atol=0)


def test_errors(head):
    with pytest.raises(bae.errors.ShapeError, match=rf"outputs \(B, {head.n_outputs}\)"):
        head.data_shape(torch.Size((head.n_outputs + 1,)))
    assert head.data_shape(torch.Size((head.n_outputs,))) == (len(head.columns),)
    with pytest.raises(bae.errors.ShapeError, match="columns; got 2"):
        head.check(torch.zeros(3, 2))
    bad = table(head, 3)
    bad[1, 2] = -3
    with pytest.raises(bae.errors.DataError, match="in column 2 .*got.*-3"):
        head.check(bad)
    with pytest.raises(bae.errors.DataError, match="at least one column"):
        L.Mixed([])
    with pytest.raises(bae.errors.UnsupportedError, match="values for the classes of column 1"):
        L.Mixed([L.Gaussian(), L.Categorical(3)])
    with pytest.raises(bae.errors.UnsupportedError, match="likelihood of single numbers for column 0"):
        L.Mixed([L.Mixed([L.Gaussian()])])
    learning = L.Mixed([L.Gaussian(), L.Gaussian()])
    learning.start_noise()
    mask = torch.tensor([[True, False]])
    with pytest.raises(bae.errors.DataError, match="in column 1 an observed entry"):
        learning.update_noise(learning.noise_statistics(torch.zeros(1, 2), torch.zeros(1, 2), mask))


def test_runs_on_the_device_of_its_outputs(head, outputs):
    x, mask = table(head, 7), torch.ones(7, len(head.columns), dtype=torch.bool)
    far = [value.to("meta") for value in (outputs, x, mask)]
    assert head.log_prob(*far).shape == (2, 3, 7)
    assert head.mean(far[0]).shape == head.variance(far[0]).shape == (2, 3, 7, len(head.columns))
    head.output_hessian(far[0][0, 0])
