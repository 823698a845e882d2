"""The cheap routes are taken: rows that are carried are counted, and plans say so beforehand."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from bayesae.curvature import (
    Linearisation,
    RotatedBlock,
    eigencorrection,
    ggn_block,
    ggn_diagonal,
    kronecker_factors,
    plan,
)
from bayesae.curvature.linear import ConvStep, LinearStep
from bayesae.curvature.quadratic import QuadraticForm
from bayesae.curvature.sweep import cuts
from tests.curvature import zoo


def mlp(*widths):
    layers = [part for a, b in zip(widths[:-1], widths[1:], strict=True) for part in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1]).double()


def autoencoder(side=28, channels=1, code=3):
    shape = (6, side // 4, side // 4)
    n = 6 * shape[1] ** 2
    return nn.Sequential(
        nn.Conv2d(channels, 4, 4, 2, 1), nn.ReLU(), nn.Conv2d(4, 6, 4, 2, 1), nn.ReLU(), nn.Flatten(),
        nn.Linear(n, code), nn.Linear(code, n), nn.ReLU(), nn.Unflatten(1, shape),
        nn.ConvTranspose2d(6, 4, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(4, channels, 4, 2, 1),
    ).double()  # fmt: skip


@pytest.fixture
def counted(monkeypatch):
    """Rows pulled and columns pushed through every layer, and rows of forms, by layer."""
    pulls, pushes, forms = Counter(), Counter(), Counter()
    for kind in (LinearStep, ConvStep):
        pull, push = kind.pull, kind.push

        def counting_pull(self, rows, pull=pull):
            pulls[self.name] += rows.shape[1]
            return pull(self, rows)

        def counting_push(self, tangents, push=push):
            pushes[self.name] += tangents[0].shape[1]
            return push(self, tangents)

        monkeypatch.setattr(kind, "pull", counting_pull)
        monkeypatch.setattr(kind, "push", counting_push)
    through = QuadraticForm.through_linear

    def counting_form(self, weight, *args):
        result = through(self, weight, *args)
        forms[tuple(weight.shape)] = result.n_rows
        return result

    monkeypatch.setattr(QuadraticForm, "through_linear", counting_form)
    return pulls, pushes, forms


@pytest.mark.parametrize("hessian", [zoo.scalar, zoo.diagonal])
def test_the_bottleneck_bounds_the_rows_of_an_mlp(counted, hessian):
    pulls, pushes, forms = counted
    ggn_diagonal(Linearisation(mlp(200, 30, 12, 2, 12, 30, 200)), torch.rand(3, 200).double(), hessian)
    assert not pulls and not pushes
    assert forms[30, 12] == (30 if hessian is zoo.scalar else 200)  # one QR, shared by all rows; or one row an output
    assert forms[2, 12] == 2 and forms[12, 30] == 2
    assert (30, 200) not in forms  # nothing is carried past the first layer


@pytest.mark.parametrize("channels", [1, 2])
def test_a_convolutional_decoder_shares_rows(counted, channels):
    pulls, pushes, _ = counted
    network = autoencoder(channels=channels)
    x = torch.rand(2, channels, 28, 28).double()
    lin = Linearisation(network, chunk_size=2)
    ggn_diagonal(lin, x, zoo.scalar)
    # 784 outputs a channel: 4 x 4 phases where the fields are 2 wide, 10 x 10 where they are 4
    assert pulls["11"] <= (16 + 144) * channels and pulls["9"] <= 144 * channels
    assert pulls["2"] == 3  # three rows through the encoder, as many as the code has numbers
    assert "0" not in pulls and "6" not in pulls
    # the code's columns, and one for each channel's bias
    assert pushes["11"] == 3 + 4 and pushes["9"] == 3


def test_kronecker_factors_and_their_correction_share_rows_too(counted):
    pulls, _, _ = counted
    network, x = autoencoder(), torch.rand(2, 1, 28, 28).double()
    lin = Linearisation(network, chunk_size=2)
    kronecker_factors(lin, x, zoo.scalar)
    assert pulls["2"] == 3


@pytest.mark.parametrize("hessian", zoo.HESSIANS)
def test_the_route_changes_nothing(hessian):
    """Colours, columns and the cut against rows for every output."""
    network, x = autoencoder(side=16), torch.rand(2, 1, 16, 16).double()
    lin, plain = Linearisation(network), Linearisation(network)
    got = ggn_diagonal(lin, x, zoo.HESSIANS[hessian])
    (routes,) = lin.plans.values()
    assert routes.cut is not None and "colours" in routes.routes.values()
    key = next(iter(lin.plans))
    plain.plans[key] = type(routes)(None, {}, {}, [], 2, 8)
    expected = ggn_diagonal(plain, x, zoo.HESSIANS[hessian])
    assert_close(got, expected, rtol=1e-8, atol=1e-8)


def test_a_dense_block_never_forms_a_row_an_output_for_the_encoder(counted):
    pulls, pushes, forms = counted
    network = mlp(200, 30, 12, 2, 12, 30, 200)
    masks = {name: torch.rand(p.shape) < 0.02 for name, p in network.named_parameters()}
    ggn_block(Linearisation(network), torch.rand(3, 200).double(), zoo.scalar, masks)
    assert not pulls and not pushes
    assert forms[30, 12] == 30 and forms[12, 30] == 2


def test_a_plan_can_be_read_before_anything_runs():
    lin = Linearisation(autoencoder())
    routes = plan(lin, torch.rand(1, 1, 28, 28).double(), zoo.scalar)
    text = str(routes)
    assert "colours" in text and "cut" in text and "MFLOP" in text
    assert all(any(line.name == name for line in routes.lines) for name in ("0", "2", "5", "6", "9", "11"))
    assert 0 < routes.peak_bytes <= lin.memory
    assert routes.operations < 0.1 * 2 * 784 * 1e6


def test_memory_bounds_the_chunk():
    x = torch.rand(1, 1, 28, 28).double()
    small, large = (plan(Linearisation(autoencoder(), memory=m), x, zoo.scalar) for m in (2**21, 2**28))
    assert small.chunk < large.chunk and small.peak_bytes <= 2**21
    assert plan(Linearisation(autoencoder(), chunk_size=7), x, zoo.scalar).chunk == 7


def test_a_code_wider_than_the_image_is_no_cut():
    network = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 80), nn.Unflatten(1, (5, 4, 4)), nn.ConvTranspose2d(5, 1, 4, 2, 1)
    )
    routes = plan(Linearisation(network), torch.rand(1, 1, 8, 8), zoo.scalar)
    assert routes.cut is None


def test_cuts_are_steps_that_every_path_passes():
    network, x, _, _ = zoo.build("residual")
    steps = Linearisation(network).trace(x)
    names = {steps[i].name for i in cuts(steps)}
    assert {"0", "2", "3", "5"} <= names and not {"1.a", "1.b", "4.a"} & names


def test_constants_are_computed_once(monkeypatch):
    calls = []
    qr = torch.linalg.qr
    monkeypatch.setattr(torch.linalg, "qr", lambda *args, **kwargs: calls.append(1) or qr(*args, **kwargs))
    lin, x = Linearisation(mlp(40, 10, 2, 10, 40)), torch.rand(6, 40).double()
    for _ in range(3):
        ggn_diagonal(lin, x, zoo.scalar)
    assert len(calls) == 1


def test_the_correction_is_the_diagonal_where_the_basis_is_the_weights_own():
    network, x, _, _ = zoo.build("conv")
    lin = Linearisation(network)
    factors = kronecker_factors(lin, x, zoo.diagonal)

    def own_basis(b):
        outputs, inputs = (torch.eye(n).double().expand(b.layout.groups, n, n) for n in (b.layout.n_out, b.layout.n_in))
        return RotatedBlock(b.layout, outputs, inputs, torch.ones(()))

    bases = {name: own_basis(b) for name, b in factors.blocks.items()}
    got, expected = eigencorrection(lin, x, zoo.diagonal, bases), ggn_diagonal(lin, x, zoo.diagonal)
    for name, b in factors.blocks.items():
        assert_close(b.layout.split(got[name]), {k: expected[k] for k in b.layout.names}, rtol=1e-8, atol=1e-8)
