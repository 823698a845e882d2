"""Conformance suites: what every method must do, whoever wrote it."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Collection
from typing import Any

import torch

from bayesae import encoding, random
from bayesae.errors import BayesAEError
from bayesae.testing.worlds import ConjugateRegression
from bayesae.types import Params, WeightPosterior
from bayesae.weights import WeightInference

__all__ = ["check_weight_inference", "run_inference"]


class ConformanceError(BayesAEError, AssertionError):
    """A method breaks its protocol; the message says which clause."""


def run_inference(
    inference: WeightInference,
    world: ConjugateRegression,
    *,
    n_batches: int = 1,
    seed: int = 0,
    packed_after: Collection[int] = (),
) -> WeightPosterior:
    """Step a weight inference over a world, from its exact mean.

    Args:
        inference: The method.
        world: The problem.
        n_batches: Batches an epoch.
        seed: Of everything that the method draws.
        packed_after: Numbers of updates after which the state is packed as for a checkpoint, and unpacked.

    Returns:
        The posterior.
    """

    def kept(state: Any, n_updates: int) -> Any:  # noqa: ANN401 - each method has a state of its own
        if n_updates not in packed_after:
            return state
        skeleton, tensors = encoding.flatten(inference.pack(state))
        own = {name: leaf.clone() for name, leaf in tensors.items()}
        packed = encoding.unflatten(json.loads(json.dumps(skeleton)), own)
        return inference.unpack(packed, dict(world.mean), world.joint)

    with random.scope(seed):
        state, n_updates = kept(inference.init(dict(world.mean), world.joint), 0), 0
        for _ in range(inference.epochs):
            for batch in world.batches(n_batches):
                state, _info = inference.update(state, batch, world.joint)
                n_updates += 1
                state = kept(state, n_updates)
        return inference.posterior(state, world.joint)


def check_weight_inference(
    inference: WeightInference, *, dtype: torch.dtype = torch.float32, n_batches: int = 3
) -> None:
    """Hold a weight inference against its protocol on a conjugate regression.

    Complete and finite draws of the right shape and dtype; the same seed, the same bits; the caller's generator,
    the network and the starting weights untouched; hyper-parameters and posterior pickle; a state that was packed and
    unpacked in the midst of a run, as a checkpoint is, goes on to the same bits.

    Args:
        inference: The method.
        dtype: Of network and data.
        n_batches: Batches an epoch: 1 for a method that needs all rows in each.

    Raises:
        ConformanceError: Naming the clause that is broken.
    """
    world = ConjugateRegression.make(dtype=dtype)
    before = copy.deepcopy(world.joint.network.state_dict())
    start = {name: leaf.clone() for name, leaf in world.mean.items()}
    generator = torch.get_rng_state()
    posterior = run_inference(inference, world, n_batches=n_batches)
    _require(torch.equal(generator, torch.get_rng_state()), "a seeded run leaves the caller's generator", "it moved")
    after = world.joint.network.state_dict()
    _require(all(torch.equal(before[k], after[k]) for k in before), "an untouched network", "changed weights")
    _require(all(torch.equal(start[k], world.mean[k]) for k in start), "untouched starting weights", "changed ones")

    with random.scope(1):
        draws = posterior.sample(3)
    expected = {name: (3, *leaf.shape) for name, leaf in world.mean.items()}
    _require(
        {k: tuple(v.shape) for k, v in draws.items()} == expected,
        f"draws {expected}",
        f"{ {k: tuple(v.shape) for k, v in draws.items()} }",
    )
    _require(
        {k: v.shape for k, v in posterior.mean.items()} == {k: v.shape for k, v in start.items()},
        "a complete mean",
        "another",
    )
    _require(all(v.dtype == dtype for v in draws.values()), f"draws of {dtype}", f"{[v.dtype for v in draws.values()]}")
    _require(all(bool(v.isfinite().all()) for v in draws.values()), "finite draws", "NaN or infinity")

    again = run_inference(pickle.loads(pickle.dumps(inference)), world, n_batches=n_batches)
    with random.scope(1):
        repeated = pickle.loads(pickle.dumps(again)).sample(3)
    _require(_equal(draws, repeated), "the same bits from the same seed, pickled or not", "others")

    n_updates = n_batches * inference.epochs
    resumed = run_inference(inference, world, n_batches=n_batches, packed_after={0, 1, n_updates // 2, n_updates})
    with random.scope(1):
        continued = resumed.sample(3)
    _require(_equal(draws, continued), "the same bits from unpack(pack(state))", "others")


def _equal(a: Params, b: Params) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _require(holds: bool, expected: str, got: str) -> None:
    if not holds:
        raise ConformanceError(expected, got, "See bayesae.weights.WeightInference.")
