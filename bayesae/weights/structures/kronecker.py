"""Structures with one Kronecker basis a layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bayesae.curvature import (
    KroneckerCurvature,
    KroneckerFactors,
    Linearisation,
    RotatedBlock,
    eigencorrection,
    kronecker_factors,
)
from bayesae.distributed import add_over_ranks
from bayesae.errors import DataError, UnsupportedError
from bayesae.families import KroneckerNormal
from bayesae.families.base import Normal
from bayesae.functional import check_finite
from bayesae.subset import Subset
from bayesae.types import HessianFunction, Params
from bayesae.weights.structures.base import Eigenvalues, OnePass, Precision

__all__ = ["Eigencorrected", "Kronecker"]


@dataclass(frozen=True)
class Kronecker(OnePass):
    """A Kronecker product a layer, weight and bias joined; the exact diagonal for parameters of other layers."""

    def start(self, linearisation: Linearisation, subset: Subset) -> KroneckerCurvature | None:
        """None: layers are known after the first batch."""
        return None

    def add(
        self,
        sums: KroneckerCurvature | None,
        linearisation: Linearisation,
        subset: Subset,
        x: Tensor,
        hessian: HessianFunction,
        mask: Tensor | None,
    ) -> KroneckerCurvature:
        """The factors of the batch on top.

        Args:
            sums: The factors so far.
            linearisation: The network at its mode.
            subset: The uncertain weights: of each layer all or none.
            x: What the network takes.
            hessian: Of the likelihood.
            mask: True where an output counts, or None.

        Returns:
            Their sum.

        Raises:
            UnsupportedError: If a part of a layer is chosen.
        """
        new = kronecker_factors(linearisation, x, hessian, mask=mask)
        new = KroneckerCurvature(
            {name: _double(factors) for name, factors in new.blocks.items() if _is_chosen(name, factors, subset)},
            {name: value.double() for name, value in new.rest.items() if name in subset.masks},
        )
        return new if sums is None else sums + new

    def over_ranks(self, sums: KroneckerCurvature | None) -> KroneckerCurvature:
        """Factors, their counts and the rest, added; raises `DataError` on a rank that has seen no row."""
        if sums is None:
            raise DataError("a row on every rank", "none on one of them", "Take fewer ranks than rows of a batch.")
        counts = torch.tensor([b.count for b in sums.blocks.values()], dtype=torch.float64)
        factors = [factor for b in sums.blocks.values() for factor in (b.inputs, b.outputs)]
        counts, *added = add_over_ranks([counts.to(_device(sums)), *factors, *sums.rest.values()])
        pairs = zip(sums.blocks.items(), added[0::2], added[1::2], counts.tolist(), strict=False)
        blocks = {name: replace(b, inputs=i, outputs=o, count=n) for (name, b), i, o, n in pairs}
        return KroneckerCurvature(blocks, dict(zip(sums.rest, added[2 * len(blocks) :], strict=True)))

    def finish(self, sums: KroneckerCurvature, subset: Subset, share: float) -> _KroneckerCurvature:
        """Eigenvalues of every product."""
        sums = sums.scaled(share)
        blocks = [_eigenbasis(factors) for factors in sums.blocks.values()]
        return _KroneckerCurvature.of(blocks, sums.rest, subset)


@dataclass(frozen=True)
class Eigencorrected:
    """The Kronecker bases, and in them the exact diagonal, which takes a second pass."""

    @property
    def n_passes(self) -> int:
        """2: bases, then the diagonal in them."""
        return 2

    def start(self, linearisation: Linearisation, subset: Subset) -> KroneckerCurvature | None:
        """None, as for Kronecker factors."""
        return Kronecker().start(linearisation, subset)

    def add(
        self,
        sums: KroneckerCurvature | _Corrected | None,
        linearisation: Linearisation,
        subset: Subset,
        x: Tensor,
        hessian: HessianFunction,
        mask: Tensor | None,
    ) -> KroneckerCurvature | _Corrected:
        """Factors in the first pass, the diagonal in their bases in the second."""
        if not isinstance(sums, _Corrected):
            return Kronecker().add(sums, linearisation, subset, x, hessian, mask)
        dtype = next(iter(linearisation.params.values())).dtype
        own = {
            name: replace(basis, outputs=basis.outputs.to(dtype), inputs=basis.inputs.to(dtype))
            for name, basis in sums.bases.items()
        }
        new = eigencorrection(linearisation, x, hessian, own, mask=mask)
        bases = {name: replace(basis, values=basis.values + new[name]) for name, basis in sums.bases.items()}
        return replace(sums, bases=bases)

    def over_ranks(self, sums: KroneckerCurvature | _Corrected | None) -> KroneckerCurvature | _Corrected:
        """Factors in the first pass; in the second the diagonals alone, the bases being those of all ranks already."""
        if not isinstance(sums, _Corrected):
            return Kronecker().over_ranks(sums)
        added = add_over_ranks([basis.values for basis in sums.bases.values()])
        pairs = zip(sums.bases.items(), added, strict=True)
        return replace(sums, bases={name: replace(basis, values=values) for (name, basis), values in pairs})

    def next_pass(self, sums: KroneckerCurvature, subset: Subset) -> _Corrected:
        """Bases with nothing measured in them yet."""
        bases = {name: _eigenbasis(factors) for name, factors in sums.blocks.items()}
        bases = {name: replace(basis, values=torch.zeros_like(basis.values)) for name, basis in bases.items()}
        return _Corrected(bases, sums.rest)

    def finish(self, sums: _Corrected, subset: Subset, share: float) -> _KroneckerCurvature:
        """The measured diagonals as eigenvalues."""
        bases = [replace(basis, values=(basis.values * share).clamp(min=0)) for basis in sums.bases.values()]
        return _KroneckerCurvature.of(bases, sums.rest, subset)


@dataclass(frozen=True)
class _Corrected:
    """Bases by layer, their values the diagonals summed so far; the other parameters' diagonal of the first pass."""

    bases: dict[str, RotatedBlock]
    rest: Params


