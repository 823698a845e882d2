"""The likelihood with codes integrated out as a function of the decoder's weights: values, scores, information."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import grad, vmap

from bayesae.codes import CodePosterior
from bayesae.codes.base import HasLaw, noise, score_outputs
from bayesae.draws import logmeanexp_over_latents
from bayesae.errors import UnsupportedError
from bayesae.forward_mode import jvp
from bayesae.functional import parameters_of
from bayesae.models import Autoencoder, Bound
from bayesae.subset import Subset
from bayesae.types import Batch, Params

__all__ = ["CodeDraws", "Integrated", "effective_size", "squared_error"]

_TANGENTS = 32  # columns of a Hessian at once


@dataclass(frozen=True)
class CodeDraws:
    """Codes of a batch, and what of their log weights does not depend on the decoder's weights.

    Args:
        latents: (K, 1, B, Z).
        constant: log p(z) - log q(z | x), (K, 1, B).
        is_matched: Whether means and covariances over the K draws are those of q.
    """

    latents: Tensor
    constant: Tensor
    is_matched: bool = False


@dataclass(frozen=True)
class Integrated:
    r""":math:`\log \hat p(x \mid \theta) = \log \tfrac1K \sum_k p(x \mid z_k, \theta) p(z_k) / q(z_k \mid x)`.

    Codes are drawn once, at the model's own weights, and stay while :math:`\theta`, the decoder's weights, moves:
    its derivatives are then those of log p(x | theta) with posterior means replaced by self-normalised ones (Fisher's
    identity for the first, Louis' for the second).

    Args:
        model: In evaluation mode.
        codes: With a density.
        n_latent_draws: K.
        subset: The decoder's trainable weights, P of them.
        params: Every parameter in its own shape.
    """

    model: Autoencoder
    codes: CodePosterior
    n_latent_draws: int
    subset: Subset
    params: Params

    @classmethod
    def of(cls, model: Autoencoder, codes: CodePosterior, n_latent_draws: int) -> Integrated:
        """At a model's own weights.

        Args:
            model: In evaluation mode.
            codes: With a density.
            n_latent_draws: K.

        Returns:
            It.
        """
        subset = Subset.of(model.network, ("decoder.**",))
        return cls(model, codes, n_latent_draws, subset, parameters_of(model.network))

    @property
    def theta(self) -> Tensor:
        """The decoder's weights, (P,)."""
        return self.subset.ravel(self.params)

    @torch.no_grad()
    def draw(self, batch: Batch) -> CodeDraws:
        """Codes of a batch at the model's own weights.

        Args:
            batch: The rows.

        Returns:
            The draws.

        Raises:
            UnsupportedError: If the code is deterministic.
        """
        draws = self.codes(self._bound, batch, n_latent_draws=self.n_latent_draws)
        if draws.log_q is None:
            fix = "Use codes.amortised and an encoder that gives scales, or codes.Laplace()."
            raise UnsupportedError("codes with a density, to integrate over", "deterministic codes", fix)
        return CodeDraws(draws.latents, draws.log_prior - draws.log_q)

    @torch.no_grad()
    def matched(self, batch: Batch) -> CodeDraws:
        """Codes for derivatives, where q is a Normal and K even and at least 4 Z; else those of `draw`.

        They come in pairs around the mean and have q's own covariance: what derivatives ask of a linear decoder is
        quadratic in the code and then exact, where K independent draws would blur the little that data say of a weak
        column by the much that they would say if codes were known. As an estimate of p(x) they are not unbiased.

        Args:
            batch: The rows.

        Returns:
            The draws.
        """
        n_draws, model = self.n_latent_draws, self._bound
        if n_draws % 2 or not isinstance(self.codes, HasLaw):
            return self.draw(batch)
        law = self.codes.law(model, batch)
        size = law.loc.shape[-1]
        if n_draws < 4 * size:
            return self.draw(batch)
        half = noise(model, batch, n_draws // 2, size, law.loc).double()
        second = torch.einsum("ksbi,ksbj->sbij", half, half) / len(half)
        half = torch.linalg.solve_triangular(torch.linalg.cholesky(second), half[..., None], upper=False)[..., 0]
        latents = law.push(torch.cat([half, -half]).to(law.loc))
        return CodeDraws(latents, model.log_prior(latents) - law.log_prob(latents), is_matched=True)

    @property
    def _bound(self) -> Bound:
        return self.model.at({name: leaf[None] for name, leaf in self.params.items()})

    def log_weights(self, theta: Tensor, draws: CodeDraws, batch: Batch) -> Tensor:
        """Log p(x, z | theta) - log q(z | x), (K, B).

        Args:
            theta: (P,).
            draws: Of the batch.
            batch: The rows.

        Returns:
            Log importance weights.
        """
        leaves = {name: leaf[None] for name, leaf in self.subset.scatter(theta, self.params).items()}
        outputs = self.model.at(leaves).decode(draws.latents, batch.context)
        return (score_outputs(self.model.likelihood, outputs, batch) + draws.constant)[:, 0]

    def log_evidence(self, theta: Tensor, draws: CodeDraws, batch: Batch) -> Tensor:
        """Log p(x | theta) of every row, (B,), nats.

        Args:
            theta: (P,).
            draws: Of the batch.
            batch: The rows.

        Returns:
            The estimates.
        """
        return logmeanexp_over_latents(self.log_weights(theta, draws, batch))

    def scores(self, draws: CodeDraws, batch: Batch) -> Tensor:
        r"""Gradient of log p(x | theta) for every row, by Fisher's identity.

        .. math:: \nabla_\theta \log \hat p(x \mid \theta) = \sum_k \tilde w_k \nabla_\theta \log p(x, z_k \mid \theta)

        Args:
            draws: Of the batch.
            batch: The rows.

        Returns:
            (B, P).
        """
        names = [name for name, value in batch._asdict().items() if value is not None and name != "index"]

        def one(theta: Tensor, latents: Tensor, constant: Tensor, *fields: Tensor) -> Tensor:
            row = Batch(**{name: value[None] for name, value in zip(names, fields, strict=True)})
            return self.log_evidence(theta, CodeDraws(latents[:, :, None], constant[:, :, None]), row)[0]

        axes = (None, 2, 2, *[0] * len(names))
        fields = [getattr(batch, name) for name in names]
        return vmap(grad(one), in_dims=axes)(self.theta, draws.latents, draws.constant, *fields)

    def information(self, draws: CodeDraws, batch: Batch) -> Tensor:
        r"""Observed information of a batch, by Louis' identity: what complete data would say, less what codes hide.

        .. math:: -\nabla^2 \log p(x \mid \theta) = \mathbb{E}[-\nabla^2 \log p(x, z \mid \theta)]
                  - \operatorname{Cov}[\nabla \log p(x, z \mid \theta)]

        under p(z | x, theta). It is the Hessian of the estimate itself; the covariance of K independent draws is short
        by a share 1 / ESS, which is put back.

        Args:
            draws: Of the batch.
            batch: The rows.

        Returns:
            The sum over rows, (P, P), symmetric.
        """
        log_weights = self.log_weights(self.theta, draws, batch)
        shares = torch.softmax(log_weights, 0)
        ess = effective_size(log_weights).clamp(min=2)
        factor = torch.ones_like(ess) if draws.is_matched else ess / (ess - 1)  # of the covariance

        def total(theta: Tensor) -> Tensor:
            now = self.log_weights(theta, draws, batch)
            complete = (shares * now).sum(0)
            return -(factor * logmeanexp_over_latents(now) + (1 - factor) * complete).sum()

        def column(tangent: Tensor) -> Tensor:
            return jvp(grad(total), (self.theta,), (tangent,))[1]

        hessian = vmap(column, chunk_size=_TANGENTS)(torch.eye(len(self.theta)).to(self.theta))
        return 0.5 * (hessian + hessian.mT)


def effective_size(log_weights: Tensor) -> Tensor:
    """Effective sample size of the draws of every row: (K, B) to (B,)."""
    return torch.exp(2 * log_weights.logsumexp(0) - (2 * log_weights).logsumexp(0))


def squared_error(log_weights: Tensor) -> float:
    """Squared standard error of the sum over rows of the log of the mean weight, by the delta method; (K, B)."""
    return float((1 / effective_size(log_weights) - 1 / len(log_weights)).sum())
