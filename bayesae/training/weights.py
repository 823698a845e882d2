"""`fit_weights`: put a posterior over the weights of a trained model."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from bayesae import objectives, random
from bayesae.codes import CodePosterior, encode
from bayesae.data import Data, check_counts, count_rows
from bayesae.distributed import are_the_same, n_ranks, rank, same_generator, same_seed
from bayesae.draws import Draws
from bayesae.errors import DataError, FileError, UnsupportedError
from bayesae.functional import check_finite, check_is_evaluable, parameters_of
from bayesae.joint import IsotropicNormal, LogJoint
from bayesae.models import Autoencoder
from bayesae.objectives.base import Objective, climbed
from bayesae.training.checkpoints import CheckpointFile
from bayesae.training.identity import describe, describe_data, describe_model, digest
from bayesae.training.loop import Loop, rows_of_pass
from bayesae.training.options import check_callable, check_prior
from bayesae.types import Batch, Params, WeightPosterior, WeightPrior
from bayesae.weights import WeightInference

__all__ = ["fit_weights", "log_joint"]


@dataclass(frozen=True)
class _RowDensity:
    """log p(x | theta) of each row: an objective of a model's codes; a class, so that a joint pickles."""

    model: Autoencoder
    objective: Objective
    codes: CodePosterior
    n_latent_draws: int

    def draws(self, params: Params, batch: Batch) -> Draws:
        return self.codes(self.model.at(params, is_fitting=True), batch, n_latent_draws=self.n_latent_draws)

    def __call__(self, params: Params, batch: Batch) -> Tensor:
        if not len(batch.x):  # a rank's share of a small batch: (S, 0), and a sum of it is 0 with gradients of 0
            return torch.stack([leaf.flatten(1).sum(1) for leaf in params.values()]).sum(0)[:, None][:, :0]
        values = climbed(self.objective, self.draws(params, batch))
        if len(values) > 1:
            fix = "Fit weights under the decoder's bound alone, such as objectives.iwae."
            raise UnsupportedError("an objective that is one number a row", f"{len(values)} bounds", fix)
        return values["decoder"]


def log_joint(
    model: Autoencoder,
    n_data: int,
    *,
    objective: Objective = objectives.reconstruction,
    codes: CodePosterior = encode,
    n_latent_draws: int = 1,
    weight_prior: WeightPrior | None = None,
    temperature: float = 1.0,
) -> LogJoint:
    """Log p(D, theta) of a model, for weight methods and for loops of one's own.

    Args:
        model: The autoencoder, in evaluation mode; it is only read.
        n_data: N, rows in the data set.
        objective: Log-density of a row as a reduction of draws to (S, B).
        codes: How codes are drawn.
        n_latent_draws: K.
        weight_prior: p(theta); N(0, I) if None.
        temperature: Divides the log-joint.

    Returns:
        The joint; ``is_deterministic`` if the code is the plain encoder's.
    """
    check_is_evaluable(model)
    check_prior(weight_prior)
    prior = IsotropicNormal() if weight_prior is None else weight_prior
    density = _RowDensity(model, objective, codes, n_latent_draws)
    return LogJoint(
        model.network,
        model.likelihood,
        density,
        prior,
        n_data,
        temperature,
        is_deterministic=codes is encode,
        inputs=model.inputs,
        draws=density.draws,
    )


