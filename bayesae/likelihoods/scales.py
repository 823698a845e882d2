"""Noise scales, shared or one for every number: what Gaussian and Student-t noise have in common."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bayesae.likelihoods.noise import NoisyHead, Positive, check_positive, root

__all__ = ["ScaledHead"]


class ScaledHead(NoisyHead):
    r"""A head around the outputs as means, with a noise scale that is stored squared and has a floor.

    Args:
        scale: As of the subclass.
        per_output: As of the subclass.
        floor: Lower bound of an estimated scale, units of x.
    """

    def __init__(self, scale: Positive | None, per_output: bool, floor: float) -> None:
        check_positive("floor", floor)
        super().__init__(scale, "scale", per_output, power=2)
        self.floor = float(floor)

    @property
    def scale(self) -> float | Tensor:
        """The scale, units of x: a float, or float64 (D,) for one of every number."""
        return root(self._known)

    def _store(self, noise: Tensor) -> None:
        super()._store(noise.clamp(min=self.floor**2))

    @property
    def arguments(self) -> dict[str, Any]:
        """Constructor arguments as JSON can write them; what was learned travels in ``state_dict`` instead."""
        return super().arguments | {"floor": self.floor}

    def _constant(self, value: float | Tensor, outputs: Tensor) -> Tensor:
        r"""A number () for all outputs, or numbers (B, \*O)."""
        return value.expand(outputs.shape) if isinstance(value, Tensor) else outputs.new_tensor(value)

    def attainable(self, target: Tensor) -> Tensor:
        r"""Log-density at the outputs' own mode, (B, \*D): what the noise alone decides."""
        return self.log_density(target, target)

    def mean(self, outputs: Tensor) -> Tensor:
        """The outputs themselves."""
        return outputs

    def normal_moments(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Exact: the identity link keeps a Normal a Normal."""
        return mean, self.variance(mean), var

    def extra_repr(self) -> str:
        """Scale and how it came about, for ``repr``."""
        shown = None if self._noise is None else self.scale
        if isinstance(shown, Tensor):
            shown = f"{float(shown.min()):.4g} to {float(shown.max()):.4g}"
        return f"scale={shown}, is_learned={self.is_learned}"
