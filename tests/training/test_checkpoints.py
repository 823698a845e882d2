from __future__ import annotations

import builtins
import os
import random as python_random
import signal
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bayesae as bae
from bayesae import encoding
from bayesae.training.evidence import Evidence
from bayesae.training.identity import describe, digest
from tests.conftest import small_model


class Killed(BaseException):
    """What no code catches."""


class Moments:
    """Counts the moments at which a run can be killed, and kills it at one of them."""

    def __init__(self):
        self.n, self.kill_at = 0, None

    def start(self, kill_at=None):
        self.n, self.kill_at = 0, kill_at

    def tick(self):
        self.n += 1
        if self.n == self.kill_at:
            raise Killed


MOMENTS = Moments()


def objective(draws):
    MOMENTS.tick()
    return bae.objectives.reconstruction(draws)


class HalfWritten:
    """A file of which half of every write arrives if the run is killed there."""

    def __init__(self, file):
        self.file = file

    def __enter__(self):
        self.file.__enter__()
        return self

    def __exit__(self, *error):
        return self.file.__exit__(*error)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        try:
            MOMENTS.tick()
        except Killed:
            self.file.write(data[: len(data) // 2])
            raise
        return self.file.write(data)

    def writelines(self, parts):
        for part in parts:
            self.write(part)


@pytest.fixture
def moments(monkeypatch):
    """Every step, and every stage of writing a file, is a moment."""
    file = sys.modules["bayesae.encoding.file"]
    replace = os.replace

    def killable_replace(*args):
        MOMENTS.tick()
        replace(*args)
        MOMENTS.tick()

    monkeypatch.setattr(file, "open", lambda *args: HalfWritten(builtins.open(*args)), raising=False)
    monkeypatch.setattr(file.os, "fsync", lambda number: MOMENTS.tick())  # to the disk itself takes too long here
    monkeypatch.setattr(file.os, "replace", killable_replace)
    MOMENTS.start()
    return MOMENTS


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def train(model_seed, rows, checkpoint=None, every=None, **kwargs):
    """All that a call of fit_model leaves behind."""
    model = small_model(bae.likelihoods.Gaussian(), hidden=(5,), seed=model_seed)
    model.encoder.insert(1, nn.Dropout(0.2))
    settings = {
        "validation": rows[6:],
        "epochs": 9,
        "patience": 2,
        "batch_size": 2,
        "learning_rate": 3e-2,
        "schedule": "cosine",
        "clip_norm": 1.0,
        "n_accumulate": 2,
        "objective": objective,
        "evidence": Evidence(bae.weights.Laplace("diagonal"), burn_in=3, every=9),
    }
    torch.manual_seed(4)
    history = bae.fit_model(model, rows[:6], checkpoint=checkpoint, checkpoint_every=every, **settings | kwargs)
    return {
        "model": model.state_dict(),
        "history": (history.train, history.validation, history.best_epoch, history.log_evidence),
        "prior": history.weight_prior,
        "generator": torch.get_rng_state(),
    }


def contents(path):
    return list(encoding.read(path))


class TestFitModel:
    def test_killed_at_twenty_moments_and_resumed_to_the_same_bits(self, rows, moments, tmp_path):
        plain = train(0, rows)
        assert len(plain["history"][0]) < 9 and len(plain["history"][3]) >= 1, "the run must stop early and tune"
        assert same(plain, train(0, rows, tmp_path / "whole", 1)), "checkpoints change nothing"
        moments.start()
        train(0, rows, tmp_path / "counted", 1)
        n_moments = moments.n
        for kill_at in python_random.Random(0).sample(range(1, n_moments + 1), 20):
            path = tmp_path / f"killed {kill_at}"
            moments.start(kill_at)
            with pytest.raises(Killed):
                train(0, rows, path, 1)
            moments.start()
            # weights of another start, where there is a checkpoint: everything comes from the file
            assert same(plain, train(7 if path.exists() else 0, rows, path, 1)), kill_at
            assert same(contents(path), contents(tmp_path / "whole")), "optimiser, schedule, history, generators"

    def test_killed_again_and_again(self, rows, moments, tmp_path):
        plain, n_kills = train(0, rows), 0
        for attempt in range(200):
            moments.start(13 + attempt % 5)
            try:
                again = train(0, rows, tmp_path / "run", 1)
            except Killed:
                n_kills += 1
            else:
                break
        assert n_kills >= 4 and same(plain, again)

    def test_a_finished_run_returns_at_once(self, rows, moments, tmp_path):
        first = train(0, rows, tmp_path / "run")
        moments.start()
        assert same(first, train(5, rows, tmp_path / "run"))
        assert moments.n == 0, "no step, and nothing written"

    @pytest.mark.parametrize("kind", ["sgd", "adamw", "rmsprop"])
    def test_optimisers(self, rows, moments, tmp_path, kind):
        makes = {
            "sgd": partial(torch.optim.SGD, lr=1e-2, momentum=0.9),
            "adamw": partial(torch.optim.AdamW, lr=1e-2, amsgrad=True),
            "rmsprop": partial(torch.optim.RMSprop, lr=1e-3, centered=True),
        }
        settings = {"optimiser": makes[kind], "evidence": None, "patience": None, "epochs": 3, "schedule": "one_cycle"}
        plain = train(0, rows, **settings)
        moments.start(25)
        with pytest.raises(Killed):
            train(0, rows, tmp_path / "run", 1, **settings)
        moments.start()
        assert same(plain, train(1, rows, tmp_path / "run", 1, **settings))

    def test_priors_of_layers(self, rows, moments, tmp_path):
        evidence = Evidence(bae.weights.Laplace("diagonal", prior_groups="layer"), burn_in=1, every=1)
        settings = {"evidence": evidence, "patience": None, "epochs": 3}
        plain = train(0, rows, **settings)
        moments.start(30)
        with pytest.raises(Killed):
            train(0, rows, tmp_path / "run", 1, **settings)
        moments.start()
        again = train(1, rows, tmp_path / "run", 1, **settings)
        assert len(plain["history"][3]) == 3 and isinstance(plain["prior"], bae.joint.IndependentNormal)
        plain["prior"], again["prior"] = plain["prior"].precisions, again["prior"].precisions
        assert same(plain, again)

    def test_more_epochs_continue_a_finished_run(self, rows, tmp_path):
        settings = {"evidence": None, "patience": None, "schedule": "constant"}
        whole = train(0, rows, epochs=7, **settings)
        train(0, rows, tmp_path / "run", epochs=3, **settings)
        assert same(whole, train(0, rows, tmp_path / "run", epochs=7, **settings))
        with pytest.raises(bae.errors.DataError, match="epochs of at least the 7"):
            train(0, rows, tmp_path / "run", epochs=3, **settings)

    def test_batch_statistics_and_masks(self, rows, moments, tmp_path):
        mask = torch.rand(9, 7, generator=torch.Generator().manual_seed(0)) > 0.3

        def fit(seed, path=None):
            torch.manual_seed(seed)
            encoder = nn.Sequential(nn.Linear(7, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
            model = bae.Autoencoder(encoder, nn.Linear(2, 7), bae.likelihoods.StudentT()).double()
            data = bae.Batch(torch.where(mask, rows, torch.nan), mask)
            settings = {"batch_size": 3, "epochs": 4, "seed": 2, "objective": objective}
            bae.fit_model(model, data, checkpoint=path, checkpoint_every=None if path is None else 1, **settings)
            return model.state_dict()

        plain = fit(0)
        moments.start(31)
        with pytest.raises(Killed):
            fit(0, tmp_path / "run")
        moments.start()
        assert same(plain, fit(1, tmp_path / "run"))

    @pytest.mark.parametrize("n_workers", [0, pytest.param(1, marks=pytest.mark.slow)])
    @pytest.mark.parametrize("is_own", [False, True])
    def test_loaders_that_shuffle(self, rows, moments, tmp_path, is_own, n_workers):
        def fit(path=None):
            model = small_model(bae.likelihoods.Gaussian())
            generator = torch.Generator().manual_seed(3) if is_own else None
            data = TensorDataset(rows)
            loader = DataLoader(data, batch_size=2, shuffle=True, generator=generator, num_workers=n_workers)
            every = None if path is None else 1
            settings = {"epochs": 2, "objective": objective, "seed": 0}
            bae.fit_model(model, loader, checkpoint=path, checkpoint_every=every, **settings)
            return model.state_dict(), None if generator is None else generator.get_state()

        plain = fit()
        for kill_at in (14, 36) if n_workers else (14, 22, 36):
            moments.start(kill_at)
            with pytest.raises(Killed):
                fit(tmp_path / f"{kill_at}")
            moments.start()
            assert same(plain, fit(tmp_path / f"{kill_at}"))


INFERENCES = {
    "MAP": bae.weights.MAP(),
    "Ensemble": bae.weights.Ensemble(2, epochs=2, learning_rate=1e-2),
    "diagonal": bae.weights.Laplace("diagonal"),
    "eigencorrected": bae.weights.Laplace("eigencorrected", ["decoder.**"]),
    "low_rank": bae.weights.Laplace(bae.weights.LowRank(3, n_passes=2)),
}


class TestFitWeights:
    @pytest.mark.parametrize("name", INFERENCES)
    def test_killed_and_resumed_to_the_same_bits(self, rows, moments, tmp_path, name):
        model = small_model(hidden=(5,))
        model.encoder[1].requires_grad_(False)

        def fit(path=None):
            settings = {} if path is None else {"checkpoint": path, "checkpoint_every": 1}
            torch.manual_seed(4)
            posterior = bae.fit_weights(INFERENCES[name], model, rows, batch_size=4, objective=objective, **settings)
            state = torch.get_rng_state()
            with bae.random.scope(1):
                return posterior.sample(3), dict(posterior.info), state

        plain = fit()
        assert same(plain, fit(tmp_path / "whole"))
        moments.start()
        fit(tmp_path / "counted")
        n_moments = moments.n
        for kill_at in python_random.Random(1).sample(range(1, n_moments + 1), min(6, n_moments)):
            path = tmp_path / f"killed {kill_at}"
            moments.start(kill_at)
            with pytest.raises(Killed):
                fit(path)
            moments.start()
            assert same(plain, fit(path)), kill_at
            assert same(contents(path), contents(tmp_path / "whole"))
        moments.start()
        assert same(plain, fit(tmp_path / "whole")), "a finished run again"
        assert moments.n == 0

    def test_other_weights_are_refused(self, rows, model, tmp_path):
        bae.fit_weights(bae.weights.MAP(), model, rows, checkpoint=tmp_path / "run")
        with torch.no_grad():
            next(model.parameters()).add_(1)
        with pytest.raises(bae.errors.FileError, match="values of the weights"):
            bae.fit_weights(bae.weights.MAP(), model, rows, checkpoint=tmp_path / "run")


class TestFiles:
    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"batch_size": 3}, "batch_size 2, now 3"),
            ({"schedule": "constant"}, "schedule 'cosine', now 'constant'"),
            ({"seed": 3}, "seed None, now 3"),
            ({"objective": bae.objectives.reconstruction}, "objective .*test_checkpoints.objective, now bayesae.objec"),
            ({"evidence": None}, r"evidence Evidence\(.*, now None"),
            ({"clip_norm": 2.0, "patience": 3}, "patience 2, now 3; clip_norm 1.0, now 2.0"),
        ],
        ids=lambda v: str(list(v)) if isinstance(v, dict) else "",
    )
    def test_another_run_is_named(self, rows, tmp_path, change, words):
        train(0, rows, tmp_path / "run", epochs=2)
        with pytest.raises(bae.errors.FileError, match=words):
            train(0, rows, tmp_path / "run", epochs=2, **change)

    def test_another_network_is_named(self, rows, tmp_path):
        bae.fit_model(small_model(), rows, epochs=1, checkpoint=tmp_path / "run")
        with pytest.raises(bae.errors.FileError, match=r"encoder\.1\.weight \(6, 7\) torch.float64, now \(5, 7\)"):
            bae.fit_model(small_model(hidden=(5, 4)), rows, epochs=1, checkpoint=tmp_path / "run")
        with pytest.raises(bae.errors.FileError, match="function 'fit_model', now 'fit_weights'"):
            bae.fit_weights(bae.weights.MAP(), small_model(), rows, checkpoint=tmp_path / "run")

    def test_damaged_files_are_said_and_kept(self, rows, tmp_path):
        path = tmp_path / "run"
        train(0, rows, path, epochs=1)
        whole = path.read_bytes()
        for damaged in (whole[:-9], whole[:200] + b"?" + whole[201:], b"", b"something else"):
            path.write_bytes(damaged)
            with pytest.raises(bae.errors.FileError):
                train(0, rows, path, epochs=1)
            assert path.read_bytes() == damaged
        encoding.write(path, {}, {"other": 1})
        with pytest.raises(bae.errors.FileError, match="another file of bayesae"):
            train(0, rows, path, epochs=1)

    def test_steps_without_a_file_and_files_without_a_folder(self, rows, tmp_path):
        with pytest.raises(bae.errors.UnsupportedError, match="checkpoint_every alone"):
            bae.fit_model(small_model(), rows, checkpoint_every=3)
        with pytest.raises(bae.errors.DataError, match="checkpoint_every of at least 1"):
            bae.fit_model(small_model(), rows, checkpoint=tmp_path / "run", checkpoint_every=0)
        with pytest.raises(bae.errors.FileError, match="existing folder"):
            bae.fit_model(small_model(), rows, checkpoint=tmp_path / "none" / "run")

    def test_words_do_not_change_with_the_process(self):
        assert describe(partial(torch.optim.SGD, lr=0.1)) == "partial(torch.optim.sgd.SGD, (), {'lr': 0.1})"
        assert describe(objective) == "tests.training.test_checkpoints.objective"
        assert " at 0x" not in describe(partial(max, key=lambda v: v)) + describe(nn.Linear(2, 2)) + describe(object())

    def test_digest_is_of_bits(self, model):
        before = digest(model.state_dict())
        with torch.no_grad():
            model.encoder[1].bias[0].nextafter_(torch.tensor(9.0).double())
        assert digest(model.state_dict()) != before


