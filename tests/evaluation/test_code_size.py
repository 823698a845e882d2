"""Evidence with codes integrated out, against probabilistic PCA."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import bayesae as bae
from bayesae.evaluation.code_size import _Orbit
from bayesae.evaluation.integrated import Integrated
from bayesae.testing import LinearGaussian

FULL = bae.codes.Amortised("full")


def log_likelihood(theta, world):
    """Exact log p(x | theta) of every row of probabilistic PCA, weights before bias, (N,)."""
    n_outputs, n_latents = world.weight.shape
    weight, bias = theta[: n_outputs * n_latents].reshape(n_outputs, n_latents), theta[n_outputs * n_latents :]
    cov = weight @ weight.mT + world.noise_var * torch.eye(n_outputs, dtype=theta.dtype)
    root = torch.linalg.cholesky(cov)
    white = torch.linalg.solve_triangular(root, (world.x - bias).mT, upper=False)
    return -0.5 * (white**2).sum(0) - root.diagonal().log().sum() - 0.5 * n_outputs * math.log(2 * math.pi)


def at_mode(x, n_latents, precision=1.0, noise_var=None):
    """Probabilistic PCA at its mode under N(0, 1 / precision), noise at maximum likelihood unless given."""
    mean = x.mean(0)
    values, vectors = torch.linalg.eigh((x - mean).mT @ (x - mean) / len(x))
    values, vectors = values.flip(0), vectors.flip(1)
    var = float(values[n_latents:].mean()) if noise_var is None else noise_var
    start = vectors[:, :n_latents] * (values[:n_latents] - var).clamp(min=1e-2).sqrt()
    theta = torch.cat([start.flatten(), mean]).requires_grad_()
    log_var = torch.tensor(math.log(var), dtype=x.dtype, requires_grad=noise_var is None)
    leaves = [theta] + [log_var] * (noise_var is None)
    search = torch.optim.LBFGS(leaves, max_iter=300, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def world():
        weight, bias = theta[: start.numel()].reshape(start.shape), theta[start.numel() :]
        return LinearGaussian(weight, bias, log_var.exp(), x)

    def loss():
        search.zero_grad()
        value = 0.5 * precision * (theta**2).sum() - log_likelihood(theta, world()).sum()
        value.backward()
        return value

    search.step(loss)
    found = world()
    return LinearGaussian(found.weight.detach(), found.bias.detach(), float(log_var.detach().exp()), x)


def theta_of(world):
    return torch.cat([world.weight.flatten(), world.bias])


@pytest.fixture(scope="module")
def mode():
    world = LinearGaussian.make(n_data=120, n_outputs=5, n_latents=2, noise_var=0.5, seed=3)
    return at_mode(world.x, 2)


def sigma_points(model, batch, *, n_latent_draws=1):
    """Exact code posterior by 2 Z points of equal weight, right for every quadratic of the code."""
    law = FULL.law(model, batch)
    size = law.loc.shape[-1]
    eye = size**0.5 * torch.eye(size, dtype=law.loc.dtype)
    latents = law.push(torch.cat([eye, -eye])[:, None, None].expand(-1, 1, len(batch.x), -1))
    return bae.codes.draws_of(model, batch, latents, law.log_prob(latents))


class TestScores:
    """Fisher's identity against autograd through the closed form."""

    @staticmethod
    def exact(world):
        return torch.func.jacrev(lambda theta: log_likelihood(theta, world))(theta_of(world))

    @pytest.mark.parametrize(("codes", "n"), [(sigma_points, 1), (FULL, 12)], ids=["points", "matched draws"])
    def test_exact_posterior(self, codes, n):
        world = LinearGaussian.make(correlation=0.6)
        integrated = Integrated.of(world.model("full"), codes, n)
        with bae.random.scope(0):
            scores = integrated.scores(integrated.matched(world.batch), world.batch)
        torch.testing.assert_close(scores, self.exact(world), rtol=0, atol=1e-8)

    def test_a_poor_proposal_within_its_error(self):
        world = LinearGaussian.make(n_data=5, n_outputs=4, n_latents=2, noise_var=1.0)
        model = world.model("diagonal")
        # wider than the posterior and beside it: of a narrower one the weights have no variance
        model.encoder[0].bias.data += torch.tensor([0.3, 0.5, -0.2, 0.5], dtype=torch.float64)
        integrated = Integrated.of(model, bae.codes.amortised, 1000)
        runs = []
        for seed in range(24):
            with bae.random.scope(seed):
                runs.append(integrated.scores(integrated.draw(world.batch), world.batch))
        runs = torch.stack(runs)
        error = runs.std(0) / len(runs) ** 0.5
        assert float(error.max()) < 0.1 * float(self.exact(world).abs().max())
        assert bool(((runs.mean(0) - self.exact(world)).abs() < 4.5 * error + 1e-9).all())

    def test_twin_of_loops_with_masks(self):
        """Self-normalised mean of complete-data scores, row by row and draw by draw."""
        world = LinearGaussian.make(n_data=3, n_outputs=4, n_latents=2)
        mask = torch.ones(3, 4, dtype=torch.bool)
        mask[1, 2] = mask[2, 0] = False
        batch = world.batch._replace(mask=mask)
        model = world.model("diagonal")
        integrated = Integrated.of(model, bae.codes.amortised, 5)
        with bae.random.scope(1):
            draws = integrated.draw(batch)
        scores = integrated.scores(draws, batch)
        layer = model.decoder[0]
        for i in range(3):
            terms, gradients = [], []
            for k in range(5):
                z = draws.latents[k, 0, i]
                density = -0.5 * ((world.x[i] - layer(z)) ** 2 / world.noise_var)
                density = (density - 0.5 * math.log(2 * math.pi * world.noise_var))[mask[i]].sum()
                terms.append(float(density.detach() + draws.constant[k, 0, i]))
                weight, bias = torch.autograd.grad(density, [layer.weight, layer.bias])
                gradients.append(torch.cat([weight.flatten(), bias]))
            shares = torch.softmax(torch.tensor(terms, dtype=torch.float64), 0)
            expected = sum(share * gradient for share, gradient in zip(shares, gradients, strict=True))
            torch.testing.assert_close(scores[i], expected, rtol=0, atol=1e-10)


