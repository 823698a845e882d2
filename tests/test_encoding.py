from __future__ import annotations

import dataclasses
import json
import math
import os
import stat
import types

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

import bayesae as bae
from bayesae import calibration, encoding, ood
from bayesae.curvature import KroneckerFactors, Layout, Linearisation, RotatedBlock
from bayesae.encoding import values
from bayesae.errors import DataError, FileError, UnsupportedError
from bayesae.functional import parameters_of
from bayesae.joint import IndependentNormal
from bayesae.weights.structures import Dense, Diagonal, Eigencorrected, Kronecker, LowRank
from tests.calibration.worlds import normal


def there_and_back(value, tmp_path):
    skeleton, tensors = encoding.flatten(value)
    encoding.write(tmp_path / "file", tensors, {"value": skeleton})
    metadata, tensors = encoding.read(tmp_path / "file")
    return encoding.unflatten(metadata["value"], tensors)


def check_same(a, b):
    """Types, shapes, dtypes, order in memory and bits."""
    if isinstance(a, torch.Tensor):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))
        if a.numel() and a.permute(sorted(range(a.dim()), key=a.stride, reverse=True)).is_contiguous():
            assert a.is_contiguous() == b.is_contiguous()
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            check_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert type(a) is type(b) and len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            check_same(one, other)
    elif dataclasses.is_dataclass(a):
        assert type(a) is type(b)
        for field in dataclasses.fields(a):
            check_same(getattr(a, field.name), getattr(b, field.name))
    else:
        assert type(a) is type(b)
        assert a == b or (math.isnan(a) and math.isnan(b))


