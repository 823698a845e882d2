"""A posterior around every member of an ensemble: the family, and the method in two phases."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

import bayesae as bae
from bayesae import random, testing
from bayesae.errors import DataError, DivergedError, NotFittedError, ParameterError, UnsupportedError
from bayesae.families import DiagonalNormal, Mixture, Particles
from bayesae.functional import parameters_of
from bayesae.testing import ConjugateRegression
from bayesae.weights import MAP, SWAG, Ensemble, Laplace, LowRank, MeanField, MixtureOf
from tests.conftest import small_model

F64 = {"dtype": torch.float64}


def normal(seed, var=0.3):
    world = ConjugateRegression.make(seed=seed)
    subset = bae.Subset({name: torch.ones(leaf.shape, dtype=torch.bool) for name, leaf in world.mean.items()})
    size, generator = len(subset), torch.Generator().manual_seed(seed)
    return DiagonalNormal(dict(world.mean), var * torch.rand(size, generator=generator, **F64), subset)


def some_particles(n, seed=9):
    generator = torch.Generator().manual_seed(seed)
    return Particles({name: torch.randn(n, *shape, generator=generator, **F64) for name, shape in SHAPES.items()})


SHAPES = {"weight": (2, 3), "bias": (2,)}


class TestFamily:
    def test_draws_have_its_moments(self):
        """The full covariance: of every component, and of their means, within four standard errors."""
        parts, n = [normal(0), normal(1), some_particles(2)], 30_000
        mixture = Mixture(parts)
        ravel = parts[0].subset.ravel
        with random.scope(0):
            draws = ravel(mixture.sample(n))
        mean = sum(ravel(one.mean) for one in parts) / 3
        atoms = ravel(parts[2].atoms)
        within = [parts[0].var.diag(), parts[1].var.diag(), atoms.mT.cov(correction=0)]
        shifts = [ravel(one.mean) - mean for one in parts]
        expected = sum(w + torch.outer(s, s) for w, s in zip(within, shifts, strict=True)) / 3
        squares = (draws - mean)[:, :, None] * (draws - mean)[:, None]
        assert float(((squares.mean(0) - expected) / squares.std(0) * math.sqrt(n)).abs().max()) < 4
        # component by component the means are known: the error is that of stratified draws, and smaller
        assert float(((draws.mean(0) - mean) / draws.std(0) * math.sqrt(n)).abs().max()) < 4
        assert_close(ravel(mixture.mean), mean, rtol=1e-12, atol=1e-12)
        assert_close(ravel(mixture.variances()), expected.diagonal(), rtol=1e-12, atol=1e-12)

    def test_draws_are_balanced_and_follow_the_seed(self):
        mixture = Mixture([some_particles(1, seed) for seed in range(3)])
        for n, counts in ((3, {1}), (7, {2, 3}), (2, {0, 1})):
            with random.scope(4):
                first = mixture.sample(n)["bias"]
            with random.scope(4):
                assert torch.equal(first, mixture.sample(n)["bias"])
            found = [int((first == one.atoms["bias"]).all(1).sum()) for one in mixture.components]
            assert sum(found) == n and set(found) <= counts
        state = torch.get_rng_state()
        mixture.sample(6)
        assert torch.equal(state, torch.get_rng_state())
        chosen = set()
        for _ in range(30):
            chosen.update(place for place, count in enumerate(mixture.counts(1)) if count)
        assert chosen == {0, 1, 2}

    def test_draws_come_component_after_component(self):
        parts = [some_particles(2, seed) for seed in range(3)]
        draws = Mixture(parts).sample(6)["bias"]
        for place, one in enumerate(parts):
            found = draws[2 * place : 2 * place + 2]
            assert sorted(found[:, 0].tolist()) == sorted(one.atoms["bias"][:, 0].tolist())

    def test_a_component_without_a_draw_is_not_asked(self):
        class Asked(Particles):
            def sample(self, n):
                assert n > 0
                return super().sample(n)

        parts = [Asked(some_particles(1, seed).atoms) for seed in range(3)]
        assert len(Mixture(parts).sample(1)["bias"]) == 1

    def test_knows_of_noise_at_any_depth(self):
        one = normal(0)
        noisy = replace(one, noise=bae.likelihoods.Gaussian(0.4).state_dict())
        assert Mixture([one, noisy]).has_own_noise and Mixture([one, Mixture([noisy, noisy])]).has_own_noise
        assert not Mixture([one, one]).has_own_noise and not Mixture([one, Mixture([one])]).has_own_noise

    def test_particles_keep_their_probabilities(self):
        equal, other = (
            Mixture([some_particles(2), some_particles(2, 1)]),
            Mixture([some_particles(2), some_particles(3)]),
        )
        assert (equal.n_atoms, other.n_atoms) == (4, 12)
        draws = other.sample(12)["bias"]
        assert [int((draws == atom).all(1).sum()) for atom in other.components[1].atoms["bias"]] == [2, 2, 2]
        assert Mixture([some_particles(2), normal(0)]).n_atoms is None

    def test_is_linearised_if_all_components_are(self):
        one = normal(0)
        flat = DiagonalNormal(one.mean, one.var, one.subset, is_linearised=True)
        assert Mixture([flat, flat]).is_linearised and not Mixture([flat, one]).is_linearised

    def test_what_is_no_mixture_is_refused(self):
        with pytest.raises(ParameterError, match="at least one component"):
            Mixture([])
        with pytest.raises(ParameterError, match="same parameters"):
            Mixture([normal(0), Particles({"weight": torch.zeros(1, 2, 3)})])
        with pytest.raises(ParameterError, match="2 over 2 choices"):
            Mixture([normal(0), Particles({"weight": torch.zeros(1, 2, 3), "other": torch.zeros(1, 2)})])

        class Bare:
            mean, is_linearised, n_atoms = normal(0).mean, False, None

        with pytest.raises(UnsupportedError, match=r"variances\(\); got Bare"):
            Mixture([Bare()]).variances()


INNER = {
    "laplace": lambda: Laplace("kronecker"),
    "low rank": lambda: Laplace(LowRank(3, n_passes=2)),
    "swag": lambda: SWAG(rank=2, epochs=6, learning_rate=1e-3),
    "ensemble": lambda: Ensemble(2, epochs=1, starts="trained", is_randomised=True),
}


@pytest.mark.parametrize("name", INNER)
def test_it_is_the_second_method_from_every_member(name):
    """A plain loop: the ensemble on its own, then the method from each member in turn."""
    world, base = ConjugateRegression.make(is_orthogonal=False), Ensemble(3, epochs=2, learning_rate=1e-2)
    with random.scope(5):
        state = base.init(dict(world.mean), world.joint)
        for _ in range(2):
            for batch in world.batches(3):
                state, _ = base.update(state, batch, world.joint)
        atoms = base.posterior(state, world.joint).atoms
        starts = [{key: leaf[m] for key, leaf in atoms.items()} for m in range(3)]
        states = [INNER[name]().init(start, world.joint) for start in starts]
        for _ in range(INNER[name]().epochs):
            for batch in world.batches(3):
                states = [INNER[name]().update(one, batch, world.joint)[0] for one in states]
        expected = [INNER[name]().posterior(one, world.joint) for one in states]
    found = testing.run_inference(MixtureOf(base, INNER[name]()), world, n_batches=3, seed=5)
    assert len(found.components) == 3
    assert float(found.sample(6)["weight"].var(0).min()) > 0
    for one, other in zip(found.components, expected, strict=True):
        assert type(one) is type(other)
        with random.scope(6):
            draws = one.sample(3)
        with random.scope(6):
            for key, leaf in other.sample(3).items():
                assert torch.equal(draws[key], leaf)


@pytest.mark.parametrize("name", INNER)
def test_a_run_goes_on_from_any_place_of_either_phase(name):
    world, method = ConjugateRegression.make(), MixtureOf(Ensemble(2, epochs=2), INNER[name]())
    whole = testing.run_inference(method, world, n_batches=2)
    resumed = testing.run_inference(method, world, n_batches=2, packed_after=range(2 * method.epochs + 1))
    for one, other in zip(whole.components, resumed.components, strict=True):
        with random.scope(6):
            draws = one.sample(3)
        with random.scope(6):
            assert all(torch.equal(draws[key], leaf) for key, leaf in other.sample(3).items())


def test_a_killed_fit_goes_on(model, rows, tmp_path):
    method = MixtureOf(Ensemble(2, epochs=2), SWAG(rank=2, epochs=4))
    whole = bae.fit_weights(method, model, rows, seed=0, batch_size=4)

    class KilledError(Exception):
        pass

    class Killing(torch.utils.data.Dataset):
        """Rows that stop coming after so many."""

        n_left = math.inf

        def __len__(self):
            return len(rows)

        def __getitem__(self, place):
            Killing.n_left -= 1
            if Killing.n_left < 0:
                raise KilledError
            return rows[place]

    for n_rows in (14, 31, 10):  # the first phase, the second, and the second again
        Killing.n_left = n_rows
        with pytest.raises(KilledError):
            bae.fit_weights(
                method, model, Killing(), seed=0, batch_size=4, checkpoint=tmp_path / "run", checkpoint_every=1
            )
    Killing.n_left = math.inf
    resumed = bae.fit_weights(
        method, model, Killing(), seed=0, batch_size=4, checkpoint=tmp_path / "run", checkpoint_every=1
    )
    for one, other in zip(whole.components, resumed.components, strict=True):
        assert torch.equal(one.var, other.var) and torch.equal(one.factor, other.factor)


def test_components_of_an_autoencoder_lie_around_their_members(rows):
    model = small_model()
    base = Ensemble(3, epochs=5, learning_rate=1e-2)
    mixture = bae.fit_weights(MixtureOf(base, Laplace(subset=["decoder.**"])), model, rows, seed=2)
    members = bae.fit_weights(base, model, rows, seed=2)
    for m, one in enumerate(mixture.components):
        assert all(torch.equal(one.mean[name], leaf[m]) for name, leaf in members.atoms.items())
        assert float(one.var.min()) > 0
    assert mixture.is_linearised and mixture.n_atoms is None


class Unmoved:
    """A first method that must not be stepped."""

    epochs = 1

    def init(self, params, joint):
        return None

    def update(self, state, batch, joint):
        raise AssertionError("stepped")


@pytest.mark.parametrize("n_data", [5, 90])
def test_what_the_second_method_refuses_is_said_before_the_first(model, rows, n_data):
    for each, error, match in (
        (
            Laplace("low_rank"),
            DataError,
            f"n_data rows in each of the 2 passes of 'low_rank'; got n_data = {n_data} for 9",
        ),
        (SWAG(subset=["nowhere.**"]), ParameterError, "nowhere"),
    ):
        with pytest.raises(error, match=match):
            bae.fit_weights(MixtureOf(Unmoved(), each), model, rows, n_data=n_data, seed=0)
    method = MixtureOf(MAP(), Laplace("kronecker"))
    assert bae.fit_weights(method, model, rows, n_data=n_data).components[0].info["n_data"] == n_data


def test_trying_the_second_method_moves_no_generator(model, rows):
    """The members are those of the ensemble on its own; a sampler's start would take numbers of theirs."""
    base = Ensemble(2, epochs=1)
    for each in (MeanField(epochs=1), Ensemble(2, epochs=1)):
        method = MixtureOf(base, each)
        with random.scope(5):
            found = method.init(parameters_of(model.network), bae.log_joint(model, len(rows))).base
        with random.scope(5):
            expected = base.init(parameters_of(model.network), bae.log_joint(model, len(rows)))
        assert torch.equal(found.theta, expected.theta)


