"""`inference_gaps`: how much of log p(x) is lost by the family of q, by the encoder, and by new rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bayesae import random
from bayesae.codes import CodePosterior, law_of
from bayesae.data import Data, check_counts
from bayesae.draws import Draws
from bayesae.errors import UnsupportedError
from bayesae.evaluation.annealing import Annealing
from bayesae.evaluation.evidence import BLOCK, as_predictive, blocks, check_one_noise, network_at
from bayesae.evaluation.optimise import N_HELD, best_law
from bayesae.evaluation.ratios import log_ratio
from bayesae.evaluation.sums import LogWeights, RunningMean, warn_of_low_ess
from bayesae.models import Autoencoder
from bayesae.predictive import Predictive
from bayesae.random import row_normal
from bayesae.types import Batch, Params

__all__ = ["SOURCES", "InferenceGaps", "inference_gaps"]

SOURCES = ("amortised", "optimised", "proposal", "annealed")
_CLIMBING, _ANNEALING = 1, 2  # seeds; blocks take multiples of BLOCK
_N_CHAINS, _N_LEAPFROG = 16, 10


@dataclass(frozen=True)
class InferenceGaps:
    r"""What inference loses, for every row under every weight draw, (S, B) each, in nats.

    .. math:: \log p(x) - \mathcal{L}(q_\phi) = \underbrace{\log p(x) - \mathcal{L}(q^*)}_{approximation}
              + \underbrace{\mathcal{L}(q^*) - \mathcal{L}(q_\phi)}_{amortisation}

    Args:
        log_evidence: The best of several estimates of log p(x): the largest after two standard errors are taken off.
        source: Which it was: a place in `SOURCES`, the proposal of importance sampling or "annealed".
        ess: Effective sample size of that estimate's weights.
        optimised: Bound of the best law of the family for the row, L(q*).
        amortised: Bound of the code posterior's own law, L(q_phi).
        approximation_error: Standard error of ``approximation``; on the safe side, where both come from the same codes.
        amortisation_error: Standard error of ``amortisation``, whose two bounds share their noise.
        train: The same of training rows; None where there were none.
    """

    log_evidence: Tensor
    source: Tensor
    ess: Tensor
    optimised: Tensor
    amortised: Tensor
    approximation_error: Tensor
    amortisation_error: Tensor
    train: InferenceGaps | None = None

    @property
    def approximation(self) -> Tensor:
        """What the family loses: log p(x) - L(q*)."""
        return self.log_evidence - self.optimised

    @property
    def amortisation(self) -> Tensor:
        """What the encoder loses: L(q*) - L(q_phi)."""
        return self.optimised - self.amortised

    def generalisation(self) -> tuple[Tensor, Tensor]:
        """What the encoder loses on new rows beyond training rows: mean amortisation gaps' difference, and its error.

        Returns:
            The gap and its standard error over both sets of rows, (S,) each.

        Raises:
            UnsupportedError: If there were no training rows.
        """
        if self.train is None:
            raise UnsupportedError("training rows", "none", "Give inference_gaps(..., train_x=...).")
        parts = [self.amortisation, self.train.amortisation]
        spread = [gaps.var(1) / gaps.shape[1] for gaps in parts]
        return parts[0].mean(1) - parts[1].mean(1), (spread[0] + spread[1]).sqrt()

    def __str__(self) -> str:
        def line(name: str, values: Tensor) -> str:
            return f"{name:<16}{float(values.double().mean()):10.3f} nats a row"

        lines = [line("log p(x)", self.log_evidence), line("approximation", self.approximation)]
        lines += [line("amortisation", self.amortisation)]
        lines += [line("generalisation", self.generalisation()[0])] if self.train is not None else []
        return "\n".join(lines)


def inference_gaps(
    model: Predictive | Autoencoder,
    x: Data,
    mask: Tensor | None = None,
    *,
    codes: CodePosterior | None = None,
    train_x: Data | None = None,
    train_mask: Tensor | None = None,
    proposal: CodePosterior | None = None,
    n_annealing_steps: int = 0,
    n_latent_draws: int = 5000,
    n_weight_draws: int | None = None,
    chunk_size: int | None = None,
    seed: int | None = None,
    progress: bool | None = None,
) -> InferenceGaps:
    r"""Approximation, amortisation and generalisation gap of a Normal code posterior.

    L(q*) is found for each row by Adam on the parameters of a law of the same family, from the code posterior's own,
    until no round gains more than 1e-3 nats. Both bounds are then means of log p(x, z) - log q(z) over fresh draws of
    shared noise. log p(x) is the best of importance-sampling estimates by q_phi, by q*, and by what else is asked for:
    each is a lower bound in expectation, and above log p(x) + t with a probability of at most exp(-t).

    Args:
        model: A predictive, or an autoencoder at its own weights.
        x: Held-out rows (N, \*data).
        mask: True where x is observed.
        codes: A code posterior with a Normal law, in place of the predictive's own.
        train_x: Rows that trained the encoder, for the generalisation gap; weights stay as they are.
        train_mask: True where those are observed.
        proposal: A further code posterior to estimate log p(x) by, `codes.Laplace` say.
        n_annealing_steps: T of 16 further chains from q*, see `annealed_importance`; 0 runs none.
        n_latent_draws: K of each estimate.
        n_weight_draws: S; None takes all particles once, or 32 draws of a continuous posterior.
        chunk_size: Network rows in one call, 4096 if None.
        seed: The same seed gives the same gaps.
        progress: Show a progress bar; None shows it on a terminal only.

    Returns:
        `InferenceGaps`, (S, N). It warns where the effective sample size behind log p(x) is near one.

    Exact when: no exact case, because log p(x) and q* are numerical: of a linear Gaussian decoder approximation is the
        mean-field gap within its error.
    Biased when: log p(x) is too low (approximation then is too small), or Adam stops early or at a local maximum (then
        amortisation is too small, approximation too large).
    Cost: of a row and weight draw 2 K passes through the decoder, and 800 with gradients a round of Adam, at most 40.

    Raises:
        UnsupportedError: If the code posterior has no Normal law, the predictive is linearised, or components of a
            mixture have noise of their own.
        DataError: If a count is none, or the rows do not fit the likelihood.
        NonFiniteError: If a log weight is not finite.

    References:
        | Inference Suboptimality in Variational Autoencoders (Cremer, Li, Duvenaud, 2018,
          https://arxiv.org/abs/1801.03558)
        | Amortized Variational Inference: A Systematic Review (Ganguly, Jain, Watchareeruetai, 2023,
          https://arxiv.org/abs/2209.10888)
    """
    predictive = as_predictive(model, codes)
    check_one_noise(predictive)
    check_counts(n_latent_draws=n_latent_draws)
    annealing = None if n_annealing_steps == 0 else Annealing(n_annealing_steps, _N_LEAPFROG)
    if seed is None:  # the same weight draws for both sets of rows
        seed = int(torch.randint(2**62, ()))

    def measure(params: Params, batch: Batch, draw: Callable[[int], Draws]) -> tuple[Tensor, ...]:
        assert predictive.codes is not None and batch.index is not None
        bound = network_at(predictive, params)
        law = law_of(predictive.codes, bound, batch)
        with random.scope(random.derived_seed(_CLIMBING)):
            best = best_law(bound, batch, law)
        weights, difference = {name: LogWeights() for name in SOURCES}, RunningMean()
        for n, block_seed in blocks(n_latent_draws):
            with random.scope(block_seed, batch.x.device):
                noise = row_normal(batch.index, (n, 1), law.loc.shape[-1], law.loc)
                values = [log_ratio(bound, batch, one, noise) for one in (law, best)]
                if proposal is not None:
                    weights["proposal"].add(proposal(bound, batch, n_latent_draws=n).log_ratio)
            weights["amortised"].add(values[0])
            weights["optimised"].add(values[1])
            difference.add(values[1] - values[0])
        if annealing is not None:
            with random.scope(random.derived_seed(_ANNEALING)):
                weights["annealed"], _ = annealing(bound, batch, best, _N_CHAINS)
        used = [(place, weights[name].results()) for place, name in enumerate(SOURCES) if weights[name].mean.count]
        (*_, amortised, _, _), (*_, optimised, error, _) = used[0][1], used[1][1]
        log_evidence, ess, spread = (torch.stack([results[i] for _, results in used]) for i in range(3))
        # not the largest itself: one of an effective sample size of one may be high by chance
        chosen = (log_evidence - 2 * spread).argmax(0, keepdim=True)
        log_evidence, ess, spread = (values.gather(0, chosen)[0] for values in (log_evidence, ess, spread))
        source = torch.tensor([place for place, _ in used], device=chosen.device)[chosen[0]]
        approximation_error = (spread**2 + error**2).sqrt()
        return log_evidence, source, ess, optimised, amortised, approximation_error, difference.error().to(error)

    def run(rows: Data, observed: Tensor | None) -> InferenceGaps:
        fields = predictive.over_chunks(
            measure,
            rows,
            observed,
            n_weight_draws=n_weight_draws,
            n_latent_draws=min(max(n_latent_draws, N_HELD), BLOCK),
            chunk_size=chunk_size,
            seed=seed,
            progress=progress,
        )
        return InferenceGaps(*fields)  # pyright: ignore[reportArgumentType]

    gaps = run(x, mask)
    gaps = gaps if train_x is None else replace(gaps, train=run(train_x, train_mask))
    warn_of_low_ess(gaps.ess, n_latent_draws, "Give proposal=codes.Laplace(), or n_annealing_steps=500.")
    return gaps
