"""Problems whose posterior is known in closed form."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from bayesae.joint import IsotropicNormal, LogJoint
from bayesae.likelihoods import Gaussian
from bayesae.types import Batch, Params

__all__ = ["ConjugateRegression"]


@dataclass(frozen=True)
class ConjugateRegression:
    r"""Linear regression with Gaussian noise and an isotropic Normal prior: everything is known.

    .. math:: y = W x + b + \varepsilon, \quad \varepsilon \sim \mathcal{N}(0, s^2 I), \qquad
              \Lambda = I_O \otimes X^\top X / s^2 + \lambda I

    with a column of ones in X for the bias. Of an orthogonal design the posterior precision is diagonal.

    Args:
        joint: log p(D, theta) over ``weight`` (O, D) and ``bias`` (O,).
        batch: All rows: inputs x (N, D), targets y (N, O).
        mean: Posterior mean, every parameter in its own shape.
        covariance: Posterior covariance of one output's (weights, bias), (D + 1, D + 1); outputs are independent.
        log_evidence: log p(y | x) in nats.
    """

    joint: LogJoint
    batch: Batch
    mean: Params
    covariance: Tensor
    log_evidence: float

    @classmethod
    def make(
        cls,
        *,
        seed: int = 0,
        n_data: int = 24,
        n_in: int = 3,
        n_out: int = 2,
        noise: float = 0.5,
        precision: float = 2.0,
        is_orthogonal: bool = True,
        dtype: torch.dtype = torch.float64,
    ) -> ConjugateRegression:
        """Draw a problem and solve it.

        Args:
            seed: Of the data; the caller's generators are not touched.
            n_data: N.
            n_in: D.
            n_out: O.
            noise: Standard deviation of y.
            precision: Of the prior.
            is_orthogonal: Whether the columns of (X, 1) are orthogonal, so that the precision is diagonal.
            dtype: Of everything.

        Returns:
            The world.
        """
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        ones = torch.ones(n_data, 1, dtype=torch.float64)
        x = normal(n_data, n_in)
        if is_orthogonal:
            x = torch.linalg.qr(torch.cat([ones, x], 1)).Q[:, 1:] * torch.arange(1, n_in + 1) * 2
        design = torch.cat([x, ones], 1)
        theta = normal(n_in + 1, n_out) / math.sqrt(precision)
        y = design @ theta + noise * normal(n_data, n_out)
        eye = torch.eye(n_in + 1, dtype=torch.float64)
        covariance = torch.linalg.inv(design.mT @ design / noise**2 + precision * eye)
        mode = covariance @ design.mT @ y / noise**2
        marginal = noise**2 * torch.eye(n_data, dtype=torch.float64) + design @ design.mT / precision
        zero = torch.zeros(n_data, dtype=torch.float64)
        log_evidence = torch.distributions.MultivariateNormal(zero, marginal).log_prob(y.mT).sum()

        with torch.random.fork_rng(devices=[]):
            network = nn.Linear(n_in, n_out).to(dtype)
        likelihood = Gaussian(noise).to(dtype)

        def per_example(params: Params, batch: Batch) -> Tensor:
            assert batch.target is not None
            outputs = batch.x @ params["weight"].mT + params["bias"][:, None]
            return likelihood.log_prob(outputs, batch.target)

        joint = LogJoint(network, likelihood, per_example, IsotropicNormal(precision), n_data)
        batch = Batch(x.to(dtype), target=y.to(dtype), index=torch.arange(n_data))
        mean = {"weight": mode[:-1].mT.to(dtype).contiguous(), "bias": mode[-1].to(dtype)}
        return cls(joint, batch, mean, covariance, float(log_evidence))

    def batches(self, n_batches: int = 1) -> Iterator[Batch]:
        """The rows in about ``n_batches`` batches.

        Args:
            n_batches: Between 1 and N.

        Yields:
            Batches in order.
        """
        size = math.ceil(len(self.batch.x) / n_batches)
        assert self.batch.target is not None and self.batch.index is not None
        parts = (self.batch.x.split(size), self.batch.target.split(size), self.batch.index.split(size))
        for x, target, index in zip(*parts, strict=True):
            yield self.batch._replace(x=x, target=target, index=index)

    def with_temperature(self, temperature: float) -> ConjugateRegression:
        """The same data at another temperature; ``covariance`` is then times it."""
        joint = replace(self.joint, temperature=temperature)
        return replace(self, joint=joint, covariance=self.covariance * temperature)