class TestDivergence:
    @staticmethod
    def diverging(each, n_before, world, place=1):
        """Three members after some steps of the second method, one of which is then sent away; and the error."""
        method = MixtureOf(Ensemble(3, epochs=1), each)
        with random.scope(0):
            state = method.init(dict(world.mean), world.joint)
            for _ in range(1 + n_before):
                state, _ = method.update(state, world.batch, world.joint)
            lost = replace(state.each[place], theta=state.each[place].theta * math.nan)
            state = replace(state, each=[lost if i == place else one for i, one in enumerate(state.each)])
            with pytest.raises(DivergedError, match=f"in member {place} of 3") as caught:
                method.update(state, world.batch, world.joint)
            others = [each.update(one, world.batch, world.joint)[0] for one in state.each[:place]]
            others += list(state.each[place + 1 :])
        return caught.value, others

    def test_of_one_member_keeps_what_all_have(self):
        world, each = ConjugateRegression.make(), SWAG(rank=0, epochs=6, burn_in=0.0)
        error, others = self.diverging(each, 4, world)
        kept = pickle.loads(pickle.dumps(error)).posterior
        assert "of which 3 leave a posterior" in str(error) and error.fix.startswith("Lower learning_rate")
        assert [one.info["n_collected"] for one in kept.components] == [5, 4, 4]  # the first had taken the step
        for one, state in zip([kept.components[0], kept.components[2]], others, strict=True):
            assert all(torch.equal(leaf, each.posterior(state, world.joint).mean[k]) for k, leaf in one.mean.items())

    def test_before_anything_is_collected_leaves_nothing(self):
        error, _ = self.diverging(SWAG(rank=0, epochs=6, burn_in=0.0), 1, ConjugateRegression.make(), place=2)
        assert error.posterior.info["n_data"] and len(error.posterior.components) == 2
        error, _ = self.diverging(SWAG(rank=0, epochs=6, burn_in=0.0), 1, ConjugateRegression.make(), place=0)
        assert "of which 0 leave a posterior" in str(error) and error.posterior is None


def test_what_cannot_be_is_refused(model, rows):
    with pytest.raises(UnsupportedError, match="leaves particles; got DiagonalNormal"):
        bae.fit_weights(MixtureOf(Laplace(), Laplace()), model, rows)
    method, joint = MixtureOf(Ensemble(2, epochs=2), Laplace()), bae.log_joint(model, len(rows))
    state = method.init(parameters_of(model.network), joint)
    state, _ = method.update(state, bae.Batch(rows), joint)
    with pytest.raises(NotFittedError, match="2 passes of 9 rows.*got 9 rows"):
        method.posterior(state, joint)
    assert MixtureOf(MAP(), Laplace("low_rank")).epochs == 2
