"""The log marginal likelihood of a Laplace approximation, and the prior and the noise that maximise it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bayesae.errors import NonFiniteError, UnsupportedError
from bayesae.functional import check_finite
from bayesae.joint import IndependentNormal, IsotropicNormal
from bayesae.subset import Subset
from bayesae.types import Params, WeightPrior
from bayesae.weights.structures import Curvature, Precision

__all__ = ["Groups", "MarginalLikelihood", "Noise", "PriorGroups", "prior_of"]

PriorGroups = Literal["all", "layer", "weight"]
"""Which weights share a prior precision: all, those of one module (weight and bias), or none."""

LIMITS = (1e-6, 1e12)  # of a precision by layer or by weight: where weights are 0, the evidence rises for ever
# effective weights of a group in which data say nothing: all that rounding leaves of a curvature of 0, alone and beside
# others
_NOTHING, _NOTHING_BESIDE = 1e-30, 1e-10
_ROUNDING, _TOLERANCE, _LONGEST, _MAX_STEPS = 1e-13, 1e-9, 10.0, 200  # of steps in log precision
# of the observed numbers: fewer that the weights leave to the noise are the rounding of a difference
_NONE_LEFT = 1e-6


@dataclass(frozen=True)
class Groups:
    """Which of the chosen weights share a prior precision.

    Args:
        kind: "all", "layer" or "weight".
        index: Group of every weight, in the order of ``Subset.ravel``, (P,).
        n: Number of groups.
        layers: Names of the layers, where groups are layers.
    """

    kind: PriorGroups
    index: Tensor
    n: int
    layers: tuple[str, ...] = ()

    @classmethod
    def of(cls, kind: PriorGroups, subset: Subset) -> Groups:
        """Groups of a kind among the weights of a subset.

        Args:
            kind: "all", "layer" or "weight".
            subset: The uncertain weights.

        Returns:
            The groups.
        """
        size = len(subset)
        if kind == "all":
            return cls(kind, torch.zeros(size, dtype=torch.int64), 1)
        if kind == "weight":
            return cls(kind, torch.arange(size), size)
        sizes: dict[str, int] = {}
        numbers = []
        for name, mask in subset.masks.items():
            layer = name.rpartition(".")[0] or "root"
            numbers.append(torch.full((int(mask.sum()),), sizes.setdefault(layer, len(sizes))))
        index = torch.cat(numbers) if numbers else torch.zeros(0, dtype=torch.int64)
        return cls(kind, index, len(sizes), tuple(sizes))

    def sum(self, values: Tensor) -> Tensor:
        """Sums over groups: (P,) to (n,)."""
        return values.new_zeros(self.n).index_add_(0, self.index.to(values.device), values)

    def spread(self, values: Tensor) -> Precision:
        """One number a group to every weight: (n,) to (P,), or to a float where there is one group."""
        return float(values) if self.kind == "all" else values[self.index.to(values.device)]


@dataclass(frozen=True)
class Noise:
    """What Gaussian noise of one variance adds to the evidence.

    Args:
        precision: 1 / variance under which the curvature was summed, 1 / (units of x) squared.
        square: Sum of squared residuals over the whole data set, units of x squared, above 0.
        count: Observed numbers: rows times outputs, less those masked.
        highest: Precision that it may reach; the likelihood's floor on the scale, inverted and squared.
    """

    precision: float
    square: float
    count: float
    highest: float = math.inf

    def log_likelihood_gain(self, ratio: float) -> float:
        """What the log-likelihood gains as the precision goes to ``ratio`` times what it was, nats."""
        return 0.5 * (self.count * math.log(ratio) - (ratio - 1) * self.precision * self.square)

    def excess(self, effective: Tensor, at: float) -> float:
        """Numbers less effective weights less weighed residuals: 0 at the maximum, and falling in ``at``, log ratio."""
        return self.count - float(effective.sum()) - self.weighed(at)

    def weighed(self, at: float) -> float:
        """Squared residuals over the noise variance, summed; ``at`` is the logarithm of the ratio."""
        return math.exp(at) * self.precision * self.square


@dataclass(frozen=True)
class MarginalLikelihood:
    r"""Log p(D | prior, noise) around one mode, as a function of the prior's precisions and of the noise's.

    .. math:: \log p(D) \approx \log p(D \mid \theta_*) + \tfrac12 \Big[ \sum_i \log \lambda_i
              - \sum_i \lambda_i \theta_{*i}^2 - \log\det (\hat G + \Lambda) \Big]

    with :math:`\Lambda = \operatorname{diag}(\lambda)` over the P chosen weights; those that are not chosen enter by
    the likelihood alone. Of Gaussian noise of precision beta, :math:`\hat G = \beta \hat G_0`.

    Args:
        curvature: G, summed over the whole data set.
        theta: The chosen weights at the mode, (P,), float64.
        log_likelihood: Log p(D | theta_*), nats.
    """

    curvature: Curvature
    theta: Tensor
    log_likelihood: float

    def log_evidence(self, precision: Precision, noise: Noise | None = None, ratio: float = 1.0) -> float:
        """Log p(D), nats.

        Args:
            precision: Of the prior.
            noise: Of the likelihood; only read where ``ratio`` is not 1.
            ratio: Precision of the noise over that under which the curvature was summed.

        Returns:
            The log-evidence.
        """
        lambdas = self._spread(precision)
        # G r + Lambda = r (G + Lambda / r)
        log_det = self.curvature.log_det(precision / ratio) + len(self.theta) * math.log(ratio)
        log_prior = float(torch.log(lambdas).sum() - (lambdas * self.theta**2).sum())
        gain = 0.0 if noise is None else noise.log_likelihood_gain(ratio)
        return self.log_likelihood + gain + 0.5 * (log_prior - log_det)

    def info(
        self, precision: Precision, groups: Groups | None, noise: Noise | None = None, ratio: float = 1.0
    ) -> dict[str, float]:
        """The evidence and what goes with it, by name.

        Args:
            precision: Of the prior.
            groups: Which weights share it; None where it was given.
            noise: As for `log_evidence`.
            ratio: As for `log_evidence`.

        Returns:
            ``log_evidence``, ``n_effective``, ``prior_precision`` (the geometric mean), and what the groups add.
        """
        lambdas = self._spread(precision)
        own, kind = {}, None if groups is None else groups.kind
        if groups is not None and kind == "layer":
            means = groups.sum(lambdas) / groups.sum(torch.ones_like(lambdas))
            own = {f"prior_precision.{name}": float(value) for name, value in zip(groups.layers, means, strict=True)}
        elif kind == "weight":
            own = {"n_pruned": float((lambdas >= LIMITS[1] * (1 - 1e-9)).sum())}
        return {
            "log_evidence": self.log_evidence(precision, noise, ratio),
            "n_effective": float(self.curvature.effective(precision / ratio).sum()),
            "prior_precision": float(lambdas.log().mean().exp()) if isinstance(precision, Tensor) else precision,
            **own,
        }

    def maximise(self, groups: Groups | None, start: Precision, noise: Noise | None = None) -> tuple[Precision, float]:
        r"""The prior precisions, and the noise precision if asked, that maximise the evidence at this mode.

        Stationary where every group g has :math:`\gamma_g = \lambda_g \lVert\theta_g\rVert^2` and the noise
        :math:`M - \sum_g \gamma_g = \beta \lVert r \rVert^2` (MacKay), with :math:`\gamma_g` the effective number of
        weights of g, M observed numbers and r their residuals. The evidence is concave in the logarithms of
        all these precisions together, because a determinant of a non-negative sum is a polynomial in them with
        non-negative coefficients: the point is unique.

        Args:
            groups: Which weights share a precision; None leaves them as they are.
            start: The joint's own precision, which groups without any curvature keep.
            noise: The likelihood's, to be maximised over too; None leaves it.

        Returns:
            Precisions, one number for groups of "all" and (P,) else; and the noise's precision over what it was.

        Raises:
            UnsupportedError: If all weights are 0, or no entry was observed.
            NonFiniteError: If the curvature is not finite, or the maximum is not found.
        """
        if groups is None and noise is None:
            return start, 1.0
        if groups is None or not len(self.theta):
            at = squares = is_silent = self.theta[:0]
            groups, low, high = None, 0.0, 0.0
        else:
            # the scalar has a finite root of any size; groups may run away
            low, high = (-math.inf, math.inf) if groups.kind == "all" else map(math.log, LIMITS)
            at, squares, is_silent = self._start(groups, start, low, high)

        def given(at: Tensor) -> Precision:
            return start if groups is None else groups.spread(at.exp())

        # The gap log gamma(a) - log square - a has minus the Jacobian I + diag(1 / gamma) K with
        # K_gh = d_gh Tr B_gg - |B_gh|^2, B = Lambda^1/2 (G + Lambda)^-1 Lambda^1/2, 0 <= B <= I. Both K and
        # diag(gamma) - K are positive semi-definite (the latter has entries |(I - B)_gh|^2): slopes are between 1 and 2
        # in every direction, and a step of the gap over 1.5 leaves a third of the error at most. The noise is solved
        # for at every step, so that K becomes its Schur complement, between 0 and K: the slopes keep their bounds,
        # however few numbers the weights leave.
        step, at_noise = math.inf, 0.0
        effective = self.theta
        for _ in range(_MAX_STEPS):
            before, new = at_noise, at
            at_noise, effective = self._settle(given(at), noise, before)
            if groups is not None:
                gap = (groups.sum(effective) / squares).log() - at
                new = torch.where(is_silent, at, (at + gap / 1.5).clamp(low, high))
            step = max([abs(at_noise - before), *(new - at).abs().tolist()])
            at = new
            if not step > _ROUNDING * max([1.0, *at.abs().tolist()]):  # or it is no number
                break
        fix = "Are there more observed numbers than effective weights? Choose fewer by subset=, or leave the noise."
        if not step <= _TOLERANCE:
            raise NonFiniteError("a maximum of the evidence", f"steps of {step:.1g} after {_MAX_STEPS}", fix)
        if noise is not None and not noise.count - float(effective.sum()) > _NONE_LEFT * noise.count:
            got = f"{noise.count:g} numbers and {float(effective.sum()):g} effective weights"
            raise NonFiniteError("numbers that the weights leave to the noise", got, fix)
        return given(at), math.exp(at_noise)

    def _settle(self, precision: Precision, noise: Noise | None, at: float) -> tuple[float, Tensor]:
        """The logarithm of the noise's ratio under this prior, from a guess, and the effective weights there."""
        if noise is None:
            return at, self.curvature.effective(precision)
        # The excess falls, at least as fast as the weighed residuals rise: secants, kept in a bracket. Above `top` it
        # is negative, or the noise at its floor.
        top = min(math.log(noise.count / noise.precision / noise.square), math.log(noise.highest / noise.precision))
        low, high, old, before = -math.inf, math.inf, math.nan, math.nan
        at = min(at, top)
        for _ in range(_MAX_STEPS):
            effective = self.curvature.effective(precision / math.exp(at))
            excess, slope = noise.excess(effective, at), noise.weighed(at)
            if math.isnan(excess):
                break
            if abs(excess) <= _ROUNDING * noise.count or (at == top and excess > 0):
                return at, effective
            if math.isnan(old):
                slope += max(0.0, float((effective * (1 - effective)).sum()))  # Newton's own, if G has Lambda's basis
            else:
                slope = max(noise.weighed(min(at, old)), (before - excess) / (at - old))
            low, high = (at, high) if excess > 0 else (low, at)
            new = min(at + max(-_LONGEST, min(_LONGEST, excess / slope)), top)
            if not low < new < high or (abs(excess) > 0.5 * abs(before) and math.isfinite(high - low)):
                new = 0.5 * (low + high)
            old, before, at = at, excess, new
        return math.nan, self.theta

    def _start(self, groups: Groups, own: Precision, low: float, high: float) -> tuple[Tensor, Tensor, Tensor]:
        """Logarithms to start from, sums of squared weights, and the groups of no curvature, all (n,)."""
        squares, counts = groups.sum(self.theta**2), groups.sum(torch.ones_like(self.theta))
        if not bool(squares.any()):
            raise UnsupportedError("weights and data to tune the prior on", "a mode at 0", "Use tunes_prior=False.")
        at = (counts / squares).log().clamp(low, high)
        # judged under the one precision that weights of this size call for, which has their units
        common = groups.spread((counts.sum() / squares.sum()).expand(groups.n))
        effective = groups.sum(self.curvature.effective(common))
        check_finite({"G": effective}, "curvature", "Did the training diverge?")
        is_silent = effective < (_NOTHING if groups.kind == "all" else _NOTHING_BESIDE)
        if bool(is_silent.all()):
            what = "no curvature: was no entry observed?"
            raise UnsupportedError("weights and data to tune the prior on", what, "Use tunes_prior=False.")
        kept = groups.sum(self._spread(own)) / counts
        return torch.where(is_silent, kept.log(), at), squares, is_silent

    def _spread(self, precision: Precision) -> Tensor:
        """Of every weight, (P,)."""
        return torch.as_tensor(precision, dtype=torch.float64, device=self.theta.device).expand(self.theta.shape)


def prior_of(
    precision: Precision, subset: Subset, params: Params, others: IsotropicNormal | IndependentNormal
) -> WeightPrior:
    """The prior with new precisions for the chosen weights.

    Args:
        precision: One number, or (P,).
        subset: The chosen weights.
        params: Every parameter in its own shape.
        others: What the other weights keep.

    Returns:
        An `IsotropicNormal` where one number serves all, else an `IndependentNormal`.
    """
    whole = others.precisions_of(params)
    size = sum(leaf.numel() for leaf in params.values())
    if not isinstance(precision, Tensor) and len(subset) == size:
        return IsotropicNormal(precision)
    values = torch.as_tensor(precision, dtype=torch.float64).expand(len(subset))
    tensors = subset.scatter(values, whole)
    return IndependentNormal({
        name: float(value.flatten()[0]) if bool((value == value.flatten()[0]).all()) else value
        for name, value in tensors.items()
    })