def fit_weights(
    inference: WeightInference,
    model: Autoencoder,
    data: Data,
    *,
    batch_size: int = 128,
    objective: Objective = objectives.reconstruction,
    codes: CodePosterior = encode,
    n_latent_draws: int = 1,
    weight_prior: WeightPrior | None = None,
    temperature: float = 1.0,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    n_data: int | None = None,
    seed: int | None = None,
    progress: bool | None = None,
) -> WeightPosterior:
    r"""Fit q(theta): builds the log-joint of ``model`` and steps ``inference`` over the data.

    Within a process group of `torch.distributed` (under ``torchrun``, say) all ranks call it with the same arguments
    and get the same posterior: chains and members are spread over ranks, the rows of every batch divided where there is
    one set of weights, and each rank keeps a checkpoint of its own (``checkpoint`` with ``.rank1`` and so on).

    The model is copied first and never touched. A posterior over encoder weights under an objective in which the
    code has seen x is a generalised posterior.

    With ``checkpoint`` the run can be killed at any moment: the same call goes on from the last checkpoint, and after
    a finished run it returns the same posterior at once.

    Args:
        inference: The method, such as ``weights.Laplace()``.
        model: A trained autoencoder.
        data: x alone, (N, \*data); a pass over a stream is ``n_data`` rows from its start.
        batch_size: Rows a step.
        objective: As for `fit_model`.
        codes: As for `fit_model`; networks that it brings along (flows) are held as they are.
        n_latent_draws: As for `fit_model`.
        weight_prior: p(theta); N(0, I) if None. Methods that tune it, `weights.Laplace` by default, say so.
        temperature: Divides the log-joint; 1 is Bayes.
        checkpoint: A file that holds the run: replaced in one move at the start, after every pass, and every
            ``checkpoint_every`` steps.
        checkpoint_every: Steps between checkpoints within a pass; None writes after passes only.
        n_data: N: where the data have no length, or where their rows are a sample of more (N larger). Structures of
            Laplace with several passes take no other N than the rows of a pass.
        seed: Of initialisations, the order of rows and any draw; None advances the caller's generator.
        progress: Show a progress bar; None shows it on a terminal only.

    Returns:
        A weight posterior of the method's family.

    Exact when: a resumed run is the uninterrupted one bit for bit on a CPU; as for `fit_model`. Several ranks give what
        one gives, to rounding, of a deterministic code; of a drawn one in law, with the same noise on all ranks' rows.
    Cost: that of the method; a checkpoint is its state.

    Raises:
        DataError: If there are no rows, they lie outside the likelihood's range, or a structure of several passes
            gets another ``n_data`` than there are rows.
        UnsupportedError: If an argument is of the wrong kind.
        NonFiniteError: If weights, the log-joint or the data that the method reads are not finite.
        FileError: If the checkpoint is damaged, or of a run with other arguments, data or weights.
    """
    check_counts(batch_size=batch_size, n_latent_draws=n_latent_draws)
    check_callable(objective=objective, codes=codes)
    n_data, seed = count_rows(data, n_data), same_seed(seed)
    frozen = copy.deepcopy(model).eval()
    params = parameters_of(frozen.network)
    check_finite(params, "weights of the model", "Did fit_model diverge?")
    if not are_the_same(sum(float(leaf.double().sum()) for leaf in params.values())):
        raise DataError("the same weights on every rank", "others", "Broadcast the model, or load it on each.")
    joint = log_joint(
        frozen,
        n_data,
        objective=objective,
        codes=codes,
        n_latent_draws=n_latent_draws,
        weight_prior=weight_prior,
        temperature=temperature,
    )
    joint = replace(joint, n_pass=rows_of_pass(data, n_data))
    arguments: dict[str, str] = {}
    if checkpoint is not None:  # checksums take a pass over the data
        words = {
            "function": "fit_weights",
            "inference": inference,
            "batch_size": batch_size,
            "objective": objective,
            "codes": codes,
            "n_latent_draws": n_latent_draws,
            "weight_prior": weight_prior,
            "temperature": temperature,
            "n_data": n_data,
            "seed": seed,
            "values of the weights": digest(frozen.state_dict()),
        }
        arguments = {name: describe(word) for name, word in words.items()} | {"data": describe_data(data)}
        arguments |= describe_model(frozen) | {"ranks": f"{rank()} of {n_ranks()}"}
    file = CheckpointFile(_own_file(checkpoint), checkpoint_every, arguments)
    drawing = {"inference": inference, "objective": objective, "codes": codes, "model": frozen}
    loop = Loop(data, frozen.reference, batch_size, n_data, **drawing)
    with random.scope(seed, frozen.reference.device):
        saved = file.read()
        if saved is None:
            state = inference.init(params, joint)
        else:
            state = inference.unpack(saved["state"], params, joint)
            loop.unpack(saved["loop"])
        if not are_the_same(float(loop.n_steps)):
            fix = "Remove the checkpoints of all ranks, or put back those of one moment."
            raise FileError("checkpoints of one moment on all ranks", f"step {loop.n_steps} on one of them", fix)

        def pack() -> dict[str, Any]:
            return {"loop": loop.pack(), "state": inference.pack(state)}

        if saved is None:
            file.write(pack)
        name, is_hidden = f"fit_weights {type(inference).__name__}", None if progress is None else not progress
        is_hidden = True if rank() else is_hidden
        with tqdm(total=inference.epochs, initial=loop.epoch, desc=name, disable=is_hidden) as bar:
            while loop.epoch < inference.epochs:
                for group in loop.groups():
                    (batch,) = group
                    frozen.likelihood.check(batch.explained)
                    state, info = inference.update(state, batch, joint)
                    same_generator()
                    bar.set_postfix(nats=f"{info.log_joint / n_data:.2f}", refresh=False)
                    loop.took(group)
                    if file.is_due(loop.n_steps):
                        file.write(pack)
                loop.end_epoch()
                file.write(pack)
                bar.update()
        return inference.posterior(state, joint)


def _own_file(checkpoint: str | os.PathLike[str] | None) -> str | os.PathLike[str] | None:
    """Of this rank: the file itself on the first, others beside it."""
    return checkpoint if checkpoint is None or rank() == 0 else f"{os.fspath(checkpoint)}.rank{rank()}"
