"""Weights that rows draw for themselves, against weights that are drawn and used."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.testing import assert_close

from bayesae.errors import UnsupportedError
from bayesae.weights.layer_noise import NoisyWeight, RowNoise

F64 = {"dtype": torch.float64}
# each with the shape of a row
LAYERS = {
    "linear": (lambda: nn.Linear(3, 2), (3,)),
    "linear without bias": (lambda: nn.Linear(3, 2, bias=False), (3,)),
    "linear over positions": (lambda: nn.Linear(3, 2), (2, 3)),
    "conv1d": (lambda: nn.Conv1d(2, 2, 3, padding=1), (2, 4)),
    "conv2d": (lambda: nn.Conv2d(2, 3, 2, stride=2), (2, 4, 4)),
    "conv2d in groups": (lambda: nn.Conv2d(4, 6, 2, groups=2), (4, 3, 3)),
    "conv2d, reflected": (lambda: nn.Conv2d(1, 2, 3, padding="same", padding_mode="reflect"), (1, 3, 3)),
    "conv3d": (lambda: nn.Conv3d(1, 2, 2, dilation=2, bias=False), (1, 3, 3, 3)),
    "transposed conv1d": (lambda: nn.ConvTranspose1d(2, 3, 3, stride=2), (2, 2)),
    "transposed conv2d": (lambda: nn.ConvTranspose2d(2, 1, 3, 2, 1, 1), (2, 2, 2)),
    "transposed conv2d in groups": (lambda: nn.ConvTranspose2d(4, 6, 2, groups=2), (4, 2, 2)),
    "transposed conv3d": (lambda: nn.ConvTranspose3d(1, 2, 2), (1, 2, 2, 1)),
}


def numbers(how, n_rows, seed=0, own=slice(None)):
    return RowNoise(how, n_rows, own, torch.Generator().manual_seed(seed))


class Noisy:
    """A module whose parameters are Normal."""

    def __init__(self, module, seed=1):
        self.module, self.generator = module.double(), torch.Generator().manual_seed(seed)
        self.means = {name: leaf.detach().clone() for name, leaf in module.named_parameters()}
        self.scales = {
            name: 0.2 + torch.rand(leaf.shape, generator=self.generator, **F64) for name, leaf in self.items()
        }

    def items(self):
        return self.means.items()

    def draw(self):
        return {
            name: mean + self.scales[name] * torch.randn(mean.shape, generator=self.generator, **F64)
            for name, mean in self.items()
        }

    def weights(self, noise, draw=None):
        draw = self.draw() if draw is None else draw
        return {name: NoisyWeight.of(mean, self.scales[name], draw[name], noise) for name, mean in self.items()}

    def __call__(self, x, noise):
        return functional_call(self.module, self.weights(noise), (x,))

    def law(self, row):
        """Mean (O,) and covariance (O, O) of the outputs of one row, linear in the parameters."""

        def outputs(params):
            return functional_call(self.module, params, (row[None],)).flatten()

        jacobian = torch.func.jacrev(outputs)(self.means)
        rows = torch.cat([jacobian[name].flatten(1) * self.scales[name].flatten() for name in self.means], 1)
        return outputs(self.means), rows @ rows.mT


def own_weight(name, mean, deviation, signs):
    """W of one row: the mean and the deviation, each entry turned by the signs of its two channels."""
    if "out" in signs and "in" not in signs:  # a bias
        return mean + deviation * signs["out"]
    is_transposed = "transposed" in name
    groups = 2 if "groups" in name else 1
    turned = deviation.clone()
    for place in torch.cartesian_prod(*[torch.arange(n) for n in mean.shape[:2]]).tolist():
        if is_transposed:  # (in, out / groups, ...)
            i = place[0]
            o = (i // (mean.shape[0] // groups)) * mean.shape[1] + place[1]
        else:  # (out, in / groups, ...)
            o = place[0]
            i = (o // (mean.shape[0] // groups)) * mean.shape[1] + place[1]
        turned[tuple(place)] = deviation[tuple(place)] * signs["in"][i] * signs["out"][o]
    return mean + turned


def is_by_signs(name, how):
    """Other layers under "local" have pre-activations of their own: the test below."""
    return how == "flipout" or "linear" not in name or "positions" in name


@pytest.mark.parametrize(
    ("how", "name"), [(how, name) for how in ("flipout", "local") for name in LAYERS if is_by_signs(name, how)]
)
def test_each_row_has_a_weight_of_its_own_by_signs(how, name):
    torch.manual_seed(0)
    build, shape = LAYERS[name]
    layer, x = Noisy(build()), torch.randn(3, *shape, **F64)
    draw = layer.draw()
    weights = layer.weights(numbers(how, 3), draw)
    outputs = functional_call(layer.module, weights, (x,))
    for row in range(3):
        own = {}
        for key, mean in layer.items():
            signs = {side: values[row] for side, values in weights[key]._parts[4].signs.items()}
            assert all(bool((values.abs() == 1).all()) for values in signs.values())
            own[key] = own_weight(name, mean, draw[key] - mean, signs)
        expected = functional_call(layer.module, own, (x[row : row + 1],))
        assert_close(outputs[row : row + 1], expected, rtol=1e-12, atol=1e-12)


def check_moments(samples, mean, covariance):
    """Samples (M, ..., O), independent over M, against a mean and a covariance, each entry within 4 standard errors."""
    n = len(samples)
    deviation = samples - mean
    products = deviation[..., :, None] * deviation[..., None, :]
    for values, expected in ((deviation, torch.zeros_like(mean)), (products, covariance)):
        values = values.flatten(1, -expected.dim() - 1).mean(1) if values.dim() > expected.dim() + 1 else values
        error = values.std(0) / n**0.5
        assert bool(((values.mean(0) - expected).abs() <= 4 * error + 1e-12).all())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linear", "linear over positions", "conv1d", "conv2d", "conv3d", "transposed conv2d"])
@pytest.mark.parametrize("how", ["flipout", "local", "weights"])
def test_outputs_of_a_row_have_the_law_of_drawn_weights(name, how):
    torch.manual_seed(1)
    build, shape = LAYERS[name]
    layer, row = Noisy(build()), torch.randn(*shape, **F64)
    mean, covariance = layer.law(row)
    noise, x = numbers(how, 4), row.expand(4, *shape)
    if how == "weights":  # the twin, held to the same test
        samples = [functional_call(layer.module, layer.draw(), (x[:1],)).flatten(1) for _ in range(1500)]
    else:
        samples = [layer(x, noise).flatten(1) for _ in range(1500)]
    check_moments(torch.stack(samples), mean, covariance)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linear", "conv2d"])
@pytest.mark.parametrize("how", ["flipout", "local"])
def test_rows_are_uncorrelated_where_shared_weights_correlate_them(name, how):
    torch.manual_seed(1)
    build, shape = LAYERS[name]
    layer, row = Noisy(build()), torch.randn(*shape, **F64)
    mean, covariance = layer.law(row)
    noise, x = numbers(how, 2), row.expand(2, *shape)
    samples = torch.stack([layer(x, noise).flatten(1) for _ in range(1500)]) - mean
    across = samples[:, 0, :, None] * samples[:, 1, None, :]
    assert bool((across.mean(0).abs() <= 4 * across.std(0) / 1500**0.5).all())
    assert float((covariance.diagonal() / (across.std(0) / 1500**0.5).diagonal()).min()) > 8  # shared ones would show


@pytest.mark.slow
@pytest.mark.parametrize("how", ["flipout", "local"])
def test_gradients_are_unbiased_and_less_noisy(how):
    """Of E sum_n (w x_n + b - y_n)^2, which is known."""
    torch.manual_seed(2)
    x, y = torch.randn(8, 3, **F64), torch.randn(8, 2, **F64)
    weight, bias = torch.randn(2, 3, **F64), torch.randn(2, **F64)
    scales = [0.1 + torch.rand(2, 3, **F64), 0.1 + torch.rand(2, **F64)]
    leaves = [leaf.requires_grad_() for leaf in (weight, bias, *scales)]
    exact = ((F.linear(x, weight, bias) - y) ** 2).sum() + (F.linear(x**2, scales[0] ** 2, scales[1] ** 2)).sum()
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(exact, leaves)])

    def sample(noise):
        draws = [m + s * torch.randn(s.shape, **F64) for m, s in zip((weight, bias), scales, strict=True)]
        if noise is not None:
            draws = [NoisyWeight.of(*parts, noise) for parts in zip((weight, bias), scales, draws, strict=True)]
        value = ((F.linear(x, *draws) - y) ** 2).sum()
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, leaves)])

    noise = numbers(how, 8)
    by_rows, shared = (torch.stack([sample(one) for _ in range(800)]) for one in (noise, None))
    for values in (by_rows, shared):
        assert bool(((values.mean(0) - expected).abs() <= 4 * values.std(0) / 800**0.5).all())
    assert float(by_rows.var(0)[:8].sum()) < 0.5 * float(shared.var(0)[:8].sum())


def test_a_certain_bias_and_a_row_of_zeros_have_gradients():
    weight, scale = torch.zeros(2, 3, requires_grad=True), torch.ones(2, 3, requires_grad=True)
    noisy = NoisyWeight.of(weight, scale, weight + scale, numbers("local", 2))
    gradients = torch.autograd.grad(F.linear(torch.zeros(2, 3), noisy, torch.ones(2)).sum(), [weight, scale])
    assert all(bool((gradient == 0).all()) for gradient in gradients)


class TestUses:
    def weight(self, how, n_rows=4, size=3):
        mean, scale = torch.randn(size, size, **F64), torch.ones(size, size, **F64)
        return NoisyWeight.of(mean, scale, mean + scale * torch.randn(size, size, **F64), numbers(how, n_rows))

    @pytest.mark.parametrize("how", ["flipout", "local"])
    @pytest.mark.parametrize("shape", [(3,), (8, 3), (2, 4, 3)])
    def test_another_number_of_rows_shares_the_draw(self, how, shape):
        weight, x = self.weight(how), torch.randn(*shape, **F64)
        assert_close(F.linear(x, weight), F.linear(x, weight._parts[2]), rtol=0, atol=0)

    @pytest.mark.parametrize("how", ["flipout", "local"])
    def test_to_any_other_function_it_is_the_draw(self, how):
        weight, x = self.weight(how), torch.randn(4, 3, **F64)
        assert type(weight.mT) is torch.Tensor
        assert torch.equal(weight + 1, weight._parts[2] + 1)
        # and so to a layer thereafter: a row uses one weight
        assert torch.equal(F.linear(x, weight), F.linear(x, weight._parts[2]))

    @pytest.mark.parametrize("how", ["flipout", "local"])
    def test_what_it_is_like_is_no_use(self, how):
        weight, x = self.weight(how), torch.randn(4, 3, **F64)
        assert weight.shape == (3, 3) and weight.dim() == 2 and weight.dtype == torch.float64 and len(weight) == 3
        assert not torch.equal(F.linear(x, weight), F.linear(x, weight._parts[2]))

    def test_a_weight_that_flipout_uses_twice_is_one_weight(self):
        weight, x = self.weight("flipout"), torch.randn(4, 3, **F64)
        first, second = F.linear(x, weight), F.linear(x, weight)
        assert torch.equal(first, second)

    def test_a_weight_that_is_used_twice_has_no_independent_outputs(self):
        weight, x = self.weight("local"), torch.randn(4, 3, **F64)
        F.linear(x, weight)
        with pytest.raises(UnsupportedError, match="in two layers"):
            F.linear(x, weight)
        with pytest.raises(UnsupportedError, match="in two layers"):
            F.linear(x[:, None], weight)

    @pytest.mark.parametrize("how", ["flipout", "local"])
    def test_a_weight_of_rows_is_not_shared_thereafter(self, how):
        weight, x = self.weight(how), torch.randn(4, 3, **F64)
        F.linear(x, weight)
        for use in (lambda: weight.mT, lambda: F.linear(x[:1], weight)):
            with pytest.raises(UnsupportedError, match="in another way"):
                use()

    def test_ranks_together_are_one_process(self):
        x, results = torch.randn(5, 3, **F64), []
        mean, scale = torch.randn(3, 3, **F64), torch.ones(3, 3, **F64)
        for own in (slice(None), slice(0, None, 2), slice(1, None, 2)):
            for how in ("flipout", "local"):
                weight = NoisyWeight.of(mean, scale, mean + scale, numbers(how, 5, own=own))
                results.append((own, how, F.linear(x[own], weight)))
        for own, how, outputs in results[2:]:
            whole = next(values for _, name, values in results if name == how)
            assert_close(outputs, whole[own], rtol=1e-14, atol=1e-14)
