"""Whether Markov chains over weights agree on what the networks do."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesae.data import Data
from bayesae.draws import Draws
from bayesae.errors import UnsupportedError
from bayesae.families import Chains
from bayesae.metrics import ess, split_rhat
from bayesae.predictive import Predictive
from bayesae.types import Batch, Params

__all__ = ["Convergence", "convergence"]

_RHAT, _ESS = 1.1, 5.0  # of Bayesian Data Analysis, 11.4 and 11.5: effective draws per half-chain
_SHARE = 0.01  # of the numbers that may miss either


@dataclass(frozen=True)
class Convergence:
    r"""Split R-hat and effective sample size of function values; ``str()`` of it is a table.

    NaN stands where a number never moves.

    Args:
        output_rhat: Of each natural parameter at each row, (N, \*O).
        output_ess: Likewise.
        log_likelihood_rhat: Of each row's log-density, (N,).
        log_likelihood_ess: Likewise.
        log_joint: Trace of log p(D, theta) / T, minus the energy, (C, n), nats; None if the chains have none.
        log_joint_rhat: Of that; NaN without.
        log_joint_ess: Likewise.
        n_chains: C.
        n_draws: n, of each chain.
    """

    output_rhat: Tensor
    output_ess: Tensor
    log_likelihood_rhat: Tensor
    log_likelihood_ess: Tensor
    log_joint: Tensor | None
    log_joint_rhat: Tensor
    log_joint_ess: Tensor
    n_chains: int
    n_draws: int

    @property
    def shares_apart(self) -> dict[str, float]:
        """Shares of the numbers that move with an R-hat above 1.1, or fewer than 5 effective draws a half-chain."""
        return {
            name: float(((rhat > _RHAT) | (size < _ESS * 2 * self.n_chains))[~rhat.isnan()].double().mean())
            for name, rhat, size in self._rows()
            if not bool(rhat.isnan().all())  # infinite where every chain stands still, in a place of its own
        }

    def _rows(self) -> list[tuple[str, Tensor, Tensor]]:
        return [
            ("outputs", self.output_rhat, self.output_ess),
            ("log-densities of rows", self.log_likelihood_rhat, self.log_likelihood_ess),
            ("log-joint", self.log_joint_rhat, self.log_joint_ess),
        ]

    def __str__(self) -> str:
        lines = [f"{'':>22}  {'median R-hat':>12}  {'largest':>8}  {'median ESS':>10}  {'least':>8}  {'apart':>6}"]
        shares = self.shares_apart
        for name, rhat, size in self._rows():
            if name not in shares:
                lines.append(f"{name:>22}  {'never moves' if rhat.numel() else 'none':>12}")
                continue
            rhat, size = rhat[~rhat.isnan()], size[~rhat.isnan()]
            lines.append(
                f"{name:>22}  {float(rhat.median()):>12.3f}  {float(rhat.max()):>8.3f}  "
                f"{float(size.median()):>10.0f}  {float(size.min()):>8.0f}  {shares[name]:>6.1%}"
            )
        total = self.n_chains * self.n_draws
        return "\n".join([*lines, f"{self.n_chains} chains of {self.n_draws} kept draws, {total} in all"])


@torch.no_grad()
def convergence(
    predictive: Predictive,
    x: Data,
    mask: Tensor | None = None,
    *,
    chunk_size: int | None = None,
    seed: int | None = None,
    progress: bool | None = None,
) -> Convergence:
    r"""Run every kept draw of every chain, and judge the chains by what the networks do at rows of data.

    Weights themselves need not agree: hidden units of two chains may stand in another order, and do the same.

    Args:
        predictive: Of a posterior of chains: `weights.SGLD`, `SGHMC`, `SGNHT`, `HMC`, `MALA`.
        x: Rows (N, \*data), such as a hundred that were held out.
        mask: True where x is observed.
        chunk_size: Network rows in one call.
        seed: Of a stochastic code, whose noise is one number a row, shared by all draws.
        progress: Show a progress bar.

    Returns:
        `Convergence`; print it. It warns where more than a hundredth of the outputs or densities, or the log-joint,
        have an R-hat above 1.1 or fewer than 5 effective draws a half-chain.

    Exact when: as `metrics.split_rhat` and `metrics.ess`.
    Biased when: all chains miss the same mode, which no number of theirs can show. Start them wide apart.
    Cost: C n forward passes; memory of C n outputs of N rows.

    Raises:
        UnsupportedError: If the posterior is none of chains.
        ShapeError: If there are fewer than four draws a chain.

    References:
        | Bayesian Data Analysis, third edition, 11.4 to 11.5 (Gelman et al., 2013)
    """
    chains = predictive.weights
    if not isinstance(chains, Chains):
        fix = "Fit one by weights.SGHMC, say, or make families.Chains of your own draws."
        raise UnsupportedError("a posterior of chains", type(chains).__name__, fix)

    def measure(params: Params, batch: Batch, draw: Callable[[int], Draws]) -> tuple[Tensor, ...]:
        draws = draw(1)
        assert draws.outputs is not None
        return draws.outputs[0], draws.log_likelihood[0]

    outputs, densities = predictive.over_chunks(
        measure, x, mask, chunk_size=chunk_size, seed=seed, progress=progress
    )  # (C n, N, ...)
    trace, none = chains.log_joint, torch.empty(0, dtype=torch.float64)
    judged = {"output": chains.by_chain(outputs), "log_likelihood": chains.by_chain(densities), "log_joint": trace}
    rhat = {f"{name}_rhat": none if own is None else split_rhat(own) for name, own in judged.items()}
    sizes = {f"{name}_ess": none if own is None else ess(own) for name, own in judged.items()}
    n_draws = len(outputs) // chains.n_chains
    found = Convergence(log_joint=trace, n_chains=chains.n_chains, n_draws=n_draws, **rhat, **sizes)
    apart = {name: share for name, share in found.shares_apart.items() if share > _SHARE}
    if apart:
        named = ", ".join(
            f"{share:.0%} of the {name}" if name != "log-joint" else name for name, share in apart.items()
        )
        text = f"chains have not come together: R-hat above {_RHAT} or few effective draws for {named}"
        warnings.warn(f"{text}. Run them longer, or shorter steps from a wider start.", RuntimeWarning, stacklevel=2)
    return found
