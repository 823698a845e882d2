"""Semi-amortised code posteriors: the encoder's Normal, improved for every row by gradient ascent on its own bound."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesae.codes.amortised import amortised
from bayesae.codes.arguments import check_number
from bayesae.codes.base import CodeModel, HasLaw, differentiating, draws_of, noise, score_outputs
from bayesae.codes.laws import DiagonalLaw
from bayesae.data import check_counts
from bayesae.draws import Draws
from bayesae.errors import UnsupportedError
from bayesae.types import Batch

__all__ = ["Refined"]


@dataclass(frozen=True)
class Refined:
    r"""A diagonal Normal that starts as the encoder's and climbs the row's own evidence lower bound.

    .. math:: \lambda_{t+1} = \lambda_t + \alpha v_t, \quad v_t = \mu v_{t-1} + \operatorname{clip}_c
              \big(\nabla_\lambda \mathcal{L}(x, \lambda_t)\big), \quad \lambda = (m, \log s)

    The bound is that of one row, and so is the norm that clips its gradient: a row's law does not depend on the others
    of its batch. Its KL is in closed form; its expectation is a mean over codes :math:`m \pm s \odot e_i`, with e_1 to
    e_Z random orthogonal directions of length :math:`\sqrt Z` that are drawn once and are not those of the draws.
    Each step takes the next n of them in turn. A row for which the end is no better than the start, by all of
    them, keeps the start.

    Trained through (`fit_model` with `objectives.elbo`) it is the semi-amortised autoencoder. On a trained model its
    bound less that of ``start`` is what amortisation costs.

    Args:
        start: A code posterior with a diagonal Normal law, of which nothing but that law is read: regularisers such as
            `Consistent` go around this class, not inside.
        n_steps: Steps, at least 1.
        learning_rate: alpha; stable below 2 over the largest eigenvalue of the code's posterior precision (1 + w^2 / v
            for one weight w and noise of variance v).
        momentum: mu, in [0, 1).
        second_order: Whether derivatives, those of training and of a linearised predictive, go through the steps. If
            not, they go to the start's parameters as if the steps had added constants to them.
        n_directions: n directions a step, at most Z; None for Z. All should come several times: n * n_steps of many Z.
        clip_norm: c, the largest norm of a row's gradient, over its 2 Z numbers.

    Exact when: as `Amortised` "diagonal", for any encoder: in the limit of many steps it is the best diagonal Normal of
        a linear Gaussian decoder. With n = Z a step climbs the row's very ELBO where log p(x | z) is at most cubic.
    Biased when: read as a posterior, as `Amortised`. With n < Z steps circle around the maximum, by a share of the
        learning rate. Draws are independent of the directions, so that their bound is unbiased.
    Cost: n_steps passes of 2 n codes a row through the decoder, with gradients, and two of 2 Z without; training three
        times that and the memory of all steps, with ``second_order``.

    Raises:
        UnsupportedError: If ``start`` has no law; when called, if that is no diagonal one, n is above Z, or the decoder
            writes to itself, as batch normalisation in training mode does.
        DataError: If a number is out of its range.

    References:
        | Semi-Amortized Variational Autoencoders (Kim, Wiseman, Miller, Sontag, Rush, 2018,
          https://arxiv.org/abs/1802.02550)
        | Departures: orthogonal directions of both signs, drawn once, in place of a fresh draw a step (one draw that is
          held over all steps is over-fitted: its location explains the row and its scale goes to the prior's); each
          row is clipped by itself; the start is kept where it is better.
    """

    start: HasLaw = amortised
    n_steps: int = 20
    learning_rate: float = 0.01
    momentum: float = 0.5
    second_order: bool = True
    n_directions: int | None = None
    clip_norm: float = 5.0

    def __post_init__(self) -> None:
        if not isinstance(self.start, HasLaw):
            got = str(getattr(self.start, "__name__", type(self.start).__name__))
            raise UnsupportedError("a start with a Normal law", got, "Use codes.amortised.")
        check_counts(n_steps=self.n_steps)
        check_counts(**({} if self.n_directions is None else {"n_directions": self.n_directions}))
        check_number("learning_rate", self.learning_rate)
        check_number("momentum", self.momentum, below=1.0, is_zero_allowed=True)
        check_number("clip_norm", self.clip_norm)

    def law(self, model: CodeModel, batch: Batch) -> DiagonalLaw:
        """The refined Normal of every row under every weight draw; the same for any number of draws."""
        start = self.start.law(model, batch)
        if not isinstance(start, DiagonalLaw):
            fix = "Start from codes.Amortised('diagonal')."
            raise UnsupportedError("a diagonal Normal to refine", type(start).__name__, fix)
        directions = self._directions(model, batch, start.loc)

        def bound(point: Tensor, directions: Tensor) -> Tensor:
            law = DiagonalLaw(*point.unbind(0))
            outputs = model.decode(law.push(directions), batch.context)
            return score_outputs(model.likelihood, outputs, batch).mean(0) - law.kl().sum(-1)

        point = torch.stack([start.loc, start.log_scale])
        with nullcontext() if self.second_order else torch.no_grad():
            refined = self._climb(bound, point, directions)
        if not self.second_order:
            refined = point + (refined - point).detach()
        return DiagonalLaw(*refined.unbind(0))

    def __call__(self, model: CodeModel, batch: Batch, *, n_latent_draws: int = 1) -> Draws:
        """Draw K codes for every row under every weight draw.

        Args:
            model: The model at S weight draws.
            batch: Rows to encode.
            n_latent_draws: K.

        Returns:
            `Draws` with outputs and the closed-form KL.
        """
        law = self.law(model, batch)
        latents = law.push(noise(model, batch, n_latent_draws, law.loc.shape[-1], law.loc))
        return draws_of(model, batch, latents, law.log_prob(latents), law.kl())

    def _climb(self, bound: Callable[[Tensor, Tensor], Tensor], start: Tensor, directions: Tensor) -> Tensor:
        """Where ``n_steps`` steps from a point (2, S, B, Z) end, or the point itself, whichever is higher."""
        n_latents = len(directions) // 2
        n = n_latents if self.n_directions is None else self.n_directions
        point, velocity = start, torch.zeros_like(start)
        for t in range(self.n_steps):
            some = [(t * n + i) % n_latents for i in range(n)]
            some = directions[[*some, *(i + n_latents for i in some)]]
            gradient = _gradient(lambda at, some=some: bound(at, some).sum(), point)
            velocity = self.momentum * velocity + self._clipped(gradient)
            point = point + self.learning_rate * velocity
        with torch.no_grad():
            is_better = bound(point, directions) > bound(start, directions)
        return torch.where(is_better[..., None], point, start)

    def _clipped(self, gradient: Tensor) -> Tensor:
        """Gradients (2, S, B, Z) whose norm over a row's 2 Z numbers is ``clip_norm`` at most."""
        squared = (gradient**2).sum((0, -1), keepdim=True)
        return gradient * self.clip_norm * squared.clamp_min(self.clip_norm**2).rsqrt()

    def _directions(self, model: CodeModel, batch: Batch, like: Tensor) -> Tensor:
        """Z orthogonal directions of length sqrt(Z), then their opposites, (2 Z, S or 1, B, Z)."""
        n_latents = like.shape[-1]
        if self.n_directions is not None and self.n_directions > n_latents:
            fix = "None takes as many as there are code dimensions."
            raise UnsupportedError(f"at most {n_latents} directions, one a code dimension", f"{self.n_directions}", fix)
        # keys of no row, so that the draws that the law is judged by are not those that it was fitted to
        index = torch.arange(len(batch.x)) if batch.index is None else batch.index
        normal = noise(model, batch._replace(index=-1 - index), n_latents, n_latents, like)
        columns = torch.linalg.qr(normal.permute(1, 2, 3, 0).double()).Q.permute(3, 0, 1, 2)
        directions = n_latents**0.5 * columns.to(like)
        return torch.cat([directions, -directions])


def _gradient(function: Callable[[Tensor], Tensor], point: Tensor) -> Tensor:
    with differentiating():
        return torch.func.grad(function)(point)
