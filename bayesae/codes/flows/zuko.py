"""Flows of the zuko library as flows of codes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from bayesae.errors import UnsupportedError
from bayesae.lazy import import_zuko

__all__ = ["Zuko", "import_zuko"]


@dataclass(frozen=True)
class Zuko:
    r"""A transformation of zuko, :math:`z = f(z_0 \mid h)`: coupling, spline, autoregressive and others.

    ``zuko = codes.import_zuko(); codes.Zuko(zuko.flows.NSF(Z, context=Z * n), n_context=n)``, say. Of a whole zuko flow
    the transformation alone is taken, in the direction in which zuko computes it in one pass and calls it data to
    noise: what is an autoregressive flow there is an inverse autoregressive flow here. ``flow.transform.inv`` is the
    other direction.

    Args:
        flow: A zuko ``Flow`` or ``LazyTransform`` of Z features, in the model's dtype.
        n_context: Numbers of the encoder for each code dimension, which make the context h (Z * n_context,) that the
            flow was built for; 0: none.

    Exact when: log-determinants always, but those that zuko itself estimates (continuous flows with ``exact=False``).
    Biased when: codes leave the interval of a spline (5 either way): it is the identity there.
    Cost: zuko's.

    Raises:
        UnsupportedError: If it is no transformation of zuko.
    """

    flow: nn.Module
    n_context: int = 0

    def __post_init__(self) -> None:
        lazy = import_zuko().lazy
        if not isinstance(self.flow, (lazy.Flow, lazy.LazyTransform)):
            fix = "zuko.flows.NSF(features, context) makes one; a flow of your own needs no adapter."
            raise UnsupportedError("a zuko Flow or LazyTransform", type(self.flow).__name__, fix)

    @property
    def n_parameters(self) -> int:
        """Numbers of context."""
        return self.n_context

    def __call__(self, latents: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Move codes.

        Args:
            latents: (K, S, B, Z).
            parameters: (S, B, Z, n_context).

        Returns:
            The new codes, and log-determinants: (K, S, B, Z) of element-wise transformations, (K, S, B, 1) of others.
        """
        is_whole = isinstance(self.flow, import_zuko().lazy.Flow)
        make = self.flow.transform if is_whole else self.flow
        assert isinstance(make, nn.Module)
        transform = make(parameters.flatten(-2) if self.n_context else None)
        moved, log_det = transform.call_and_ladj(latents)
        if transform.domain.event_dim == 0:
            return moved, log_det.expand(moved.shape)
        return moved, log_det.expand(moved.shape[:-1])[..., None]
