"""What methods that move weights share: the chosen weights as one vector, passes, random numbers of each member."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bayesae.distributed import own_members
from bayesae.joint import IndependentNormal, IsotropicNormal, LogJoint
from bayesae.random import derived_seed
from bayesae.subset import Subset
from bayesae.types import Batch, Params

__all__ = ["Chosen", "Members", "progress", "resume"]


@dataclass(frozen=True)
class Chosen:
    """The weights that a method moves, flat; the others stay where training left them.

    Args:
        subset: Which weights these are.
        base: Every parameter in its own shape, owned by nobody else.
    """

    subset: Subset
    base: Params

    @classmethod
    def of(cls, params: Params, joint: LogJoint, subset: Subset | Sequence[str]) -> Chosen:
        """From a method's ``subset`` argument.

        Args:
            params: As `WeightInference.init` is given them; copied.
            joint: Its network gives names and what is trainable.
            subset: A `Subset`, or name patterns as in `Subset.of`.

        Returns:
            The choice.

        Raises:
            ParameterError: If a pattern chooses nothing, or a mask has no parameter.
        """
        chosen = subset if isinstance(subset, Subset) else Subset.of(joint.network, subset)
        chosen.check(params)
        return cls(chosen, {name: leaf.detach().clone() for name, leaf in params.items()})

    @property
    def start(self) -> Tensor:
        """The chosen weights as they were given, (P,), a copy."""
        return self.subset.ravel(self.base).clone()

    def params(self, theta: Tensor) -> Params:
        r"""Every parameter, leaves (..., \*shape), of chosen weights (..., P); views where that is possible."""
        return self.subset.scatter(theta, self.base)

    def fresh(self, joint: LogJoint) -> Tensor:
        """The chosen weights newly initialised by their layers, (P,)."""
        return self.subset.ravel(joint.initialise()).to(self.start)

    def prior_precision(self, joint: LogJoint) -> Tensor | None:
        """Precisions of the chosen weights' prior, float64: () where all share one, else (P,); None unless Normal."""
        if isinstance(joint.prior, IsotropicNormal):
            return torch.tensor(
                joint.prior.precision, dtype=torch.float64, device=next(iter(self.base.values())).device
            )
        if isinstance(joint.prior, IndependentNormal):
            return self.subset.ravel(joint.prior.precisions_of(self.base))
        return None

    def gradient(
        self, joint: LogJoint, theta: Tensor, batch: Batch, *, divides_rows: bool = False
    ) -> tuple[Tensor, Tensor]:
        """`LogJoint.gradient` at chosen weights (S, P): estimates (S,), nats, and gradients (S, P)."""
        return joint.gradient(theta, self.subset, self.base, batch, divides_rows=divides_rows)


class Members:
    """Random numbers of members (chains, draws, networks): each has a generator of its own.

    So a member's numbers depend on the seed and its place alone, whatever the number of members or ranks.

    Args:
        n: Members in all.
        device: Where numbers are drawn.
    """

    def __init__(self, n: int, device: torch.device) -> None:
        self.n, self.own = n, own_members(n)
        # one number of the enclosing scope, so that two methods in one scope differ
        first = int(torch.randint(2**31, ()))
        places = range(n)[self.own]
        self.generators = [torch.Generator(device).manual_seed(derived_seed(first + place)) for place in places]

    def normal(self, size: int, like: Tensor) -> Tensor:
        """Standard normal numbers of this rank's members, (n_own, size), in the dtype of ``like``."""
        numbers = like.new_empty(len(self.generators), size)
        for row, generator in zip(numbers, self.generators, strict=True):
            row.normal_(generator=generator)
        return numbers

    def pack(self) -> list[Tensor]:
        """States for a checkpoint."""
        return [generator.get_state() for generator in self.generators]

    def unpack(self, states: list[Any]) -> None:
        """Back to packed states."""
        for generator, state in zip(self.generators, states, strict=True):
            generator.set_state(state.cpu())


def progress(n_seen: int, epochs: int, joint: LogJoint) -> float:
    """Share of ``epochs`` passes that is done after ``n_seen`` rows, in [0, 1]."""
    return min(n_seen / (epochs * joint.rows_of_pass), 1.0)


def resume(optimiser: torch.optim.Optimizer, packed: dict[str, Any]) -> None:
    """Put an optimiser where it stood: its ``state_dict`` of then, which stays as it is while this one goes on."""
    # a copy: Adam writes into the moments that it is given
    optimiser.load_state_dict(copy.deepcopy(packed))
