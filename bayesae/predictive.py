"""`Predictive`: the double integral over codes and weights, drawn or in closed form, chunked and streamed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from bayesae import random
from bayesae.codes import CodePosterior, encode
from bayesae.codes.base import score_outputs
from bayesae.data import Data, as_rows
from bayesae.draws import Draws, Moments, concatenate_rows
from bayesae.errors import ShapeError, UnsupportedError
from bayesae.functional import check_complete, check_finite, n_draws, select_draws
from bayesae.models import Autoencoder
from bayesae.types import Batch, Params, WeightPosterior

__all__ = ["Predictive"]

_N_DRAWS = 32  # of a continuous posterior where the caller does not say
_ROWS_AT_ONCE = 4096  # network rows (weight draws times code draws times data rows) in one call


@runtime_checkable
class _HasOutputVariance(Protocol):
    def output_variance(self, network: nn.Module, x: Tensor, chunk_size: int | None) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Predictive:
    r"""p(x | D): the data's distribution with codes and weights integrated out.

    .. math:: p(x \mid D) = \iint p(x \mid z, \theta)\, q(z \mid x, \theta)\, q(\theta)\, dz\, d\theta

    Args:
        model: The autoencoder, in evaluation mode.
        weights: q(theta) from `fit_weights`, or any family.
        codes: q(z | x, theta); the plain encoder if None.
        linearised: Replace outputs by their first-order expansion in theta around the posterior's mean (in natural
            parameters; the code moves along). None follows the posterior: a Laplace posterior is linearised,
            others are run as networks.

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
        chunk_size: int = _ROWS_AT_ONCE,
        keep_outputs: bool = False,
    ) -> Draws:
        r"""Draw codes and weights and give every draw's log-densities.

        Args:
            x: Rows (N, \*data).
            mask: True where x is observed, (N, \*data).
            n_weight_draws: S; None takes all particles once, or 32 draws of a continuous posterior.
            n_latent_draws: K.
            seed: The same seed gives the same bits; the caller's generators are put back. None advances them.
            chunk_size: Network rows (K times S times data rows) in one call; changes memory, and numbers by
                rounding only.
            keep_outputs: Keep natural parameters (K, S, N, \*O) too.

        Returns:
            `Draws` over all rows.
        """
        rows = self._rows(x)
        with random.scope(seed, rows.device):
            params = self._draw_weights(n_weight_draws)
            pieces = []
            for batch in self._chunks(rows, mask, n_draws(params) * n_latent_draws, chunk_size):
                draws = self._evaluate(params, batch, n_latent_draws)
                pieces.append(draws if keep_outputs else draws.without_outputs())
        result = concatenate_rows(pieces)
        check_finite(
            {"log_likelihood": result.log_likelihood}, "log-densities", "Are the inputs far outside the training range?"
        )
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
            mask: True where x is observed; for code posteriors that read it.
            n_weight_draws: S as in a call; only read where draws are made. Giving it asks for draws even where
                the closed form is at hand.
            n_latent_draws: K, likewise.
            seed: As in a call.
            chunk_size: As in a call; data rows at a time for the closed form.

        Returns:
            `Moments`.

        Exact when: linearised, Normal, deterministic code; with particles, as the moments of their mixture.
        Cost: closed form, a few forward passes a row; else S * K forward passes.
        """
        rows = self._rows(x)
        is_closed_form = self.is_linearised and isinstance(self.weights, _HasOutputVariance)
        if is_closed_form and self._codes is encode and n_weight_draws is None:
            moments = self._closed_form(rows, chunk_size)
        else:
            size = _ROWS_AT_ONCE if chunk_size is None else chunk_size
            with random.scope(seed, rows.device):
                params = self._draw_weights(n_weight_draws)
                chunks = self._chunks(rows, mask, n_draws(params) * n_latent_draws, size)
                moments = concatenate_rows([self._pooled(params, batch, n_latent_draws, size) for batch in chunks])
        shaped = {name: getattr(moments, name) for name in ("mean", "noise", "code", "weights", "standard_error")}
        shaped = {name: v if v is None else v.reshape(rows.shape) for name, v in shaped.items()}
        check_finite({k: v for k, v in shaped.items() if v is not None}, "moments", "Are the inputs far out of range?")
        return replace(moments, **shaped)

    def decoder(self, n_weight_draws: int | None = None, *, seed: int | None = None) -> Callable[[Tensor], Tensor]:
        r"""The decoder under weight draws that are fixed once, as geometry needs it.

        Args:
            n_weight_draws: S, as in a call.
            seed: As in a call.

        Returns:
            A differentiable function from codes (B, Z) to data-space means (S, B, \*O).
        """
        with random.scope(seed, self.model.reference.device):
            params = self._draw_weights(n_weight_draws)
        mean = {name: leaf[None] for name, leaf in self.weights.mean.items()}

        def decode(z: Tensor) -> Tensor:
            if not self.is_linearised:
                outputs = self.model.at(params).decode(z.expand(n_draws(params), *z.shape))
            else:
                outputs = _linearise(lambda p: (self.model.at(p).decode(z[None]),), mean, params)[0][:, 0]
            return self.model.likelihood.mean(outputs)

        return decode

    @property
    def _codes(self) -> CodePosterior:
        return encode if self.codes is None else self.codes

    def _rows(self, x: Data) -> Tensor:
        rows = as_rows(x, self.model.reference)
        self.model.likelihood.check(rows)
        return rows

    def _draw_weights(self, n_weight_draws: int | None) -> Params:
        n = (self.weights.n_atoms or _N_DRAWS) if n_weight_draws is None else n_weight_draws
        if n < 1:
            raise ShapeError("n_weight_draws >= 1", f"{n}", "32 is the default.")
        return self.weights.sample(n)

    def _chunks(self, rows: Tensor, mask: Tensor | None, n_calls: int, chunk_size: int) -> Iterator[Batch]:
        if mask is not None and mask.shape != rows.shape:
            raise ShapeError(f"a mask of shape {tuple(rows.shape)}", f"{tuple(mask.shape)}", "One entry a number.")
        size = max(1, chunk_size // n_calls)
        for index in torch.arange(len(rows)).split(size):
            yield Batch(rows[index], None if mask is None else mask[index], index=index)

    def _evaluate(self, params: Params, batch: Batch, n_latent_draws: int) -> Draws:
        if not self.is_linearised:
            return self._codes(self.model.at(params), batch, n_latent_draws=n_latent_draws)
        mean = {name: leaf[None] for name, leaf in self.weights.mean.items()}

        def run(weights: Params) -> tuple[Tensor, Tensor]:
            draws = self._codes(self.model.at(weights), batch, n_latent_draws=n_latent_draws)
            if draws.log_q is not None or draws.outputs is None:
                raise UnsupportedError("a deterministic code", "a stochastic one", "Use linearised=False.")
            return draws.latents, draws.outputs

        latents, outputs = (part.squeeze(2).transpose(0, 1) for part in _linearise(run, mean, params))
        log_likelihood = score_outputs(self.model.likelihood, outputs, batch)
        log_prior = self.model.log_prior(latents)
        return Draws(latents, log_likelihood, log_prior, None, self.model.likelihood, outputs=outputs)

    def _closed_form(self, rows: Tensor, chunk_size: int | None) -> Moments:
        assert isinstance(self.weights, _HasOutputVariance)
        outputs, variance = self.weights.output_variance(self.model.network, rows, chunk_size)
        _check_size(outputs[0].numel(), rows)
        mean, noise, weights = self.model.likelihood.normal_moments(outputs, variance)
        return Moments(mean, noise, torch.zeros_like(mean), weights, self.model.likelihood)

    def _pooled(self, params: Params, batch: Batch, n_latent_draws: int, chunk_size: int) -> Moments:
        """Moments of one chunk of rows, streamed over the draws of weights."""
        likelihood = self.model.likelihood
        step = max(1, chunk_size // (len(batch.x) * n_latent_draws))
        pooled = _Pool()
        for start in range(0, n_draws(params), step):
            draws = self._evaluate(select_draws(params, slice(start, start + step)), batch, n_latent_draws)
            assert draws.outputs is not None
            mean = likelihood.mean(draws.outputs)
            noise = likelihood.variance(draws.outputs).mean(0)
            pooled.add(mean.mean(0), noise, mean.var(0, correction=0))
        n = pooled.count
        error = torch.sqrt((pooled.weights + pooled.code / n_latent_draws) / n)
        return Moments(pooled.mean, pooled.noise, pooled.code, pooled.weights, likelihood, error)


class _Pool:
    """Running means over weight draws, and the running variance of the first, by Chan's update."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, mean: Tensor, noise: Tensor, code: Tensor) -> None:
        r"""Take in draws (S', B, \*O)."""
        new, n_new = (mean.mean(0), noise.mean(0), code.mean(0), mean.var(0, correction=0)), len(mean)
        if self.count == 0:
            self.mean, self.noise, self.code, self.weights = new
        else:
            share = n_new / (self.count + n_new)
            shift = new[0] - self.mean
            self.weights = self.weights + share * (new[3] - self.weights) + share * (1 - share) * shift**2
            self.mean = self.mean + share * shift
            self.noise = self.noise + share * (new[1] - self.noise)
            self.code = self.code + share * (new[2] - self.code)
        self.count += n_new


def _linearise(run: Callable[[Params], tuple[Tensor, ...]], mean: Params, params: Params) -> tuple[Tensor, ...]:
    r"""First-order expansion of ``run`` around ``mean`` (leaves (1, \*shape)), at every draw: leading axis S."""

    def one(shift: Params) -> tuple[Tensor, ...]:
        value, slope = torch.func.jvp(run, (mean,), (shift,))  # pyright: ignore[reportAssignmentType] - no aux
        return tuple(v + s for v, s in zip(value, slope, strict=True))

    shifts = {name: (leaf - mean[name])[:, None] for name, leaf in params.items()}
    return torch.func.vmap(one)(shifts)


def _check_size(n_outputs: int, rows: Tensor) -> None:
    if n_outputs != math.prod(rows.shape[1:]):
        raise ShapeError(
            f"{math.prod(rows.shape[1:])} outputs for rows of shape {tuple(rows.shape[1:])}",
            f"{n_outputs}",
            "Give the decoder as many outputs as a row has numbers.",
        )
