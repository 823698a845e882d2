"""Products of the generalised Gauss-Newton matrix with vectors, and tangents of the whole network."""

from __future__ import annotations

import torch
from torch import Tensor

from bayesae.curvature.general import gradients
from bayesae.curvature.hessian import HessianFunction, read_hessian
from bayesae.curvature.linearisation import Linearisation, pull
from bayesae.curvature.steps import Step, mapped
from bayesae.forward_mode import jvp
from bayesae.types import Params

__all__ = ["ggn_product", "parameter_tangents"]


def parameter_tangents(lin: Linearisation, steps: list[Step], vectors: Params) -> Tensor:
    r"""J v for every datum: (B, K, \*O).

    Args:
        lin: The network.
        steps: A trace.
        vectors: Leaves (K, \*shape); parameters that are left out do not move.

    Returns:
        Derivatives of the outputs along each vector.
    """
    n = next(iter(vectors.values())).shape[0]
    known: dict[int, Tensor | None] = {}
    for i, step in enumerate(steps):
        own = {name: vectors[name] for name in step.names if name in vectors and name not in lin.shared}
        coming = [known.get(j) for j in step.sources]
        moved = step.push(coming) if any(t is not None for t in coming) else None
        if own:
            mine = step.push_parameters(own)
            moved = mine if moved is None else moved + mine
        known[i] = moved
    outputs = steps[-1].value
    result = known[len(steps) - 1]
    result = outputs.new_zeros(1, n, *outputs.shape[1:]) if result is None else result
    shared = {name: vectors[name] for name in lin.shared if name in vectors}
    if shared:
        result = result + _general_tangents(lin, steps[0].value, shared)
    return result.expand(len(outputs), *result.shape[1:])


def _general_tangents(lin: Linearisation, x: Tensor, vectors: Params) -> Tensor:
    at = {name: lin.params[name] for name in vectors}
    others = {name: leaf for name, leaf in lin.params.items() if name not in at} | {
        name: b.to(x.dtype) if b.is_floating_point() else b for name, b in lin.network.named_buffers()
    }

    def run(params: Params) -> Tensor:
        return torch.func.functional_call(lin.network, params | others, (x,))

    moved = mapped(lambda *leaves: jvp(run, (at,), (dict(zip(vectors, leaves, strict=True)),))[1], 0, *vectors.values())
    return moved.movedim(0, 1)


@torch.no_grad()
def ggn_product(
    lin: Linearisation, x: Tensor, output_hessian: HessianFunction, vectors: Params, *, mask: Tensor | None = None
) -> Params:
    r"""G v for several vectors at once, G = sum_b J_b^T H_b J_b.

    Args:
        lin: The network at its weights.
        x: (B, \*data).
        output_hessian: As for `ggn_diagonal`.
        vectors: Leaves (K, \*shape), every parameter that moves.
        mask: As for `ggn_diagonal`.

    Returns:
        Every parameter, leaves (K, \*shape).

    Exact when: always (to rounding).
    Cost: K forward and backward passes, the forward pass of the network shared.

    References:
        | Fast Curvature Matrix-Vector Products for Second-Order Gradient Descent (Schraudolph, 2002)
    """
    n = next(iter(vectors.values())).shape[0]
    vectors = {name: leaf.to(lin.params[name]) for name, leaf in vectors.items()}
    total: Params = {name: leaf.new_zeros(n, *leaf.shape) for name, leaf in lin.params.items()}
    if n == 0:
        return total
    for part, steps in lin.batches(x):
        outputs = steps[-1].value
        hessian = read_hessian(output_hessian(outputs), outputs, None if mask is None else mask[part])
        rows = hessian.apply(parameter_tangents(lin, steps, vectors))

        def visit(i: int, here: Tensor, steps: list[Step] = steps) -> None:
            for name, leaf in steps[i].gradient_sums(here).items():
                if name not in lin.shared:
                    total[name] += leaf

        pull(steps, rows, len(steps) - 1, visit)
        if lin.shared:
            for name, leaf in gradients(lin, steps[0].value, rows, sorted(lin.shared)).items():
                total[name] += leaf.sum(0)
    return total