TREE = {
    "nothing": None,
    "numbers": [True, 3, -(2**63), 2.5, 1e-300, 0.1, -0.0, math.inf, -math.inf, math.nan],
    "text": ["", "a/b.c", 'quotes " and \\ and\nlines', "Größe", "\u0000", "__metadata__", "tensor"],
    "nested": [[], {}, (), ((1, (2,)), [({"tensor": [1]},)])],
    3: torch.Size([2, 0]),
    None: [1],
    "": {"": {"": torch.Size([])}},
    "looks like a skeleton": {"tensor": "x", "class": "Subset", "fields": {}, "dict": [], "float": "inf"},
    "tensors": {
        "scalar": torch.tensor(0.1, dtype=torch.float64),
        "empty": torch.zeros(0, 3),
        "no axis": torch.zeros(2, 0),
        "nan": torch.tensor([math.nan, -0.0, math.inf]),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "channels last": torch.rand(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "expanded": torch.rand(1, 3).expand(4, 3),
        "cut": torch.rand(4, 6)[:, ::2],
        "parameter": nn.Parameter(torch.rand(3)),
        "true": torch.ones(2, 3, dtype=torch.bool),
        "true scalar": torch.tensor(True),
        "some": torch.tensor([True, False]),
    },
    "dtypes": [torch.tensor([0, 1, 0, 1]).to(dtype) for dtype in values.DTYPES],
}


def test_every_plain_value_comes_back(tmp_path):
    check_same(TREE, there_and_back(TREE, tmp_path))
    for value in (None, 3, "text", torch.rand(3), [], torch.ones(3, dtype=torch.bool)):
        check_same(value, there_and_back(value, tmp_path))


def test_a_tensor_in_several_places_is_stored_once_and_stays_one(tmp_path):
    one = torch.rand(3)
    skeleton, tensors = encoding.flatten({"a": one, "b": [one, one[:2]]})
    assert sorted(tensors) == ["a", "b/1"]
    back = encoding.unflatten(skeleton, tensors)
    assert back["a"] is back["b"][0]
    encoding.write(tmp_path / "file", tensors, {})  # views of one storage


def test_names_never_collide():
    tree = {
        "a": {"b": torch.zeros(1)},
        "a/b": torch.ones(2),
        "a/b~1": torch.ones(3),
        1: torch.ones(4),
        "1": torch.ones(5),
    }
    skeleton, tensors = encoding.flatten(tree)
    assert len(tensors) == 5
    check_same(tree, encoding.unflatten(skeleton, tensors))


def test_masks_that_are_true_throughout_take_no_room():
    subset = bae.Subset.of(bae.nets.mlp(100, [100], 100))
    skeleton, tensors = encoding.flatten(subset)
    assert not tensors
    check_same(subset, encoding.unflatten(json.loads(json.dumps(skeleton)), {}))


def test_many_masks_are_stored_as_they_are(monkeypatch):
    monkeypatch.setattr(values, "_MAX_COMPACT", 10)
    masks = {name: torch.ones(4, dtype=torch.bool) for name in "abcd"}
    skeleton, tensors = encoding.flatten(bae.Subset(masks))
    assert len(tensors) == 2
    check_same(bae.Subset(masks), encoding.unflatten(skeleton, tensors))


def sums_of(structure, model, x, n_passes):
    lin, subset = Linearisation(model.network, parameters_of(model.network)), bae.Subset.of(model.network)
    sums = structure.start(lin, subset)
    for k in range(n_passes):
        sums = structure.next_pass(sums, subset) if k else sums
        sums = structure.add(sums, lin, subset, x, model.likelihood.output_hessian, None)
    return sums


@pytest.mark.parametrize(
    ("structure", "n_passes"),
    [(Diagonal(), 1), (Dense(), 1), (Kronecker(), 1), (Eigencorrected(), 1), (Eigencorrected(), 2)]
    + [(LowRank(3), 1), (LowRank(3), 2)],
)
def test_sums_of_every_structure_come_back(structure, n_passes, model, rows, tmp_path):
    sums = sums_of(structure, model, rows, n_passes)
    check_same(sums, there_and_back(sums, tmp_path))


def test_hyper_parameters_and_priors_come_back(tmp_path):
    precisions = {"weight": torch.rand(2, 3), "bias": 2.0}
    for value in (LowRank(7, 1), bae.IsotropicNormal(0.3), IndependentNormal(precisions)):
        check_same(value, there_and_back(value, tmp_path))
    view = IndependentNormal(types.MappingProxyType(precisions))
    check_same(IndependentNormal(precisions), there_and_back(view, tmp_path))


@pytest.mark.parametrize(("cls", "kinds"), values._CLASSES.values(), ids=values._CLASSES)
def test_the_table_has_every_field(cls, kinds):
    assert list(kinds) == [field.name for field in dataclasses.fields(cls) if field.init]


@pytest.mark.parametrize(
    "value",
    [object(), {1, 2}, b"bytes", nn.Linear(1, 1), print, np.int64(3), 1j, slice(3), bae.Batch(torch.zeros(1))]
    + [{(1, 2): 3}, {2.5: 3}, 2**64, torch.zeros(2, device="meta"), torch.eye(2).to_sparse(), torch.zeros(1) * 1j],
    ids=lambda value: type(value).__name__,
)
def test_what_has_no_form_in_a_file_is_named(value):
    with pytest.raises(UnsupportedError, match=r"at 'a/0'"):
        encoding.flatten({"a": [value]})


def test_a_cycle_is_no_endless_loop():
    cycle: list = []
    cycle.append(cycle)
    with pytest.raises(UnsupportedError, match="cycle"):
        encoding.flatten(cycle)


def nested(depth):
    value: object = 1
    for _ in range(depth):
        value = [value]
    return value


BAD_SKELETONS = [
    nested(40),
    {},
    {"tensor": "y"},
    {"tensor": 1},
    {"tensor": "x", "order": [0, 0]},
    {"tensor": "x", "order": [1]},
    {"tensor": "x", "order": [True]},
    {"tensor": "x", "other": 1},
    {"float": "1e5"},
    {"float": 3},
    math.inf,
    2**64,
    {"true": [10**12]},
    {"true": [-1]},
    {"true": [2.0]},
    {"true": [2**20, 2**20]},
    [{"true": [2**28]}, {"true": [1]}],
    {"true": [1] * 100},
    {"size": [-1]},
    {"size": [10**30]},
    {"size": "12"},
    {"tuple": "ab"},
    {"dict": {"a": 1}},
    {"dict": [["a"]]},
    {"dict": [["a", 1], ["a", 2]]},
    {"dict": [[True, 1]]},
    {"dict": [[2.5, 1]]},
    {"dict": [[None, 1], [None, 2]]},
    {"dict": [[["a"], 1]]},
    {"class": "os.system", "fields": {"command": "true"}},
    {"class": "Subset"},
    {"class": "Subset", "fields": {}},
    {"class": "Subset", "fields": {"masks": [1]}},
    {"class": "Subset", "fields": {"masks": {"dict": [["a", {"tensor": "x"}]]}}},
    {"class": "Subset", "fields": {"masks": {"dict": []}, "check": 1}},
    {"class": "_Kind", "fields": {"what": "", "fits": 1}},
    {"class": "IsotropicNormal", "fields": {"precision": "1"}},
    {"class": "IsotropicNormal", "fields": {"precision": True}},
    {"class": "IsotropicNormal", "fields": {"precision": -1}},
    {"class": "IsotropicNormal", "fields": {"precision": {"float": "nan"}}},
    {"class": "LowRank", "fields": {"rank": 0, "n_passes": 1}},
    {"class": "LowRank", "fields": {"rank": 2.5, "n_passes": 1}},
    {"class": "VarianceScaling", "fields": {"by": "row", "n_prior": 10.0}},
    {"class": "SplitConformal", "fields": {"unit": 3}},
    {"class": "IsotonicQuantiles", "fields": {"errors": {"tensor": "i"}}},
    {"class": "Rescaled", "fields": {"noise": {"tensor": "x"}, "code": 1.0, "weights": {"tensor": "x"}}},
    {"class": "ConformalCalibration", "fields": {"by_group": {"dict": [["a", {"tensor": "x"}]]}, "is_two_sided": True}},
    {"class": "ConformalCalibration", "fields": {"by_group": {"dict": [[1, {"tensor": "i"}]]}, "is_two_sided": True}},
    {"class": "CombinedCalibration", "fields": {"references": [], "combined": None, "rule": "fisher"}},
    {"class": "Particles", "fields": {"atoms": {"dict": []}, "is_linearised": False, "info": {"dict": []}}},
    {
        "class": "Particles",
        "fields": {"atoms": {"dict": [["a", {"tensor": "i"}]]}, "is_linearised": False, "info": {"dict": []}},
    },
]


@pytest.mark.parametrize("skeleton", BAD_SKELETONS, ids=lambda s: str(s)[:60])
def test_a_skeleton_that_flatten_never_writes_is_refused(skeleton):
    with pytest.raises(FileError):
        encoding.unflatten(skeleton, {"x": torch.zeros(3), "i": torch.zeros(3, dtype=torch.int64)})


def test_tensors_that_nobody_names_are_refused():
    with pytest.raises(FileError, match="'y'"):
        encoding.unflatten({"tensor": "x"}, {"x": torch.zeros(1), "y": torch.zeros(1)})


def test_what_a_class_refuses_is_refused():
    layout = Layout("w", None, torch.Size([2, 3]))
    block = RotatedBlock(layout, torch.eye(2)[None], torch.eye(3)[None], torch.ones(1, 2, 3))
    posterior = bae.families.KroneckerNormal({"w": torch.zeros(2, 3)}, [block])
    skeleton, tensors = encoding.flatten(posterior)
    encoding.unflatten(skeleton, tensors)
    text = json.dumps(skeleton)
    for change in (('"groups": 1', '"groups": 0'), ('"groups": 1', '"groups": "1"'), ("[2, 3]", "[3, 2]")):
        assert change[0] in text
        with pytest.raises(FileError):
            encoding.unflatten(json.loads(text.replace(*change)), tensors)
    name = next(name for name, leaf in tensors.items() if leaf.shape == (1, 2, 3))
    for values_ in (-torch.ones(1, 2, 3), torch.full((1, 2, 3), math.nan), torch.ones(1, 3, 2)):
        with pytest.raises(FileError, match="KroneckerNormal"):
            encoding.unflatten(skeleton, tensors | {name: values_})


def calibrations():
    """Each before its fit and, of rows with missing entries, after it."""
    moments, x = normal(40)
    mask = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < 0.8
    scaling, conformal = calibration.VarianceScaling, calibration.SplitConformal
    methods = [scaling(), scaling("pixel", 3.0), calibration.Temperature(), calibration.Isotonic()]
    methods += [conformal(unit) for unit in ("pixel", "position", "image")]
    scores, groups = x.reshape(-1, 2), torch.arange(120) % 3
    pixels = dataclasses.replace(moments, mean=moments.mean.sigmoid(), likelihood=bae.likelihoods.Bernoulli())
    binary = calibration.IsotonicProbabilities(2.0)
    return [
        *methods,
        *(method.fit(moments, x, mask) for method in methods),
        binary,
        binary.fit(pixels, (x > 0).double(), mask),
        ood.ConformalCalibration.fit(scores[:, 0]),
        ood.ConformalCalibration.fit(scores[:, 0], groups, two_sided=True),
        ood.CombinedCalibration.fit(scores, "harmonic"),
    ]


def test_calibrations_come_back(tmp_path):
    for value in calibrations():
        check_same(value, there_and_back(value, tmp_path))
    kinds = {type(value) for value in calibrations()}
    assert kinds == set(encoding.CALIBRATIONS)


def test_calibrations_that_no_fit_gives_are_refused():
    falling = torch.tensor([2.0, 1.0], dtype=torch.float64)
    for name, fields in (
        ("IsotonicQuantiles", {"errors": {"tensor": "x"}}),
        ("ConformalQuantiles", {"scores": {"tensor": "x"}, "n_images": {"tensor": "x"}}),
        ("ConformalCalibration", {"by_group": {"dict": [[None, {"tensor": "x"}]]}, "is_two_sided": False}),
        ("Rescaled", dict.fromkeys(("noise", "code", "weights"), {"tensor": "x"})),
    ):
        skeleton = {"class": name, "fields": fields}
        encoding.unflatten(skeleton, {"x": falling.flip(0)})
        for bad in (-falling, torch.full((2,), math.nan)) if name == "Rescaled" else (falling, torch.zeros(0)):
            with pytest.raises(FileError, match=f"a {name} that can be"):
                encoding.unflatten(skeleton, {"x": bad})


def test_factors_come_back_with_their_count(tmp_path):
    factors = KroneckerFactors(Layout("w", "b", torch.Size([2, 3])), torch.eye(4)[None], torch.eye(2)[None], 12.5)
    check_same(factors, there_and_back(factors, tmp_path))


# files


def test_other_programs_can_read_the_tensors(tmp_path):
    leaf = torch.rand(3, 4)
    encoding.write(tmp_path / "file", {"a b/ü": leaf}, {"x": 1})
    with safe_open(tmp_path / "file", "pt") as file:
        assert torch.equal(file.get_tensor("a b/ü"), leaf)
        assert file.metadata()["format"] == "bayesae"


def test_tensors_start_where_torch_would_put_them(tmp_path):
    encoding.write(tmp_path / "file", {str(n): torch.rand(n) for n in range(1, 9)}, {})
    assert not any(leaf.data_ptr() % 64 for leaf in encoding.read(tmp_path / "file")[1].values())


def test_metadata_come_back(tmp_path):
    metadata = {"a": [1, 2.5, None, 'ü"sha256":"' + "0" * 64 + '"'], "b": {}}
    encoding.write(tmp_path / "file", {}, metadata)
    assert encoding.read(tmp_path / "file") == (metadata, {})


def test_the_written_file_is_an_ordinary_file(tmp_path):
    path = tmp_path / "file"
    (tmp_path / "link").symlink_to("file")
    old = os.umask(0o027)
    try:
        encoding.write(str(tmp_path / "link"), {"a": torch.zeros(2)}, {})
    finally:
        os.umask(old)
    assert (tmp_path / "link").is_symlink()
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert sorted(os.listdir(tmp_path)) == ["file", "link"]


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(name, tmp_path, monkeypatch):
    encoding.write(tmp_path / "file", {}, {"n": 1})

    def fail(*_):
        raise OSError("no space")

    monkeypatch.setattr(os, name, fail)
    with pytest.raises(OSError, match="no space"):
        encoding.write(tmp_path / "file", {}, {"n": 2})
    monkeypatch.undo()
    assert encoding.read(tmp_path / "file")[0] == {"n": 1}
    assert os.listdir(tmp_path) == ["file"]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    for path in (tmp_path, tmp_path / "none" / "file"):
        with pytest.raises(FileError, match="folder"):
            encoding.write(path, {}, {})
        with pytest.raises(FileError):
            encoding.read(path)


def test_metadata_that_json_cannot_hold_are_refused(tmp_path):
    for metadata in ({"a": math.nan}, {"a": {1}}, {"a": torch.zeros(1)}):
        with pytest.raises(UnsupportedError):
            encoding.write(tmp_path / "file", {}, metadata)
    assert not os.listdir(tmp_path)


def test_the_caller_s_tensors_and_generators_stay(tmp_path):
    leaf = torch.rand(3, 4).T
    before, state = leaf.clone(), torch.get_rng_state()
    check_same(leaf, there_and_back(leaf, tmp_path))
    assert torch.equal(leaf, before) and not leaf.is_contiguous()
    assert torch.equal(state, torch.get_rng_state())


def test_errors_of_files_are_value_errors():
    assert issubclass(FileError, ValueError) and issubclass(FileError, bae.errors.BayesAEError)
    assert not issubclass(FileError, DataError)