SCRIPT = """
import sys, time, torch, bayesae as bae
from bayesae.training.evidence import Evidence
torch.set_num_threads(1)
rows = torch.rand(64, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
def objective(draws):
    print("step", flush=True)
    return bae.objectives.reconstruction(draws)
torch.manual_seed(0)
encoder = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Dropout(0.1), torch.nn.Linear(5, 2))
model = bae.Autoencoder(encoder, bae.nets.mlp(2, (5,), 7), bae.likelihoods.Gaussian()).double()
path = None if sys.argv[1] == "none" else sys.argv[1]
history = bae.fit_model(
    model, rows, epochs=6, batch_size=4, schedule="one_cycle", objective=objective,
    evidence=Evidence(burn_in=2, every=2), checkpoint=path, checkpoint_every=None if path is None else 2, seed=3,
)
torch.save([model.state_dict(), history.train, history.log_evidence, history.weight_prior.precision], sys.argv[2])
"""


@pytest.mark.slow
def test_a_process_that_is_killed(tmp_path):
    def start(path, result):
        command = [sys.executable, "-c", SCRIPT, str(path), str(tmp_path / result)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def finish(path, result):
        with start(path, result) as process:
            process.communicate()
        assert process.returncode == 0

    finish("none", "plain")
    for n_steps in (9, 21, 27):
        with start(tmp_path / "run", "killed") as process:
            for _ in range(n_steps):
                process.stdout.readline()
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        assert (tmp_path / "run").exists() and not (tmp_path / "killed").exists()
    finish(tmp_path / "run", "resumed")
    plain, resumed = (torch.load(tmp_path / name) for name in ("plain", "resumed"))
    assert same(plain, resumed)
