"""Regularisers of amortised inference around any code posterior: noise on its input, consistency under a transform."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bayesae.codes.arguments import check_number
from bayesae.codes.base import CodeModel, CodePosterior, law_of
from bayesae.codes.divergence import kl_between
from bayesae.codes.laws import Law
from bayesae.draws import Draws
from bayesae.errors import ShapeError, UnsupportedError
from bayesae.types import Batch

__all__ = ["Consistent", "Perturbed"]


@dataclass(frozen=True)
class Perturbed:
    r"""Amortised-inference regularisation: the encoder sees noisy rows while it is fitted, clean ones ever after.

    .. math:: q(z \mid x) \to q(z \mid x + s \varepsilon), \quad \varepsilon \sim \mathcal{N}(0, I)

    The clean row is what is explained. Entries that are masked stay 0. All draws of a call share the noise.

    Args:
        inner: The code posterior that sees the noisy rows.
        scale: s, units of x; 0 for none.

    Exact when: nothing is being fitted (``model.is_fitting``): it is ``inner`` then.
    Biased when: fitting: the bound on log p(x) is looser than that of the clean row's own q, on purpose.
    Cost: that of ``inner``.

    Raises:
        UnsupportedError: If ``inner`` cannot be called.
        DataError: If the scale is no number of at least 0.

    References:
        | Amortized Inference Regularization (Shu, Bui, Zhao, Kochenderfer, Ermon, 2018,
          https://arxiv.org/abs/1805.08913): its denoising form
    """

    inner: CodePosterior
    scale: float

    def __post_init__(self) -> None:
        _check_inner(self.inner)
        check_number("scale", self.scale, is_zero_allowed=True)

    def law(self, model: CodeModel, batch: Batch) -> Law:
        """The inner law, of noisy rows while fitting."""
        return law_of(self.inner, model, self._seen(model, batch))

    def __call__(self, model: CodeModel, batch: Batch, *, n_latent_draws: int = 1) -> Draws:
        """Draw K codes by ``inner``, of noisy rows while fitting.

        Args:
            model: The model at S weight draws.
            batch: Rows to encode.
            n_latent_draws: K.

        Returns:
            The inner draws, scored on clean rows.
        """
        return self.inner(model, self._seen(model, batch), n_latent_draws=n_latent_draws)

    def _seen(self, model: CodeModel, batch: Batch) -> Batch:
        if not model.is_fitting:
            return batch
        x = batch.x + self.scale * torch.randn_like(batch.x)
        return batch._replace(x=_observed(x, batch), target=batch.explained)


@dataclass(frozen=True)
class Consistent:
    r"""Consistency regularisation: a row and its transform are to have the same code.

    .. math:: \text{penalty}(x) = w \operatorname{KL}\big(q(z \mid t(x)) \,\|\, q(z \mid x)\big)

    While fitting (``model.is_fitting``) the penalty is on the draws, and training subtracts it from any objective.
    Gradients go to both laws, as in the paper.

    Args:
        inner: A code posterior with a Normal law.
        transform: t: maps rows (B, \*data) to rows of that shape whose meaning is the same (a small shift, noise, a
            flip); draw at random in it as you like. Entries that are masked stay 0.
        weight: w, at least 0.

    Exact when: always: the divergence of two Normals is in closed form.
    Biased when: fitting: the objective less the penalty is no longer the objective, on purpose.
    Cost: that of ``inner`` and of two laws more while fitting, of ``inner`` afterwards.

    Raises:
        UnsupportedError: If ``inner`` or ``transform`` cannot be called, or, when called while fitting, if ``inner``
            has no Normal law.
        DataError: If the weight is no number of at least 0.
        ShapeError: When called, if the transform changes the shape.

    References:
        | Consistency Regularization for Variational Auto-Encoders (Sinha, Dieng, 2021,
          https://arxiv.org/abs/2105.14859)
        | Departure: the paper's objective adds the bound of t(x) too; give such rows as data for that.
    """

    inner: CodePosterior
    transform: Callable[[Tensor], Tensor]
    weight: float = 1.0

    def __post_init__(self) -> None:
        _check_inner(self.inner)
        if not callable(self.transform):
            raise UnsupportedError("a function of rows as transform", repr(self.transform)[:80], "(B, *data) to same.")
        check_number("weight", self.weight, is_zero_allowed=True)

    def law(self, model: CodeModel, batch: Batch) -> Law:
        """The inner law."""
        return law_of(self.inner, model, batch)

    def __call__(self, model: CodeModel, batch: Batch, *, n_latent_draws: int = 1) -> Draws:
        """Draw K codes by ``inner``.

        Args:
            model: The model at S weight draws.
            batch: Rows to encode.
            n_latent_draws: K.

        Returns:
            The inner draws; while fitting, with a penalty that is added to that of ``inner``.

        Raises:
            ShapeError: If the transform changes the shape.
        """
        draws = self.inner(model, batch, n_latent_draws=n_latent_draws)
        if not model.is_fitting:
            return draws
        x = self.transform(batch.x)
        if x.shape != batch.x.shape:
            fix = "transform= gives rows of the shape that it takes."
            raise ShapeError(f"transformed rows of shape {tuple(batch.x.shape)}", f"{tuple(x.shape)}", fix)
        moved = batch._replace(x=_observed(x, batch), target=batch.explained)
        penalty = self.weight * kl_between(self.law(model, moved), self.law(model, batch))
        return replace(draws, penalty=penalty if draws.penalty is None else draws.penalty + penalty)


def _check_inner(inner: object) -> None:
    if not callable(inner):
        raise UnsupportedError("a code posterior as inner", repr(inner)[:80], "codes.amortised is one.")


def _observed(x: Tensor, batch: Batch) -> Tensor:
    """Rows in which what the batch masks is 0 again."""
    return x if batch.mask is None else torch.where(batch.mask, x, 0)