@dataclass(frozen=True)
class _KroneckerCurvature(Eigenvalues):
    """Eigenvalues block after block, then the rest.

    Args:
        eigenvalues: (P,).
        places: Which weight, in the order of ``subset``, stands where each eigenvalue does in its layer's matrix, (P,).
        blocks: Bases by layer, their values the eigenvalues.
        rest: Diagonal of parameters in no block.
        subset: The uncertain weights.
    """

    places: Tensor
    blocks: list[RotatedBlock]
    rest: Params
    subset: Subset

    @classmethod
    def of(cls, blocks: list[RotatedBlock], rest: Params, subset: Subset) -> _KroneckerCurvature:
        masks = subset.masks
        where = subset.scatter(torch.arange(len(subset)), {n: torch.full(m.shape, -1) for n, m in masks.items()})
        alone = Subset({name: mask for name, mask in masks.items() if name in rest})
        values = [block.values.flatten() for block in blocks]
        places = [block.layout.join(where).flatten() for block in blocks]
        if rest:
            values.append(alone.ravel(rest))
            places.append(alone.ravel(where))
        if not values:
            return cls(torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.int64), blocks, rest, subset)
        eigenvalues = torch.cat(values)
        return cls(eigenvalues, torch.cat(places).to(eigenvalues.device), blocks, rest, subset)

    def effective(self, precision: Precision) -> Tensor:
        values = super().effective(self._in_basis(precision))
        return torch.empty_like(values).index_copy_(0, self.places, values)

    def log_det(self, precision: Precision) -> float:
        return super().log_det(self._in_basis(precision))

    def posterior(self, mean: Params, precision: Precision, temperature: float, info: Mapping[str, float]) -> Normal:
        var = temperature / (self.eigenvalues + self._in_basis(precision))
        sizes = [block.values.numel() for block in self.blocks]
        *parts, left = var.split([*sizes, len(var) - sum(sizes)])
        pairs = zip(self.blocks, parts, strict=True)
        blocks = [replace(block, values=part.reshape(block.values.shape)) for block, part in pairs]
        alone = Subset({name: mask for name, mask in self.subset.masks.items() if name in self.rest})
        zeros = {name: torch.zeros_like(value) for name, value in self.rest.items()}
        rest = alone.scatter(left, zeros) if zeros else {}
        return KroneckerNormal(mean, blocks, rest, is_linearised=True, info=info)

    def _in_basis(self, precision: Precision) -> Precision:
        """Lambda beside every eigenvalue; raises unless it is one number a block, else the basis is not Lambda's."""
        if not isinstance(precision, Tensor):
            return precision
        ordered, start = precision[self.places], 0
        for block in self.blocks:
            part = ordered[start : (start := start + block.values.numel())]
            if bool((part != part[0]).any()):
                raise UnsupportedError(
                    "one prior precision a layer, weight and bias, for Kronecker factors",
                    f"{float(part.min()):.3g} to {float(part.max()):.3g} in {block.layout.weight!r} and its bias",
                    "Give equal ones, or use structure='diagonal', 'low_rank' or 'dense'.",
                )
        return ordered


def _is_chosen(name: str, factors: KroneckerFactors, subset: Subset) -> bool:
    """Whether a layer is uncertain; raises if it is in part."""
    parts = {parameter: subset.masks.get(parameter) for parameter in factors.layout.names}
    whole = {parameter: mask is not None and bool(mask.all()) for parameter, mask in parts.items()}
    if all(whole.values()):
        return True
    if all(mask is None or not bool(mask.any()) for mask in parts.values()):
        return False
    missing = [parameter for parameter, is_whole in whole.items() if not is_whole]
    raise UnsupportedError(
        "whole layers, weight and bias, for Kronecker factors",
        f"layer {name!r} without all of {', '.join(map(repr, missing))}",
        f"Add it to subset= (and let it require gradients), e.g. subset=({name + '.*'!r},), or use "
        "structure='diagonal', 'low_rank' or 'dense'.",
    )


def _device(sums: KroneckerCurvature) -> torch.device:
    tensors = [*(block.inputs for block in sums.blocks.values()), *sums.rest.values()]
    return tensors[0].device if tensors else torch.device("cpu")


def _double(factors: KroneckerFactors) -> KroneckerFactors:
    return replace(factors, inputs=factors.inputs.double(), outputs=factors.outputs.double())


def _eigenbasis(factors: KroneckerFactors) -> RotatedBlock:
    """Eigenvectors of both factors and eigenvalues (g, C, J) of their product; below 0 they are rounding."""
    parts = {"inputs": factors.inputs, "outputs": factors.outputs}
    check_finite(parts, f"Kronecker factors of {factors.layout.weight!r}", "Did the training diverge?")
    value_out, outputs = torch.linalg.eigh(factors.outputs)
    value_in, inputs = torch.linalg.eigh(factors.inputs)
    values = value_out.clamp(min=0)[:, :, None] * value_in.clamp(min=0)[:, None, :] / factors.count
    return RotatedBlock(factors.layout, outputs, inputs, values)
