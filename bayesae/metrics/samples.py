"""Scores of predictives that are known by draws: the ranked probability score and the energy score."""

from __future__ import annotations

import torch
from torch import Tensor

from bayesae import random
from bayesae.draws import Draws
from bayesae.errors import ShapeError, UnsupportedError
from bayesae.functional import check_finite
from bayesae.metrics._checks import Numbers, tensor_of

__all__ = ["crps_of_draws", "energy_score", "predictive_draws"]


def predictive_draws(draws: Draws, *, seed: int) -> Tensor:
    r"""One data row from every draw of codes and weights, noise included.

    Args:
        draws: With outputs, as ``Predictive(...)(x, keep_outputs=True)`` gives them.
        seed: Of the noise; the caller's generators are as they were afterwards.

    Returns:
        (K S, B, \*data), units of x.

    Exact when: always: each is a draw from the predictive, as far as codes and weights are.
    Cost: memory of the draws' outputs.

    Raises:
        UnsupportedError: If the draws have no outputs.
    """
    if draws.outputs is None:
        raise UnsupportedError("draws with outputs", "none", "Ask the predictive for keep_outputs=True.")
    with torch.no_grad(), random.scope(seed, draws.outputs.device):
        return draws.likelihood.distribution(draws.outputs).sample().flatten(0, 1)


def crps_of_draws(draws: Numbers, x: Numbers, *, is_fair: bool = False) -> Tensor:
    r"""Continuous ranked probability score of draws, element-wise, units of x, smaller is better.

    .. math:: \frac1S \sum_s |X_s - x| - \frac{1}{2 S^2} \sum_{s, t} |X_s - X_t|

    Args:
        draws: Of the predictive, noise included, (S, \*shape), such as `predictive_draws`.
        x: What came, (\*shape).
        is_fair: Divide the second sum by S (S - 1): the score of the law that draws came from, without bias.

    Returns:
        (\*shape), float64; `DrawSums` adds it up batch by batch.

    Exact when: the draws are the whole predictive (``is_fair=False``), or in expectation over draws (``is_fair=True``).
    Biased when: few draws stand for a law with ``is_fair=False``: too large by E|X - X'| / (2 S).
    Cost: one sort of the draws.

    Raises:
        ShapeError: If draws are not one axis more than x, or one draw is to be fair.
        NonFiniteError: If a draw or x is not finite.

    References:
        | Strictly Proper Scoring Rules, Prediction, and Estimation (Gneiting, Raftery, 2007)
        | Fair Scores for Ensemble Forecasts (Ferro, 2014)
    """
    return crps_between(*_fitting(draws, x, is_fair), is_fair)


def energy_score(draws: Numbers, x: Numbers, *, is_fair: bool = False) -> Tensor:
    r"""Energy score of whole rows: the ranked probability score with distances between rows; smaller is better.

    .. math:: \frac1S \sum_s \|X_s - x\| - \frac{1}{2 S^2} \sum_{s, t} \|X_s - X_t\|

    It sees how pixels vary together, which scores of single pixels do not.

    Args:
        draws: Of the predictive, noise included, (S, B, \*data), such as `predictive_draws`.
        x: What came, (B, \*data).
        is_fair: As for `crps_of_draws`.

    Returns:
        (B,), float64, units of x; `DrawSums` adds it up batch by batch.

    Exact when: the draws are the whole predictive (``is_fair=False``), or in expectation over draws (``is_fair=True``);
        of rows of one number it is `crps_of_draws`.
    Biased when: few draws stand for a law with ``is_fair=False``: too large by E||X - X'|| / (2 S).
    Cost: S squared distances a row.

    Raises:
        ShapeError: If draws are not one axis more than x, or one draw is to be fair.
        NonFiniteError: If a draw or x is not finite.

    References:
        | Strictly Proper Scoring Rules, Prediction, and Estimation (Gneiting, Raftery, 2007)
    """
    draws, x = _fitting(draws, x, is_fair)
    if x.dim() == 0:
        raise ShapeError("rows (B, ...)", "one number, ()", "Of one number it is crps_of_draws.")
    return energy_between(draws, x, is_fair)


def crps_between(draws: Tensor, x: Tensor, is_fair: bool) -> Tensor:
    """`crps_of_draws` of what was checked."""
    n = len(draws)
    ordered = draws.sort(0).values
    rank = torch.arange(1 - n, n, 2, dtype=x.dtype, device=x.device).reshape(-1, *[1] * x.dim())
    pairs = (rank * ordered).sum(0) / (n * (n - is_fair))  # half the mean distance of two draws
    return (draws - x).abs().mean(0) - pairs


def energy_between(draws: Tensor, x: Tensor, is_fair: bool) -> Tensor:
    """`energy_score` of what was checked."""
    n = len(draws)
    rows, x = draws.flatten(2) if x.dim() > 1 else draws[..., None], x.flatten(1) if x.dim() > 1 else x[:, None]
    near = torch.linalg.vector_norm(rows - x, dim=-1).mean(0)
    # one draw against all, so that memory stays that of the draws; differences, as Gram matrices lose small distances
    pairs = torch.stack([torch.linalg.vector_norm(rows - row, dim=-1).sum(0) for row in rows]).sum(0)
    return near - pairs / (2 * n * (n - is_fair))


def tensors_of_draws(draws: Numbers, x: Numbers) -> tuple[Tensor, Tensor]:
    """Both in float64, on the device of x and apart from any graph."""
    x = tensor_of(x)
    return tensor_of(draws).detach().to(x.device, torch.float64), x.detach().double()


def check_draws(draws: Tensor, x: Tensor, is_fair: bool) -> None:
    """Raise unless there are draws of every number of x, and several where they are to be fair."""
    if draws.dim() == 0 or draws.shape[1:] != x.shape or len(draws) < 1 + is_fair:
        raise ShapeError(
            f"draws {('S', *x.shape)}, S of {1 + is_fair} or more",
            f"{tuple(draws.shape)}",
            "Stack draws of data on a first axis; one draw has no fair score.",
        )


def _fitting(draws: Numbers, x: Numbers, is_fair: bool) -> tuple[Tensor, Tensor]:
    draws, x = tensors_of_draws(draws, x)
    check_draws(draws, x, is_fair)
    check_finite({"draws": draws, "x": x}, "draws and data", "Look at the network that made them.")
    return draws, x
