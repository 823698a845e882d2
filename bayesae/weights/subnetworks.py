"""Which weights to keep uncertain: rules that choose a sub-network, and what a choice keeps of the predictive variance.

Whole parts need no rule: ``Subset.of(network, ["decoder.**"])``, ``["**.bias"]`` and so on.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bayesae.curvature import Linearisation, ggn_block, ggn_diagonal
from bayesae.errors import DataError, ParameterError, UnsupportedError
from bayesae.families import DenseNormal
from bayesae.families.base import Normal
from bayesae.functional import check_finite, parameters_of
from bayesae.joint import IndependentNormal, IsotropicNormal
from bayesae.subset import Subset
from bayesae.types import Params, WeightPosterior
from bayesae.weights.laplace import Laplace

__all__ = [
    "VarianceKept",
    "largest_magnitude",
    "largest_predictive_share",
    "largest_variance",
    "last_layer",
    "random_weights",
    "reference_laplace",
    "share_of_variance_kept",
]

_ROUNDING = 1e-6  # of the prior's variance: less of a shrinkage is that of a float32 sum
_DIFFERENCE = 1e-3  # between precisions of one weight: more is no rounding of a float32 sum


def largest_variance(
    posterior: WeightPosterior,
    n_weights: int,
    *,
    within: Subset | None = None,
    prior: IsotropicNormal | IndependentNormal | None = None,
) -> Subset:
    r"""The weights with the largest marginal variance: the sub-network of Daxberger et al.

    Under a posterior with independent weights, the squared Wasserstein distance to the one that fixes all weights
    outside S at their mean is

    .. math:: W_2^2 = \sum_{d \notin S} \sigma_d^2,

    so that these weights lie closest to it. Any fitted Normal will do: diagonal Laplace is the usual choice.

    **Variance is not influence.** Under one prior precision for all, a diagonal Laplace posterior's
    :math:`\sigma_d^2 = T / (G_{dd} + \lambda)` ranks weights by how *little* they move the outputs of the training
    rows, whatever lambda is. First come those that no datum has touched (of a pixel that is always 0, a dead unit):
    ties at the prior's variance, of which autoencoders of images have many. ``prior`` leaves these out, and those
    that come next matter hardly more; `largest_predictive_share` goes by influence (recipes/subnetwork_gap.py).

    Args:
        posterior: Where the variances come from; its covariances are not read.
        n_weights: Size of the sub-network, 0 to the number of candidates.
        within: Candidates; the posterior's own uncertain weights by default.
        prior: p(theta) that the posterior was fitted with: weights that still have its variance, to 1e-6, are no
            candidates. Of a `Laplace` that tuned one number it is
            ``IsotropicNormal(posterior.info["prior_precision"])``. None takes all.

    Returns:
        The choice. Of equal variances the first in the order of the parameters come first.

    Exact when: the posterior has independent weights; then no other choice of this size has a smaller distance.
    Biased when: weights are correlated, or dead.
    Cost: a sort of P numbers.

    Raises:
        DataError: If there are fewer candidates than ``n_weights``.
        UnsupportedError: If the posterior is no Normal.

    References:
        | Bayesian Deep Learning via Subnetwork Inference (Daxberger et al., 2021), section 4
    """
    posterior = _normal(posterior)
    variances = posterior.variances()
    within = posterior.subset if within is None else within
    within.check(variances)
    if prior is not None:
        within = _touched(posterior, variances, within, prior)
    return _strongest(variances, n_weights, within)


@torch.no_grad()
def largest_predictive_share(
    posterior: WeightPosterior, network: nn.Module, x: Tensor, n_weights: int, *, within: Subset | None = None
) -> Subset:
    r"""The weights that move the outputs most under independent weights.

    .. math:: s_d = \sigma_d^2 \sum_{b, o} J_{b,o,d}^2,

    the share of weight d in the variance of all outputs, linearised, summed over rows and outputs.

    Args:
        posterior: Where variances and the mode come from.
        network: Maps x to outputs, as in `Normal.output_variance`: ``model.network``.
        x: Rows on which the variance counts, (N, \*data): what the network takes (``model.inputs(batch)``).
        n_weights: Size of the sub-network, 0 to the number of candidates.
        within: Candidates; the posterior's own uncertain weights by default.

    Returns:
        The choice. A weight without influence comes after all that have any.

    Exact when: weights are independent under the posterior: no other choice of this size keeps more variance.
    Biased when: they are correlated: two weights that do the same count twice.
    Cost: one exact diagonal, a few forward and backward passes, and a sort of P numbers.

    Raises:
        DataError: If there are fewer candidates than ``n_weights``.
        UnsupportedError: If the posterior is no Normal.

    References:
        | Departure from Daxberger et al. (2021): variance of the outputs, not of the weights
    """
    posterior = _normal(posterior)
    linearisation = Linearisation(network, posterior.mean)
    squares = ggn_diagonal(linearisation, x, _identity)
    variances = posterior.variances()
    scores = {name: value.double() * variances[name].double() for name, value in squares.items()}
    return _strongest(scores, n_weights, posterior.subset if within is None else within)


def largest_magnitude(module: nn.Module, n_weights: int, *, within: Subset | None = None) -> Subset:
    """The weights that are largest in absolute value: a baseline from pruning.

    Args:
        module: Gives weights and names: ``model.network``.
        n_weights: Size of the sub-network, 0 to the number of candidates.
        within: Candidates; every trainable weight by default.

    Returns:
        The choice.

    No exact case: magnitude says nothing of uncertainty.
    Cost: a sort of P numbers.

    Raises:
        DataError: If there are fewer candidates than ``n_weights``.
    """
    sizes = {name: leaf.abs() for name, leaf in parameters_of(module).items()}
    return _strongest(sizes, n_weights, Subset.of(module) if within is None else within)


def random_weights(module: nn.Module, n_weights: int, *, seed: int, within: Subset | None = None) -> Subset:
    """Weights at random: the baseline that a rule has to beat.

    Args:
        module: Gives names and shapes: ``model.network``.
        n_weights: Size of the sub-network, 0 to the number of candidates.
        seed: The choice is a function of it; of one seed, smaller choices are parts of larger ones.
        within: Candidates; every trainable weight by default.

    Returns:
        The choice.

    No exact case: it is a baseline.
    Cost: P random numbers.

    Raises:
        DataError: If there are fewer candidates than ``n_weights``.
    """
    generator = torch.Generator().manual_seed(seed)
    scores = {name: torch.rand(leaf.shape, generator=generator) for name, leaf in parameters_of(module).items()}
    return _strongest(scores, n_weights, Subset.of(module) if within is None else within)


def last_layer(module: nn.Module) -> Subset:
    """All trainable weights of the last layer that has any, in the order in which layers were registered.

    Args:
        module: ``model.network``, whose last layer is the decoder's.

    Returns:
        The choice, whole tensors.

    Exact when: the network is linear in everything else, or only its last layer is uncertain.
    Cost: none.

    Raises:
        ParameterError: If no parameter is trainable.

    References:
        | Learnable Uncertainty under Laplace Approximations (Kristiadi, Hein, Hennig, 2021): last-layer Laplace
    """
    masks = Subset.of(module).masks
    *_, last = (name.rpartition(".")[0] for name in masks)
    return Subset({name: mask for name, mask in masks.items() if name.rpartition(".")[0] == last})


def reference_laplace(module: nn.Module, *, max_dense: int = 5000, tunes_prior: bool = True) -> Laplace:
    """The finest Laplace posterior of all weights in reach: what a sub-network is compared with.

    Args:
        module: ``model.network``.
        max_dense: The most trainable weights for a dense posterior, whose matrix of this size takes 200 MB and
            half a minute of a processor; above it Kronecker factors stand in.
        tunes_prior: As for `Laplace`.

    Returns:
        ``Laplace("dense")`` or ``Laplace("kronecker")``, for `fit_weights`.

    Exact when: it is dense.
    Cost: of the structure.
    """
    return Laplace("dense" if len(Subset.of(module)) <= max_dense else "kronecker", tunes_prior=tunes_prior)


@dataclass(frozen=True)
class VarianceKept:
    """What a sub-network keeps of the predictive variance.

    Args:
        share: Of the variance of all outputs, linearised, summed over rows.
        is_exact: Whether the posterior that it is a share of is dense; else its own variance is an approximation.
        n_weights: Size of the sub-network.
    """

    share: float
    is_exact: bool
    n_weights: int


@torch.no_grad()
def share_of_variance_kept(sub: WeightPosterior, full: WeightPosterior, network: nn.Module, x: Tensor) -> VarianceKept:
    r"""How much of the predictive variance is left when only some weights are uncertain.

    .. math:: \frac{\sum_{b,o} J_{b,o,S} \Sigma_S J_{b,o,S}^\top}{\sum_{b,o} J_{b,o} \Sigma J_{b,o}^\top}

    For dense posteriors :math:`\Sigma_S = (\Lambda_{SS})^{-1}` is what :math:`\Sigma` becomes when the weights outside
    S are known, and knowing more weights can only take variance away: the share lies in [0, 1] and grows with S.

    Args:
        sub: Posterior over the sub-network.
        full: Posterior over all weights, or over more than the sub-network; of the same mode, data and prior. See
            `reference_laplace`.
        network: Maps x to outputs: ``model.network``.
        x: Rows on which it is measured, (N, \*data): what the network takes.

    Returns:
        The share, between 0 and 1 if ``full`` is dense and ``sub`` the same with fewer weights.

    Exact when: ``full`` is dense (``is_exact``).
    Biased when: it is not. On an autoencoder of digits a diagonal posterior had 2.1 times the dense one's variance
        (recipes/subnetwork_gap.py); elsewhere it may have less.
    Cost: an output variance of the rows for each; of a dense posterior one dense curvature of the rows.

    Raises:
        ParameterError: If they differ in mode, a weight is uncertain in ``sub`` alone, or both are dense and give it
            different precisions.
        DataError: If ``full`` gives the outputs no variance at all.
        UnsupportedError: If one of them is no Normal.
    """
    sub, full = _normal(sub), _normal(full)
    _check_comparable(sub, full)
    kept, whole = (_total_variance(p, network, x) for p in (sub, full))
    if whole == 0:
        raise DataError("a posterior under which outputs vary", "no variance", "Give all weights and other rows.")
    return VarianceKept(kept / whole, isinstance(full, DenseNormal), len(sub.subset))


def _normal(posterior: WeightPosterior) -> Normal:
    if not isinstance(posterior, Normal):
        got = type(posterior).__name__
        raise UnsupportedError("a Normal posterior, which has variances", got, "Fit Laplace(), say.")
    return posterior


def _total_variance(posterior: Normal, network: nn.Module, x: Tensor) -> float:
    """Summed over rows and outputs."""
    if not isinstance(posterior, DenseNormal):
        return float(posterior.output_variance(network, x)[1].double().sum())
    # Tr S sum_b J_b^T J_b asks for P^2 operations where a variance of every output asks for P^2 an output; in float64,
    # because strong directions of the one are weak ones of the other and their products cancel
    covariance = posterior.covariance()
    linearisation = Linearisation(network, {name: leaf.double() for name, leaf in posterior.mean.items()})
    squares = ggn_block(linearisation, x, _identity, covariance.masks)
    return float((covariance.matrix * squares).sum())


def _identity(outputs: Tensor) -> Tensor:
    """A Hessian under which a curvature is the sum of products of derivatives."""
    return outputs.new_ones(())


def _check_comparable(sub: Normal, full: Normal) -> None:
    alone = [
        name
        for name, mask in sub.subset.masks.items()
        if bool((mask.cpu() & ~full.subset.masks.get(name, torch.zeros_like(mask)).cpu()).any())
    ]
    is_same_mode = sub.mean.keys() == full.mean.keys() and all(
        torch.equal(leaf, full.mean[name]) for name, leaf in sub.mean.items()
    )
    if alone or not is_same_mode:
        got = f"weights of {alone} uncertain in the sub-network alone" if alone else "two modes"
        raise ParameterError("a part of the weights of the full posterior", got, "Fit both to one model.")
    if isinstance(sub, DenseNormal) and isinstance(full, DenseNormal):
        zeros = {name: torch.zeros_like(leaf, dtype=torch.float64) for name, leaf in full.mean.items()}
        expected = sub.subset.ravel(full.subset.scatter(full.precision.diagonal(), zeros))
        if not torch.allclose(sub.precision.diagonal(), expected, rtol=_DIFFERENCE, atol=0):
            fix = "Fit both to the same data, the sub-network with the full one's prior and tunes_prior=False."
            raise ParameterError("one precision of the weights that both have", "two", fix)


def _touched(
    posterior: Normal, variances: Params, within: Subset, prior: IsotropicNormal | IndependentNormal
) -> Subset:
    """Candidates of which the data say anything: the posterior's precision exceeds the prior's."""
    temperature = posterior.info.get("temperature", 1.0)
    share = within.ravel(variances).double() * within.ravel(prior.precisions_of(posterior.mean)) / temperature
    return within.take((share < 1 - _ROUNDING).nonzero()[:, 0])


def _strongest(scores: Params, n_weights: int, within: Subset) -> Subset:
    within.check(scores)
    values = within.ravel(scores)
    check_finite({"scores": values}, "scores of weights", "Did the training diverge?")
    try:
        n = operator.index(n_weights)  # numpy's whole numbers too
    except TypeError:
        n = -1
    if not 0 <= n <= len(values):
        fix = "A share f of the weights is int(f * len(subset)); more need more candidates."
        raise DataError(f"n_weights, a whole number of 0 to {len(values)}", repr(n_weights), fix)
    # stable, so that equal scores do not depend on the machine
    return within.take(values.sort(descending=True, stable=True).indices[:n])
