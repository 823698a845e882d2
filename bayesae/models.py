"""`Autoencoder`, two nets and their heads, and `Bound`, the same at given weights."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Literal
from weakref import WeakSet

import torch
from torch import Tensor, nn

from bayesae.errors import BayesAEError, DataError, ShapeError, UnsupportedError
from bayesae.functional import check_complete, check_is_evaluable, dtype_of, map_over_draws, n_draws
from bayesae.types import Batch, Likelihood, Params

__all__ = ["Autoencoder", "Bound", "wrap"]


# networks that torch.func.vmap was found not to map; kept here and not on the caller's modules
_RUN_IN_A_LOOP: WeakSet[nn.Module] = WeakSet()
# what torch says of rows that do not fit, over its versions and layers
_MISFIT = ("shape", "size", "dimension", "channels", "Expected")


class Autoencoder(nn.Module):
    r"""An encoder and a decoder with a likelihood on the outputs and a prior on the code.

    .. math:: z = e(x; \theta_e), \qquad p(x \mid z) = p(x \mid d(z; \theta_d)), \qquad p(z) = \mathcal{N}(0, I)

    Args:
        encoder: Maps (B, \*data) to codes (B, Z); or to (B, Z, g), the g parameters of q(z | x) of each code
            dimension, the location first (a log-scale second for `codes.amortised`). Such an encoder ends in
            ``nn.Unflatten(1, (Z, g))``, as ``nets.mlp(784, [256], (Z, g))`` does, and e(x) is its location.
        decoder: Maps codes (B, Z) to outputs (B, \*O): as many numbers as a row of data has; another shape with
            the same number is fine (784 for 1 x 28 x 28).
        likelihood: Turns outputs into a distribution over data.
        data_shape: Shape (\*data) of a row of x; needed only where a network takes a context, because `network` is a
            function of one tensor.

    A network whose attribute ``takes_context`` is True is called with a second argument, the context (B, C) of the rows
    (``Batch.context``: labels or covariates, flattened); see `nets.Conditional`.

    Over weight draws the networks are mapped by ``torch.func.vmap``. One that does not allow it (it writes in place,
    is recurrent, or differentiates inside) is found out by the first call and run in a loop from then on, with equal
    results.

    Raises:
        ParameterError: If the networks have no parameters.
        ShapeError: If their parameters have several dtypes.
        UnsupportedError: If encoder and decoder share parameters, or a network takes a context and there is no
            ``data_shape``.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        likelihood: Likelihood,
        *,
        data_shape: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.likelihood, self.data_shape = likelihood, None if data_shape is None else tuple(data_shape)
        dtype_of(self)
        if self.takes_context and data_shape is None:
            fix = "Give Autoencoder(..., data_shape=(1, 28, 28)), say."
            raise UnsupportedError("the shape of a row for networks that take a context", "data_shape=None", fix)
        shared = {id(p) for p in encoder.parameters()} & {id(p) for p in decoder.parameters()}
        if shared:
            names = [name for name, value in decoder.named_parameters() if id(value) in shared]
            raise UnsupportedError(
                "an encoder and a decoder with weights of their own",
                f"decoder parameters {names} tied to the encoder's",
                "Untie them; a draw has one value per name.",
            )

    @property
    def reference(self) -> Tensor:
        """Any parameter: it gives device and dtype."""
        return next(self.parameters())

    @property
    def takes_context(self) -> bool:
        """Whether the encoder or the decoder takes a context."""
        return any(getattr(module, "takes_context", False) for module in (self.encoder, self.decoder))

    @property
    def network(self) -> nn.Module:
        """The module tree `inputs` -> outputs with this model's own parameters and names, for the curvature engine."""
        if not self.takes_context:
            parts = OrderedDict(encoder=self.encoder, decoder=self.decoder)
            if _has_code_parameters(self.encoder):
                parts = OrderedDict(encoder=self.encoder, location=_Location(), decoder=self.decoder)
            return nn.Sequential(parts)
        assert self.data_shape is not None
        return _Packed(self.encoder, self.decoder, self.data_shape)

    def inputs(self, batch: Batch) -> Tensor:
        """What `network` takes for the rows of a batch: x, with its context beside it where a network takes one."""
        if not self.takes_context:
            return batch.x
        context = _context_of(self.encoder, "encoder", batch.context)
        context = context or _context_of(self.decoder, "decoder", batch.context)
        return torch.cat([batch.x.flatten(1), context[0].flatten(1).to(batch.x)], 1)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        r"""Outputs (B, \*O) of the plain network at its own weights."""
        z = self.encoder(x, *_context_of(self.encoder, "encoder", context))
        z = z[..., 0] if _has_code_parameters(self.encoder) else z
        return self.decoder(z, *_context_of(self.decoder, "decoder", context))

    def log_prior(self, latents: Tensor) -> Tensor:
        """Log p(z) under the standard Normal: (..., Z) to (...)."""
        return torch.distributions.Normal(0.0, 1.0, validate_args=False).log_prob(latents).sum(-1)

    def with_noise(self, noise: Mapping[str, Tensor]) -> Autoencoder:
        """The same networks under a likelihood of its own with other noise; this model is not touched.

        Args:
            noise: The likelihood's ``state_dict``, as a weight posterior that learned noise has it.

        Returns:
            A model that shares encoder and decoder with this one.
        """
        other = copy.copy(self)
        other._modules = dict(self._modules)
        likelihood = copy.deepcopy(self.likelihood)
        assert isinstance(likelihood, nn.Module)
        likelihood.load_state_dict(noise)
        other.likelihood = likelihood
        return other

    def at(self, params: Params, *, is_fitting: bool = False) -> Bound:
        r"""The model at given weights; this module's own weights do not enter and are not touched.

        Args:
            params: Every parameter by name, leaves (S, \*shape).
            is_fitting: Whether these weights are being fitted, so that codes draw fresh noise at every call.

        Returns:
            A bound model, whose codes and outputs have the axis S.
        """
        check_complete(params, self.network)
        check_is_evaluable(self)
        return Bound(self, params, is_fitting=is_fitting)

    def live(self) -> Bound:
        """The model at its own weights, gradients and training mode included, S = 1: for training loops."""
        return Bound(self, None)


