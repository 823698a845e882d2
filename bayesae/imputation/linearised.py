"""A model whose outputs are linear in the weights, as code posteriors see one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bayesae.forward_mode import jvp
from bayesae.models import Autoencoder
from bayesae.predictive.streams import linearise
from bayesae.types import Params

__all__ = ["Linearised"]


class Linearised:
    r"""Encoder and decoder, each to first order in the weights around their mean, at S weight draws.

    .. math:: d(z; \theta) \approx d(z; \theta_*) + \partial_\theta d(z; \theta_*)\, (\theta - \theta_*)

    The code is where the network is evaluated and is not expanded: given z the outputs are those of a linearised
    posterior, and p(z | x_o, theta) is that of this model.

    Args:
        model: The autoencoder.
        mean: Mean weights, leaves (1, \*shape).
        params: Draws of the weights, leaves (S, \*shape).
    """

    is_fitting = False

    def __init__(self, model: Autoencoder, mean: Params, params: Params) -> None:
        self.model, self.mean, self.params = model, mean, params
        self.likelihood = model.likelihood
        self._shifts = {name: (params[name] - leaf)[:, None] for name, leaf in mean.items()}

    def log_prior(self, latents: Tensor) -> Tensor:
        """Log p(z), (..., Z) to (...)."""
        return self.model.log_prior(latents)

    def encode(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        r"""(B, \*data) to codes (S, B, Z)."""
        return self.encode_parameters(x, context)[..., 0]

    def encode_parameters(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        r"""(B, \*data) to the parameters of q(z | x), (S, B, Z, g), expanded as the outputs are."""

        def run(params: Params) -> tuple[Tensor]:
            return (self.model.at(params).encode_parameters(x, context),)

        return linearise(run, self.mean, self.params)[0][:, 0]

    def decode(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        r"""(..., S, B, Z) to (..., S, B, \*O)."""

        def one(shift: Params, codes: Tensor) -> Tensor:
            def run(params: Params) -> Tensor:
                return self.model.at(params).decode(codes.unsqueeze(-3), context)

            value, slope = jvp(run, (self.mean,), (shift,))
            return value + slope

        axis = z.dim() - 3
        outputs = torch.func.vmap(one, randomness="same")(self._shifts, z.movedim(axis, 0))
        return outputs.squeeze(axis + 1).movedim(0, axis)

    def decoder_module(self) -> tuple[nn.Module, Params]:
        """No module computes these outputs: derivatives in the code are to be taken of `decode`."""
        return nn.Module(), {}
