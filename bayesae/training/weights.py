"""`fit_weights`: put a posterior over the weights of a trained model."""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import Tensor
from tqdm import tqdm

from bayesae import objectives, random
from bayesae.codes import CodePosterior, encode
from bayesae.data import Data, batches, check_counts, count_rows
from bayesae.draws import Draws
from bayesae.functional import check_finite, check_is_evaluable, parameters_of
from bayesae.joint import IsotropicNormal, LogJoint
from bayesae.models import Autoencoder
from bayesae.types import Batch, Params, WeightPosterior, WeightPrior
from bayesae.weights import WeightInference

__all__ = ["fit_weights", "log_joint"]


def log_joint(
    model: Autoencoder,
    n_data: int,
    *,
    objective: Callable[[Draws], Tensor] = objectives.reconstruction,
    codes: CodePosterior = encode,
    weight_prior: WeightPrior | None = None,
    temperature: float = 1.0,
) -> LogJoint:
    """Log p(D, theta) of a model, for weight methods and for loops of one's own.

    Args:
        model: The autoencoder, in evaluation mode; it is only read.
        n_data: N, rows in the data set.
        objective: Log-density of a row as a reduction of draws to (S, B).
        codes: How codes are drawn.
        weight_prior: p(theta); N(0, I) if None.
        temperature: Divides the log-joint.

    Returns:
        The joint; ``is_deterministic`` if the code is the plain encoder's.
    """
    check_is_evaluable(model)

    def per_example(params: Params, batch: Batch) -> Tensor:
        return objective(codes(model.at(params), batch))

    prior = IsotropicNormal() if weight_prior is None else weight_prior
    return LogJoint(
        model.network,
        model.likelihood,
        per_example,
        prior,
        n_data,
        temperature,
        is_deterministic=codes is encode,
        inputs=model.inputs,
    )


def fit_weights(
    inference: WeightInference,
    model: Autoencoder,
    data: Data,
    *,
    batch_size: int = 128,
    objective: Callable[[Draws], Tensor] = objectives.reconstruction,
    codes: CodePosterior = encode,
    weight_prior: WeightPrior | None = None,
    temperature: float = 1.0,
    n_data: int | None = None,
    seed: int | None = None,
    progress: bool | None = None,
) -> WeightPosterior:
    r"""Fit q(theta): builds the log-joint of ``model`` and steps ``inference`` over the data.

    The model is copied first and never touched. A posterior over encoder weights under an objective in which the
    code has seen x is a generalised posterior.

    Args:
        inference: The method, such as ``weights.Laplace()``.
        model: A trained autoencoder.
        data: x alone, (N, \*data).
        batch_size: Rows a step.
        objective: As for `fit_model`.
        codes: As for `fit_model`.
        weight_prior: p(theta); N(0, I) if None. Methods that tune it, `weights.Laplace` by default, say so.
        temperature: Divides the log-joint; 1 is Bayes.
        n_data: N, where the data have no length.
        seed: Of initialisations, the order of rows and any draw; None advances the caller's generator.
        progress: Show a progress bar; None shows it on a terminal only.

    Returns:
        A weight posterior of the method's family.

    Raises:
        DataError: If there are no rows, or they lie outside the likelihood's range.
        NonFiniteError: If weights, the log-joint or the data that the method reads are not finite.
    """
    check_counts(batch_size=batch_size)
    n_data = count_rows(data, n_data)
    frozen = copy.deepcopy(model).eval()
    params = parameters_of(frozen.network)
    check_finite(params, "weights of the model", "Did fit_model diverge?")
    joint = log_joint(
        frozen, n_data, objective=objective, codes=codes, weight_prior=weight_prior, temperature=temperature
    )
    with random.scope(seed, frozen.reference.device):
        state = inference.init(params, joint)
        name = f"fit_weights {type(inference).__name__}"
        bar = tqdm(range(inference.epochs), desc=name, disable=None if progress is None else not progress)
        for _ in bar:
            for batch in batches(data, frozen.reference, batch_size=batch_size, is_shuffled=True):
                frozen.likelihood.check(batch.explained)
                state, info = inference.update(state, batch, joint)
                bar.set_postfix(nats=f"{info.log_joint / n_data:.2f}", refresh=False)
        return inference.posterior(state, joint)
