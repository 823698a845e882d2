"""The diagonal by random probes, with its own standard error, and the Laplacian Autoencoder paper's approximation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from bayesae.curvature.general import gradients
from bayesae.curvature.hessian import HessianFunction, read_hessian
from bayesae.curvature.linear import MatrixStep
from bayesae.curvature.linearisation import Linearisation, pull
from bayesae.curvature.steps import AddStep, AffineStep, FixedLinearStep, ReshapeStep, SlopeStep, Step
from bayesae.errors import UnsupportedError
from bayesae.types import Params

__all__ = ["MonteCarloDiagonal", "approximate_diagonal", "monte_carlo_diagonal"]


@dataclass(frozen=True)
class MonteCarloDiagonal:
    """An unbiased estimate and how far off it may be.

    Args:
        mean: In the shape of every parameter.
        standard_error: Of every entry, the same shapes.
    """

    mean: Params
    standard_error: Params


@torch.no_grad()
def monte_carlo_diagonal(
    lin: Linearisation,
    x: Tensor,
    output_hessian: HessianFunction,
    *,
    mask: Tensor | None = None,
    n_probes: int = 1,
    generator: torch.Generator | None = None,
) -> MonteCarloDiagonal:
    r"""Unbiased estimate of `ggn_diagonal` from random output vectors u with E[u u^T] = H.

    .. math:: \hat d_p = \sum_b \frac1n \sum_{k=1}^n (J_b^\top u_{bk})_p^2, \qquad
              \widehat{\operatorname{se}}_p^2 = \frac{2}{3 n^2} \sum_{b,k} (J_b^\top u_{bk})_p^4

    Args:
        lin: The network at its weights.
        x: (B, \*data).
        output_hessian: As for `ggn_diagonal`.
        mask: As for `ggn_diagonal`.
        n_probes: n a datum.
        generator: Of the probes' signs; torch's own by default.

    Returns:
        Estimate and standard error.

    Exact when: in expectation; the squared standard error too where J^T u is Normal, as it is nearly with hundreds of
        outputs; with few outputs it is too large, never too small on average.
    Cost: one forward and backward pass for n = 1.

    References:
        | Practical Gauss-Newton Optimisation for Deep Learning (Botev, Ritter, Barber, 2017)
        | Hutchinson (1989): probes of signs
    """
    squares: Params = {}
    fourths: Params = {}

    def add(name: str, square: Tensor, fourth: Tensor) -> None:
        squares[name] = squares[name].add_(square) if name in squares else square
        fourths[name] = fourths[name].add_(fourth) if name in fourths else fourth

    for part, steps in lin.batches(x):
        outputs = steps[-1].value
        hessian = read_hessian(output_hessian(outputs), outputs, None if mask is None else mask[part])
        probes = hessian.draw(n_probes, generator)

        def visit(i: int, rows: Tensor, steps: list[Step] = steps) -> None:
            square, fourth = steps[i].power_sums(rows, (2, 4))
            for name in square:
                if name not in lin.shared:
                    add(name, square[name], fourth[name])

        pull(steps, probes, len(steps) - 1, visit)
        if lin.shared:
            for name, leaf in gradients(lin, steps[0].value, probes, sorted(lin.shared)).items():
                add(name, (leaf**2).sum((0, 1)), (leaf**4).sum((0, 1)))
    for name, leaf in lin.params.items():
        if name not in squares:
            add(name, torch.zeros_like(leaf), torch.zeros_like(leaf))
    mean = {name: squares[name] / n_probes if n_probes > 1 else squares[name] for name in lin.params}
    error = {name: fourths[name].mul_(2 / 3 / n_probes**2).sqrt_() for name in lin.params}
    return MonteCarloDiagonal(mean, error)


@torch.no_grad()
def approximate_diagonal(
    lin: Linearisation, x: Tensor, output_hessian: HessianFunction, *, mask: Tensor | None = None
) -> Params:
    r"""The Laplacian Autoencoder paper's *approximation*: only the diagonal of M is carried from layer to layer.

    .. math:: m \leftarrow (W \odot W)^\top m, \qquad m \leftarrow \sigma'^2 \odot m

    It drops every product of two units of a layer: entries can be many times too large or too small (the exact
    diagonal costs little more here). It is here to reproduce that paper.

    Args:
        lin: The network at its weights.
        x: (B, \*data).
        output_hessian: As for `ggn_diagonal`; only its diagonal is read.
        mask: As for `ggn_diagonal`.

    Returns:
        Non-negative, in the shape of every parameter.

    Exact when: the network has one layer with weights, Linear, or any with a diagonal H; or no two units of a layer
        share an output.
    Cost: one forward and backward pass.

    Raises:
        UnsupportedError: If a layer is neither linear, nor a convolution, element-wise, nearest up-sampling, a
            reshape, a sum, nor batch normalisation, or weights are shared.

    References:
        | Laplacian Autoencoders for Learning Stochastic Representations (Miani et al., 2022)
    """
    if lin.shared:
        raise UnsupportedError("weights used once", f"{sorted(lin.shared)} used twice", "Use ggn_diagonal.")
    total: Params = {name: torch.zeros_like(leaf) for name, leaf in lin.params.items()}
    for part, steps in lin.batches(x):
        outputs = steps[-1].value
        hessian = read_hessian(output_hessian(outputs), outputs, None if mask is None else mask[part])
        if hessian.blocks is not None:
            diagonal = (hessian.blocks**2).sum(-1).movedim(-1, hessian.axis)
        else:
            assert hessian.diagonal is not None
            diagonal = hessian.diagonal.expand(outputs.shape)
        if hessian.dense is not None:
            diagonal = diagonal + (hessian.dense**2).sum(1)
        squared = [_squared(step, lin.layers.get(step.name)) for step in steps]

        def visit(i: int, rows: Tensor, squared: Sequence[Step] = squared) -> None:
            step = squared[i]
            sums = step.gradient_sums(rows)
            for name, leaf in sums.items():
                total[name] += leaf[0]

        pull(squared, diagonal[:, None], len(steps) - 1, visit)
    return total


def _squared(step: Step, layer: nn.Module | None) -> Step:
    """The step that carries diagonals as the given one carries rows."""
    if isinstance(step, MatrixStep):
        return replace(step, weight=step.weight**2, inputs=step.inputs**2)
    if isinstance(step, AffineStep):
        return replace(step, slope=step.slope**2, scaled=step.scaled**2)
    if isinstance(step, SlopeStep):
        return replace(step, slope=step.slope**2)
    is_copying = isinstance(layer, (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.PixelShuffle, nn.PixelUnshuffle))
    is_nearest = isinstance(layer, nn.Upsample) and layer.mode.startswith("nearest")
    if isinstance(step, AddStep):
        return replace(step, signs=tuple(sign**2 for sign in step.signs))
    if isinstance(step, ReshapeStep) or not step.sources:
        return step
    if isinstance(step, FixedLinearStep) and (is_copying or is_nearest):
        return step  # coefficients 0 and 1 are their own squares
    raise UnsupportedError(
        "layers that the approximation knows",
        f"{type(step if layer is None else layer).__name__} {step.name!r}",
        "Use ggn_diagonal, which is exact for it.",
    )
