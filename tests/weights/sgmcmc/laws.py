"""Targets with a known law, the laws of discretised chains on them, and moments with standard errors."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
from torch import nn

import bayesae as bae
from bayesae import metrics
from bayesae.joint import IsotropicNormal, LogJoint
from bayesae.testing import ConjugateRegression
from bayesae.types import Batch

F64 = {"dtype": torch.float64}


def regression(temperature: float = 1.0) -> ConjugateRegression:
    """Four weights of one output, posterior precisions 57 to 172, correlated."""
    return ConjugateRegression.make(n_out=1, is_orthogonal=False).with_temperature(temperature)


def twice(world: ConjugateRegression) -> ConjugateRegression:
    """The same posterior from every row twice with twice the noise variance: both halves have the same gradient."""
    batch = Batch(*(None if part is None else torch.cat([part, part]) for part in world.batch))
    batch = batch._replace(index=torch.arange(len(batch.x)))
    likelihood = bae.likelihoods.Gaussian(0.5 * math.sqrt(2)).double()

    def per_example(params, rows):
        return likelihood.log_prob(rows.x @ params["weight"].mT + params["bias"][:, None], rows.target)

    joint = dataclasses.replace(world.joint, per_example=per_example, n_data=2 * world.joint.n_data)
    return dataclasses.replace(world, joint=joint, batch=batch)


class Normals(nn.Module):
    """Parameters to put a density on."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(size, **F64))


def quadratic(precision: torch.Tensor, temperature: float = 1.0) -> ConjugateRegression:
    """U = theta^T Lambda theta / 2 over one 'row', Lambda of any size."""
    prior = IsotropicNormal(1e-12)  # too wide to be felt

    def per_example(params, rows):
        theta = params["theta"]
        return -0.5 * ((theta @ precision) * theta).sum(1, keepdim=True).expand(-1, len(rows.x)) / 4

    network = Normals(len(precision))
    joint = LogJoint(network, bae.likelihoods.Gaussian(1.0), per_example, prior, 4, temperature)
    batch = Batch(torch.zeros(4, 1, **F64), target=torch.zeros(4, 1, **F64), index=torch.arange(4))
    mean = {"theta": torch.zeros(len(precision), **F64)}
    return ConjugateRegression(joint, batch, mean, torch.linalg.inv(precision) * temperature, math.nan)


def flat(posterior) -> torch.Tensor:
    """Draws (C, n, P) of one output's weights and bias, or of theta."""
    atoms = posterior.atoms
    rows = [atoms[name].flatten(1) for name in ("weight", "bias", "theta") if name in atoms]
    return posterior.by_chain(torch.cat(rows, 1))


def centre(world: ConjugateRegression) -> torch.Tensor:
    return torch.cat([leaf.flatten() for leaf in world.mean.values()])


def off(posterior, world, covariance) -> float:
    """Largest distance of the means and the full covariance matrix from a law, in standard errors by ESS."""
    deviations = flat(posterior) - centre(world)
    products = deviations[..., :, None] * deviations[..., None, :]
    return max(_off(deviations, torch.zeros(())), _off(products, covariance))


def _off(values: torch.Tensor, expected: torch.Tensor) -> float:
    error = values.flatten(0, 1).std(0) / metrics.ess(values).sqrt()
    return float(((values.mean((0, 1)) - expected).abs() / error).max())


def sgld_law(precision: torch.Tensor, step: float) -> torch.Tensor:
    """Covariance of AR(1) along each eigenvector: eps / (1 - (1 - eps lambda / 2)^2)."""
    values, vectors = torch.linalg.eigh(precision)
    return vectors @ torch.diag(step / (1 - (1 - step * values / 2) ** 2)) @ vectors.mT


def lyapunov(transition: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """S = A S A^T + Q by Kronecker products."""
    n = len(transition)
    return np.linalg.solve(np.eye(n * n) - np.kron(transition, transition), noise.flatten()).reshape(n, n)


def sghmc_law(
    precision: torch.Tensor, step: float, friction: float, scales=None, gradient_noise=None, taken=None
) -> torch.Tensor:
    """Covariance of (theta, v), from v' = (1 - a) v - eta G Lambda theta + noise and theta' = theta + v'."""
    matrix, n = precision.numpy(), len(precision)
    g = np.ones(n) if scales is None else scales.numpy()
    eye, push = np.eye(n), step * g[:, None] * matrix
    transition = np.block([[eye - push, (1 - friction) * eye], [-push, (1 - friction) * eye]])
    variance = 2 * friction * step * g
    for sign, own in ((1, gradient_noise), (-1, taken)):
        variance = variance if own is None else variance + sign * (step * g) ** 2 * own.numpy()
    noise = np.diag(np.maximum(variance, 0))
    return torch.from_numpy(lyapunov(transition, np.block([[noise, noise], [noise, noise]])))