class TestInformation:
    def test_louis_twin(self):
        """Complete less missing information, from explicit scores and Hessians of every draw."""
        world = LinearGaussian.make(n_data=3, n_outputs=4, n_latents=2)
        decoder = bae.nets.mlp(2, [3], 4).double()
        model = bae.Autoencoder(world.model("diagonal").encoder, decoder, bae.likelihoods.Gaussian(0.5)).eval()
        integrated = Integrated.of(model, bae.codes.amortised, 6)
        with bae.random.scope(0):
            draws = integrated.draw(world.batch)
        expected = torch.zeros(2, dtype=torch.float64)
        for i in range(3):
            row = bae.Batch(world.x[i : i + 1])
            log_weights, scores, hessians = [], [], []
            for k in range(6):
                one = type(draws)(draws.latents[k : k + 1, :, i : i + 1], draws.constant[k : k + 1, :, i : i + 1])
                value = lambda theta, one=one, row=row: integrated.log_weights(theta, one, row).sum()  # noqa: E731
                log_weights.append(value(integrated.theta))
                scores.append(torch.func.grad(value)(integrated.theta))
                hessians.append(torch.func.hessian(value)(integrated.theta))
            shares = torch.softmax(torch.stack(log_weights), 0)
            scores, hessians = torch.stack(scores), torch.stack(hessians)
            centred = scores - shares @ scores
            complete = -torch.einsum("k,kpq->pq", shares, hessians)
            missing = torch.einsum("k,kp,kq->pq", shares, centred, centred)
            ess = max(2.0, float(1 / (shares**2).sum()))
            expected = expected + complete - missing * ess / (ess - 1) if i else complete - missing * ess / (ess - 1)
        found = integrated.information(draws, world.batch)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)

    def test_exact_hessian_within_its_error(self, mode):
        """Independent draws of the exact posterior: unbiased, of weights all 1 / K and a covariance with K - 1."""
        exact = -torch.func.hessian(lambda theta: log_likelihood(theta, mode).sum())(theta_of(mode))
        integrated = Integrated.of(mode.model("full"), FULL, 16)
        found: dict[str, list] = {"draw": [], "matched": []}
        for seed in range(16):
            with bae.random.scope(seed):
                for name, values in found.items():
                    values.append(integrated.information(getattr(integrated, name)(mode.batch), mode.batch))
        runs = torch.stack(found["draw"])
        error = runs.std(0) / len(runs) ** 0.5
        assert float(error.max()) < 0.1 * float(exact.abs().max())
        assert bool(((runs.mean(0) - exact).abs() < 4.5 * error + 1e-9).all())
        # pairs of a given covariance err less than independent draws
        assert (torch.stack(found["matched"]) - exact).norm() < 0.6 * (runs - exact).norm()


