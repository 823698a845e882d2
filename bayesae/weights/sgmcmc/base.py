"""Markov chains over weights: start, burn-in, thinning, divergence and collection, whatever moves them."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from bayesae.distributed import gather_members
from bayesae.errors import DataError, DivergedError, UnsupportedError
from bayesae.families import Chains
from bayesae.joint import LogJoint
from bayesae.subset import Subset
from bayesae.types import Batch, Params
from bayesae.weights.base import Info, info_of
from bayesae.weights.flat import Chosen, Members, progress
from bayesae.weights.sgmcmc.schedules import Phase

__all__ = ["ChainState", "MarkovChains", "check_positive"]

_EXPLODED = 100.0  # times (|first energy| + P): so much above the first energy, a chain has left


@dataclass
class ChainState:
    """This rank's chains; owned by the state, moved in place.

    Args:
        chosen: The weights that move.
        members: A generator for each chain.
        theta: Where the chains are, (C, P).
        moving: What else moves or is summed, by name: momenta, thermostat, preconditioner, statistics.
        draws: Kept positions, (C, P) each.
        trace: Estimates of log p(D, theta) / T there, (C,) each.
        n_steps: Updates.
        n_seen: Rows.
        n_sampled: Updates from which a draw might be kept.
        first: The first estimate of every chain of all ranks.
    """

    chosen: Chosen
    members: Members
    theta: Tensor
    moving: dict[str, Tensor]
    draws: list[Tensor] = field(default_factory=list)
    trace: list[Tensor] = field(default_factory=list)
    n_steps: int = 0
    n_seen: int = 0
    n_sampled: int = 0
    first: list[float] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class MarkovChains(ABC):
    """What all samplers share: C chains in one flat state (C, P), moved by one mapped gradient a step.

    A draw is kept with the estimate of log p(D, theta) / T from the batch whose gradient then moves it.

    Args:
        epochs: Passes over the data, burn-in included.
        n_chains: C. Each chain's random numbers depend on the seed and its place alone; ranks share the chains. (Codes
            that are drawn are drawn for a rank's chains together, so that their noise depends on how many these are.)
        burn_in: Share of the run that is not kept, in [0, 1).
        thinning: One of so many sampling steps is kept.
        start: "trained" starts at the network, "fresh" at new initialisations of its layers.
        scale: Standard deviation of what is added to each start: chains that are to be compared with one another
            should start wider apart than they end.
        subset: Weights that move, a `Subset` or name patterns as in `Subset.of`; the others stay.
    """

    epochs: int = 100
    n_chains: int = 4
    burn_in: float = 0.5
    thinning: int = 10
    start: Literal["trained", "fresh"] = "trained"
    scale: float = 0.0
    subset: Subset | Sequence[str] = ("**",)

    def __post_init__(self) -> None:
        counts = {"epochs": self.epochs, "n_chains": self.n_chains, "thinning": self.thinning}
        if min(counts.values()) < 1:
            got = ", ".join(f"{name} = {n}" for name, n in counts.items())
            raise DataError("counts of at least 1", got, "The defaults are 100, 4 and 10.")
        if not 0 <= self.burn_in < 1:
            fix = "It is a share of the run: of a burn-in of 1 no draw is left."
            raise DataError("0 <= burn_in < 1", repr(self.burn_in), fix)
        if not 0 <= self.scale < math.inf:
            raise DataError("scale >= 0", repr(self.scale), "It is a standard deviation.")
        if self.start not in ("trained", "fresh"):
            raise UnsupportedError("start 'trained' or 'fresh'", repr(self.start), "scale= spreads either.")

    def init(self, params: Params, joint: LogJoint) -> ChainState:
        """Every chain at its start."""
        state = self._empty(params, joint)
        starts = state.theta
        if self.start == "fresh":  # those of all ranks, so that a chain's start depends on its place alone
            every = [state.chosen.fresh(joint) for _ in range(self.n_chains)]
            starts = torch.stack(every)[state.members.own]
        if self.scale:
            starts = starts + self.scale * state.members.normal(starts.shape[1], starts)
        state.theta = starts.clone()
        state.moving = self._moving(state.theta)
        return state

    def update(self, state: ChainState, batch: Batch, joint: LogJoint) -> tuple[ChainState, Info]:
        """One step of every chain; the state is moved in place."""
        if state.n_steps == 0:
            self._check_plan(len(batch.x), joint)
        phase = self._phase(state.n_steps, progress(state.n_seen, self.epochs, joint))
        values, gradient = self._look(state, batch, joint)
        every: list[float] = gather_members(values, self.n_chains).tolist()
        self._check_energy(state, every, joint)
        state.n_sampled += phase.is_sampling
        is_kept = phase.is_sampling and state.n_sampled % self.thinning == 0
        if is_kept:
            state.draws.append(state.theta.clone())
            state.trace.append(values)
        if len(state.theta):
            self._move(state, gradient, phase, is_kept, batch, joint)
        state.n_steps += 1
        state.n_seen += len(batch.x)
        return state, Info(math.fsum(every) / len(every))

    def posterior(self, state: ChainState, joint: LogJoint) -> Chains:
        """Everything that was kept, with a warning of what would bias it; raises `DataError` if nothing was."""
        posterior = self._collected(state, joint)
        if posterior is None:
            got = f"{state.n_sampled} sampling steps of {state.n_steps} for thinning = {self.thinning}"
            raise DataError("at least one draw kept", got, "Run more epochs, or lower thinning or burn_in.")
        numbers, warned = self._judge(state, joint)
        for text in warned:
            warnings.warn(f"{type(self).__name__}: {text}", RuntimeWarning, stacklevel=2)
        return Chains(posterior.atoms, False, {**posterior.info, **numbers}, self.n_chains, posterior.log_joint)

    def pack(self, state: ChainState) -> dict[str, Any]:
        """Positions, momenta and all that moves, generators, and the draws so far."""
        numbers = {name: getattr(state, name) for name in _NUMBERS}
        members = state.members.pack()
        tensors = {"theta": state.theta, "moving": state.moving, "draws": state.draws, "trace": state.trace}
        return {**numbers, **tensors, "members": members, "first": state.first}

    def unpack(self, packed: dict[str, Any], params: Params, joint: LogJoint) -> ChainState:
        """The chains where they stood."""
        state = self._empty(params, joint)
        state.members.unpack(packed["members"])
        device = state.theta.device

        def own(leaf: Tensor) -> Tensor:
            return leaf.detach().to(device, copy=True)

        state.theta = own(packed["theta"])
        state.moving = {name: own(leaf) for name, leaf in packed["moving"].items()}
        state.draws, state.trace = ([own(leaf) for leaf in packed[name]] for name in ("draws", "trace"))
        state.first = list(packed["first"])
        for name in _NUMBERS:
            setattr(state, name, packed[name])
        return state

    def _empty(self, params: Params, joint: LogJoint) -> ChainState:
        chosen = Chosen.of(params, joint, self.subset)
        start = chosen.start
        members = Members(self.n_chains, start.device)
        return ChainState(chosen, members, start.expand(len(members.generators), -1), {})

    def _check_plan(self, batch_size: int, joint: LogJoint) -> None:
        """Raise if batches of this size leave nothing to keep: before the run, not after it."""
        n_steps = self.epochs * math.ceil(joint.rows_of_pass / batch_size)
        n_sampled = 0
        for step in range(math.ceil(self.burn_in * n_steps), n_steps):
            n_sampled += self._phase(step, step / n_steps).is_sampling
            if n_sampled == self.thinning:
                return
        got = f"{n_sampled} sampling steps of {n_steps} for thinning = {self.thinning}"
        raise DataError("at least one draw to keep", got, "Run more epochs, or lower thinning or burn_in.")

    def _check_energy(self, state: ChainState, every: list[float], joint: LogJoint) -> None:
        """Raise, with what was kept, if a chain is no longer finite or its energy has exploded."""
        state.first = state.first or every
        # in units of T, as the estimates are: a chain at rest is P / 2 above the lowest energy
        size = state.theta.shape[1]
        for chain, (value, first) in enumerate(zip(every, state.first, strict=True)):
            if first - _EXPLODED * (abs(first) + size) <= value < math.inf:
                continue
            start = " at its start: was the network trained?" if state.n_steps == 0 else ""
            raise DivergedError(
                f"finite energies, at most {_EXPLODED:.0f} times (|first| + P) above the first",
                f"log-joint {value:.4g} in chain {chain} at step {state.n_steps}, {first:.4g} at the first{start}",
                f"Lower step_size; .posterior holds the {len(state.draws)} draws that each chain had kept.",
                self._collected(state, joint),
            )

    def _collected(self, state: ChainState, joint: LogJoint) -> Chains | None:
        """Kept draws of the chains of all ranks, chain after chain; None without any."""
        if not state.draws:
            return None
        draws = gather_members(torch.stack(state.draws, 1), self.n_chains)
        trace = gather_members(torch.stack(state.trace, 1), self.n_chains)
        info = {**info_of(joint), "n_steps": float(state.n_steps)}
        atoms = state.chosen.params(draws.flatten(0, 1))
        return Chains(atoms, info=info, n_chains=self.n_chains, log_joint=trace)

    def _look(self, state: ChainState, batch: Batch, joint: LogJoint) -> tuple[Tensor, Tensor]:
        """Estimates (C,) and gradients (C, P) of log p(D, theta) / T where the chains are."""
        if not len(state.theta):  # more ranks than chains
            return state.theta.new_zeros(0), state.theta
        return state.chosen.gradient(joint, state.theta, batch)

    @abstractmethod
    def _phase(self, n_steps: int, share: float) -> Phase:
        """Where a step stands in the run."""

    @abstractmethod
    def _moving(self, theta: Tensor) -> dict[str, Tensor]:
        """What moves along with chains that start at ``theta``."""

    @abstractmethod
    def _move(
        self, state: ChainState, gradient: Tensor, phase: Phase, is_kept: bool, batch: Batch, joint: LogJoint
    ) -> None:
        """One step in place; ``gradient`` (C, P) is that of log p(D, theta) / T, and may be written on."""

    @abstractmethod
    def _judge(self, state: ChainState, joint: LogJoint) -> tuple[dict[str, float], list[str]]:
        """Numbers for the posterior's ``info``, the same on every rank, and what to warn of."""


_NUMBERS = ("n_steps", "n_seen", "n_sampled")


def check_positive(**values: float) -> None:
    """Raise `DataError` naming the first value that is not positive and finite."""
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise DataError(f"a positive, finite {name}", repr(value), "See the equations of the method.")
