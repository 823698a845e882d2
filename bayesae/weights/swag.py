"""SWAG: a Normal from the iterates of stochastic gradient descent."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from bayesae.errors import DataError, DivergedError, NotFittedError
from bayesae.families import DiagonalNormal, FactorNormal
from bayesae.joint import LogJoint
from bayesae.schedules import Schedule, check_schedule, factor_at
from bayesae.subset import Subset
from bayesae.types import Batch, Params
from bayesae.weights.base import Info, info_of
from bayesae.weights.flat import Chosen, progress

__all__ = ["SWAG", "SWAGState"]

_ROUNDING = 1e-9  # of a count of passes: sums of rows are whole numbers, shares of them are not


@dataclass(frozen=True)
class SWAGState:
    """Where the descent stands, and the moments of what was collected.

    Args:
        chosen: The weights that move.
        theta: They, (P,).
        velocity: Of the descent, (P,).
        n_seen: Rows that the descent has seen.
        n_collected: T.
        mean: Of the collected weights, float64 (P,).
        squares: Sum of their squared deviations from it, float64 (P,).
        last: The last of them, at most ``rank``, (P,) each.
    """

    chosen: Chosen
    theta: Tensor
    velocity: Tensor
    n_seen: int
    n_collected: int
    mean: Tensor
    squares: Tensor
    last: tuple[Tensor, ...]


@dataclass(frozen=True)
class SWAG:
    r"""A Normal with the moments of the weights that stochastic gradient descent passes through.

    .. math:: v \leftarrow \mu v + \tfrac1N \nabla \log p(D, \theta), \quad \theta \leftarrow \theta + \eta v;
              \qquad q(\theta) = \mathcal{N}\Big(\bar\theta,\; \tfrac12 \operatorname{diag}(s^2)
              + \tfrac{1}{2 (K - 1)} \sum_{t = T - K + 1}^{T} (\theta_t - \bar\theta)(\theta_t - \bar\theta)^\top\Big)

    with :math:`\bar\theta` and :math:`s^2` (P,) mean and variance (divisor T - 1) of the T collected weights and the
    last K = ``rank`` of them; both by Welford's recursion in float64. With ``rank=0``, SWAG-diagonal, the covariance is
    :math:`\operatorname{diag}(s^2)`. The descent starts at the network as it was trained, on log p(D, theta) / N, so
    that the rate does not depend on N.

    Args:
        rank: K, 0 or at least 2; leaves a `FactorNormal`, and a `DiagonalNormal` for 0.
        epochs: Passes over the data.
        learning_rate: eta. The widths of q follow it: it is the method's one parameter that matters. A descent is
            stable up to 2 (1 + momentum) over the largest curvature of the mean log-joint, which grows with the numbers
            in a row and shrinks with the noise variance.
        schedule: Factor of the rate over the run: "constant", "cosine", "one_cycle", or a function of the share done.
        is_cyclical: Whether the schedule starts anew after every collection, so that weights are collected at the ends
            of cycles of ``collect_every`` passes.
        momentum: mu, in [0, 1).
        burn_in: Share of the run after which collecting begins, in [0, 1).
        collect_every: Passes between collections; 0.1 collects ten times a pass.
        subset: The uncertain weights: a `Subset`, or name patterns as in `Subset.of`; the others stay as trained.

    For a loop of one's own, with any optimiser and with batch normalisation in training mode, `init`, then `observe`
    with the parameters as often as they are to be collected, then `posterior`; hyper-parameters of the descent are not
    read. Weights that are drawn want running statistics of their own: `bayesae.recompute_statistics`.

    Exact when: its rate and batch size give the iterates the posterior's covariance, which no setting does in general.
    Biased when: always. The iterates' covariance follows rate, momentum and batch size (of full batches it is 0), and
        half of it is kept without its correlations.
    Cost: a gradient a step; memory (K + 6) P. A draw costs 2 K P operations.

    Raises:
        DataError: If a step, share or count is out of range, or fewer weights would be collected than the rank asks.
        NotFittedError: If fewer than two weights, or fewer than the rank, were collected.
        DivergedError: If the log-joint or its gradient is no longer finite; ``posterior`` has what was collected.

    References:
        | A Simple Baseline for Bayesian Uncertainty in Deep Learning (Maddox et al., 2019)
        | Departures: deviations are those from the final mean, so that with K = T the factor is the sample covariance;
          from the running mean, the published choice, the first is 0 and K - 1 of independent weights give
          (K - H_K) / (K - 1) of it, H_K the harmonic number (0.86 for K = 20). The variance has divisor T - 1 and no
          cancellation. The half stands in the covariance, not in an argument of sampling.
    """

    rank: int = 20
    epochs: int = 40
    learning_rate: float = 1e-4
    schedule: Schedule = "constant"
    is_cyclical: bool = False
    momentum: float = 0.9
    burn_in: float = 0.5
    collect_every: float = 1.0
    subset: Subset | Sequence[str] = ("**",)

    def __post_init__(self) -> None:
        if self.rank < 0 or self.rank == 1 or self.epochs < 1:
            got, fix = f"{self.rank} and {self.epochs}", "One column has no variance; rank=0 is SWAG-diagonal."
            raise DataError("a rank of 0, or of 2 or more, and epochs >= 1", got, fix)
        if not 0 < self.learning_rate < math.inf or not 0 <= self.momentum < 1:
            got = f"{self.learning_rate} and {self.momentum}"
            raise DataError("a positive learning_rate and a momentum in [0, 1)", got, "1e-4 and 0.9 are the defaults.")
        if not 0 <= self.burn_in < 1 or not 0 < self.collect_every <= self.epochs:
            got = f"{self.burn_in} and {self.collect_every} of {self.epochs} epochs"
            fix = "Weights are collected after burn_in * epochs passes, every collect_every passes."
            raise DataError("a burn_in in [0, 1) that leaves passes to collect in", got, fix)
        check_schedule(self.schedule)

    def init(self, params: Params, joint: LogJoint) -> SWAGState:
        """At the trained network; nothing collected."""
        chosen = Chosen.of(params, joint, self.subset)
        theta = chosen.start
        zeros = torch.zeros_like(theta, dtype=torch.float64)
        return SWAGState(chosen, theta, torch.zeros_like(theta), 0, 0, zeros, zeros.clone(), ())

    def update(self, state: SWAGState, batch: Batch, joint: LogJoint) -> tuple[SWAGState, Info]:
        """One step of the descent; collects where one is due."""
        if state.n_seen == 0:
            self._check_plan(len(batch.x), joint)
        values, gradients = state.chosen.gradient(joint, state.theta[None], batch, divides_rows=True)
        value, gradient = float(values[0]), gradients[0]
        if not math.isfinite(value) or not bool(gradient.isfinite().all()):
            raise DivergedError(
                "a finite log-joint",
                f"{value} after {state.n_seen} rows and {state.n_collected} collected weights",
                "Lower learning_rate or scale the data; `posterior` of this error has what was collected.",
                self._normal(state, joint) if state.n_collected > 1 and state.squares.isfinite().all() else None,
            )
        velocity = self.momentum * state.velocity + gradient / joint.n_data
        theta = state.theta + self.learning_rate * self._factor(state.n_seen, joint) * velocity
        n_seen = state.n_seen + len(batch.x)
        is_due = self._n_due(n_seen, joint) > self._n_due(state.n_seen, joint)
        state = replace(state, theta=theta, velocity=velocity, n_seen=n_seen)
        return self._collected(state, theta) if is_due else state, Info(value)

    def observe(self, state: SWAGState, params: Params) -> SWAGState:
        r"""Collect the weights of a loop of one's own.

        Args:
            state: From `init`, or from here.
            params: Every parameter in its own shape, ``dict(model.network.named_parameters())`` say; they are copied.

        Returns:
            The state with them.

        Raises:
            ParameterError: If one is missing.
            ShapeError: If one has another shape.
        """
        state.chosen.subset.check(params)
        theta = state.chosen.subset.ravel({name: leaf.detach() for name, leaf in params.items()})
        return self._collected(state, theta.to(state.theta, copy=True))

    def posterior(self, state: SWAGState, joint: LogJoint) -> DiagonalNormal | FactorNormal:
        """The Normal with the moments of what was collected."""
        if state.n_collected < max(self.rank, 2):
            raise NotFittedError(
                f"at least {max(self.rank, 2)} collected weights for rank={self.rank}",
                f"{state.n_collected}",
                "Run longer, lower burn_in or collect_every, or lower the rank.",
            )
        layers = joint.network.named_modules()
        if names := [name for name, layer in layers if getattr(layer, "running_mean", None) is not None]:
            text = f"Running statistics of {', '.join(names)} are those of the network as it was given."
            warnings.warn(f"{text} Predict with bayesae.recompute_statistics(posterior, ...).", stacklevel=2)
        return self._normal(state, joint)

    def pack(self, state: SWAGState) -> dict[str, Any]:
        """All but which weights these are, and the others."""
        return {one.name: getattr(state, one.name) for one in fields(state) if one.name != "chosen"}

    def unpack(self, packed: dict[str, Any], params: Params, joint: LogJoint) -> SWAGState:
        """Where the descent stood."""
        chosen = Chosen.of(params, joint, self.subset)
        moved = {name: packed[name].to(chosen.start.device, copy=True) for name in _TENSORS}
        last = tuple(leaf.to(chosen.start, copy=True) for leaf in packed["last"])
        return SWAGState(chosen, n_seen=packed["n_seen"], n_collected=packed["n_collected"], last=last, **moved)

    def _factor(self, n_seen: int, joint: LogJoint) -> float:
        """Of the rate, before a step."""
        if not self.is_cyclical:
            return factor_at(self.schedule, progress(n_seen, self.epochs, joint))
        n_cycles = n_seen / (self.collect_every * joint.rows_of_pass) + _ROUNDING
        return factor_at(self.schedule, max(n_cycles % 1 - _ROUNDING, 0.0))

    def _n_due(self, n_seen: int, joint: LogJoint) -> int:
        """Collections that are due after so many rows, those of the burn-in not among them."""
        return max(0, math.floor(n_seen / (self.collect_every * joint.rows_of_pass) + _ROUNDING) - self._n_burnt)

    @property
    def _n_burnt(self) -> int:
        return math.floor(self.burn_in * self.epochs / self.collect_every + _ROUNDING)

    def _check_plan(self, batch_size: int, joint: LogJoint) -> None:
        """Raise if batches of this size leave too little to collect: before the run, not after it."""
        n_batches = joint.rows_of_pass / batch_size
        n_passes, part = divmod(self.burn_in * self.epochs, 1)
        n_steps = (self.epochs - int(n_passes)) * math.ceil(n_batches) - math.floor(part * n_batches + _ROUNDING)
        # one step collects once, however much is due
        n = min(math.floor(self.epochs / self.collect_every + _ROUNDING) - self._n_burnt, n_steps)
        if n < max(self.rank, 2):
            got = f"{n} in {self.epochs} epochs after a burn-in of {self.burn_in}, every {self.collect_every} passes"
            fix = "More epochs, a lower burn_in or collect_every, or a lower rank."
            raise DataError(f"at least {max(self.rank, 2)} collected weights for rank={self.rank}", got, fix)

    def _collected(self, state: SWAGState, theta: Tensor) -> SWAGState:
        n, values = state.n_collected + 1, theta.double()
        shift = values - state.mean
        mean = state.mean + shift / n
        last = (*state.last, theta)[-self.rank :] if self.rank else ()
        squares = state.squares + shift * (values - mean)
        return replace(state, n_collected=n, mean=mean, squares=squares, last=last)

    def _normal(self, state: SWAGState, joint: LogJoint) -> DiagonalNormal | FactorNormal:
        subset, info = state.chosen.subset, info_of(joint) | {"n_collected": float(state.n_collected)}
        mean, var = state.chosen.params(state.mean.to(state.theta)), state.squares / (state.n_collected - 1)
        n_columns = len(state.last)  # as many as there are, which a run that diverged may have fewer of
        if n_columns < 2:
            return DiagonalNormal(mean, var, subset, info=info)
        deviations = torch.stack(state.last).double() - state.mean
        return FactorNormal(mean, var / 2, deviations / math.sqrt(2 * (n_columns - 1)), subset, info=info)


_TENSORS = ("theta", "velocity", "mean", "squares")
