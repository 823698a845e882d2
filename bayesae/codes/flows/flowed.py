"""A code posterior that is a law pushed through a flow."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from bayesae.codes.base import CodeModel, draws_of, noise
from bayesae.codes.flows.base import Flow, LawFamily, check_dtype, check_is_total
from bayesae.codes.laws import DiagonalLaw
from bayesae.draws import Draws
from bayesae.errors import ShapeError
from bayesae.types import Batch

__all__ = ["Flowed"]


@dataclass(frozen=True)
class Flowed:
    r"""Codes of a simple law moved by a bijection: a variational autoencoder with a normalising flow.

    .. math:: z = f(z_0), \quad z_0 \sim q_0(z_0 \mid x), \quad
              \log q(z \mid x) = \log q_0(z_0 \mid x) - \log \lvert \det \partial f / \partial z_0 \rvert

    The encoder gives (B, Z, g): of each code dimension's g numbers the first are the law's, the others the flow's (its
    parameters, or the context of its networks). ``codes.Flowed(...).n_parameters(Z)`` is g. A flow's own networks are
    trained by `fit_model`, and are the same for all weight draws.

    Args:
        base: q_0, such as `codes.amortised`.
        flow: `Planar`, `Radial`, `AutoregressiveFlow`, `Zuko`, or another `Flow`.

    Exact when: the true posterior is the law under one of the flow's bijections, as a Normal is under one linear
        autoregressive step; log q is that of the draw in any case.
    Biased when: read as a posterior: it is the best that encoder and flow were trained to.
    Cost: as of the base, and K passes of the flow. The KL is known of draws only: in Z parts where flow and law split
        over dimensions, which free bits need, and not at all elsewhere.

    Raises:
        UnsupportedError: If the base has gradient="path".
        ShapeError: When called, if the encoder does not give g numbers a code dimension, or the flow's weights have
            another dtype than the model's.

    References:
        | Variational Inference with Normalizing Flows (Rezende, Mohamed, 2015, https://arxiv.org/abs/1505.05770)
    """

    base: LawFamily
    flow: Flow

    def __post_init__(self) -> None:
        check_is_total(self.base)

    def n_parameters(self, n_latents: int) -> int:
        """Numbers g that the encoder gives for each of Z code dimensions."""
        return self.base.n_parameters(n_latents) + self.flow.n_parameters

    def __call__(self, model: CodeModel, batch: Batch, *, n_latent_draws: int = 1) -> Draws:
        """Draw K codes for every row under every weight draw.

        Args:
            model: The model at S weight draws.
            batch: Rows to encode.
            n_latent_draws: K.

        Returns:
            `Draws` with outputs; its KL is the mean over these draws, where it splits over code dimensions.

        Raises:
            ShapeError: If the encoder does not give g numbers a code dimension, or dtypes differ.
        """
        parameters = model.encode_parameters(batch.x, batch.context)
        n_latents, given = parameters.shape[-2:]
        if given != (wanted := self.n_parameters(n_latents)):
            raise ShapeError(
                f"{wanted} numbers for each of {n_latents} code dimensions, the flow's {self.flow.n_parameters} last",
                f"{given} from the encoder",
                f"End the encoder in nn.Unflatten(1, ({n_latents}, {wanted})), or give nets.mlp(..., n_out=that).",
            )
        check_dtype(self.flow, parameters)
        of_law, of_flow = parameters.split([given - self.flow.n_parameters, self.flow.n_parameters], -1)
        law = self.base.law_from(of_law)
        unit = noise(model, batch, n_latent_draws, n_latents, law.loc)
        start = law.push(unit)
        latents, log_det = self.flow(start, of_flow)
        kl = _kl(law, unit, latents, log_det) if isinstance(law, DiagonalLaw) else None
        return draws_of(model, batch, latents, law.log_prob(start) - log_det.sum(-1), kl)


def _kl(law: DiagonalLaw, unit: Tensor, latents: Tensor, log_det: Tensor) -> Tensor | None:
    """Mean over draws of log q - log p of each code dimension, (S, B, Z), if the determinant splits so."""
    if log_det.shape[-1] != latents.shape[-1]:
        return None
    return (0.5 * (latents**2 - unit**2) - law.log_scale - log_det).mean(0)
