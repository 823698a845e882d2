"""Networks as plain modules that map tensors to tensors, each with a ``recipe`` from which `build` makes it again."""

from bayesae.nets.context import Conditional, Offset
from bayesae.nets.conv import conv_decoder, conv_encoder
from bayesae.nets.deep_latent import deep_latent_decoder
from bayesae.nets.mlp import mlp
from bayesae.nets.parts import OneHot, Residual
from bayesae.nets.recipe import build, names
from bayesae.nets.sequence import sequence_decoder, sequence_encoder

__all__ = [
    "NAMES",
    "Conditional",
    "Offset",
    "OneHot",
    "Residual",
    "build",
    "conv_decoder",
    "conv_encoder",
    "deep_latent_decoder",
    "mlp",
    "sequence_decoder",
    "sequence_encoder",
]

NAMES = names()
