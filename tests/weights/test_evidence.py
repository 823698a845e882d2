"""The evidence under priors by layer and by weight, against closed forms and a direct optimiser."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch.testing import assert_close

import bayesae as bae
from bayesae import testing
from bayesae.encoding import flatten, unflatten
from bayesae.functional import parameters_of
from bayesae.testing import ConjugateRegression
from bayesae.weights import Laplace, LowRank
from bayesae.weights.evidence import LIMITS, Groups, MarginalLikelihood, Noise
from bayesae.weights.structures.base import Eigenvalues
from tests.conftest import small_model
from tests.weights.test_structures import STRUCTURES, covariance_of, positions, whole_ggn

PRIORS = {
    "tensor": {"weight": 0.7, "bias": 5.0},
    "weight": {"weight": torch.tensor([[0.1, 1.0, 10.0], [3.0, 0.2, 50.0]]).double(), "bias": torch.tensor([2.0, 9.0])},
}
COUPLED = ["dense", "low_rank", LowRank(8, n_passes=1)]
GROUPS = ["all", "layer", "weight"]
PAIRS = [(s, g) for s in STRUCTURES for g in GROUPS if g != "weight" or s not in ("kronecker", "eigencorrected")]


def conjugate(prior):
    """The world under another prior: its mean and the evidence in closed form, and the covariance (P, P)."""
    world = ConjugateRegression.make(is_orthogonal=False)
    params = dict(world.mean)
    precisions = torch.cat([leaf.flatten() for leaf in prior.precisions_of(params).values()])
    x, y = world.batch.x, world.batch.target
    n_out = y.shape[1]
    design = torch.cat(
        [
            torch
            .kron(x.unsqueeze(1).contiguous(), torch.eye(n_out).double()[None])
            .reshape(len(x), n_out, 3, n_out)
            .transpose(2, 3)
            .reshape(len(x), n_out, -1),
            torch.eye(n_out).double().expand(len(x), n_out, n_out),
        ],
        -1,
    ).flatten(0, 1)
    covariance = torch.linalg.inv(design.mT @ design / 0.25 + torch.diag(precisions))
    mode = covariance @ design.mT @ y.flatten() / 0.25
    marginal = 0.25 * torch.eye(len(design)).double() + design / precisions @ design.mT
    evidence = torch.distributions.MultivariateNormal(torch.zeros(len(design)).double(), marginal).log_prob(y.flatten())
    mean = {name: mode[index.flatten()].reshape(index.shape) for name, index in positions(params).items()}
    joint = dataclasses.replace(world.joint, prior=prior)
    return dataclasses.replace(world, joint=joint, mean=mean, log_evidence=float(evidence)), covariance


class TestGivenPrior:
    @pytest.mark.parametrize("kind", PRIORS)
    @pytest.mark.parametrize("structure", COUPLED, ids=str)
    def test_posterior_and_evidence_are_exact(self, structure, kind):
        world, covariance = conjugate(bae.IndependentNormal(PRIORS[kind]))
        posterior = testing.run_inference(Laplace(structure, tunes_prior=False), world, n_batches=3)
        assert_close(covariance_of(posterior), covariance, rtol=1e-8, atol=1e-10)
        assert posterior.info["log_evidence"] == pytest.approx(world.log_evidence, rel=1e-10)
        precisions = torch.cat([v.flatten() for v in world.joint.prior.precisions_of(dict(world.mean)).values()])
        assert posterior.info["prior_precision"] == pytest.approx(float(precisions.log().mean().exp()))
        cold = testing.run_inference(Laplace(structure, tunes_prior=False), world.with_temperature(0.1))
        assert_close(covariance_of(cold), 0.1 * covariance, rtol=1e-8, atol=1e-10)
        assert cold.info["log_evidence"] == pytest.approx(world.log_evidence, rel=1e-10)

    @pytest.mark.parametrize("structure", STRUCTURES, ids=str)
    def test_equal_numbers_are_the_isotropic_prior(self, structure):
        worlds = [conjugate(bae.IndependentNormal({"weight": 2.0, "bias": torch.full((2,), 2.0)}))[0], None]
        worlds[1] = dataclasses.replace(
            worlds[0], joint=dataclasses.replace(worlds[0].joint, prior=bae.IsotropicNormal(2.0))
        )
        one, other = (testing.run_inference(Laplace(structure, tunes_prior=False), w) for w in worlds)
        assert one.info == pytest.approx(other.info, rel=1e-12)
        assert all(torch.equal(one.variances()[name], other.variances()[name]) for name in one.mean)

    @pytest.mark.parametrize("structure", ["diagonal", "kronecker", "eigencorrected"])
    def test_layers_of_their_own_precision(self, structure):
        """Of independent layers each is what it is under a prior for all of that precision."""
        model, rows = small_model(), torch.rand(9, 7).double()
        layers = {
            "encoder.1": 0.5,
            "encoder.3": 20.0,
            "encoder.5": 1.0,
            "decoder.1": 7.0,
            "decoder.3": 1.0,
            "decoder.5": 3.0,
        }
        prior = bae.IndependentNormal({
            f"{layer}.{kind}": v for layer, v in layers.items() for kind in ("weight", "bias")
        })
        fixed = Laplace(structure, tunes_prior=False)
        got = bae.fit_weights(fixed, model, rows, weight_prior=prior).variances()
        for layer, value in layers.items():
            expected = bae.fit_weights(fixed, model, rows, weight_prior=bae.IsotropicNormal(value)).variances()
            for kind in ("weight", "bias"):
                assert_close(got[f"{layer}.{kind}"], expected[f"{layer}.{kind}"], rtol=1e-12, atol=0)

    @pytest.mark.parametrize("structure", ["kronecker", "eigencorrected"])
    def test_a_layer_of_two_precisions_has_no_kronecker_basis(self, structure):
        world, _ = conjugate(bae.IndependentNormal(PRIORS["tensor"]))
        with pytest.raises(bae.errors.UnsupportedError, match="0.7 to 5 in 'weight' and its bias"):
            testing.run_inference(Laplace(structure, tunes_prior=False), world)

    def test_weights_outside_the_subset_enter_by_the_likelihood_alone(self):
        model, rows = small_model(), torch.rand(9, 7).double()
        chosen = Laplace("dense", subset=("decoder.5.*",), tunes_prior=False)
        precisions = {name: 3.0 if name.startswith("decoder.5") else 7.0 for name in parameters_of(model.network)}
        one = bae.fit_weights(chosen, model, rows, weight_prior=bae.IndependentNormal(precisions))
        other = bae.fit_weights(chosen, model, rows, weight_prior=bae.IsotropicNormal(3.0))
        assert one.info == pytest.approx(other.info, rel=1e-12)

    @pytest.mark.parametrize("structure", STRUCTURES, ids=str)
    def test_of_no_weight_the_evidence_is_the_likelihood(self, structure):
        model, rows = small_model(), torch.rand(9, 7).double()
        none = bae.fit_weights(
            Laplace(structure, subset=bae.Subset({}), prior_groups="layer" if structure != "dense" else "all"),
            model,
            rows,
        )
        likelihood = float(model.likelihood.log_prob(model(rows), rows).sum().detach())
        assert none.info["log_evidence"] == pytest.approx(likelihood, rel=1e-12)
        assert none.info["n_effective"] == 0
        own = bae.IndependentNormal(dict.fromkeys(parameters_of(model.network), 3.0))
        given = bae.fit_weights(Laplace(structure, subset=bae.Subset({})), model, rows, weight_prior=own)
        assert given.info["log_evidence"] == pytest.approx(none.info["log_evidence"], rel=1e-12)


class TestTunedPrior:
    @pytest.mark.parametrize(("structure", "groups"), PAIRS, ids=str)
    def test_every_precision_maximises_the_evidence(self, structure, groups):
        model, rows = small_model(hidden=(3,)), torch.rand(9, 7).double()
        method, joint = Laplace(structure, prior_groups=groups), bae.log_joint(model, 9)
        state = method.init(parameters_of(model.network), joint)
        for _ in range(method.epochs):
            state, _ = method.update(state, bae.Batch(rows), joint)
        marginal, parts = method.marginal(state, joint), Groups.of(groups, state.subset)
        best, ratio = marginal.maximise(parts, 1.0)
        assert ratio == 1
        top = marginal.log_evidence(best)
        assert method.posterior(state, joint).info["log_evidence"] == top
        lambdas = torch.as_tensor(best, dtype=torch.float64).expand(len(state.subset))
        for number in range(0, parts.n, 7 if groups == "weight" else 1):
            for factor in (0.5, 0.98, 1.02, 2.0):
                moved = torch.where(parts.index == number, lambdas * factor, lambdas)
                assert marginal.log_evidence(moved) < top, (number, factor)
        # MacKay's fixed point, for each group
        effective = parts.sum(
            marginal.curvature.effective(lambdas if structure != "dense" or groups != "all" else best)
        )
        assert_close(effective, parts.sum(lambdas * marginal.theta**2), rtol=1e-9, atol=1e-11)

    @pytest.mark.parametrize("groups", GROUPS)
    def test_dense_is_what_a_direct_optimiser_finds(self, groups):
        model, rows = small_model(hidden=(3,)), torch.rand(9, 7).double()
        got = bae.fit_weights(Laplace("dense", prior_groups=groups), model, rows)
        ggn, theta = whole_ggn(model, rows), torch.cat([leaf.flatten() for leaf in got.mean.values()])
        parts = Groups.of(groups, bae.Subset.of(model.network))
        logs = torch.zeros(parts.n, dtype=torch.float64, requires_grad=True)
        likelihood = float(model.likelihood.log_prob(model(rows), rows).sum().detach())

        def evidence():
            lambdas = logs[parts.index].exp()
            log_prior = logs[parts.index].sum() - (lambdas * theta**2).sum()
            return likelihood + 0.5 * (log_prior - torch.logdet(ggn + torch.diag(lambdas)))

        optimiser = torch.optim.LBFGS(
            [logs], max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
        )

        def closure():
            optimiser.zero_grad()
            loss = -evidence()
            loss.backward()
            return loss.detach()

        optimiser.step(closure)
        assert got.info["log_evidence"] == pytest.approx(float(evidence().detach()), rel=1e-10)
        own = covariance_of(got).inverse().diagonal() - ggn.diagonal()
        assert_close(own, logs[parts.index].exp().detach(), rtol=1e-4, atol=1e-4)

    def test_of_a_diagonal_the_precision_of_a_weight_is_in_closed_form(self):
        """lambda h theta^2 + lambda^2 theta^2 = h."""
        model, rows = small_model(), torch.rand(9, 7).double()
        got = bae.fit_weights(Laplace(prior_groups="weight"), model, rows)
        fixed = bae.fit_weights(Laplace(tunes_prior=False), model, rows)
        h, theta = 1 / fixed.var - 1, torch.cat([leaf.flatten() for leaf in got.mean.values()])
        keep = h > 1e-6  # h comes from a difference
        expected = h / 2 * (torch.sqrt(1 + 4 / (h * theta**2)) - 1)
        assert_close((1 / got.var - h)[keep], expected[keep], rtol=1e-6, atol=1e-6)

    def test_alternating_with_the_mode_prunes_what_the_data_do_not_hold(self):
        """With q = least squares: lambda = h / (h q^2 - 1) where h q^2 > 1, else 0 is the weight's place (MacKay)."""
        h = torch.tensor([4.0, 4.0, 100.0, 0.5], dtype=torch.float64)
        least_squares = torch.tensor([2.0, 0.3, 0.2, -1.0], dtype=torch.float64)
        groups = Groups.of("weight", bae.Subset({"w": torch.ones(4, dtype=torch.bool)}))
        precision = torch.ones(4, dtype=torch.float64)
        for _ in range(150):
            mode = h * least_squares / (h + precision)
            precision, _ = MarginalLikelihood(Eigenvalues(h), mode, 0.0).maximise(groups, precision)
        is_held = h * least_squares**2 > 1
        assert is_held.tolist() == [True, False, True, False]
        expected = torch.where(is_held, h / (h * least_squares**2 - 1), LIMITS[1])
        assert_close(precision, expected, rtol=1e-9, atol=0)
        assert MarginalLikelihood(Eigenvalues(h), mode, 0.0).info(precision, groups)["n_pruned"] == 2

    @pytest.mark.parametrize("groups", GROUPS)
    def test_a_random_curvature_with_noise(self, groups):
        """The maximum over everything at once, where data hardly outnumber the weights."""
        for seed in range(5):
            generator = torch.Generator().manual_seed(seed)
            design = torch.randn(14, 12, generator=generator, dtype=torch.float64) * torch.logspace(-3, 2, 12).double()
            theta = torch.randn(12, generator=generator, dtype=torch.float64)
            residual = float(torch.rand((), generator=generator)) + 0.1
            matrix = design.mT @ design
            sizes = {"a.w": 3, "a.b": 2, "b.w": 4, "c.w": 3}
            subset = bae.Subset({name: torch.ones(n, dtype=torch.bool) for name, n in sizes.items()})
            parts, noise = Groups.of(groups, subset), Noise(1.0, residual, 14)
            curvature = bae.weights.structures.Dense().finish(matrix, subset, 1.0)
            marginal = MarginalLikelihood(curvature, theta, 0.0)
            best, ratio = marginal.maximise(parts, 1.0, noise)
            lambdas = torch.as_tensor(best, dtype=torch.float64).expand(12)
            inverse = torch.linalg.inv(ratio * matrix + torch.diag(lambdas))
            effective = 1 - lambdas * inverse.diagonal()
            assert_close(parts.sum(effective), parts.sum(lambdas * theta**2), rtol=1e-6, atol=1e-7)
            assert 14 - float(effective.sum()) == pytest.approx(ratio * residual, rel=1e-6)
            top = marginal.log_evidence(best, noise, ratio)
            brute = -0.5 * float(torch.logdet(ratio * matrix + torch.diag(lambdas)))
            brute += 0.5 * float(lambdas.log().sum() - (lambdas * theta**2).sum())
            assert top == pytest.approx(brute + 0.5 * (14 * math.log(ratio) - (ratio - 1) * residual), rel=1e-9)
            assert all(marginal.log_evidence(best, noise, ratio * f) < top for f in (0.5, 0.99, 1.01, 2.0))

    @pytest.mark.parametrize("n_data", [101, 100.5, 300, 1e6])
    def test_hardly_any_numbers_left_to_the_noise(self, n_data):
        """Curvatures that no rows could have (100 of 100 weights held): the maximum is there all the same."""
        h = torch.logspace(-1, 6, 100, dtype=torch.float64)
        theta = torch.linspace(-1, 2, 100, dtype=torch.float64)
        groups = Groups.of("layer", bae.Subset({n: torch.ones(50, dtype=torch.bool) for n in ("a.w", "b.w")}))
        marginal, noise = MarginalLikelihood(Eigenvalues(h), theta, 0.0), Noise(2.0, 1e-3, n_data)
        best, ratio = marginal.maximise(groups, 1.0, noise)
        effective = ratio * h / (ratio * h + best)
        assert_close(groups.sum(effective), groups.sum(best * theta**2), rtol=1e-9, atol=0)
        assert n_data - float(effective.sum()) == pytest.approx(ratio * 2e-3, rel=1e-8)
        alone, same = marginal.maximise(None, best, noise)
        assert alone is best
        assert same == pytest.approx(ratio, rel=1e-9)
        capped = dataclasses.replace(noise, highest=0.5 * ratio * 2.0)
        assert marginal.maximise(groups, 1.0, capped)[1] == pytest.approx(0.5 * ratio, rel=1e-12)

    def test_weights_that_outnumber_the_data_leave_little_to_the_noise(self):
        """Of 400 weights 100 numbers hold nearly 100: the clamped step of 1% of the numbers never got there."""
        h = torch.logspace(-1, 3, 400, dtype=torch.float64)
        groups = Groups.of("all", bae.Subset({"w": torch.ones(400, dtype=torch.bool)}))
        marginal, noise = MarginalLikelihood(Eigenvalues(h), torch.ones_like(h), 0.0), Noise(1.0, 1.0, 100)
        best, ratio = marginal.maximise(groups, 1.0, noise)
        n_effective = float((ratio * h / (ratio * h + best)).sum())
        assert n_effective == pytest.approx(400 * best, rel=1e-9)
        assert 1e-4 < 100 - n_effective < 1
        assert 100 - n_effective == pytest.approx(ratio, rel=1e-8)

    @pytest.mark.parametrize("structure", ["diagonal", "dense"])
    def test_what_has_no_curvature_keeps_the_joints_precision(self, structure):
        model, rows = small_model(hidden=(3,)), torch.rand(9, 7).double()
        with torch.no_grad():
            model.decoder[3].weight[:, 0] = 0  # what feeds this unit moves no output
        prior = bae.IsotropicNormal(4.0)
        got = bae.fit_weights(Laplace(structure, prior_groups="weight"), model, rows, weight_prior=prior)
        dead = got.variances()["decoder.1.weight"][0]
        assert_close(dead, torch.full((2,), 0.25).double(), rtol=1e-9, atol=0)
        # and weights that are 0 but would move outputs are held there
        assert_close(got.variances()["decoder.3.weight"][:, 0], torch.full((7,), 1e-12).double(), rtol=1e-3, atol=0)
        assert got.info["n_pruned"] == 7

    def test_subsets_tune_their_own_weights(self):
        model, rows = small_model(), torch.rand(9, 7).double()
        subset = ("encoder.1.*", "decoder.5.*")
        got = bae.fit_weights(Laplace(subset=subset, prior_groups="layer"), model, rows).info
        assert {key for key in got if key.startswith("prior_precision.")} == {
            "prior_precision.encoder.1",
            "prior_precision.decoder.5",
        }
        for layer in ("encoder.1", "decoder.5"):
            alone = bae.fit_weights(Laplace(subset=(f"{layer}.*",)), model, rows).info
            assert got[f"prior_precision.{layer}"] == pytest.approx(alone["prior_precision"], rel=1e-10)

    def test_info_names_what_it_was_fitted_to(self):
        model, rows = small_model(), torch.rand(9, 7).double()
        info = bae.fit_weights(Laplace(), model, rows, temperature=0.5).info
        assert (info["n_data"], info["temperature"], info["noise_scale"]) == (9, 0.5, pytest.approx(0.3, rel=1e-12))
        assert (
            "noise_scale" not in bae.fit_weights(Laplace(), small_model(bae.likelihoods.Bernoulli()), rows.round()).info
        )

    def test_root_parameters_are_a_layer(self):
        world = ConjugateRegression.make()
        assert "prior_precision.root" in testing.run_inference(Laplace(prior_groups="layer"), world).info

    def test_refusals(self):
        with pytest.raises(bae.errors.UnsupportedError, match="prior_groups, one of"):
            Laplace(prior_groups="scalar")
        for structure in ("kronecker", "eigencorrected"):
            with pytest.raises(bae.errors.UnsupportedError, match="no Kronecker basis"):
                Laplace(structure, prior_groups="weight")
            Laplace(structure, prior_groups="weight", tunes_prior=False)
        few = MarginalLikelihood(Eigenvalues(torch.full((50,), 1e6).double()), torch.ones(50).double(), 0.0)
        groups = Groups.of("all", bae.Subset({"w": torch.ones(50, dtype=torch.bool)}))
        with pytest.raises(bae.errors.NonFiniteError, match="more observed numbers than effective weights"):
            few.maximise(groups, 1.0, Noise(1.0, 1e-12, 10))


