"""Automatic relevance of code dimensions: a prior precision for each, alternated with training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bayesae import random
from bayesae.codes import CodePosterior, amortised
from bayesae.curvature import Linearisation, ggn_diagonal
from bayesae.data import Data, batches, check_counts
from bayesae.errors import DataError, UnsupportedError
from bayesae.evaluation.pruning import first_linear
from bayesae.functional import check_finite, parameters_of
from bayesae.joint import IndependentNormal, IsotropicNormal
from bayesae.models import Autoencoder
from bayesae.objectives import elbo
from bayesae.subset import Subset
from bayesae.types import Batch, Params, WeightPrior
from bayesae.weights.evidence import Groups, MarginalLikelihood
from bayesae.weights.structures.low_rank import LowRankCurvature

__all__ = ["CodeRelevance", "Relevance", "code_relevance"]


@dataclass(frozen=True)
class Relevance:
    """What `code_relevance` found.

    Args:
        precision: Of each code dimension's column in the decoder's first layer, (Z,).
        n_effective: Weights of the column that the data determine, (Z,), of as many as the layer has outputs.
        is_active: Where data say more of a column than its prior does, (Z,): what `prune_codes` keeps.
        prior: p(theta) over every parameter with these precisions.
        log_evidence: Evidence lower bound with the column's weights integrated out, nats.
    """

    precision: Tensor
    n_effective: Tensor
    is_active: Tensor
    prior: IndependentNormal
    log_evidence: float


@torch.no_grad()
def code_relevance(
    model: Autoencoder,
    data: Data,
    codes: CodePosterior = amortised,
    *,
    weight_prior: WeightPrior | None = None,
    n_latent_draws: int = 1,
    batch_size: int = 128,
    seed: int | None = None,
) -> Relevance:
    r"""Prior precision of every code dimension that maximises the evidence at the present weights.

    .. math:: \lambda_j = \gamma_j / \lVert w_j \rVert^2, \qquad
              \gamma_j = \sum_h \frac{c_{hj}}{c_{hj} + \lambda_j}, \qquad
              c_{hj} = \sum_i \mathbb{E}_{q(z \mid x_i)} (J_i^\top H_i J_i)_{hj, hj}

    with :math:`w_j` (H,) column j of the decoder's first layer, over drawn codes: c is the information of *complete*
    data. Weights and codes are taken as independent, as in variational Bayesian PCA, of which this is the step for
    :math:`\lambda`. The information with codes integrated out will not do here: it goes to 0 with the column, so that
    a column of noise would hold itself up.

    At fixed weights nothing is pruned, because a column has the length it has. Under its new prior training shortens
    what the data do not ask for, and :math:`\lambda_j` runs away: alternate, by `CodeRelevance`.

    Args:
        model: In evaluation mode; the decoder begins with a linear layer.
        data: The rows that train it.
        codes: q(z | x).
        weight_prior: What all other weights keep; N(0, I) if None.
        n_latent_draws: K, for every row.
        batch_size: Rows at a time.
        seed: Of the code draws; None advances the caller's generator.

    Returns:
        Precisions, within 1e-6 and 1e12.

    Exact when: no exact case: it is the stationary point of a bound (q of codes and q of weights independent).
    Biased when: columns of the first layer are correlated given the codes: :math:`\gamma` is then overcounted, which
        prunes a little more.
    Cost: one exact Gauss-Newton diagonal of the decoder over N K codes.

    Raises:
        UnsupportedError: If the decoder begins with another layer or takes a context, or the prior is no Normal.

    References:
        | Bayesian PCA (Bishop, 1999); Variational Principal Components (Bishop, 1999)
        | Bayesian Learning for Neural Networks (Neal, 1996): automatic relevance determination
    """
    check_counts(n_latent_draws=n_latent_draws, batch_size=batch_size)
    prior = IsotropicNormal() if weight_prior is None else weight_prior
    if not isinstance(prior, IsotropicNormal | IndependentNormal):
        raise UnsupportedError("a Normal prior", type(prior).__name__, "Use IsotropicNormal or IndependentNormal.")
    if getattr(model.decoder, "takes_context", False):
        raise UnsupportedError("a decoder of codes alone", "one that takes a context", "Leave the context out.")
    at, first = first_linear(model.decoder)
    params, name = parameters_of(model.network), f"{at}.weight"
    check_finite(params, "weights of the model", "Did fit_model diverge?")
    with random.scope(seed, model.reference.device):
        information, bound = _complete(model, data, codes, params, name, n_latent_draws, batch_size)
    shape = first.weight.shape
    subset = Subset({f"decoder.{name}": torch.ones(shape, dtype=torch.bool)})
    whole = prior.precisions_of(params)
    values = information.flatten()
    curvature = LowRankCurvature(values, values.new_zeros(0, len(values)), subset)
    marginal = MarginalLikelihood(curvature, first.weight.detach().double().flatten(), bound)
    columns = torch.arange(shape[1]).repeat(shape[0])
    groups = Groups("layer", columns, shape[1], tuple(f"code {j}" for j in range(shape[1])))
    precisions, _ = marginal.maximise(groups, whole[f"decoder.{name}"].flatten())
    assert isinstance(precisions, Tensor)  # of several groups
    n_effective = groups.sum(curvature.effective(precisions))
    tuned = whole | {f"decoder.{name}": precisions.reshape(shape)}
    return Relevance(
        precision=precisions.reshape(shape)[0],
        n_effective=n_effective,
        is_active=n_effective > 0.5 * shape[0],
        prior=IndependentNormal(tuned),
        log_evidence=marginal.log_evidence(precisions),
    )


def _complete(
    model: Autoencoder,
    data: Data,
    codes: CodePosterior,
    params: Params,
    name: str,
    n_latent_draws: int,
    batch_size: int,
) -> tuple[Tensor, float]:
    """Information of complete data on the first layer, (H, Z), and the evidence lower bound, nats."""
    decoder = {key.removeprefix("decoder."): leaf for key, leaf in params.items() if key.startswith("decoder.")}
    linearisation = Linearisation(model.decoder, decoder)
    bound_model = model.at({key: leaf[None] for key, leaf in params.items()})
    likelihood = model.likelihood
    information, bound = params[f"decoder.{name}"].double() * 0, 0.0
    for batch in batches(data, model.reference, batch_size=batch_size, is_shuffled=False):
        likelihood.check(batch.explained)
        draws = codes(bound_model, batch, n_latent_draws=n_latent_draws)
        bound += float(elbo(draws).double().sum())
        diagonal = ggn_diagonal(
            linearisation,
            draws.latents.flatten(0, 2),
            likelihood.output_hessian,
            mask=_output_mask(model, batch, n_latent_draws),
        )
        information = information + diagonal[name].double() / n_latent_draws
    return information, bound


def _output_mask(model: Autoencoder, batch: Batch, n_latent_draws: int) -> Tensor | None:
    """Of outputs of K codes a row, as many rows as codes."""
    if batch.mask is None:
        return None
    mask = model.likelihood.output_mask(batch.mask.flatten(1))
    return mask.repeat(n_latent_draws, *[1] * (mask.dim() - 1))


@dataclass(frozen=True)
class CodeRelevance:
    r"""Automatic relevance of code dimensions while training: `fit_model` with ``evidence=`` one of these.

    .. math:: \theta \leftarrow \text{epochs of } \max_\theta \mathcal{L}(\theta) + \log p(\theta \mid \lambda), \qquad
              \lambda_j \leftarrow \gamma_j / \lVert w_j \rVert^2

    After ``burn_in`` epochs, and every ``every`` epochs from then on, `code_relevance` sets the precisions. Columns
    that the data do not need go to 0; `code_relevance` after training says which (``is_active``), and `prune_codes`
    cuts them. Learned noise is estimated by `fit_model` as without it.

    Args:
        codes: The code posterior that `fit_model` trains.
        n_latent_draws: K of the information's average.
        burn_in: Epochs before the first update; early, all columns are noise.
        every: Epochs between updates.

    Exact when: no exact case, as `code_relevance`.
    Biased when: training stops before columns have run down: their number is then too large. A column that is 0 stays
        0 (nearly): a dimension that the start did not find is lost.
    Cost: as `code_relevance`, an update.

    Raises:
        DataError: If ``burn_in`` is negative, or another count below 1.

    References:
        | Bayesian PCA (Bishop, 1999)
    """

    codes: CodePosterior = amortised
    n_latent_draws: int = 1
    burn_in: int = 10
    every: int = 5

    def __post_init__(self) -> None:
        check_counts(n_latent_draws=self.n_latent_draws, every=self.every)
        if self.burn_in < 0:
            raise DataError("burn_in of at least 0", f"{self.burn_in}", "The default is 10 epochs.")

    @property
    def tunes_noise(self) -> bool:
        """False: noise is estimated as without relevance."""
        return False

    def is_due(self, epoch: int) -> bool:
        """Whether to update after this epoch, counted from 0."""
        return epoch + 1 >= max(self.burn_in, 1) and (epoch + 1 - self.burn_in) % self.every == 0

    def update(
        self, model: Autoencoder, data: Data, prior: WeightPrior, *, n_data: int, batch_size: int
    ) -> tuple[WeightPrior, float]:
        """One update at the weights of the moment.

        Args:
            model: In evaluation mode.
            data: The rows it is trained on.
            prior: Of the last epochs.
            n_data: N; sums are over the rows of a pass.
            batch_size: Rows at a time.

        Returns:
            The new prior, and the bound on the log evidence, nats.
        """
        found = code_relevance(
            model, data, self.codes, weight_prior=prior, n_latent_draws=self.n_latent_draws, batch_size=batch_size
        )
        return found.prior, found.log_evidence
