"""What each structure of Laplace keeps, against the whole curvature built from Jacobians."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import bayesae as bae
from bayesae import testing
from bayesae.functional import parameters_of
from bayesae.testing import ConjugateRegression
from bayesae.weights import Laplace, LowRank
from tests.conftest import small_model
from tests.twins import dense_jacobian

STRUCTURES = ["diagonal", "kronecker", "eigencorrected", "low_rank", LowRank(4), LowRank(30, n_passes=1), "dense"]
LIKELIHOODS = {"Gaussian": lambda: bae.likelihoods.Gaussian(0.3), "Bernoulli": bae.likelihoods.Bernoulli}


@pytest.fixture(params=LIKELIHOODS)
def small(request):
    """7-3-2-3-7 with curvature of rank at most 7 * 9 = 63 of 78 weights."""
    return small_model(LIKELIHOODS[request.param](), hidden=(3,))


def whole_ggn(model, x, mask=None):
    """(P, P) in the order of ``named_parameters``."""
    outputs = model(x).detach()
    hessian = model.likelihood.output_hessian(outputs).expand(outputs.shape)
    if mask is not None:
        hessian = hessian * mask
    jacobian = dense_jacobian(model.network, x)
    return torch.einsum("bop,bo,boq->pq", jacobian, hessian, jacobian)


def rows_of(model, names):
    """Where the parameters stand among all."""
    return torch.cat([
        where.flatten() for name, where in positions(dict(model.network.named_parameters())).items() if name in names
    ])


def positions(params):
    """Row of every weight in (P, P), in its parameter's shape."""
    ends = itertools.accumulate(leaf.numel() for leaf in params.values())
    return {
        name: torch.arange(end - leaf.numel(), end).reshape(leaf.shape)
        for (name, leaf), end in zip(params.items(), ends, strict=True)
    }


def covariance_of(posterior):
    """(P, P) of any family, in the order of ``named_parameters``: what it tells the engine, multiplied out."""
    covariance = posterior.covariance()
    size = sum(leaf.numel() for leaf in posterior.mean.values())
    index = positions(posterior.mean)

    def flat(params, rows=()):
        parts = [
            params[n].flatten(len(rows)) if n in params else torch.zeros(*rows, v.numel()) for n, v in index.items()
        ]
        return torch.cat([part.double() for part in parts], -1)

    match type(covariance).__name__:
        case "DiagonalCovariance":
            return torch.diag(flat(covariance.variances))
        case "DenseCovariance":
            chosen = torch.cat([index[name][mask] for name, mask in covariance.masks.items()])
            result = torch.zeros(size, size, dtype=torch.float64)
            result[chosen[:, None], chosen] = covariance.matrix
            return result
        case "LowRankCovariance":
            factor = flat(covariance.factor, (len(next(iter(covariance.factor.values()))),))
            return torch.diag(flat(covariance.diagonal)) + covariance.sign * factor.mT @ factor
    result = torch.diag(flat(covariance.rest))
    for block in covariance.blocks:
        for group, places in enumerate(block.layout.join(index)):
            basis = torch.kron(block.outputs[group].contiguous(), block.inputs[group].contiguous())
            chosen = places.flatten()
            result[chosen[:, None], chosen] = basis @ torch.diag(block.values[group].flatten()) @ basis.mT
    return result


def fit(structure, model, rows, **kwargs):
    method = Laplace(structure, tunes_prior=False, subset=kwargs.pop("subset", ("**",)))
    return bae.fit_weights(method, model, rows, batch_size=4, weight_prior=bae.IsotropicNormal(2.0), **kwargs)


