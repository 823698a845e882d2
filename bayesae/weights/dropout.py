"""MC-dropout as a posterior over weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from bayesae.errors import DataError, DivergedError, ParameterError, UnsupportedError
from bayesae.families import DroppedInputs
from bayesae.families.dropped import input_factors
from bayesae.joint import LogJoint
from bayesae.subset import Subset
from bayesae.types import Batch, Params
from bayesae.weights.base import Info, info_of
from bayesae.weights.flat import Chosen, resume

__all__ = ["Dropout", "DropoutState"]

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass
class DropoutState:
    """The means and their optimiser; both owned by the state and updated in place.

    Args:
        chosen: The weights that are trained.
        theta: Their means, (P,).
        optimiser: Adam.
        axes: Where inputs stand in the masked tensors.
    """

    chosen: Chosen
    theta: Tensor
    optimiser: torch.optim.Adam = field(repr=False)
    axes: Mapping[str, int]


@dataclass(frozen=True)
class Dropout:
    r"""MC-dropout: networks that have lost some inputs of their layers, trained to explain the data like that.

    .. math:: \theta = m \odot \tfrac{b}{1 - p}, \quad b \sim \mathrm{Bernoulli}(1 - p) \text{ one for every input of a
              layer}, \qquad m = \operatorname{argmax}_m \mathbb{E}_b \log p(D, \theta)

    Adam climbs the expectation from the network as it was trained, with fresh masks at every step. The expected log
    prior of the masked weights is the regulariser that makes this variational inference with a family of masked
    weights. A mask belongs to a draw of the weights and not to a row: every draw is one network.

    Args:
        rate: p, share of inputs dropped, in [0, 1).
        layers: Name patterns of the linear layers and convolutions whose inputs are dropped, ``("decoder.**",)`` say.
            All by default: the first one then loses data, and the decoder's first one dimensions of the code, which a
            code of two may not bear. Biases and other layers are trained and have no width.
        epochs: Passes over the data.
        learning_rate: Of Adam.
        n_draws: Masks a step, in one mapped pass.
        subset: The trained weights: a `Subset`, or name patterns as in `Subset.of`; the others keep their values.

    Exact when: no case; with ``rate=0`` it is MAP.
    Biased when: always. The width of q is set by the rate, which no data can shrink: with N growing the posterior
        narrows and this does not.
    Cost: one training with ``n_draws`` networks a step; memory 5 P + ``n_draws`` * 2 P.

    Raises:
        DataError: If rate, step or a count is out of range.
        ParameterError: If a pattern chooses no linear layer and no convolution.
        UnsupportedError: If the network has dropout layers of its own, a chosen convolution is in groups, or a chosen
            layer's weight is not a parameter of its own.
        DivergedError: If the log-joint is no longer finite.

    References:
        | Dropout as a Bayesian Approximation: Representing Model Uncertainty in Deep Learning (Gal, Ghahramani, 2016)
        | Departures: a mask a draw and not a row; weights are raised by 1 / (1 - p), so that their mean is the network.
    """

    rate: float = 0.1
    layers: Sequence[str] = ("**",)
    epochs: int = 20
    learning_rate: float = 1e-3
    n_draws: int = 1
    subset: Subset | Sequence[str] = ("**",)

    def __post_init__(self) -> None:
        if not 0 <= self.rate < 1 or not 0 < self.learning_rate < math.inf:
            got = f"{self.rate} and {self.learning_rate}"
            raise DataError("a rate in [0, 1) and a positive learning_rate", got, "0.1 and 1e-3 are the defaults.")
        if self.epochs < 1 or self.n_draws < 1:
            raise DataError("epochs and n_draws of at least 1", f"{self.epochs} and {self.n_draws}", "20 and 1.")

    def init(self, params: Params, joint: LogJoint) -> DropoutState:
        """At the trained network."""
        chosen = Chosen.of(params, joint, self.subset)
        return self._state(chosen, chosen.start, joint)

    def update(self, state: DropoutState, batch: Batch, joint: LogJoint) -> tuple[DropoutState, Info]:
        """One step of Adam under fresh masks."""
        chosen = state.chosen
        # as many factors as weights, those of weights without a mask 1
        masks = input_factors(self.n_draws, chosen.base, state.axes, self.rate)
        ones = {name: torch.ones_like(leaf).expand(self.n_draws, *leaf.shape) for name, leaf in chosen.base.items()}
        factors = chosen.subset.ravel({name: one * masks.get(name, 1) for name, one in ones.items()})
        values, gradients = chosen.gradient(joint, state.theta.detach() * factors, batch, divides_rows=True)
        if not math.isfinite(value := float(values.mean())):
            fix = "Lower learning_rate or scale the data."
            kept = self.posterior(state, joint) if bool(state.theta.isfinite().all()) else None
            raise DivergedError("a finite log-joint", f"{value}", fix, kept)
        # divided by N, so that the learning rate does not depend on the size of the data set
        state.theta.grad = -(gradients * factors).mean(0) / joint.n_data
        state.optimiser.step()
        return state, Info(value)

    def posterior(self, state: DropoutState, joint: LogJoint) -> DroppedInputs:
        """The means, and which of their inputs are dropped."""
        mean = state.chosen.params(state.theta.detach().clone())
        return DroppedInputs(mean, state.axes, self.rate, info_of(joint) | {"rate": self.rate})

    def pack(self, state: DropoutState) -> dict[str, Any]:
        """The means, and Adam's moments."""
        return {"theta": state.theta, "optimiser": state.optimiser.state_dict()}

    def unpack(self, packed: dict[str, Any], params: Params, joint: LogJoint) -> DropoutState:
        """The means on the network's device, and Adam where it stood."""
        chosen = Chosen.of(params, joint, self.subset)
        state = self._state(chosen, packed["theta"].detach().to(chosen.start, copy=True), joint)
        resume(state.optimiser, packed["optimiser"])
        return state

    def _state(self, chosen: Chosen, theta: Tensor, joint: LogJoint) -> DropoutState:
        leaf = theta.requires_grad_()
        optimiser = torch.optim.Adam([leaf], lr=self.learning_rate)
        return DropoutState(chosen, leaf, optimiser, self._axes(joint.network, chosen.subset))

    def _axes(self, network: nn.Module, subset: Subset) -> dict[str, int]:
        """Where inputs stand in the weights of the chosen layers, as far as those are uncertain."""
        axes = {}
        for name, layer in network.named_modules():
            if isinstance(layer, nn.modules.dropout._DropoutNd) and layer.p > 0:
                fix = "Set its p to 0 (or build the network without), and give rate= and the layers= that follow it."
                raise UnsupportedError("a network without dropout of its own", f"{type(layer).__name__} {name!r}", fix)
            if not isinstance(layer, _PLAIN + _TRANSPOSED) or not any(fnmatchcase(name, one) for one in self.layers):
                continue
            weight = f"{name}.weight" if name else "weight"
            if weight not in subset.masks and weight in dict(network.named_parameters()):
                continue  # held at what it is
            is_plain = getattr(layer, "groups", 1) == 1 and weight in subset.masks and bool(subset.masks[weight].all())
            if not is_plain:
                fix = f"Leave it out of layers={list(self.layers)}."
                expected = "layers without groups, their whole weight a parameter and in the subset"
                raise UnsupportedError(expected, f"{type(layer).__name__} {name!r}", fix)
            axes[weight] = 0 if isinstance(layer, _TRANSPOSED) else 1
        if not axes:
            got = f"none of {list(self.layers)} among the uncertain weights"
            raise ParameterError("layers whose inputs are dropped", got, "Patterns are of names of layers.")
        return axes
