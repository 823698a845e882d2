"""Weights of the KL: free bits by hand, warm-up step by step, and both in training."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch

import bayesae as bae
from bayesae.objectives import ELBO, AnnealedELBO, WarmUp, elbo, sampled_elbo


class TestFreeBits:
    def test_by_hand(self, draws):
        kl = torch.tensor(
            [[[0.1, 2.0], [0.5, 0.2]], [[0.0, 0.1], [0.2, 0.3]]], dtype=torch.float64
        )  # (S, B, G) = 2, 2, 2
        some = replace(draws, kl=kl, log_likelihood=torch.zeros(4, 2, 2, dtype=torch.float64))
        # means over the two rows: 0.3 and 1.1, then 0.1 and 0.2
        expected = -torch.tensor([[0.4 + 2.0, 0.4 + 0.2], [0.8, 0.8]], dtype=torch.float64)
        torch.testing.assert_close(ELBO(free_bits=0.4)(some), expected)
        torch.testing.assert_close(ELBO(3.0, free_bits=0.4)(some), 3 * expected)
        assert float(-ELBO(free_bits=0.4)(some)[0].mean()) == pytest.approx(0.4 + 1.1)

    def test_value_and_gradient_are_those_of_the_clamped_mean(self, draws):
        floor = float(draws.kl.mean(1).median()) + 1e-6  # some parts above, some below, none at it
        kl = draws.kl.requires_grad_()
        batch_mean = ELBO(0.7, free_bits=floor)(replace(draws, kl=kl)).mean(1)
        twin = draws.log_likelihood.mean((0, 2)) - 0.7 * kl.mean(1).clamp_min(floor).sum(-1)
        torch.testing.assert_close(batch_mean, twin, rtol=1e-12, atol=1e-12)
        (one,), (other,) = (torch.autograd.grad(value.sum(), kl) for value in (batch_mean, twin))
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
        assert 0 < int((one == 0).sum()) < one.numel()

    def test_a_sampled_kl_is_one_part(self, draws):
        draws = replace(draws, log_q=draws.log_q + 2)
        sampled = (draws.log_q - draws.log_prior).mean(0)  # (S, B)
        floor = float(sampled.mean(1).mean())  # one weight draw above, one below
        kl = torch.stack([own if float(own.mean()) > floor else torch.full_like(own, floor) for own in sampled])
        for some in (replace(draws, kl=None), replace(draws, is_path_gradient=True)):
            torch.testing.assert_close(ELBO(2.0, free_bits=floor)(some), draws.log_likelihood.mean(0) - 2 * kl)


class TestWarmUp:
    def test_linear(self):
        warm = WarmUp(0.2, start=0.01)
        values = [warm(p) for p in (0.0, 0.1, 0.2, 0.7, 1.0)]
        assert values == pytest.approx([0.01, 0.505, 1.0, 1.0, 1.0])

    def test_cycles(self):
        warm = WarmUp(0.5, n_cycles=4)
        values = [warm(p) for p in (0.0, 0.0625, 0.125, 0.2, 0.25, 0.3125, 0.999, 1.0)]
        assert values == pytest.approx([0.0, 0.5, 1.0, 1.0, 0.0, 0.5, 1.0, 1.0])

    def test_objectives_at_a_share_of_training(self, draws):
        objective = ELBO(4.0, WarmUp(0.5), free_bits=0.2)
        assert objective.at(0.25) == ELBO(2.0, free_bits=0.2)
        assert objective.at(0.25).at(0.1) == objective.at(0.25)
        torch.testing.assert_close(objective(draws), ELBO(4.0, free_bits=0.2)(draws))
        annealed = AnnealedELBO(WarmUp(0.5, start=0.01)).at(0.25)
        joint = draws.log_likelihood + draws.log_prior
        torch.testing.assert_close(annealed(draws), (0.505 * joint - draws.log_q).mean(0))
        torch.testing.assert_close(AnnealedELBO().at(1.0)(draws), sampled_elbo(draws))


@dataclass(frozen=True)
class SpiedELBO(ELBO):
    seen: list = field(default_factory=list)

    def __call__(self, draws):
        self.seen.append(self.beta)
        return super().__call__(draws)


@dataclass(frozen=True)
class SpiedAnnealed(AnnealedELBO):
    seen: list = field(default_factory=list)

    def __call__(self, draws):
        self.seen.append(self.factor)
        return super().__call__(draws)


@pytest.mark.parametrize("objective", [SpiedELBO(3.0, WarmUp(0.5)), SpiedAnnealed(WarmUp(0.5))], ids=["beta", "factor"])
def test_training_warms_up_and_validation_does_not(objective):
    model = bae.Autoencoder(bae.nets.mlp(64, [8], (2, 2)), bae.nets.mlp(2, [8], 64), bae.likelihoods.Gaussian(0.3))
    options = {"objective": objective, "codes": bae.codes.amortised, "validation": torch.rand(20, 64), "seed": 0}
    history = bae.fit_model(model, torch.rand(40, 64), batch_size=10, epochs=5, **options)
    full = 3.0 if isinstance(objective, ELBO) else 1.0
    steps = [full * min(1.0, at / 10) for at in range(20)]
    expected = [weight for epoch in range(5) for weight in [*steps[4 * epoch : 4 * epoch + 4], full]]
    assert objective.seen == pytest.approx(expected)
    assert len(history.validation) == 5


def test_the_two_estimators_agree_in_expectation():
    from bayesae.testing import LinearGaussian

    world = LinearGaussian.make(n_data=6, correlation=0.8)
    model = world.model("diagonal")
    params = {name: leaf.detach()[None] for name, leaf in model.network.named_parameters()}
    with bae.random.scope(0), torch.no_grad():
        draws = bae.codes.amortised(model.at(params), world.batch, n_latent_draws=20_000)
    for estimate, terms in ((elbo(draws), draws.log_likelihood), (sampled_elbo(draws), draws.log_ratio)):
        error = terms.std(0)[0] / 20_000**0.5
        expected = world.log_evidence() - world.mean_field_gap
        assert bool(((estimate[0] - expected).abs() < 4 * error).all())
    # log q's noise cancels the log-joint's where q is near the posterior
    assert bool((draws.log_ratio.var(0) < draws.log_likelihood.var(0)).all())
