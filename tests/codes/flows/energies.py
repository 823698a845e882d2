"""The two-dimensional energies of Rezende and Mohamed (2015), and flows without data fitted to them."""

from __future__ import annotations

import math

import torch

from bayesae import codes

_REACH = 4.0  # of the first coordinate: the second to fourth do not end without a wall


def energy(number, z):
    """U(z), (..., 2) to (...), with a wall that rises outside |z_1| <= 4."""
    first, second = z.unbind(-1)
    w1 = torch.sin(math.pi * first / 2)
    w2 = 3 * torch.exp(-0.5 * ((first - 1) / 0.6) ** 2)
    w3 = 3 * torch.sigmoid((first - 1) / 0.3)

    def two(one, other):
        return -torch.logaddexp(-0.5 * one**2, -0.5 * other**2)

    if number == 1:
        value = 0.5 * ((z.norm(dim=-1) - 2) / 0.4) ** 2 + two((first - 2) / 0.6, (first + 2) / 0.6)
    elif number == 2:
        value = 0.5 * ((second - w1) / 0.4) ** 2
    elif number == 3:
        value = two((second - w1) / 0.35, (second - w1 + w2) / 0.35)
    else:
        value = two((second - w1) / 0.4, (second - w1 + w3) / 0.35)
    return value + 0.5 * ((first.abs() - _REACH).clamp(min=0) / 0.1) ** 2


def log_normaliser(number, n=601, width=8.0):
    """Log of the integral of exp(-U), by a grid."""
    axis = torch.linspace(-width, width, n, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    return float(torch.logsumexp(-energy(number, grid), 0) + 2 * math.log(2 * width / (n - 1)))


def fitted_divergence(number, flow, *, steps, n=100, rate=2e-2, seed=0, n_last=20_000, anneal=0.3):
    """KL(q || p) in nats and its standard error after Adam on U - log|det|, energies warming up at first."""
    torch.manual_seed(seed)
    numbers = torch.nn.Parameter(0.5 * torch.randn(1, 1, 2, 2 + flow.n_parameters, dtype=torch.float64))
    with torch.no_grad():
        numbers[..., :2] = 0
    leaves = [numbers, *codes.modules_of(flow).parameters()]
    optimiser = torch.optim.Adam(leaves, lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)

    def sample(n_draws):
        law = codes.amortised.law_from(numbers[..., :2])
        start = law.push(torch.randn(n_draws, 1, 1, 2, dtype=torch.float64))
        moved, log_det = flow(start, numbers[..., 2:])
        return law.log_prob(start) - log_det.sum(-1), energy(number, moved)

    for step in range(steps):
        log_q, height = sample(n)
        beta = min(1.0, 0.01 + step / (anneal * steps))
        optimiser.zero_grad()
        (log_q + beta * height).mean().backward()
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        log_q, height = sample(n_last)
    values = log_q + height
    return float(values.mean()) + log_normaliser(number), float(values.std()) / n_last**0.5
