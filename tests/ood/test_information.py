from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

import bayesae as bae
from bayesae import testing

F64 = {"dtype": torch.float64}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **F64)


def draws_of(outputs, likelihood):
    values = torch.zeros(outputs.shape[:3], **F64)
    return bae.Draws(torch.zeros(*values.shape, 1), values, values, None, likelihood, outputs=outputs)


def dense_hessian(likelihood, outputs):
    r"""Of one row, (O, O), by differentiating minus the expected log-density: the Fisher information."""
    flat = outputs.flatten()
    if isinstance(likelihood, bae.likelihoods.Categorical):
        p = outputs.softmax(-1).reshape(-1, outputs.shape[-1])
        return torch.block_diag(*[torch.diag(one) - torch.outer(one, one) for one in p])
    return torch.diag(likelihood.output_hessian(outputs[None]).expand(1, *outputs.shape).flatten()).reshape(
        len(flat), -1
    )


LIKELIHOODS = [
    (bae.likelihoods.Gaussian(0.3), (7,)),
    (bae.likelihoods.Bernoulli(), (2, 3)),
    (bae.likelihoods.HeteroscedasticGaussian(), (4, 2)),
    (bae.likelihoods.Categorical(3), (2, 4, 3)),
]


@pytest.mark.parametrize(("likelihood", "shape"), LIKELIHOODS, ids=lambda v: type(v).__name__)
def test_gain_is_that_of_the_dense_covariance(likelihood, shape):
    outputs = normal(3, 5, 6, *shape)
    found = bae.ood.information_gain(draws_of(outputs, likelihood))
    averaged = outputs.mean(0)
    for b in range(6):
        row = averaged[:, b].flatten(1)
        covariance = (row - row.mean(0)).mT @ (row - row.mean(0)) / 5
        hessian = dense_hessian(likelihood, averaged[:, b].mean(0))
        expected = 0.5 * torch.linalg.slogdet(torch.eye(len(covariance), **F64) + covariance @ hessian).logabsdet
        assert_close(found[b], expected, rtol=0, atol=1e-10)


