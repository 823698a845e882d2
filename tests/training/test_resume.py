"""Whether a checkpoint is of this run: its data, its arguments, and the generators that it goes on with."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset

import bayesae as bae
from bayesae import encoding
from bayesae.training.generators import find_generators, get_state, set_state
from bayesae.training.identity import describe, describe_data
from tests.conftest import small_model


class Beta:
    def __init__(self, value):
        self.value = value

    def __call__(self, progress):
        return self.value


class Plain:
    def __init__(self, value):
        self.value = value


def constant(value):
    return lambda progress: value


@dataclass(frozen=True)
class Boxed:
    tensor: torch.Tensor


def fit(data, path, **settings):
    model = small_model(bae.likelihoods.Gaussian())
    return bae.fit_model(model, data, checkpoint=path, seed=0, **{"epochs": 1, "batch_size": 4} | settings)


def fit_weights(model, data, path, inference=None, **settings):
    inference = bae.weights.Laplace("diagonal") if inference is None else inference
    return bae.fit_weights(inference, model, data, checkpoint=path, **settings)


class TestData:
    def test_other_rows_are_refused(self, rows, model, tmp_path):
        fit(rows, tmp_path / "a", validation=rows[:4])
        fit(rows.clone(), tmp_path / "a", validation=rows[:4].numpy())
        with pytest.raises(bae.errors.FileError, match=r"data torch.float64 \(9, 7\)"):
            fit(rows + 1e-9, tmp_path / "a", validation=rows[:4])
        with pytest.raises(bae.errors.FileError, match=r"validation torch.float64 \(4, 7\)"):
            fit(rows, tmp_path / "a", validation=rows[1:5])
        fit_weights(model, rows, tmp_path / "b")
        with pytest.raises(bae.errors.FileError, match="data"):
            fit_weights(model, rows / 2, tmp_path / "b")

    @pytest.mark.parametrize("field", ["mask", "context", "target"])
    def test_every_field_counts(self, rows, field):
        value = torch.ones(9, 7, dtype=torch.bool) if field == "mask" else rows.clone()
        other = value.clone()
        other[4, 3] = 0
        same, changed = (bae.Batch(rows, **{field: part}) for part in (value.clone(), other))
        known = describe_data(bae.Batch(rows, **{field: value}))
        assert known == describe_data(same) != describe_data(changed) and known != describe_data(bae.Batch(rows))

    def test_rows_behind_torchs_data_sets_count(self, rows):
        wraps = [
            TensorDataset,
            lambda x: Subset(TensorDataset(x), [0, 4]),
            lambda x: ConcatDataset([TensorDataset(rows), TensorDataset(x)]),
            lambda x: DataLoader(TensorDataset(x), batch_size=2, shuffle=True),
        ]
        for wrap in wraps:
            assert describe_data(wrap(rows)) == describe_data(wrap(rows.clone())) != describe_data(wrap(rows + 1))
        assert describe_data(Subset(TensorDataset(rows), [0, 4])) != describe_data(Subset(TensorDataset(rows), [0, 5]))

    def test_others_are_kind_and_length_and_nothing_is_read(self):
        class Rows(Dataset):
            def __len__(self):
                return 12

            def __getitem__(self, index):
                raise AssertionError

        class Stream(IterableDataset):
            def __iter__(self):
                raise AssertionError

        assert describe_data(Rows()).endswith("Rows of 12") and describe_data(DataLoader(Stream())).count("Stream,")


class TestArguments:
    def different(self):
        """Pairs that must have other words."""
        long, middle = torch.ones(2000), torch.ones(2000)
        middle[900] = 7
        prior, mask = bae.joint.IndependentNormal, torch.ones(2000, dtype=torch.bool)
        return {
            "middles": (long, middle),
            "arrays": (long.numpy(), middle.numpy()),
            "dtypes": (long, long.double()),
            "priors": (prior({"w": long}), prior({"w": middle})),
            "subsets": (bae.Subset({"w": mask}), bae.Subset({"w": mask & (middle < 2)})),
            "floats": (0.1, math.nextafter(0.1, 1)),
            "callables": (Beta(1.0), Beta(0.1)),
            "methods": (Beta(1.0).__call__, Beta(0.1).__call__),
            "partials": (partial(max, key=Beta(1)), partial(max, key=Beta(2))),
            "lambdas": (lambda p: 1.0, lambda p: 0.1),
            "closures": (constant(1.0), constant(0.1)),
            "defaults": tuple((lambda p, value=value: value) for value in (1.0, 0.1)),
            "dataclasses": (Boxed(long), Boxed(middle)),
            "fields": (Boxed(Plain(1)), Boxed(Plain(2))),
            "structures": tuple(bae.weights.Laplace(bae.weights.LowRank(rank)) for rank in (3, 4)),
            "nested": ({"a": [Beta(long)]}, {"a": [Beta(middle)]}),
        }

    def test_other_values_have_other_words(self):
        for name, (first, second) in self.different().items():
            assert describe(first) != describe(second), name
        again = self.different()
        for name, (first, second) in self.different().items():
            assert [describe(first), describe(second)] == [describe(part) for part in again[name]], name

    def test_print_options_do_not_matter(self):
        before = describe(torch.rand(5, generator=torch.Generator().manual_seed(0)))
        torch.set_printoptions(precision=2)
        try:
            assert describe(torch.rand(5, generator=torch.Generator().manual_seed(0))) == before
        finally:
            torch.set_printoptions(profile="default")

    def test_what_holds_itself_ends(self):
        first = Beta(1.0)
        first.value = [first]
        assert "again" in describe(first)
        assert len(describe([list(range(100))] * 100)) < 1100

    def test_a_schedule_with_another_state(self, rows, tmp_path):
        fit(rows, tmp_path / "a", schedule=Beta(1.0))
        fit(rows, tmp_path / "a", schedule=Beta(1.0), epochs=2)
        with pytest.raises(bae.errors.FileError, match=r"schedule .*Beta\{'value': 1.0\}, now .*Beta\{'value': 0.1\}"):
            fit(rows, tmp_path / "a", schedule=Beta(0.1), epochs=2)

    def test_another_mask_and_another_prior(self, rows, tmp_path):
        model = small_model(hidden=(200,))
        whole = bae.Subset.of(model.network)
        other = {name: mask.clone() for name, mask in whole.masks.items()}
        (wide,) = (name for name, mask in other.items() if mask.shape == (200, 7))
        other[wide][100] = False
        fit_weights(model, rows, tmp_path / "a", bae.weights.Laplace("diagonal", whole))
        with pytest.raises(bae.errors.FileError, match=r"inference \.\.\..*, now \.\.\."):
            fit_weights(model, rows, tmp_path / "a", bae.weights.Laplace("diagonal", bae.Subset(other)))
        priors = []
        for value in (1.0, 7.0):
            precisions = {name: torch.ones_like(leaf) for name, leaf in model.network.named_parameters()}
            precisions[wide][100] = value
            priors.append(bae.joint.IndependentNormal(precisions))
        fixed = bae.weights.Laplace("diagonal", tunes_prior=False)
        fit_weights(model, rows, tmp_path / "b", fixed, weight_prior=priors[0])
        with pytest.raises(bae.errors.FileError, match="weight_prior"):
            fit_weights(model, rows, tmp_path / "b", fixed, weight_prior=priors[1])


class Killed(BaseException):
    """What no code catches."""


class Noisy:
    """A transform; ``draw`` gives seven numbers from a generator of its own."""

    def __init__(self, kind):
        self.generator = {
            "torch": lambda: torch.Generator().manual_seed(1),
            "numpy": lambda: np.random.default_rng(1),
            "philox": lambda: np.random.Generator(np.random.Philox(1)),
            "old numpy": lambda: np.random.RandomState(1),
            "python": lambda: random.Random(1),
        }[kind]()
        self.kind = kind

    def __call__(self, row):
        if self.kind == "torch":
            return row + torch.randn(7, generator=self.generator)
        draw = self.generator.gauss if self.kind == "python" else self.generator.normal
        return row + torch.tensor([draw(0.0, 1.0) for _ in range(7)])


class Augmented(Dataset):
    def __init__(self, rows, kind):
        self.rows, self.transforms = rows, [Noisy(kind)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.transforms[0](self.rows[index])


KINDS = ["torch", "numpy", "philox", "old numpy", "python"]


class TestGenerators:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("is_wrapped", [False, True])
    def test_data_that_draw_go_on_where_they_were(self, rows, tmp_path, kind, is_wrapped):
        def run(path=None, kill_at=None):
            n_steps, model = 0, small_model(bae.likelihoods.Gaussian())

            def objective(draws):
                nonlocal n_steps
                n_steps += 1
                if n_steps == kill_at:
                    raise Killed
                return bae.objectives.reconstruction(draws)

            objective.__qualname__ = "objective"  # a name of its own: what it counts is no argument
            data = Augmented(rows, kind)
            data = Subset(data, range(8)) if is_wrapped else data
            settings = {"epochs": 3, "batch_size": 3, "seed": 0, "objective": objective}
            every = None if path is None else 1
            bae.fit_model(model, data, checkpoint=path, checkpoint_every=every, **settings)
            return model.state_dict()

        plain = run()
        with pytest.raises(Killed):
            run(tmp_path / "a", 6)
        again = run(tmp_path / "a")
        assert all(torch.equal(plain[name], again[name]) for name in plain if "extra" not in name)

    def test_objectives_that_draw(self, rows, tmp_path):
        def run(path=None, epochs=4):
            model, noise = small_model(), Noisy("numpy")

            def objective(draws):
                return bae.objectives.reconstruction(draws) * float(noise(torch.zeros(7)).abs()[0])

            objective.__qualname__ = "objective"
            bae.fit_model(model, rows, checkpoint=path, objective=objective, epochs=epochs, seed=0)
            return torch.nn.utils.parameters_to_vector(model.parameters())

        plain = run()
        run(tmp_path / "a", epochs=2)
        assert torch.equal(plain, run(tmp_path / "a"))

    @pytest.mark.parametrize("kind", KINDS)
    def test_states_go_through_a_file(self, kind):
        noise, zeros = Noisy(kind), torch.zeros(7)
        noise(zeros)
        skeleton, tensors = encoding.flatten(get_state(noise.generator))
        expected = [noise(zeros) for _ in range(3)]
        set_state(noise.generator, encoding.unflatten(skeleton, tensors))
        assert all(torch.equal(noise(zeros), row) for row in expected)

    def test_where_they_are_found(self):
        class Slots:
            __slots__ = ("generator",)

        slots, held = Slots(), torch.Generator()
        slots.generator = np.random.default_rng(0)
        roots = {"partial": partial(max, key=held), "slots": [slots], "function": lambda: held, "again": held}
        roots["own"], roots["module"] = {"python": random.Random(0)}, [np, torch, random, random.SystemRandom()]
        found = find_generators(**roots)
        assert list(found) == ["again", "own.python", "slots.0.generator"] and found["again"] is held
        del roots["again"]
        assert list(find_generators(**roots))[0] == "function.held"
        loop = {"a": []}
        loop["a"].append(loop)
        assert find_generators(loop=loop) == {}

    def test_a_generator_that_is_gone_is_said(self, rows, tmp_path):
        data = Augmented(rows, "numpy")
        fit(data, tmp_path / "a")
        data.transforms[0].generator = None
        with pytest.raises(bae.errors.DataError, match=r"none at data\.transforms\.0\.generator"):
            fit(data, tmp_path / "a", epochs=2)
