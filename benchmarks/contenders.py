"""What a contender is, and ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bayesae import curvature
from bayesae.types import Params
from benchmarks.nets import Problem

__all__ = ["OURS", "Answer", "Contender", "Run", "as_is", "kronecker_answer", "named", "totals"]

Run = Callable[[Tensor], Any]
"""From a batch to whatever the contender returns; this is what is timed."""
Answer = dict[str, Tensor]
"""The same in the form in which contenders are compared, entry by entry."""


@dataclass(frozen=True)
class Contender:
    """Somebody who answers a question.

    Args:
        name: Of the package, and of its setting where it has several.
        prepare: From a problem and a setting to a run; imports the package.
        answer: From what a run returned to an answer.
        settings: To choose the fastest from, the unit is the contender's own.
        images: Rows of the batch that it gets in a quick and in a full run, since some take minutes for all; None for
            the whole batch. Times are scaled to the whole batch.
        imports: Modules whose memory is not counted.
        is_in_quick: Whether quick runs have it.
        is_held_to_ratio: Whether the question's target ratio is one to this contender.
    """

    name: str
    prepare: Callable[[Problem, int], Run]
    answer: Callable[[Problem, Any], Answer]
    settings: Sequence[int] = (0,)
    images: tuple[int | None, int | None] = (None, None)
    imports: Sequence[str] = ()
    is_in_quick: bool = True
    is_held_to_ratio: bool = True


def kronecker_answer(factors: dict[str, tuple[Tensor, Tensor]]) -> Answer:
    """Factors of a Kronecker product, less the scale that may move between them, and that scale.

    Args:
        factors: (C, C) and (J, J) by the name of the weight.

    Returns:
        Three entries a weight.
    """
    answer: Answer = {}
    for name, (outputs, inputs) in factors.items():
        scales = outputs.trace(), inputs.trace()
        answer[f"{name}, outputs"] = outputs / scales[0]
        answer[f"{name}, inputs"] = inputs / scales[1]
        answer[f"{name}, scale"] = scales[0] * scales[1]
    return answer


def _diagonal(problem: Problem, _: int) -> Run:
    linear = curvature.Linearisation(problem.network)
    return lambda x: curvature.ggn_diagonal(linear, x, problem.likelihood.output_hessian)


def _kronecker(problem: Problem, _: int) -> Run:
    linear = curvature.Linearisation(problem.network)
    return lambda x: curvature.kronecker_factors(linear, x, problem.likelihood.output_hessian)


def _kronecker_answer(problem: Problem, found: curvature.KroneckerCurvature) -> Answer:
    factors = {}
    for block in found.blocks.values():
        n_in = block.layout.n_in - (block.layout.bias is not None)  # the peers keep weight and bias apart
        factors[block.layout.weight] = block.outputs[0], block.inputs[0, :n_in, :n_in] / block.count
    return kronecker_answer(factors)


def _monte_carlo(problem: Problem, _: int) -> Run:
    linear = curvature.Linearisation(problem.network)
    generator = torch.Generator(problem.batches.device).manual_seed(0)
    hessian = problem.likelihood.output_hessian
    return lambda x: curvature.monte_carlo_diagonal(linear, x, hessian, generator=generator).mean


def _diagonal_variance(problem: Problem, _: int) -> Run:
    linear = curvature.Linearisation(problem.network)
    covariance = curvature.DiagonalCovariance(problem.variances)
    return lambda x: curvature.output_variance(linear, x, covariance)[1]


def _kronecker_variance(problem: Problem, _: int) -> Run:
    linear, posterior = curvature.Linearisation(problem.network), problem.kronecker
    blocks = []
    for name, (outputs, inputs) in posterior.bases.items():
        bias = name.replace("weight", "bias")
        values = torch.cat([torch.outer(*posterior.values[name]), posterior.biases[bias][:, None]], 1)
        basis = torch.block_diag(inputs, inputs.new_ones(1, 1))  # the peers keep weight and bias apart
        layout = curvature.Layout(name, bias, problem.params[name].shape)
        blocks.append(curvature.RotatedBlock(layout, outputs[None], basis[None], 1 / (values[None] + 1)))
    covariance = curvature.KroneckerCovariance(blocks)
    return lambda x: curvature.output_variance(linear, x, covariance)[1]


def _block(n_chosen: int) -> Callable[[Problem, int], Run]:
    def prepare(problem: Problem, _: int) -> Run:
        linear = curvature.Linearisation(problem.network)
        n_weights = sum(leaf.numel() for leaf in problem.params.values())
        is_chosen = torch.zeros(n_weights, dtype=torch.bool, device=problem.batches.device)
        is_chosen[problem.chosen(n_chosen)] = True
        masks = problem.by_name(is_chosen)
        return lambda x: curvature.ggn_block(linear, x, problem.likelihood.output_hessian, masks)

    return prepare


def as_is(_: Problem, found: Params) -> Answer:
    """Parameters are an answer."""
    return found


def totals(_: Problem, found: Params) -> Answer:
    """Sums over each parameter, whose noise is small where that of the entries is not."""
    return {name: value.sum() for name, value in found.items()}


def named(name: str) -> Callable[[Problem, Tensor], Answer]:
    """A tensor whose first axis is images, or a matrix, as an answer."""
    return lambda _, found: {name: found.flatten(1)}


OURS = {
    "diagonal": Contender("bayesae", _diagonal, as_is),
    "kronecker": Contender("bayesae", _kronecker, _kronecker_answer),
    "monte carlo": Contender("bayesae", _monte_carlo, totals),
    "diagonal variance": Contender("bayesae", _diagonal_variance, named("variance")),
    "kronecker variance": Contender("bayesae", _kronecker_variance, named("variance")),
    "block": Contender("bayesae", _block(1000), named("block")),
}
