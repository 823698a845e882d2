"""`IndependentNormals`: Normals over weights of their own, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

from bayesae import random
from bayesae.functional import stack_draws
from bayesae.types import Params

__all__ = ["IndependentNormals", "NormalPart"]


class NormalPart(Protocol):
    """What a part has to be: a Normal family."""

    @property
    def mean(self) -> Params:
        """Mean of every parameter, in its own shape."""
        ...

    def sample(self, n: int) -> Params:
        r"""Draws of every parameter, leaves (S = n, \*shape)."""
        ...

    def output_variance(self, network: nn.Module, x: Tensor, chunk_size: int | None = None) -> tuple[Tensor, Tensor]:
        r"""Outputs at the mean and their variance in the linearised network, both (B, \*O)."""
        ...


@dataclass(frozen=True)
class IndependentNormals:
    r"""q(theta) = prod_k N(theta_k; mean_k, C_k): parts of the weights, each with a family of its own.

    laplace-torch's Kronecker posterior is one: a matrix Normal for every weight, a dense Normal for every bias.

    .. math:: \operatorname{Var}[f(x)] = \sum_k \operatorname{diag} J_k C_k J_k^\top

    Args:
        parts: Normal families with one and the same mean; no weight is uncertain in two of them.
        is_linearised: Whether predictions should linearise the network around the mean.
        info: What the fit had to say, by name.

    Exact when: the parts are independent under the posterior.
    Cost: of the parts, one after the other.
    """

    parts: Sequence[NormalPart]
    is_linearised: bool = True
    info: Mapping[str, float] = field(default_factory=dict)

    @property
    def mean(self) -> Params:
        """Mean of every parameter, in its own shape."""
        return self.parts[0].mean

    @property
    def n_atoms(self) -> int | None:
        """None: continuous."""
        return None

    def sample(self, n: int) -> Params:
        r"""Draws of every parameter, leaves (S = n, \*shape); the first n of 2n draws are the n draws."""
        # a seed for each draw, so that no part's numbers depend on how many draws another part made before
        draws = []
        for _ in range(n):
            with random.scope(None, next(iter(self.mean.values())).device):
                draws.append(self._one())
        return stack_draws(draws)

    def _one(self) -> Params:
        total = dict(self.mean)
        for part in self.parts:
            total = {name: total[name] + leaf[0] - self.mean[name] for name, leaf in part.sample(1).items()}
        return total

    def output_variance(self, network: nn.Module, x: Tensor, chunk_size: int | None = None) -> tuple[Tensor, Tensor]:
        r"""Outputs at the mean and their exact variance in the linearised network, both (B, \*O)."""
        outputs, variance = self.parts[0].output_variance(network, x, chunk_size)
        for part in self.parts[1:]:
            variance = variance + part.output_variance(network, x, chunk_size)[1]
        return outputs, variance
