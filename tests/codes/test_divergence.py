"""The divergence of two laws against torch's own, and against the parts that laws have of N(0, I)."""

from __future__ import annotations

import itertools

import pytest
import torch

import bayesae as bae
from bayesae.codes import DiagonalLaw, TriangularLaw, kl_between

F64 = {"dtype": torch.float64}


def triangular(is_precision, seed):
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(2, 5, 3, 3, generator=generator, **F64).tril(-1)
    scales = 0.3 + torch.rand(2, 5, 3, generator=generator, **F64)
    loc = torch.randn(2, 5, 3, generator=generator, **F64)
    return TriangularLaw(loc, factor + torch.diag_embed(scales), is_precision)


def diagonal(seed):
    generator = torch.Generator().manual_seed(seed)
    return DiagonalLaw(*torch.randn(2, 2, 5, 3, generator=generator, **F64).unbind(0))


LAWS = {
    "diagonal": diagonal,
    "covariance": lambda seed: triangular(False, seed),
    "precision": lambda seed: triangular(True, seed),
}


@pytest.mark.parametrize(("one", "other"), list(itertools.product(LAWS, LAWS)))
def test_it_is_the_divergence_of_two_normals(one, other):
    p, q = LAWS[one](0), LAWS[other](1)
    twins = [torch.distributions.MultivariateNormal(law.loc, law.covariance()) for law in (p, q)]
    found = kl_between(p, q)
    assert found.shape == (2, 5)
    torch.testing.assert_close(found, torch.distributions.kl_divergence(*twins), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(kl_between(p, p), torch.zeros(2, 5, **F64), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", LAWS)
def test_against_the_prior_it_is_the_law_s_own_kl(name):
    law = LAWS[name](0)
    prior = DiagonalLaw(torch.zeros_like(law.loc), torch.zeros_like(law.loc))
    torch.testing.assert_close(kl_between(law, prior), law.kl().sum(-1), rtol=1e-10, atol=1e-10)


def test_a_rank_one_law_goes_by_its_covariance():
    parameters = torch.randn(2, 5, 3, 3, generator=torch.Generator().manual_seed(2), **F64)
    p = bae.codes.Amortised("rank_one").law_from(parameters)
    q = diagonal(1)
    twins = [torch.distributions.MultivariateNormal(law.loc, law.covariance()) for law in (p, q)]
    torch.testing.assert_close(kl_between(p, q), torch.distributions.kl_divergence(*twins), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(kl_between(q, p), torch.distributions.kl_divergence(*twins[::-1]), rtol=1e-9, atol=1e-9)
