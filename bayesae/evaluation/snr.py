"""How much of a training gradient is signal: its mean against its spread over fresh noise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesae import random
from bayesae.codes import CodePosterior, amortised, modules_of
from bayesae.data import Data, as_rows, check_counts
from bayesae.errors import ParameterError, UnsupportedError
from bayesae.evaluation.sums import RunningMean
from bayesae.functional import check_finite, parameters_of
from bayesae.models import Autoencoder
from bayesae.objectives.base import Objective, climbed
from bayesae.types import Batch, Params

__all__ = ["GradientSNR", "gradient_snr"]

_ROWS, _NUMBERS = 2**14, 2**22  # of one pass: rows through the networks, numbers of gradients


@dataclass(frozen=True)
class GradientSNR:
    r"""Mean and variance of a gradient over R repeats, and its signal-to-noise ratio.

    Args:
        mean: Of each parameter's gradient, by name, in its shape.
        var: Likewise, of one gradient; divisor R - 1.
        n_repeats: R.
    """

    mean: Params
    var: Params
    n_repeats: int

    def elementwise(self) -> Params:
        r""":math:`|\mathbb{E} g| / \operatorname{sd} g` of each number, its square without the mean's own noise.

        .. math:: \sqrt{\max(0,\; \bar g^2 - \operatorname{var} / R)} \big/ \sqrt{\operatorname{var}}

        Returns:
            By name; 0 for a number that nothing depends on, infinite for one without noise.
        """
        return {name: _ratio(signal, self.var[name]) for name, signal in self._signal().items()}

    def pooled(self) -> dict[str, Tensor]:
        r"""One ratio for each group, of the sums over its numbers of squared means and of variances.

        Returns:
            A number for "encoder", "decoder" and, where the code posterior brings networks along, "codes".
        """
        sums: dict[str, list[Tensor]] = {}
        for name, signal in self._signal().items():
            sums.setdefault(name.split(".")[0], []).append(torch.stack([signal.sum(), self.var[name].sum()]))
        return {group: _ratio(*torch.stack(parts).sum(0).unbind()) for group, parts in sums.items()}

    def _signal(self) -> Params:
        """Squared means, without bias, so that some may be negative."""
        return {name: mean**2 - self.var[name] / self.n_repeats for name, mean in self.mean.items()}


def gradient_snr(
    model: Autoencoder,
    data: Data,
    objective: Objective,
    *,
    codes: CodePosterior = amortised,
    n_latent_draws: int = 1,
    n_repeats: int = 1000,
    seed: int | None = None,
) -> GradientSNR:
    r"""Signal-to-noise ratio of the gradient that a training step on these rows would follow.

    .. math:: g = \nabla_\theta \tfrac1B \sum_b \ell(x_b, \theta), \qquad
              \mathrm{SNR} = |\mathbb{E}\, g| \,/\, \operatorname{sd} g

    over the noise of the codes; the rows are the same in every repeat. Of an objective with two bounds the decoder's
    parameters follow the decoder's, and those of the encoder and of the codes' own networks the encoder's. The
    weight prior, which has no noise, is left out. Repeats are weight draws of equal weights, each of which has a
    gradient of its own; they go one by one only where the code posterior brings networks along.

    Args:
        model: In evaluation mode; it is not touched.
        data: The rows of the step, all in one batch; see `bayesae.data.Data`.
        objective: As in `fit_model`; one that changes is taken as it ends.
        codes: How codes are drawn; with fresh noise in every repeat.
        n_latent_draws: K.
        n_repeats: R. Ratios below about :math:`R^{-1/2}` drown in the noise of the mean.
        seed: Of the noise; None advances the caller's generator.

    Returns:
        Moments of the gradient of every trainable parameter, in float64, and the ratios made of them.

    Exact when: R goes to infinity; the squared mean is without bias at any R.
    Biased when: R is small: a ratio is cut at 0 and divided by an estimate.
    Cost: R training steps, many in one mapped pass; memory of some 10^4 rows' activations and 4 * 10^6 gradients.

    Raises:
        DataError: If there are no rows, or a count is none.
        UnsupportedError: If there are fewer than two repeats, or the network draws numbers of its own.
        ParameterError: If all parameters are frozen.
        NonFiniteError: If a gradient is not finite.

    References:
        | Tighter Variational Bounds are Not Necessarily Better (Rainforth et al., 2018,
          https://arxiv.org/abs/1802.04537)
    """
    check_counts(n_latent_draws=n_latent_draws, n_repeats=n_repeats)
    if n_repeats < 2:
        raise UnsupportedError("at least two repeats", "one", "A variance needs two; 1000 is the default.")
    rows = as_rows(data, model.reference)
    model.likelihood.check(rows.explained)
    found: dict[str, RunningMean] = {}
    with random.scope(seed, rows.x.device), torch.enable_grad():
        for gradients in _gradients(model, rows, objective, codes, n_latent_draws, n_repeats):
            for name, values in gradients.items():
                found.setdefault(name, RunningMean()).add(values)
    mean = {name: one.mean for name, one in found.items()}
    check_finite(mean, "gradients", "Are the inputs far outside the training range?")
    return GradientSNR(mean, {name: one.squares / (n_repeats - 1) for name, one in found.items()}, n_repeats)


def _gradients(
    model: Autoencoder, rows: Batch, objective: Objective, codes: CodePosterior, n_latent_draws: int, n_repeats: int
) -> Iterator[Params]:
    r"""Gradients of some repeats at a time, leaves (R', \*shape)."""
    is_trained = {name: leaf.requires_grad for name, leaf in model.network.named_parameters()}
    params = parameters_of(model.network)
    own = {f"codes.{name}": leaf for name, leaf in modules_of(codes).named_parameters() if leaf.requires_grad}
    n_numbers = max(1, sum(leaf.numel() for leaf in params.values()))
    if not own and not any(is_trained.values()):
        raise ParameterError("a parameter with a gradient", "a model with all of them frozen", "Set requires_grad.")
    size = 1 if own else max(1, min(_ROWS // (n_latent_draws * len(rows.x)), _NUMBERS // n_numbers))
    for start in range(0, n_repeats, size):
        n = min(size, n_repeats - start)
        repeated = {name: leaf.expand(n, *leaf.shape).clone() for name, leaf in params.items()}
        leaves = {name: leaf.requires_grad_() for name, leaf in repeated.items() if is_trained[name]}
        draws = codes(model.at(repeated, is_fitting=True), rows, n_latent_draws=n_latent_draws)
        values = climbed(objective, draws)
        gradients = {}
        for group, some in _by_group(leaves | own, values).items():
            # a repeat's value depends on its own leaves alone, so that the sum's gradient is each one's own
            found = torch.autograd.grad(
                values[group].mean(1).sum(), list(some.values()), retain_graph=True, materialize_grads=True
            )
            gradients |= dict(zip(some, found, strict=True))
        yield {name: value[None] if name in own else value for name, value in gradients.items()}


def _by_group(leaves: Params, values: Params) -> dict[str, Params]:
    """Which parameters follow which bound."""
    groups: dict[str, Params] = {}
    for name, leaf in leaves.items():
        group = "encoder" if "encoder" in values and not name.startswith("decoder.") else "decoder"
        groups.setdefault(group, {})[name] = leaf
    return groups


def _ratio(signal: Tensor, var: Tensor) -> Tensor:
    """Root of signal over noise; 0 where there is neither."""
    signal = signal.clamp_min(0)
    return torch.where(signal > 0, (signal / var).sqrt(), torch.zeros_like(signal))
