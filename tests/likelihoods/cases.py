"""One row per likelihood, and integrals over data and outputs by brute force."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bayesae import likelihoods as L

F64 = {"dtype": torch.float64}
LEVELS = [0.0, 0.25, 0.5, 1.0]


def line() -> tuple[Tensor, Tensor]:
    """Points and weights of an integral over the real line, heavy tails included: x = sinh(u)."""
    u = torch.linspace(-40, 40, 16_001, **F64)
    return torch.sinh(u), torch.cosh(u) * (u[1] - u[0])


def interval() -> tuple[Tensor, Tensor]:
    nodes, weights = np.polynomial.legendre.leggauss(400)
    return torch.tensor(0.5 * (nodes + 1)), torch.tensor(0.5 * weights)


def listed(values) -> tuple[Tensor, Tensor]:
    points = torch.as_tensor(values, **F64)
    return points, torch.ones_like(points)


def counts() -> tuple[Tensor, Tensor]:
    return listed(range(4000))


@dataclass(frozen=True)
class Case:
    """A likelihood, points and weights that integrate over one number, data that suit it, and typical outputs."""

    name: str
    build: Callable[[], L.Head]
    points: Callable[[], tuple[Tensor, Tensor]]
    data: Callable[[Tensor], Tensor]  # from uniform numbers
    n_parameters: int = 1
    shift: float = 0.0  # of outputs

    def __str__(self):
        return self.name

    def outputs(self, *shape: int, spread: float = 0.7) -> Tensor:
        extra = () if self.n_parameters == 1 else (self.n_parameters,)
        return self.shift + spread * torch.randn(*shape, *extra, **F64)


def small_counts(u):
    return (6 * u**2).floor()


CASES = [
    Case("Gaussian", lambda: L.Gaussian(0.4), line, lambda u: u),
    Case("GaussianPerOutput", lambda: L.Gaussian([0.4] * 4, per_output=True), line, lambda u: u),
    Case("HeteroscedasticGaussian", lambda: L.HeteroscedasticGaussian(0.1), line, lambda u: u, 2),
    Case("Bernoulli", L.Bernoulli, lambda: listed([0, 1]), torch.round),
    Case("ContinuousBernoulli", L.ContinuousBernoulli, interval, lambda u: u),
    Case("Categorical", lambda: L.Categorical(3), lambda: listed(range(3)), lambda u: (3 * u).floor(), 3),
    Case(
        "CategoricalValues",
        lambda: L.Categorical(4, LEVELS),
        lambda: listed(LEVELS),
        lambda u: torch.tensor(LEVELS, dtype=u.dtype)[(4 * u).long()],
        4,
    ),
    Case("Poisson", L.Poisson, counts, small_counts, shift=0.5),
    Case("NegativeBinomial", lambda: L.NegativeBinomial(1.7), counts, small_counts, shift=0.5),
    Case("StudentT", lambda: L.StudentT(5.0, 0.4), line, lambda u: u),
]
IDS = [case.name for case in CASES]


def under_normal(head: L.Head, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, noise and variance of the mean of one number whose outputs (g,) are independent Normals, on a grid."""
    n = 20_001 if mean.numel() == 1 else 201
    grid = torch.linspace(-12, 12, n, **F64)
    weight = torch.exp(-(grid**2) / 2)
    weight = weight / weight.sum()
    axes = [m + math.sqrt(v) * grid for m, v in zip(mean.flatten(), var.flatten(), strict=True)]
    at = torch.cartesian_prod(*axes)
    weights = torch.cartesian_prod(*[weight] * mean.numel()).reshape(len(at), -1).prod(-1)
    first = head.mean(at) @ weights
    return first, head.variance(at) @ weights, (head.mean(at) - first) ** 2 @ weights
