"""`MixtureOf`: a posterior around every member of an ensemble."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from bayesae import random
from bayesae.errors import DataError, DivergedError, NotFittedError, UnsupportedError
from bayesae.families import Mixture
from bayesae.joint import LogJoint
from bayesae.types import Batch, Params, WeightPosterior
from bayesae.weights.base import Info, WeightInference, info_of

__all__ = ["MixtureOf", "MixtureState"]


@dataclass(frozen=True)
class MixtureState:
    r"""Which of the two methods is at work, and its state.

    Args:
        base: The state of the first method; None once it is done.
        starts: Its particles, each in the parameters' own shapes; empty before.
        each: States of the second method, one for every particle.
        n_seen: Rows so far.
    """

    base: Any
    starts: Sequence[Params]
    each: Sequence[Any]
    n_seen: int


@dataclass(frozen=True)
class MixtureOf:
    r"""An ensemble, and then another method from every member: mixtures of Laplace, multi-SWAG.

    .. math:: q(\theta) = \tfrac1M \sum_{m=1}^{M} q_m(\theta), \qquad
              q_m \text{ what ``each`` makes of the network } \theta_m \text{ that ``base`` has found}

    ``MixtureOf(Ensemble(5), Laplace())`` is a mixture of five Laplace approximations, multi-SWAG is
    ``MixtureOf(Ensemble(5), SWAG())``, and ``MixtureOf(MAP(), Laplace())`` the Laplace approximation itself. The first
    method has the first ``base.epochs`` passes, of ``joint.rows_of_pass`` rows each, the second the others, in which
    every batch goes to all members.

    Args:
        base: Leaves particles: `Ensemble`, `MAP`, or a sampler.
        each: Starts at the network that it is given.

    Exact when: the posterior is a mixture with equal weights, and ``each`` is exact around every mode.
    Biased when: modes differ in mass, which equal weights pass over.
    Cost: that of ``base``, and M times that of ``each``.

    Raises:
        UnsupportedError: If ``base`` leaves a continuous posterior.
        NotFittedError: If ``base`` has not had all of its passes.
        DivergedError: As ``base`` does; or from ``each``, with the mixture of what members have by then.
        BayesAEError: As either method does; what ``each`` does at its start it does before ``base`` starts.

    References:
        | Bayesian Deep Learning and a Probabilistic Perspective of Generalization (Wilson, Izmailov, 2020): multi-SWAG
        | Mixtures of Laplace Approximations for Improved Post-Hoc Uncertainty in Deep Learning (Eschenhagen, Daxberger,
          Hennig, Kristiadi, 2021)
    """

    base: WeightInference
    each: WeightInference

    @property
    def epochs(self) -> int:
        """Passes of both, one after the other."""
        return self.base.epochs + self.each.epochs

    def init(self, params: Params, joint: LogJoint) -> MixtureState:
        """The first method's start; the second one's is tried too, to learn now what it refuses."""
        with random.scope(0, next(iter(params.values())).device):  # the first draws as it does on its own
            self._begin(params, joint)
        return MixtureState(self.base.init(params, joint), (), (), 0)

    def update(self, state: MixtureState, batch: Batch, joint: LogJoint) -> tuple[MixtureState, Info]:
        """One update of the method whose turn it is."""
        state = self._at_phase(state, joint)
        n_seen = state.n_seen + len(batch.x)
        if state.base is not None:
            base, info = self.base.update(state.base, batch, joint)
            return replace(state, base=base, n_seen=n_seen), info
        updated = self._updated(state.each, batch, joint)
        info = Info(sum(info.log_joint for _, info in updated) / len(updated))
        return replace(state, each=[one for one, _ in updated], n_seen=n_seen), info

    def posterior(self, state: MixtureState, joint: LogJoint) -> Mixture:
        """One component a particle of the first method."""
        state = self._at_phase(state, joint)
        if state.base is not None:
            raise NotFittedError(
                f"{self.base.epochs} passes of {joint.rows_of_pass} rows, and those of the second method",
                f"{state.n_seen} rows in all",
                "Is n_pass the number of rows of one pass?",
            )
        return Mixture([self.each.posterior(one, joint) for one in state.each], info_of(joint))

    def pack(self, state: MixtureState) -> dict[str, Any]:
        """What the method whose turn it is packs, and the first one's particles."""
        return {
            "base": None if state.base is None else [self.base.pack(state.base)],
            "starts": list(state.starts),
            "each": [self.each.pack(one) for one in state.each],
            "n_seen": state.n_seen,
        }

    def unpack(self, packed: dict[str, Any], params: Params, joint: LogJoint) -> MixtureState:
        """The state again."""
        base = None if packed["base"] is None else self.base.unpack(packed["base"][0], params, joint)
        starts = [{name: leaf.to(params[name], copy=True) for name, leaf in one.items()} for one in packed["starts"]]
        pairs = zip(packed["each"], starts, strict=True)
        return MixtureState(base, starts, [self.each.unpack(own, one, joint) for own, one in pairs], packed["n_seen"])

    def _updated(self, each: Sequence[Any], batch: Batch, joint: LogJoint) -> list[tuple[Any, Info]]:
        """One update of the second method for every member; if one diverges, all keep what they have."""
        updated = []
        for place, one in enumerate(each):
            try:
                updated.append(self.each.update(one, batch, joint))
            except DivergedError as error:
                kept = [self._found(new, joint) for new, _ in updated] + [error.posterior]
                kept += [self._found(old, joint) for old in each[place + 1 :]]
                parts = [posterior for posterior in kept if isinstance(posterior, WeightPosterior)]
                got = f"{error.got}, in member {place} of {len(each)}, of which {len(parts)} leave a posterior"
                posterior = Mixture(parts, info_of(joint)) if parts else None
                raise DivergedError(error.expected, got, error.fix, posterior) from error
        return updated

    def _found(self, state: Any, joint: LogJoint) -> WeightPosterior | None:  # noqa: ANN401
        """What one member has come to; None if that is nothing yet."""
        try:
            return self.each.posterior(state, joint)
        except (NotFittedError, DataError):
            return None

    def _at_phase(self, state: MixtureState, joint: LogJoint) -> MixtureState:
        """The state that the next row belongs to."""
        if state.base is None or state.n_seen < self.base.epochs * joint.rows_of_pass:
            return state
        found = self.base.posterior(state.base, joint)
        if found.n_atoms is None:
            expected = "a first method that leaves particles"
            raise UnsupportedError(expected, type(found).__name__, "Ensemble(), say; the second may be any.")
        atoms = found.sample(found.n_atoms)
        starts = [{name: leaf[place].clone() for name, leaf in atoms.items()} for place in range(found.n_atoms)]
        return replace(state, base=None, starts=starts, each=[self._begin(one, joint) for one in starts])

    def _begin(self, params: Params, joint: LogJoint) -> Any:  # noqa: ANN401 - each method has a state of its own
        """The second method's start at a network; states may keep and change what they are given."""
        return self.each.init({name: leaf.clone() for name, leaf in params.items()}, joint)
