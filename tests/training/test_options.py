from __future__ import annotations

import math
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import bayesae as bae
from bayesae.schedules import constant, cosine, one_cycle
from tests.conftest import small_model


def rates(scheduler, optimiser, n):
    result = []
    for _ in range(n):
        result.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one step more than the schedule has
            scheduler.step()
    return result


class Recorder(torch.optim.SGD):
    """Notes the learning rate and the gradient of every step."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr=lr)
        self.rates, self.gradients = [], []

    def step(self, closure=None):
        self.rates.append(self.param_groups[0]["lr"])
        self.gradients.append(torch.cat([leaf.grad.flatten() for leaf in self.param_groups[0]["params"]]))
        return super().step(closure)


def recorded(model, data, **kwargs):
    made = []

    def make(params):
        made.append(Recorder(list(params)))
        return made[0]

    history = bae.fit_model(model, data, optimiser=make, seed=0, **kwargs)
    return made[0], history


class TestSchedules:
    def test_cosine_is_torchs(self):
        optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1.0)
        expected = rates(torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 50), optimiser, 50)
        assert [cosine(step / 50) for step in range(50)] == pytest.approx(expected, abs=1e-12)

    def test_one_cycle_is_torchs(self):
        """torch's phases end one step early; each is compared over its own progress."""
        optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1.0)
        expected = rates(torch.optim.lr_scheduler.OneCycleLR(optimiser, 1.0, total_steps=100), optimiser, 100)
        peak = 29
        ours = [one_cycle(0.3 * step / peak) for step in range(peak)]
        ours += [one_cycle(0.3 + 0.7 * (step - peak) / (99 - peak)) for step in range(peak, 100)]
        assert ours == pytest.approx(expected, abs=1e-12)

    def test_laws(self):
        grid = [i / 1000 for i in range(1001)]
        assert {constant(p) for p in grid} == {1.0}
        for schedule in (cosine, one_cycle):
            values = [schedule(p) for p in grid]
            assert 0 <= min(values) and max(values) == pytest.approx(1) and values[-1] < 1e-5
            assert max(abs(a - b) for a, b in zip(values, values[1:], strict=False)) < 0.01, "no jump"

    def test_the_rate_follows_the_rows_that_are_done(self, rows):
        """9 rows in batches of 4, two epochs: before each step 0, 4 and 8 of 18 rows, then 9, 13 and 17."""
        optimiser, _ = recorded(small_model(), rows, epochs=2, batch_size=4, schedule=lambda progress: 1 - progress)
        assert optimiser.rates == pytest.approx([0.1 * (1 - done / 18) for done in (0, 4, 8, 9, 13, 17)])
        optimiser, _ = recorded(small_model(), rows, epochs=2, batch_size=4, schedule="cosine", n_accumulate=2)
        assert optimiser.rates == pytest.approx([0.1 * cosine(done / 18) for done in (0, 8, 9, 17)])

    def test_every_group_has_its_own_rate(self, rows):
        model, made = small_model(), []

        def make(params):
            groups = [{"params": model.encoder.parameters(), "lr": 0.1}, {"params": model.decoder.parameters()}]
            made.append(torch.optim.SGD(groups, lr=0.4))
            return made[0]

        bae.fit_model(model, rows, epochs=1, optimiser=make, schedule=lambda progress: 0.5)
        assert [group["lr"] for group in made[0].param_groups] == [0.05, 0.2]

    def test_bad_ones(self, model, rows):
        with pytest.raises(bae.errors.UnsupportedError, match="one of .*cosine.*; got 'linear'"):
            bae.fit_model(model, rows, schedule="linear")
        with pytest.raises(bae.errors.DataError, match="factors of at least 0; got -1"):
            bae.fit_model(model, rows, schedule=lambda progress: -1)


