"""The chain between codes and completions that pseudo-Gibbs and Metropolis-within-Gibbs run."""

from __future__ import annotations

import torch
from torch import Tensor

from bayesae.codes import CodeModel, CodePosterior, Law, law_of
from bayesae.codes.base import score_outputs
from bayesae.types import Batch

__all__ = ["Chain"]


class Chain:
    """One chain for every row, under one draw of the weights.

    Args:
        model: At S = 1.
        codes: Has a Normal.
        rows: With a mask.
        is_corrected: Whether proposals may be refused.
    """

    def __init__(self, model: CodeModel, codes: CodePosterior, rows: Batch, is_corrected: bool) -> None:
        assert rows.mask is not None
        self.model, self.codes, self.is_corrected, self.observed = model, codes, is_corrected, rows.mask
        self.rows = rows._replace(mask=None)  # a completion has nothing missing
        self.n_accepted = torch.zeros(len(rows.x), device=rows.x.device)
        self.latents, self.outputs = self._propose(law_of(codes, model, self.rows))
        self._complete()

    def step(self) -> None:
        """A code for the present completion, and the completion that it makes."""
        law = law_of(self.codes, self.model, self.rows)
        latents, outputs = self._propose(law)
        if self.is_corrected:
            log_ratio = self._log_weight(law, latents, outputs) - self._log_weight(law, self.latents, self.outputs)
            taken = torch.rand_like(log_ratio).log() < log_ratio
        else:
            taken = torch.ones_like(latents[..., 0], dtype=torch.bool)
        self.latents = torch.where(taken[..., None], latents, self.latents)
        self.outputs = torch.where(taken.reshape(*taken.shape, *[1] * (outputs.dim() - 3)), outputs, self.outputs)
        self.n_accepted = self.n_accepted + taken[0, 0]
        self._complete()

    def _propose(self, law: Law) -> tuple[Tensor, Tensor]:
        latents = law.push(torch.randn_like(law.loc)[None])
        return latents, self.model.decode(latents, self.rows.context)

    def _log_weight(self, law: Law, latents: Tensor, outputs: Tensor) -> Tensor:
        """Log p(x, z) - log q(z | x) at the present completion, (1, 1, N)."""
        log_likelihood = score_outputs(self.model.likelihood, outputs, self.rows)
        return log_likelihood + self.model.log_prior(latents) - law.log_prob(latents)

    def _complete(self) -> None:
        drawn = self.model.likelihood.distribution(self.outputs[0, 0]).sample().reshape(self.rows.x.shape)
        self.rows = self.rows._replace(x=torch.where(self.observed, self.rows.x, drawn.to(self.rows.x)))
