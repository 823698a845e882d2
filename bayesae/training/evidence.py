"""The evidence as an objective: of the prior and the noise after training, and in between its epochs."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from bayesae.codes import encode
from bayesae.data import Data, batches, check_counts, count_rows
from bayesae.errors import DataError, NonFiniteError
from bayesae.families.base import Normal
from bayesae.functional import check_finite, parameters_of
from bayesae.joint import IndependentNormal, IsotropicNormal, LogJoint
from bayesae.likelihoods import Gaussian
from bayesae.models import Autoencoder
from bayesae.training.noise import noise_pass
from bayesae.training.weights import log_joint
from bayesae.types import WeightPrior
from bayesae.weights.evidence import Groups, MarginalLikelihood, Noise, prior_of
from bayesae.weights.laplace import Laplace, LaplaceState
from bayesae.weights.structures import Precision

__all__ = ["Evidence", "EvidenceResult", "maximise_evidence"]

# of the logarithm of a noise variance between rounds: what ends them (or so many roundings, which are what is left of a
# float32 network's), and as many times that is settled when they are over
_TOLERANCE, _N_ROUNDINGS, _SETTLED, _MAX_ROUNDS = 1e-8, 100, 100, 60
_N_MIXED = 6  # rounds that an extrapolation looks at


@dataclass(frozen=True)
class EvidenceResult:
    """What `maximise_evidence` found.

    Args:
        posterior: The Laplace posterior under it, with ``info``.
        prior: The prior, for `fit_model` or `fit_weights` with ``tunes_prior=False``.
        noise_scale: Of a Gaussian likelihood, units of x: a float, or (D,); None for other likelihoods.
        log_evidence: Nats.
    """

    posterior: Normal
    prior: WeightPrior
    noise_scale: float | Tensor | None
    log_evidence: float


@torch.no_grad()
def maximise_evidence(
    model: Autoencoder,
    data: Data,
    *,
    laplace: Laplace | None = None,
    weight_prior: WeightPrior | None = None,
    tunes_noise: bool = True,
    batch_size: int = 128,
    n_data: int | None = None,
) -> EvidenceResult:
    r"""Prior precisions and Gaussian noise that maximise the Laplace evidence of a trained network.

    .. math:: \lambda_g = \gamma_g / \lVert \theta_g \rVert^2, \qquad
              \sigma^2 = \lVert r \rVert^2 / (M - \gamma), \qquad \gamma = \sum_g \gamma_g

    over groups g of weights, with residuals r of M observed numbers (N times outputs, less what is masked) and
    :math:`\gamma` effective weights: what `estimate_noise` divides by M is divided by what the weights left. Curvature
    is proportional to :math:`1/\sigma^2`, so both come together from one sum (`weights.evidence`). Of one scale for
    every number d, :math:`\gamma_d = \sum_i \operatorname{Var}[f_d(x_i)] / \sigma_d^2` comes from the variance of the
    linearised outputs; there the data are passed again until nothing moves, with Anderson's acceleration.

    The weights stay. It writes the noise **on the model's likelihood**, as `estimate_noise` does, and nothing else;
    only on a Gaussian with a learned scale. Other noise is taken as it is, so it has to be estimated before.

    Args:
        model: A trained autoencoder.
        data: The rows that trained it, x alone, (N, \*data), or anything of `bayesae.data.Data`.
        laplace: Structure, subset, groups of the prior; ``tunes_prior=False`` leaves the prior. None is
            ``Laplace("kronecker")``: exact sums over one layer's correlations at the cost of a few passes.
        weight_prior: The prior to start from, which weights without curvature or outside the subset keep; N(0, I) if
            None.
        tunes_noise: Whether noise that is learned is set by the evidence; False leaves it as it is.
        batch_size: Rows at a time.
        n_data: N, where the data have no length.

    Returns:
        The result.

    Exact when: the model is linear in the weights with Gaussian noise, Laplace is "dense" and the weights are the mode
        under what is found: alternate with training (`Evidence`) until they are. At fixed weights the maximum is exact.
    Biased when: the weights are those of another prior. With "diagonal" effective weights are overcounted, and the
        noise with them.
    Cost: one fit of Laplace and one forward pass; with a scale for every number of a row 10 to 25 times that, and an
        output variance of all rows each.

    Raises:
        UnsupportedError: As `weights.Laplace`.
        DataError: If there are no rows, or no entry is observed.
        NotFittedError: If noise that it does not tune was never estimated.
        NonFiniteError: If there are not more observed numbers than effective weights.

    References:
        | A Practical Bayesian Framework for Backpropagation Networks (MacKay, 1992)
        | Anderson Acceleration for Fixed-Point Iterations (Walker, Ni, 2011)
    """
    check_counts(batch_size=batch_size)
    laplace = Laplace("kronecker") if laplace is None else laplace
    n_data = count_rows(data, n_data)
    frozen = copy.deepcopy(model).eval()
    tunes_noise = tunes_noise and _has_gaussian_noise(frozen)
    if tunes_noise and not frozen.likelihood.is_estimated:  # pyright: ignore[reportAttributeAccessIssue]
        noise_pass(frozen, data, encode, n_data)  # of a Gaussian one pass is maximum likelihood
    found = _round(laplace, frozen, data, weight_prior, tunes_noise, n_data, batch_size)
    moves: list[_Move] = []
    tolerance = max(_TOLERANCE, _N_ROUNDINGS * torch.finfo(model.reference.dtype).eps)
    while found.move is not None and found.move.distance > tolerance and len(moves) < _MAX_ROUNDS:
        moves.append(found.move)
        frozen.likelihood.set_noise_var(_mixed(moves).exp())  # pyright: ignore[reportAttributeAccessIssue]
        found = _round(laplace, frozen, data, weight_prior, tunes_noise, n_data, batch_size)
    if found.move is not None and not found.move.distance <= _SETTLED * tolerance:
        got = f"moves of {found.move.distance:.1g} in log variance after {_MAX_ROUNDS} rounds"
        raise NonFiniteError("noise that settles", got, "Are there fewer observed numbers of an output than weights?")
    if tunes_noise:
        model.likelihood.load_state_dict(frozen.likelihood.state_dict())  # pyright: ignore[reportAttributeAccessIssue]
    scale = frozen.likelihood.scale if isinstance(frozen.likelihood, Gaussian) else None
    return EvidenceResult(found.posterior(laplace), found.prior, scale, found.log_evidence)


@dataclass(frozen=True)
class Evidence:
    r"""Marginal-likelihood training: `fit_model` with ``evidence=`` learns the prior and the noise as it goes.

    .. math:: \theta \leftarrow \text{epochs of } \max_\theta \log p(D, \theta \mid \lambda, \sigma), \qquad
              (\lambda, \sigma) \leftarrow \arg\max \log p(D \mid \lambda, \sigma) \text{ at } \theta

    After ``burn_in`` epochs, and every ``every`` epochs from then on, `maximise_evidence` runs at the weights of the
    moment and later epochs train to what it found. No validation rows are needed. All sums are over N rows and all
    their outputs, and the prior weighs 1 / N of what it does in the log-joint in a loss of a mean over rows: a
    loss that is a mean over outputs too makes the prior as many times too strong as there are outputs.

    Args:
        laplace: The approximation whose evidence counts; "kronecker", the best that costs little.
        burn_in: Epochs before the first update: the evidence of weights that are no mode misleads.
        every: Epochs between updates.
        n_steps: Rounds of curvature and update at a time. One finds the maximum; with one noise scale for every
            number of a row more bring it closer.
        tunes_noise: Whether a Gaussian's learned noise is the evidence's too.

    Exact when: the model is linear in the weights, the noise Gaussian and Laplace "dense": the fixed point is the
        maximum of the marginal likelihood (empirical Bayes) and its mode.
    Biased when: epochs between updates do not reach the mode, or the structure leaves correlations out.
    Cost: ``n_steps`` fits of Laplace an update; with a noise scale for every number of a row one more, whose evidence
        is that of the noise found.

    Raises:
        DataError: If ``burn_in`` is negative, or another count below 1.

    References:
        | Scalable Marginal Likelihood Estimation for Model Selection in Deep Learning (Immer et al., 2021)
        | Departure: their hyper-parameters take gradient steps; here each update is the exact maximum at its weights.
    """

    laplace: Laplace = field(default_factory=lambda: Laplace("kronecker"))
    burn_in: int = 10
    every: int = 5
    n_steps: int = 1
    tunes_noise: bool = True

    def __post_init__(self) -> None:
        check_counts(every=self.every, n_steps=self.n_steps)
        if self.burn_in < 0:
            raise DataError("burn_in of at least 0", f"{self.burn_in}", "The default is 10 epochs.")

    def is_due(self, epoch: int) -> bool:
        """Whether to update after this epoch, counted from 0."""
        return epoch + 1 >= max(self.burn_in, 1) and (epoch + 1 - self.burn_in) % self.every == 0

    @torch.no_grad()
    def update(
        self, model: Autoencoder, data: Data, prior: WeightPrior, *, n_data: int, batch_size: int
    ) -> tuple[WeightPrior, float]:
        """One update at the weights of the moment; Gaussian noise that is learned is written on the likelihood.

        Args:
            model: In evaluation mode.
            data: The rows it is trained on.
            prior: Of the last epochs.
            n_data: N.
            batch_size: Rows at a time.

        Returns:
            The new prior, and the log-evidence under it and the new noise, nats.
        """
        tunes_noise = self.tunes_noise and _has_gaussian_noise(model)
        found = _round(self.laplace, model, data, prior, tunes_noise, n_data, batch_size)
        for _ in range(self.n_steps - 1):
            found = _round(self.laplace, model, data, found.prior, tunes_noise, n_data, batch_size)
        if found.move is None:
            return found.prior, found.log_evidence
        given = replace(self.laplace, tunes_prior=False)  # the curvature of the pass was summed under the noise before
        return found.prior, _round(given, model, data, found.prior, False, n_data, batch_size).log_evidence


@dataclass(frozen=True)
class _Move:
    """One step of the noise, with a scale for every number.

    Args:
        start: Logarithms of the variances of the pass, (D,).
        step: What a step adds to them, (D,).
        distance: The largest that is left of one, as the pass sees it.
    """

    start: Tensor
    step: Tensor
    distance: float


@dataclass(frozen=True)
class _Round:
    """One pass of curvature and statistics, and what maximises the evidence then.

    Args:
        state: Laplace's, after all rows.
        joint: Under the noise of the pass.
        marginal: The evidence.
        groups: Of the prior, or None where it is given.
        precision: Of the prior.
        prior: The same, over all parameters.
        noise: Shared noise of the pass, or None.
        ratio: New precision of shared noise over that of the pass.
        move: Of the noise, with a scale for every number; else None.
    """

    state: LaplaceState
    joint: LogJoint
    marginal: MarginalLikelihood
    groups: Groups | None
    precision: Precision
    prior: WeightPrior
    noise: Noise | None
    ratio: float
    move: _Move | None = None

    @property
    def log_evidence(self) -> float:
        return self.marginal.log_evidence(self.precision, self.noise, self.ratio)

    def posterior(self, laplace: Laplace) -> Normal:
        info = self.marginal.info(self.precision, self.groups, self.noise, self.ratio) | laplace.setting(self.joint)
        # G r + Lambda = r (G + Lambda / r)
        temperature, precision = 1 / self.ratio, self.precision / self.ratio
        return self.marginal.curvature.posterior(self.state.params, precision, temperature, info)


def _round(
    laplace: Laplace,
    model: Autoencoder,
    data: Data,
    prior: WeightPrior | None,
    tunes_noise: bool,
    n_data: int,
    batch_size: int,
) -> _Round:
    """One round; the new noise is on the likelihood afterwards."""
    params = parameters_of(model.network)
    check_finite(params, "weights of the model", "Did fit_model diverge?")
    prior = IsotropicNormal() if prior is None else prior
    joint = log_joint(model, n_data, weight_prior=prior)
    state, likelihood = laplace.init(params, joint), model.likelihood
    statistics = None
    for number in range(laplace.epochs):
        for batch in batches(data, model.reference, batch_size=batch_size, is_shuffled=False, n_data=n_data):
            likelihood.check(batch.explained)
            state, _ = laplace.update(state, batch, joint)
            if tunes_noise and number == 0:
                assert isinstance(likelihood, Gaussian)
                outputs = model.network(model.inputs(batch))
                shape = likelihood.data_shape(outputs.shape[1:])
                mask = None if batch.mask is None else batch.mask.reshape(-1, *shape)
                new = likelihood.noise_statistics(outputs, batch.explained.reshape(-1, *shape), mask)
                statistics = new if statistics is None else statistics + new
    marginal, own = laplace.marginal(state, joint), laplace.given_precision(state, joint)
    groups = Groups.of(laplace.prior_groups, state.subset) if laplace.tunes_prior else None
    noise, ratio, move = None, 1.0, None
    if statistics is None:
        precision, _ = marginal.maximise(groups, own)
    elif not likelihood.per_output:  # pyright: ignore[reportAttributeAccessIssue]
        assert isinstance(likelihood, Gaussian)
        noise = _shared(likelihood, statistics * (n_data / state.n_seen))
        precision, ratio = marginal.maximise(groups, own, noise)
        likelihood.set_noise_var(1 / (noise.precision * ratio))
    else:
        precision, _ = marginal.maximise(groups, own)
        posterior = marginal.curvature.posterior(params, precision, 1.0, {})
        move = _update_every_number(model, posterior, data, statistics, n_data, batch_size)
    assert isinstance(joint.prior, IsotropicNormal | IndependentNormal)  # init took it
    new_prior = prior_of(precision, state.subset, params, joint.prior)
    return _Round(state, joint, marginal, groups, precision, new_prior, noise, ratio, move)


def _shared(likelihood: Gaussian, statistics: Tensor) -> Noise:
    square, count = statistics.tolist()
    if count == 0:
        raise DataError("an observed entry to estimate the noise on", "none", "Every entry of every row is masked.")
    tiny = count * likelihood.floor**2 * 1e-3  # a network that copies its input ends at the floor either way
    return Noise(1 / float(likelihood.noise_var), max(square, tiny), count, 1 / likelihood.floor**2)


def _update_every_number(
    model: Autoencoder, posterior: Normal, data: Data, statistics: Tensor, n_data: int, batch_size: int
) -> _Move:
    """One step for a scale of every number."""
    likelihood, variance = model.likelihood, torch.zeros((), dtype=torch.float64)
    assert isinstance(likelihood, Gaussian)
    for batch in batches(data, model.reference, batch_size=batch_size, is_shuffled=False, n_data=n_data):
        var = posterior.output_variance(model.network, model.inputs(batch))[1].double().flatten(1)
        var = var if batch.mask is None else var * batch.mask.flatten(1)
        variance = variance + var.sum(0).cpu()
    squares, counts = statistics.cpu().reshape(2, -1)
    old = torch.as_tensor(likelihood.noise_var, dtype=torch.float64).cpu().expand(squares.shape)
    # MacKay's step, with slopes between 1 and numbers over those left. Where hardly any are left, or on the way fewer
    # than none, EM's step to the same fixed point, which needs no damping.
    left, few = counts - variance / old, 0.01 * counts
    divisor = 1 + 0.5 * counts / torch.maximum(left, few).clamp(min=1e-300)
    var = torch.where(left > few, squares / left, (squares + variance) / counts)
    gap = torch.where(counts > 0, var.clamp(min=likelihood.floor**2).log() - old.log(), 0.0)
    step = torch.where(left > few, gap / divisor, gap)
    likelihood.set_noise_var((old.log() + step).exp())
    return _Move(old.log(), step, float(gap.abs().max()))


def _mixed(moves: list[_Move]) -> Tensor:
    """Log variances to try next: where the last steps, extrapolated, are 0 (Anderson); they start anew if one grew."""
    kept: list[_Move] = []
    for move in moves[-_N_MIXED:]:
        kept = [move] if kept and move.distance > 2 * kept[-1].distance else [*kept, move]
    starts, steps = torch.stack([move.start for move in kept]), torch.stack([move.step for move in kept])
    if len(kept) == 1:
        return starts[0] + steps[0]
    weights = torch.linalg.lstsq(steps.diff(dim=0).mT, steps[-1, :, None], driver="gelsd").solution
    return starts[-1] + steps[-1] - ((starts + steps).diff(dim=0).mT @ weights)[:, 0]


def _has_gaussian_noise(model: Autoencoder) -> bool:
    return isinstance(model.likelihood, Gaussian) and model.likelihood.is_learned
