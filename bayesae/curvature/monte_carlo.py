"""The diagonal by random probes, with its own standard error, and the Laplacian Autoencoder paper's approximation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property

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


class MonteCarloDiagonal:
    """An unbiased estimate and how far off it may be.

    Args:
        mean: In the shape of every parameter.
        fourths: Sums of fourth powers of the projected gradients, as a function: a product over data more, and so left
            undone until somebody reads the error.
        n_probes: A datum.
    """

    def __init__(self, mean: Params, fourths: Callable[[], Params], n_probes: int) -> None:
        self.mean, self._fourths, self._n_probes = mean, fourths, n_probes

    @cached_property
    def standard_error(self) -> Params:
        """Of every entry, in the shapes of the parameters; computed when it is read."""
        return {name: (leaf * (2 / 3)).sqrt() / self._n_probes for name, leaf in self._fourths().items()}


@torch.no_grad()
def monte_carlo_diagonal(
    lin: Linearisation,
    x: Tensor,
    output_hessian: HessianFunction,
    *,
    mask: Tensor | None = None,
    n_probes: int = 1,
    generator: torch.Generator | None = None,
    place: tuple[int, slice] | None = None,
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
        place: Of how many rows ``x`` is which part: each row then has the probes that it has among all of them (up to
            256), whoever computes the others. None if ``x`` is all.

    Returns:
        Estimate and standard error.

    Exact when: in expectation; the squared standard error too where J^T u is Normal, as it is nearly with hundreds of
        outputs; with few outputs it is too large, never too small on average.
    Cost: one forward and backward pass for n = 1; the error, when it is read, one product over data more.

    References:
        | Practical Gauss-Newton Optimisation for Deep Learning (Botev, Ritter, Barber, 2017)
        | Hutchinson (1989): probes of signs
    """
    squares: Params = {}
    fourths: Params = {}
    undone: Callable[[int], Params] | None = None
    for part, steps in lin.batches(x):
        if undone is not None:  # only the last piece is kept
            _add(fourths, undone(4))
        outputs = steps[-1].value
        hessian = read_hessian(output_hessian(outputs), outputs, None if mask is None else mask[part])
        among = None if place is None else (place[0], _part_of(place, part))
        undone = _projected(lin, steps, hessian.draw(n_probes, generator, among))
        _add(squares, undone(2))

    @torch.no_grad()
    def all_fourths() -> Params:
        total = dict(fourths)
        if undone is not None:
            _add(total, undone(4))
        return {name: total[name] if name in total else torch.zeros_like(leaf) for name, leaf in lin.params.items()}

    mean = {name: squares[name] if name in squares else torch.zeros_like(leaf) for name, leaf in lin.params.items()}
    mean = mean if n_probes == 1 else {name: leaf / n_probes for name, leaf in mean.items()}
    return MonteCarloDiagonal(mean, all_fourths, n_probes)


def _part_of(place: tuple[int, slice], part: slice) -> slice:
    chosen = range(place[0])[place[1]][part]
    return slice(chosen.start, chosen.stop, chosen.step)


def _add(total: Params, new: Params) -> None:
    for name, leaf in new.items():
        total[name] = total[name] + leaf if name in total else leaf


def _projected(lin: Linearisation, steps: list[Step], probes: Tensor) -> Callable[[int], Params]:
    """Sums over data and probes of a power of (J^T u), as a function of the power."""
    seen: list[tuple[Step, Tensor]] = []
    pull(steps, probes, len(steps) - 1, lambda i, rows: seen.append((steps[i], rows)))

    def sums(power: int) -> Params:
        total: Params = {}
        for step, rows in seen:
            _add(total, {k: v for k, v in step.power_sums(rows, power).items() if k not in lin.shared})
        if lin.shared:
            leaves = gradients(lin, steps[0].value, probes, sorted(lin.shared))
            _add(total, {name: (leaf**power).sum((0, 1)) for name, leaf in leaves.items()})
        return total

    return sums


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
