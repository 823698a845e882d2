"""`Predictive`: the double integral over codes and weights, drawn or in closed form, chunked and streamed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from bayesae import random
from bayesae.codes import CodePosterior, encode
from bayesae.codes.base import score_outputs
from bayesae.data import Data, as_rows, as_tensor, check_counts
from bayesae.draws import Draws, Moments, concatenate_rows, concatenate_weight_draws
from bayesae.errors import UnsupportedError
from bayesae.families import Mixture
from bayesae.functional import check_complete, check_finite, n_draws, select_draws
from bayesae.models import Autoencoder
from bayesae.predictive.decoders import DrawnDecoder
from bayesae.predictive.mixtures import mixed
from bayesae.predictive.streams import Pool, check_chunk, check_size, chunks, joined, linearise, spread
from bayesae.types import Batch, Params, WeightPosterior

__all__ = ["Predictive"]

_N_DRAWS = 32  # of a continuous posterior where the caller does not say
_FAR = "Are the inputs far outside the training range?"
_NUMBERS_OF_WEIGHTS = 2**24  # in one block of weight draws, 64 MB in float32


@runtime_checkable
class _HasOutputVariance(Protocol):
    def output_variance(self, network: nn.Module, x: Tensor, chunk_size: int | None) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Predictive:
    r"""p(x | D): the data's distribution with codes and weights integrated out.

    .. math:: p(x \mid D) = \iint p(x \mid z, \theta)\, q(z \mid x, \theta)\, q(\theta)\, dz\, d\theta

    Args:
        model: The autoencoder, in evaluation mode; of a posterior that learned noise along with the weights, the same
            networks with that noise.
        weights: q(theta) from `fit_weights`, or any family.
        codes: q(z | x, theta); the plain encoder if None.
        linearised: Replace outputs by their first-order expansion in theta around the posterior's mean (in natural
            parameters; the code moves along). None follows the posterior: a Laplace posterior is linearised,
            others are run as networks. Components of a mixture are expanded around their own means.

    Raises:
        UnsupportedError: If particles are to be linearised, or the network is in training mode.
        ParameterError: If the posterior lacks a parameter of the model, or has one too many.
    """

    model: Autoencoder
    weights: WeightPosterior
    codes: CodePosterior | None = None
    linearised: bool | None = None

    def __post_init__(self) -> None:
        if self.linearised and self.weights.n_atoms is not None:
            raise UnsupportedError("a continuous posterior to linearise", "particles", "Use linearised=False.")
        mean = {name: leaf[None] for name, leaf in self.weights.mean.items()}
        check_complete(mean, self.model.network)
        self._components()
        if (noise := getattr(self.weights, "noise", None)) is not None:
            object.__setattr__(self, "model", self.model.with_noise(noise))
        self.model.at(mean)

    @property
    def is_linearised(self) -> bool:
        """What ``linearised=None`` came to."""
        return self.weights.is_linearised if self.linearised is None else self.linearised

    @torch.no_grad()
    def __call__(
        self,
        x: Data,
        mask: Tensor | None = None,
        *,
        n_weight_draws: int | None = None,
        n_latent_draws: int = 1,
        seed: int | None = None,
        chunk_size: int | None = None,
        keep_outputs: bool = False,
    ) -> Draws:
        r"""Draw codes and weights and give every draw's log-densities.

        Args:
            x: Rows (N, \*data).
            mask: True where x is observed, (N, \*data); other entries may be NaN, are read as 0 and not scored.
            n_weight_draws: S; None takes all particles once, or 32 draws of a continuous posterior.
            n_latent_draws: K.
            seed: The same seed gives the same bits; the caller's generators are put back. None advances them.
            chunk_size: Network rows (K times S times data rows) in one call, 4096 if None; changes memory, and
                numbers by rounding only (of a stochastic code, if its noise is keyed on ``Batch.index``, as
                `bayesae.random.row_normal` does).
            keep_outputs: Keep natural parameters (K, S, N, \*O) too; not of a mixture whose components learned noise of
                their own, which the one likelihood of the result could not score.

        Returns:
            `Draws` over all rows.

        Cost: S * K forward passes a row, two to three times that where linearised; memory of one chunk, of 64 MB of
            weights, and of the densities.

        Raises:
            ShapeError: If rows or mask do not fit.
            DataError: If there are no rows, they lie outside the likelihood's range, or a loader shuffles them.
            NonFiniteError: If an observed entry or a log-density is not finite.
            UnsupportedError: If the network or the code does not allow what is asked, or outputs are kept of components
                with different noise.
        """
        size = check_chunk(chunk_size)
        rows = self._rows(x, mask, seed)
        with random.scope(seed, rows.x.device):
            blocks = []
            for own, params in self._weight_blocks(n_weight_draws, n_latent_draws, size):
                some = chunks(rows, n_draws(params) * n_latent_draws, size)
                pieces = (own._evaluate(params, batch, n_latent_draws) for batch in some)
                blocks.append(concatenate_rows([d if keep_outputs else d.without_outputs() for d in pieces]))
        result = concatenate_weight_draws(blocks)
        check_finite({"log_likelihood": result.log_likelihood}, "log-densities", _FAR)
        return result

    @torch.no_grad()
    def moments(
        self,
        x: Data,
        mask: Tensor | None = None,
        *,
        n_weight_draws: int | None = None,
        n_latent_draws: int = 1,
        seed: int | None = None,
        chunk_size: int | None = None,
    ) -> Moments:
        r"""Predictive mean, and variance split into noise, code and weights, in data space and the data's shape.

        Closed form (``is_exact``) for a linearised Normal posterior with a deterministic code: no draw is made.
        Else outputs are streamed, with a Monte-Carlo standard error of the mean.

        Args:
            x: Rows (N, \*data).
            mask: As in a call.
            n_weight_draws: S as in a call; only read where draws are made. Giving it asks for draws even where
                the closed form is at hand.
            n_latent_draws: K, likewise.
            seed: As in a call.
            chunk_size: As in a call; data rows at a time for the closed form.

        Returns:
            `Moments`.

        Exact when: linearised, Normal, deterministic code; with particles, as the moments of their mixture.
        Cost: closed form, a few forward passes a row; else as a call's, and memory flat in S.

        Raises:
            ShapeError: If rows or mask do not fit.
            DataError: If there are no rows, they lie outside the likelihood's range, or a loader shuffles them.
            NonFiniteError: If an observed entry or a moment is not finite.
            UnsupportedError: If the network or the code does not allow what is asked.
        """
        size = check_chunk(chunk_size)
        rows = self._rows(x, mask, seed)
        moments = None
        if self.is_linearised and self._codes is encode and n_weight_draws is None and n_latent_draws == 1:
            moments = self._closed_form(rows, chunk_size)
        if moments is None:
            with random.scope(seed, rows.x.device):
                moments = self._streamed(rows, n_weight_draws, n_latent_draws, size)
        shaped = {name: getattr(moments, name) for name in ("mean", "noise", "code", "weights", "standard_error")}
        # classes without an order have an axis of classes more than the data
        extra = () if moments.mean.numel() == rows.explained.numel() else moments.mean.shape[-1:]
        shaped = {name: v if v is None else v.reshape(*rows.explained.shape, *extra) for name, v in shaped.items()}
        finite = {name: v for name, v in shaped.items() if v is not None and name != "standard_error"}
        check_finite(finite, "moments", _FAR)
        return replace(moments, **shaped)

    @torch.no_grad()
    def reduce(
        self,
        reduction: Callable[[Draws], dict[str, Tensor]],
        x: Data,
        mask: Tensor | None = None,
        *,
        n_weight_draws: int | None = None,
        n_latent_draws: int = 1,
        seed: int | None = None,
        chunk_size: int | None = None,
    ) -> dict[str, Tensor]:
        r"""Draw as a call does, outputs kept, and keep what a function of the draws of a few rows makes of them.

        ``reduce(ood.all_scores, x)`` is every score that reads `Draws`, those that read outputs too, in one pass.

        Args:
            reduction: From the draws (K, S, B', ...) of some rows, all weight draws together, to tensors (B', ...).
            x: Rows (N, \*data); it and the others as in a call.
            mask: As in a call.
            n_weight_draws: S.
            n_latent_draws: K.
            seed: As in a call; with one seed the draws are those of a call.
            chunk_size: Network rows at a time, 4096 if None.

        Returns:
            What the function gave, (N, ...) each, without names that it gives of some rows only. Raises as a call does.

        Cost: that of a call; memory of one chunk's outputs (K, S, B', \*O) and of all S draws of the weights.
        """
        size, rows, found = check_chunk(chunk_size), self._rows(x, mask, seed), []
        with random.scope(seed, rows.x.device):
            blocks = list(self._weight_blocks(n_weight_draws, n_latent_draws, size))
            n = sum(n_draws(params) for _, params in blocks)
            for batch in chunks(rows, n * n_latent_draws, size):
                draws = concatenate_weight_draws([own._evaluate(some, batch, n_latent_draws) for own, some in blocks])
                check_finite({"log_likelihood": draws.log_likelihood}, "log-densities", _FAR)
                found.append(reduction(draws))
        return joined(found)

    @torch.no_grad()
    def over_chunks(
        self,
        measure: Callable[[Params, Batch, Callable[[int], Draws]], tuple[Tensor, ...]],
        x: Data,
        mask: Tensor | None = None,
        *,
        n_weight_draws: int | None = None,
        n_latent_draws: int = 1,
        seed: int | None = None,
        chunk_size: int | None = None,
        progress: bool | None = None,
    ) -> tuple[Tensor, ...]:
        r"""Measure all rows under all weight draws, some of them at a time: what `evaluation` is built on.

        Args:
            measure: Of weight draws (leaves (S', \*shape)), rows (B' of them), and a function that draws K' codes for
                these: tensors (S', B', ...).
            x: Rows (N, \*data).
            mask: As in a call, and so are the others.
            n_weight_draws: S.
            n_latent_draws: Codes of a row and weight draw that ``measure`` holds at once.
            seed: Of weight draws and codes.
            chunk_size: Network rows at a time.
            progress: Show a progress bar; None shows it on a terminal only.

        Returns:
            What was measured, (S, N, ...) each. Raises as a call does.
        """
        size, rows = check_chunk(chunk_size), self._rows(x, mask, seed)
        total, is_hidden = self._n_draws(n_weight_draws) * len(rows.x), None if progress is None else not progress
        with random.scope(seed, rows.x.device), tqdm(total=total, unit="rows", disable=is_hidden) as bar:
            blocks = []
            for own, params in self._weight_blocks(n_weight_draws, n_latent_draws, size):
                pieces = []
                for batch in chunks(rows, n_draws(params) * n_latent_draws, size):
                    pieces.append(measure(params, batch, partial(own._evaluate, params, batch)))
                    bar.update(len(batch.x) * n_draws(params))
                blocks.append([torch.cat(parts, 1) for parts in zip(*pieces, strict=True)])
        return tuple(torch.cat(parts) for parts in zip(*blocks, strict=True))

    def decoder(
        self, n_weight_draws: int | None = None, *, context: Tensor | None = None, seed: int | None = None
    ) -> DrawnDecoder:
        r"""The decoder under weight draws that are fixed once, as geometry needs it.

        Args:
            n_weight_draws: S, as in a call.
            context: For a decoder that takes one: (1, C) for all codes, or (B, C), one for each; labels may be (B,).
            seed: As in a call.

        Returns:
            A differentiable function from codes (B, Z) to data-space means (S, B, \*O); its ``singles`` are those of
            one draw each. It raises `ShapeError` if there are neither one context nor as many as codes.
        """
        if context is not None:
            context = as_tensor(context)
            context = context[:, None] if context.dim() == 1 else context.flatten(1)
        with random.scope(seed, self.model.reference.device):
            shares = [(own._decode, own.weights.sample(n)) for own, n in self._shares(self._n_draws(n_weight_draws))]
        return DrawnDecoder(tuple(shares), context)

    def _decode(self, params: Params, z: Tensor, context: Tensor | None) -> Tensor:
        if not self.is_linearised:
            outputs = self.model.at(params).decode(z.expand(n_draws(params), *z.shape), context)
        else:
            mean = {name: leaf[None] for name, leaf in self.weights.mean.items()}
            outputs = linearise(lambda p: (self.model.at(p).decode(z[None], context),), mean, params)[0][:, 0]
        return self.model.likelihood.mean(outputs)

    def _components(self) -> list[Predictive]:
        """Of a mixture the predictive of every component, which has a mean and maybe noise of its own; else none."""
        if not isinstance(self.weights, Mixture):
            return []
        return [replace(self, weights=one, linearised=self.is_linearised) for one in self.weights.components]

    def _shares(self, n: int) -> list[tuple[Predictive, int]]:
        """Whose draws n draws of the weights are."""
        if not isinstance(self.weights, Mixture):
            return [(self, n)]
        pairs = zip(self._components(), self.weights.counts(n), strict=True)
        return [share for one, count in pairs if count for share in one._shares(count)]

    @property
    def _codes(self) -> CodePosterior:
        return encode if self.codes is None else self.codes

    def _rows(self, x: Data, mask: Tensor | None, seed: int | None) -> Batch:
        # a loader draws a number when it starts, which the weights should not feel
        with random.scope(seed) if isinstance(x, DataLoader) else nullcontext():
            rows = as_rows(x, self.model.reference, mask)
        self.model.likelihood.check(rows.explained)
        return rows

    def _n_draws(self, n_weight_draws: int | None) -> int:
        # of a continuous mixture as many as come evenly
        n_parts = len(self._components()) or 1
        n = (self.weights.n_atoms or -(-_N_DRAWS // n_parts) * n_parts) if n_weight_draws is None else n_weight_draws
        check_counts(n_weight_draws=n)
        return n

    def _weight_blocks(
        self, n_weight_draws: int | None, n_latent_draws: int, chunk_size: int
    ) -> Iterator[tuple[Predictive, Params]]:
        """Draws of the weights, as many at a time as memory and the chunk allow, and whose they are."""
        check_counts(n_latent_draws=n_latent_draws)
        n_parameters = sum(parameter.numel() for parameter in self.model.network.parameters())
        for own, n in self._shares(self._n_draws(n_weight_draws)):
            step = max(1, min(n, chunk_size // n_latent_draws, _NUMBERS_OF_WEIGHTS // n_parameters))
            # particles at once, so that they come as evenly as they can
            particles = None if own.weights.n_atoms is None else own.weights.sample(n)
            for start in range(0, n, step):
                part = slice(start, min(n, start + step))
                size = part.stop - part.start
                yield own, own.weights.sample(size) if particles is None else select_draws(particles, part)

    def _evaluate(self, params: Params, batch: Batch, n_latent_draws: int) -> Draws:
        if not self.is_linearised:
            return self._codes(self.model.at(params), batch, n_latent_draws=n_latent_draws)
        mean = {name: leaf[None] for name, leaf in self.weights.mean.items()}

        def run(weights: Params) -> tuple[Tensor, ...]:
            # the noise of a stochastic code is keyed on the row, so that the code moves with theta alone
            draws = self._codes(self.model.at(weights), batch, n_latent_draws=n_latent_draws)
            assert draws.outputs is not None
            return (draws.latents, draws.outputs) + (() if draws.log_q is None else (draws.log_q,))

        latents, outputs, *rest = (part.squeeze(2).transpose(0, 1) for part in linearise(run, mean, params))
        log_likelihood = score_outputs(self.model.likelihood, outputs, batch)
        log_prior, log_q = self.model.log_prior(latents), rest[0] if rest else None
        return Draws(latents, log_likelihood, log_prior, log_q, self.model.likelihood, outputs=outputs, mask=batch.mask)

    def _closed_form(self, rows: Batch, chunk_size: int | None) -> Moments | None:
        """Moments without a draw; None where there are no variances of outputs, or they do not settle the data's."""
        if parts := self._components():
            moments = [one._closed_form(rows, chunk_size) for one in parts]
            known = [one for one in moments if one is not None]
            return mixed(known) if len(known) == len(moments) else None
        if not isinstance(self.weights, _HasOutputVariance):
            return None
        likelihood = self.model.likelihood
        outputs, variance = self.weights.output_variance(self.model.network, self.model.inputs(rows), chunk_size)
        check_size(likelihood, outputs.shape[1:], rows.explained)
        moments = likelihood.normal_moments(outputs, variance)
        if moments is None:
            return None
        mean, noise, weights = moments
        return Moments(mean, noise, torch.zeros_like(mean), weights, likelihood)

    def _streamed(self, rows: Batch, n_weight_draws: int | None, n_latent_draws: int, chunk_size: int) -> Moments:
        """Moments over draws: one running mean and variance for every chunk of rows."""
        pools, is_point = {}, True
        for own, params in self._weight_blocks(n_weight_draws, n_latent_draws, chunk_size):
            # chunks are cut for one weight draw and split further inside, so that all blocks meet the same ones
            for start, batch in enumerate(chunks(rows, n_latent_draws, chunk_size)):
                step = max(1, chunk_size // (len(batch.x) * n_latent_draws))
                for first in range(0, n_draws(params), step):
                    some = select_draws(params, slice(first, first + step))
                    draws = own._evaluate(some, batch, n_latent_draws)
                    assert draws.outputs is not None
                    is_point = draws.log_q is None
                    mean = draws.likelihood.mean(draws.outputs)
                    noise = draws.likelihood.variance(draws.outputs).mean(0)
                    pools.setdefault(start, Pool()).add(mean.mean(0), noise, spread(mean))
        # particles that each came equally often, with a code that has nothing to draw, are the whole integral
        n, n_atoms = pools[0].count, self.weights.n_atoms
        is_exact = is_point and n_atoms is not None and n % n_atoms == 0
        return concatenate_rows([pool.moments(self.model.likelihood, is_exact) for pool in pools.values()])
