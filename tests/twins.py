"""Slow and obvious twins of what the engine computes by structure."""

from __future__ import annotations

import torch

from bayesae.functional import parameters_of
from bayesae.types import BlockHessian, LowRankHessian


def output_jacobian(network, x, params=None):
    """d outputs / d theta by autograd, one output at a time: {name: (B, O, *shape)}."""
    params = parameters_of(network) if params is None else params

    def outputs(p, row):
        return torch.func.functional_call(network, p, (row[None],))[0].flatten()

    per_row = [torch.func.jacrev(outputs)(params, row) for row in x]
    return {name: torch.stack([jacobian[name] for jacobian in per_row]) for name in params}


def dense_jacobian(network, x):
    """(B, O, P) in the order of ``named_parameters``."""
    return torch.cat([j.flatten(2) for j in output_jacobian(network, x).values()], -1)


def ggn_diagonal(network, x, likelihood, target=None):
    """Diagonal of sum_b J^T H J with H by autograd from the likelihood's own log-density."""
    outputs = network(x).detach()
    jacobian = output_jacobian(network, x)
    n_outputs = outputs[0].numel()
    result = {name: 0.0 for name in jacobian}
    for b in range(len(x)):

        def negative_log_prob(flat, row=(x if target is None else target)[b : b + 1], shape=outputs[b : b + 1].shape):
            return -likelihood.log_prob(flat.reshape(shape), row.reshape(shape))[0]

        hessian = torch.func.hessian(negative_log_prob)(outputs[b].flatten())
        assert hessian.shape == (n_outputs, n_outputs)
        for name, j in jacobian.items():
            result[name] = result[name] + torch.einsum("o...,op,p...->...", j[b], hessian, j[b])
    return result


def dense_hessian(likelihood, outputs):
    """Hessian of -log p, or Fisher information, in the flat outputs of every row, (B, O, O), whatever its form."""
    given, n = likelihood.output_hessian(outputs), outputs[0].numel()
    if isinstance(given, LowRankHessian):
        factor = given.factor.flatten(2)
        diagonal = outputs.new_zeros(()) if given.diagonal is None else given.diagonal
        return factor.mT @ factor + torch.diag_embed(diagonal.expand(outputs.shape).flatten(1))
    if isinstance(given, BlockHessian):
        index = torch.arange(n).reshape(outputs.shape[1:]).movedim(given.axis - 1, -1)
        dense, g = outputs.new_zeros(len(outputs), n, n), index.shape[-1]
        for group, blocks in zip(index.reshape(-1, g), given.values.flatten(1, -3).unbind(1), strict=True):
            dense[:, group[:, None], group] = blocks
        return dense
    return torch.diag_embed(given.expand(outputs.shape).flatten(1))