class TestSteps:
    def test_accumulation_is_one_big_batch(self, rows):
        """Batches of 4, 4 and 1 rows: a mean of their means would be off."""
        whole, parts = small_model(bae.likelihoods.Gaussian()), small_model(bae.likelihoods.Gaussian())
        settings = {"epochs": 5, "learning_rate": 1e-2, "weight_prior": bae.IsotropicNormal(3.0), "clip_norm": 5.0}
        big = bae.fit_model(whole, rows, batch_size=9, **settings)
        small = bae.fit_model(parts, rows, batch_size=4, n_accumulate=3, **settings)
        for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
            assert_close(a, b, rtol=1e-10, atol=1e-10)
        assert small.train == pytest.approx(big.train, rel=1e-10)

    def test_the_last_step_takes_what_is_left(self, rows):
        optimiser, _ = recorded(small_model(), rows, epochs=1, batch_size=2, n_accumulate=2)
        assert len(optimiser.rates) == 3  # 5 batches

    def test_clipping(self, rows):
        free, _ = recorded(small_model(), rows, epochs=1)
        norm = float(free.gradients[0].norm())
        clipped, _ = recorded(small_model(), rows, epochs=1, clip_norm=norm / 3)
        assert_close(clipped.gradients[0], free.gradients[0] / 3, rtol=1e-6, atol=0)
        loose, _ = recorded(small_model(), rows, epochs=1, clip_norm=norm * 3)
        assert torch.equal(loose.gradients[0], free.gradients[0])
        with pytest.raises(bae.errors.DataError, match="positive clip_norm"):
            bae.fit_model(small_model(), rows, clip_norm=0.0)

    def test_the_gradient_is_that_of_the_objective(self, rows):
        """A plain loop over one step, with the prior 1 / N of the log-joint's."""
        optimiser, _ = recorded(small_model(), rows, epochs=1, weight_prior=bae.IsotropicNormal(2.0))
        model = small_model()
        residual = (model(rows) - rows) ** 2 / (2 * 0.3**2)
        prior = sum((leaf**2).sum() for leaf in model.parameters())
        (residual.sum() / 9 + prior / 9).backward()
        expected = torch.cat([leaf.grad.flatten() for leaf in model.parameters()])
        assert_close(optimiser.gradients[0], expected, rtol=1e-9, atol=1e-12)

    def test_adam_is_the_default(self, rows):
        a, b = small_model(), small_model()
        bae.fit_model(a, rows, epochs=2, learning_rate=0.01, seed=0)
        bae.fit_model(b, rows, epochs=2, optimiser=partial(torch.optim.Adam, lr=0.01), seed=0)
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


class TestAutocast:
    def test_products_are_low_and_the_rest_is_not(self, rows):
        seen = {}
        model = small_model(dtype=torch.float32)
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Linear):
                layer.register_forward_hook(lambda layer, args, out, name=name: seen.update({name: out.dtype}))

        def objective(draws):
            seen["density"], seen["outputs"] = draws.log_likelihood.dtype, draws.outputs.dtype
            return bae.objectives.reconstruction(draws)

        bae.fit_model(model, rows, epochs=1, autocast=torch.bfloat16, objective=objective)
        assert seen.pop("density") == seen.pop("outputs") == torch.float32
        assert len(seen) == 6 and set(seen.values()) == {torch.bfloat16}
        assert {leaf.dtype for leaf in model.parameters()} == {torch.float32}
        assert not torch.is_autocast_enabled("cpu")

    def test_noise_and_validation_are_in_full_precision(self, rows):
        model = small_model(bae.likelihoods.Gaussian(), dtype=torch.float32)
        history = bae.fit_model(model, rows, epochs=1, autocast=torch.bfloat16, validation=rows)
        noise = model.likelihood.noise_var
        bae.estimate_noise(model, rows)
        assert model.likelihood.noise_var == noise
        x = rows.float()
        expected = float(model.likelihood.log_prob(model(x).detach(), x).mean())
        assert history.validation[0] == pytest.approx(expected, rel=1e-6)

    def test_refused(self, rows):
        with pytest.raises(bae.errors.UnsupportedError, match="bfloat16 and float32 weights; got torch.float16"):
            bae.fit_model(small_model(dtype=torch.float32), rows, autocast=torch.float16)
        with pytest.raises(bae.errors.UnsupportedError, match="weights of torch.float64"):
            bae.fit_model(small_model(), rows, autocast=torch.bfloat16)

    def test_digits_train_as_well(self, digits):
        """Cosine, clipping and bfloat16 against plain float32, by the validation objective."""
        train, held_out = digits[:1200], digits[1200:]

        def fit(**options):
            torch.manual_seed(0)
            model = bae.Autoencoder(bae.nets.mlp(64, (32,), 4), bae.nets.mlp(4, (32,), 64), bae.likelihoods.Gaussian())
            history = bae.fit_model(model, train, validation=held_out, epochs=8, learning_rate=5e-3, seed=0, **options)
            return history.validation[-1]

        full = fit(schedule="cosine", clip_norm=100.0)
        low = fit(schedule="cosine", clip_norm=100.0, autocast=torch.bfloat16)
        assert math.isfinite(low) and abs(low - full) < 0.03 * abs(full), (low, full)