def brute_force(world, precision):
    """Laplace with the exact Hessian: flat directions by its zero eigenvalues, the orbit's length by quadrature."""
    theta = theta_of(world)
    hessian = -torch.func.hessian(lambda t: log_likelihood(t, world).sum())(theta)
    values = torch.linalg.eigvalsh(hessian + precision * torch.eye(len(theta), dtype=theta.dtype))
    assert abs(float(values[0])) < 1e-4 * float(values[1])
    angles = torch.linspace(0, 2 * math.pi, 20001, dtype=torch.float64)
    cos, sin = angles.cos(), angles.sin()
    turns = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)
    points = (world.weight @ turns).flatten(1)
    length = float((points[1:] - points[:-1]).norm(dim=1).sum())
    log_prior = 0.5 * len(theta) * math.log(precision / 2 / math.pi) - 0.5 * precision * float(theta @ theta)
    value = float(log_likelihood(theta, world).sum()) + log_prior + math.log(2 * length)
    return value + 0.5 * (len(theta) - 1) * math.log(2 * math.pi) - 0.5 * float(values[1:].log().sum())


class TestEvidence:
    def test_dense_is_laplace_with_the_exact_hessian(self, mode):
        found = bae.evaluation.integrated_evidence(mode.model("full"), mode.x, FULL, n_latent_draws=400, seed=0)
        assert found.log_likelihood == pytest.approx(float(mode.log_evidence().sum()), abs=1e-8)
        assert found.standard_error < 1e-6
        assert found.log_evidence == pytest.approx(brute_force(mode, 1.0), abs=0.05)
        assert (found.n_weights, found.n_flat) == (15, 1)
        torch.testing.assert_close(found.ess, torch.full((120,), 400.0, dtype=torch.float64))

    def test_outer_products_and_diagonal_are_those_of_exact_scores(self, mode):
        scores = TestScores.exact(mode)
        theta, eye = theta_of(mode), torch.eye(15, dtype=torch.float64)
        for structure, matrix in (("outer_product", scores.mT @ scores), ("diagonal", torch.diag((scores**2).sum(0)))):
            found = bae.evaluation.integrated_evidence(
                mode.model("full"), mode.x, FULL, structure=structure, n_latent_draws=12, seed=0
            )
            values = torch.linalg.eigvalsh(matrix + eye)
            if structure == "outer_product":  # along the rotation a score is 0, and the prior's 1 is taken out
                assert float(values[0]) == pytest.approx(1, abs=1e-8)
            assert found.log_det == pytest.approx(float(values.log().sum()), abs=1e-7)
            log_prior = -0.5 * 15 * math.log(2 * math.pi) - 0.5 * float(theta @ theta)
            assert found.log_prior == pytest.approx(log_prior, abs=1e-9)

    def test_the_orbit_makes_it_the_true_evidence(self):
        """D = Z = 2 without bias: the likelihood depends on W W', which is Wishart; a grid integrates it."""
        world = LinearGaussian.make(n_data=400, n_outputs=2, n_latents=2, noise_var=0.2, seed=1)
        x = world.x - world.bias
        world = at_mode(torch.cat([x, -x]), 2, noise_var=0.2)  # of mean 0, so that the mode's bias is 0
        decoder = nn.Sequential(nn.Linear(2, 2, bias=False))
        decoder[0].weight.data = world.weight
        full = world.model("full")
        model = bae.Autoencoder(full.encoder, decoder, full.likelihood).eval()
        found = bae.evaluation.integrated_evidence(model, world.x, FULL, n_latent_draws=400, batch_size=200, seed=0)
        target = torch.linalg.cholesky(world.weight @ world.weight.mT)
        axes = [
            torch.linspace(-0.5, 0.5, 60, dtype=torch.float64) + c for c in (target[0, 0], target[1, 0], target[1, 1])
        ]
        axes[0], axes[2] = axes[0][axes[0] > 0], axes[2][axes[2] > 0]
        a, b, c = torch.meshgrid(*axes, indexing="ij")
        square = torch.stack([torch.stack([a * a, a * b], -1), torch.stack([a * b, b * b + c * c], -1)], -2)
        covs = square + 0.2 * torch.eye(2, dtype=torch.float64)
        scatter = world.x.mT @ world.x
        inner = torch.linalg.inv(covs).mul(scatter).sum((-1, -2))
        log_lik = -0.5 * (inner + len(world.x) * (torch.logdet(covs) + 2 * math.log(2 * math.pi)))
        # Wishart of 2 degrees of freedom: density exp(-tr M / 2) / (4 pi sqrt det M), times |dM / dL| = 4 a^2 c
        log_prior = -0.5 * (a * a + b * b + c * c) - math.log(4 * math.pi) - (a * c).log() + (4 * a**2 * c).log()
        step = math.prod(float(axis[1] - axis[0]) for axis in axes)
        exact = float(torch.logsumexp((log_lik + log_prior).flatten(), 0)) + math.log(step)
        assert found.log_evidence == pytest.approx(exact, abs=0.05)
        assert found.n_flat == 1

    def test_tuned_prior_is_the_maximum(self, mode):
        def evidence(**kwargs):
            return bae.evaluation.integrated_evidence(
                mode.model("full"), mode.x, FULL, structure="outer_product", n_latent_draws=12, seed=0, **kwargs
            )

        best = evidence(tunes_prior=True)
        at = best.prior.precision
        assert at * float(theta_of(mode) @ theta_of(mode)) == pytest.approx(best.n_effective, rel=1e-8)
        for factor in (0.9, 1.1):
            assert evidence(weight_prior=bae.IsotropicNormal(at * factor)).log_evidence < best.log_evidence
        again = evidence(weight_prior=best.prior)
        assert again.log_evidence == pytest.approx(best.log_evidence, abs=1e-9)

    def test_batches_do_not_matter(self, mode):
        values = [
            bae.evaluation.integrated_evidence(mode.model("full"), mode.x, FULL, batch_size=size, seed=0).log_evidence
            for size in (7, 120)
        ]
        assert values[0] == pytest.approx(values[1], abs=1e-8)

    def test_the_volume_of_rotations(self):
        """O(3) acting on W: its volume against the product of its tangents' Gram determinant and Vol O(3) = 16 pi^2."""
        weight = torch.randn(6, 3, dtype=torch.float64)
        world = LinearGaussian(weight, torch.zeros(6, dtype=torch.float64), 0.3, torch.randn(4, 6, dtype=torch.float64))
        integrated = Integrated.of(world.model("full"), FULL, 2)
        orbit = _Orbit.of(integrated, torch.ones(24, dtype=torch.float64))
        skew = []
        for j, k in ((0, 1), (0, 2), (1, 2)):
            turn = torch.zeros(3, 3, dtype=torch.float64)
            turn[j, k], turn[k, j] = 1, -1
            skew.append(torch.cat([(weight @ turn).flatten(), torch.zeros(6, dtype=torch.float64)]))
        skew = torch.stack(skew, 1)
        expected = math.log(16 * math.pi**2) + 0.5 * float(torch.logdet(skew.mT @ skew))
        assert orbit.log_volume == pytest.approx(expected, abs=1e-10)
        span = orbit.tangents @ orbit.tangents.mT
        torch.testing.assert_close(span @ skew, skew, rtol=0, atol=1e-10)

    def test_a_column_of_zeros_is_free_of_its_own_rotations(self):
        weight = torch.randn(6, 3, dtype=torch.float64)
        weight[:, 1:] = 0
        world = LinearGaussian(weight, torch.zeros(6, dtype=torch.float64), 0.3, torch.randn(4, 6, dtype=torch.float64))
        integrated = Integrated.of(world.model("full"), FULL, 2)
        orbit = _Orbit.of(integrated, torch.ones(24, dtype=torch.float64))
        # the orbit is the sphere of directions of one column: 4 pi times its length squared
        assert orbit.log_volume == pytest.approx(math.log(4 * math.pi * float((weight**2).sum())), abs=1e-10)
        assert orbit.n_flat == 2

    def test_precisions_by_column_leave_the_signs(self, mode):
        tuned = {"encoder.0.weight": 1.0, "encoder.0.bias": 1.0, "decoder.0.bias": 1.0}
        tuned["decoder.0.weight"] = torch.tensor([1.0, 2.0], dtype=torch.float64).expand(5, 2)
        found = bae.evaluation.integrated_evidence(
            mode.model("full"),
            mode.x,
            FULL,
            structure="outer_product",
            weight_prior=bae.IndependentNormal(tuned),
            seed=0,
        )
        assert (found.n_flat, found.log_orbit) == (0, pytest.approx(2 * math.log(2)))


