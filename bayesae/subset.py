"""`Subset`: which weights are uncertain, as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property

import torch
from torch import Tensor, nn

from bayesae.errors import ParameterError, ShapeError
from bayesae.types import Params

__all__ = ["Subset"]


@dataclass(frozen=True)
class Subset:
    """A choice of weights among the parameters of a module.

    Args:
        masks: A boolean mask in the parameter's own shape, by name; parameters that are not named are not
            chosen. Their order is the order of `ravel`.
    """

    masks: Mapping[str, Tensor]

    @classmethod
    def of(cls, module: nn.Module, patterns: Sequence[str] = ("**",)) -> Subset:
        """Choose the trainable parameters whose name matches one of the patterns.

        Args:
            module: Gives names and ``requires_grad``.
            patterns: Shell patterns on dotted names: ``"decoder.**"`` is everything below the decoder,
                ``"*.bias"`` every bias.

        Returns:
            The subset.

        Raises:
            ParameterError: If a pattern chooses nothing.
        """
        trainable = [name for name, value in module.named_parameters() if value.requires_grad]
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in trainable):
                raise ParameterError(
                    "patterns that choose a trainable parameter", f"{pattern!r}", f"Names are {trainable}."
                )
        chosen = [name for name in trainable if any(fnmatchcase(name, pattern) for pattern in patterns)]
        shapes = dict(module.named_parameters())
        return cls({name: torch.ones(shapes[name].shape, dtype=torch.bool) for name in chosen})

    def check(self, params: Params) -> None:
        """Raise unless every mask belongs to a parameter and has its shape.

        Args:
            params: Parameters in their own shapes.

        Raises:
            ParameterError: If a name is unknown.
            ShapeError: If a mask has another shape.
        """
        unknown = self.masks.keys() - params.keys()
        if unknown:
            raise ParameterError(
                f"masks for some of {sorted(params)}", f"unknown names {sorted(unknown)}", "See Subset.of."
            )
        for name, mask in self.masks.items():
            if mask.shape != params[name].shape or mask.dtype != torch.bool:
                raise ShapeError(
                    f"a boolean mask of shape {tuple(params[name].shape)} for {name!r}",
                    f"{mask.dtype} of shape {tuple(mask.shape)}",
                    "Use Subset.of for whole tensors.",
                )

    @cached_property
    def _sizes(self) -> dict[str, int]:
        """Chosen weights of each tensor: counted once, since a step of training asks several times."""
        return {name: int(mask.sum()) for name, mask in self.masks.items()}

    def __len__(self) -> int:
        """Number P of chosen weights."""
        return sum(self._sizes.values())

    def take(self, places: Tensor) -> Subset:
        """Some of the chosen weights.

        Args:
            places: Where they stand in the order of `ravel`, each once, in any order, (n,).

        Returns:
            A subset of n weights in the order of this one; tensors without any are left out.

        Raises:
            ParameterError: If a place is outside 0 to P - 1.
        """
        is_taken = torch.zeros(len(self), dtype=torch.bool)
        places = places.cpu()
        if len(places) and not 0 <= int(places.min()) <= int(places.max()) < len(self):
            got = f"{int(places.min())} to {int(places.max())}"
            raise ParameterError(f"places of 0 to {len(self) - 1}", got, "They are those of ravel.")
        is_taken[places] = True
        none = {name: torch.zeros(mask.shape, dtype=torch.bool) for name, mask in self.masks.items()}
        masks = self.scatter(is_taken, none)
        return Subset({name: mask for name, mask in masks.items() if bool(mask.any())})

    def ravel(self, params: Params) -> Tensor:
        r"""The chosen weights as one vector, leaves (..., \*shape) to (..., P)."""
        parts = [_chosen(params[name], mask, self._sizes[name]) for name, mask in self.masks.items()]
        return torch.cat(parts, -1) if parts else next(iter(params.values())).new_zeros(0)

    def scatter(self, values: Tensor, onto: Params) -> Params:
        r"""Put a vector of chosen weights back among all parameters; the inverse of `ravel`.

        Args:
            values: (..., P), with any leading draw axes.
            onto: Every parameter in its own shape: what the other weights keep.

        Returns:
            Every parameter with leaves (..., \*shape). Leaves without a chosen weight are expanded, not copied.

        Raises:
            ShapeError: If the last axis of ``values`` is not P.
        """
        if values.shape[-1] != len(self):
            raise ShapeError(f"{len(self)} values", f"{values.shape[-1]}", "Ravel with the same subset.")
        lead, start = values.shape[:-1], 0
        full = {name: leaf.expand(*lead, *leaf.shape) for name, leaf in onto.items()}
        for name, mask in self.masks.items():
            stop = start + self._sizes[name]
            if stop - start == mask.numel():
                full[name] = values[..., start:stop].reshape(*lead, *mask.shape).to(full[name])
            else:
                leaf = full[name].clone()
                leaf[..., mask.to(leaf.device)] = values[..., start:stop]
                full[name] = leaf
            start = stop
        return full


def _chosen(leaf: Tensor, mask: Tensor, size: int) -> Tensor:
    if size == mask.numel():  # the usual case, without an index of every entry
        return leaf.flatten(leaf.dim() - mask.dim()) if mask.dim() else leaf[..., None]
    return leaf[..., mask.to(leaf.device)]