class TestPriors:
    def test_density(self):
        params = {"weight": torch.randn(4, 2, 3).double(), "bias": torch.randn(4, 2).double()}
        prior = bae.IndependentNormal(PRIORS["weight"])
        expected = sum(
            torch.distributions.Normal(0.0, PRIORS["weight"][n].double() ** -0.5).log_prob(leaf).flatten(1).sum(1)
            for n, leaf in params.items()
        )
        assert_close(prior.log_prob(params), expected, rtol=1e-12, atol=0)
        same = bae.IndependentNormal({"weight": 3.0, "bias": 3.0})
        assert_close(same.log_prob(params), bae.IsotropicNormal(3.0).log_prob(params), rtol=1e-12, atol=0)

    def test_refusals(self):
        with pytest.raises(bae.errors.DataError, match="positive, finite prior precisions; got 0 to 1 for 'b'"):
            bae.IndependentNormal({"a": 1.0, "b": torch.tensor([0.0, 1.0])})
        params = {"a": torch.zeros(1, 2), "b": torch.zeros(1, 2)}
        with pytest.raises(bae.errors.ParameterError, match=r"none for \['b'\] and some for unknown \['c'\]"):
            bae.IndependentNormal({"a": 1.0, "c": 1.0}).log_prob(params)
        with pytest.raises(bae.errors.ShapeError, match=r"shape \(2,\) for 'a'"):
            bae.IndependentNormal({"a": torch.ones(3), "b": 1.0}).log_prob(params)

    def test_training_takes_it(self):
        model, rows = small_model(), torch.rand(9, 7).double()
        names = parameters_of(model.network)
        strong = {name: 1e6 if name.startswith("decoder.5") else 1.0 for name in names}
        bae.fit_model(model, rows, epochs=60, learning_rate=0.02, weight_prior=bae.IndependentNormal(strong), seed=0)
        largest = {name: float(leaf.abs().max()) for name, leaf in parameters_of(model.network).items()}
        assert largest["decoder.5.weight"] < 0.05 < largest["encoder.1.weight"]


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_a_packed_state_goes_on_alike(structure):
    model, rows = small_model(), torch.rand(9, 7).double()
    method, joint = Laplace(structure, prior_groups="layer"), bae.log_joint(model, 9)
    params = parameters_of(model.network)
    parts = [bae.Batch(part) for part in rows.split(4)]
    state = method.init(params, joint)
    copied = method.unpack(unflatten(*flatten(method.pack(state))), params, joint)
    for number, batch in enumerate(parts * method.epochs):
        state, _ = method.update(state, batch, joint)
        copied, _ = method.update(copied, batch, joint)
        if number in (0, 3):
            copied = method.unpack(unflatten(*flatten(method.pack(copied))), params, joint)
    one, other = method.posterior(state, joint), method.posterior(copied, joint)
    assert one.info == other.info
    assert all(torch.equal(one.variances()[name], other.variances()[name]) for name in params)
