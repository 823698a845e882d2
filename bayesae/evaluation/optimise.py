"""The best law of a family for each row by itself: Adam on its parameters until nothing is gained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace

import torch
from torch import Tensor

from bayesae import random
from bayesae.codes import Law, TriangularLaw
from bayesae.codes.laws import without_gradient
from bayesae.errors import UnsupportedError
from bayesae.evaluation.ratios import log_ratio
from bayesae.models import Bound
from bayesae.random import row_normal
from bayesae.types import Batch

__all__ = ["N_HELD", "best_law"]

N_HELD = 128  # draws that decide whether a round has gained
_N_PAIRS, _N_STEPS, _MAX_ROUNDS = 8, 50, 40
_RATE, _CUT, _N_CUTS = 0.1, 0.3, 4
_LEAST_GAIN = 1e-3  # nats
_DECAY, _EPSILON = (0.9, 0.999), 1e-8

Raw = dict[str, Tensor]


def best_law(model: Bound, batch: Batch, start: Law) -> Law:
    r"""Law of the family of ``start`` that maximises the evidence lower bound of each row under each weight draw.

    Rounds of 50 steps of Adam on path gradients of 16 antithetic draws, fresh at every step; a round's result is the
    mean of its later half. It is kept where the bound has risen by 1e-3 nats, by 128 held draws that are the same in
    every round; a row where it has not goes on at three tenths of its rate, and the fourth time stops. Rows do not
    feel one another. Locations move in units of the start's own spread.

    Args:
        model: At S weight draws, as networks.
        batch: The rows, with their numbers.
        start: Where to start, such as the encoder's law: dataclasses of free tensors, and `codes.TriangularLaw`.

    Returns:
        The laws; never worse than the start by the held draws.

    Raises:
        UnsupportedError: If the law's parameters cannot be told.
    """
    best, build = _opened(start)
    like, pairs = start.loc, (max(N_HELD // 2, 4 * start.loc.shape[-1]), 1)
    assert batch.index is not None
    held = _antithetic(_whitened(row_normal(batch.index, pairs, like.shape[-1], like)))
    value = log_ratio(model, batch, build(best), held).mean(0)
    rate, n_cuts = torch.full_like(value, _RATE), torch.zeros_like(value, dtype=torch.long)
    for at in range(_MAX_ROUNDS):
        is_active = n_cuts < _N_CUTS
        if not bool(is_active.any()):
            break
        with random.scope(random.derived_seed(at)):
            noise = row_normal(batch.index, (_N_STEPS * _N_PAIRS, 1), like.shape[-1], like)
        trial = _climb(model, batch, best, build, rate, noise.unflatten(0, (_N_STEPS, _N_PAIRS)))
        gain = (log_ratio(model, batch, build(trial), held).mean(0) - value).nan_to_num(-torch.inf)
        is_better = is_active & (gain >= _LEAST_GAIN)
        best = {name: torch.where(_like(is_better, old), trial[name], old) for name, old in best.items()}
        value = torch.where(is_better, value + gain, value)
        is_small = is_active & ~is_better
        n_cuts, rate = n_cuts + is_small, torch.where(is_small, _CUT * rate, rate)
    return build(best)


def _opened(law: Law) -> tuple[Raw, Callable[[Raw], Law]]:
    """Numbers that may be anything, and the law that they stand for."""
    if not is_dataclass(law) or isinstance(law, type):
        got, fix = type(law).__name__, "Use codes.Amortised, or another whose law is one of codes."
        raise UnsupportedError("a law with tensors as its fields", got, fix)
    start = without_gradient(law)  # pyright: ignore[reportArgumentType]
    raw = {one.name: getattr(start, one.name) for one in fields(start)}
    raw = {name: value for name, value in raw.items() if isinstance(value, Tensor)} | {"loc": torch.zeros_like(law.loc)}
    if isinstance(law, TriangularLaw):
        raw["factor"] = law.factor.tril(-1) + torch.diag_embed(law.factor.diagonal(dim1=-2, dim2=-1).log())

    def build(raw: Raw) -> Law:
        values = raw | {"loc": start.push(raw["loc"])}
        if isinstance(law, TriangularLaw):
            diagonal = raw["factor"].diagonal(dim1=-2, dim2=-1).exp()
            values["factor"] = raw["factor"].tril(-1) + torch.diag_embed(diagonal)
        return replace(start, **values)

    return raw, build


def _climb(model: Bound, batch: Batch, raw: Raw, build: Callable[[Raw], Law], rate: Tensor, noise: Tensor) -> Raw:
    """Mean of the later half of the steps of Adam, each row at its own rate; noise (steps, pairs, 1, B, Z)."""
    zeros = {name: torch.zeros_like(value) for name, value in raw.items()}
    first, second, mean = zeros, zeros, zeros
    for t, half in enumerate(noise, 1):
        with torch.enable_grad():
            leaves = {name: value.detach().requires_grad_() for name, value in raw.items()}
            law = build(leaves)
            held = without_gradient(law)  # pyright: ignore[reportArgumentType]
            value = log_ratio(model, batch, law, _antithetic(half), density=held).mean(0).sum()
            slopes = dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))
        for name, slope in slopes.items():
            first = first | {name: _DECAY[0] * first[name] + (1 - _DECAY[0]) * slope}
            second = second | {name: _DECAY[1] * second[name] + (1 - _DECAY[1]) * slope**2}
            scale = (second[name] / (1 - _DECAY[1] ** t)).sqrt() + _EPSILON
            step = _like(rate, slope) * first[name] / (1 - _DECAY[0] ** t) / scale
            raw = raw | {name: raw[name] + step}
        if t > len(noise) // 2:
            mean = {name: mean[name] + raw[name] / (len(noise) - len(noise) // 2) for name in raw}
    return mean


def _antithetic(noise: Tensor) -> Tensor:
    return torch.cat([noise, -noise])


def _whitened(noise: Tensor) -> Tensor:
    """Noise (K, 1, B, Z) of second moment I: bounds are then exact where log p(x | z) is quadratic in z."""
    rows = noise.movedim(0, 2)
    factor = torch.linalg.cholesky(rows.mT @ rows / rows.shape[2])
    return torch.linalg.solve_triangular(factor, rows.mT, upper=False).mT.movedim(2, 0)


def _like(values: Tensor, other: Tensor) -> Tensor:
    """(S, B) with as many axes as (S, B, ...)."""
    return values.reshape(*values.shape, *[1] * (other.dim() - values.dim()))
