"""Bayes by backprop: variational inference over weights with a Normal of independent or few-factor noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from bayesae.distributed import add_over_ranks, n_ranks, own_rows, rank
from bayesae.errors import DataError, DivergedError, UnsupportedError
from bayesae.families import DiagonalNormal, FactorNormal
from bayesae.joint import LogJoint
from bayesae.objectives import WarmUp
from bayesae.random import derived_seed
from bayesae.schedules import Schedule, as_number, check_schedule, factor_at
from bayesae.subset import Subset
from bayesae.types import Batch, Params
from bayesae.weights.base import Info, info_of
from bayesae.weights.flat import Chosen, progress, resume
from bayesae.weights.layer_noise import NoisyWeight, RowNoise

__all__ = ["MeanField", "MeanFieldState"]

Estimator = Literal["weights", "local", "flipout"]


@dataclass(frozen=True)
class _Law:
    """N(mean, diag(softplus(rho)^2) + F^T F) of the chosen weights; the numbers that are climbed.

    Args:
        mean: (P,).
        rho: (P,).
        factor: F, (K, P).
    """

    mean: Tensor
    rho: Tensor
    factor: Tensor

    @property
    def numbers(self) -> list[Tensor]:
        """What the optimiser moves; an empty factor is left out."""
        return [self.mean, self.rho] + ([self.factor] if len(self.factor) else [])

    @property
    def scale(self) -> Tensor:
        """Standard deviations of the independent part, (P,): log(1 + exp(rho)), which cannot overflow."""
        return F.softplus(self.rho)

    @property
    def var(self) -> Tensor:
        """Marginal variances, (P,)."""
        return self.scale**2 + (self.factor**2).sum(0)

    def entropy(self) -> Tensor:
        """In nats; the determinant by the matrix determinant lemma."""
        # log softplus(rho) is rho far below 0, where softplus(rho) has no digits left
        tiny = torch.finfo(self.rho.dtype).tiny
        log_scale = torch.where(self.rho < -30, self.rho, self.scale.clamp_min(tiny).log())
        log_det = 2 * log_scale.sum()
        if len(self.factor):
            scaled = self.factor / self.scale
            eye = torch.eye(len(scaled), dtype=scaled.dtype, device=scaled.device)
            log_det = log_det + torch.linalg.cholesky(eye + scaled @ scaled.mT).diagonal().log().sum() * 2
        return 0.5 * (len(self.mean) * (1 + math.log(2 * math.pi)) + log_det)


@dataclass
class MeanFieldState:
    """The law and its optimiser; both owned by the state and updated in place.

    Args:
        chosen: The uncertain weights.
        law: Leaves that require gradients.
        optimiser: Adam over them.
        generator: Of weight draws and rows' noise.
        n_seen: Rows so far.
        batch_size: Rows of the first batch; 0 before.
        sums: Over the steps of this pass: their number, the bound and the divergence, in nats.
    """

    chosen: Chosen
    law: _Law
    optimiser: torch.optim.Adam
    generator: torch.Generator
    n_seen: int
    batch_size: int
    sums: dict[str, float]


@dataclass(frozen=True)
class MeanField:
    r"""Bayes by backprop: the Normal of independent weights that maximises the evidence's lower bound.

    .. math:: q(\theta) = \mathcal{N}\big(\mu, \operatorname{diag} s^2 + F^\top F\big), \quad s = \log(1 + e^\rho),
              \qquad \mathcal{L} = \tfrac1T \mathbb{E}_q[\log p(D \mid \theta)]
              - \Big(-\tfrac1T \mathbb{E}_q[\log p(\theta)] - \mathbb{H}[q]\Big)

    The bracket is KL(q, p) at T = 1 and the bound is then at most log p(D). Under Normal priors it is in closed form;
    under others (`ScaleMixture`) its expectation of log p is that over the very weights drawn, its entropy in closed
    form. It starts at the network that it is given with a small scale, and climbs by Adam. With an objective and a
    stochastic code (``codes=codes.amortised, objective=objectives.elbo``) it is the full variational Bayes of an
    autoencoder's weights and codes.

    Every batch's log-likelihood is scaled by N / B and the divergence counts once a step, so that the optimum does not
    depend on the number of batches; nothing is averaged over rows or numbers.

    Args:
        epochs: Passes over the data.
        learning_rate: Of Adam.
        schedule: Factor of the rate: "constant", "cosine", "one_cycle", or a function of the share of the run that is
            done. One that ends at 0 takes the sampling noise out of the result.
        estimator: How the expectation of the log-likelihood is drawn. "weights": draws that all rows share, any
            network. "flipout": pseudo-independent draws for every row in Linear layers and (transposed) convolutions.
            "local": independent pre-activations in Linear layers whose weight is used once, Flipout elsewhere. All
            estimate one bound, with ever less noise between rows; the posterior is the same family, and predictions
            share weights between rows whatever was chosen here. See `NoisyWeight` for what falls back to shared draws.
        n_weight_draws: S, draws a step.
        initial_scale: Standard deviation of every weight at the start. A wide one loses the trained network.
        rank: K, rows of F; 0 leaves weights independent.
        kl_schedule: Factor of the divergence. "uniform": 1. "halving": 2^(B - i) / (2^B - 1) times B for the i-th of B
            batches, whose mean over a pass is 1. Or a function of the share of the run that is done, such as
            `objectives.WarmUp`: it must be 1 at the end, or what is climbed is no bound.
        subset: The uncertain weights: a `Subset`, or name patterns as in `Subset.of`.

    Exact when: the posterior is Normal with a precision that is diagonal (a covariance of the family's form, with
        factors), and the run converges. Without factors, of a linear-Gaussian joint its variances are
        1 / diag(Lambda), not the diagonal of the inverse.
    Biased when: weights are correlated: variances are too small. Wide networks under a vague prior: units collapse to
        the prior. The Monte-Carlo noise of Adam's steps, as far as ``schedule`` leaves it.
    Cost: S forward and backward passes a step, about twice that with "local" and "flipout" (which loop over S); memory
        of (2 + K) P numbers four times over.

    Raises:
        DataError: If a count, a rate, a scale or a factor is out of its range.
        UnsupportedError: If estimator or schedule is unknown; in a run, if "local" meets a weight that is used twice,
            or a weight that rows draw in a layer is then used in another way than by layers.
        ParameterError: If a pattern of ``subset`` chooses nothing.
        DivergedError: If the log-joint or its gradient is no longer finite; it keeps the posterior of the step before.

    References:
        | Weight Uncertainty in Neural Networks (Blundell, Cornebise, Kavukcuoglu, Wierstra, 2015)
        | Variational Dropout and the Local Reparameterization Trick (Kingma, Salimans, Welling, 2015)
        | Flipout: Efficient Pseudo-Independent Weight Perturbations on Mini-Batches (Wen et al., 2018)
        | Gaussian Variational Approximation with a Factor Covariance Structure (Ong, Nott, Smith, 2018)
        | Auto-Encoding Variational Bayes (Kingma, Welling, 2014), appendix F
        | Departure: entropies, and divergences from Normal priors, in closed form; a start at a trained network.
    """

    epochs: int = 50
    learning_rate: float = 1e-3
    schedule: Schedule = "constant"
    estimator: Estimator = "weights"
    n_weight_draws: int = 1
    initial_scale: float = 1e-2
    rank: int = 0
    kl_schedule: Literal["uniform", "halving"] | WarmUp | Callable[[float], float] = "uniform"
    subset: Subset | Sequence[str] = ("**",)

    def __post_init__(self) -> None:
        counts = {"epochs": self.epochs, "n_weight_draws": self.n_weight_draws, "rank": self.rank + 1}
        if wrong := {name: count for name, count in counts.items() if not count >= 1}:
            fix = "The defaults are 50, 1 and 0."
            raise DataError("epochs and n_weight_draws of at least 1, rank of at least 0", f"{wrong}", fix)
        if not (0 < self.learning_rate < math.inf and 0 < self.initial_scale < math.inf):
            got = f"{self.learning_rate} and {self.initial_scale}"
            raise DataError("a positive, finite learning_rate and initial_scale", got, "Try 1e-3 and 1e-2.")
        if self.estimator not in get_args(Estimator):
            raise UnsupportedError(
                f"an estimator, one of {get_args(Estimator)}", repr(self.estimator), "Try 'weights'."
            )
        check_schedule(self.schedule)
        if callable(self.kl_schedule):
            if as_number(last := self.kl_schedule(1.0)) != 1:
                raise DataError("a kl_schedule that is 1 at the end", f"{last!r}", "Else nothing is bounded.")
        elif self.kl_schedule not in ("uniform", "halving"):
            expected = "a kl_schedule, 'uniform', 'halving' or a function of the progress"
            raise UnsupportedError(expected, repr(self.kl_schedule), "'uniform' is the default.")

    def init(self, params: Params, joint: LogJoint) -> MeanFieldState:
        """The law around the network that is given."""
        chosen = Chosen.of(params, joint, self.subset)
        mean = chosen.start
        generator = torch.Generator(mean.device).manual_seed(derived_seed(int(torch.randint(2**31, ()))))
        # with factors, half of the initial variance is theirs: at F = 0 they would have no gradient
        share = 0.5 if self.rank else 1.0
        scale = self.initial_scale * math.sqrt(share)
        rho = torch.full_like(mean, scale + math.log(-math.expm1(-scale)))
        factor = torch.randn(self.rank, len(mean), generator=generator, dtype=mean.dtype, device=mean.device)
        factor *= self.initial_scale * math.sqrt((1 - share) / max(self.rank, 1))
        return self._state(chosen, [mean, rho, factor], generator, 0, 0, {})

    def update(self, state: MeanFieldState, batch: Batch, joint: LogJoint) -> tuple[MeanFieldState, Info]:
        """One step of Adam up the bound."""
        if state.n_seen % joint.rows_of_pass == 0:
            state.sums = {"n": 0.0, "bound": 0.0, "kl": 0.0}
        state.batch_size = state.batch_size or len(batch.x)
        done, law = progress(state.n_seen, self.epochs, joint), state.law
        log_likelihood, kl, gradients = self._ascent(state, self._noise(state), batch, joint)
        bound = log_likelihood - kl
        is_finite = torch.stack([bound, *[gradient.sum() for gradient in gradients]]).isfinite().all()
        if not bool(is_finite):
            got, fix = f"a bound of {float(bound)} nats", "Lower learning_rate or initial_scale, or scale the data."
            posterior = self.posterior(state, joint) if state.n_seen else None
            raise DivergedError("a finite bound and gradient", got, fix, posterior)
        log_joint = float(bound - law.entropy().detach())
        for number, gradient in zip(law.numbers, gradients, strict=True):
            number.grad = gradient / -joint.n_data  # so that the learning rate does not depend on N
        for group in state.optimiser.param_groups:
            group["lr"] = self.learning_rate * factor_at(self.schedule, done)
        state.optimiser.step()
        state.n_seen += len(batch.x)
        state.sums = {
            "n": state.sums["n"] + 1,
            "bound": state.sums["bound"] + float(bound),
            "kl": state.sums["kl"] + float(kl),
        }
        return state, Info(log_joint)

    def posterior(self, state: MeanFieldState, joint: LogJoint) -> DiagonalNormal | FactorNormal:
        """The Normal; ``info`` has the bound and the divergence, nats, averaged over the steps of the last pass."""
        law, chosen = state.law, state.chosen
        n_steps = max(state.sums.get("n", 0.0), 1.0)
        info = info_of(joint) | {name: state.sums[name] / n_steps for name in ("bound", "kl") if name in state.sums}
        mean = {name: leaf.clone() for name, leaf in chosen.params(law.mean.detach()).items()}
        var = law.scale.detach() ** 2
        if self.rank:
            return FactorNormal(mean, var, law.factor.detach().clone(), chosen.subset, info=info)
        return DiagonalNormal(mean, var, chosen.subset, info=info)

    def pack(self, state: MeanFieldState) -> dict[str, Any]:
        """All but the network's own weights."""
        return {
            "subset": state.chosen.subset,
            "numbers": [state.law.mean, state.law.rho, state.law.factor],
            "optimiser": state.optimiser.state_dict(),
            "generator": state.generator.get_state(),
            "n_seen": state.n_seen,
            "batch_size": state.batch_size,
            "sums": state.sums,
        }

    def unpack(self, packed: dict[str, Any], params: Params, joint: LogJoint) -> MeanFieldState:
        """The law on the network's device, and Adam where it stood."""
        chosen = Chosen.of(params, joint, packed["subset"])
        numbers = [number.detach().to(chosen.start, copy=True) for number in packed["numbers"]]
        generator = torch.Generator(chosen.start.device)
        generator.set_state(packed["generator"].cpu())
        counts = packed["n_seen"], packed["batch_size"], dict(packed["sums"])
        state = self._state(chosen, numbers, generator, *counts)
        resume(state.optimiser, packed["optimiser"])
        return state

    def _state(self, chosen: Chosen, numbers: list[Tensor], generator: torch.Generator, *counts: Any) -> MeanFieldState:  # noqa: ANN401
        law = _Law(*[number.requires_grad_() for number in numbers])
        return MeanFieldState(chosen, law, torch.optim.Adam(law.numbers, lr=self.learning_rate), generator, *counts)

    def _noise(self, state: MeanFieldState) -> tuple[Tensor, Tensor]:
        """Standard normal numbers of the weights (S, P) and of the factors (S, K)."""
        mean, n = state.law.mean, self.n_weight_draws
        options = {"generator": state.generator, "dtype": mean.dtype, "device": mean.device}
        return torch.randn(n, len(mean), **options), torch.randn(n, self.rank, **options)

    def _ascent(
        self, state: MeanFieldState, noise: tuple[Tensor, Tensor], batch: Batch, joint: LogJoint
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Log-likelihood over T and divergence, nats, and the gradient of the bound with the scheduled divergence."""
        law = state.law
        centre = law.mean + noise[1] @ law.factor
        draws = centre + noise[0] * law.scale
        flat = replace(joint, prior=_Flat())
        if self.estimator == "weights":
            values, slopes = state.chosen.gradient(flat, draws.detach(), batch, divides_rows=True)
            gradients = torch.autograd.grad(draws, law.numbers, slopes / len(draws), retain_graph=True)
            log_likelihood = values.mean()
        else:
            values = self._by_rows(state, centre, draws, batch, flat)
            gradients = torch.autograd.grad(values, law.numbers, retain_graph=True)
            log_likelihood, *gradients = add_over_ranks([values.detach(), *gradients])
        kl = -_expected_log_prior(joint, state.chosen, law, draws) / joint.temperature - law.entropy()
        slopes = torch.autograd.grad(kl, law.numbers)
        factor = self._kl_factor(state, joint)
        gradients = [one - factor * other for one, other in zip(gradients, slopes, strict=True)]
        return log_likelihood, kl.detach(), gradients

    def _by_rows(self, state: MeanFieldState, centre: Tensor, draws: Tensor, batch: Batch, joint: LogJoint) -> Tensor:
        """Log-likelihood over T with weights that rows draw for themselves, this rank's share, averaged over draws."""
        assert self.estimator != "weights"
        chosen, n_rows = state.chosen, len(batch.x)
        # of its own: a rank without rows runs no layer
        seed = int(torch.randint(2**62, (), generator=state.generator, device=state.generator.device))
        generator = torch.Generator(state.generator.device).manual_seed(seed)
        numbers = RowNoise(self.estimator, n_rows, slice(rank(), None, n_ranks()), generator)
        zeros = {name: torch.zeros_like(leaf) for name, leaf in chosen.base.items()}
        scales = chosen.subset.scatter(state.law.scale[None], zeros)
        values = []
        for one, around in zip(draws, centre, strict=True):  # vmap takes no subclass of a tensor
            params, means = chosen.params(one[None]), chosen.params(around[None])
            for name in chosen.subset.masks:
                params[name] = NoisyWeight.of(means[name], scales[name], params[name], numbers)
            rows = joint.per_example(params, own_rows(batch))
            # nothing but 0 times the draw on a rank without rows
            values.append(rows.sum() * (joint.n_data / n_rows) / joint.temperature + 0 * one.sum())
        return torch.stack(values).mean()

    def _kl_factor(self, state: MeanFieldState, joint: LogJoint) -> float:
        if callable(self.kl_schedule):
            return factor_at(self.kl_schedule, progress(state.n_seen, self.epochs, joint))
        if self.kl_schedule == "uniform":
            return 1.0
        n_batches = math.ceil(joint.rows_of_pass / state.batch_size)
        place = 1 + (state.n_seen % joint.rows_of_pass) // state.batch_size
        return n_batches * 0.5**place / (1 - 0.5**n_batches)


@dataclass(frozen=True)
class _Flat:
    """No prior: the likelihood alone is drawn."""

    def log_prob(self, params: Params) -> Tensor:
        leaf = next(iter(params.values()))
        return leaf.new_zeros(len(leaf))


def _expected_log_prior(joint: LogJoint, chosen: Chosen, law: _Law, draws: Tensor) -> Tensor:
    """E_q[log p(theta)], nats: of the chosen weights in closed form under a Normal, of all weights else."""
    if (precision := chosen.prior_precision(joint)) is None:
        return joint.prior.log_prob(chosen.params(draws)).mean()
    precision = precision.to(law.mean)
    return 0.5 * ((precision / (2 * math.pi)).log() - precision * (law.mean**2 + law.var)).sum()
