"""One row per weight method and one per code posterior: how to build it, and the world in which it is exact."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

import bayesae as bae
from bayesae.functional import n_draws
from bayesae.testing import ConjugateRegression, LinearGaussian
from bayesae.types import Params


@dataclass(frozen=True)
class WeightCase:
    """One row per weight method.

    Args:
        name: What tests call it.
        build: Makes the method, of the settings that are exact in ``exact_world``.
        exact_world: Where its marginal moments are known; None of a method whose exactness test is its own.
        exact_variance: The variances there.
        tolerance: Of both moments.
        fast: Makes it with settings of a moment, for all other tests; ``build`` if None.
        moves: Whether its draws differ from one another, as all but a point estimate's do.
        fixed: Ends of names of parameters that never differ.
        needs_all_rows: Whether a batch must hold all rows.
    """

    name: str
    build: Callable[[], Any]
    exact_world: Callable[[], ConjugateRegression] | None = None
    exact_variance: Callable[[ConjugateRegression], Params] | None = None
    tolerance: dict[str, float] = field(default_factory=lambda: {"rtol": 1e-10, "atol": 1e-10})
    fast: Callable[[], Any] | None = None
    moves: bool = True
    fixed: tuple[str, ...] = ()
    needs_all_rows: bool = False

    def __str__(self):
        return self.name

    def quick(self) -> Any:
        return (self.fast or self.build)()


def marginal_variance(world: ConjugateRegression) -> Params:
    variance = world.covariance.diagonal()
    n_out = len(world.mean["bias"])
    return {"weight": variance[:-1].expand(n_out, -1), "bias": variance[-1:].expand(n_out)}


def correlated() -> ConjugateRegression:
    return ConjugateRegression.make(is_orthogonal=False)


def by_tensor() -> ConjugateRegression:
    """The same precision, given tensor by tensor."""
    world = correlated()
    prior = bae.IndependentNormal({"weight": 2.0, "bias": torch.full((2,), 2.0)})
    return dataclasses.replace(world, joint=dataclasses.replace(world.joint, prior=prior))


def no_variance(world: ConjugateRegression) -> Params:
    return {name: torch.zeros_like(leaf) for name, leaf in world.mean.items()}


CHAINS = {"epochs": 4, "n_chains": 3, "burn_in": 0.25, "thinning": 1}
CHAIN_CASES = {
    "SGLD": partial(bae.weights.SGLD, 3e-5),
    "SGLD, decaying": partial(bae.weights.SGLD, 3e-5, schedule=bae.weights.Decay(10.0)),
    "SGLD, cyclical": partial(bae.weights.SGLD, 3e-5, schedule=bae.weights.Cyclical(2, 0.25)),
    "SGLD, preconditioned": partial(bae.weights.SGLD, 1e-6, preconditioner=bae.weights.RMSProp()),
    "SGHMC": partial(bae.weights.SGHMC, 1e-5, 0.5),
    "SGHMC, cyclical": partial(bae.weights.SGHMC, 1e-5, 0.5, schedule=bae.weights.Cyclical(2, 0.25)),
    "SGHMC, scale-adapted": partial(bae.weights.SGHMC, 1e-5, 0.5, preconditioner=bae.weights.ScaleAdaptation()),
    "SGNHT": partial(bae.weights.SGNHT, 1e-5, 0.1),
}
LONGER = {"epochs": 30, "n_chains": 3, "burn_in": 0.8, "thinning": 1}  # a step to find

WEIGHT_CASES = [
    WeightCase("MAP", bae.weights.MAP, ConjugateRegression.make, no_variance, moves=False),
    WeightCase("Laplace", lambda: bae.weights.Laplace(tunes_prior=False), ConjugateRegression.make, marginal_variance),
    *(
        WeightCase(
            f"Laplace {structure}",
            lambda structure=structure: bae.weights.Laplace(structure, tunes_prior=False),
            correlated,
            marginal_variance,
        )
        for structure in ("dense", "kronecker", "eigencorrected", "low_rank")
    ),
    WeightCase(
        "Laplace, given by weight",
        lambda: bae.weights.Laplace("dense", tunes_prior=False, prior_groups="weight"),
        by_tensor,
        marginal_variance,
    ),
    # of a log-joint with one mode every member finds it: the docstring's "Biased when", as an equality
    WeightCase(
        "Ensemble",
        lambda: bae.weights.Ensemble(3, epochs=3000, learning_rate=1e-2),
        ConjugateRegression.make,
        no_variance,
        {"rtol": 1e-4, "atol": 1e-4},
        fast=lambda: bae.weights.Ensemble(3, epochs=2),
    ),
    # exact in its precision alone: tests/weights/test_online_laplace.py
    WeightCase("OnlineLaplace", lambda: bae.weights.OnlineLaplace(epochs=2)),
    WeightCase(
        "OnlineLaplace, exact", lambda: bae.weights.OnlineLaplace(epochs=2, curvature="exact", n_weight_draws=2)
    ),
    WeightCase(
        "Ensemble, randomised",
        lambda: bae.weights.Ensemble(3, epochs=2, starts="trained", is_randomised=True, subset=("**",)),
    ),
    WeightCase(
        "mixture of one Laplace",
        lambda: bae.weights.MixtureOf(bae.weights.MAP(), bae.weights.Laplace("dense", tunes_prior=False)),
        correlated,
        marginal_variance,
    ),
    WeightCase(
        "mixture of Laplace, low rank",
        lambda: bae.weights.MixtureOf(bae.weights.Ensemble(2, epochs=2), bae.weights.Laplace("low_rank")),
    ),
    WeightCase(
        "multi-SWAG",
        lambda: bae.weights.MixtureOf(bae.weights.Ensemble(2, epochs=2), bae.weights.SWAG(rank=2, epochs=6)),
    ),
    # nothing dropped is MAP: started at the mode, it stays
    WeightCase(
        "dropout of nothing",
        lambda: bae.weights.Dropout(0.0, epochs=3, learning_rate=1e-12),
        ConjugateRegression.make,
        no_variance,
        moves=False,
    ),
    WeightCase("dropout", lambda: bae.weights.Dropout(0.2, epochs=3, n_draws=2), fixed=("bias",)),
    # full batches at the mode have no noise, and no spread: "Biased when" as an equality
    *(
        WeightCase(
            f"SWAG of rank {rank}",
            lambda rank=rank: bae.weights.SWAG(rank=rank, epochs=6, learning_rate=1e-3),
            ConjugateRegression.make,
            no_variance,
        )
        for rank in (0, 2)
    ),
    *(
        WeightCase(
            f"MeanField, {estimator}",
            lambda estimator=estimator, rank=rank: bae.weights.MeanField(
                2, 1e-2, estimator=estimator, initial_scale=0.05, rank=rank
            ),
        )
        for estimator, rank in (("weights", 0), ("local", 0), ("flipout", 2))
    ),
    # exact in moments over many draws: tests/weights/sgmcmc
    *(WeightCase(name, lambda build=build: build(**CHAINS)) for name, build in CHAIN_CASES.items()),
    WeightCase("HMC", lambda: bae.weights.HMC(1e-3, 5, **LONGER), needs_all_rows=True),
    WeightCase("MALA", lambda: bae.weights.MALA(1e-5, **LONGER), needs_all_rows=True),
]


def posterior_moments(posterior) -> tuple[Params, Params]:
    """Mean and variance of every weight."""
    if posterior.n_atoms is None:
        return posterior.mean, posterior.variances()
    atoms = posterior.sample(posterior.n_atoms)
    assert n_draws(atoms) == posterior.n_atoms
    return posterior.mean, {name: leaf.var(0, correction=0) for name, leaf in atoms.items()}


def correlated_codes() -> LinearGaussian:
    return LinearGaussian.make(correlation=0.8)


@dataclass(frozen=True)
class CodeCase:
    """One row per code posterior: how to build it, and the numbers a code dimension that it wants of an encoder."""

    name: str
    build: Callable[[int], Any]  # from Z
    n_parameters: Callable[[int], int] = lambda n_latents: 2
    exact: Callable[[], LinearGaussian] | None = None  # a world where its log-ratio does not vary
    exact_family: str = "full"

    def __str__(self):
        return self.name

    def model(self, *, n_in: int = 7, n_latents: int = 2, dtype: torch.dtype = torch.float64) -> bae.Autoencoder:
        torch.manual_seed(5)
        size = self.n_parameters(n_latents)
        encoder = bae.nets.mlp(n_in, [6], n_latents if size == 1 else (n_latents, size))
        decoder = bae.nets.mlp(n_latents, [5], n_in)
        return bae.Autoencoder(encoder, decoder, bae.likelihoods.Gaussian(0.3)).to(dtype).eval()


def flowed(flow: Any) -> bae.codes.Flowed:
    return bae.codes.Flowed(bae.codes.amortised, flow)


def autoregressive(n_latents: int) -> bae.codes.AutoregressiveFlow:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(8)
        return bae.codes.AutoregressiveFlow(n_latents, 2, hidden=(5,)).double()


def leapfrog(n_latents: int) -> bae.codes.Leapfrog:
    return bae.codes.Leapfrog(n_latents, 2, temperature=1.5).double()


def mirrored(x: torch.Tensor) -> torch.Tensor:
    return x.flip(-1)


CODE_CASES = [
    CodeCase("encode", lambda n: bae.codes.encode, lambda n: 1),
    CodeCase("encode, of a variational encoder", lambda n: bae.codes.encode),
    CodeCase("amortised", lambda n: bae.codes.amortised),
    CodeCase("amortised, path", lambda n: bae.codes.Amortised(gradient="path")),
    CodeCase("amortised, full", lambda n: bae.codes.Amortised("full"), lambda n: 1 + n, correlated_codes),
    CodeCase("amortised, rank-one", lambda n: bae.codes.Amortised("rank_one"), lambda n: 3),
    CodeCase("amortised, rank-one by layer", lambda n: bae.codes.Amortised("rank_one", layers=(1,) * n), lambda n: 3),
    CodeCase("planar", lambda n: flowed(bae.codes.Planar(2)), lambda n: flowed(bae.codes.Planar(2)).n_parameters(n)),
    CodeCase("radial", lambda n: flowed(bae.codes.Radial(2)), lambda n: flowed(bae.codes.Radial(2)).n_parameters(n)),
    CodeCase("autoregressive", lambda n: flowed(autoregressive(n)), lambda n: 3),
    CodeCase("Hamiltonian", lambda n: bae.codes.Hamiltonian(bae.codes.amortised, leapfrog(n))),
    CodeCase("importance", lambda n: bae.codes.Importance(bae.codes.amortised, 4)),
    CodeCase("refined", lambda n: bae.codes.Refined(n_steps=2)),
    CodeCase("perturbed", lambda n: bae.codes.Perturbed(bae.codes.amortised, 0.1)),
    CodeCase("consistent", lambda n: bae.codes.Consistent(bae.codes.amortised, mirrored, 0.5)),
    CodeCase("Laplace", lambda n: bae.codes.Laplace(2), lambda n: 1, correlated_codes, "location"),
    CodeCase("Laplace, one step", lambda n: bae.codes.Laplace(1, "newton"), lambda n: 2, correlated_codes, "diagonal"),
]