class Bound:
    r"""An `Autoencoder` at S weight draws (``model.at(params)``) or at its own weights (``model.live()``).

    Args:
        model: The autoencoder.
        params: Leaves (S, \*shape), or None for the module's own weights.
        is_fitting: Whether the weights are being fitted; of the module's own weights its training mode says so.
    """

    def __init__(self, model: Autoencoder, params: Params | None, *, is_fitting: bool = False) -> None:
        self.model, self.params, self._is_fitting = model, params, is_fitting
        self.likelihood = model.likelihood

    def log_prior(self, latents: Tensor) -> Tensor:
        """Log p(z), (..., Z) to (...)."""
        return self.model.log_prior(latents)

    @property
    def is_fitting(self) -> bool:
        """Whether weights are being fitted: noise of codes is then fresh at every call, and regularisers act."""
        return self.model.training if self.params is None else self._is_fitting

    def encode(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        r"""Codes: the encoder's outputs, or their location where it gives parameters, (B, \*data) to (S, B, Z).

        Args:
            x: A batch of data.
            context: Labels or covariates (B, ...), for an encoder that takes them.

        Returns:
            Codes.

        Raises:
            ShapeError: If the network does not give one vector, or one of parameters a code dimension, a row.
            DataError: If the encoder takes a context and there is none.
        """
        return self.encode_parameters(x, context)[..., 0]

    def encode_parameters(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        r"""Parameters of q(z | x) for each code dimension, (B, \*data) to (S, B, Z, g); g = 1 of a plain encoder.

        Args:
            x: As for `encode`.
            context: As for `encode`.

        Returns:
            Parameters, the location first.

        Raises:
            ShapeError: As for `encode`.
            DataError: As for `encode`.
        """
        codes = self._map("encoder", x, context, x_has_draws=False)
        if codes.dim() != (4 if _has_code_parameters(self.model.encoder) else 3) or codes.shape[1] != len(x):
            raise ShapeError(
                f"codes of shape (B, Z), or parameters (B, Z, g), with B = {len(x)}",
                f"{tuple(codes.shape[1:])} from the encoder",
                "End the encoder in nn.Flatten(), a linear layer, or nn.Unflatten(1, (Z, g)).",
            )
        return codes if codes.dim() == 4 else codes[..., None]

    def decode(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        r"""Decoder outputs, (..., S, B, Z) to (..., S, B, \*O), for a context (B, ...) where the decoder takes one."""
        lead, (n_weight_draws, n_rows, n_latents) = z.shape[:-3], z.shape[-3:]
        flat = z.reshape(-1, n_weight_draws, n_rows, n_latents).transpose(0, 1).flatten(1, 2)
        if context is not None:  # rows of a further code draw have the same contexts
            context = context.repeat(flat.shape[1] // n_rows, *[1] * (context.dim() - 1))
        outputs = self._map("decoder", flat, context, x_has_draws=True)
        shape = outputs.shape[2:]
        return outputs.unflatten(1, (-1, n_rows)).transpose(0, 1).reshape(*lead, n_weight_draws, n_rows, *shape)

    def decoder_module(self) -> tuple[nn.Module, Params]:
        r"""The decoder and its weights, by its own names, leaves (S, \*shape): for derivatives in the code."""
        if self.params is None:
            return self.model.decoder, {name: leaf[None] for name, leaf in self.model.decoder.named_parameters()}
        return self.model.decoder, self._own("decoder")

    def _own(self, name: str) -> Params:
        assert self.params is not None
        return {key[len(name) + 1 :]: leaf for key, leaf in self.params.items() if key.startswith(f"{name}.")}

    def _map(
        self, name: Literal["encoder", "decoder"], x: Tensor, context: Tensor | None, *, x_has_draws: bool
    ) -> Tensor:
        module = self.model.get_submodule(name)
        shared = _context_of(module, name, context)
        try:
            if self.params is None:
                return module(x[0] if x_has_draws else x, *shared)[None]
            own = self._own(name)
            if n_draws(own) > 1 and module not in _RUN_IN_A_LOOP:
                try:
                    return map_over_draws(module, own, x, x_has_draws, use_vmap=True, shared=shared)
                except torch.OutOfMemoryError:
                    raise
                except RuntimeError:  # not mappable, or wrong rows: the loop tells which
                    result = map_over_draws(module, own, x, x_has_draws, use_vmap=False, shared=shared)
                    _RUN_IN_A_LOOP.add(module)
                    return result
            return map_over_draws(module, own, x, x_has_draws, use_vmap=False, shared=shared)
        except (RuntimeError, IndexError) as error:
            if isinstance(error, (BayesAEError, torch.OutOfMemoryError)) or not any(w in str(error) for w in _MISFIT):
                raise
            raise ShapeError(
                f"rows that the {name} takes",
                f"rows of shape {tuple(x.shape[2 if x_has_draws else 1 :])} ({error})",
                "Match the data's row to the first layer, and the code's size to the decoder's.",
            ) from error


def _context_of(module: nn.Module, name: str, context: Tensor | None) -> tuple[Tensor, ...]:
    """What a network is called with beside its input: the context if it says that it takes one."""
    if not getattr(module, "takes_context", False):
        return ()
    if context is None:
        fix = "Give rows as bae.Batch(x, context=labels), or a loader of such batches."
        raise DataError(f"a context for the {name}", "rows without one", fix)
    return (context,)


def _has_code_parameters(encoder: nn.Module) -> bool:
    """Whether an encoder ends in the axis of the parameters of q(z | x)."""
    last = encoder
    while isinstance(inner := last[-1] if isinstance(last, nn.Sequential) and len(last) else _net_of(last), nn.Module):
        last = inner
    return isinstance(last, nn.Unflatten) and len(last.unflattened_size) == 2


def _net_of(module: nn.Module) -> nn.Module | None:
    """The network inside a `nets.Conditional`."""
    return getattr(module, "net", None) if getattr(module, "takes_context", False) else None


class _Location(nn.Module):
    """Parameters (B, Z, g) to codes (B, Z)."""

    def forward(self, parameters: Tensor) -> Tensor:
        return parameters[..., 0]


class _Packed(nn.Module):
    """Networks that take a context as a function of one tensor: x and its context, flat, side by side."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module, data_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.encoder, self.decoder, self.data_shape = encoder, decoder, data_shape
        # not named as the networks' own attribute: this one takes a single tensor
        self.is_given_context = [getattr(module, "takes_context", False) for module in (encoder, decoder)]
        self.has_code_parameters = _has_code_parameters(encoder)

    def forward(self, packed: Tensor) -> Tensor:
        size = math.prod(self.data_shape)
        x, context = packed[:, :size].unflatten(1, self.data_shape), packed[:, size:]
        z = self.encoder(x, context) if self.is_given_context[0] else self.encoder(x)
        z = z[..., 0] if self.has_code_parameters else z
        return self.decoder(z, context) if self.is_given_context[1] else self.decoder(z)


def wrap(
    encoder: nn.Module, decoder: nn.Module, likelihood: Likelihood, *, data_shape: tuple[int, ...] | None = None
) -> Autoencoder:
    r"""An `Autoencoder` of copies of networks trained elsewhere, in evaluation mode; the originals stay untouched.

    Args:
        encoder: Maps (B, \*data) to (B, Z).
        decoder: Maps (B, Z) to (B, \*O).
        likelihood: As for `Autoencoder`. For ``Gaussian()`` call `estimate_noise` next: nobody has fitted it.
        data_shape: As for `Autoencoder`.

    Returns:
        The autoencoder.
    """
    parts = copy.deepcopy((encoder, decoder, likelihood))
    return Autoencoder(*parts, data_shape=data_shape).eval()