class TestConjugate:
    @pytest.mark.parametrize("structure", ["dense", "kronecker", "eigencorrected", "low_rank", LowRank(8, n_passes=1)])
    def test_covariance_and_evidence_are_exact(self, structure):
        world = ConjugateRegression.make(is_orthogonal=False)
        posterior = testing.run_inference(Laplace(structure, tunes_prior=False), world, n_batches=3)
        got = covariance_of(posterior)  # weight (2, 3), bias (2,)
        for unit, chosen in enumerate(([0, 1, 2, 6], [3, 4, 5, 7])):
            part = torch.tensor(chosen)
            assert_close(got[part[:, None], part], world.covariance, rtol=1e-10, atol=1e-10)
            other = torch.tensor([i for i in range(8) if i not in chosen])
            assert float(got[part[:, None], other].abs().max()) < 1e-12, unit
        assert posterior.info["log_evidence"] == pytest.approx(world.log_evidence, rel=1e-10)

    @pytest.mark.parametrize("structure", STRUCTURES, ids=str)
    def test_prior_precision_maximises_the_evidence(self, structure):
        world = ConjugateRegression.make(is_orthogonal=False)
        tuned = testing.run_inference(Laplace(structure), world).info

        def evidence(precision):
            joint = dataclasses.replace(world.joint, prior=bae.IsotropicNormal(precision))
            fixed = Laplace(structure, tunes_prior=False)
            return testing.run_inference(fixed, dataclasses.replace(world, joint=joint)).info["log_evidence"]

        best = tuned["prior_precision"]
        assert evidence(best) == pytest.approx(tuned["log_evidence"], rel=1e-12)
        for factor in (0.5, 0.99, 1.01, 2.0):
            assert evidence(best * factor) < tuned["log_evidence"]
        square = sum(float((leaf**2).sum()) for leaf in world.mean.values())
        assert tuned["n_effective"] == pytest.approx(best * square, rel=1e-9)

    @pytest.mark.parametrize("structure", STRUCTURES, ids=str)
    @pytest.mark.parametrize("temperature", [0.1, 4.0])
    def test_temperature_scales_the_covariance(self, structure, temperature):
        world = ConjugateRegression.make(is_orthogonal=False)
        plain, tempered = (
            testing.run_inference(Laplace(structure), w) for w in (world, world.with_temperature(temperature))
        )
        for name, value in plain.variances().items():
            assert_close(tempered.variances()[name], temperature * value, rtol=1e-10, atol=0)
        assert tempered.info | {"temperature": 1.0} == plain.info

    @pytest.mark.parametrize("structure", STRUCTURES, ids=str)
    def test_batches_do_not_matter(self, structure):
        world = ConjugateRegression.make(is_orthogonal=False)
        one, many = (testing.run_inference(Laplace(structure), world, n_batches=n) for n in (1, 24))
        for name, value in one.variances().items():
            assert_close(many.variances()[name], value, rtol=1e-9, atol=0)
        for key, value in one.info.items():
            assert many.info[key] == pytest.approx(value, rel=1e-10)


