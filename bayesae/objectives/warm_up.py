"""How a weight of an objective grows while training goes on."""

from __future__ import annotations

from dataclasses import dataclass

from bayesae.data import check_counts
from bayesae.errors import DataError

__all__ = ["WarmUp"]


@dataclass(frozen=True)
class WarmUp:
    r"""Linear warm-up, once or in cycles, as a factor in [0, 1] of a weight.

    .. math:: \min\big(1,\; s + (1 - s)\, \tau / r\big), \qquad \tau = \operatorname{frac}(p\, n)

    with p the share of training that is done, s the start, r the share and n the number of cycles; 1 at the end, p = 1.

    Args:
        share: r, share of a cycle that the factor takes to reach 1, in (0, 1].
        n_cycles: n, cycles of equal length; one is plain warm-up, and ``WarmUp(0.5, n_cycles=4)`` the cyclical schedule
            as published.
        start: s, where each cycle starts.

    Raises:
        DataError: If share or start lie outside [0, 1], the share is 0, or there is no cycle.

    References:
        | Ladder Variational Autoencoders (Sonderby et al., 2016, https://arxiv.org/abs/1602.02282): linear
        | Cyclical Annealing Schedule (Fu et al., 2019, https://arxiv.org/abs/1903.10145)
    """

    share: float = 0.1
    n_cycles: int = 1
    start: float = 0.0

    def __post_init__(self) -> None:
        check_counts(n_cycles=self.n_cycles)
        if not (0 < self.share <= 1 and 0 <= self.start <= 1):
            raise DataError("share in (0, 1] and start in [0, 1]", f"{self.share} and {self.start}", "Try 0.1 and 0.")

    def __call__(self, progress: float) -> float:
        """The factor at a share of training."""
        if progress >= 1:
            return 1.0
        return min(1.0, self.start + (1 - self.start) * (progress * self.n_cycles % 1.0) / self.share)
