"""`fit_model`: train an autoencoder in place."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from tqdm import tqdm

from bayesae import objectives, random
from bayesae.codes import CodePosterior, encode, modules_of
from bayesae.data import Data, batches, check_counts, count_rows
from bayesae.errors import DataError, ParameterError, UnsupportedError
from bayesae.joint import IsotropicNormal
from bayesae.likelihoods import Gaussian
from bayesae.models import Autoencoder
from bayesae.objectives.base import Objective, climbed
from bayesae.schedules import Schedule, as_number
from bayesae.training.checkpoints import CheckpointFile
from bayesae.training.identity import describe, describe_data, describe_model
from bayesae.training.loop import Loop
from bayesae.training.noise import learns_noise, noise_pass
from bayesae.training.options import Stepper, check_callable, check_prior
from bayesae.types import WeightPrior

__all__ = ["History", "PriorTuning", "fit_model"]


@runtime_checkable
class PriorTuning(Protocol):
    """What `fit_model` asks of its ``evidence``; `bayesae.Evidence` is one."""

    @property
    def tunes_noise(self) -> bool:
        """Whether `update` sets the learned noise of a Gaussian likelihood."""
        ...

    def is_due(self, epoch: int) -> bool:
        """Whether the prior is tuned after this epoch, from 0."""
        ...

    def update(
        self, model: Autoencoder, data: Data, prior: WeightPrior, *, n_data: int, batch_size: int
    ) -> tuple[WeightPrior, float]:
        """A better prior, and the log evidence in nats; Gaussian noise is set in place."""
        ...


@dataclass
class History:
    """One record an epoch.

    Args:
        train: Mean objective of the training rows, nats a row.
        validation: Of the validation rows, at the epoch's end; empty without validation data.
        best_epoch: The epoch whose weights were kept, from 0.
        log_evidence: Log evidence in nats, each time that ``evidence`` tuned the prior; empty without it.
        weight_prior: The prior after that epoch, tuned where there is ``evidence``: for `fit_weights` to go on with.
    """

    train: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    best_epoch: int = -1
    log_evidence: list[float] = field(default_factory=list)
    weight_prior: WeightPrior | None = None


@dataclass
class _Run:
    """All that changes while a model is trained.

    Args:
        model: In training.
        flows: Networks that the code posterior brings along, in training too.
        optimiser: Of their parameters.
        loop: Where the run stands.
        prior: p(theta) at present.
        tunes_prior: Whether the prior changes, so that checkpoints must hold it.
        history: So far.
        total: Sum over the rows of this epoch of their objective, nats.
        best: States of model and flows in the best epoch, where training may stop early.
        is_stopped: Whether it did.
    """

    model: Autoencoder
    flows: nn.ModuleList
    optimiser: torch.optim.Optimizer
    loop: Loop
    prior: WeightPrior
    tunes_prior: bool
    history: History = field(default_factory=History)
    total: float = 0.0
    best: dict[str, Any] | None = None
    is_stopped: bool = False

    def pack(self) -> dict[str, Any]:
        """Everything, for `encoding.flatten`."""
        history = {name: getattr(self.history, name) for name in _RECORDS}
        return {
            "loop": self.loop.pack(),
            "model": self.model.state_dict(),
            "flows": self.flows.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "prior": self.prior if self.tunes_prior else None,
            "kept_prior": self.history.weight_prior if self.tunes_prior else None,
            "history": history,
            "total": self.total,
            "best": self.best,
            "is_stopped": self.is_stopped,
        }

    def unpack(self, packed: dict[str, Any]) -> None:
        """Go on from a packed run."""
        self.model.load_state_dict(packed["model"])
        self.flows.load_state_dict(packed["flows"])
        self.optimiser.load_state_dict(packed["optimiser"])
        for name in _RECORDS:
            setattr(self.history, name, packed["history"][name])
        if self.tunes_prior:
            self.prior, self.history.weight_prior = packed["prior"], packed["kept_prior"]
        elif self.history.best_epoch >= 0:
            self.history.weight_prior = self.prior
        self.total, self.best, self.is_stopped = packed["total"], packed["best"], packed["is_stopped"]
        self.loop.unpack(packed["loop"])

    def keep(self, patience: int | None) -> None:
        """Settle which epoch's weights are the result so far, and whether that is the last word."""
        values = self.history.validation
        if patience is None or values[-1] > max(values[:-1], default=-math.inf):
            self.history.best_epoch, self.history.weight_prior = self.loop.epoch, self.prior
            state = {"model": self.model.state_dict(), "flows": self.flows.state_dict()}
            self.best = None if patience is None else copy.deepcopy(state)
        elif self.loop.epoch - self.history.best_epoch >= patience:
            self.is_stopped = True


_RECORDS = ("train", "validation", "best_epoch", "log_evidence")


