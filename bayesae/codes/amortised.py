"""The amortised Normal code posterior: the encoder gives its parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from bayesae.codes.base import CodeModel, draws_of, noise
from bayesae.codes.laws import DiagonalLaw, Law, RankOneLaw, TriangularLaw, without_gradient
from bayesae.data import check_counts
from bayesae.draws import Draws
from bayesae.errors import ShapeError, UnsupportedError
from bayesae.types import Batch

__all__ = ["Amortised", "amortised"]

Family = Literal["diagonal", "full", "rank_one"]
Gradient = Literal["total", "path"]


@dataclass(frozen=True)
class Amortised:
    r"""The encoder gives the parameters of a Normal, :math:`q(z \mid x) = \mathcal{N}(m(x), C(x))`: a VAE's code.

    .. math:: z = m + R \varepsilon, \quad R R^\top = C, \quad \varepsilon \sim \mathcal{N}(0, I)

    The encoder gives (B, Z, g), the location first: end it in ``nn.Unflatten(1, (Z, g))``, as
    ``nets.mlp(784, [256], (Z, g))`` does.

    Args:
        family: The covariance, and g: "diagonal" 2 (the second the log standard deviation), "full" 1 + Z (row j of the
            covariance's Cholesky factor, log of its diagonal; entries above it are not read), "rank_one" 3 (the second
            the logarithm of d, the third u, of a precision diag(d) + u u^T): a `codes.RankOneLaw`.
        gradient: What log q gives gradients to: "total", parameters and codes; "path", codes alone, which makes
            `objectives.elbo` the sticking-the-landing estimator and is what `objectives.dreg` needs.
        layers: Of "rank_one", code dimensions of each stochastic layer, whose codes are independent of the others'
            given x and have a direction each, as of a `nets.deep_latent_decoder`; None: one layer.

    Exact when: the true posterior of the code is a Normal of the family, as of a linear Gaussian decoder ("full", and
        "rank_one" with a code of two).
    Biased when: read as a posterior: it is the best of its family for the encoder, too narrow for a diagonal.
        u and -u of "rank_one" are one law, and an encoder may end with one for some rows and the other for others, 0
        between them: begin with u of about 1 for all rows (its weights 0 in the last layer, its biases 1 or -1).
        "path" is unbiased for one draw; of several, `objectives.iwae` needs `objectives.dreg`.
    Cost: K passes through the decoder and one through the encoder; "full" Z^2 numbers a row more.

    Raises:
        UnsupportedError: If family or gradient are unknown, or another family is given layers.
        DataError: If a layer has no whole number of dimensions, at least 1.
        ShapeError: When called, if the encoder does not give g numbers a code dimension, or the layers' dimensions do
            not add up to the code's.

    References:
        | Auto-Encoding Variational Bayes (Kingma, Welling, 2013, https://arxiv.org/abs/1312.6114)
        | Stochastic Backpropagation and Approximate Inference in Deep Generative Models (Rezende, Mohamed, Wierstra,
          2014, https://arxiv.org/abs/1401.4082): "rank_one"
        | Sticking the Landing (Roeder, Wu, Duvenaud, 2017, https://arxiv.org/abs/1703.09194): "path"
    """

    family: Family = "diagonal"
    gradient: Gradient = "total"
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name, value, known in (("family", self.family, Family), ("gradient", self.gradient, Gradient)):
            if value not in get_args(known):
                expected = f"{name}, one of {list(get_args(known))}"
                raise UnsupportedError(expected, repr(value), f"{get_args(known)[0]!r} is the default.")
        if self.layers is not None:
            if self.family != "rank_one":
                fix = "Leave layers out, or use family='rank_one'."
                raise UnsupportedError("layers of a 'rank_one' Normal", f"family={self.family!r}", fix)
            for size in self.layers:
                check_counts(layers=size)

    def n_parameters(self, n_latents: int) -> int:
        """Numbers g that the encoder gives for each of Z code dimensions."""
        return {"diagonal": 2, "full": 1 + n_latents, "rank_one": 3}[self.family]

    def law_from(self, parameters: Tensor) -> Law:
        """The Normal of given parameters.

        Args:
            parameters: (S, B, Z, g), raw numbers.

        Returns:
            The law.

        Raises:
            ShapeError: If there are not g numbers a code dimension, or layers do not add up to Z.
        """
        n_latents, given = parameters.shape[-2:]
        if given != (wanted := self.n_parameters(n_latents)):
            raise ShapeError(
                f"{wanted} numbers for each of {n_latents} code dimensions of a {self.family!r} Normal",
                f"{given} from the encoder",
                f"End the encoder in nn.Unflatten(1, ({n_latents}, {wanted})), or give nets.mlp(..., n_out=that).",
            )
        if self.family == "diagonal":
            return DiagonalLaw(parameters[..., 0], parameters[..., 1])
        if self.family == "rank_one":
            if self.layers is not None and sum(self.layers) != n_latents:
                fix = "Give the sizes that nets.deep_latent_decoder has."
                raise ShapeError(f"layers that add up to a code of {n_latents}", f"{self.layers}", fix)
            return RankOneLaw(parameters[..., 0], parameters[..., 1], parameters[..., 2], self.layers)
        rows = parameters[..., 1:]
        diagonal = rows.diagonal(dim1=-2, dim2=-1).exp()
        return TriangularLaw(parameters[..., 0], rows.tril(-1) + torch.diag_embed(diagonal))

    def law(self, model: CodeModel, batch: Batch) -> Law:
        """Law of every row under every weight draw."""
        return self.law_from(model.encode_parameters(batch.x, batch.context))

    def __call__(self, model: CodeModel, batch: Batch, *, n_latent_draws: int = 1) -> Draws:
        """Draw K codes for every row under every weight draw.

        Args:
            model: The model at S weight draws.
            batch: Rows to encode.
            n_latent_draws: K.

        Returns:
            `Draws` with outputs and the closed-form KL.
        """
        law, is_path = self.law(model, batch), self.gradient == "path"
        latents = law.push(noise(model, batch, n_latent_draws, law.loc.shape[-1], law.loc))
        log_q = (without_gradient(law) if is_path else law).log_prob(latents)  # pyright: ignore[reportArgumentType]
        return draws_of(model, batch, latents, log_q, law.kl(), is_path_gradient=is_path)


amortised = Amortised()
"""The plain VAE's code: a diagonal Normal."""
