"""Inverse autoregressive flows: every code dimension is moved by what stood before it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bayesae.errors import DataError, ShapeError
from bayesae.nets.parts import plain_sizes
from bayesae.nets.recipe import can_be_built, remember

__all__ = ["AutoregressiveFlow"]

_GATE = 1.5  # of s at the start: sigmoid 0.82, near the identity and far from saturated
_SMALL = 0.1  # weights of outputs at the start, as a share of torch's
_MOST_STEPS = 64


@can_be_built
class AutoregressiveFlow(nn.Module):
    r"""Steps whose shift and gate of dimension j see the dimensions before j, and a context h from the encoder.

    .. math:: z_t = \sigma(s_t) \odot z_{t-1} + \sigma(-s_t) \odot m_t, \quad [m_t, s_t] = a_t(z_{t-1}, h), \quad
              \log \lvert \det \rvert = \sum_{t, j} \log \sigma(s_{t, j})

    The order of dimensions is reversed from step to step. a_t is a masked linear map of z and h, which alone connects
    every dimension with h and with all before it, plus a masked network of the hidden layers, whose units are spread
    evenly over the dimensions.

    Args:
        n_latents: Z.
        n_steps: T, at most 64.
        hidden: Widths of the hidden layers; none make steps linear in z and h.
        n_context: Numbers of the encoder for each code dimension, which make h (Z * n_context,); 0: no context.
        is_volume_preserving: Shifts alone, z_t = z_{t-1} + m_t, of determinant 1.
        activation: Makes the activation after every hidden layer.

    Exact when: the true posterior is a Normal and ``hidden`` is (): one step turns a diagonal Normal into any. The
        log-determinant is exact in any case.
    Biased when: gates saturate: log-sigmoids stay finite, but a gate far below -10 forgets z in rounding.
    Cost: T passes of the networks a code; `invert` takes T Z of them.

    Raises:
        DataError: If a size is no positive whole number (``n_context`` may be 0), or there are more than 64 steps.
        ShapeError: When called, with a code or a context of another size.

    References:
        | Improving Variational Inference with Inverse Autoregressive Flow (Kingma and others, 2016,
          https://arxiv.org/abs/1606.04934)
        | MADE: Masked Autoencoder for Distribution Estimation (Germain, Gregor, Murray, Larochelle, 2015)
        | Departure: the direct linear map, without which few hidden units leave dimensions unconnected.
    """

    def __init__(
        self,
        n_latents: int,
        n_steps: int = 1,
        hidden: Sequence[int] = (64,),
        n_context: int = 1,
        *,
        is_volume_preserving: bool = False,
        activation: Callable[[], nn.Module] = nn.ELU,
    ) -> None:
        super().__init__()
        sizes = plain_sizes(n_latents=n_latents, n_steps=n_steps, hidden=hidden, n_context=n_context)
        n_latents, n_steps, hidden, n_context = sizes
        if n_steps > _MOST_STEPS:
            raise DataError(f"at most {_MOST_STEPS} steps", f"n_steps={n_steps}", "Make the hidden layers wider.")
        self.n_latents, self.n_parameters, self.is_volume_preserving = n_latents, n_context, is_volume_preserving
        order = torch.arange(1, n_latents + 1)
        orders = (order.flip(0) if step % 2 else order for step in range(n_steps))
        n_out = 1 if is_volume_preserving else 2
        self.steps = nn.ModuleList(_Conditioner(one, n_context, hidden, n_out, activation) for one in orders)
        remember(self, "AutoregressiveFlow", {
            "n_latents": n_latents, "n_steps": n_steps, "hidden": hidden, "n_context": n_context,
            "is_volume_preserving": is_volume_preserving, "activation": activation,
        })  # fmt: skip

    def forward(self, latents: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Move codes.

        Args:
            latents: (K, S, B, Z).
            parameters: (S, B, Z, n_context).

        Returns:
            The new codes, and the log-determinant of each dimension, (K, S, B, Z).
        """
        context = self._context(latents, parameters)
        log_det = torch.zeros_like(latents)
        for step in self.steps:
            shift, gate = step(latents, context)
            if gate is None:
                latents = latents + shift
            else:
                latents = torch.sigmoid(gate) * latents + torch.sigmoid(-gate) * shift
                log_det = log_det + F.logsigmoid(gate)
        return latents, log_det

    def invert(self, latents: Tensor, parameters: Tensor) -> Tensor:
        """Codes that `forward` moves to given ones.

        Args:
            latents: (K, S, B, Z).
            parameters: (S, B, Z, n_context).

        Returns:
            (K, S, B, Z), found one dimension after the other.
        """
        context = self._context(latents, parameters)
        for step in reversed(self.steps):
            assert isinstance(step, _Conditioner)
            found = torch.zeros_like(latents)
            for j in step.order.argsort():
                shift, gate = step(found, context)
                if gate is None:
                    solution = latents - shift
                else:
                    solution = (latents - torch.sigmoid(-gate) * shift) / torch.sigmoid(gate)
                found = torch.where(torch.arange(self.n_latents, device=latents.device) == j, solution, found)
            latents = found
        return latents

    def extra_repr(self) -> str:
        """What the layers do not show."""
        return f"is_volume_preserving={self.is_volume_preserving}"

    def _context(self, latents: Tensor, parameters: Tensor) -> Tensor:
        """Of each code, (K, S, B, Z * n_context)."""
        wanted, given = (self.n_latents, self.n_parameters), tuple(parameters.shape[-2:])
        if given != wanted or latents.shape[-1] != self.n_latents:
            got = f"codes of {latents.shape[-1]} and contexts {given}"
            fix = "Make AutoregressiveFlow(n_latents, n_context=...) for this encoder."
            raise ShapeError(f"codes of {self.n_latents} dimensions and contexts {wanted}", got, fix)
        return parameters.flatten(-2).expand(*latents.shape[:-1], -1)


class _Conditioner(nn.Module):
    """Codes and contexts to shift and gate, (..., Z) each: entry j of what comes earlier in the order, and the context.

    Args:
        order: Place of each dimension, 1 to Z, (Z,).
        n_context: Numbers of context for each dimension.
        hidden: Widths.
        n_out: 1: shift alone; 2: shift and gate.
        activation: Makes the activation.
    """

    order: Tensor

    def __init__(
        self,
        order: Tensor,
        n_context: int,
        hidden: Sequence[int],
        n_out: int,
        activation: Callable[[], nn.Module],
    ) -> None:
        super().__init__()
        n_latents = len(order)
        self.register_buffer("order", order, persistent=False)
        # a unit of degree d may see dimensions up to place d; the context has degree 0
        seen = torch.cat([order, torch.zeros(n_context * n_latents, dtype=order.dtype)])
        first = 0 if n_context else min(1, n_latents - 1)  # without a context units of degree 0 are constants
        degrees = [seen, *(torch.linspace(first, n_latents - 1, width).round() for width in hidden)]
        last = order.repeat(n_out) - 1
        self.direct = _MaskedLinear(seen, last)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(degrees):
            layers += [_MaskedLinear(before, after), activation()]
        self.net = nn.Sequential(*layers, _MaskedLinear(degrees[-1], last)) if hidden else None
        with torch.no_grad():
            for layer in [self.direct] if self.net is None else [self.direct, self.net[-1]]:
                layer.weight.mul_(_SMALL)
                layer.bias.zero_()
            self.direct.bias[n_latents:] = _GATE

    def forward(self, latents: Tensor, context: Tensor) -> tuple[Tensor, Tensor | None]:
        both = torch.cat([latents, context], -1)
        out = self.direct(both)
        if self.net is not None:
            out = out + self.net(both)
        parts = out.unflatten(-1, (-1, latents.shape[-1])).unbind(-2)
        return parts[0], parts[1] if len(parts) == 2 else None


class _MaskedLinear(nn.Linear):
    """A linear layer whose outputs see the inputs of their own degree or a lower one."""

    mask: Tensor

    def __init__(self, before: Tensor, after: Tensor) -> None:
        super().__init__(len(before), len(after))
        self.register_buffer("mask", after[:, None] >= before, persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.mask * self.weight, self.bias)
