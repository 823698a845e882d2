"""`OutputPredictive`: what can be predicted of a network that is not an autoencoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from bayesae.data import as_rows
from bayesae.draws import Moments
from bayesae.errors import UnsupportedError
from bayesae.functional import check_complete, check_finite, check_is_evaluable
from bayesae.types import Likelihood, Params

__all__ = ["OutputPredictive"]


class _LinearisedNormal(Protocol):
    @property
    def mean(self) -> Params: ...

    def output_variance(
        self, network: nn.Module, x: Tensor, chunk_size: int | None = None
    ) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class OutputPredictive:
    r"""Linearised prediction of any network x -> outputs under a Normal over its weights.

    .. math:: f(x) \sim \mathcal{N}\big(f(x; \mu),\, \operatorname{diag} J C J^\top\big)

    It has no code, so no reconstruction, no score against x and no decoder; `bayesae.Predictive` has them where the
    network is an autoencoder.

    Args:
        network: In evaluation mode.
        weights: A Normal family over the network's parameters.
        likelihood: Of targets given outputs; None where this library has none for them.
        reason: Why the network is not taken for an autoencoder.

    Raises:
        ParameterError: If the posterior lacks a parameter of the network, or has one too many.
        UnsupportedError: If the network is in training mode.
    """

    network: nn.Module
    weights: _LinearisedNormal
    likelihood: Likelihood | None
    reason: str

    def __post_init__(self) -> None:
        check_complete({name: leaf[None] for name, leaf in self.weights.mean.items()}, self.network)
        check_is_evaluable(self.network)

    @torch.no_grad()
    def outputs(self, x: Tensor | np.ndarray, *, chunk_size: int | None = None) -> tuple[Tensor, Tensor]:
        r"""Outputs at the mean and their variance due to the weights: logits of a classifier.

        Args:
            x: Rows (N, \*data).
            chunk_size: Rows at a time; None lets the engine choose.

        Returns:
            Mean and variance, (N, \*O), in units of the outputs.

        Exact when: in the linearised network, always.
        Cost: a few forward passes a row.

        Raises:
            NonFiniteError: If an input or a moment is not finite.
            ShapeError: If the rows do not fit.
        """
        rows = as_rows(x, next(self.network.parameters())).x
        mean, variance = self.weights.output_variance(self.network, rows, chunk_size)
        check_finite({"mean": mean, "variance": variance}, "moments", "Are the inputs far outside the training range?")
        return mean, variance

    def moments(self, x: Tensor | np.ndarray, *, chunk_size: int | None = None) -> Moments:
        r"""Predictive mean and variance of the targets.

        Args:
            x: Rows (N, \*data).
            chunk_size: Rows at a time; None lets the engine choose.

        Returns:
            `Moments` in the outputs' shape (N, \*O); their part of the code is 0, as there is none.

        Raises:
            UnsupportedError: If there is no likelihood.
            NonFiniteError: If an input or a moment is not finite.
            ShapeError: If the rows do not fit.
        """
        if self.likelihood is None:
            raise UnsupportedError(
                "a likelihood of the outputs", "a classifier, of which this library has none", "Use outputs(x)."
            )
        moments = self.likelihood.normal_moments(*self.outputs(x, chunk_size=chunk_size))
        if moments is None:
            kind = type(self.likelihood).__name__
            raise UnsupportedError("a likelihood with moments in closed form", kind, "Use outputs(x).")
        mean, noise, weights = moments
        return Moments(mean, noise, torch.zeros_like(mean), weights, self.likelihood)

    def decoder(self, n_weight_draws: int | None = None, *, seed: int | None = None) -> NoReturn:
        """Always raises: `bayesae.Predictive.decoder` needs a code.

        Args:
            n_weight_draws: Not read.
            seed: Not read.

        Raises:
            UnsupportedError: With the reason why the network is not taken for an autoencoder.
        """
        raise UnsupportedError(
            "an autoencoder, whose decoder starts from a code",
            self.reason,
            "Name the decoder's first module by from_laplace(la, cut=...), or fit an (encoder, decoder) pair.",
        )
