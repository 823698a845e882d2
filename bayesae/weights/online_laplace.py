"""Online Laplace, the Laplacian Autoencoder: mean and diagonal precision learnt together."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from bayesae.curvature import Linearisation, approximate_diagonal, ggn_diagonal, monte_carlo_diagonal
from bayesae.curvature.hessian import read_hessian
from bayesae.distributed import add_over_ranks, n_ranks, own_rows, rank
from bayesae.errors import DataError, DivergedError, NotFittedError, UnsupportedError
from bayesae.families import DiagonalNormal
from bayesae.functional import at_least_float32
from bayesae.joint import LogJoint
from bayesae.likelihoods.noise import NoisyLikelihood
from bayesae.schedules import Schedule, check_schedule, factor_at
from bayesae.subset import Subset
from bayesae.types import Batch, OutputHessian, Params
from bayesae.weights.base import Info, info_of
from bayesae.weights.flat import Chosen, progress, resume
from bayesae.weights.laplace import Laplace

__all__ = ["OnlineLaplace", "OnlineLaplaceState"]

Curvature = Literal["monte_carlo", "exact", "approximate"]
Accumulation = Literal["average", "leaky_sum"]


@dataclass
class OnlineLaplaceState:
    """Mean, curvature and noise; updated in place.

    Args:
        chosen: The weights that move.
        joint: The log-joint with noise of the run's own, or the caller's where none is learned.
        linearisation: The network where its curvature was last asked for.
        mean: Of the weights, (P,), a leaf whose gradient is set by hand.
        optimiser: Adam on it.
        prior: Precision of the prior, () or (P,).
        total: Decayed sum of the curvatures of batches, (P,).
        weight: Decayed sum of their rows.
        noise: Decayed sum of the likelihood's noise statistics; None before the first, and where none is learned.
        seed: Of all random numbers of the run.
        n_steps: Steps so far.
        n_seen: Rows so far.
    """

    chosen: Chosen
    joint: LogJoint
    linearisation: Linearisation
    mean: Tensor
    optimiser: torch.optim.Adam
    prior: Tensor
    total: Tensor
    weight: float
    noise: Tensor | None
    seed: int
    n_steps: int = 0
    n_seen: int = 0


@dataclass(frozen=True)
class OnlineLaplace:
    r"""The Laplacian Autoencoder: weights are drawn while they train, with a precision that is learnt beside the mean.

    .. math:: \theta_s &= \mu + \Lambda^{-1/2} \varepsilon_s, \qquad
              \Lambda = \tfrac1T \big(N \bar d + \lambda\big), \qquad \varepsilon_s \sim \mathcal{N}(0, I) \\
              \mu &\leftarrow \mathrm{Adam}\Big(\mu, \; \tfrac1S \textstyle\sum_s
              \nabla_\theta \log p(D, \theta) \big|_{\theta_s}\Big) \\
              \bar d &= \frac{\sum_t m^{-t} \sum_{b} \operatorname{diag}(J_b^\top H_b J_b)}{\sum_t m^{-t} B_t}

    with m the memory, t the step, b the B_t rows of its batch, and the Jacobian J and the Hessian H of -log p in the
    outputs at the drawn weights. The average of a row's curvature is over the rows that memory still holds, so that it
    forgets its start: before the first draw it is that of the first batch at the mean. The gradient is that at the
    drawn weights, whatever the layers.

    Noise that the likelihood learns goes along: its statistics at the drawn weights' outputs are averaged in the same
    way (for Gaussian noise :math:`\sigma^2 = \mathbb{E}_q \lVert x - f(x; \theta) \rVert^2 / O`), and the posterior
    holds what they came to. With noise that is fixed far above the residuals the curvature is too small, the draws too
    wide, and the network learns to predict the mean of the data.

    ``accumulation="leaky_sum"`` is the rule of the published code, :math:`h \leftarrow m h + \tfrac12 \tfrac{N}{B}
    \sum_b \operatorname{diag}(J_b^\top H_b J_b)` from h = N, :math:`\Lambda = (h + \lambda) / T`, and no prior in
    the gradient. It is here to reproduce: h settles at 1 / (2 (1 - m)) times the curvature, 500 times for m = 0.999.

    Of a stochastic code the curvature is that of -log p(x, z) through the drawn codes (outputs and codes as functions
    of the weights with the codes' own noise held), from one random probe a row.

    Args:
        epochs: Passes over the data.
        learning_rate: Of Adam.
        schedule: Factor of the learning rate over the run.
        curvature: How the diagonal of a batch is computed: "monte_carlo", one random probe a row, unbiased; "exact";
            "approximate", the published code's, which drops all products of two units.
        memory: m, in [0, 1); about 1 / (1 - m) batches are remembered.
        accumulation: "average", or "leaky_sum" to reproduce.
        n_weight_draws: S, draws a step.
        learns_noise: Whether a likelihood with learned noise goes on learning it; else it stays as training left it.
        subset: The uncertain weights: a `Subset`, or name patterns as in `Subset.of`. The others stay.

    It starts at the weights of the given network, trained or not, and leaves a `DiagonalNormal` that is not linearised:
    the weights were trained to be drawn.

    Exact when: outputs are linear in the weights, the Jacobian's columns are orthogonal and the likelihood is Gaussian
        with noise that is fixed: the precision at once with "exact" and all rows in a batch (with fewer, to the scatter
        of the batches' averages over the memory), the mean as the learning rate goes to 0.
    Biased when: as any diagonal, it over-states certainty along correlated weights. Weights that the data do not touch
        keep the prior's variance, and inputs that touch them get all of it. Of a stochastic code a probe's square is
        that of a sum over rows: the average is unbiased, its relative error :math:`\sqrt{2 (1 - m) / (1 + m)}`; and
        what the code's density itself curves beyond its draws is left out.
    Cost: a step takes about 2.5 times a step of Adam on the network ("monte_carlo"), 5 times ("exact"); see
        ``benchmarks/online_laplace.py``. Memory 7 P.

    Raises:
        DataError: If a number is out of its range.
        UnsupportedError: If an option is unknown, the prior is neither an `IsotropicNormal` nor an `IndependentNormal`,
            a layer has no curvature rule, or the code is stochastic and the curvature is not "monte_carlo".
        NotFittedError: If a posterior is asked for before a step.
        DivergedError: If the log-joint is no longer finite; ``posterior`` has the Normal of the step before.
        NonFiniteError: If the curvature is not.

    References:
        | Laplacian Autoencoders for Learning Stochastic Representations (Miani et al., 2022)
        | Departure: an average and not a leaky sum, with bias correction; the likelihood's own Hessian without a
          factor of 1/2, with an estimated noise variance; the prior in the gradient; gradients at the drawn weights
          for convolutions too.
    """

    epochs: int = 20
    learning_rate: float = 1e-3
    schedule: Schedule = "constant"
    curvature: Curvature = "monte_carlo"
    memory: float = 0.999
    accumulation: Accumulation = "average"
    n_weight_draws: int = 1
    learns_noise: bool = True
    subset: Subset | Sequence[str] = ("**",)

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.n_weight_draws < 1 or not 0 < self.learning_rate:
            got = f"{self.epochs}, {self.n_weight_draws} and {self.learning_rate}"
            raise DataError("epochs >= 1, n_weight_draws >= 1 and a positive learning_rate", got, "See the defaults.")
        if not 0 <= self.memory < 1:
            fix = "0.999 remembers about a thousand batches; a sum of all of them is weights.Laplace."
            raise DataError("a memory in [0, 1)", repr(self.memory), fix)
        check_schedule(self.schedule)
        for name, options in (("curvature", Curvature), ("accumulation", Accumulation)):
            if (given := getattr(self, name)) not in (known := get_args(options)):
                raise UnsupportedError(f"{name}, one of {list(known)}", repr(given), f"{known[0]!r} is the default.")

    def init(self, params: Params, joint: LogJoint) -> OnlineLaplaceState:
        """At the given weights, with no row seen."""
        return self._state(params, joint, int(torch.randint(2**31, ())))

    def _state(self, params: Params, joint: LogJoint, seed: int) -> OnlineLaplaceState:
        if not joint.is_deterministic and (self.curvature != "monte_carlo" or joint.draws is None):
            got = f"a stochastic code with curvature={self.curvature!r}" + ("" if joint.draws else " and no draws")
            fix = "Take curvature='monte_carlo', and a joint of bae.log_joint; or codes=codes.encode."
            raise UnsupportedError("a deterministic code, or random probes through its draws", got, fix)
        chosen = Chosen.of(params, joint, self.subset)
        if (precision := chosen.prior_precision(joint)) is None:
            expected = "an IsotropicNormal or IndependentNormal prior"
            raise UnsupportedError(expected, type(joint.prior).__name__, "Give its precisions.")
        mean = chosen.start.requires_grad_()
        wide = at_least_float32(mean.detach())
        if self._learns(joint):
            joint = joint.copy()
            joint.likelihood.start_noise()  # pyright: ignore[reportAttributeAccessIssue] - it learns noise
        start = float(joint.n_data) if self.accumulation == "leaky_sum" else 0.0
        return OnlineLaplaceState(
            chosen,
            joint,
            Linearisation(joint.network, chosen.base),
            mean,
            torch.optim.Adam([mean], lr=self.learning_rate, fused=True),
            precision.to(wide),
            torch.full_like(wide, start),
            0.0,
            None,
            seed,
        )

    def _learns(self, joint: LogJoint) -> bool:
        likelihood = joint.likelihood
        return self.learns_noise and isinstance(likelihood, NoisyLikelihood) and likelihood.is_learned

    def update(self, state: OnlineLaplaceState, batch: Batch, joint: LogJoint) -> tuple[OnlineLaplaceState, Info]:
        """Draw weights, step the mean, and take in the curvature there."""
        generator = torch.Generator(state.mean.device)
        generator.manual_seed((state.seed * 0x9E3779B97F4A7C15 + state.n_steps) % 2**62)
        mean = state.mean.detach()
        theta = mean.new_empty(self.n_weight_draws, len(mean)).normal_(generator=generator)
        if state.n_steps == 0 and self.accumulation == "average":
            for _ in range(1 + self._learns(state.joint)):  # the noise first, which the curvature needs
                state.total.zero_()
                state.weight, state.noise = 0.0, None
                self._take_in(state, mean[None], batch, generator)
        theta.mul_(self._precision(state).rsqrt_()).add_(mean)
        values, gradient = state.chosen.gradient(state.joint, theta, batch, divides_rows=True)
        value = float(values.mean())
        if not math.isfinite(value):
            is_sound = state.n_steps > 0 and bool((mean.isfinite() & self._precision(state).isfinite()).all())
            fix, kept = "Lower learning_rate, or scale the data.", self._normal(state, joint) if is_sound else None
            raise DivergedError("a finite log-joint", f"{value} at step {state.n_steps}", fix, kept)
        if self.accumulation == "leaky_sum":  # as published: the gradient has no prior
            gradient += state.prior * theta / joint.temperature
        # divided by N, so that the learning rate does not depend on the size of the data set
        state.mean.grad = gradient.mean(0).div_(-joint.n_data)
        done = progress(state.n_seen, self.epochs, joint)
        state.optimiser.param_groups[0]["lr"] = self.learning_rate * factor_at(self.schedule, done)
        state.optimiser.step()
        self._take_in(state, theta, batch, generator)
        state.n_steps, state.n_seen = state.n_steps + 1, state.n_seen + len(batch.x)
        return state, Info(value)

    def posterior(self, state: OnlineLaplaceState, joint: LogJoint) -> DiagonalNormal:
        """The Normal that the next step would have drawn from; raises `NotFittedError` before the first."""
        if state.n_steps == 0:
            raise NotFittedError("at least one step", "none", "Call update first, or use fit_weights.")
        if self.accumulation == "leaky_sum":
            left = joint.n_data * self.memory**state.n_steps
            message = (
                f"the published leaky sum makes the precision about {0.5 / (1 - self.memory):.3g} times that of the "
                f"posterior, and {left:.3g} of it is what is left of its start after {state.n_steps} steps (the prior "
                f"has {float(state.prior.min()):.3g}); accumulation='average' has neither"
            )
            warnings.warn(message, RuntimeWarning, stacklevel=2)
        return self._normal(state, joint)

    def _normal(self, state: OnlineLaplaceState, joint: LogJoint) -> DiagonalNormal:
        mean = state.chosen.params(state.mean.detach().clone())
        noise = None
        if self._learns(joint):
            noise = {name: value.clone() for name, value in state.joint.likelihood.state_dict().items()}  # pyright: ignore[reportAttributeAccessIssue]
        return DiagonalNormal(
            {name: leaf.clone() for name, leaf in mean.items()},
            1 / self._precision(state),
            state.chosen.subset,
            is_linearised=False,
            info=info_of(joint) | Laplace.setting(state.joint),
            noise=noise,
        )

    def pack(self, state: OnlineLaplaceState) -> dict[str, Any]:
        """All but the network's own parameters and their linearisation."""
        names = ("mean", "total", "weight", "noise", "seed", "n_steps", "n_seen")
        packed: dict[str, Any] = {name: getattr(state, name) for name in names}
        packed["mean"] = state.mean.detach()
        packed["optimiser"] = state.optimiser.state_dict()
        packed["likelihood"] = state.joint.likelihood.state_dict() if self._learns(state.joint) else None  # pyright: ignore[reportAttributeAccessIssue]
        return packed

    def unpack(self, packed: dict[str, Any], params: Params, joint: LogJoint) -> OnlineLaplaceState:
        """The state again, on the network's device, linearised anew."""
        state = self._state(params, joint, packed["seed"])
        with torch.no_grad():
            state.mean.copy_(packed["mean"])
            state.total.copy_(packed["total"])
        if packed["likelihood"] is not None:
            state.joint.likelihood.load_state_dict(packed["likelihood"])  # pyright: ignore[reportAttributeAccessIssue]
        state.noise = None if packed["noise"] is None else packed["noise"].to(state.mean.device, copy=True)
        state.weight, state.n_steps, state.n_seen = packed["weight"], packed["n_steps"], packed["n_seen"]
        resume(state.optimiser, packed["optimiser"])
        return state

    def _precision(self, state: OnlineLaplaceState) -> Tensor:
        """Of the weights that are drawn next, (P,)."""
        share = 1.0 if self.accumulation == "leaky_sum" else state.joint.n_data / state.weight
        return (state.total * (share / state.joint.temperature)).add_(state.prior / state.joint.temperature)

    def _take_in(self, state: OnlineLaplaceState, theta: Tensor, batch: Batch, generator: torch.Generator) -> None:
        """Curvature and noise statistics of one batch at weights (S, P)."""
        part, n_rows = own_rows(batch), len(batch.x)
        place, has_rows = (n_rows, slice(rank(), None, n_ranks())), len(part.x) > 0
        if not has_rows:  # zeros, in the shapes of the others'
            fields = {name: value[:1] for name, value in batch._asdict().items() if value is not None}
            part, place = Batch(**fields), (n_rows, slice(1))
        learns = self._learns(state.joint)
        found = []
        for one in theta:
            if state.joint.is_deterministic:
                found.append(self._of_network(state, one, part, place, generator, learns))
            else:
                found.append(_of_draws(state, one, part, generator, learns))
        own = [functools.reduce(torch.add, tensors) for tensors in zip(*found, strict=True)]
        sums = add_over_ranks(own if has_rows else [torch.zeros_like(tensor) for tensor in own])
        is_published = self.accumulation == "leaky_sum"
        factor = 0.5 * state.joint.n_data / n_rows if is_published else 1.0
        state.total.mul_(self.memory).add_(sums[0], alpha=factor / len(theta))
        state.weight = self.memory * state.weight + n_rows
        if learns:
            state.noise = sums[1] if state.noise is None else self.memory * state.noise + sums[1]
            state.joint.likelihood.update_noise(state.noise)  # pyright: ignore[reportAttributeAccessIssue] - it learns

    def _of_network(
        self,
        state: OnlineLaplaceState,
        theta: Tensor,
        batch: Batch,
        place: tuple[int, slice],
        generator: torch.Generator,
        learns: bool,
    ) -> list[Tensor]:
        """Curvature and noise statistics of a deterministic code; both from one pass of the engine."""
        likelihood, seen = state.joint.likelihood, []

        def hessian(outputs: Tensor) -> OutputHessian:
            seen.append(outputs)
            return likelihood.output_hessian(outputs)

        lin = state.linearisation = state.linearisation.at(state.chosen.params(theta))
        x = state.joint.inputs(batch)
        mask = None if batch.mask is None else likelihood.output_mask(batch.mask)
        if self.curvature == "monte_carlo":
            found = monte_carlo_diagonal(lin, x, hessian, mask=mask, generator=generator, place=place).mean
        elif self.curvature == "exact":
            found = ggn_diagonal(lin, x, hessian, mask=mask)
        else:
            found = approximate_diagonal(lin, x, hessian, mask=mask)
        curvature = state.chosen.subset.ravel(found)
        if not learns:
            return [curvature]
        outputs = seen[0] if len(seen[0]) == len(x) else torch.cat(seen)[: len(x)]  # shared weights' rows pass twice
        return [curvature, _noise(likelihood, outputs, 1, batch)]


def _of_draws(
    state: OnlineLaplaceState, theta: Tensor, batch: Batch, generator: torch.Generator, learns: bool
) -> list[Tensor]:
    """Of a stochastic code, by a random probe through its draws: E (sum_b J_b^T u_b)^2 where E u u^T is the Hessian."""
    joint, subset = state.joint, state.chosen.subset
    assert joint.draws is not None
    params = state.chosen.params(theta[None].detach())
    leaves = [params[name].requires_grad_() for name in subset.masks]
    with torch.enable_grad():
        draws = joint.draws(params, batch)
        assert draws.outputs is not None
        outputs, n = draws.outputs.flatten(0, 2), len(draws.latents)
        mask = None if batch.mask is None else torch.cat([joint.likelihood.output_mask(batch.mask)] * n)
        held = outputs.detach()
        probes = read_hessian(joint.likelihood.output_hessian(held), held, mask).draw(1, generator)[:, 0]
        signs = torch.empty_like(draws.latents).bernoulli_(generator=generator).mul_(2).sub_(1)
        along = ((probes * outputs).sum() + (signs * draws.latents).sum()) / math.sqrt(n)
        gradients = torch.autograd.grad(along, leaves, allow_unused=True)
    found = {
        name: torch.zeros_like(leaf) if g is None else g
        for name, leaf, g in zip(subset.masks, leaves, gradients, strict=True)
    }
    curvature = subset.ravel(found)[0].square()
    return [curvature, _noise(joint.likelihood, draws.outputs.detach(), 3, batch)] if learns else [curvature]


def _noise(likelihood: Any, outputs: Tensor, n_axes: int, batch: Batch) -> Tensor:  # noqa: ANN401 - it learns noise
    """Statistics at outputs with so many axes before those of a row."""
    shape = likelihood.data_shape(outputs.shape[n_axes:])
    mask = None if batch.mask is None else batch.mask.reshape(-1, *shape)
    return likelihood.noise_statistics(outputs, batch.explained.reshape(-1, *shape), mask)
