"""Codes moved towards the posterior by the gradient of log p(x, z): Hamiltonian dynamics with a known density."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bayesae.codes.arguments import check_number
from bayesae.codes.base import CodeModel, differentiating, draws_of, noise, score_outputs
from bayesae.codes.flows.base import LawFamily, check_dtype, check_is_total
from bayesae.data import check_counts
from bayesae.draws import Draws
from bayesae.errors import ShapeError
from bayesae.nets.recipe import can_be_built, remember
from bayesae.types import Batch

__all__ = ["Hamiltonian", "Leapfrog"]


@can_be_built
class Leapfrog(nn.Module):
    r"""T leapfrog steps that cool down, a bijection of code and momentum with determinant 1.

    .. math:: \rho_0 = \gamma / \sqrt{\beta_0}, \quad
              \rho' = \rho_t + \tfrac{\epsilon}{2} F(z_t), \quad z_{t+1} = z_t + \epsilon \rho', \quad
              \rho_{t+1} = \sqrt{\beta_t / \beta_{t+1}}\, \big(\rho' + \tfrac{\epsilon}{2} F(z_{t+1})\big)

    with :math:`\beta_T = 1` and :math:`1 / \sqrt{\beta_t}` quadratic in t. Step sizes and :math:`\beta_0` are trained
    by their logarithms; ``requires_grad_(False)`` keeps them.

    Args:
        n_latents: Z, of the step sizes :math:`\epsilon`, one a dimension.
        n_steps: T.
        step_size: Of every dimension at the start, units of z.
        temperature: :math:`1 / \beta_0` at the start; 1 does not temper.

    Exact when: the determinant always; the energy is kept in the limit of small steps without tempering.
    Cost: T + 1 gradients of log p(x, z) a code.

    Raises:
        DataError: If a count or a size is not positive.

    References:
        | Hamiltonian Variational Auto-Encoder (Caterini, Doucet, Sejdinovic, 2018, https://arxiv.org/abs/1805.11328)
    """

    def __init__(self, n_latents: int, n_steps: int = 4, *, step_size: float = 0.1, temperature: float = 1.0) -> None:
        super().__init__()
        check_counts(n_latents=n_latents, n_steps=n_steps)
        check_number("step_size", step_size)
        check_number("temperature", temperature)
        self.n_steps = n_steps
        self.log_step_size = nn.Parameter(torch.full((n_latents,), math.log(step_size)))
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))
        sizes = {"n_latents": n_latents, "n_steps": n_steps}
        remember(self, "Leapfrog", sizes | {"step_size": float(step_size), "temperature": float(temperature)})

    def forward(self, latents: Tensor, unit: Tensor, force: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Move codes.

        Args:
            latents: (K, S, B, Z).
            unit: Momentum before tempering, standard normal noise (K, S or 1, B, Z).
            force: F, the gradient of log p(x, z) in the codes, (K, S, B, Z) to the same.

        Returns:
            The new codes and momenta.
        """
        step, hot = self.log_step_size.exp(), (0.5 * self.log_temperature).exp()
        roots = [hot + (1 - hot) * (t / self.n_steps) ** 2 for t in range(self.n_steps + 1)]
        momentum, pull = unit * hot, force(latents)
        for t in range(self.n_steps):
            half = momentum + 0.5 * step * pull
            latents = latents + step * half
            pull = force(latents)
            momentum = (half + 0.5 * step * pull) * (roots[t + 1] / roots[t])
        return latents, momentum

    def extra_repr(self) -> str:
        """Sizes: there is no layer to show them."""
        return f"n_latents={len(self.log_step_size)}, n_steps={self.n_steps}"


@dataclass(frozen=True)
class Hamiltonian:
    r"""Codes of a law, moved along the gradient of log p(x, z) with a momentum.

    .. math:: (z_T, \rho_T) = f(z_0, \gamma), \quad z_0 \sim q_0(z_0 \mid x), \quad \gamma \sim \mathcal{N}(0, I), \quad
              \log w = \log p(x, z_T) - \tfrac12 \lVert \rho_T \rVert^2 - \log q_0(z_0 \mid x)
                       + \tfrac12 \lVert \gamma \rVert^2

    The `Draws`' ``log_q`` is what makes their ``log_ratio`` this log w: the density of code and momentum together over
    that of a standard normal momentum. exp(log w) has mean p(x), so that bounds and importance weights hold as ever;
    ``log_q`` is no density of z alone.

    Args:
        base: q_0, such as `codes.amortised`; the encoder gives its parameters alone.
        leapfrog: The dynamics, in the model's dtype; `fit_model` trains its step sizes and temperature.

    Exact when: exp(log w) is an unbiased estimate of p(x) for every step size.
    Biased when: draws are read as the posterior without their weights.
    Cost: T + 2 passes through the decoder and T + 1 back a code; training differentiates through them.

    Raises:
        UnsupportedError: If the base has gradient="path".
        ShapeError: When called, if the dynamics are of another dtype, or of another size than the code.

    References:
        | Hamiltonian Variational Auto-Encoder (Caterini, Doucet, Sejdinovic, 2018, https://arxiv.org/abs/1805.11328)
        | Markov Chain Monte Carlo and Variational Inference (Salimans, Kingma, Welling, 2015)
    """

    base: LawFamily
    leapfrog: Leapfrog

    def __post_init__(self) -> None:
        check_is_total(self.base)

    def __call__(self, model: CodeModel, batch: Batch, *, n_latent_draws: int = 1) -> Draws:
        """Draw K codes for every row under every weight draw.

        Args:
            model: The model at S weight draws.
            batch: Rows to encode.
            n_latent_draws: K.

        Returns:
            `Draws` with outputs.

        Raises:
            ShapeError: If the dynamics are of another size or dtype.
        """
        parameters = model.encode_parameters(batch.x, batch.context)
        law = self.base.law_from(parameters)
        n_latents = law.loc.shape[-1]
        check_dtype(self.leapfrog, parameters)
        if len(self.leapfrog.log_step_size) != n_latents:
            got = f"{len(self.leapfrog.log_step_size)}"
            raise ShapeError(f"step sizes of {n_latents} code dimensions", got, "Make codes.Leapfrog(n_latents).")

        def log_joint(latents: Tensor) -> Tensor:
            outputs = model.decode(latents, batch.context)
            return (score_outputs(model.likelihood, outputs, batch) + model.log_prior(latents)).sum()

        unit, push = noise(model, batch, n_latent_draws, 2 * n_latents, law.loc).chunk(2, -1)
        start = law.push(unit)
        with differentiating():
            latents, momentum = self.leapfrog(start, push, torch.func.grad(log_joint))
        log_q = law.log_prob(start) + 0.5 * (momentum**2 - push**2).sum(-1)
        return draws_of(model, batch, latents, log_q)
