"""Code posteriors q(z | x, theta): how a code is drawn."""

from bayesae.codes.base import CodeModel, CodePosterior, draws_of
from bayesae.codes.encode import encode

__all__ = ["CodeModel", "CodePosterior", "draws_of", "encode"]
