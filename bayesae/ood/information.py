"""How much rows would tell about the weights, in nats: the mutual information of what they show and theta.

A row's Gram matrix says all of it, and Gram matrices of several rows add up to what they tell together.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bayesae.data import as_tensor
from bayesae.draws import Draws, Moments, fitted_mask
from bayesae.errors import NonFiniteError, ShapeError, UnsupportedError
from bayesae.functional import check_finite
from bayesae.ood.contributions import observed_only
from bayesae.types import BlockHessian, LowRankHessian, OutputHessian

__all__ = ["information_gain", "information_gain_bound", "information_gram", "joint_information"]


def information_gram(draws: Draws, mask: Tensor | np.ndarray | None = None) -> Tensor:
    r"""How a row's outputs differ between weight draws, measured by the noise: what `joint_information` adds up.

    .. math:: G_{st} = \tfrac1S (f_s - \bar f)^\top H (f_t - \bar f), \qquad \bar f = \tfrac1S \sum_s f_s

    with :math:`f_s` (O,) the natural parameters under weight draw s, averaged over code draws, and H (O, O) the
    likelihood's ``output_hessian`` at :math:`\bar f`: 1 / noise variance on the diagonal for Gaussian noise. Nothing of
    size (O, O) is formed.

    Rows in chunks have Gram matrices that belong together only if all chunks met the same weights: give the predictive
    the same seed for each, ``torch.cat([information_gram(predictive(part, seed=0, keep_outputs=True)) for part in
    x.split(256)])``.

    Args:
        draws: Draws of the predictive, S > 1, with outputs: ``predictive(x, keep_outputs=True)``.
        mask: True where a number of the data counts, (B, \*data): what the others would show tells nothing then. None
            counts what the draws were made from: all numbers, or those that were observed.

    Returns:
        G, (B, S, S), positive semi-definite, float64.

    Exact when: noise is Gaussian and does not depend on the outputs; else it is of second order in their spread.
    Biased when: the code is stochastic: its own variance, which hides part of the weights', is averaged away.
    Cost: S² O products a row; memory of two copies of the averaged outputs, and S² numbers a row.

    Raises:
        UnsupportedError: If the draws came without outputs, or there is one weight draw only.
        NonFiniteError: If an output or the likelihood's Hessian is not finite.
        ShapeError: If the mask does not fit the outputs.
    """
    if draws.outputs is None:
        raise UnsupportedError("draws with outputs", "draws without", "Use predictive(x, keep_outputs=True).")
    if draws.outputs.shape[1] < 2:
        raise UnsupportedError("at least two weight draws", "one", "One network cannot disagree with itself.")
    outputs = draws.outputs.mean(0, dtype=torch.float64)
    centre = outputs.mean(0)
    apart = (outputs - centre).transpose(0, 1)
    mask = draws.mask if mask is None else mask
    if mask is not None:
        shape = (outputs.shape[1], *draws.likelihood.data_shape(outputs.shape[2:]))
        counts = draws.likelihood.output_mask(fitted_mask(as_tensor(mask), shape).to(outputs.device))
        apart = torch.where(counts.reshape(centre.shape)[:, None], apart, 0.0)
    gram = _products(apart, draws.likelihood.output_hessian(centre)) / len(outputs)
    check_finite({"gram": gram}, "outputs and Hessians", "Is the noise variance 0?")
    return gram


def _products(rows: Tensor, hessian: OutputHessian) -> Tensor:
    r"""All products r H r' of rows (B, S, \*O): (B, S, S)."""
    if isinstance(hessian, BlockHessian):
        grouped = rows.movedim(hessian.axis + 1, -1)
        blocks = hessian.values.double()[:, None]
        return _inner((blocks @ grouped[..., None])[..., 0], grouped)
    if isinstance(hessian, LowRankHessian):
        narrow = rows.flatten(2) @ hessian.factor.double().flatten(2).mT
        dense = narrow @ narrow.mT
        return dense if hessian.diagonal is None else dense + _products(rows, hessian.diagonal)
    return _inner(rows * (hessian if hessian.dim() == 0 else hessian[:, None]).double(), rows)


def _inner(left: Tensor, right: Tensor) -> Tensor:
    r"""Products of rows (B, S, \*O) with rows: (B, S, S)."""
    return left.flatten(2) @ right.flatten(2).mT


