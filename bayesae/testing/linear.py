"""A decoder that is linear with Gaussian noise: code posterior and evidence of every row in closed form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from bayesae.likelihoods import Gaussian
from bayesae.models import Autoencoder
from bayesae.types import Batch

__all__ = ["LinearGaussian"]


@dataclass(frozen=True)
class LinearGaussian:
    r"""Probabilistic PCA, :math:`x = W z + b + \varepsilon`, with z ~ N(0, I) and noise of variance v.

    .. math:: p(z \mid x) = \mathcal{N}(S W^\top (x - b) / v, S), \quad S = (W^\top W / v + I)^{-1}, \qquad
              p(x) = \mathcal{N}(b, W W^\top + v I)

    Args:
        weight: W, (D, Z), float64.
        bias: b, (D,).
        noise_var: v.
        x: Rows drawn from the model, (N, D).
    """

    weight: Tensor
    bias: Tensor
    noise_var: float
    x: Tensor

    @classmethod
    def make(
        cls,
        *,
        seed: int = 0,
        n_data: int = 40,
        n_outputs: int = 7,
        n_latents: int = 3,
        noise_var: float = 0.3,
        correlation: float = 0.0,
        dtype: torch.dtype = torch.float64,
    ) -> LinearGaussian:
        """Draw W, b and rows.

        Args:
            seed: Of all draws; the caller's generators are not touched.
            n_data: N.
            n_outputs: D.
            n_latents: Z.
            noise_var: v.
            correlation: Share of one common direction in every column of W, in [0, 1): near 1 the posterior is far from
                independent and the mean-field gap is wide.
            dtype: Of everything.

        Returns:
            The world.
        """
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        common = normal(n_outputs, 1)
        weight = (1 - correlation) ** 0.5 * normal(n_outputs, n_latents) + correlation**0.5 * common
        bias = normal(n_outputs)
        x = normal(n_data, n_latents) @ weight.mT + bias + noise_var**0.5 * normal(n_data, n_outputs)
        return cls(weight.to(dtype), bias.to(dtype), noise_var, x.to(dtype))

    @property
    def n_latents(self) -> int:
        """Z."""
        return self.weight.shape[1]

    @property
    def precision(self) -> Tensor:
        """Of the code posterior, the same for every row, (Z, Z)."""
        return self.weight.mT @ self.weight / self.noise_var + torch.eye(self.n_latents, dtype=self.weight.dtype)

    @property
    def covariance(self) -> Tensor:
        """S, (Z, Z)."""
        return torch.linalg.inv(self.precision)

    def posterior_mean(self, x: Tensor | None = None) -> Tensor:
        """Mean of the code posterior of every row, (N, Z)."""
        x = self.x if x is None else x
        return (x - self.bias) @ self.weight @ self.covariance / self.noise_var

    def log_evidence(self, x: Tensor | None = None) -> Tensor:
        """Log p(x) of every row in nats, (N,)."""
        x = self.x if x is None else x
        eye = torch.eye(len(self.bias), dtype=x.dtype)
        marginal = self.weight @ self.weight.mT + self.noise_var * eye
        return torch.distributions.MultivariateNormal(self.bias, marginal).log_prob(x)

    @property
    def mean_field_gap(self) -> float:
        """Log p(x) less the best ELBO of a diagonal Normal, nats, the same for every row."""
        return float(0.5 * (self.precision.diagonal().log().sum() - torch.logdet(self.precision)))

    def model(self, family: Literal["location", "diagonal", "full"] = "full") -> Autoencoder:
        """An autoencoder whose decoder is the world's, with the best linear encoder for a family of code posteriors.

        Args:
            family: "full": the exact posterior, by its Cholesky factor; "diagonal": the best independent Normal, of
                variances 1 / precision; "location": the posterior mean alone, for a plain code.

        Returns:
            The model, in evaluation mode: ``codes.Amortised("full")`` on it is the exact posterior.
        """
        n_outputs, n_latents = self.weight.shape
        gain = self.covariance @ self.weight.mT / self.noise_var
        columns, biases = [gain[:, None]], [-(gain @ self.bias)[:, None]]
        if family == "diagonal":
            biases.append(-0.5 * self.precision.diagonal().log()[:, None])
        elif family == "full":
            factor = torch.linalg.cholesky(self.covariance)
            biases.append(factor.tril(-1) + torch.diag_embed(factor.diagonal().log()))
        bias = torch.cat(biases, 1)
        columns += [gain.new_zeros(n_latents, bias.shape[1] - 1, n_outputs)]
        with torch.random.fork_rng(devices=[]):
            encoder, decoder = nn.Linear(n_outputs, bias.numel()), nn.Linear(n_latents, n_outputs)
        layers = [encoder] if family == "location" else [encoder, nn.Unflatten(1, tuple(bias.shape))]
        model = Autoencoder(nn.Sequential(*layers), nn.Sequential(decoder), Gaussian(self.noise_var**0.5))
        model = model.to(self.weight.dtype).eval()
        with torch.no_grad():
            encoder.weight.copy_(torch.cat(columns, 1).reshape(-1, n_outputs))
            encoder.bias.copy_(bias.reshape(-1))
            decoder.weight.copy_(self.weight)
            decoder.bias.copy_(self.bias)
        return model

    @property
    def batch(self) -> Batch:
        """All rows."""
        return Batch(self.x, index=torch.arange(len(self.x)))
