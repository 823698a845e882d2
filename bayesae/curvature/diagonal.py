"""The exact diagonal of the generalised Gauss-Newton matrix."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bayesae.curvature.chain import LinearStep, Trace, rows_per_chunk, trace
from bayesae.curvature.quadratic import QuadraticForm
from bayesae.types import Params

__all__ = ["ggn_diagonal"]


@torch.no_grad()
def ggn_diagonal(
    network: nn.Module,
    params: Params,
    x: Tensor,
    output_hessian: Callable[[Tensor], Tensor],
    *,
    mask: Tensor | None = None,
    chunk_size: int | None = None,
) -> Params:
    r"""Diagonal of the generalised Gauss-Newton matrix, summed over the rows of a batch.

    .. math:: G = \sum_{b=1}^{B} J_b^\top H_b J_b, \qquad
              G_{(i,j),(i,j)} = \sum_b a_{b,j}^2 \, (M_b)_{ii}

    for entry (i, j) of a linear layer with inputs a and M = J^T H J with respect to its pre-activations. M is
    carried back from the outputs as a factor or as a Gram matrix, whichever is smaller, so that below the
    narrowest layer no more than its width of rows is carried, whatever the number of outputs.

    Args:
        network: Nested ``nn.Sequential`` of Linear and element-wise layers.
        params: Where to differentiate: every parameter in its own shape.
        x: (B, \*data).
        output_hessian: From outputs (B, \*O) to the Hessian of -log p in them: () for a multiple of the
            identity, or its diagonal (B, \*O).
        mask: True where an output counts, as many numbers as outputs; None if all do.
        chunk_size: Rows at a time; chosen to keep temporaries within a quarter of a gigabyte if None.

    Returns:
        Non-negative, in the shape of every parameter, units 1 / (units of theta) squared.

    Exact when: always (to rounding), for any likelihood whose Hessian in the outputs is diagonal.
    Cost: about R * width * width operations a row and layer, R the smaller of outputs and last hidden width
        until the narrowest layer; temporaries of (B, outputs, width).

    Raises:
        UnsupportedError: If a layer has no rule; it is named.

    References:
        | Fast Curvature Matrix-Vector Products for Second-Order Gradient Descent (Schraudolph, 2002)
        | Practical Gauss-Newton Optimisation for Deep Learning (Botev, Ritter, Barber, 2017): the recursion
    """
    if chunk_size is None:
        chunk_size = rows_per_chunk(network, trace(network, params, x[:1]).outputs.numel())
    result: Params = {}
    for start in range(0, len(x), chunk_size):
        rows = slice(start, start + chunk_size)
        chain = trace(network, params, x[rows])
        hessian = output_hessian(chain.outputs)
        if mask is not None:
            hessian = hessian * mask[rows].reshape(chain.outputs.shape)
        for name, value in _one_chunk(chain, hessian, params).items():
            result[name] = result[name] + value if name in result else value
    return result


def _one_chunk(chain: Trace, hessian: Tensor, params: Params) -> Params:
    n_outputs = chain.outputs[0].numel()
    hessian = hessian.to(chain.outputs.dtype)
    form = QuadraticForm(n_outputs, hessian if hessian.dim() == 0 else hessian.flatten(1))
    result = {name: torch.zeros_like(leaf, dtype=chain.outputs.dtype) for name, leaf in params.items()}
    first = next(step for step in chain.steps if isinstance(step, LinearStep))
    for step in reversed(chain.steps):
        if not isinstance(step, LinearStep):
            form = form.through_slope(step.slope)
            continue
        diagonal = form.diagonal().expand(len(chain.outputs), -1)
        result[step.weight_name] = diagonal.mT @ step.inputs**2
        if step.bias_name is not None:
            result[step.bias_name] = diagonal.sum(0)
        if step is first:
            break
        form = form.through_linear(step.weight)
    return result
