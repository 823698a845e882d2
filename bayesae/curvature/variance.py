"""Exact variance of a network's outputs, linearised in weights that are independent."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bayesae.curvature.chain import LinearStep, SlopeStep, Trace, push, rows_per_chunk, trace
from bayesae.types import Params

__all__ = ["output_variance"]


@torch.no_grad()
def output_variance(
    network: nn.Module, params: Params, variances: Params, x: Tensor, *, chunk_size: int | None = None
) -> tuple[Tensor, Tensor]:
    r"""Outputs, and the variance of each one when independent weights move by their variances.

    .. math:: v_o = \sum_p J_{op}^2 \operatorname{Var}[\theta_p]
              = \sum_l \sum_i \Big(\frac{\partial f_o}{\partial h_{l,i}}\Big)^2 s_{l,i}, \qquad
              s_{l,i} = \sum_j a_{l,j}^2 \operatorname{Var}[W_{l,ij}] + \operatorname{Var}[b_{l,i}]

    No Jacobian in the weights: layer l contributes through its inputs a and the Jacobian of the outputs in its
    pre-activations h. Everything before the narrowest layer is summed into that layer's own (Z, Z) covariance,
    so that the encoder costs Z rows and not one row an output.

    Args:
        network: Nested ``nn.Sequential`` of Linear and element-wise layers.
        params: Where to linearise: every parameter in its own shape.
        variances: Variance of every weight, the same shapes; 0 where a weight is fixed.
        x: (N, \*data).
        chunk_size: Rows at a time; chosen to keep temporaries within a quarter of a gigabyte if None.

    Returns:
        Outputs and variances, both (N, \*O).

    Exact when: always (to rounding), for the linearised network and independent weights.
    Cost: outputs * width * width operations a row and layer after the narrowest; temporaries (B, outputs, width).

    Raises:
        UnsupportedError: If a layer has no rule; it is named.

    References:
        | Improving predictions of Bayesian neural nets via local linearization (Immer, Korzepa, Bauer, 2021)
    """
    if chunk_size is None:
        chunk_size = rows_per_chunk(network, trace(network, params, x[:1]).outputs.numel())
    pieces = [_one_chunk(trace(network, params, rows), variances) for rows in x.split(chunk_size)]
    outputs, variance = (torch.cat(part) for part in zip(*pieces, strict=True))
    return outputs, variance


def _one_chunk(chain: Trace, variances: Params) -> tuple[Tensor, Tensor]:
    steps = chain.steps
    widths = {i: len(step.weight) for i, step in enumerate(steps) if isinstance(step, LinearStep)}
    # the narrowest pre-activation, the last of several
    neck = min(reversed(widths), key=lambda i: widths[i])
    if widths[neck] == chain.outputs[0].numel():
        neck = -1  # nothing is narrower than the outputs: no (O, O) covariance, only its diagonal
    jacobian, slope, variance = None, None, torch.zeros((), dtype=chain.outputs.dtype)
    for i in range(len(steps) - 1, neck, -1):
        step = steps[i]
        if isinstance(step, SlopeStep):
            slope = step.slope if slope is None else slope * step.slope
            continue
        variance = variance + _spread(jacobian, slope, _preactivation_variance(step, variances))
        if i == min(widths):
            return chain.outputs, variance.reshape(chain.outputs.shape)
        jacobian, slope = push(jacobian, slope, step.weight), None
    assert jacobian is not None  # the layer of the outputs stands behind the neck
    jacobian = jacobian if slope is None else jacobian * slope[:, None]
    covariance = _covariance_at(steps[: neck + 1], variances)  # (B, Z, Z)
    tail = ((jacobian @ covariance) * jacobian).sum(-1)
    return chain.outputs, (variance + tail).reshape(chain.outputs.shape)


def _preactivation_variance(step: LinearStep, variances: Params) -> Tensor:
    spread = step.inputs**2 @ variances[step.weight_name].to(step.inputs.dtype).mT
    return spread if step.bias_name is None else spread + variances[step.bias_name]


def _spread(jacobian: Tensor | None, slope: Tensor | None, variance: Tensor) -> Tensor:
    """Diagonal of J D diag(variance) D J.T, (B, outputs)."""
    if slope is not None:
        variance = variance * slope**2
    if jacobian is None:
        return variance
    if jacobian.dim() == 2:
        return variance @ (jacobian**2).mT
    return ((jacobian**2) @ variance[:, :, None])[:, :, 0]


def _covariance_at(steps: list[LinearStep | SlopeStep], variances: Params) -> Tensor:
    """Covariance of the last step's pre-activations under all weights up to it, (B, Z, Z)."""
    jacobian, slope, covariance = None, None, torch.zeros(())
    first = next(step for step in steps if isinstance(step, LinearStep))
    for step in reversed(steps):
        if isinstance(step, SlopeStep):
            slope = step.slope if slope is None else slope * step.slope
            continue
        variance = _preactivation_variance(step, variances)
        if jacobian is None:
            covariance = torch.diag_embed(variance)
        else:
            scaled = jacobian if slope is None else jacobian * slope[:, None]
            if scaled.dim() == 2:
                scaled = scaled.expand(len(variance), -1, -1)
            covariance = covariance + (scaled * variance[:, None]) @ scaled.mT
        if step is first:
            break
        jacobian, slope = push(jacobian, slope, step.weight), None
    return covariance
