"""`log_evidence`: log p(x) by importance sampling with many codes, streamed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from bayesae import random
from bayesae.codes import CodePosterior, encode
from bayesae.data import Data, check_counts
from bayesae.draws import Draws
from bayesae.errors import UnsupportedError
from bayesae.evaluation.sums import LogEvidence, LogWeights, warn_of_low_ess
from bayesae.families import Mixture, Particles
from bayesae.functional import parameters_of, stack_draws
from bayesae.models import Autoencoder, Bound
from bayesae.predictive import Predictive
from bayesae.types import Batch, Params

__all__ = ["BLOCK", "as_predictive", "blocks", "check_one_noise", "log_evidence", "network_at"]

BLOCK = 128  # codes of a row at once; a constant, because noise is keyed on the block and the row


def log_evidence(
    model: Predictive | Autoencoder,
    x: Data,
    mask: Tensor | None = None,
    *,
    codes: CodePosterior | None = None,
    n_latent_draws: int = 5000,
    n_weight_draws: int | None = None,
    chunk_size: int | None = None,
    seed: int | None = None,
    progress: bool | None = None,
) -> LogEvidence:
    r"""Log p(x | theta) of every row under every weight draw, by importance sampling from the code posterior.

    .. math:: \log \hat p(x \mid \theta) = \log \tfrac1K \sum_{k=1}^K
              \frac{p(x, z_k \mid \theta)}{q(z_k \mid x, \theta)}, \quad z_k \sim q(z \mid x, \theta)

    Args:
        model: A predictive, or an autoencoder at its own weights.
        x: Rows (N, \*data).
        mask: True where x is observed; other entries are not scored.
        codes: q(z | x, theta), the proposal, in place of the predictive's own. `codes.Laplace` is a good one for any
            decoder, and makes models with different encoders comparable.
        n_latent_draws: K.
        n_weight_draws: S; None takes all particles once, or 32 draws of a continuous posterior.
        chunk_size: Network rows in one call, 4096 if None; changes memory, and numbers by rounding only.
        seed: The same seed gives the same estimates; None advances the caller's generator.
        progress: Show a progress bar; None shows it on a terminal only.

    Returns:
        `LogEvidence`, (S, N). It warns where the effective sample size is near one for more than a tenth of the rows.

    Exact when: q is the true posterior, for any K.
    Biased when: K is finite, downwards, by about half the squared standard error. With linearised weights q's
        density is expanded to first order too, so that E[w] = p(x) holds to that order only: ``linearised=False``
        has no such error.
    Cost: S K passes through the decoder a row; memory of one chunk, whatever K.

    Raises:
        UnsupportedError: If the code is deterministic: it has no density.
        DataError: If a count is none, or the rows do not fit the likelihood.
        ShapeError: If rows or mask do not fit.
        NonFiniteError: If a weight is not finite.

    References:
        | Importance Weighted Autoencoders (Burda, Grosse, Salakhutdinov, 2016, https://arxiv.org/abs/1509.00519)
        | Variational Inference via chi Upper Bound Minimization (Dieng et al., 2017): ``cubo``
    """
    predictive = as_predictive(model, codes)
    check_counts(n_latent_draws=n_latent_draws)

    def measure(params: Params, batch: Batch, draw: Callable[[int], Draws]) -> tuple[Tensor, ...]:
        weights = LogWeights()
        for n, block_seed in blocks(n_latent_draws):
            with random.scope(block_seed, batch.x.device):
                weights.add(draw(n).log_ratio)
        return weights.results()

    fields = predictive.over_chunks(
        measure,
        x,
        mask,
        n_weight_draws=n_weight_draws,
        n_latent_draws=min(n_latent_draws, BLOCK),
        chunk_size=chunk_size,
        seed=seed,
        progress=progress,
    )
    fix = "Take more n_latent_draws, codes=codes.Laplace(), or annealed_importance."
    warn_of_low_ess(fields[1], n_latent_draws, fix)
    return LogEvidence(*fields, n_draws=n_latent_draws)  # pyright: ignore[reportArgumentType]


def as_predictive(
    model: Predictive | Autoencoder, codes: CodePosterior | None, *, is_stochastic: bool = True
) -> Predictive:
    """A predictive of what a caller gave.

    Args:
        model: A predictive, or an autoencoder, whose own weights are then the only particle.
        codes: In place of the predictive's own.
        is_stochastic: Whether the code must have a density.

    Returns:
        The predictive.

    Raises:
        UnsupportedError: If its code must have a density and is deterministic.
    """
    if isinstance(model, Autoencoder):
        model = Predictive(model, Particles(stack_draws([parameters_of(model.network)])), codes)
    predictive = model if codes is None else replace(model, codes=codes)
    if is_stochastic and (predictive.codes is None or predictive.codes is encode):
        fix = "Give codes=codes.amortised, or codes.Laplace() on any trained model."
        raise UnsupportedError("codes drawn from a distribution", "a deterministic encoder", fix)
    return predictive


def check_one_noise(predictive: Predictive) -> None:
    """Raise `UnsupportedError` if weight draws have noise of their own, for what evaluates densities by itself."""
    if isinstance(predictive.weights, Mixture) and predictive.weights.has_own_noise:
        fix = "Evaluate the components one by one: Predictive(model, mixture.components[0]), say."
        raise UnsupportedError("one noise for all draws of the weights", "a mixture that learned several", fix)


def network_at(predictive: Predictive, params: Params) -> Bound:
    """The model at weight draws, for what asks it at codes of its own.

    Args:
        predictive: Says whether draws are run as networks.
        params: Weight draws.

    Returns:
        The bound model.

    Raises:
        UnsupportedError: If the predictive linearises its networks.
    """
    if predictive.is_linearised:
        expected, fix = "weight draws that are run as networks", "Give Predictive(..., linearised=False)."
        raise UnsupportedError(expected, "a linearised predictive", fix)
    return predictive.model.at(params)


def blocks(n_latent_draws: int) -> list[tuple[int, int]]:
    """Blocks of K codes, and the seed of each, under the enclosing scope.

    Args:
        n_latent_draws: K.

    Returns:
        Number of codes and seed.
    """
    starts = range(0, n_latent_draws, BLOCK)
    return [(min(BLOCK, n_latent_draws - start), random.derived_seed(start)) for start in starts]
