"""Code posteriors q(z | x, theta): how a code is drawn."""

from bayesae.codes.amortised import Amortised, amortised
from bayesae.codes.base import CodeModel, CodePosterior, HasLaw, draws_of, law_of, modules_of
from bayesae.codes.encode import encode
from bayesae.codes.laws import DiagonalLaw, Law, TriangularLaw

__all__ = [
    "Amortised",
    "CodeModel",
    "CodePosterior",
    "DiagonalLaw",
    "HasLaw",
    "Law",
    "TriangularLaw",
    "amortised",
    "draws_of",
    "encode",
    "law_of",
    "modules_of",
]