def joint_information(grams: Tensor | np.ndarray) -> Tensor:
    r"""How much observing n rows together would tell about the weights.

    .. math:: I[x_1, \dots, x_n; \theta] = \tfrac12 \log\det\Big(I_S + \sum_{i=1}^n G_i\Big)

    It is at most the sum of what each row tells alone: what two rows both tell counts once.

    Args:
        grams: Of the rows, under the same weight draws, (..., n, S, S): `information_gram`.

    Returns:
        (...), nats.

    Exact when: outputs are Normal with the covariance that the draws have, and noise is Gaussian.
    Biased when: S is finite: the draws' outputs span S - 1 directions, and the expectation is low (log det is concave).
        For a law that is not Normal (an ensemble's members) with Gaussian noise it is an upper bound: the Normal one
        of a covariance tells most. One of S members can never tell more than log S.
    Cost: one Cholesky factor (S, S).

    Raises:
        ShapeError: If the matrices are not square or the axis of the rows is missing.
        NonFiniteError: If they are not finite, or not positive semi-definite.
    """
    grams = as_tensor(grams)
    if grams.dim() < 3 or grams.shape[-1] != grams.shape[-2]:
        raise ShapeError("Gram matrices (..., n, S, S)", f"{tuple(grams.shape)}", "Use ood.information_gram(draws).")
    check_finite({"grams": grams}, "Gram matrices", "Look at the rows that they are of.")
    total = grams.double().sum(-3)
    factor, failed = torch.linalg.cholesky_ex(total + torch.eye(total.shape[-1]).to(total))
    if bool((failed > 0).any()):
        raise NonFiniteError("positive semi-definite Gram matrices", "one that is not", "Use ood.information_gram.")
    return factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def information_gain(draws: Draws, mask: Tensor | np.ndarray | None = None) -> Tensor:
    r"""How much observing each row's outputs would tell about the weights, :math:`I[x; \theta \mid D]`.

    .. math:: \tfrac12 \log\det (I_S + G) = \tfrac12 \log\det (I_O + \operatorname{Cov}_\theta[f]\, H)

    with G of `information_gram`. It asks how far the weights disagree about the row and never looks at the row's own
    values, but through the code. As a score it is higher for what the weights know less about.

    Args:
        draws: Draws of the predictive, S > 1, with outputs: ``predictive(x, keep_outputs=True)``.
        mask: As for `information_gram`: rows that were seen in part are scored on what was seen, unless it says other.

    Returns:
        (B,), nats.

    Exact when: outputs are Normal with the covariance that the draws have (a linearised Laplace posterior, as S grows)
        and noise is Gaussian.
    Biased when: as `joint_information` is, and for other likelihoods of second order in the spread of the outputs: of
        one binary number it then is the mutual information H[mean p] - mean H[p] to first order in their variance.
    Cost: that of the Gram matrix and one Cholesky factor (S, S) a row.

    Raises:
        UnsupportedError: If the draws came without outputs, or there is one weight draw only.
        NonFiniteError: If an output or the likelihood's Hessian is not finite.
        ShapeError: If the mask does not fit the outputs.

    References:
        | Information-Based Objective Functions for Active Data Selection (MacKay, 1992)
        | Bayesian Active Learning for Classification and Preference Learning (Houlsby, Huszar, Ghahramani, Lengyel,
          2011)
    """
    return joint_information(information_gram(draws, mask)[:, None])


def information_gain_bound(moments: Moments, mask: Tensor | np.ndarray | None = None) -> Tensor:
    r"""What a row's numbers would tell about the weights if each told something else: an upper bound, without draws.

    .. math:: \tfrac12 \sum_o \log\Big(1 + \frac{w_o}{n_o}\Big) \ge I[x; \theta \mid D]
              \qquad \text{(Hadamard's inequality)}

    with w the variance due to the weights and n the noise variance. Numbers of a row share weights, so that the bound
    is far above `information_gain` where there are many more of them than directions in which the weights are
    uncertain.

    Args:
        moments: Moments of the predictive at the rows.
        mask: True where a number counts, (B, \*data); None counts all.

    Returns:
        (B,), nats.

    Exact when: the outputs of a row are uncorrelated under the weight posterior, and Normal with Gaussian noise.
    Biased when: noise is not Gaussian: it then is of second order in the spread and no bound. Moments of one network
        have no variance due to the weights, and cannot say that they are of one: they give 0.

    Raises:
        UnsupportedError: If data are classes without an order, whose indicators are not independent.
        NonFiniteError: If a number without noise has a variance due to the weights.
        ShapeError: If the mask does not fit the moments.
    """
    if moments.likelihood.is_nominal:
        raise UnsupportedError("numbers with a noise of their own", "classes without an order", "Use information_gain.")
    ratio = torch.where(moments.weights == 0, 0.0, moments.weights.double() / moments.noise.double())
    ratio = observed_only(ratio, mask)
    check_finite({"weights / noise": ratio}, "variance ratios", "A number without noise settles its weights at once.")
    return 0.5 * torch.log1p(ratio).reshape(len(ratio), -1).sum(1)
