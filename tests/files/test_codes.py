"""Code posteriors in files: every one comes back, and what a file makes up is refused."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
import torch
from torch import nn

import bayesae as bae
from bayesae import codes, encoding, files
from bayesae.errors import FileError, UnsupportedError
from bayesae.files import codes as in_files
from tests.files.cases import particles, rows
from tests.files.test_damage import as_skeleton, check_refused, frugal, load
from tests.files.test_hostile_values import with_value
from tests.test_encoding import check_same

__all__ = ["frugal", "load"]  # fixtures

Z = 2


def flow(**kwargs):
    torch.manual_seed(4)
    net = codes.AutoregressiveFlow(Z, 2, (5,), **kwargs).double()
    with torch.no_grad():
        for leaf in net.parameters():
            leaf.add_(0.3 * torch.randn_like(leaf))
    return net


def leapfrog():
    net = codes.Leapfrog(Z, 3, step_size=0.05, temperature=1.5).double()
    net.log_temperature.requires_grad_(False)
    return net


# a code posterior and the numbers that it wants of an encoder for each code dimension
CASES = {
    "Amortised": lambda: (codes.Amortised(gradient="path"), 2),
    "Amortised, full": lambda: (codes.Amortised("full"), 1 + Z),
    "Amortised, layers": lambda: (codes.Amortised("rank_one", layers=(1, 1)), 3),
    "Flowed, Planar": lambda: (codes.Flowed(codes.amortised, codes.Planar(2)), 8),
    "Flowed, Radial": lambda: (codes.Flowed(codes.Amortised("full"), codes.Radial(1)), 3 + 1 + Z),
    "Flowed, AutoregressiveFlow": lambda: (codes.Flowed(codes.amortised, flow()), 3),
    "Flowed, other AutoregressiveFlow": lambda: (
        codes.Flowed(codes.amortised, flow(n_context=0, is_volume_preserving=True, activation=nn.GELU).eval()),
        2,
    ),
    "Hamiltonian": lambda: (codes.Hamiltonian(codes.amortised, leapfrog()), 2),
    "Importance": lambda: (codes.Importance(codes.Flowed(codes.amortised, flow()), 3), 3),
    "Laplace": lambda: (codes.Laplace(2, "newton"), 1),
    "Laplace, None": lambda: (codes.Laplace(1), 2),
    "Perturbed": lambda: (codes.Perturbed(codes.encode, 0.5), 1),
    "Refined": lambda: (
        codes.Refined(codes.Perturbed(codes.amortised, 1), 3, 0.02, 0.3, second_order=False, n_directions=1),
        2,
    ),
}


def predictive_of(name):
    code, g = CASES[name]()
    torch.manual_seed(3)
    encoder = bae.nets.mlp(7, [6], (Z, g) if g > 1 else Z)
    model = bae.Autoencoder(encoder, bae.nets.mlp(Z, [5], 7), bae.likelihoods.Gaussian(0.3)).double().eval()
    return particles(model, codes=code)


def check_same_code(a, b):
    """Types, fields, networks and flags."""
    assert type(a) is type(b)
    if isinstance(a, nn.Module):
        assert a is not b and repr(a) == repr(b)
        check_same(dict(a.state_dict()), dict(b.state_dict()))
        assert [m.training for m in a.modules()] == [m.training for m in b.modules()]
        assert [p.requires_grad for p in a.parameters()] == [p.requires_grad for p in b.parameters()]
    elif dataclasses.is_dataclass(a):
        for field in dataclasses.fields(a):
            check_same_code(getattr(a, field.name), getattr(b, field.name))
    else:
        assert a == b


def n_draws(name):
    return 1 if name == "Perturbed" else 3


@pytest.mark.parametrize("name", CASES)
def test_every_code_posterior_comes_back(name, tmp_path):
    before = predictive_of(name)
    files.save(before, tmp_path / "file")
    after = files.load(tmp_path / "file")
    check_same_code(before.codes, after.codes)
    one, other = (p(rows(), n_latent_draws=n_draws(name), seed=4, keep_outputs=True) for p in (before, after))
    for key in ("latents", "log_likelihood", "log_q", "outputs", "kl"):
        check_same(getattr(one, key), getattr(other, key))


@pytest.mark.parametrize("name", ["Flowed, AutoregressiveFlow", "Hamiltonian"])
def test_networks_of_a_code_go_where_the_model_goes(name, tmp_path):
    files.save(before := predictive_of(name), tmp_path / "file")
    after = files.load(tmp_path / "file", dtype=torch.float32)
    assert {leaf.dtype for leaf in codes.modules_of(after.codes).parameters()} == {torch.float32}
    one, other = (p(x, seed=1).log_likelihood for p, x in ((before, rows()), (after, rows().float())))
    torch.testing.assert_close(other.double(), one, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", CASES)
def test_a_description_for_people(name, tmp_path):
    files.save(before := predictive_of(name), tmp_path / "file")
    found = files.describe(tmp_path / "file")["codes"]
    assert found["name"] == type(before.codes).__name__
    assert list(found["fields"]) == [field.name for field in dataclasses.fields(before.codes)]


def test_files_of_plain_codes_are_what_they_were(tmp_path):
    """Of a version that knew nothing else."""
    for code, stored in ((None, None), (codes.encode, "encode")):
        files.save(particles(codes=code), tmp_path / "file")
        metadata, _ = encoding.read(tmp_path / "file")
        assert dict(metadata["value"]["dict"])["codes"] == stored
        assert files.load(tmp_path / "file").codes is code


TABLE = in_files._POSTERIORS | in_files._FLOWS
FIELDS = {kind for kinds in TABLE.values() for field in kinds.values() for kind in field}
CLASSES = [thing for thing in (getattr(codes, name) for name in codes.__all__) if inspect.isclass(thing)]


def is_called(cls):
    """Whether its objects are: code posteriors, flows and their networks, but no protocol and no law."""
    return not getattr(cls, "_is_protocol", False) and any("__call__" in vars(base) for base in cls.mro()[:-1])


@pytest.mark.parametrize("cls", list(filter(is_called, CLASSES)), ids=lambda cls: cls.__name__)
def test_every_public_class_has_a_line_or_a_reason(cls):
    assert cls in TABLE or cls in in_files._REFUSED or cls in FIELDS


@pytest.mark.parametrize(("cls", "kinds"), list(TABLE.items()), ids=lambda v: getattr(v, "__name__", ""))
def test_the_table_has_every_field_and_a_case(cls, kinds):
    assert list(kinds) == [field.name for field in dataclasses.fields(cls) if field.init]

    def inside(value):
        yield type(value)
        if dataclasses.is_dataclass(value):
            for field in dataclasses.fields(value):
                yield from inside(getattr(value, field.name))

    assert any(cls in inside(make()[0]) for make in CASES.values())


def halve(x):
    return 0.5 * x


class MyAmortised(codes.Amortised):
    pass


def my_codes(model, batch, *, n_latent_draws=1):
    return codes.encode(model, batch)


def changed_flow():
    net = flow()
    net.steps[0].net[1] = nn.Softsign()
    return net


def zuko_flow():
    zuko = codes.import_zuko()
    return codes.Zuko(zuko.flows.NSF(Z, Z), 1)


REFUSED = {
    "Consistent": (lambda: codes.Consistent(codes.amortised, halve), r"transform is a function.*codes\.inner"),
    "Consistent, inside": (lambda: codes.Importance(codes.Consistent(codes.amortised, halve)), r"as codes\.inner"),
    "Zuko": (lambda: codes.Flowed(codes.amortised, zuko_flow()), "Zuko.*another library's"),
    "one's own": (lambda: MyAmortised(), "MyAmortised.*dataclasses.replace"),
    "one's own function": (lambda: my_codes, "my_codes.*dataclasses.replace"),
    "one's own, inside": (lambda: codes.Perturbed(my_codes, 0.1), r"as codes\.inner; got my_codes"),
    "a flow": (lambda: codes.Planar(2), "Planar"),
    "a changed flow": (lambda: codes.Flowed(codes.amortised, changed_flow()), "changed AutoregressiveFlow"),
    "an activation of one's own": (
        lambda: codes.Flowed(codes.amortised, flow(activation=lambda: nn.Tanh())),
        "changed AutoregressiveFlow",
    ),
    "a field of another type": (lambda: codes.Refined(second_order=1), r"bool as codes\.second_order; got int"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_name_in_a_file_is_named(name, tmp_path):
    make, match = REFUSED[name]
    with pytest.raises(UnsupportedError, match=match):
        files.save(particles(codes=make()), tmp_path / "file")
    assert not (tmp_path / "file").exists()


def test_numbers_of_numpy_become_python_s(tmp_path):
    import numpy as np

    code = codes.Importance(codes.Perturbed(codes.amortised, np.float64(0.5)), np.int64(3))
    files.save(particles(codes=code), tmp_path / "file")
    back = files.load(tmp_path / "file").codes
    assert back == code and type(back.n) is int and type(back.inner.scale) is float


def node(name, **fields):
    return {"name": name, "fields": fields}


AMORTISED = node("Amortised", family="diagonal", gradient="total", layers=None)
HOSTILE = {
    "a word": "os.system",
    "a number": 3,
    "a list": ["encode"],
    "a truth value": True,
    "nothing": {},
    "a name alone": {"name": "Amortised"},
    "an unknown name": node("os.system", command="true"),
    "a name of a list": {"name": ["Amortised"], "fields": {}},
    "a method of weights": node("MAP"),
    "a class that has no line": node("Zuko", flow="x", n_context=0),
    "a flow": node("Planar", n_steps=1),
    "fields of a list": {"name": "Amortised", "fields": []},
    "a field less": node("Amortised", family="diagonal", gradient="total"),
    "a field more": node("Amortised", family="diagonal", gradient="total", layers=None, x=1),
    "an unknown family": node("Amortised", family="os.system", gradient="total", layers=None),
    "a family of a number": node("Amortised", family=3, gradient="total", layers=None),
    "layers of words": node("Amortised", family="rank_one", gradient="total", layers=["1"]),
    "layers of a number": node("Amortised", family="rank_one", gradient="total", layers=2),
    "a negative count": node("Importance", inner=AMORTISED, n=-1),
    "a count of a truth value": node("Importance", inner=AMORTISED, n=True),
    "a count of a half": node("Importance", inner=AMORTISED, n=1.5),
    "a code of a word": node("Importance", inner="amortised", n=1),
    "a code of None": node("Importance", inner=None, n=1),
    "a code of a flow": node("Importance", inner=node("Planar", n_steps=1), n=1),
    "a scale of NaN": node("Perturbed", inner=AMORTISED, scale=float("nan")),
    "a scale of words": node("Perturbed", inner=AMORTISED, scale="1"),
    "a base without a law": node("Flowed", base="encode", flow=node("Planar", n_steps=1)),
    "a base with path gradients": node(
        "Flowed",
        base=node("Amortised", family="diagonal", gradient="path", layers=None),
        flow=node("Planar", n_steps=1),
    ),
    "a flow of a code": node("Flowed", base=AMORTISED, flow=AMORTISED),
    "a flow of a word": node("Flowed", base=AMORTISED, flow="Planar"),
    "a flow of an empty dict": node("Flowed", base=AMORTISED, flow={}),
    "a start without a law": node(
        "Refined", start="encode", n_steps=1, learning_rate=0.1, momentum=0.5, second_order=True, n_directions=None,
        clip_norm=5.0,
    ),
    "a momentum of 1": node(
        "Refined", start=AMORTISED, n_steps=1, learning_rate=0.1, momentum=1, second_order=True, n_directions=None,
        clip_norm=5.0,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "file"
    files.save(predictive_of("Flowed, AutoregressiveFlow"), path)
    return path.read_bytes()


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_codes_are_refused(name, whole, load, tmp_path):
    check_refused(load, with_value(tmp_path, whole, ("codes",), as_skeleton(HOSTILE[name])))


FLOW = ("codes", "fields", "flow")


def recipe(**arguments):
    given = {
        "n_latents": Z, "n_steps": 2, "hidden": [5], "n_context": 1, "is_volume_preserving": False, "activation": "ELU",
    }  # fmt: skip
    return {"net": "AutoregressiveFlow", "arguments": given | arguments}


HOSTILE_NETWORKS = {
    "an unknown net": ("recipe", {"net": "os.system", "arguments": {}}),
    "another net": ("recipe", {"net": "mlp", "arguments": {"n_in": 2, "hidden": [5], "n_out": 2}}),
    "no recipe": ("recipe", None),
    "a recipe of nothing": ("recipe", {}),
    "arguments of a list": ("recipe", {"net": "AutoregressiveFlow", "arguments": []}),
    "another size": ("recipe", recipe(hidden=[6])),
    "10^9 units": ("recipe", recipe(hidden=[10**9])),
    "20 000 units squared": ("recipe", recipe(hidden=[20_000, 20_000])),
    "64 steps of 64 layers": ("recipe", recipe(n_steps=64, hidden=[1] * 64)),
    "10^12 steps": ("recipe", recipe(n_steps=10**12)),
    "steps of words": ("recipe", recipe(n_steps="2")),
    "steps of a list": ("recipe", recipe(n_steps=[2])),
    "10^12 dimensions": ("recipe", recipe(n_latents=10**12)),
    "an activation of code": ("recipe", recipe(activation="__import__('os').system")),
    "a state of a list": ("state", []),
    "an empty state": ("state", {}),
    "a state of words": ("state", {"steps.0.direct.weight": "x"}),
    "training of numbers": ("training", [3]),
    "training of a word": ("training", "abc"),
}


@pytest.mark.parametrize("name", HOSTILE_NETWORKS)
def test_hostile_networks_of_codes_are_refused(name, whole, load, tmp_path):
    key, value = HOSTILE_NETWORKS[name]
    check_refused(load, with_value(tmp_path, whole, (*FLOW, key), as_skeleton(value)))


def test_more_layers_than_the_file_has_tensors_are_not_even_sketched(whole, load, tmp_path):
    damaged = with_value(tmp_path, whole, (*FLOW, "recipe"), as_skeleton(recipe(n_steps=64, hidden=[1] * 12)))
    check_refused(load, damaged, "residual blocks and steps")


def test_a_flag_for_no_parameter_is_refused(whole, load, tmp_path):
    damaged = with_value(tmp_path, whole, (*FLOW, "requires_grad"), as_skeleton({"x": True}))
    with pytest.raises(FileError):
        load(damaged)


def test_a_network_of_another_kind_in_the_right_place_is_refused(load, tmp_path):
    files.save(predictive_of("Hamiltonian"), tmp_path / "whole")
    files.save(predictive_of("Flowed, AutoregressiveFlow"), tmp_path / "other")
    metadata, tensors = encoding.read(tmp_path / "whole")
    other, flows = encoding.read(tmp_path / "other")
    code, another = (dict(one["value"]["dict"])["codes"] for one in (metadata, other))
    fields = dict(code["dict"])["fields"]["dict"]
    moved = dict(dict(another["dict"])["fields"]["dict"])["flow"]
    fields[1][1] = moved
    kept = {name: leaf for name, leaf in tensors.items() if not name.startswith("codes/")}
    kept |= {name: leaf for name, leaf in flows.items() if name.startswith("codes/")}
    encoding.write(tmp_path / "mixed", kept, metadata)
    check_refused(load, (tmp_path / "mixed").read_bytes(), "Leapfrog")