def test_a_low_rank_hessian_gives_what_its_heads_give_apart():
    """Mixed data of independent heads: Gram matrices add up."""
    heads = [bae.likelihoods.Gaussian(0.5), bae.likelihoods.Categorical(3, values=range(3))]
    mixed = bae.likelihoods.Mixed([heads[0], heads[0], heads[1]])
    outputs = normal(1, 4, 6, 5)
    assert isinstance(mixed.output_hessian(outputs[0, 0]), bae.curvature.LowRankHessian)
    both = bae.ood.information_gram(draws_of(outputs, mixed))
    first = bae.ood.information_gram(draws_of(outputs[..., :2], heads[0]))
    second = bae.ood.information_gram(draws_of(outputs[..., None, 2:], heads[1]))
    assert_close(both, first + second, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("n_rows", [1, 3])
def test_gain_of_a_linear_model_is_the_drop_of_its_entropy(n_rows):
    """Draws whose moments are the posterior's own: half the log-determinant ratio of the precisions."""
    world = testing.ConjugateRegression.make(is_orthogonal=False, n_out=2)
    design = torch.cat([normal(n_rows, 3), torch.ones(n_rows, 1, **F64)], 1)
    factor = torch.linalg.cholesky(world.covariance)
    # plus and minus every column of the factor of both outputs' joint covariance: the law's first two moments exactly
    joint = torch.block_diag(factor, factor)
    theta = math.sqrt(len(joint)) * torch.cat([joint.mT, -joint.mT]).reshape(-1, 2, 4)
    theta = theta + torch.cat([world.mean["weight"], world.mean["bias"][:, None]], 1)
    outputs = torch.einsum("sod,bd->sbo", theta, design)
    grams = bae.ood.information_gram(draws_of(outputs[None], world.joint.likelihood))
    precision = torch.linalg.inv(world.covariance)
    expected = torch.logdet(precision + design.mT @ design / 0.5**2) - torch.logdet(
        precision
    )  # of both outputs: twice a half
    assert_close(bae.ood.joint_information(grams), expected, rtol=1e-10, atol=0)


@pytest.mark.slow
def test_many_draws_of_a_laplace_posterior_reach_the_closed_form():
    world = testing.ConjugateRegression.make(is_orthogonal=False)
    design = torch.cat([normal(4, 3), torch.ones(4, 1, **F64)], 1)
    factor = torch.linalg.cholesky(world.covariance)
    expected = torch.log1p(((design @ factor) ** 2).sum(1) / 0.5**2)
    n = 400
    found = torch.stack(
        [
            bae.ood.information_gain(
                draws_of((design @ factor @ normal(4, 2 * n, seed=seed)).reshape(1, 4, n, 2).transpose(1, 2),
                         world.joint.likelihood)
            )
            for seed in range(60)
        ]
    )  # fmt: skip
    error = found.std(0) / math.sqrt(len(found))
    bias = 2 / n  # log det is concave: of the order of the number of directions over the number of draws
    assert bool(((found.mean(0) - expected).abs() < 4 * error + bias).all())


def test_small_spread_gives_balds_mutual_information():
    """One binary number: H[mean p] - mean H[p] and the Gram form agree to first order in the variance of the logit."""
    spread = normal(9, 4, 1)
    outputs = normal(1, 4, 1, seed=1) + 1e-2 * (spread - spread.mean(0))
    p = outputs.sigmoid()

    def entropy(q):
        return -(q * q.log() + (1 - q) * (1 - q).log())

    bald = (entropy(p.mean(0)) - entropy(p).mean(0))[:, 0]
    found = bae.ood.information_gain(draws_of(outputs[None], bae.likelihoods.Bernoulli()))
    assert_close(found, bald, rtol=2e-2, atol=0)
    assert float(found.min()) > 1e-6


def test_of_two_networks_it_is_an_upper_bound():
    """Mutual information of a fair mixture of two Normals, by quadrature; it is at most log 2."""
    grid = torch.linspace(-20, 20, 40_001, **F64)
    for apart in (0.5, 2.0, 6.0):
        law = [torch.distributions.Normal(sign * apart / 2, 1.0).log_prob(grid).exp() for sign in (-1, 1)]
        mixture = 0.5 * (law[0] + law[1])
        entropy = -float(torch.trapezoid(torch.xlogy(mixture, mixture), grid))
        exact = entropy - 0.5 * math.log(2 * math.pi * math.e)
        outputs = torch.tensor([-apart / 2, apart / 2], **F64).reshape(1, 2, 1, 1)
        found = float(bae.ood.information_gain(draws_of(outputs, bae.likelihoods.Gaussian(1.0))))
        assert exact < found
        assert exact <= math.log(2) + 1e-6


def test_bound_is_hadamards():
    """At least the gain, and equal to it where outputs are uncorrelated."""
    likelihood = bae.likelihoods.Gaussian(0.4)

    def both(outputs):
        mean, weights = outputs.mean(0), outputs.var(0, correction=0)
        moments = bae.Moments(mean, torch.full_like(mean, 0.16), torch.zeros_like(mean), weights, likelihood)
        gain = bae.ood.information_gain(draws_of(outputs[None], likelihood))
        return bae.ood.information_gain_bound(moments), gain

    bound, gain = both(normal(6, 5, 9))
    assert bool((bound > gain + 0.1).all())
    orthogonal = torch.linalg.qr(torch.cat([torch.ones(6, 1, **F64), normal(6, 4)], 1)).Q[:, None, 1:]
    bound, gain = both(orthogonal)
    assert_close(bound, gain, rtol=1e-12, atol=0)


def test_float32_outputs_lose_nothing_more():
    """Outputs far from 0 that differ little between draws: means and products in float32 would round them away."""
    outputs = (1000 + 1e-2 * normal(5, 4, 3, 6)).float()
    likelihood = bae.likelihoods.Gaussian(0.1)
    wide = bae.ood.information_gram(draws_of(outputs.double(), likelihood))
    found = bae.ood.information_gram(draws_of(outputs, likelihood))
    assert_close(found, wide, rtol=1e-6, atol=1e-9)  # the noise variance itself is a float32
    assert found.dtype == torch.float64


def test_a_number_without_noise_or_variance_tells_nothing():
    """A dead pixel: 0 / 0."""
    moments = bae.Moments(
        *(torch.tensor([[0.0, v]], **F64) for v in (1.0, 0.5, 0.0, 1.5)), bae.likelihoods.Gaussian(1.0)
    )
    assert_close(bae.ood.information_gain_bound(moments), torch.tensor([0.5 * math.log(4)], **F64))


def test_chunks_of_one_seed_belong_together(model, rows):
    predictive = bae.Predictive(model, bae.fit_weights(bae.weights.Laplace(), model, rows))

    def grams(x):
        return bae.ood.information_gram(predictive(x, n_weight_draws=6, seed=0, keep_outputs=True))

    assert_close(torch.cat([grams(part) for part in rows.split(4)]), grams(rows), rtol=1e-9, atol=1e-12)


def test_errors():
    likelihood = bae.likelihoods.Gaussian(1.0)
    draws = draws_of(normal(1, 3, 2, 4), likelihood)
    with pytest.raises(bae.errors.UnsupportedError, match="keep_outputs=True"):
        bae.ood.information_gain(draws.without_outputs())
    for question in (bae.ood.information_gram, bae.ood.information_gain):
        with pytest.raises(bae.errors.UnsupportedError, match="two weight draws; got one"):
            question(draws_of(normal(3, 1, 2, 4), likelihood))
    with pytest.raises(bae.errors.NonFiniteError, match="noise variance 0"):
        bae.ood.information_gain(replace(draws, outputs=torch.full((1, 3, 2, 4), torch.nan)))
    with pytest.raises(bae.errors.ShapeError, match="Gram matrices"):
        bae.ood.joint_information(torch.zeros(3, 3))
    with pytest.raises(bae.errors.NonFiniteError, match="positive semi-definite"):
        bae.ood.joint_information(-2 * torch.eye(3)[None])
    one = torch.ones(2, 4)
    with pytest.raises(bae.errors.NonFiniteError, match="without noise"):
        bae.ood.information_gain_bound(bae.Moments(one, 0 * one, 0 * one, one, likelihood))
    with pytest.raises(bae.errors.UnsupportedError, match="classes without an order"):
        bae.ood.information_gain_bound(bae.Moments(one, one, one, one, bae.likelihoods.Categorical(4)))


@pytest.mark.parametrize(("likelihood", "shape"), LIKELIHOODS, ids=lambda v: type(v).__name__)
def test_a_mask_leaves_only_what_was_observed(likelihood, shape):
    """Against outputs of the observed numbers alone, row by row."""
    outputs = normal(2, 4, 3, *shape)
    data_shape = likelihood.data_shape(torch.Size(shape))
    mask = torch.rand(3, *data_shape, generator=torch.Generator().manual_seed(2)) < 0.5
    mask[0], mask[1] = True, False
    found = bae.ood.information_gain(draws_of(outputs, likelihood), mask)
    whole = bae.ood.information_gain(draws_of(outputs, likelihood))
    assert found[0] == whole[0] and found[1] == 0 and 0 < found[2] < whole[2]
    row, counts = outputs[:, :, 2], likelihood.output_mask(mask)[2]
    alone = row[..., counts].reshape(2, 4, 1, -1, *(shape[len(data_shape) :]))
    assert_close(found[2:], bae.ood.information_gain(draws_of(alone, likelihood)), rtol=1e-10, atol=1e-12)


def test_a_mask_of_mixed_columns_counts_all_outputs_of_a_column():
    heads = [bae.likelihoods.Gaussian(0.5), bae.likelihoods.Categorical(3, values=range(3))]
    outputs = normal(1, 4, 6, 5)
    draws = draws_of(outputs, bae.likelihoods.Mixed([heads[0], heads[0], heads[1]]))
    classes = torch.tensor([False, False, True]).expand(6, 3)
    second = bae.ood.information_gram(draws_of(outputs[..., None, 2:], heads[1]))
    assert_close(bae.ood.information_gram(draws, classes), second, rtol=1e-9, atol=1e-12)


def test_the_bound_counts_what_was_observed():
    mean, weights = torch.ones(2, 3), torch.tensor([0.5, 1.0, 2.0]).expand(2, 3)
    moments = bae.Moments(mean, 0.5 * mean, 0 * mean, weights, bae.likelihoods.Gaussian(1.0))
    mask = torch.tensor([[True, False, True], [False, False, False]])
    expected = torch.tensor([0.5 * math.log(2 * 5), 0.0], **F64)
    assert_close(bae.ood.information_gain_bound(moments, mask), expected)
    with pytest.raises(bae.errors.ShapeError, match="a mask of shape"):
        bae.ood.information_gain_bound(moments, mask[:1])
    with pytest.raises(bae.errors.ShapeError, match="dtype bool"):
        bae.ood.information_gain(draws_of(normal(1, 3, 2, 4), bae.likelihoods.Gaussian(1.0)), torch.ones(2, 4))
