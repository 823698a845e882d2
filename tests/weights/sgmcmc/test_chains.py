"""What all samplers share: starts, counts, ranks, divergence, warnings; and each against a loop over single chains."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from torch.testing import assert_close

import bayesae as bae
from bayesae import distributed, errors, random
from bayesae.testing import ConjugateRegression, run_inference
from bayesae.weights import HMC, MALA, SGHMC, SGLD, SGNHT, Cyclical, Decay, RMSProp, ScaleAdaptation, flat, sgmcmc
from tests.weights.sgmcmc import laws


def plain_chain(method, world, batches, chain):
    """One chain as the papers write it, a batch at a time, with the generator of its place."""
    generator = method_members(method).generators[chain]

    def normal():
        return torch.empty_like(theta).normal_(generator=generator)

    def potential(theta, batch):
        weight, bias = theta[: world.mean["weight"].numel()].reshape(1, *world.mean["weight"].shape), theta[None, -1:]
        return -world.joint.estimate({"weight": weight, "bias": bias}, batch)[0]

    theta = laws.centre(world).clone()
    v, xi, g2, kept = torch.zeros_like(theta), 0.0, None, []
    own, n = method.preconditioner, len(batches)
    if isinstance(method, SGNHT):
        xi = method.friction
    tau, mean, square = (torch.ones_like(theta) for _ in range(3))
    scales = torch.ones_like(theta)
    for t, batch in enumerate(batches):
        factor, samples = (1.0, True) if method.schedule is None else method.schedule.at(t, t / n)
        eps = method.step_size * factor
        at = theta.clone().requires_grad_()
        (grad,) = torch.autograd.grad(potential(at, batch), at)
        if own is not None and t / n < method.burn_in:
            if isinstance(own, RMSProp):
                new = (grad / world.joint.n_data) ** 2
                g2 = torch.maximum(new, new.mean()) if g2 is None else own.memory * g2 + (1 - own.memory) * new
                scales = 1 / (own.damping + g2.sqrt())
            else:
                share = 1 / (tau + 1)
                tau = tau - tau * mean**2 / (square + 1e-6) + 1
                mean = mean + (grad - mean) * share
                square = square + (grad**2 - square) * share
                scales = (square + own.damping) ** -0.5
        if t / n >= method.burn_in and samples:
            kept.append(theta)
        if isinstance(method, SGLD):
            theta = theta - eps / 2 * scales * grad + ((eps * scales).sqrt() * normal() if samples else 0)
            continue
        drag = xi if isinstance(method, SGNHT) else method.friction
        variance = 2 * method.friction * eps * scales
        if isinstance(own, ScaleAdaptation) and own.takes_out_noise:
            variance = (variance - (eps * scales) ** 2 * square).clamp(min=0)
        v = (1 - drag) * v - eps * scales * grad + (variance.sqrt() * normal() if samples else 0)
        theta = theta + v
        if isinstance(method, SGNHT):
            xi = xi + float((v**2 / scales).mean()) - eps
    return torch.stack(kept[method.thinning - 1 :: method.thinning])


def method_members(method):
    with random.scope(0):
        return flat.Members(method.n_chains, torch.device("cpu"))


COMMON = {"epochs": 10, "n_chains": 3, "burn_in": 0.3, "thinning": 2}
METHODS = [
    SGLD(1e-3, **COMMON),
    SGLD(1e-3, schedule=Decay(5.0, 0.6), **COMMON),
    SGLD(1e-3, schedule=Cyclical(2, 0.4), **COMMON),
    SGLD(1e-4, preconditioner=RMSProp(0.8, 1e-3), **COMMON),
    SGHMC(1e-4, 0.3, **COMMON),
    SGHMC(1e-4, 0.3, schedule=Cyclical(2, 0.4), **COMMON),
    SGHMC(1e-3, 0.3, preconditioner=ScaleAdaptation(), **COMMON),
    SGHMC(1e-3, 0.3, preconditioner=ScaleAdaptation(takes_out_noise=False), **COMMON),
    SGNHT(1e-4, 0.1, **COMMON),
    SGNHT(1e-4, 0.1, preconditioner=RMSProp(0.8, 1e-2), **COMMON),
]
quiet = pytest.mark.filterwarnings("ignore:.*(step is long|friction is too small|took 0%).*:RuntimeWarning")


@quiet
@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{type(m).__name__} {m.schedule} {m.preconditioner}")
def test_chains_at_once_are_a_loop_over_chains(method):
    world = laws.regression()
    found = laws.flat(run_inference(method, world, n_batches=3))
    batches = list(world.batches(3)) * method.epochs
    for chain in range(method.n_chains):
        assert_close(found[chain], plain_chain(method, world, batches, chain), rtol=1e-10, atol=1e-10)


@quiet
@pytest.mark.parametrize(
    "method",
    [*METHODS[:1], METHODS[6], METHODS[8], HMC(0.05, 3, adapts=False, **COMMON), MALA(1e-3, adapts=False, **COMMON)],
)
@pytest.mark.parametrize("start", ["trained", "fresh"])
def test_a_chain_depends_on_its_place_alone(method, start):
    """So that ranks can share chains, and more of them refine a run."""
    kind, given = type(method), vars(method) | {"start": start, "scale": 0.1}
    world, n = laws.regression(), 1 if isinstance(method, HMC | MALA) else 3
    three, five = (laws.flat(run_inference(kind(**given | {"n_chains": c}), world, n_batches=n)) for c in (3, 5))
    assert_close(three, five[:3], rtol=1e-9, atol=1e-9)
    assert all(float((five[i] - five[j]).abs().min()) > 0 for i in range(5) for j in range(i))


@quiet
@pytest.mark.parametrize("method", [METHODS[0], METHODS[6], METHODS[8], HMC(0.05, 3, adapts=False, **COMMON)])
def test_ranks_share_the_chains(method, monkeypatch):
    """A rank of two in a group of its own: its chains are those of their place."""
    world, n = laws.regression(), 1 if isinstance(method, HMC) else 3
    whole = laws.flat(run_inference(method, world, n_batches=n))
    monkeypatch.setattr(distributed, "n_ranks", lambda: 2)
    for number, places in ((0, slice(0, 1)), (1, slice(1, 3))):
        monkeypatch.setattr(distributed, "rank", lambda number=number: number)
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)  # nobody else's chains come in
        monkeypatch.setattr(sgmcmc.base.MarkovChains, "_check_energy", lambda *_: None)
        own = laws.flat(run_inference(method, world, n_batches=n))
        assert_close(own[places], whole[places], rtol=1e-9, atol=1e-9)


class TestCounts:
    @pytest.mark.parametrize(("burn_in", "thinning"), [(0.0, 1), (0.5, 1), (0.25, 4), (0.9, 3), (0.1, 7)])
    def test_burn_in_and_thinning(self, burn_in, thinning):
        method = SGLD(1e-4, epochs=10, n_chains=2, burn_in=burn_in, thinning=thinning)
        posterior = run_inference(method, laws.regression(), n_batches=3)
        kept = (30 - math.ceil(30 * burn_in)) // thinning
        assert posterior.n_atoms == 2 * kept and posterior.log_joint.shape == (2, kept)

    def test_cycles_keep_their_sampling_share_alone(self):
        method = SGLD(1e-4, schedule=Cyclical(2, 0.5), epochs=10, n_chains=1, burn_in=0.0, thinning=1)
        assert run_inference(method, laws.regression(), n_batches=4).n_atoms == 20

    def test_exploration_has_no_noise(self):
        world = laws.regression()
        method = SGLD(1e-4, schedule=Cyclical(1, 0.5), epochs=10, n_chains=2, burn_in=0.0, thinning=1)
        with random.scope(0):
            state = method.init(dict(world.mean), world.joint)
            for step in range(10):
                state, _info = method.update(state, world.batch, world.joint)
                assert torch.equal(state.theta[0], state.theta[1]) == (step < 5)

    def test_trace_is_the_log_joint_of_its_draw(self):
        world = laws.regression(2.0)
        for method in (SGHMC(1e-4, 0.3, **COMMON), HMC(0.05, 3, adapts=False, **COMMON)):
            posterior = run_inference(method, world)
            expected = world.joint.estimate(posterior.atoms, world.batch)
            assert_close(posterior.log_joint.flatten(), expected)

    def test_nothing_to_keep_is_said_before_the_run(self):
        world = laws.regression()
        method = SGLD(1e-4, epochs=4, burn_in=0.5, thinning=3)
        with random.scope(0):
            state = method.init(dict(world.mean), world.joint)
            with pytest.raises(errors.DataError, match="2 sampling steps of 4 for thinning = 3"):
                method.update(state, world.batch, world.joint)
        never = SGLD(1e-4, schedule=Cyclical(1, 0.9), epochs=4, burn_in=0.5, thinning=1)
        with pytest.raises(errors.DataError, match="0 sampling steps of 4"):
            run_inference(never, world)

    def test_a_run_that_was_left_early_says_so(self):
        world = laws.regression()
        method = SGLD(1e-4, epochs=100)
        with random.scope(0):
            state, _info = method.update(method.init(dict(world.mean), world.joint), world.batch, world.joint)
            with pytest.raises(errors.DataError, match="0 sampling steps of 1"):
                method.posterior(state, world.joint)

    def test_decay_is_the_published_polynomial(self):
        a, b, gamma = 0.3, 20.0, 0.7
        for t in (0, 1, 50):
            assert a * b**-gamma * Decay(b, gamma).at(t, 0.5)[0] == pytest.approx(a * (b + t) ** -gamma)

    def test_cycles_are_the_published_cosine(self):
        n, cycles = 200, 4
        for k in range(1, n + 1):
            published = 0.5 * (math.cos(math.pi * ((k - 1) % (n // cycles)) / (n // cycles)) + 1)
            factor, samples = Cyclical(cycles, 0.9).at(k - 1, (k - 1) / n)
            assert factor == pytest.approx(published, abs=1e-12)
            assert samples == ((k - 1) % 50 >= 45)


class TestStarts:
    def test_scale_is_a_standard_deviation(self):
        world = ConjugateRegression.make(n_data=64, n_in=40, n_out=50)
        method = SGLD(1e-4, n_chains=4, scale=0.3)
        with random.scope(0):
            theta = method.init(dict(world.mean), world.joint).theta
        spread = theta - torch.cat([world.mean["weight"].flatten(), world.mean["bias"]])
        assert float(spread.std()) == pytest.approx(0.3, rel=4 / math.sqrt(2 * spread.numel()))

    def test_trained_is_the_network_and_fresh_is_none(self):
        world = laws.regression()
        with random.scope(0):
            trained = SGLD(1e-4).init(dict(world.mean), world.joint).theta
            fresh = SGLD(1e-4, start="fresh").init(dict(world.mean), world.joint).theta
        assert torch.equal(trained, laws.centre(world).expand(4, -1))
        assert len(fresh.unique(dim=0)) == 4
        assert float(fresh[:, :3].abs().max()) < 1 / math.sqrt(3)  # as nn.Linear draws

    def test_a_subset_moves_and_the_rest_stays(self, model, rows):
        method = SGHMC(1e-6, 0.5, subset=("decoder.**",), **COMMON)
        atoms = bae.fit_weights(method, model, rows, seed=0).atoms
        for name, parameter in model.network.named_parameters():
            moved = bool((atoms[name] != parameter).any())
            assert moved == name.startswith("decoder"), name


class TestDivergence:
    def test_keeps_what_all_chains_had(self):
        world = laws.regression()
        method = SGLD(
            4.3 / float(torch.linalg.eigvalsh(torch.linalg.inv(world.covariance))[-1]),
            **COMMON | {"epochs": 400, "burn_in": 0.01},
        )
        with pytest.raises(
            errors.DivergedError, match=r"log-joint .* in chain \d at step \d+.*Lower step_size"
        ) as caught:
            run_inference(method, world)
        kept = pickle.loads(pickle.dumps(caught.value)).posterior
        assert isinstance(kept, bae.families.Chains)
        assert kept.n_chains == 3 and kept.n_atoms == 3 * kept.log_joint.shape[1] and kept.n_atoms >= 3
        assert f"holds the {kept.n_atoms // 3} draws" in str(caught.value)

    def test_of_a_long_step_at_once(self):
        with pytest.raises(errors.DivergedError, match="holds the 0 draws") as caught:
            run_inference(SGHMC(1.0, **COMMON), laws.regression())
        assert caught.value.posterior is None

    def test_a_start_that_is_not_finite_is_told(self):
        world = laws.regression()
        mean = {name: leaf * math.nan for name, leaf in world.mean.items()}
        for method, n in ((SGLD(1e-4), 0), (HMC(1e-2), 0)):
            with random.scope(0), pytest.raises(errors.DivergedError, match=f"step {n}.*at its start"):
                method.update(method.init(mean, world.joint), world.batch, world.joint)

    def test_fit_weights_lets_it_through(self, model, rows):
        with pytest.raises(errors.DivergedError) as caught:
            bae.fit_weights(SGLD(0.1, epochs=200, burn_in=0.0, thinning=1), model, rows, seed=0)
        posterior = caught.value.posterior
        assert posterior is None or bae.Predictive(model, posterior)(rows).log_likelihood.isfinite().all()

    def test_a_chain_at_rest_does_not_diverge(self):
        """P / 2 above the lowest energy is where a chain lives, whatever the energy there is."""
        world = laws.quadratic(torch.eye(300).double())  # first energy 0
        posterior = run_inference(SGLD(0.05, epochs=400, n_chains=2), world)
        assert float(posterior.log_joint.mean()) == pytest.approx(
            -150 + 300 / 2 * math.log(1e-12 / (2 * math.pi)), rel=0.1
        )


class TestWarnings:
    @pytest.mark.filterwarnings("ignore:.*friction is too small:RuntimeWarning")
    def test_of_a_long_step_estimates_its_error(self):
        """By the exact stationary law of the discretised chain: the gradients' mean square is more than Lambda_ii.

        With momenta half the mean square of successive gradients' differences is taken off, Lambda times that of v.
        """
        world = laws.regression()
        precision = torch.linalg.inv(world.covariance)
        wide = laws.sgld_law(precision, 1e-2)
        joint = laws.sghmc_law(precision, 3e-3, 0.4)
        slow = joint[:4, :4] - joint[4:, 4:] / 2
        for method, law, share in (
            (SGLD(1e-2, epochs=400, n_chains=16, thinning=1), wide, 1e-2 / 4),
            (SGHMC(3e-3, 0.4, epochs=400, n_chains=16, thinning=1), slow, 3e-3 / (2 * 1.6)),
        ):
            with pytest.warns(RuntimeWarning, match=r"step is long: .* off by about \d+%"):
                posterior = run_inference(method, world)
            expected = float((precision @ law @ precision).diagonal().max()) * share
            # its own standard error is 2 % at this length
            assert posterior.info["discretisation_error"] == pytest.approx(expected, rel=0.06)

    def test_of_little_friction_estimates_the_noise(self):
        """Batches of half the rows, of known gradient variance."""
        world = ConjugateRegression.make(n_data=400, n_out=1, is_orthogonal=False)
        parts = list(world.batches(2))
        a, step = 0.02, 2e-5
        chosen = flat.Chosen.of(dict(world.mean), world.joint, ("**",))
        gradients = torch.cat([chosen.gradient(world.joint, chosen.start[None], part)[1] for part in parts])
        expected = float(gradients.var(0, correction=0).max()) * step / (2 * a)
        expected *= 2  # two batches in turn: their differences are those of variance twice as large
        assert expected > 0.1
        method = SGHMC(step, a, epochs=150, n_chains=8, thinning=1)
        with pytest.warns(RuntimeWarning, match="friction is too small"):
            posterior = run_inference(method, world, n_batches=2)
        assert posterior.info["gradient_noise_error"] == pytest.approx(expected, rel=0.3)

    def test_none_of_a_short_step_with_friction(self):
        run_inference(SGHMC(1e-4, 0.5, epochs=100), laws.regression())  # a warning would be an error

    def test_clipping_is_done_and_told(self):
        world = laws.regression()
        method = SGLD(1e-4, clip=0.5, scale=1.0, **COMMON)
        with random.scope(0):
            state = method.init(dict(world.mean), world.joint)
            before = state.theta.clone()
            _values, gradient = state.chosen.gradient(world.joint, before, world.batch)
            assert float(gradient.norm(dim=1).min()) > 0.5
            state.members = method_members(method)
            state, _info = method.update(state, world.batch, world.joint)
        noise = method_members(method).normal(4, before) * 1e-2
        assert_close(state.theta, before + 0.5e-4 * 0.5 * gradient / gradient.norm(dim=1, keepdim=True) + noise)
        with pytest.warns(RuntimeWarning, match="100.0% of the gradients were clipped"):
            assert run_inference(method, world).info["clipped"] == 1

    def test_clipping_that_never_happens_is_silent(self):
        assert run_inference(SGLD(1e-4, clip=1e9, **COMMON), laws.regression()).info["clipped"] == 0


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: SGLD(0.0), "positive, finite step_size"),
        (lambda: SGLD(-1e-4), "positive, finite step_size"),
        (lambda: SGHMC(1e-4, 0.0), "0 < friction <= 1"),
        (lambda: SGLD(1e-4, burn_in=1.0), "burn_in < 1"),
        (lambda: SGLD(1e-4, thinning=0), "counts of at least 1"),
        (lambda: SGLD(1e-4, n_chains=0), "counts of at least 1"),
        (lambda: SGLD(1e-4, scale=-1.0), "scale >= 0"),
        (lambda: SGLD(1e-4, clip=0.0), "positive, finite clip"),
        (lambda: SGLD(1e-4, preconditioner=RMSProp(), burn_in=0.0), "burn-in in which the preconditioner"),
        (lambda: RMSProp(1.0), "memory < 1"),
        (lambda: ScaleAdaptation(damping=0.0), "positive, finite damping"),
        (lambda: Decay(power=0.5), "0.5 < power <= 1"),
        (lambda: Cyclical(0), "n_cycles >= 1"),
        (lambda: Cyclical(exploration=1.0), "exploration < 1"),
    ],
)
def test_bad_numbers_are_refused(build, match):
    with pytest.raises(errors.DataError, match=match):
        build()


@pytest.mark.parametrize(
    "build",
    [
        lambda: SGLD(1e-4, start="warm"),
        lambda: SGLD(1e-4, schedule="cosine"),
        lambda: SGLD(1e-4, preconditioner="rmsprop"),
        lambda: SGNHT(1e-4, schedule=Cyclical()),
    ],
)
def test_what_there_is_no_rule_for_is_refused(build):
    with pytest.raises(errors.UnsupportedError):
        build()


@quiet
def test_a_killed_run_goes_on_to_the_same_bits(model, rows, tmp_path, monkeypatch):
    method = SGHMC(1e-6, 0.5, preconditioner=ScaleAdaptation(), **COMMON)
    whole = bae.fit_weights(method, model, rows, batch_size=4, seed=3)
    calls, update = [], SGHMC.update

    def killed(self, state, batch, joint):
        calls.append(0)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return update(self, state, batch, joint)

    monkeypatch.setattr(SGHMC, "update", killed)
    arguments = {"batch_size": 4, "seed": 3, "checkpoint": tmp_path / "run", "checkpoint_every": 2}
    with pytest.raises(KeyboardInterrupt):
        bae.fit_weights(method, model, rows, **arguments)
    resumed = bae.fit_weights(method, model, rows, **arguments)
    assert len(calls) < 20 + 30
    assert all(torch.equal(whole.atoms[name], resumed.atoms[name]) for name in whole.atoms)
    assert torch.equal(whole.log_joint, resumed.log_joint) and whole.info == resumed.info
