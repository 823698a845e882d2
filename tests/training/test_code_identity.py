"""Code posteriors in the words of a checkpoint: other arguments, other words, and the same ones in another process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import bayesae as bae
from bayesae import codes
from bayesae.training.identity import describe


def flow(**kwargs):
    return codes.Flowed(codes.amortised, codes.AutoregressiveFlow(3, **kwargs))


def dynamics(*args, is_trained=True, **kwargs):
    return codes.Hamiltonian(codes.amortised, codes.Leapfrog(*args, **kwargs).requires_grad_(is_trained))


def several():
    """Code posteriors of which no two are the same."""
    plain = codes.amortised
    return [
        codes.encode,
        *(codes.Amortised(*args) for args in ((), ("full",), ("rank_one",), ("diagonal", "path"))),
        *(codes.Amortised("rank_one", layers=layers) for layers in ((1, 2), (2, 1))),
        *(codes.Laplace(*args) for args in ((), (3,), (4, "newton"))),
        *(codes.Importance(inner, n) for inner, n in ((plain, 3), (plain, 4), (codes.Laplace(), 3))),
        *(codes.Perturbed(inner, scale) for inner, scale in ((plain, 0.1), (plain, 0.2), (codes.encode, 0.1))),
        codes.Consistent(plain, torch.tanh),
        codes.Consistent(plain, torch.sigmoid),
        codes.Consistent(plain, torch.tanh, 2.0),
        codes.Consistent(plain, lambda x: x + 1),
        codes.Consistent(plain, lambda x: x + 2),
        *(codes.Refined(start) for start in (plain, codes.Perturbed(plain, 0.1))),
        codes.Refined(n_steps=3),
        codes.Refined(learning_rate=0.02),
        codes.Refined(momentum=0.1),
        codes.Refined(second_order=False),
        codes.Refined(n_directions=1),
        codes.Refined(clip_norm=1.0),
        *(codes.Flowed(plain, step) for step in (codes.Planar(1), codes.Planar(2), codes.Radial(1))),
        codes.Flowed(codes.Amortised("full"), codes.Planar(1)),
        *(flow(**kwargs) for kwargs in ({}, {"n_steps": 2}, {"hidden": (3,)}, {"hidden": ()}, {"n_context": 0})),
        *(flow(**kwargs) for kwargs in ({"is_volume_preserving": True}, {"activation": nn.Tanh})),
        *(dynamics(*args) for args in ((3,), (3, 5), (4,))),
        *(dynamics(3, **kwargs) for kwargs in ({"step_size": 0.2}, {"temperature": 2.0}, {"is_trained": False})),
    ]


def test_other_arguments_have_other_words_and_the_same_ones_the_same():
    words = [describe(code) for code in several()]
    assert len(set(words)) == len(words)
    assert words == [describe(code) for code in several()]
    covered = {type(code) for code in several()} | {type(getattr(code, "flow", None)) for code in several()}
    wanted = (codes.Amortised, codes.Consistent, codes.Flowed, codes.Hamiltonian, codes.Importance, codes.Laplace)
    assert covered >= {*wanted, codes.Perturbed, codes.Refined, codes.Planar, codes.Radial, codes.AutoregressiveFlow}


def test_another_process_has_the_same_words():
    script = (
        "from tests.training.test_code_identity import several; from bayesae.training.identity import describe\n"
        "for code in several(): print(repr(describe(code)))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == [repr(describe(code)) for code in several()]


def test_training_changes_no_word():
    code = dynamics(3)
    before = describe(code)
    with torch.no_grad():
        code.leapfrog.log_step_size.add_(1)
    assert describe(code) == before


@pytest.mark.parametrize(
    ("code", "other"),
    [
        (lambda: codes.Refined(n_steps=2), lambda: codes.Refined(n_steps=2, momentum=0.1)),
        (lambda: codes.Hamiltonian(codes.amortised, codes.Leapfrog(2, 2)), lambda: dynamics(2, 2, step_size=0.2)),
    ],
    ids=["Refined", "Hamiltonian"],
)
def test_a_run_goes_on_with_its_own_code_alone(code, other, tmp_path):
    def fit(code, epochs, checkpoint=None):
        torch.manual_seed(0)
        model = bae.Autoencoder(bae.nets.mlp(5, [4], (2, 2)), bae.nets.mlp(2, [4], 5), bae.likelihoods.Gaussian(0.5))
        rows = torch.rand(12, 5, generator=torch.Generator().manual_seed(1))
        kwargs = {"objective": bae.objectives.elbo, "codes": code, "batch_size": 4, "seed": 0, "progress": False}
        history = bae.fit_model(model, rows, epochs=epochs, checkpoint=checkpoint, **kwargs)
        return history.train, [*model.parameters(), *codes.modules_of(code).parameters()]

    whole, leaves = fit(code(), 4)
    fit(code(), 2, tmp_path / "run")
    with pytest.raises(bae.errors.FileError, match="codes"):
        fit(other(), 4, tmp_path / "run")
    resumed, again = fit(code(), 4, tmp_path / "run")
    assert resumed == whole and all(torch.equal(a, b) for a, b in zip(leaves, again, strict=True))