class TestAutoencoder:
    """The covariance is the inverse of what the structure keeps of the brute-force curvature."""

    def test_dense(self, small, rows):
        ggn = whole_ggn(small, rows)
        posterior = fit("dense", small, rows)
        eye = torch.eye(len(ggn), dtype=torch.float64)
        assert_close(covariance_of(posterior), torch.linalg.inv(ggn + 2 * eye), rtol=1e-8, atol=1e-10)
        eigenvalues = torch.linalg.eigvalsh(ggn)
        n_effective = float((eigenvalues / (eigenvalues + 2)).sum())
        assert posterior.info["n_effective"] == pytest.approx(n_effective, rel=1e-10)
        theta = torch.cat([leaf.flatten() for leaf in posterior.mean.values()])
        log_likelihood = float(small.likelihood.log_prob(small(rows), rows).sum().detach())
        log_prior = 0.5 * (len(theta) * math.log(2 / (2 * math.pi)) - 2 * float(theta @ theta))
        log_det = float(torch.logdet(ggn + 2 * eye))
        evidence = log_likelihood + log_prior + 0.5 * len(theta) * math.log(2 * math.pi) - 0.5 * log_det
        assert posterior.info["log_evidence"] == pytest.approx(evidence, rel=1e-10)

    def test_eigencorrected_keeps_the_diagonal_in_each_basis(self, small, rows):
        ggn = whole_ggn(small, rows)
        posterior = fit("eigencorrected", small, rows)
        assert len(posterior.blocks) == 4
        index = positions(posterior.mean)
        for block in posterior.blocks:
            chosen = block.layout.join(index)[0].flatten()
            basis = torch.kron(block.outputs[0].contiguous(), block.inputs[0].contiguous())
            expected = (basis.mT @ ggn[chosen[:, None], chosen] @ basis).diagonal()
            assert_close(1 / block.values.flatten(), expected + 2, rtol=1e-9, atol=1e-9)

    def test_kronecker_keeps_the_basis_of_eigencorrected_and_its_trace(self, small, rows):
        """Of constant noise the output factor does not depend on the row of the last layer: there it is exact."""
        ggn = whole_ggn(small, rows)
        posterior = fit("kronecker", small, rows)
        last = posterior.blocks[-1]
        chosen = rows_of(small, last.layout.names)
        exact = torch.linalg.inv(ggn + 2 * torch.eye(len(ggn), dtype=torch.float64))  # never equal: other layers
        assert not torch.allclose(covariance_of(posterior), exact)
        if isinstance(small.likelihood, bae.likelihoods.Gaussian):
            own = ggn[chosen[:, None], chosen] + 2 * torch.eye(len(chosen), dtype=torch.float64)
            got = covariance_of(posterior)[chosen[:, None], chosen]
            assert_close(got, torch.linalg.inv(own), rtol=1e-9, atol=1e-10)

    @pytest.mark.parametrize("n_passes", [1, 2])
    def test_low_rank_is_exact_from_the_rank_of_the_curvature_on(self, small, rows, n_passes):
        rows = rows[:4]
        ggn = whole_ggn(small, rows)
        rank = int(torch.linalg.matrix_rank(ggn))
        assert rank < len(ggn) - 10
        posterior, dense = fit(LowRank(rank, n_passes), small, rows), fit("dense", small, rows)
        got = covariance_of(posterior)
        assert_close(got, covariance_of(dense), rtol=1e-7, atol=1e-9)
        for key in ("log_evidence", "n_effective"):
            assert posterior.info[key] == pytest.approx(dense.info[key], rel=1e-8)
        cut = fit(LowRank(3, n_passes), small, rows)
        # of the same diagonal the precision with less beside it has the larger determinant
        assert cut.info["log_evidence"] < dense.info["log_evidence"] - 1e-3

    def test_low_rank_of_too_few_directions_keeps_the_diagonal(self, small, rows):
        ggn = whole_ggn(small, rows)
        posterior = fit(LowRank(3), small, rows)
        assert posterior.factor.shape[0] == 3
        precision = torch.diag(posterior.diagonal) + posterior.factor.mT @ posterior.factor
        assert_close(precision.diagonal(), ggn.diagonal() + 2, rtol=1e-10, atol=1e-10)
        # the best three directions: what is left of the curvature is its fourth eigenvalue
        largest = torch.linalg.eigvalsh(ggn).flip(0)
        left = torch.linalg.eigvalsh(ggn - posterior.factor.mT @ posterior.factor)
        assert float(left[-1]) == pytest.approx(float(largest[3]), rel=0.05)
        assert float(left[0]) > -1e-8 * float(largest[0])  # the sketch is at most G

    def test_a_second_pass_finds_the_directions_better(self, rows):
        model = small_model(hidden=(6,))
        ggn = whole_ggn(model, rows)
        kept = [float((fit(LowRank(2, n), model, rows).factor ** 2).sum()) for n in (1, 2, 3)]
        best = float(torch.linalg.eigvalsh(ggn)[-2:].sum())
        assert kept[0] < kept[1] < kept[2] < best * (1 + 1e-12)
        assert kept[2] > 0.999 * best

    @pytest.mark.parametrize("structure", STRUCTURES, ids=str)
    def test_masked_entries_carry_no_curvature(self, small, rows, structure):
        mask = torch.rand(9, 7, generator=torch.Generator().manual_seed(0)) > 0.4
        mask[:, 3] = False
        joint = bae.log_joint(small, n_data=9)
        method = Laplace(structure, tunes_prior=False)
        state = method.init(parameters_of(small.network), joint)
        for _ in range(method.epochs):
            for part in (slice(0, 5), slice(5, 9)):
                state, _ = method.update(state, bae.Batch(rows[part], mask[part]), joint)
        posterior = method.posterior(state, joint)
        ggn = whole_ggn(small, rows, mask)
        if structure == "dense":
            exact = torch.linalg.inv(ggn + torch.eye(len(ggn), dtype=torch.float64))
            assert_close(covariance_of(posterior), exact, rtol=1e-8, atol=1e-10)
        elif structure == "diagonal":
            assert_close(1 / posterior.var - 1, ggn.diagonal(), rtol=1e-8, atol=1e-9)
        # nobody saw pixel 3: the prior's variance is left to what feeds it alone
        if structure != "kronecker":  # which averages outputs and inputs apart
            assert float(posterior.variances()["decoder.3.bias"][3]) == pytest.approx(1.0, abs=1e-9)

    @pytest.mark.parametrize("structure", STRUCTURES, ids=str)
    def test_only_the_chosen_weights_are_uncertain(self, small, rows, structure):
        posterior = fit(structure, small, rows, subset=("decoder.**",))
        covariance = covariance_of(posterior)
        fixed = rows_of(small, [n for n, _ in small.network.named_parameters() if n.startswith("encoder")])
        assert float(covariance[fixed].abs().max()) == 0
        assert float(posterior.sample(4)["encoder.1.weight"].var(0).max()) == 0
        chosen = rows_of(small, [n for n, _ in small.network.named_parameters() if n.startswith("decoder")])
        assert float(covariance.diagonal()[chosen].min()) > 0
        if structure == "dense":
            precision = whole_ggn(small, rows)[chosen[:, None], chosen] + 2 * torch.eye(
                len(chosen), dtype=torch.float64
            )
            got = covariance[chosen[:, None], chosen]
            assert_close(got, torch.linalg.inv(precision), rtol=1e-8, atol=1e-10)

    @pytest.mark.parametrize("structure", ["diagonal", "low_rank", "dense"], ids=str)
    def test_weights_within_a_tensor(self, small, rows, structure):
        mask = torch.rand(3, 7, generator=torch.Generator().manual_seed(0)) > 0.5
        subset = bae.Subset({"decoder.3.bias": torch.ones(7, dtype=torch.bool), "encoder.1.weight": mask})
        posterior = fit(structure, small, rows, subset=subset)
        order = torch.cat([rows_of(small, ["decoder.3.bias"]), rows_of(small, ["encoder.1.weight"])[mask.flatten()]])
        ggn = whole_ggn(small, rows)[order[:, None], order]
        ggn = torch.diag(ggn.diagonal()) if structure == "diagonal" else ggn
        expected = torch.linalg.inv(ggn + 2 * torch.eye(len(ggn), dtype=torch.float64))
        assert_close(covariance_of(posterior)[order[:, None], order], expected, rtol=1e-8, atol=1e-10)

    @pytest.mark.parametrize("structure", STRUCTURES, ids=str)
    def test_output_variance_is_that_of_the_covariance(self, small, rows, structure):
        posterior = fit(structure, small, rows)
        jacobian = dense_jacobian(small.network, rows)
        expected = (jacobian @ covariance_of(posterior) * jacobian).sum(-1)
        got = posterior.output_variance(small.network, rows)[1]
        assert_close(got, expected, rtol=1e-8, atol=1e-12)

    @pytest.mark.parametrize("structure", STRUCTURES, ids=str)
    def test_no_weight_at_all(self, small, rows, structure):
        none = fit(structure, small, rows, subset=bae.Subset({}))
        assert float(bae.Predictive(small, none).moments(rows).weights.abs().max()) == 0
        assert none.info["n_effective"] == 0

    @pytest.mark.parametrize("structure", STRUCTURES, ids=str)
    def test_nothing_observed(self, small, rows, structure):
        method = Laplace(structure)
        joint = bae.log_joint(small, n_data=9)
        state = method.init(parameters_of(small.network), joint)
        for _ in range(method.epochs):
            state, _ = method.update(state, bae.Batch(rows, torch.zeros(9, 7, dtype=torch.bool)), joint)
        with pytest.raises(bae.errors.UnsupportedError, match="was no entry observed"):
            method.posterior(state, joint)


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_of_a_float32_network_with_curvature_far_above_the_prior(rows, structure):
    """Rounding of the largest eigenvalue, above 2e7, exceeds the prior's precision of 2."""
    wide = small_model(bae.likelihoods.Gaussian(1e-3))
    narrow = small_model(bae.likelihoods.Gaussian(1e-3), dtype=torch.float32)
    narrow.load_state_dict(wide.state_dict())
    assert float(torch.linalg.eigvalsh(whole_ggn(wide, rows))[-1]) > 2e7
    exact, rounded = fit(structure, wide, rows), fit(structure, narrow, rows.float())
    assert {leaf.dtype for leaf in rounded.sample(2).values()} == {torch.float32}
    variance = rounded.output_variance(narrow, rows.float())[1]
    assert variance.dtype == torch.float32
    if structure == LowRank(30, n_passes=1):
        return  # probes that are no eigenvectors: what is left of the diagonal is a difference of rounded numbers
    # what float32 would lose in a difference of variances is a million times this
    assert_close(variance.double(), exact.output_variance(wide, rows)[1], rtol=0.01, atol=0)
    assert rounded.info["n_effective"] == pytest.approx(exact.info["n_effective"], rel=0.1)


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_a_likelihood_that_overflows_is_said(model, rows, structure):
    method, joint = Laplace(structure), bae.log_joint(model, n_data=9)
    likelihood = copy.deepcopy(joint.likelihood)
    likelihood.output_hessian = lambda outputs: torch.full_like(outputs, torch.inf)
    joint = dataclasses.replace(joint, likelihood=likelihood)
    state = method.init(parameters_of(model.network), joint)
    with pytest.raises(bae.errors.NonFiniteError, match="NaN or infinite"):
        for _ in range(method.epochs):
            state, _ = method.update(state, bae.Batch(rows), joint)
        method.posterior(state, joint)


