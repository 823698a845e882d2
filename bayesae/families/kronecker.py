"""Normal distributions over the weights of layers that are independent in a Kronecker basis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bayesae.curvature import KroneckerCovariance, RotatedBlock
from bayesae.errors import ParameterError, ShapeError
from bayesae.families.base import Normal, check_sign, standard_normal
from bayesae.functional import check_finite
from bayesae.subset import Subset
from bayesae.types import Params

__all__ = ["KroneckerNormal"]


@dataclass(frozen=True)
class KroneckerNormal(Normal):
    r"""q(theta) = N(mean, Sigma) with one block a layer, diagonal in a Kronecker basis of that layer.

    .. math:: [W, b]_g = \text{mean} + U_g (\sqrt{v_g} \odot \varepsilon) V_g^\top, \qquad
              \Sigma_g = (U_g \otimes V_g) \operatorname{diag}(v_g) (U_g \otimes V_g)^\top

    over groups g of a layer, with :math:`\varepsilon` standard normal. Where the variances are
    :math:`1 / (l^U_c l^V_j + \lambda)` of eigenvalues l this is Kronecker-factored Laplace; any other variances,
    those of an eigenvalue correction among them, are the same family.

    Args:
        mean: Every parameter in its own shape.
        blocks: Layers: orthogonal bases U (g, C, C) and V (g, J, J), and variances v (g, C, J) in units of theta
            squared.
        rest: Variances of parameters in no block, each in its own shape; 0, or left out, where a weight is fixed.
        is_linearised: Whether predictions should linearise the network around the mean.
        info: What the fit had to say, by name.

    ``subset`` is every weight of a block, and those of ``rest`` whose variance is positive.

    Exact when: the posterior is Normal, layers are independent under it, and the covariance of each is diagonal in
        such a basis: that of one linear layer with Gaussian noise is.
    Cost: memory g (C^2 + J^2 + C J) a layer; a draw costs g C J (C + J) multiplications.

    Raises:
        ParameterError: If a parameter is unknown, or in two blocks.
        ShapeError: If a shape does not fit.
        NonFiniteError: If a number is not finite.
        DataError: If a variance is negative.
    """

    mean: Params
    blocks: Sequence[RotatedBlock]
    rest: Params = field(default_factory=dict)
    is_linearised: bool = False
    info: Mapping[str, float] = field(default_factory=dict)
    subset: Subset = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._check_names()
        check_finite(self.mean | self.rest, "means and variances", "Did the training diverge?")
        for block in self.blocks:
            _check_block(block, self.mean)
        for name, value in self.rest.items():
            if value.shape != self.mean[name].shape:
                expected = f"variances of shape {tuple(self.mean[name].shape)} for {name!r}"
                raise ShapeError(expected, f"{tuple(value.shape)}", "Give each in its parameter's shape.")
            check_sign(value, f"variances of {name!r}", allows_zero=True)
        masks = {name: value > 0 for name, value in self.rest.items()}
        for block in self.blocks:
            masks |= {name: torch.ones_like(self.mean[name], dtype=torch.bool) for name in block.layout.names}
        object.__setattr__(self, "subset", Subset({name: masks[name] for name in self.mean if name in masks}))

    def covariance(self) -> KroneckerCovariance:
        """Blocks and independent weights."""
        return KroneckerCovariance(self.blocks, self.rest)

    def _deviation(self, generator: torch.Generator) -> Tensor:
        moved = {name: value.sqrt() * standard_normal(value, generator) for name, value in self.rest.items()}
        for block in self.blocks:
            noise = block.values.sqrt() * standard_normal(block.values, generator)
            moved |= block.layout.split(block.outputs @ noise @ block.inputs.mT)
        return self.subset.ravel(moved or self.mean)

    def _marginal_variance(self) -> Tensor:
        result = dict(self.rest)
        for block in self.blocks:
            result |= block.layout.split(block.outputs**2 @ block.values @ block.inputs.mT**2)
        return self.subset.ravel(result or self.mean)

    def _check_names(self) -> None:
        names = [name for block in self.blocks for name in block.layout.names] + list(self.rest)
        unknown = set(names) - self.mean.keys()
        twice = {name for name in names if names.count(name) > 1}
        if unknown or twice:
            got = f"unknown {sorted(unknown)}, {sorted(twice)} twice"
            raise ParameterError(f"some of {sorted(self.mean)}, each once", got, "One block, or rest, for each.")


def _check_block(block: RotatedBlock, mean: Params) -> None:
    layout = block.layout
    groups, n_out, n_in = layout.groups, layout.n_out, layout.n_in
    expected = {"outputs": (groups, n_out, n_out), "inputs": (groups, n_in, n_in), "values": (groups, n_out, n_in)}
    for part, shape in expected.items():
        tensor = getattr(block, part)
        if tensor.shape != shape:
            raise ShapeError(f"{part} of shape {shape} for {layout.weight!r}", f"{tuple(tensor.shape)}", "See Layout.")
        check_finite({layout.weight: tensor}, f"{part} of the block", "Did the training diverge?")
    if mean[layout.weight].shape != layout.shape:
        got = f"a layout of {tuple(layout.shape)}"
        raise ShapeError(f"{tuple(mean[layout.weight].shape)} for {layout.weight!r}", got, "See Layout.")
    check_sign(block.values, f"variances of {layout.weight!r}", allows_zero=True)
