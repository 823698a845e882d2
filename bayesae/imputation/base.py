"""What a method of imputation is given, and what it gives: laws of the missing entries, one a code and weight draw."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from bayesae.codes import CodeModel, CodePosterior, encode
from bayesae.errors import DataError
from bayesae.functional import n_draws, select_draws
from bayesae.imputation.linearised import Linearised
from bayesae.metrics import ess, split_rhat
from bayesae.predictive import Predictive
from bayesae.types import Batch, Params

__all__ = ["DrawsCodes", "Found", "Method", "Problem", "diagnose", "joined", "picks", "shares"]


@dataclass(frozen=True)
class Problem:
    r"""Rows with entries missing, under draws of the weights.

    Args:
        predictive: Model, weights and codes; of a mixture one component's.
        params: Draws of the weights, leaves (S, \*shape).
        rows: With a mask and row numbers; at least one entry of every row is observed.
        first: Number of the first weight draw among all.
    """

    predictive: Predictive
    params: Params
    rows: Batch
    first: int

    @property
    def model(self) -> CodeModel:
        """The model at the weight draws: networks, or linearised where the predictive is."""
        if not self.predictive.is_linearised:
            return self.predictive.model.at(self.params)
        mean = {name: leaf[None] for name, leaf in self.predictive.weights.mean.items()}
        return Linearised(self.predictive.model, mean, self.params)

    @property
    def codes(self) -> CodePosterior:
        """How the predictive draws codes."""
        return encode if self.predictive.codes is None else self.predictive.codes

    @property
    def mask(self) -> Tensor:
        r"""True where x is observed, (B, \*data)."""
        assert self.rows.mask is not None
        return self.rows.mask

    def singles(self) -> Iterator[Problem]:
        """The same under one weight draw after another."""
        for s in range(n_draws(self.params)):
            yield replace(self, params=select_draws(self.params, slice(s, s + 1)), first=self.first + s)


@dataclass(frozen=True)
class Found:
    r"""Laws of the missing entries, by the outputs of the decoder.

    Args:
        outputs: (K, S, B, \*O).
        ess: Effective number of the K codes, (S, B).
        rhat: As of `Imputations`, as are the others, (S, B); None where the method has none.
        acceptance: (S, B).
        n_divergent: (S, B).
        residual: (S, B).
    """

    outputs: Tensor
    ess: Tensor
    rhat: Tensor | None = None
    acceptance: Tensor | None = None
    n_divergent: Tensor | None = None
    residual: Tensor | None = None


@runtime_checkable
class Method(Protocol):
    """How codes are drawn given what is observed; a frozen dataclass of hyper-parameters."""

    @property
    def has_noise(self) -> bool:
        """Whether missing entries are drawn from p(x | z, theta), or set to its mean."""
        ...

    @property
    def draws_codes(self) -> bool:
        """Whether there is more than one code for a row and weight draw."""
        ...

    def n_parallel(self, n_codes: int, n_weight_draws: int) -> int:
        """Network rows at once for every row of data."""
        ...

    def __call__(self, problem: Problem, n_codes: int) -> Found:
        """Draw K codes for every row under every weight draw."""
        ...


class DrawsCodes:
    """What methods have in common that draw codes, and then missing entries with noise."""

    @property
    def has_noise(self) -> bool:
        """Missing entries are drawn."""
        return True

    @property
    def draws_codes(self) -> bool:
        """Codes of a row and weight draw differ."""
        return True


def joined(parts: Sequence[Found]) -> Found:
    """Join what was found under consecutive weight draws.

    Args:
        parts: Of the same rows and number of codes.

    Returns:
        One record.
    """
    named = {one.name: [getattr(part, one.name) for part in parts] for one in fields(Found)}
    axes = {name: 1 if name == "outputs" else 0 for name in named}
    cat = {name: None if part[0] is None else torch.cat(part, axes[name]) for name, part in named.items()}
    return Found(**cat)  # pyright: ignore[reportArgumentType]


def shares(n_draws: int, n_weight_draws: int) -> list[int]:
    """How many of M draws each of S weight draws has: M / S rounded down or up, those with one less evenly between.

    Args:
        n_draws: M.
        n_weight_draws: S.

    Returns:
        S numbers whose sum is M.
    """
    ends = [n_draws * s // n_weight_draws for s in range(n_weight_draws + 1)]
    return [end - start for start, end in zip(ends, ends[1:], strict=False)]


def picks(n_codes: int, n_chains: int, n_steps: int) -> tuple[Tensor, Tensor]:
    """Which draws of chains are kept: as many of every chain as may be, evenly over its steps, the last first.

    Args:
        n_codes: K.
        n_chains: C.
        n_steps: M of each chain.

    Returns:
        Numbers of chains and of steps, (K,) each.

    Raises:
        DataError: If chains are too short.
    """
    each = -(-n_codes // n_chains)
    if n_steps < max(each, 4):
        fix = "Raise n_steps= or n_chains= of the method, or lower n_draws=."
        raise DataError(
            f"n_steps of at least {max(each, 4)} for {n_codes} codes of {n_chains} chains", f"{n_steps}", fix
        )
    place = torch.arange(n_codes)
    return place % n_chains, n_steps - 1 - (place // n_chains) * n_steps // each


def diagnose(latents: Tensor, n_codes: int) -> tuple[Tensor, Tensor]:
    """Effective sample size and split R-hat of chains of codes, the worst of the code's dimensions.

    Args:
        latents: (C, M, S, B, Z).
        n_codes: How many are kept, at most so many of which count.

    Returns:
        (S, B) each; a chain that never moved has one draw and an infinite R-hat.
    """
    each = latents.unbind(-1)  # one at a time: their spectra take several times the chains' own memory
    sizes = torch.stack([ess(one).nan_to_num(1.0) for one in each]).amin(0)
    ratios = torch.stack([split_rhat(one).nan_to_num(torch.inf, posinf=torch.inf) for one in each])
    return sizes.clamp(1, n_codes), ratios.amax(0)