def fit_model(
    model: Autoencoder,
    data: Data,
    *,
    epochs: int = 20,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    objective: Objective = objectives.reconstruction,
    codes: CodePosterior = encode,
    n_latent_draws: int = 1,
    weight_prior: WeightPrior | None = None,
    validation: Data | None = None,
    patience: int | None = None,
    schedule: Schedule = "constant",
    clip_norm: float | None = None,
    n_accumulate: int = 1,
    autocast: torch.dtype | None = None,
    optimiser: Callable[[Iterable[Tensor]], torch.optim.Optimizer] | None = None,
    evidence: PriorTuning | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    n_data: int | None = None,
    seed: int | None = None,
    progress: bool | None = None,
) -> History:
    r"""Train ``model`` **in place**, on the device where it lives.

    This and `estimate_noise` are the only functions of the library that touch the caller's module.

    .. math:: \max_\theta\; \tfrac1N \Big(\sum_i \ell(x_i, \theta) + \log p(\theta)\Big)

    Noise that the likelihood learns is estimated along the way, after each epoch and by one pass (`estimate_noise`),
    on the validation rows where there are any (rows that trained the network understate the noise of new ones), else
    on the training rows. ``evidence`` sets Gaussian noise by itself from its first update on.

    With ``checkpoint`` the run can be killed at any moment: the same call, with a model of the same shapes, goes on
    from the last checkpoint. A finished run returns at once, and ``epochs`` may be raised to continue one. Another
    run is refused: rows in memory are told apart by a checksum, other data sets by kind and length; arguments by their
    values and attributes, but functions and classes with a name by that name, and networks by their layers.

    Args:
        model: The autoencoder. It is left in evaluation mode.
        data: x alone, (N, \*data); see `bayesae.data.Data`. An epoch of a stream is ``n_data`` rows from its start,
            or all of it if that is less.
        epochs: Passes over the data, at most.
        batch_size: Rows a batch.
        learning_rate: Of Adam, the default ``optimiser``.
        objective: Reduction of draws to (S, B), larger is better: `objectives.elbo` for a stochastic code.
        codes: How codes are drawn: `codes.amortised` for a VAE. Networks that it brings along (flows) are trained too.
        n_latent_draws: K, draws of the code for every row and step.
        weight_prior: p(theta); N(0, I) if None.
        validation: Held-out rows, for the noise and for stopping early; a pass over them must end.
        patience: Stop after this many epochs without a better validation objective and go back to the best
            weights; None runs all epochs. Needs ``validation``.
        schedule: Factor of the learning rate over the run: "constant", "cosine" to 0, "one_cycle" (warm-up, then
            cosine), or a function of the share of all rows of all epochs that is done, in [0, 1]. With another number
            of epochs a resumed run goes on by that number's schedule.
        clip_norm: Gradients of a larger Euclidean norm, over all parameters, are scaled down to it; None leaves them.
        n_accumulate: Batches a step: their gradients are summed in proportion to their rows, as of one big batch.
        autocast: ``torch.bfloat16`` runs the networks under `torch.autocast` in training steps; weights, densities,
            noise and validation stay in float32. None runs all in the weights' dtype.
        optimiser: Makes an optimiser of the trainable parameters, with a learning rate of its own; Adam if None.
        evidence: `bayesae.Evidence`: tunes prior and noise by the evidence after some epochs; later ones train to it.
        checkpoint: A file that holds the run: replaced in one move at the start, after every epoch, and every
            ``checkpoint_every`` steps.
        checkpoint_every: Steps between checkpoints within an epoch; None writes after epochs only.
        n_data: N, which weighs the prior: where the data have no length, or where their rows are a sample of more
            (N larger) or repeat some (N smaller). A pass over data with a length is all of them, whatever N.
        seed: Of the order of rows and any draw; None advances the caller's generator.
        progress: Show a progress bar; None shows it on a terminal only.

    Returns:
        The history.

    Exact when: a resumed run is the uninterrupted one bit for bit on a CPU, if what a step draws and what the data
        draw while they are read (a stream that shuffles, augmentation) do not take turns on torch's global generator:
        give such data a generator of their own (torch, NumPy or `random.Random`; made before training and reached
        by attributes, lists, dicts or closures, so through wrapped data sets and transforms too), or workers.
        Global generators of NumPy and Python are not kept. ``n_accumulate`` equals one big batch to rounding if rows
        do not depend on one another (no batch normalisation) and codes are deterministic.
    Cost: per epoch one pass with gradients, and one without over the rows that fix the noise. A checkpoint is the
        weights, twice that of Adam, and the best weights where there is ``patience``; a resumed epoch reads, without
        training on them, the batches that were done.

    Raises:
        DataError: If there are no rows, they lie outside the likelihood's range, or a count or a rate is none.
        NonFiniteError: If the data or the objective are not finite.
        UnsupportedError: If ``patience`` comes without ``validation``, or an option is unknown or of the wrong kind.
        ParameterError: If all parameters are frozen.
        FileError: If the checkpoint is damaged, or of a run with other arguments or data.
    """
    if patience is not None and validation is None:
        raise UnsupportedError("validation data for early stopping", "patience alone", "Give validation=.")
    check_counts(epochs=epochs, batch_size=batch_size, n_accumulate=n_accumulate, n_latent_draws=n_latent_draws)
    check_counts(**({} if patience is None else {"patience": patience}))
    check_callable(objective=objective, codes=codes, optimiser=optimiser)
    check_prior(weight_prior)
    if evidence is not None and not isinstance(evidence, PriorTuning):
        raise UnsupportedError("evidence that tunes a prior", repr(evidence), "bae.Evidence() is one.")
    if not 0 <= as_number(learning_rate) < math.inf:
        raise DataError("a finite learning_rate of at least 0", repr(learning_rate), "1e-3 is the default.")
    flows = modules_of(codes)
    trainable = [leaf for leaf in [*model.parameters(), *flows.parameters()] if leaf.requires_grad]
    if not trainable:
        raise ParameterError("a parameter to train", "a model with all of them frozen", "Set requires_grad.")
    n_rows = count_rows(data, n_data)
    steps = torch.optim.Adam(trainable, lr=learning_rate) if optimiser is None else optimiser(trainable)
    stepper = Stepper(model, steps, objective, codes, n_latent_draws, n_rows, schedule, clip_norm, autocast)
    arguments: dict[str, str] = {}
    if checkpoint is not None:  # checksums take a pass over the data
        words = {
            "function": "fit_model",
            "batch_size": batch_size,
            "learning_rate": learning_rate,
            "objective": objective,
            "codes": codes,
            "n_latent_draws": n_latent_draws,
            "weight_prior": weight_prior,
            "patience": patience,
            "schedule": schedule,
            "clip_norm": clip_norm,
            "n_accumulate": n_accumulate,
            "autocast": autocast,
            "optimiser": optimiser,
            "evidence": evidence,
            "n_data": n_rows,
            "seed": seed,
        }
        arguments = {name: describe(word) for name, word in words.items()} | describe_model(model)
        arguments |= {"data": describe_data(data), "validation": describe_data(validation)}
    file = CheckpointFile(checkpoint, checkpoint_every, arguments)
    prior = IsotropicNormal() if weight_prior is None else weight_prior
    drawing = {"objective": objective, "codes": codes, "schedule": schedule, "validation": validation, "model": model}
    loop = Loop(data, model.reference, batch_size, n_rows, n_accumulate, **drawing)
    run = _Run(model, flows, steps, loop, prior, tunes_prior=evidence is not None)

    def estimate() -> None:
        is_by_evidence = evidence is not None and evidence.tunes_noise and isinstance(model.likelihood, Gaussian)
        if learns_noise(model) and not (is_by_evidence and run.history.log_evidence):
            rows, n = (data, n_rows) if validation is None else (validation, None)
            noise_pass(model, rows, codes, n, objective=objective, n_latent_draws=n_latent_draws)

    try:
        with random.scope(seed, model.reference.device):
            saved = file.read()
            if saved is None:
                file.write(run.pack)
            else:
                run.unpack(saved)
                if loop.epoch > epochs:
                    fix = "Give epochs= at least as many."
                    raise DataError(f"epochs of at least the {loop.epoch} that the checkpoint has", f"{epochs}", fix)
            if loop.is_at_start:
                estimate()
            is_hidden = None if progress is None else not progress
            bar = tqdm(total=epochs, initial=loop.epoch, desc="fit_model", disable=is_hidden)
            while loop.epoch < epochs and not run.is_stopped:
                model.train()
                for group in loop.groups():
                    values = stepper.step(group, run.prior, loop.progress(epochs))
                    run.total += sum(value * len(batch.x) for value, batch in zip(values, group, strict=True))
                    loop.took(group)
                    if file.is_due(loop.n_steps):
                        file.write(run.pack)
                model.eval()
                estimate()
                if evidence is not None and evidence.is_due(loop.epoch):
                    run.prior, value = evidence.update(model, data, run.prior, n_data=n_rows, batch_size=batch_size)
                    run.history.log_evidence.append(value)
                run.history.train.append(run.total / loop.n_seen)
                if validation is not None:
                    value = _mean_objective(model, validation, objective, codes, n_latent_draws)
                    run.history.validation.append(value)
                run.keep(patience)
                run.total = 0.0
                loop.end_epoch()
                file.write(run.pack)
                bar.set_postfix(nats=f"{run.history.train[-1]:.2f}", refresh=False)
                bar.update()
            bar.close()
            if run.best is not None:
                model.load_state_dict(run.best["model"])
                flows.load_state_dict(run.best["flows"])
    finally:
        model.eval()
    return run.history


@torch.no_grad()
def _mean_objective(
    model: Autoencoder, data: Data, objective: Objective, codes: CodePosterior, n_latent_draws: int
) -> float:
    total, count = 0.0, 0
    for batch in batches(data, model.reference, batch_size=1024, is_shuffled=False):
        model.likelihood.check(batch.explained)
        draws = codes(model.live(), batch, n_latent_draws=n_latent_draws)
        total += float(climbed(objective, draws)["decoder"].double().sum())
        count += len(batch.x)
    return total / count
