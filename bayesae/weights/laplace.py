"""Laplace's approximation with the exact diagonal of the generalised Gauss-Newton matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesae.curvature import ggn_diagonal
from bayesae.errors import NotFittedError, UnsupportedError
from bayesae.families import DiagonalNormal
from bayesae.joint import IsotropicNormal, LogJoint
from bayesae.subset import Subset
from bayesae.types import Batch, Params
from bayesae.weights.base import Info

__all__ = ["Laplace", "LaplaceState"]


@dataclass(frozen=True)
class LaplaceState:
    """Sums over the rows seen so far.

    Args:
        params: The mode, every parameter in its own shape.
        subset: The uncertain weights.
        diagonal: Diagonal of the sum of J^T H J over rows, (P,), float64.
        log_likelihood: Sum of log p(x | theta) over rows, nats.
        n_seen: Rows.
    """

    params: Params
    subset: Subset
    diagonal: Tensor
    log_likelihood: float
    n_seen: int


@dataclass(frozen=True)
class Laplace:
    r"""Gaussian posterior over weights by a second-order expansion at the mode, diagonal precision.

    .. math:: q(\theta) = \mathcal{N}(\theta_*, \Lambda^{-1}), \quad
              \Lambda = \tfrac{1}{T} \operatorname{diag}\Big(\sum_{i=1}^N J_i^\top H_i J_i + \lambda I\Big)

    with :math:`J_i` (O, P) the Jacobian of the outputs and :math:`H_i` (O, O) the Hessian of -log p(x_i | outputs).
    Outputs are summed over, N is the number of rows, and nothing is scaled by a batch.

    The prior precision is the one that maximises the evidence at the mode,

    .. math:: \log p(D) \approx \log p(D, \theta_*) + \tfrac{P}{2} \log 2\pi - \tfrac12 \log\det\Lambda,

    the unique root of :math:`\gamma(\lambda) = \lambda \lVert\theta_*\rVert^2` with the effective number of
    weights :math:`\gamma = \sum_p h_p / (h_p + \lambda)`: the left side falls with lambda, the right side rises.

    Args:
        subset: The uncertain weights: a `Subset`, or name patterns as in `Subset.of`; all by default.
        tunes_prior: Whether lambda comes from the evidence, so that the joint's own precision is not read; else
            it is the joint's. The mean stays where training left it either way.

    It leaves a `DiagonalNormal` that is linearised by default: sampling a Laplace posterior through the network itself
    leaves the region where the expansion holds, its best-known failure. Its ``info`` has ``log_evidence`` (at T = 1),
    ``prior_precision`` and ``n_effective``.

    Exact when: the outputs are linear in theta, the likelihood is Gaussian and the columns of the Jacobian are
        orthogonal.
    Biased when: theta_* is not a mode; always over-states certainty along correlated weights, and its
        determinant over-states the evidence's penalty.
    Cost: one forward and about one backward pass of small matrices per batch; memory P.

    Raises:
        UnsupportedError: If a layer has no curvature rule, the prior is not an `IsotropicNormal`, the code is
            stochastic, or there is nothing to tune a prior on (weights all 0, no observed entry).
        NotFittedError: If no row was seen.

    References:
        | A Practical Bayesian Framework for Backpropagation Networks (MacKay, 1992)
        | Laplacian Autoencoders for Learning Stochastic Representations (Miani et al., 2022)
        | Departure: the exact diagonal, with the likelihood's own Hessian and an estimated noise variance.
    """

    subset: Subset | Sequence[str] = ("**",)
    tunes_prior: bool = True

    @property
    def epochs(self) -> int:
        """1: sums over rows."""
        return 1

    def init(self, params: Params, joint: LogJoint) -> LaplaceState:
        """No row seen."""
        if not isinstance(joint.prior, IsotropicNormal):
            raise UnsupportedError("an IsotropicNormal prior", type(joint.prior).__name__, "Give its precision.")
        if not joint.is_deterministic:
            raise UnsupportedError(
                "a deterministic code, so that x gives the outputs", "a stochastic one", "Use codes=codes.encode."
            )
        subset = self.subset if isinstance(self.subset, Subset) else Subset.of(joint.network, self.subset)
        subset.check(params)
        device = next(iter(params.values())).device
        return LaplaceState(params, subset, torch.zeros(len(subset), dtype=torch.float64, device=device), 0.0, 0)

    @torch.no_grad()
    def update(self, state: LaplaceState, batch: Batch, joint: LogJoint) -> tuple[LaplaceState, Info]:
        """Add the rows of one batch."""
        whole = ggn_diagonal(joint.network, state.params, batch.x, joint.likelihood.output_hessian, mask=batch.mask)
        diagonal = state.diagonal + state.subset.ravel(whole).double()
        params = {name: leaf[None] for name, leaf in state.params.items()}
        log_likelihood = float(joint.per_example(params, batch).double().sum())
        n_seen = state.n_seen + len(batch.x)
        new = LaplaceState(state.params, state.subset, diagonal, state.log_likelihood + log_likelihood, n_seen)
        log_prior = float(joint.prior.log_prob(params))
        return new, Info((log_likelihood * joint.n_data / len(batch.x) + log_prior) / joint.temperature)

    def posterior(self, state: LaplaceState, joint: LogJoint) -> DiagonalNormal:
        """The Normal around the mode, with its prior precision and evidence."""
        if state.n_seen == 0:
            raise NotFittedError("at least one batch", "none", "Call update first, or use fit_weights.")
        assert isinstance(joint.prior, IsotropicNormal)
        share = joint.n_data / state.n_seen
        h = state.diagonal * share
        theta = state.subset.ravel(state.params).double()
        square = float(theta @ theta)
        precision = _evidence_precision(h, square) if self.tunes_prior else joint.prior.precision
        log_joint = state.log_likelihood * share + 0.5 * (
            len(theta) * math.log(precision / (2 * math.pi)) - precision * square
        )
        info = {
            "prior_precision": precision,
            "n_effective": float((h / (h + precision)).sum()),
            "log_evidence": log_joint
            + 0.5 * (len(theta) * math.log(2 * math.pi) - float(torch.log(h + precision).sum())),
        }
        var = joint.temperature / (h + precision)
        return DiagonalNormal(state.params, var, state.subset, is_linearised=True, info=info)


def _evidence_precision(h: Tensor, square: float) -> float:
    """Root of gamma(lambda) = lambda * square by bisection in log lambda, to rounding."""
    if square == 0 or not bool((h > 0).any()):
        what = "a mode at 0" if square == 0 else "no curvature: was no entry observed?"
        raise UnsupportedError("weights and data to tune the prior on", what, "Use tunes_prior=False.")
    # gamma <= P gives the upper end; below the lower end gamma > lambda * square for sure
    high = math.log(len(h) / square) + 1.0
    low = high - 80.0
    while high - low > 1e-13 * max(1.0, abs(high)):
        middle = 0.5 * (low + high)
        precision = math.exp(middle)
        too_small = float((h / (h + precision)).sum()) > precision * square
        low, high = (middle, high) if too_small else (low, middle)
    return math.exp(0.5 * (low + high))
