"""Values that somebody wrote into a file by hand, under a checksum that fits them."""

from __future__ import annotations

import functools
import json

import pytest

import bayesae as bae
from bayesae import encoding, files
from bayesae.errors import FileError, ShapeError
from tests.files.cases import laplace, particles
from tests.files.test_damage import as_skeleton, check_refused, frugal, load, value_of, whole

__all__ = ["frugal", "load", "whole"]  # fixtures


def recipe(net="mlp", **arguments):
    return as_skeleton({"net": net, "arguments": {"n_in": 7, "hidden": [3], "n_out": 2} | arguments})


HOSTILE_VALUES = {
    "an unknown net": (("encoder", "recipe"), recipe("os.system")),
    "a net by path": (("encoder", "recipe"), recipe("../../mlp")),
    "a hidden layer of 10^12": (("encoder", "recipe"), recipe(hidden=[10**12])),
    "a hidden layer of 10^9": (("encoder", "recipe"), recipe(hidden=[10**9])),
    "a hidden layer of 20 000 squared": (("encoder", "recipe"), recipe(hidden=[20_000, 20_000])),
    "10 000 hidden layers": (("encoder", "recipe"), recipe(hidden=[1] * 10_000)),
    "a hidden layer of -3": (("encoder", "recipe"), recipe(hidden=[-3])),
    "a hidden layer of 3.5": (("encoder", "recipe"), recipe(hidden=[3.5])),
    "a hidden layer of words": (("encoder", "recipe"), recipe(hidden=["3"])),
    "words as hidden layers": (("encoder", "recipe"), recipe(hidden="333")),
    "4096 residual blocks": (("encoder", "recipe"), recipe(hidden=[1] * 64, n_residual=64)),
    "4096 residual blocks, wrapped": (
        ("encoder", "recipe"),
        as_skeleton({
            "net": "Conditional",
            "arguments": {"net": {"net": "mlp", "arguments": {"hidden": [1] * 64, "n_residual": 64}}},
        }),
    ),
    "10^9 residual blocks": (("encoder", "recipe"), recipe(n_residual=10**9)),
    "an activation that is code": (("encoder", "recipe"), recipe(activation="__import__('os').system")),
    "an unknown argument": (("encoder", "recipe"), recipe(__class__="x")),
    "a recipe of another size": (("encoder", "recipe"), recipe(n_in=8)),
    "a recipe of a list": (("encoder", "recipe"), [1]),
    "no arguments": (("encoder", "recipe"), as_skeleton({"net": "mlp"})),
    "a net in a net in a net": (
        ("encoder", "recipe"),
        as_skeleton(functools.reduce(lambda net, _: {"net": "Conditional", "arguments": {"net": net}}, range(9), {})),
    ),
    "an unknown likelihood": (("likelihood", "name"), "os.system"),
    "the base of likelihoods": (("likelihood", "name"), "Head"),
    "likelihood arguments of a dunder": (("likelihood", "arguments"), as_skeleton({"__class__": 1})),
    "a negative scale": (("likelihood", "arguments"), as_skeleton({"scale": -1.0})),
    "a scale of NaN": (("likelihood", "arguments"), as_skeleton({"scale": float("nan")})),
    "a scale of words": (("likelihood", "arguments"), as_skeleton({"scale": "1"})),
    "a likelihood of no state": (("likelihood", "state"), as_skeleton({})),
    "a likelihood of a state of words": (("likelihood", "state"), as_skeleton({"_extra_state": "x"})),
    "a likelihood of 2^63 classes": (
        ("likelihood",),
        as_skeleton({"name": "Categorical", "arguments": {"n_classes": 2**63, "values": None}, "state": {}}),
    ),
    "a likelihood of two parameters": (
        ("likelihood",),
        as_skeleton({"name": "HeteroscedasticGaussian", "arguments": {}, "state": {}}),
    ),
    "codes of another module": (("codes",), "os.system"),
    "codes of a number": (("codes",), 3),
    "linearised of a word": (("linearised",), "yes"),
    "a dtype of code": (("dtype",), "torch.float64"),
    "a dtype of integers": (("dtype",), "int64"),
    "a data shape of words": (("data_shape",), as_skeleton(("a",))),
    "a data shape of another size": (("data_shape",), as_skeleton((7, 2))),
    "a data shape of no axis": (("data_shape",), as_skeleton(())),
    "a data shape of 2^120": (("data_shape",), as_skeleton((2**60, 2**60))),
    "a data shape of negative numbers": (("data_shape",), as_skeleton((-1, 3))),
    "a data shape of a list": (("data_shape",), [7]),
    "weights of None": (("weights",), None),
    "weights of a word": (("weights",), "abc"),
    "weights of a list": (("weights",), []),
    "weights of a method": (("weights",), as_skeleton(bae.weights.MAP())),
    "weights of a subset": (("weights",), as_skeleton(bae.Subset({}))),
    "weights of a hyper-parameter": (("weights",), as_skeleton(bae.IsotropicNormal(1.0))),
    "weights of no part": (("weights",), as_skeleton(bae.families.IndependentNormals([]))),
    "weights of code": (("weights",), {"class": "os.system", "fields": {"command": "true"}}),
    "a flag for every parameter of others": (("encoder", "requires_grad"), as_skeleton({"x": True})),
    "a flag of words": (("encoder", "requires_grad"), as_skeleton({n: "y" for n in ("1.weight", "1.bias")})),
    "training of numbers": (("training",), 3),
    "training of a dict": (("training",), ["", {"dict": []}]),
    "a mask of 10^12": (("data_shape",), {"true": [10**6, 10**6]}),
    "a list as a state": (("encoder", "state"), []),
}  # fmt: skip


def with_value(folder, data, path, value):
    """The bytes with another value at a path, and without the tensors that nothing names any more."""
    (folder / "edited").write_bytes(data)
    metadata, tensors = encoding.read(folder / "edited")
    container, key = value_of(metadata, *path)
    container[key] = value
    text = json.dumps(metadata)
    kept = {name: leaf for name, leaf in tensors.items() if f'"tensor": {json.dumps(name)}' in text}
    encoding.write(folder / "edited", kept, metadata)
    return (folder / "edited").read_bytes()


# the flags, and what only the networks can tell, are not `describe`'s to tell
LATE = ("a data shape of another size", "a likelihood of 2^63 classes", "a likelihood of two parameters")


@pytest.mark.parametrize("name", HOSTILE_VALUES)
def test_hostile_values_with_a_good_checksum_are_refused(name, whole, load, tmp_path):
    path, value = HOSTILE_VALUES[name]
    damaged = with_value(tmp_path, whole, path, value)
    if name in LATE or (path[0] == "encoder" and path[1] != "state"):
        with pytest.raises(FileError):
            load(damaged)
    else:
        check_refused(load, damaged)


def test_particles_that_say_they_are_linearised_are_damage(tmp_path, load):
    files.save(particles(), tmp_path / "particles")
    damaged = with_value(tmp_path, (tmp_path / "particles").read_bytes(), ("linearised",), True)
    check_refused(load, damaged, "linearise")


def test_a_model_whose_parts_do_not_go_together_is_not_saved(tmp_path):
    good = laplace("diagonal")
    for likelihood, shape in ((bae.likelihoods.Gaussian(0.1), (7, 2)), (bae.likelihoods.Categorical(3), None)):
        model = bae.Autoencoder(good.model.encoder, good.model.decoder, likelihood, data_shape=shape)
        with pytest.raises(ShapeError):
            files.save(bae.Predictive(model, good.weights), tmp_path / "file")
    assert not (tmp_path / "file").exists()
