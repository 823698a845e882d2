"""`impute`: missing entries of rows, drawn under draws of the weights by any of the methods."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from bayesae import random
from bayesae.codes import Laplace, encode
from bayesae.data import Data, check_counts
from bayesae.errors import DataError, UnsupportedError
from bayesae.functional import check_finite
from bayesae.functional import n_draws as n_draws_of
from bayesae.imputation.assembling import assembled, concatenated, merged
from bayesae.imputation.base import Found, Method, Problem
from bayesae.imputation.iterated import FixedPoint
from bayesae.imputation.latent import ImportanceResampling
from bayesae.imputation.record import Imputations
from bayesae.imputation.rows import incomplete_rows, rows_observed
from bayesae.predictive import Predictive
from bayesae.predictive.streams import chunks
from bayesae.types import Batch, Params

__all__ = ["impute"]

_AT_ONCE = 2**15  # network rows in one call
_CODES = 5  # of a weight draw where the caller does not say how many there are to be
_SHARE, _LOW_ESS, _HIGH_RHAT, _LOW_ACCEPTANCE = 0.05, 0.1, 1.1, 0.05

Block = tuple[Predictive, Params]


@torch.no_grad()
def impute(
    predictive: Predictive,
    x: Data,
    mask: Tensor | np.ndarray | None = None,
    *,
    method: Method | None = None,
    n_draws: int = 50,
    n_weight_draws: int | None = None,
    seed: int | None = None,
    chunk_size: int | None = None,
    keep_draws: bool = True,
) -> Imputations:
    r"""Draw the missing entries of rows, under draws of the weights.

    .. math:: \theta_s \sim q(\theta), \qquad z_{sk} \sim p(z \mid x_o, \theta_s), \qquad
              x_m \sim p(x_m \mid z_{sk}, \theta_s)

    The likelihood sees observed entries only, and what stands in the places of the others does not matter. A row
    without any observed entry is drawn from the prior of the code, and a warning says how many there are. A linearised
    predictive stays so: outputs are expanded in the weights at every code.

    A warning counts the rows whose fixed point did not converge or whose chains diverged, be it one. R-hat, effective
    sizes and acceptance are estimates, of which some go beyond their limits by chance: those rows are counted where
    they are more than a twentieth.

    Args:
        predictive: Model, weights and codes.
        x: Rows (N, \*data), any of `Data`, NaN where an entry is missing, or anything there with a mask.
        mask: True where x is observed, (N, \*data). None: the mask of a `Batch`, or a loader's of such, and of what has
            none where x is not NaN.
        method: How codes are drawn: `FixedPoint`, `PseudoGibbs`, `MetropolisGibbs`, `ImportanceResampling`,
            `CodeLaplace`, `CodeHMC`. None: ``FixedPoint(noise=True)`` for a plain encoder, whose code has no law (give
            ``CodeLaplace()`` or ``CodeHMC()`` where it is to be N(0, I) before anything is seen); else
            ``ImportanceResampling(proposal=codes.Laplace())``.
        n_draws: M, how many draws are kept.
        n_weight_draws: S, which must divide M; each has K = M / S codes. None: all particles once, or M of them if
            there are more; of a continuous posterior a fifth of M (M below 10), rounded so that S divides M where that
            can be, or M where codes are points. K is M / S then, rounded up, and 2 at least where codes are drawn, for
            code and weights to be told apart in the moments, which are of all S K codes; of the draws the M are kept
            that come as evenly as may be from the weight draws. K = 1 is left to as many draws as particles, and to
            an S of M that was asked for.
        seed: The same seed gives the same bits; the caller's generators are put back. None advances them.
        chunk_size: Network rows in one call, 32,768 if None; it changes memory, and which random numbers a row gets:
            those of a row depend on its place, and on the other rows of its chunk too. Their law does not.
        keep_draws: Whether the record keeps its draws. False is for many rows of which mean and variance are wanted,
            the same to the bit: ``draws`` has no draw then.

    Returns:
        `Imputations`.

    Exact when: as the method says, given the model; in the draws of the weights always.
    Biased when: entries are missing because of what they would have been (not at random): no method here models why.
        By a fixed point, the default of a plain encoder: what the code could be is left out, and draws and intervals
        are too narrow; see `FixedPoint`.
    Cost: S times the method's; memory of all M draws of all rows, twice while they are put together, or without
        ``keep_draws`` of those of one chunk.

    Raises:
        ShapeError: If rows or mask do not fit.
        DataError: If nothing is missing, rows lie outside the likelihood's range, or numbers of draws do not fit.
        NonFiniteError: If an observed entry is infinite or NaN, or a draw or moment is.
        UnsupportedError: If the method is none, does not go with the codes, the networks are narrower than float32, or
            rows have a target of their own.

    Example:
        >>> import torch, bayesae as bae
        >>> from bayesae.testing import LinearGaussian
        >>> world = LinearGaussian.make(n_data=4)
        >>> model = world.model("full")
        >>> weights = bae.fit_weights(bae.weights.MAP(), model, world.x, progress=False)
        >>> x = world.x.clone()
        >>> x[:, 2] = torch.nan
        >>> predictive = bae.Predictive(model, weights, bae.codes.Amortised("full"))
        >>> tuple(bae.impute(predictive, x, method=bae.imputation.CodeLaplace(), n_draws=20, seed=0).draws.shape)
        (20, 4, 7)
    """
    check_counts(n_draws=n_draws, **({} if chunk_size is None else {"chunk_size": chunk_size}))
    if method is None:
        is_point = predictive.codes is None or predictive.codes is encode
        method = FixedPoint(noise=True) if is_point else ImportanceResampling(proposal=Laplace())
    if isinstance(method, type) or not isinstance(method, Method):
        fix = "Give an object, method=bae.imputation.CodeHMC() say."
        raise UnsupportedError("a method of imputation, or None", repr(method)[:80], fix)
    n_weights, n_codes = _numbers(predictive, method, n_draws, n_weight_draws)
    # a loader draws a number when it starts, which is not to be felt
    with random.scope(seed) if isinstance(x, DataLoader | IterableDataset) else nullcontext():
        rows = incomplete_rows(predictive, x, mask)
    size = _AT_ONCE if chunk_size is None else chunk_size
    n_calls = max(method.n_parallel(n_codes, n_weights), n_codes * n_weights)
    with random.scope(seed, rows.x.device):
        blocks, parts = list(predictive._weight_blocks(n_weights, n_codes, size)), []
        for batch in chunks(rows, n_calls, size):
            part = _imputed(blocks, batch, method, n_codes, predictive.weights.n_atoms, n_draws)
            parts.append(part if keep_draws else replace(part, draws=part.draws.new_empty(0, *part.draws.shape[1:])))
    result = concatenated(parts)
    _warn(result, rows_observed(rows), method, n_codes * n_weights)
    return result


def _numbers(predictive: Predictive, method: Method, n_draws: int, given: int | None) -> tuple[int, int]:
    """S and K, of which M are kept."""
    if given is not None:
        check_counts(n_weight_draws=given)
        if n_draws % given:
            fix = "Give n_draws= a multiple of it."
            raise DataError(f"n_weight_draws that divides the {n_draws} draws", f"{given}", fix)
        return given, n_draws // given
    n_atoms = predictive.weights.n_atoms
    if n_atoms is not None and n_draws % n_atoms == 0:
        return n_atoms, n_draws // n_atoms
    if n_atoms is not None:
        n = min(n_atoms, n_draws)
    elif not method.draws_codes or n_draws < 2 * _CODES:
        n = n_draws
    else:
        most = n_draws // _CODES
        n = max(n for n in range(1, most + 1) if n_draws % n == 0)
        n = n if 2 * n >= most and n > 1 else -(-n_draws // _CODES)
    return n, max(-(-n_draws // n), 2 if method.draws_codes else 1)


def _imputed(
    blocks: Sequence[Block], rows: Batch, method: Method, n_codes: int, n_atoms: int | None, n_draws: int
) -> Imputations:
    """Some rows under all weight draws; those without an observed entry from the prior of the code."""
    observed = rows_observed(rows)
    known, unknown = (_selected(rows, chosen) for chosen in (observed, ~observed))
    first, pieces = 0, []
    for own, params in blocks:
        found = method(Problem(own, params, known, first), n_codes) if len(known.x) else None
        prior = _from_prior(Problem(own, params, unknown, first), n_codes) if len(unknown.x) else None
        pieces.append((own.model.likelihood, merged(found, prior, observed)))
        first += n_draws_of(params)
    result = assembled(pieces, rows, method.has_noise, n_atoms, n_draws)
    named = {name: getattr(result.moments, name) for name in ("mean", "noise", "code", "weights")}
    fix = "Is the noise of the likelihood fitted, with two moments?"
    check_finite({"draws": result.draws} | named, "imputations", fix)
    return result


def _selected(rows: Batch, chosen: Tensor) -> Batch:
    if bool(chosen.all()):
        return rows
    named = {name: value[chosen.to(value.device)] for name, value in rows._asdict().items() if value is not None}
    return Batch(**named)


def _from_prior(problem: Problem, n_codes: int) -> Found:
    model, rows = problem.model, problem.rows
    like = model.encode(rows.x, rows.context)
    latents = torch.randn(n_codes, *like.shape, dtype=like.dtype, device=like.device)
    return Found(model.decode(latents, rows.context), torch.full_like(like[..., 0], n_codes))


def _warn(result: Imputations, observed: Tensor, method: Method, n: int) -> None:
    """Say what the numbers are worth, where that is little."""
    name, n_rows = type(method).__name__, len(observed)
    if n_empty := int((~observed).sum()):
        text = f"{n_empty} of {n_rows} rows have no observed entry: they are draws from the prior"
        warnings.warn(text, RuntimeWarning, stacklevel=4)
    # estimates, of which some of many rows go beyond a limit by chance; then what is no chance
    estimates = {
        f"an effective sample size below {_LOW_ESS:.0%} of their {n} codes": result.ess < _LOW_ESS * n,
        f"a split R-hat above {_HIGH_RHAT:g}": None if result.rhat is None else result.rhat > _HIGH_RHAT,
        f"under {_LOW_ACCEPTANCE:.0%} of their proposals taken": (
            None if result.acceptance is None else result.acceptance < _LOW_ACCEPTANCE
        ),
    }
    facts = {"chains that diverged": None if result.n_divergent is None else result.n_divergent > 0}
    if isinstance(method, FixedPoint) and result.residual is not None:
        facts["not come to a fixed point"] = ~(result.residual <= method.tolerance)
    counts = {
        what: (int(bad.sum()), least)
        for checks, least in ((estimates, _SHARE * n_rows), (facts, 0.0))
        for what, bad in checks.items()
        if bad is not None
    }
    said = [f"{count} have {what}" for what, (count, least) in counts.items() if count > least]
    if said:
        text = f"of the rows imputed by {name}, {n_rows} in all, {', '.join(said)}"
        fix = "Their draws may be far from the posterior: give more steps, or another method."
        warnings.warn(f"{text}. {fix}", RuntimeWarning, stacklevel=4)
