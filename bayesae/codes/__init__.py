"""Code posteriors q(z | x, theta): how a code is drawn."""

from bayesae.codes.amortised import Amortised, amortised
from bayesae.codes.base import CodeModel, CodePosterior, HasLaw, draws_of, law_of, modules_of
from bayesae.codes.divergence import kl_between
from bayesae.codes.encode import encode
from bayesae.codes.flows import AutoregressiveFlow, Flow, Flowed, LawFamily, Planar, Radial, Zuko, import_zuko
from bayesae.codes.gradients import NormalGradients, normal_gradients
from bayesae.codes.hamiltonian import Hamiltonian, Leapfrog
from bayesae.codes.hmc import HMC, Chains, HMCState
from bayesae.codes.importance import Importance
from bayesae.codes.laplace import Laplace
from bayesae.codes.laws import DiagonalLaw, Law, RankOneLaw, TriangularLaw
from bayesae.codes.refined import Refined
from bayesae.codes.wrappers import Consistent, Perturbed

__all__ = [
    "HMC",
    "Amortised",
    "AutoregressiveFlow",
    "Chains",
    "CodeModel",
    "CodePosterior",
    "Consistent",
    "DiagonalLaw",
    "Flow",
    "Flowed",
    "HMCState",
    "Hamiltonian",
    "HasLaw",
    "Importance",
    "Laplace",
    "Law",
    "LawFamily",
    "Leapfrog",
    "NormalGradients",
    "Perturbed",
    "Planar",
    "Radial",
    "RankOneLaw",
    "Refined",
    "TriangularLaw",
    "Zuko",
    "amortised",
    "draws_of",
    "encode",
    "import_zuko",
    "kl_between",
    "law_of",
    "modules_of",
    "normal_gradients",
]