def picked(seed, sizes=range(1, 9), n_data=200):
    """The code size that the evidence picks for data of 4 dimensions."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    x = torch.randn(n_data, 4, generator=generator, dtype=torch.float64) @ weight.mT
    x = x + torch.randn(n_data, 12, generator=generator, dtype=torch.float64)
    values = {}
    for size in sizes:
        model = at_mode(x, size).model("full")
        found = bae.evaluation.integrated_evidence(
            model, x, FULL, structure="dense", n_latent_draws=64, batch_size=50, seed=seed
        )
        values[size] = found.log_evidence
    return max(values, key=values.__getitem__)


def test_the_evidence_picks_the_true_dimension_beside_its_neighbours():
    assert picked(0, sizes=(3, 4, 5)) == 4


@pytest.mark.slow
def test_the_evidence_picks_the_true_dimension_in_nine_of_ten_seeds():
    assert sum(picked(seed) == 4 for seed in range(10)) >= 9


class TestErrors:
    def test_deterministic_codes(self, model, rows):
        with pytest.raises(bae.errors.UnsupportedError, match="codes with a density"):
            bae.evaluation.integrated_evidence(model, rows, bae.codes.encode, n_latent_draws=1)

    def test_structure(self, mode):
        with pytest.raises(bae.errors.UnsupportedError, match="structure, one of"):
            bae.evaluation.integrated_evidence(mode.model(), mode.x, FULL, structure="round")

    def test_too_many_weights(self):
        model = bae.Autoencoder(bae.nets.mlp(4, [], (2, 2)), bae.nets.mlp(2, [2000], 4), bae.likelihoods.Gaussian(0.3))
        with pytest.raises(bae.errors.UnsupportedError, match="at most 8192 decoder weights"):
            bae.evaluation.integrated_evidence(model, torch.rand(3, 4))

    def test_weights_that_are_no_mode(self, mode):
        world = LinearGaussian(0.05 * mode.weight, mode.bias, 0.1 * mode.noise_var, mode.x)
        with pytest.raises(bae.errors.NonFiniteError, match="a mode"):
            bae.evaluation.integrated_evidence(world.model("full"), mode.x, FULL, seed=0)

    def test_a_prior_that_is_no_normal(self, mode):
        with pytest.raises(bae.errors.UnsupportedError, match="a Normal prior"):
            bae.evaluation.integrated_evidence(mode.model(), mode.x, FULL, weight_prior=object())
