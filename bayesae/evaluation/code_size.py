r"""Which code size? The evidence of a decoder with codes integrated out, by Laplace over its weights.

With :math:`\theta` the P weights of the decoder and :math:`\theta_*` their mode,

.. math:: \log p(D) \approx \sum_{i=1}^N \log p(x_i \mid \theta_*) + \log p(\theta_*) + \log V
          + \tfrac{P - r}{2} \log 2\pi - \tfrac12 \log\det{}_{\!\perp} (G + \Lambda_0), \qquad
          G = -\nabla^2 \sum_i \log p(x_i \mid \theta_*)

**Encoder weights do not appear.** Once z is integrated out they are parameters of a proposal: they change how well
log p(x | theta) is estimated and not what it is. A posterior over them belongs to the plain autoencoder, whose code has
seen x (`bayesae.Evidence`).

**Flat directions.** p(z) = N(0, I) is the same in every rotation of the code, so that :math:`W_1 R` for the first
layer :math:`W_1` (H, Z) and any orthogonal R (with the encoder turned along) is the same model, and under a prior of
one precision for all of :math:`W_1` equally probable: r = Z (Z - 1) / 2 directions along which neither likelihood nor
prior falls. A Hessian is singular there and Laplace's formula infinite. They are taken out of the determinant (the sign
:math:`\perp`) and what they hold is added as what it is, the volume of the orbit of :math:`W_1`,

.. math:: V = \operatorname{Vol} O(Z) \prod_{j < k} \sqrt{l_j^2 + l_k^2}, \qquad
          \operatorname{Vol} O(Z) = \prod_{j=0}^{Z-1} \frac{2 \pi^{(j+1)/2}}{\Gamma((j+1)/2)}

with l the singular values of :math:`W_1`: Minka's Laplace evidence of PCA has the same factor (a Stiefel manifold).
Signs and orders of code dimensions are in O(Z). Where columns of :math:`W_1` have precisions of their own
(`code_relevance`) the prior itself picks the rotation, r = 0, and V = 2^Z counts the signs. Hidden units that change
places, or signs, multiply every code size's evidence alike and are left out.

**Noise** is taken as the likelihood has it (its maximum-likelihood value after `fit_model`) and is not counted among
the parameters: of one scale, its own factor is nearly the same for every code size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from bayesae import random
from bayesae.codes import CodePosterior, amortised
from bayesae.data import Data, batches, check_counts
from bayesae.errors import NonFiniteError, UnsupportedError
from bayesae.evaluation.integrated import Integrated, effective_size, squared_error
from bayesae.evaluation.pruning import first_linear
from bayesae.evaluation.sums import warn_of_low_ess
from bayesae.functional import check_finite
from bayesae.joint import IndependentNormal, IsotropicNormal
from bayesae.models import Autoencoder

__all__ = ["IntegratedEvidence", "integrated_evidence"]

Structure = Literal["dense", "outer_product", "diagonal"]

_MAX_WEIGHTS = 8192  # of a (P, P) matrix, half a gigabyte
_DEAD = 1e-2  # a column shorter than a tenth of the prior's standard deviation of one weight has no orbit of its own
_TOLERANCE, _MAX_STEPS = 1e-10, 500


@dataclass(frozen=True)
class IntegratedEvidence:
    r"""What `integrated_evidence` found; all sums are over the rows, nats.

    Args:
        log_evidence: log p(D), the sum of what follows and :math:`\tfrac{P - r}{2} \log 2\pi`.
        log_likelihood: :math:`\sum_i \log \hat p(x_i \mid \theta_*)`.
        standard_error: Of the log-likelihood, from the code draws; its bias is about minus half its square.
        log_prior: :math:`\log p(\theta_*)`.
        log_det: :math:`\log\det_\perp (G + \Lambda_0)`.
        log_orbit: log V; 0 with "diagonal".
        prior: p(theta) over every parameter, tuned where that was asked for: for `fit_model` to go on with.
        n_weights: P.
        n_flat: r.
        n_effective: Weights that the data determine, rotations included.
        ess: Effective sample size of the code draws, (N,).
    """

    log_evidence: float
    log_likelihood: float
    standard_error: float
    log_prior: float
    log_det: float
    log_orbit: float
    prior: IsotropicNormal | IndependentNormal
    n_weights: int
    n_flat: int
    n_effective: float
    ess: Tensor


def integrated_evidence(
    model: Autoencoder,
    data: Data,
    codes: CodePosterior = amortised,
    *,
    n_latent_draws: int = 64,
    structure: Structure = "dense",
    weight_prior: IsotropicNormal | IndependentNormal | None = None,
    tunes_prior: bool = False,
    batch_size: int = 64,
    seed: int | None = None,
) -> IntegratedEvidence:
    r"""Log evidence of a variational autoencoder's decoder, with its codes integrated out; the module has the formula.

    Of :math:`G` the structure keeps

    ================  ==========================================================================================
    "dense"           the observed information by Louis' identity, (P, P): the Hessian of the estimated log-likelihood
    "outer_product"   :math:`\sum_i s_i s_i^\top` with scores :math:`s_i = \nabla \log p(x_i \mid \theta)` by Fisher's
                      identity: never indefinite, but of N terms for P weights
    "diagonal"        its diagonal, for any P
    ================  ==========================================================================================

    Args:
        model: A trained model: the mode under ``weight_prior``, with its noise.
        data: The rows that trained it, x alone, (N, \*data), or anything of `bayesae.data.Data`.
        codes: q(z | x), the proposal.
        n_latent_draws: K.
        structure: A name from the table.
        weight_prior: p(theta) that trained it; N(0, I) if None, as in `fit_model`.
        tunes_prior: Whether one precision for all decoder weights is set to the maximum of the evidence at these
            weights, :math:`\lambda = \gamma / \lVert\theta\rVert^2` with :math:`\gamma` = ``n_effective``. The weights
            are then no mode under it, until they are trained to ``.prior``.
        batch_size: Rows at a time.
        seed: Of the code draws; None advances the caller's generator.

    Returns:
        The evidence and its parts. It warns where the effective sample size is near 1 for a tenth of the rows.

    Exact when: no exact case: Laplace's error is O(1 / N). Of a linear decoder with Gaussian noise and q the true
        posterior, log-likelihoods are exact for any K, scores (and with them "outer_product" and "diagonal") for an
        even K of at least 4 Z, and "dense" is to its Monte-Carlo error, of which a share of about 1 / K is bias.
    Biased when: N is not many times P: "outer_product" is then too small (under-estimated penalties, large codes:
        about P^2 / 4N nats). "diagonal" over-states the determinant, leaves rotations to the prior, and with it sees no
        cost in a column that is 0: a code that training has switched off is free, and equal evidences are to be read
        as the smaller code. Outer products of K unmatched draws contain 1 / ESS of what codes hide. Where a column of
        W_1 is about as short as its posterior is wide, Laplace fails for any structure: the model is singular there.
    Cost: "dense" P Hessian columns of N K codes; the others a gradient a row.

    Raises:
        UnsupportedError: If a structure is unknown, or there are more than 8192 weights for a (P, P) matrix; if codes
            have no density.
        NonFiniteError: If the information is not positive definite: the weights are no mode.
        NotFittedError: If noise was never estimated.

    References:
        | A Practical Bayesian Framework for Backpropagation Networks (MacKay, 1992)
        | Finding the Observed Information Matrix when Using the EM Algorithm (Louis, 1982)
        | Automatic Choice of Dimensionality for PCA (Minka, 2000): the orbit, for PCA in closed form
    """
    check_counts(n_latent_draws=n_latent_draws, batch_size=batch_size)
    if structure not in get_args(Structure):
        expected = f"structure, one of {list(get_args(Structure))}"
        raise UnsupportedError(expected, repr(structure), "'dense' is the best for few weights.")
    prior = IsotropicNormal() if weight_prior is None else weight_prior
    if not isinstance(prior, IsotropicNormal | IndependentNormal):
        raise UnsupportedError("a Normal prior", type(prior).__name__, "Use IsotropicNormal or IndependentNormal.")
    integrated = Integrated.of(model, codes, n_latent_draws)
    n_weights = len(integrated.subset)
    if structure != "diagonal" and n_weights > _MAX_WEIGHTS:
        expected = f"at most {_MAX_WEIGHTS} decoder weights for {structure!r}"
        raise UnsupportedError(expected, f"{n_weights}", "Use structure='diagonal'.")
    with random.scope(seed, model.reference.device):
        sums = _sum(integrated, data, structure, batch_size)
    check_finite({"G": sums.information}, "information", "Did the training diverge?")
    warn_of_low_ess(sums.ess[None], n_latent_draws, "Use a better q (codes.Laplace(), say) or more draws.")
    orbit = _Orbit(n_weights, integrated.theta.new_zeros(n_weights, 0), 0.0)
    precisions = integrated.subset.ravel(prior.precisions_of(integrated.params)).double()
    if tunes_prior:
        precisions = torch.full_like(precisions, n_weights / float((integrated.theta.double() ** 2).sum()))
    if structure != "diagonal":
        orbit = _Orbit.of(integrated, precisions)
    theta = integrated.theta.double()
    if tunes_prior:
        precision = _tuned(orbit.spectrum(sums.information), theta, orbit.n_flat, float(precisions[0]))
        precisions, prior = torch.full_like(precisions, precision), IsotropicNormal(precision)
        orbit = orbit if structure == "diagonal" else _Orbit.of(integrated, precisions)
    log_det, n_lost = orbit.log_det(sums.information, precisions)
    log_prior = 0.5 * float((precisions / (2 * math.pi)).log().sum() - (precisions * theta**2).sum())
    n_flat = orbit.n_flat
    value = sums.log_likelihood + log_prior + orbit.log_volume
    value += 0.5 * (n_weights - n_flat) * math.log(2 * math.pi) - 0.5 * log_det
    return IntegratedEvidence(
        log_evidence=value,
        log_likelihood=sums.log_likelihood,
        standard_error=sums.error,
        log_prior=log_prior,
        log_det=log_det,
        log_orbit=orbit.log_volume,
        prior=prior,
        n_weights=n_weights,
        n_flat=n_flat,
        n_effective=n_weights - n_lost,
        ess=sums.ess,
    )


@dataclass(frozen=True)
class _Sums:
    log_likelihood: float
    error: float
    information: Tensor  # (P, P) or (P,)
    ess: Tensor


def _sum(integrated: Integrated, data: Data, structure: Structure, batch_size: int) -> _Sums:
    model, total, square = integrated.model, 0.0, 0.0
    information: Tensor | float = 0.0
    ess = []
    for batch in batches(data, model.reference, batch_size=batch_size, is_shuffled=False):
        model.likelihood.check(batch.explained)
        draws = integrated.draw(batch)
        with torch.no_grad():
            log_weights = integrated.log_weights(integrated.theta, draws, batch).double()
        draws = integrated.matched(batch)
        total += float((log_weights.logsumexp(0) - math.log(len(log_weights))).sum())
        square += squared_error(log_weights)
        ess.append(effective_size(log_weights))
        if structure == "dense":
            information = information + integrated.information(draws, batch).detach().double()
        else:
            scores = integrated.scores(draws, batch).detach().double()
            information = information + (scores.mT @ scores if structure == "outer_product" else (scores**2).sum(0))
    assert isinstance(information, Tensor)  # batches gives one at least
    return _Sums(total, max(square, 0.0) ** 0.5, information, torch.cat(ess))


@dataclass(frozen=True)
class _Orbit:
    """Directions in which neither likelihood nor prior changes.

    Args:
        n_weights: P.
        tangents: Orthonormal, (P, r).
        log_volume: log V, nats.
    """

    n_weights: int
    tangents: Tensor
    log_volume: float

    @property
    def n_flat(self) -> int:
        return self.tangents.shape[1]

    @classmethod
    def of(cls, integrated: Integrated, precisions: Tensor) -> _Orbit:
        """Of rotations of the code, or of its signs where the prior does not rotate."""
        n_weights, params = len(integrated.subset), integrated.params
        none = precisions.new_zeros(n_weights, 0)
        try:
            at, _ = first_linear(integrated.model.decoder)
        except UnsupportedError:
            return cls(n_weights, none, 0.0)
        name = f"decoder.{at}.weight"
        if name not in integrated.subset.masks or not _rotates(integrated.model, params[name].shape[1]):
            return cls(n_weights, none, 0.0)
        weight = params[name].double()
        own = integrated.subset.scatter(precisions, params)[name]
        left, values, right = torch.linalg.svd(weight)  # of all Z directions of the code, if they are more than rows
        n_latents, lengths = weight.shape[1], weight.new_zeros(weight.shape[1])
        lengths[: len(values)] = values
        if not bool((own == own.flatten()[0]).all()):
            n_alive = int(((own * weight**2).sum(0) > _DEAD).sum())
            return cls(n_weights, none, n_alive * math.log(2))
        is_dead = lengths**2 * float(own.flatten()[0]) < _DEAD
        n_alive = n_latents - int(is_dead.sum())
        zeros = {key: torch.zeros_like(leaf, dtype=torch.float64) for key, leaf in params.items()}
        columns, log_volume = [], _log_volume(n_latents) - _log_volume(n_latents - n_alive)
        for j in range(n_alive):
            for k in range(j + 1, n_latents):
                tangent = lengths[j] * torch.outer(left[:, j], right[k])
                if k < len(values):
                    tangent = tangent - lengths[k] * torch.outer(left[:, k], right[j])
                length = float(lengths[j] ** 2 + lengths[k] ** 2) ** 0.5
                log_volume += math.log(length)
                columns.append(integrated.subset.ravel(zeros | {name: tangent / length}))
        return cls(n_weights, torch.stack(columns, 1) if columns else none, log_volume)

    def spectrum(self, information: Tensor) -> Tensor:
        """Eigenvalues of G across the orbit, (P - r,)."""
        if information.dim() == 1:
            return information
        largest = 2 * float(torch.linalg.matrix_norm(information)) + 1  # puts the orbit's own last
        return torch.linalg.eigvalsh(self._across(information, largest))[: self.n_weights - self.n_flat]

    def log_det(self, information: Tensor, precisions: Tensor) -> tuple[float, float]:
        """Log-determinant across the orbit, and the number of weights that the prior alone settles."""
        if information.dim() == 1:
            total = information + precisions
            return float(total.log().sum()), float((precisions / total).sum())
        prior = torch.diag(precisions)
        root, failed = torch.linalg.cholesky_ex(self._across(information + prior, 1.0))
        if int(failed):
            raise NonFiniteError("a mode: information that is positive definite", "an indefinite one", _NO_MODE)
        lost = torch.cholesky_solve(self._across(prior, 0.0), root).diagonal().sum()
        return float(2 * root.diagonal().log().sum()), float(lost)

    def _across(self, matrix: Tensor, along: float) -> Tensor:
        """A symmetric matrix across the orbit, and ``along`` times the identity on it, (P, P)."""
        tangents = self.tangents
        image = matrix @ tangents
        core = tangents.mT @ image + along * torch.eye(self.n_flat).to(tangents)
        half = image @ tangents.mT
        return matrix - half - half.mT + tangents @ core @ tangents.mT


_NO_MODE = (
    "Train longer (with a falling learning rate) under this prior, draw more codes, or use structure='outer_product'."
)


def _rotates(model: Autoencoder, n_latents: int) -> bool:
    """Whether p(z) is the same in every rotation, as that of N(0, I) is; tried out."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(8, n_latents, generator=generator, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(n_latents, n_latents, generator=generator, dtype=torch.float64)).Q
    plain, turned = (model.log_prior(z.to(model.reference)) for z in (codes, codes @ turn))
    return torch.allclose(plain, turned, rtol=1e-4)


def _log_volume(n: int) -> float:
    """Of O(n), where a rotation of two axes by an angle t has length t: two circles for n = 2."""
    return sum(math.log(2) + 0.5 * j * math.log(math.pi) - math.lgamma(0.5 * j) for j in range(1, n + 1))


def _tuned(values: Tensor, theta: Tensor, n_flat: int, start: float) -> float:
    """The precision at which lambda |theta|^2 = r + sum h / (h + lambda), by its fixed point."""
    square, precision = float((theta**2).sum()), start
    for _ in range(_MAX_STEPS):
        total = values + precision
        if not bool((total > 0).all()):
            raise NonFiniteError("a mode: information that is positive definite", "an indefinite one", _NO_MODE)
        new = (n_flat + float((values / total).sum())) / square
        if abs(new - precision) <= _TOLERANCE * precision:
            return new
        precision = new
    raise NonFiniteError("a maximum of the evidence", f"no end after {_MAX_STEPS} steps", _NO_MODE)
