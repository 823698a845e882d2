"""`Mixture`: several weight posteriors, each with the same probability."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch

from bayesae.errors import ParameterError, UnsupportedError
from bayesae.types import Params, WeightPosterior

__all__ = ["Mixture"]


@runtime_checkable
class _HasVariances(Protocol):
    def variances(self) -> Params: ...


@dataclass(frozen=True)
class Mixture:
    r"""q(theta) = 1 / C sum_c q_c(theta), whatever families the components are of.

    What a Laplace approximation or SWAG around every member of an ensemble leaves: components cover the modes, and each
    has a width. `Predictive` linearises every component around its own mean and adds up by the law of total variance,

    .. math:: \operatorname{Var}[f] = \tfrac1C \sum_c \operatorname{Var}_c[f]
              + \tfrac1C \sum_c \big(\mathbb{E}_c[f] - \mathbb{E}[f]\big)^2.

    Args:
        components: C posteriors over the same parameters. Each keeps the noise that it learned.
        info: What the fit had to say, by name.

    Exact when: it is the whole posterior; moments and draws are those of the mixture.
    Cost: that of the components.

    Raises:
        ParameterError: If there is no component, or they are over other parameters.
    """

    components: Sequence[WeightPosterior]
    info: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = {frozenset(one.mean) for one in self.components}
        if len(names) != 1:
            got = f"{len(self.components)} over {len(names)} choices of parameters"
            raise ParameterError("at least one component, all over the same parameters", got, "Fit them to one model.")

    @property
    def is_linearised(self) -> bool:
        """Whether all components want the network linearised around their means."""
        return all(one.is_linearised for one in self.components)

    @property
    def n_atoms(self) -> int | None:
        """Draws in which every particle of every component has its probability; None if a component is continuous."""
        counts = [one.n_atoms for one in self.components if one.n_atoms is not None]
        return len(counts) * math.lcm(*counts) if len(counts) == len(self.components) else None

    @property
    def has_own_noise(self) -> bool:
        """Whether a component has learned noise, so that draws of the weights do not say what a row's density is."""
        return any(getattr(one, "noise", None) is not None or _has_own_noise(one) for one in self.components)

    @property
    def mean(self) -> Params:
        """Average weights; of components in several modes no network worth running."""
        means = [one.mean for one in self.components]
        return {name: torch.stack([mean[name] for mean in means]).mean(0) for name in means[0]}

    def variances(self) -> Params:
        """Marginal variance of every parameter in its own shape: within components, and between them.

        Returns:
            Variances.

        Raises:
            UnsupportedError: If a component does not know its own.
        """
        means, within = [one.mean for one in self.components], []
        for one in self.components:
            if not isinstance(one, _HasVariances):
                raise UnsupportedError("components with variances()", type(one).__name__, "Draw from it.")
            within.append(one.variances())
        between = {name: torch.stack([mean[name] for mean in means]).var(0, correction=0) for name in means[0]}
        return {name: torch.stack([part[name] for part in within]).mean(0) + between[name] for name in between}

    def counts(self, n: int) -> list[int]:
        """Draws of each component among n, as even as n allows; components with one more are drawn at random."""
        share, rest = divmod(n, len(self.components))
        more = set(torch.randperm(len(self.components))[:rest].tolist()) if rest else set()
        return [share + (place in more) for place in range(len(self.components))]

    def sample(self, n: int) -> Params:
        r"""Draws with leaves (S = n, \*shape), component after component."""
        pairs = zip(self.components, self.counts(n), strict=True)
        parts = [one.sample(count) for one, count in pairs if count]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _has_own_noise(posterior: WeightPosterior) -> bool:
    return isinstance(posterior, Mixture) and posterior.has_own_noise
