"""The Laplace code posterior: the mode of p(z | x, theta) by Gauss-Newton steps, and the curvature there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from bayesae.codes.base import CodeModel, draws_of, noise, score_outputs
from bayesae.codes.laws import TriangularLaw
from bayesae.codes.local import Local
from bayesae.data import check_counts
from bayesae.draws import Draws
from bayesae.errors import NonFiniteError, UnsupportedError
from bayesae.types import Batch

__all__ = ["Laplace"]

Step = Literal["line_search", "newton", "decaying"]


@dataclass(frozen=True)
class Laplace:
    r"""A Normal around the mode of the code's own posterior, found by Gauss-Newton steps from the encoder's code.

    .. math:: z_{t+1} = z_t + \alpha_t \Lambda_t^{-1} \nabla_z \log p(x, z_t), \quad
              \Lambda_t = J_t^\top H_t J_t + I, \qquad q(z \mid x) = \mathcal{N}(z_T, \Lambda_T^{-1})

    with J the decoder's Jacobian in the code and H the Hessian (or Fisher information) of -log p(x | outputs). Trained
    through (`fit_model` with `objectives.elbo`) it is the Variational Laplace Autoencoder: gradients pass through all
    steps. On any trained model, a VAE's included, it is a posterior after the fact and a proposal for
    `evaluation.log_evidence`: the encoder's location is the start, and no other parameter of q is read.

    Args:
        n_steps: T, at least 0.
        step: The :math:`\alpha_t`: "line_search", the best of 1, 1/2, 1/4, 1/8 and 0 by log p(x, z) for each row,
            so that no step goes down; "newton", 1; "decaying", 1 / (2 (t + 1)), the paper's, which never reaches
            the mode even of a linear decoder. None: "decaying" while weights are fitted, "line_search" otherwise. A
            full step forgets where it started, and with that it keeps the gradient from the encoder, which then learns
            no good start.

    Draws carry no closed-form KL: near the posterior log p(x, z) - log q(z) hardly varies, the KL does.

    Exact when: the decoder is linear and its noise Gaussian, after one "newton" or "line_search" step.
    Biased when: as any Normal, where the posterior is none; it may be too wide or too narrow, unlike a variational
        one. ReLU kinks are not seen.
    Cost: T + 1 pushes of Z tangents through the decoder, and T + 1 factorisations (Z, Z) a row, in float64;
        "line_search" five passes through the decoder a step more, without gradients.

    Raises:
        UnsupportedError: If the step is unknown.
        DataError: If ``n_steps`` is no whole number of at least 0.
        NonFiniteError: When called, if the decoder's Jacobian is not finite.

    References:
        | Variational Laplace Autoencoders (Park, Kim, Kim, 2019, https://proceedings.mlr.press/v97/park19a.html)
        | Departures: any decoder and likelihood by the Gauss-Newton matrix; the line search; a Cholesky factor of the
          precision in place of an inverse, its diagonal raised by the rounding of the decoder's dtype.
    """

    n_steps: int = 4
    step: Step | None = None

    def __post_init__(self) -> None:
        check_counts(n_steps=self.n_steps + 1 if type(self.n_steps) is int else self.n_steps)
        if self.step is not None and self.step not in get_args(Step):
            raise UnsupportedError(f"step, one of {list(get_args(Step))}", repr(self.step), "Leave it out.")

    def law(self, model: CodeModel, batch: Batch) -> TriangularLaw:
        """The Normal at the mode of every row under every weight draw."""
        z, local = model.encode(batch.x, batch.context), Local(model, batch)
        for t in range(self.n_steps):
            expansion = local(z)
            gradient = expansion.gradient - z
            direction = _solve(_factor(expansion.curvature), gradient)
            z = z + self._length(model, batch, z, direction, t) * direction
        return TriangularLaw(z, _factor(local(z).curvature).to(z.dtype), is_precision=True)

    def __call__(self, model: CodeModel, batch: Batch, *, n_latent_draws: int = 1) -> Draws:
        """Draw K codes for every row under every weight draw.

        Args:
            model: The model at S weight draws.
            batch: Rows to encode.
            n_latent_draws: K.

        Returns:
            `Draws` with outputs.
        """
        law = self.law(model, batch)
        latents = law.push(noise(model, batch, n_latent_draws, law.loc.shape[-1], law.loc))
        return draws_of(model, batch, latents, law.log_prob(latents))

    def _length(self, model: CodeModel, batch: Batch, z: Tensor, direction: Tensor, t: int) -> Tensor | float:
        step = self.step or ("decaying" if model.is_fitting else "line_search")
        if step != "line_search":
            return 1.0 if step == "newton" else 0.5 / (t + 1)
        with torch.no_grad():
            lengths = z.new_tensor(_LENGTHS)
            trials = z + lengths[:, None, None, None] * direction
            values = score_outputs(model.likelihood, model.decode(trials, batch.context), batch)
            values = (values + model.log_prior(trials)).nan_to_num(-torch.inf)
            return lengths[values.argmax(0)][..., None]


_LENGTHS = (0.0, 1.0, 0.5, 0.25, 0.125)


def _factor(curvature: Tensor) -> Tensor:
    """Cholesky factor of the curvature plus that of the prior, 1, in float64."""
    wide = curvature.double()
    rounding = 4 * torch.finfo(curvature.dtype).eps * wide.diagonal(dim1=-2, dim2=-1).sum(-1)
    try:
        return torch.linalg.cholesky(wide + torch.diag_embed((1 + rounding)[..., None].expand(wide.shape[:-1])))
    except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
        fix = "Lower the learning rate; are codes or inputs far outside the training range?"
        raise NonFiniteError("a positive definite precision of the code", str(error), fix) from error


def _solve(factor: Tensor, vector: Tensor) -> Tensor:
    return torch.cholesky_solve(vector.double()[..., None], factor)[..., 0].to(vector.dtype)
