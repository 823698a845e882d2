"""Scores of the code: how much it varies over draws, and how probable it is among familiar codes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from bayesae import random
from bayesae.data import as_tensor, check_counts
from bayesae.draws import Draws
from bayesae.errors import DataError, NonFiniteError, ShapeError, UnsupportedError
from bayesae.functional import at_least_float32, check_finite
from bayesae.lazy import import_zuko

__all__ = ["CodeFlow", "Mahalanobis", "code_covariance", "code_variance", "code_volume"]


def code_covariance(draws: Draws) -> Tensor:
    r"""Covariance of the code over all its draws, those of the weights and its own.

    .. math:: \frac{1}{KS} \sum_{k,s} (z_{ks} - \bar z)(z_{ks} - \bar z)^\top

    Args:
        draws: Draws of the predictive at x, K S > 1.

    Returns:
        (B, Z, Z), squared units of the code; divisor K S. Of a deterministic code it is the weights' alone.

    Raises:
        UnsupportedError: If there is one draw only.

    Exact when: the draws are the whole posterior.
    Biased when: draws are few: low by a share 1 / (K S).
    """
    return _covariance(draws).to(draws.latents.dtype)


def code_variance(draws: Draws) -> Tensor:
    """Variance of the code over its draws, summed over dimensions: the trace of `code_covariance`.

    Args:
        draws: Draws of the predictive at x, K S > 1.

    Returns:
        (B,), squared units of the code. Its unit is the network's own: of two trainings the numbers do not compare.

    Raises:
        UnsupportedError: If there is one draw only.

    Exact when: as `code_covariance`.
    Biased when: read as a score of how unfamiliar x is: it is the share of dead inputs that move the code, and
        inverted where strange inputs move fewer weights than familiar ones.

    References:
        | Laplacian Autoencoders for Learning Stochastic Representations (Miani, Warburg, Moreno-Munoz, Skafte,
          Hauberg, 2022)
    """
    return code_covariance(draws).diagonal(dim1=-2, dim2=-1).sum(-1)


def code_volume(draws: Draws) -> Tensor:
    r"""Entropy of a Normal with the code's covariance, :math:`\tfrac12 \log \det 2 \pi e\, \operatorname{Cov}[z]`.

    Unlike the variance it ranks rows alike whatever linear map the code goes through.

    Args:
        draws: Draws of the predictive at x, more of them than code dimensions.

    Returns:
        (B,), nats.

    Raises:
        UnsupportedError: If there are no more draws than code dimensions: the covariance is singular then.
        NonFiniteError: If a row's codes do not span all dimensions: one never moves or follows from the others, or the
            weight draws share a few code draws, as those of a decoder's weights do.

    Exact when: as `code_covariance`, for a Normal code.
    """
    n_draws, n_latents = len(draws.latents.flatten(0, 1)), draws.latents.shape[-1]
    if n_draws <= n_latents:
        fix = "Draw more weights, or use code_variance."
        raise UnsupportedError(f"more than {n_latents} draws of a code of that size", f"{n_draws}", fix)
    found = volume(draws)
    if n_flat := int(found.isinf().sum()):
        fix = "Draw more codes of each weight draw, or use code_variance."
        raise NonFiniteError(f"codes that span all {n_latents} dimensions", f"{n_flat} rows whose do not", fix)
    check_finite({"code_volume": found}, "codes", "Did the network diverge?")
    return found


def volume(draws: Draws) -> Tensor:
    """As `code_volume`, (B,); minus infinity where codes do not span all dimensions beyond rounding."""
    covariance = _covariance(draws)
    deviation = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    # of correlations, so that units do not decide what is rounding
    scales = torch.where(deviation > 0, deviation, 1.0)
    eigenvalues = torch.linalg.eigvalsh(covariance / (scales[:, :, None] * scales[:, None, :]))
    n_latents = covariance.shape[-1]
    # rounding of this arithmetic, and of codes that came in another dtype, whose squares these are
    least = n_latents * max(10 * torch.finfo(covariance.dtype).eps, (10 * torch.finfo(draws.latents.dtype).eps) ** 2)
    log_det = 2 * deviation.log().sum(-1) + eigenvalues.clamp(min=least).log().sum(-1)
    log_det = torch.where(eigenvalues.amin(-1) > least, log_det, -torch.inf)
    return (0.5 * (log_det + n_latents * math.log(2 * math.pi * math.e))).to(draws.latents.dtype)


@dataclass(frozen=True)
class Mahalanobis:
    r"""Normals fitted to familiar codes, one a class with a shared covariance.

    .. math:: s(z) = \min_c \tfrac12 (z - m_c)^\top C^{-1} (z - m_c)

    Args:
        means: Mean code of each class, (C, Z); one class without labels.
        factor: Cholesky factor of the pooled covariance, (Z, Z).
    """

    means: Tensor
    factor: Tensor

    @classmethod
    def fit(cls, codes: Tensor | np.ndarray, labels: Tensor | np.ndarray | None = None) -> Mahalanobis:
        """Fit to familiar codes.

        Args:
            codes: (N, Z), of training rows, say ``predictive(x).latents.mean((0, 1))``.
            labels: Classes (N,), or None for one.

        Returns:
            The fitted score.

        Raises:
            ShapeError: If codes are not (N, Z) with N and Z of at least 1.
            DataError: If there is another number of labels, or codes within classes do not span all dimensions: they
                are too few, or in some direction move less than ten times what the rounding of their own dtype does.
            NonFiniteError: If a code is not finite.

        Exact when: codes are Normal with this covariance in each class, in the limit of many.
        """
        codes, eps = _checked(codes)
        classes = torch.zeros(len(codes), dtype=torch.long) if labels is None else as_tensor(labels)
        if classes.shape != (len(codes),):
            raise DataError(f"{len(codes)} labels", f"shape {tuple(classes.shape)}", "One for every code.")
        kinds, index = classes.to(codes.device).unique(return_inverse=True)
        means = torch.stack([codes[index == c].mean(0) for c in range(len(kinds))])
        centred = codes - means[index]
        covariance = centred.T @ centred / max(1, len(codes) - len(kinds))
        check_finite({"covariance": covariance}, "covariances", "Divide the codes by their size.")
        rank, n_latents = _rank(covariance, eps * codes.square().mean(0).sqrt()), codes.shape[1]
        if rank < n_latents:
            got = f"{len(codes)} codes of rank {rank} in {len(kinds)} classes"
            fix = "Give more rows, or leave out code dimensions that never move or follow from the others."
            raise DataError(f"codes that span all {n_latents} dimensions", got, fix)
        return cls(means, torch.linalg.cholesky(covariance))

    def __call__(self, latents: Tensor | np.ndarray) -> Tensor:
        """Score codes.

        Args:
            latents: (K, S, B, Z) of `Draws`, or (B, Z).

        Returns:
            (B,), half the smallest squared distance, in standard deviations squared; the mean over draws.

        Raises:
            ShapeError: If codes are of another size.
            DataError: If there are none.
            NonFiniteError: If a code is not finite.
        """
        latents = _scorable(latents, self.means.shape[1])
        # (..., C, Z): codes times classes, whitened
        difference = latents.double()[..., None, :] - self.means.to(latents.device)
        white = torch.linalg.solve_triangular(self.factor.to(latents.device), difference.mT, upper=False)
        return _over_draws(0.5 * (white**2).sum(-2).amin(-1)).to(latents.dtype)


@dataclass(frozen=True)
class CodeFlow:
    r"""A normalizing flow fitted to familiar codes; the score is :math:`-\log p(z)`.

    Args:
        flow: A flow of the zuko library, fitted.
        loc: Mean of the familiar codes, (Z,).
        scale: Their standard deviation, (Z,).
    """

    flow: nn.Module
    loc: Tensor
    scale: Tensor

    @classmethod
    def fit(
        cls,
        codes: Tensor | np.ndarray,
        *,
        hidden: Sequence[int] = (64, 64),
        n_transforms: int = 3,
        epochs: int = 100,
        batch_size: int = 256,
        learning_rate: float = 3e-3,
        seed: int | None = None,
        progress: bool | None = None,
    ) -> CodeFlow:
        """Fit a masked autoregressive flow to familiar codes by maximum likelihood, the best epoch by held-out codes.

        Its transformations are affine, so that its density falls off outside the familiar codes as a Normal's does; a
        spline's tails there are whatever its end knots are.

        Args:
            codes: (N, Z), N of at least 10: a tenth is held out. Its networks are of their dtype, float32 at least.
            hidden: Widths of its networks.
            n_transforms: Transformations, one after the other.
            epochs: Passes over the codes.
            batch_size: Codes a step.
            learning_rate: Of Adam.
            seed: Of its weights and batches; the caller's generators are put back. None advances them.
            progress: Show a progress bar; None shows it on a terminal only.

        Returns:
            The fitted score.

        Raises:
            ShapeError: If codes are not (N, Z) with N and Z of at least 1.
            DataError: If there are fewer than 10 codes, a dimension never moves, or a count is below 1.
            NonFiniteError: If a code is not finite.

        Exact when: codes are Normal, or autoregressively so given those before, in the limit of many.
        Cost: a training on vectors of Z numbers.

        References:
            | Masked Autoregressive Flow for Density Estimation (Papamakarios, Pavlakou, Murray, 2017)
        """
        check_counts(n_transforms=n_transforms, epochs=epochs, batch_size=batch_size)
        dtype = at_least_float32(as_tensor(codes)[:0]).dtype
        dtype = dtype if dtype.is_floating_point else torch.float64
        codes = _checked(codes)[0].to(dtype)
        loc, scale = codes.mean(0), codes.std(0, correction=0)
        if len(codes) < 10 or not bool((scale > 0).all()):
            got = f"{len(codes)} codes, {int((scale <= 0).sum())} dimensions that never move"
            raise DataError("at least 10 codes, all dimensions moving", got, "Give more rows, or Mahalanobis.")
        # a training of its own, whatever mode the caller is in; of copies, because inference tensors have no graph
        with random.scope(seed, codes.device), torch.inference_mode(mode=False), torch.enable_grad():
            loc, scale, codes = loc.clone(), scale.clone(), codes.clone()
            order = torch.randperm(len(codes))
            white = ((codes - loc) / scale)[order.to(codes.device)]
            held_out, rows = white[: len(codes) // 10], white[len(codes) // 10 :]
            flow = import_zuko().flows.MAF(codes.shape[1], transforms=n_transforms, hidden_features=tuple(hidden))
            flow = flow.to(codes)
            optimiser = torch.optim.Adam(flow.parameters(), lr=learning_rate)
            best, kept = math.inf, None
            for _ in tqdm(range(epochs), unit="epoch", disable=None if progress is None else not progress):
                for batch in rows[torch.randperm(len(rows)).to(rows.device)].split(batch_size):
                    optimiser.zero_grad()
                    (-flow().log_prob(batch).mean()).backward()
                    optimiser.step()
                with torch.no_grad():
                    loss = float(-flow().log_prob(held_out).mean())
                if not math.isfinite(loss):
                    raise NonFiniteError("a finite held-out density", f"{loss}", "Lower the learning rate.")
                if loss < best:
                    best, kept = loss, {name: value.clone() for name, value in flow.state_dict().items()}
        assert kept is not None
        flow.load_state_dict(kept)
        return cls(flow.requires_grad_(requires_grad=False).eval(), loc, scale)

    @torch.no_grad()
    def __call__(self, latents: Tensor | np.ndarray) -> Tensor:
        """Score codes.

        Args:
            latents: (K, S, B, Z) of `Draws`, or (B, Z).

        Returns:
            (B,), nats; the mean over draws.

        Raises:
            ShapeError: If codes are of another size.
            DataError: If there are none.
            NonFiniteError: If a code is not finite.
        """
        latents = _scorable(latents, len(self.loc))
        white = (latents.to(self.loc.dtype) - self.loc.to(latents.device)) / self.scale.to(latents.device)
        log_prob = self.flow().log_prob(white.reshape(-1, white.shape[-1])).reshape(white.shape[:-1])
        return _over_draws(self.scale.log().sum() - log_prob).to(latents.dtype)


def _covariance(draws: Draws) -> Tensor:
    """Of the code over all draws, (B, Z, Z) in float64: dimensions that nearly hang together are told from rounding."""
    latents = draws.latents.flatten(0, 1).double()
    if len(latents) < 2:
        raise UnsupportedError("at least two draws of the code", "one", "Draw more weights, or more codes.")
    centred = latents - latents.mean(0)
    return torch.einsum("dbi,dbj->bij", centred, centred) / len(latents)


def _over_draws(values: Tensor) -> Tensor:
    """Mean over all axes but the rows, (..., B) to (B,)."""
    return values.reshape(-1, values.shape[-1]).mean(0)


def _rank(covariance: Tensor, rounding: Tensor) -> int:
    """Directions in which codes of this covariance (Z, Z) move by more than their rounding (Z,) and arithmetic's."""
    deviation = covariance.diagonal().sqrt()
    scales = torch.where(deviation > 0, deviation, 1.0)  # of correlations, so that units do not decide
    eigenvalues, directions = torch.linalg.eigh(covariance / torch.outer(scales, scales))
    noise = ((rounding / scales) ** 2) @ directions**2
    least = torch.maximum(100 * noise, torch.tensor(10 * len(scales) * torch.finfo(covariance.dtype).eps).to(noise))
    return int((eigenvalues > least).sum())


def _checked(codes: Tensor | np.ndarray) -> tuple[Tensor, float]:
    """Codes (N, Z) in float64, and the relative rounding of the dtype that they came in."""
    given = as_tensor(codes).detach()
    if given.dim() != 2 or not given.numel():
        got, fix = f"{tuple(given.shape)}", "Take the mean over draws: latents.mean((0, 1))."
        raise ShapeError("codes (N, Z) of at least one row and dimension", got, fix)
    check_finite({"codes": given}, "codes", "Did the network diverge?")
    return given.double(), torch.finfo(given.dtype if given.is_floating_point() else torch.float64).eps


def _scorable(latents: Tensor | np.ndarray, n_latents: int) -> Tensor:
    """Codes (..., B, Z) to score: some, all finite, of that size."""
    given = as_tensor(latents)
    if given.dim() < 2 or given.shape[-1] != n_latents:
        raise ShapeError(f"codes (..., B, {n_latents})", f"{tuple(given.shape)}", "Score codes of the same network.")
    if not given.numel():
        raise DataError("at least one code", f"none, of shape {tuple(given.shape)}", "Score some rows.")
    check_finite({"latents": given}, "codes", "Did the network diverge on these rows?")
    return given if given.is_floating_point() else given.double()