class TestArguments:
    @pytest.mark.parametrize(
        ("kwargs", "error", "words"),
        [
            ({"epochs": 2.5}, "DataError", "epochs of at least 1, whole; got .*2.5"),
            ({"batch_size": 2.5}, "DataError", "batch_size of at least 1"),
            ({"n_accumulate": 1.5}, "DataError", "n_accumulate of at least 1"),
            ({"epochs": "3"}, "DataError", "epochs of at least 1"),
            ({"patience": -1}, "DataError", "patience of at least 1"),
            ({"patience": 1.5}, "DataError", "patience of at least 1, whole"),
            ({"learning_rate": -1.0}, "DataError", "finite learning_rate of at least 0; got -1"),
            ({"learning_rate": math.inf}, "DataError", "finite learning_rate"),
            ({"learning_rate": "fast"}, "DataError", "finite learning_rate of at least 0; got 'fast'"),
            ({"clip_norm": "a"}, "DataError", "positive clip_norm; got 'a'"),
            ({"clip_norm": math.nan}, "DataError", "positive clip_norm"),
            ({"schedule": lambda progress: "a"}, "DataError", "factors of at least 0; got 'a'"),
            ({"schedule": ["cosine"]}, "UnsupportedError", "a schedule, one of"),
            ({"weight_prior": 1.0}, "UnsupportedError", r"a weight prior, .*got 1\.0"),
            ({"evidence": True}, "UnsupportedError", "evidence that tunes a prior; got True"),
            ({"optimiser": "adam"}, "UnsupportedError", "a function as optimiser; got 'adam'"),
            ({"objective": 3}, "UnsupportedError", "a function as objective"),
        ],
        ids=lambda v: str(list(v)) if isinstance(v, dict) else "",
    )
    def test_what_they_cannot_be(self, model, rows, kwargs, error, words):
        with pytest.raises(getattr(bae.errors, error), match=words):
            bae.fit_model(model, rows, **{"epochs": 2, "validation": rows} | kwargs)

    def test_what_they_can_be(self, model, rows):
        numbers = {"epochs": np.int64(2), "batch_size": torch.tensor(4), "learning_rate": np.float32(1e-3)}
        history = bae.fit_model(model, rows, clip_norm=torch.tensor(1.0), schedule=lambda p: np.float64(0.5), **numbers)
        assert len(history.train) == 2

    def test_weights_too(self, model, rows):
        with pytest.raises(bae.errors.UnsupportedError, match="a weight prior"):
            bae.fit_weights(bae.weights.MAP(), model, rows, weight_prior=1.0)
        with pytest.raises(bae.errors.DataError, match="batch_size of at least 1, whole"):
            bae.fit_weights(bae.weights.MAP(), model, rows, batch_size=2.5)


class TestNData:
    def test_rows_that_are_a_sample_of_more(self, rows):
        """The prior weighs 1 / N, and an epoch is still all rows: the rate follows those."""
        optimiser, _ = recorded(
            small_model(), rows, epochs=2, batch_size=3, n_data=90, schedule=lambda progress: 1 - progress
        )
        assert optimiser.rates == pytest.approx([0.1 * (1 - done / 18) for done in (0, 3, 6, 9, 12, 15)])

    @pytest.mark.parametrize(
        "method",
        [
            bae.weights.SGLD(1e-8, epochs=8, thinning=1, n_chains=1),
            bae.weights.SWAG(rank=2, epochs=8),
            bae.weights.MixtureOf(bae.weights.Ensemble(2, epochs=3), bae.weights.SWAG(rank=0, epochs=8)),
        ],
        ids=lambda method: type(method).__name__,
    )
    @pytest.mark.parametrize("n_data", [5, 90])
    def test_burn_in_and_phases_go_by_the_rows_of_a_pass(self, model, rows, method, n_data):
        posterior = bae.fit_weights(method, model, rows, batch_size=3, n_data=n_data, seed=0)
        last = posterior.components[0] if isinstance(posterior, bae.families.Mixture) else posterior
        # half of 8 passes of 3 steps; or the ends of passes 5 to 8
        assert (last.n_atoms or last.info["n_collected"]) == (12 if last.n_atoms else 4)

    def test_schedules_of_weights_end_with_the_run(self, model, rows):
        seen = []

        def schedule(share):
            return 1 - (seen.append(share) or share)

        method = bae.weights.MeanField(epochs=2, schedule=schedule)
        bae.fit_weights(method, model, rows, batch_size=3, n_data=90, seed=0)
        assert seen == pytest.approx([done / 18 for done in (0, 3, 6, 9, 12, 15)])

    @pytest.mark.parametrize("n_data", [5, 90])
    def test_several_passes_want_the_rows_of_one(self, model, rows, n_data):
        seen = []

        def objective(draws):
            seen.append(1)
            return bae.objectives.reconstruction(draws)

        inference = bae.weights.Laplace(bae.weights.LowRank(3, n_passes=2))
        with pytest.raises(bae.errors.DataError, match=f"each of the 2 passes.*n_data = {n_data} for 9 rows"):
            bae.fit_weights(inference, model, rows, n_data=n_data, objective=objective)
        assert not seen, "at once"
        bae.fit_weights(bae.weights.Laplace("diagonal"), model, rows, n_data=90)