@pytest.mark.parametrize("structure", ["kronecker", "eigencorrected"])
@pytest.mark.parametrize("has_bias", [True, False])
def test_parameters_outside_blocks_keep_their_diagonal(rows, structure, has_bias):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 7, dtype=torch.float64))

        def forward(self, x):
            return x * self.scale

    torch.manual_seed(0)
    encoder = nn.Sequential(Scaled(), nn.Linear(7, 2, bias=has_bias, dtype=torch.float64))
    decoder = nn.Linear(2, 7, bias=has_bias, dtype=torch.float64)
    model = bae.Autoencoder(encoder, decoder, bae.likelihoods.Gaussian(1.0)).eval()
    ggn = whole_ggn(model, rows)
    posterior = fit(structure, model, rows)
    assert set(posterior.rest) == {"encoder.0.scale"}
    got = covariance_of(posterior)
    scale = rows_of(model, ["encoder.0.scale"])
    assert_close(1 / got.diagonal()[scale], ggn.diagonal()[scale] + 2, rtol=1e-9, atol=1e-9)
    mask = torch.arange(7) < 3
    part = fit(structure, model, rows, subset=bae.Subset({"encoder.0.scale": mask}))
    variance = part.variances()["encoder.0.scale"]
    assert_close(variance[mask], got.diagonal()[scale][mask], rtol=1e-12, atol=0)
    assert float(variance[~mask].abs().max()) == 0


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_convolutions_in_groups(structure):
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 2)]
    decoder = [nn.Linear(2, 16), nn.Unflatten(1, (4, 2, 2)), nn.Tanh(), nn.ConvTranspose2d(4, 2, 2, groups=2)]
    model = bae.Autoencoder(nn.Sequential(*layers), nn.Sequential(*decoder), bae.likelihoods.Gaussian(0.5))
    model = model.double().eval()
    images = torch.rand(6, 2, 3, 3, dtype=torch.float64)
    posterior = fit(structure, model, images)
    covariance = covariance_of(posterior)
    jacobian = dense_jacobian(model.network, images)
    got = posterior.output_variance(model.network, images)[1]
    assert_close(got.flatten(1), (jacobian @ covariance * jacobian).sum(-1), rtol=1e-8, atol=1e-12)
    precision = torch.einsum("bop,boq->pq", jacobian, jacobian) / 0.25 + 2 * torch.eye(len(covariance)).double()
    if structure == "dense":
        assert_close(covariance, torch.linalg.inv(precision), rtol=1e-7, atol=1e-10)
    if structure == "eigencorrected":  # in its basis the precision has the diagonal of the whole
        assert len(posterior.blocks) == 4
        own = torch.linalg.inv(covariance)
        assert float(own.diagonal().sum()) == pytest.approx(float(precision.diagonal().sum()), rel=1e-9)
