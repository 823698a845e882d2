"""Some of the weights, and the columns of the Jacobian that belong to them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bayesae.curvature.linear import MatrixStep
from bayesae.curvature.steps import Step
from bayesae.errors import ParameterError
from bayesae.types import Params

__all__ = ["Selection"]


class Selection:
    """Chosen weights and where each stands in the order of the masks.

    Args:
        masks: Boolean masks in the parameters' shapes, by name.
        params: Of the network that they belong to.
        shared: Names of parameters that no single layer owns.

    Raises:
        ParameterError: If a name is unknown or a mask has another shape.
    """

    def __init__(self, masks: Mapping[str, Tensor], params: Params, shared: frozenset[str]) -> None:
        self.slots: dict[str, Tensor] = {}
        start = 0
        for name, mask in masks.items():
            if name not in params or mask.shape != params[name].shape:
                shapes = {key: tuple(leaf.shape) for key, leaf in params.items()}
                raise ParameterError(f"masks for some of {shapes}", f"{name!r} {tuple(mask.shape)}", "See Subset.of.")
            mask = mask.to(params[name].device)
            slots = torch.full(mask.shape, -1, dtype=torch.long, device=mask.device)
            stop = start + int(mask.sum())
            slots[mask] = torch.arange(start, stop, device=mask.device)
            self.slots[name], start = slots, stop
        self.size = start
        self.shared = [name for name in self.slots if name in shared]
        self._indices: dict[str, tuple[Tensor, Tensor]] = {}
        self._of_step: dict[str, tuple[Tensor, Tensor]] = {}

    def has(self, step: Step) -> bool:
        """Whether a step has chosen weights of its own."""
        return any(name in self.slots and name not in self.shared for name in step.names)

    def of(self, step: MatrixStep) -> tuple[Tensor, Tensor]:
        """Chosen entries (s, 3) of the matrix (g, C, J), and their places, (s,)."""
        if step.name not in self._of_step:
            own = {step.layout.weight: step.weight}
            if step.layout.bias is not None and step.bias is not None:
                own[step.layout.bias] = step.bias
            slots = {
                name: self.slots[name]
                if name in self.slots and name not in self.shared
                else torch.full(leaf.shape, -1, dtype=torch.long, device=leaf.device)
                for name, leaf in own.items()
            }
            matrix = step.layout.join(slots)
            entries = (matrix >= 0).nonzero()
            self._of_step[step.name] = entries, matrix[tuple(entries.T)]
        return self._of_step[step.name]

    def columns(self, step: Step, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Jacobian columns of a step's chosen weights.

        Args:
            step: With chosen weights.
            rows: (B or 1, R, *out).

        Returns:
            (B, R, s), and the weights' places, (s,).
        """
        if isinstance(step, MatrixStep):
            entries, places = self.of(step)
            g, c, j = entries.T
            if step.n_positions == 1:
                return step.by_channel(rows)[..., 0][:, :, g, c] * step.patches()[..., 0][:, None, g, j], places
            return step.matrix_gradients(rows)[:, :, g, c, j], places
        gradients = step.gradients(rows)
        return self._pick({n: leaf for n, leaf in gradients.items() if n in self.slots and n not in self.shared})

    def pick_shared(self, gradients: Params) -> tuple[Tensor, Tensor]:
        """The same for chosen weights that stand in several places, of their gradients (B, R, *shape)."""
        return self._pick({name: gradients[name] for name in self.shared})

    def _pick(self, gradients: Params) -> tuple[Tensor, Tensor]:
        parts, places = [], []
        for name, leaf in gradients.items():
            if name not in self._indices:
                slots = self.slots[name].flatten()
                index = (slots >= 0).nonzero()[:, 0]
                self._indices[name] = index, slots[index]
            index, slots = self._indices[name]
            parts.append(leaf.flatten(2)[:, :, index])
            places.append(slots)
        return torch.cat(parts, -1), torch.cat(places)
