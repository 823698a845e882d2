"""Methods that draw codes given the observed entries alone: importance resampling, Laplace, Hamiltonian Monte Carlo."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bayesae import random
from bayesae.codes import HMC, CodePosterior, Laplace, encode
from bayesae.data import check_counts
from bayesae.draws import Draws
from bayesae.errors import NonFiniteError, UnsupportedError
from bayesae.imputation.base import DrawsCodes, Found, Problem, diagnose, joined, picks

__all__ = ["CodeHMC", "CodeLaplace", "ImportanceResampling"]


@dataclass(frozen=True)
class ImportanceResampling(DrawsCodes):
    r"""Codes of a proposal, drawn again by their importance weights: the missing-data importance-weighted autoencoder.

    .. math:: z_1, \dots, z_n \sim q(z \mid x_o), \qquad
              w_i \propto \frac{p(x_o \mid z_i)\, p(z_i)}{q(z_i \mid x_o)}, \qquad P(z = z_i) = w_i, \qquad
              x_m \sim p(x_m \mid z)

    Args:
        n: Codes of the proposal for every row and weight draw.
        proposal: q, a code posterior with a density. None: the predictive's codes, whose encoder sees 0 in the missing
            entries; ``codes.Laplace()`` is nearer to the posterior where it was not trained to.

    Exact when: n goes to infinity, or q is the posterior.
    Biased when: n is finite and weights are uneven: towards q. ``acceptance``, the share E / n of codes that count, and
        ``ess``, 1 / (1 / K + 1 / E), tell; but a q that misses the posterior altogether does not know it.
    Cost: n passes through the decoder a weight draw, in one call.

    Raises:
        DataError: If n is no count.
        UnsupportedError: When called, if the proposal has no density.
        NonFiniteError: When called, if a weight is NaN, or all weights of a row are 0.

    References:
        | MIWAE: Deep Generative Modelling and Imputation of Incomplete Data Sets (Mattei, Frellsen, 2019,
          https://arxiv.org/abs/1812.02633)
    """

    n: int = 200
    proposal: CodePosterior | None = None

    def __post_init__(self) -> None:
        check_counts(n=self.n)

    def n_parallel(self, n_codes: int, n_weight_draws: int) -> int:
        """Network rows at once for every row of data."""
        return self.n

    def __call__(self, problem: Problem, n_codes: int) -> Found:
        """Draw and draw again.

        Args:
            problem: Rows and weight draws.
            n_codes: K.

        Returns:
            Outputs at the chosen codes.
        """
        return joined([self._single(one, n_codes) for one in problem.singles()])

    def _single(self, problem: Problem, n_codes: int) -> Found:
        proposal = problem.codes if self.proposal is None else self.proposal
        if proposal is encode:
            fix = "Use proposal=bae.codes.Laplace()."
            raise UnsupportedError("a proposal with a density", "a plain encoder", fix)
        draws = _draws(problem, proposal, self.n)
        assert draws.outputs is not None
        shares = draws.log_ratio[:, 0].double().softmax(0)
        if n_bad := int((~shares.isfinite()).any(0).sum()):
            fix = "Are rows, or the decoder's weights, far outside the training range?"
            raise NonFiniteError("importance weights", f"NaN, or nothing above 0, in {n_bad} of its rows", fix)
        chosen = torch.multinomial(shares.mT, n_codes, replacement=True).mT
        rows = torch.arange(chosen.shape[1], device=chosen.device)
        effective = draws.ess()
        outputs = draws.outputs[:, 0][chosen, rows][:, None]
        return Found(outputs, 1 / (1 / n_codes + 1 / effective), acceptance=effective / self.n)


@dataclass(frozen=True)
class CodeLaplace(DrawsCodes):
    r"""Codes of a Normal at the mode given the observed entries, with the inverse of the curvature there.

    .. math:: \hat z = \arg\max_z \log p(x_o, z), \qquad
              z \sim \mathcal{N}\big(\hat z, (J_o^\top H_o J_o + I)^{-1}\big), \qquad x_m \sim p(x_m \mid z)

    Args:
        n_steps: Gauss-Newton steps with a line search, from the encoder's code; see `codes.Laplace`.

    Exact when: the decoder is linear and its noise Gaussian.
    Biased when: the posterior is no Normal. ``ess``, of the weights p(x_o, z) / q(z), tells how far the draws are from
        it.
    Cost: ``n_steps`` + 1 pushes of Z tangents through the decoder, and K passes, a weight draw.

    Raises:
        DataError: If n_steps is no count.
    """

    n_steps: int = 8

    def __post_init__(self) -> None:
        check_counts(n_steps=self.n_steps)

    def n_parallel(self, n_codes: int, n_weight_draws: int) -> int:
        """Network rows at once for every row of data."""
        return n_codes

    def __call__(self, problem: Problem, n_codes: int) -> Found:
        """Find modes and draw around them.

        Args:
            problem: Rows and weight draws.
            n_codes: K.

        Returns:
            Outputs at the codes.
        """
        laplace, parts = Laplace(self.n_steps, "line_search"), []
        for one in problem.singles():
            draws = _draws(one, laplace, n_codes)
            assert draws.outputs is not None
            parts.append(Found(draws.outputs, draws.ess().clamp(max=n_codes)))
        return joined(parts)


@dataclass(frozen=True)
class CodeHMC(DrawsCodes):
    r"""Codes of Hamiltonian chains whose law is :math:`p(z \mid x_o, \theta)`, all weight draws in one call.

    Args:
        n_burn_in: Steps before the first that may be kept, in which step sizes adapt.
        n_steps: Steps after that, of each chain.
        n_chains: C, for every row and weight draw.
        hmc: The chains' steps.

    Exact when: in the limit of many steps.
    Biased when: chains are short, or never come to another mode.
    Cost: on average (``hmc.n_leapfrog`` + 1) / 2 gradients of log p(x_o, z) a step, chain and weight draw; memory of
        all steps' codes of one chunk of rows.

    Raises:
        DataError: If a count is none; when called, if there are fewer steps than draws to keep.
        NonFiniteError: When called, if log p(x_o, z) is not finite where chains start.

    References:
        | MCMC using Hamiltonian dynamics (Neal, 2011, https://arxiv.org/abs/1206.1901)
    """

    n_burn_in: int = 100
    n_steps: int = 100
    n_chains: int = 2
    hmc: HMC = HMC()

    def __post_init__(self) -> None:
        check_counts(n_burn_in=self.n_burn_in + 1, n_steps=self.n_steps, n_chains=self.n_chains)

    def n_parallel(self, n_codes: int, n_weight_draws: int) -> int:
        """Network rows at once for every row of data."""
        return self.n_chains * n_weight_draws

    def __call__(self, problem: Problem, n_codes: int) -> Found:
        """Run chains for every row under all weight draws.

        Args:
            problem: Rows and weight draws.
            n_codes: K, evenly over the steps of all chains.

        Returns:
            Outputs at the codes, and how the chains went.
        """
        kept, model = picks(n_codes, self.n_chains, self.n_steps), problem.model
        counts = {"n_chains": self.n_chains, "n_burn_in": self.n_burn_in, "n_steps": self.n_steps}
        chains = self.hmc.run(model, problem.rows, **counts)
        sizes, rhat = diagnose(chains.latents, n_codes)
        outputs = model.decode(chains.latents[kept], problem.rows.context)
        return Found(outputs, sizes, rhat, chains.acceptance, chains.n_divergent)


def _draws(problem: Problem, codes: CodePosterior, n: int) -> Draws:
    """Codes of one weight draw, with noise of its own: what is keyed on rows alone is shared by weight draws."""
    with random.scope(random.derived_seed(problem.first)):
        return codes(problem.model, problem.rows, n_latent_draws=n)
