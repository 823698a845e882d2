"""Weighted equally: a few sets of weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bayesae.errors import ShapeError
from bayesae.functional import check_finite, n_draws
from bayesae.types import Params

__all__ = ["Chains", "Particles"]


@dataclass(frozen=True)
class Particles:
    r"""q(theta): M sets of weights, each with probability 1 / M; a point estimate is one particle.

    Exact when: it is the whole posterior, as an ensemble is of itself; sampling n = M of them is then exact too.
    Cost: memory of M networks.

    Args:
        atoms: Every parameter, leaves (M, \*shape).
        is_linearised: False: particles are networks, and are run as such.
        info: What the fit had to say, by name.

    Raises:
        ShapeError: If leaves differ in M, or M is 0.
        NonFiniteError: If a weight is not finite.
    """

    atoms: Params
    is_linearised: bool = False
    info: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        counts = {leaf.shape[0] if leaf.dim() else 0 for leaf in self.atoms.values()}
        if len(counts) != 1 or 0 in counts:
            raise ShapeError("leaves (M, *shape) with one M >= 1", f"M of {sorted(counts)}", "Stack the networks.")
        check_finite(self.atoms, "weights", "Did the training diverge?")

    @property
    def n_atoms(self) -> int | None:
        """M."""
        return n_draws(self.atoms)

    @property
    def mean(self) -> Params:
        """Average weights: the network itself for one particle; of an ensemble no network worth running."""
        return {name: leaf.mean(0) for name, leaf in self.atoms.items()}

    def variances(self) -> Params:
        """Variance over the particles of every parameter, in its own shape; 0 of a point estimate."""
        return {name: leaf.var(0, correction=0) for name, leaf in self.atoms.items()}

    def sample(self, n: int) -> Params:
        r"""Draws with leaves (S = n, \*shape), as balanced as n allows.

        Every particle comes n // M times; the remainder is drawn without replacement. n = M gives each
        particle once, in order, and uses no random number.

        Args:
            n: Number of draws.

        Returns:
            Every parameter; one particle is expanded without a copy.
        """
        n_atoms = n_draws(self.atoms)
        if n_atoms == 1:
            return {name: leaf.expand(n, *leaf.shape[1:]) for name, leaf in self.atoms.items()}
        if n == n_atoms:
            return dict(self.atoms)
        order = torch.arange(n_atoms).repeat(n // n_atoms)
        if n % n_atoms:
            order = torch.cat([order, torch.randperm(n_atoms)[: n % n_atoms]])
        return {name: leaf[order.to(leaf.device)] for name, leaf in self.atoms.items()}


@dataclass(frozen=True)
class Chains(Particles):
    r"""`Particles` that Markov chains have visited, chain after chain: all draws of the first one, then the second.

    Args:
        atoms: Every parameter, leaves (M, \*shape), M = n_chains times the draws that each has kept.
        is_linearised: False, as of all particles.
        info: What the run had to say, by name.
        n_chains: C.
        log_joint: Estimates of log p(D, theta) / T at each kept draw, (C, M / C), nats: minus the energy.

    Raises:
        ShapeError: If M is no multiple of ``n_chains``, or the trace does not fit; else as `Particles`.
    """

    n_chains: int = 1
    log_joint: Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        n = n_draws(self.atoms)
        if self.n_chains < 1 or n % self.n_chains:
            fix = "All chains keep the same number of draws."
            raise ShapeError(f"draws of {self.n_chains} chains, the same number each", f"{n}", fix)
        shape = (self.n_chains, n // self.n_chains)
        if self.log_joint is not None and self.log_joint.shape != shape:
            raise ShapeError(f"a trace {shape}", f"{tuple(self.log_joint.shape)}", "One number a kept draw.")

    def by_chain(self, values: Tensor) -> Tensor:
        r"""Values (M, ...) of all draws as (C, M / C, ...): what convergence is judged on."""
        return values.unflatten(0, (self.n_chains, -1))
