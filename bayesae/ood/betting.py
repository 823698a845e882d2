"""Bets against uniform p-values: what multiplies the capital of a conformal test martingale at each row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bayesae.errors import DataError

__all__ = ["Bet", "PowerMixture", "SimpleJumper"]


class Bet(Protocol):
    """A way to bet: the factor at each row is chosen from the rows before it and has mean 1 over a uniform p."""

    def init(self) -> Tensor:
        """The state before the first row, (k,) in float64."""
        ...

    def update(self, state: Tensor, p_values: Tensor) -> tuple[Tensor, Tensor]:
        r"""Bet on the next rows of one stream or of several.

        Args:
            state: (\*R, k), or (k,) for streams that all start.
            p_values: (\*R, n), in (0, 1], n at least 1.

        Returns:
            The new state (\*R, k), and the logs of the n factors, (\*R, n).
        """
        ...


@dataclass(frozen=True)
class SimpleJumper:
    r"""Bets on small p-values, on large ones, or not at all, and changes between the three.

    .. math:: f_\epsilon(p) = 1 + \epsilon\,(p - \tfrac12), \quad \epsilon \in \{-1, 0, 1\}, \qquad
              c_\epsilon \leftarrow \big((1 - J)\,c_\epsilon + \tfrac{J}{3} \textstyle\sum_e c_e\big) f_\epsilon(p)

    with :math:`c_\epsilon` the capital on each bet, a third at first; the factor is the ratio of their sums.

    Args:
        jump: J in [0, 1], the share of the capital that is divided anew at each row.

    Exact when: as a bet, always: :math:`\int_0^1 f_\epsilon(p)\,dp = 1`.
    Biased when: compared with bolder ones: no row multiplies the capital by more than 1.5, so that an alarm at 100
        takes 12 rows or more however strange they are. It forgets a long familiar past in about 1 / J rows.
    Cost: a few operations a row.

    Raises:
        DataError: If ``jump`` is not in [0, 1].

    References:
        | Retrain or Not Retrain: Conformal Test Martingales for Change-Point Detection (Vovk, Petej, Nouretdinov,
          Ahlberg, Carlsson, Gammerman, 2021)
    """

    jump: float = 0.01

    def __post_init__(self) -> None:
        if not 0 <= self.jump <= 1:
            raise DataError("jump in [0, 1]", f"{self.jump}", "0.01 is the paper's.")

    def init(self) -> Tensor:
        """Equal shares of the capital on each bet, (3,)."""
        return torch.full((3,), 1 / 3, dtype=torch.float64)

    def update(self, state: Tensor, p_values: Tensor) -> tuple[Tensor, Tensor]:
        r"""Bet on the next rows.

        Args:
            state: Shares of the capital, (\*R, 3).
            p_values: (\*R, n).

        Returns:
            The new shares, and the logs of the factors, (\*R, n).
        """
        slopes = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
        payoffs = 1 + slopes * (p_values.unsqueeze(-1) - 0.5)
        factors = []
        for payoff in payoffs.unbind(-2):
            state = ((1 - self.jump) * state + self.jump / 3) * payoff
            factors.append(state.sum(-1))
            state = state / factors[-1].unsqueeze(-1)
        return state, torch.stack(factors, -1).log()


@dataclass(frozen=True)
class PowerMixture:
    r"""Bets on small p-values with every power at once: the mixture of power martingales, in closed form.

    .. math:: M_n = \int_0^1 \prod_{i=1}^n \epsilon\,p_i^{\epsilon - 1} \, d\epsilon
              = e^{L} \int_0^1 \epsilon^n e^{-L \epsilon}\, d\epsilon
              = e^{L} \, \frac{\gamma(n + 1, L)}{L^{n + 1}}, \qquad L = -\sum_i \log p_i

    with :math:`\gamma` the lower incomplete gamma function; the factor is :math:`M_n / M_{n - 1}`.

    Exact when: as a bet, always: :math:`\int_0^1 \epsilon\,p^{\epsilon - 1} dp = 1`.
    Biased when: drift sets in after a long familiar past: the mixture has by then settled on not betting, and the
        capital falls as a power of n. It does not see scores that get *too* familiar.
    Cost: one incomplete gamma function a row.

    References:
        | Testing Exchangeability On-Line (Vovk, Nouretdinov, Gammerman, 2003)
    """

    def init(self) -> Tensor:
        """No rows, and L = 0: (2,)."""
        return torch.zeros(2, dtype=torch.float64)

    def update(self, state: Tensor, p_values: Tensor) -> tuple[Tensor, Tensor]:
        r"""Bet on the next rows.

        Args:
            state: Number of rows and L, (\*R, 2).
            p_values: (\*R, n).

        Returns:
            The new state, and the logs of the factors, (\*R, n).
        """
        steps = torch.stack([torch.ones_like(p_values), -p_values.log()], -1)
        path = state.unsqueeze(-2) + steps.cumsum(-2)
        before = torch.cat([(path[..., :1, :] - steps[..., :1, :]), path[..., :-1, :]], -2)
        return path[..., -1, :], _log_mixture(*path.unbind(-1)) - _log_mixture(*before.unbind(-1))


def _log_mixture(n: Tensor, surprise: Tensor) -> Tensor:
    r"""Log of :math:`e^L \gamma(n + 1, L) / L^{n + 1}`, stable far below n too, where gamma underflows."""
    a = n + 1
    is_below = surprise < (a - 4.5 * a.sqrt()).clamp(min=1)  # nearer, and above, gammainc is accurate for every a
    large = torch.where(is_below, a, surprise)
    above = large - a * large.log() + torch.lgamma(a) + torch.special.gammainc(a, large).log()
    # below: sum_k L^k / (a (a + 1) ... (a + k)), whose terms fall from the first on
    small = torch.where(is_below, surprise, 0.0)
    term = 1 / a
    total, k = term.clone(), 0
    while bool((term > 1e-17 * total).any()):
        k += 1
        term = term * small / (a + k)
        total = total + term
    return torch.where(is_below, total.log(), above)
