"""Networks that see a context beside their input: labels, covariates, exposures."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bayesae.errors import DataError, ShapeError, UnsupportedError
from bayesae.nets.parts import OneHot, holds, plain_sizes
from bayesae.nets.recipe import can_be_built, remember

__all__ = ["Conditional", "Offset"]


@torch.fx.wrap
def _at_every_position(context: Tensor, shape: torch.Size) -> Tensor:
    r"""(B, C) as (B, C, \*positions), the positions of ``shape``; wrapped, because torch.fx cannot count axes."""
    return context.reshape(*context.shape, *[1] * (len(shape) - 2)).expand(-1, -1, *shape[2:])


@torch.fx.wrap
def _column(context: Tensor, fix: str) -> Tensor:
    """One number a row, (B, 1), of (B,) or (B, 1); more would be left out, or go to one output each, unsaid."""
    if context.dim() == 1:
        return context[:, None]
    if context.shape[1:] != (1,):
        raise ShapeError("a context (B, 1)", f"{tuple(context.shape)}", fix)
    return context


_ONE_LABEL = "Of unit vectors, or several numbers a row, use n_classes=None."
_ONE_EXPOSURE = "Give one exposure a row; more covariates go into a Conditional."


@can_be_built
class Conditional(nn.Module):
    r"""A network whose input has a context beside it: an encoder or decoder given labels or covariates.

    .. math:: f(x, c) = \operatorname{net}([x, c])

    The context is put beside x along axis 1, the same at every position of an image or series (and beside the unit
    vectors of a sequence), so that the network is made for as many inputs, or channels, more: ``mlp(2 + 10, ...)`` for
    a code of 2 and 10 classes.

    Args:
        net: Takes (B, n_in + C), or (B, channels + C, \*positions).
        n_classes: Of a label, context (B, 1) of whole numbers from 0, which becomes C = n_classes numbers, 0 or 1.
            None takes the context (B, C) as it is.

    Raises:
        DataError: If n_classes is no positive whole number; when called, if a label is none of the classes.
        ShapeError: When called, if there are ``n_classes`` and the context has more than one number a row.

    References:
        | Learning Structured Output Representation using Deep Conditional Generative Models (Sohn, Lee, Yan, 2015)
    """

    takes_context = True

    def __init__(self, net: nn.Module, n_classes: int | None = None) -> None:
        super().__init__()
        if n_classes is not None:
            (n_classes,) = plain_sizes(n_classes=n_classes)
        _check_plain(net)
        # a sequence is turned into unit vectors before the context joins it
        self.before = net[0] if isinstance(net, nn.Sequential) and len(net) and isinstance(net[0], OneHot) else None
        self.net = net[1:] if isinstance(net, nn.Sequential) and self.before is not None else net
        self.labels = None if n_classes is None else OneHot(n_classes)
        remember(self, "Conditional", {"net": net, "n_classes": n_classes})

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        r"""Outputs of the network.

        Args:
            x: (B, \*in).
            context: (B, 1) labels, or (B, C).

        Returns:
            What the network gives.
        """
        if self.before is not None:
            x = self.before(x)
        if self.labels is not None:
            context = self.labels(_column(context, _ONE_LABEL)[:, 0])
        return self.net(torch.cat([x, _at_every_position(context, x.shape).to(x.dtype)], 1))


@can_be_built
class Offset(nn.Module):
    r"""A decoder of counts whose log-rates are shifted by the log of an exposure, such as a cell's library size.

    .. math:: f(z, c) = \operatorname{net}(z) + \log c

    Args:
        net: Maps codes (B, Z) to outputs (B, \*O) whose exponential is a rate; it takes no context of its own.

    Exact when: rates are proportional to the exposure.

    Raises:
        DataError: When called, if an exposure is not positive.
        ShapeError: When called, if there is more than one a row.

    References:
        | Deep generative modeling for single-cell transcriptomics (Lopez et al., 2018)
    """

    takes_context = True

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        _check_plain(net)
        self.net, self.log_exposure = net, LogExposure()
        remember(self, "Offset", {"net": net})

    def forward(self, z: Tensor, context: Tensor) -> Tensor:
        r"""Outputs of the network, shifted.

        Args:
            z: (B, Z).
            context: Exposures (B, 1), positive.

        Returns:
            (B, \*O).
        """
        outputs = self.net(z)
        shift = self.log_exposure(context).to(outputs.dtype)
        return outputs + _at_every_position(shift, outputs.shape)


class LogExposure(nn.Module):
    """Logarithms of one positive number a row; a layer of its own, so that the rest of `Offset` can be read."""

    def forward(self, exposure: Tensor) -> Tensor:
        """Element by element.

        Args:
            exposure: Positive, (B, 1) or (B,).

        Returns:
            Logarithms, (B, 1).

        Raises:
            ShapeError: If there is more than one a row.
            DataError: If one is not positive.
        """
        if not holds(exposure > 0):
            raise DataError("positive exposures", f"{float(exposure.min()):.4g}", "Leave out rows without any counts.")
        return _column(exposure, _ONE_EXPOSURE).log()


def _check_plain(net: nn.Module) -> None:
    if getattr(net, "takes_context", False):
        got = f"{type(net).__name__}, which takes one of its own"
        raise UnsupportedError("a network without a context", got, "Put all covariates into one Conditional.")
