"""Files that were damaged on the way, and files that somebody wrote to do harm."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import pickle
import random
import re
import resource
import time
import zipfile

import pytest
import torch
from safetensors import torch as safetensors

import bayesae as bae
from bayesae import encoding, files
from bayesae.errors import BayesAEError, FileError
from tests.conftest import small_model
from tests.files.cases import laplace

DIGEST = re.compile(rb'"sha256":"[0-9a-f]{64}"')


def sealed(data):
    """The bytes with a checksum that fits them."""
    empty = DIGEST.sub(b'"sha256":"' + b"0" * 64 + b'"', data, count=1)
    digest = hashlib.sha256(empty).hexdigest().encode()
    return DIGEST.sub(b'"sha256":"' + digest + b'"', data, count=1)


def packed(header, body):
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    return len(text).to_bytes(8, "little") + text + body


def unpacked(data):
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "file"
    files.save(laplace("kronecker", small_model(hidden=(3,))), path)
    return path.read_bytes()


@pytest.fixture(autouse=True)
def frugal(request):
    """No test here may take a gigabyte."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # in KiB


@pytest.fixture
def load(tmp_path):
    def load(data, function=files.load, **kwargs):
        (tmp_path / "file").write_bytes(data)
        start = time.perf_counter()
        try:
            return function(tmp_path / "file", **kwargs)
        finally:
            assert time.perf_counter() - start < 10

    return load


def check_refused(load, data, match=None):
    for function in (files.load, files.describe):
        with pytest.raises(FileError, match=match) as caught:
            load(data, function)
        assert caught.value.fix and len(str(caught.value)) < 3000


def test_sealing_is_what_the_library_does(whole, load):
    assert sealed(whole) == whole
    assert load(sealed(packed(*unpacked(whole)))).weights.info


def test_every_flipped_bit_of_the_header_and_of_the_data_is_seen(whole, tmp_path):
    source, size = random.Random(0), int.from_bytes(whole[:8], "little")
    places = list(range(64)) + source.sample(range(64, 8 * (8 + size)), 400)
    places += source.sample(range(8 * (8 + size), 8 * len(whole)), 400)
    for place in places:
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        (tmp_path / "file").write_bytes(damaged)
        with pytest.raises(FileError):
            encoding.read(tmp_path / "file")


def test_any_length_but_the_whole_is_seen(whole, tmp_path):
    source, size = random.Random(1), int.from_bytes(whole[:8], "little")
    lengths = {*range(20), *range(size, size + 20), *source.sample(range(len(whole)), 100), len(whole) - 1}
    changed = [whole[:n] for n in lengths] + [whole + bytes(n) for n in (1, 8, 4096)] + [whole + whole, b" " + whole]
    for damaged in changed:
        (tmp_path / "file").write_bytes(damaged)
        with pytest.raises(FileError):
            encoding.read(tmp_path / "file")


def test_exchanged_tensors_are_seen(whole, load):
    header, body = unpacked(whole)
    names = [name for name in header if name != "__metadata__"]
    n = 0
    for a in names:
        for b in names:
            if (
                a < b
                and header[a]["shape"] == header[b]["shape"]
                and header[a]["data_offsets"] != header[b]["data_offsets"]
            ):
                swapped = copy.deepcopy(header)
                swapped[a], swapped[b] = header[b], header[a]
                check_refused(load, packed(swapped, body), "checksum")
                n += 1
    assert n > 3


def edits():
    """Changes of a header that keep it well formed."""

    def edit(change):
        def apply(header, body):
            names = sorted(name for name in header if name != "__metadata__")
            result = change(header, names)
            return header, body if result is None else body + result

        return apply

    def drop(header, names):
        del header[names[0]]

    def rename(header, names):
        header["other"] = header.pop(names[0])

    def add(header, names):
        stop = max(header[name]["data_offsets"][1] for name in names)
        header["other"] = {"dtype": "F32", "shape": [1], "data_offsets": [stop, stop + 4]}
        return b"\0\0\0\0"

    def reshape(header, names):
        name = next(name for name in names if len(header[name]["shape"]) == 2)
        header[name]["shape"] = header[name]["shape"][::-1]

    def retype(dtype):
        def change(header, names):
            name = next(name for name in names if header[name]["dtype"] == "F64")
            header[name]["dtype"] = dtype

        return change

    def entry(name, value):
        def change(header, names):
            header[names[0]][name] = value

        return change

    yield from {
        "drop": edit(drop), "rename": edit(rename), "add": edit(add), "reshape": edit(reshape),
        "I64": edit(retype("I64")), "U64": edit(retype("U64")), "C64": edit(retype("C64")), "X9": edit(retype("X9")),
        "a shape of 2^60": edit(entry("shape", [2**60, 2**60])), "a negative shape": edit(entry("shape", [-1])),
        "a text as shape": edit(entry("shape", "3")), "offsets far away": edit(entry("data_offsets", [0, 2**50])),
        "offsets backwards": edit(entry("data_offsets", [8, 0])), "no offsets": edit(entry("data_offsets", [])),
    }.items()  # fmt: skip


@pytest.mark.parametrize("is_sealed", [False, True])
@pytest.mark.parametrize(("name", "edit"), list(edits()))
def test_a_changed_list_of_tensors_is_seen(name, edit, is_sealed, whole, load):
    damaged = packed(*edit(*unpacked(whole)))
    if is_sealed:  # what only the network can tell is not `describe`'s to tell
        with pytest.raises(FileError):
            load(sealed(damaged))
    else:
        check_refused(load, damaged)


def with_metadata(whole, **changes):
    header, body = unpacked(whole)
    header["__metadata__"] |= changes
    return sealed(packed(header, body))


def with_tree(whole, change):
    header, body = unpacked(whole)
    metadata = json.loads(header["__metadata__"]["metadata"])
    change(metadata)
    header["__metadata__"]["metadata"] = json.dumps(metadata)
    return sealed(packed(header, body))


HOSTILE_METADATA = {
    "another format": {"format": "pt"},
    "a later version": {"version": "7"},
    "a version of words": {"version": "1; import os"},
    "a version of no number": {"version": "1.0"},
    "no JSON": {"metadata": "{"},
    "not a dict": {"metadata": "[1, 2]"},
    "nothing": {"metadata": ""},
    "NaN": {"metadata": '{"kind": NaN}'},
    "infinity": {"metadata": '{"kind": "predictive", "value": 1e999}'},
    "a number of 5000 digits": {"metadata": '{"kind": "predictive", "value": ' + "9" * 5000 + "}"},
    "10 000 lists": {"metadata": '{"kind": "predictive", "value": ' + "[" * 10_000 + "]" * 10_000 + "}"},
    "10 000 dicts": {"metadata": '{"a":' * 10_000 + "1" + "}" * 10_000},
    "200 lists": {"metadata": '{"kind": "predictive", "value": ' + "[" * 200 + "]" * 200 + "}"},
    "a name twice": {"metadata": '{"kind": "predictive", "kind": "predictive", "value": null}'},
    "no kind": {"metadata": '{"value": null}'},
    "another kind": {"metadata": '{"kind": "../../etc/passwd", "value": null}'},
    "a kind of no text": {"metadata": '{"kind": ["predictive"], "value": null}'},
    "no value": {"metadata": '{"kind": "predictive"}'},
    "no versions": {"metadata": '{"kind": "predictive", "value": null}'},
    "no dict": {"metadata": '{"kind": "predictive", "versions": {}, "value": {"tuple": []}}'},
    "a surrogate": {"metadata": '{"kind": "\\ud800", "value": null}'},
}


@pytest.mark.parametrize("name", HOSTILE_METADATA)
def test_hostile_metadata_with_a_good_checksum_are_refused(name, whole, load):
    check_refused(load, with_metadata(whole, **HOSTILE_METADATA[name]))


def test_a_later_version_says_what_to_do(whole, load):
    check_refused(load, with_metadata(whole, version="7"), r"unknown version '7'\. Update bayesae")


def value_of(metadata, *path):
    """The value that stands at a path of names, in a skeleton: (container, key)."""
    node, slot = metadata["value"], (metadata, "value")
    for name in path:
        if "dict" in node:
            pair = next(pair for pair in node["dict"] if pair[0] == name)
            slot, node = (pair, 1), pair[1]
        else:
            slot, node = (node["fields"], name), node["fields"][name]
    return slot


def as_skeleton(value):
    return encoding.flatten(value)[0]


def test_hostile_noise_is_refused(whole, load):
    header, body = unpacked(whole)
    start, stop = header["likelihood/state/_extra_state"]["data_offsets"]
    for value in (-1.0, float("inf"), 0.0):
        other = body[:start] + torch.tensor(value, dtype=torch.float64).numpy().tobytes() + body[stop:]
        with pytest.raises(BayesAEError):
            load(sealed(packed(header, other)))


def nodes(value, depth=0):
    """All places (container, key) of a JSON value."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from nodes(value[key], depth + 1)


NASTY = [
    None, True, False, 0, -1, 3, 10**12, 2**63, -(2**62), 0.5, -1e300, "", "x", "os.system", "../x", "mlp", "Subset",
    "\u0000", [], {}, [[]], {"dict": []}, {"float": "nan"}, {"float": "inf"}, {"true": [3]}, {"true": [10**5, 10**5]},
    {"tensor": "dtype"}, {"tensor": "weights/mean/encoder.1.weight"}, {"size": [10**9, 10**9]}, {"tuple": []},
    {"dict": [["1.weight", 1]]}, {"class": "Layout", "fields": {}},
    {"class": "IsotropicNormal", "fields": {"precision": 1}},
]  # fmt: skip


def test_random_changes_of_the_metadata_with_a_good_checksum_never_crash(whole, load):
    source, counts = random.Random(2), {True: 0, False: 0}
    n = len(list(nodes(json.loads(unpacked(whole)[0]["__metadata__"]["metadata"]))))
    for _ in range(300):

        def change(metadata):
            container, key = list(nodes(metadata))[source.randrange(n)]
            if isinstance(container, dict) and source.random() < 0.2:
                container[source.choice(["x", "class", "dict", "fields", "tensor"])] = container.pop(key)
            elif isinstance(container, list) and source.random() < 0.2:
                source.choice([
                    container.clear,
                    container.reverse,
                    lambda: container.extend(copy.deepcopy(container)),
                ])()
            else:
                container[key] = copy.deepcopy(source.choice(NASTY))

        try:
            loaded = load(with_tree(whole, change))
        except BayesAEError:
            counts[False] += 1
        else:  # a changed description, flag or name of a version
            assert isinstance(loaded, bae.Predictive)
            counts[True] += 1
    assert counts[False] > 10 * counts[True]


def test_random_changes_of_the_numbers_with_a_good_checksum_never_crash(whole, load):
    source, (header, body) = random.Random(3), unpacked(whole)
    for _ in range(100):
        place = 8 * source.randrange(len(body) // 8)
        value = source.choice([float("nan"), float("inf"), -1.0, 1e308, 0.0])
        other = body[:place] + torch.tensor(value, dtype=torch.float64).numpy().tobytes() + body[place + 8 :]
        try:
            assert isinstance(load(sealed(packed(header, other))), bae.Predictive)
        except BayesAEError:
            assert value != 0.0


class Bomb:
    def __reduce__(self):
        return (print, ("run",))


def other_files():
    saved = io.BytesIO()
    torch.save({"a": torch.zeros(3)}, saved)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a", "b" * 1000)
    yield from {
        "nothing": b"", "one byte": b"x", "eight bytes": bytes(8), "zeros": bytes(10_000), "ones": b"\xff" * 10_000,
        "text": b"hello " * 100, "a pickle": pickle.dumps(Bomb()), "torch.save": saved.getvalue(),
        "a zip": archive.getvalue(), "safetensors of others": safetensors.save({"a": torch.zeros(3)}),
        "safetensors with metadata": safetensors.save({"a": torch.zeros(3)}, {"format": "pt"}),
        "a header of 2^63 bytes": (2**63).to_bytes(8, "little") + b"{}", "an empty header": packed({}, b""),
        "a header that is a list": packed([], b""), "metadata that are a list": packed({"__metadata__": []}, b""),
        "a header of lists": packed(b"[" * 100_000, b""),
        "metadata of numbers": packed({"__metadata__": {"format": 1}}, b""),
        "no checksum": packed({"__metadata__": {"format": "bayesae", "version": "1", "metadata": "{}"}}, b""),
        "no metadata": sealed(packed({"__metadata__": {"format": "bayesae", "version": "1", "sha256": "0" * 64}}, b"")),
        "two checksums": packed(b'{"__metadata__":{"format":"bayesae","version":"1","sha256":"' + b"0" * 64 +
                                b'","x":{"sha256":"' + b"0" * 64 + b'"}}}', b""),
        "a name twice": packed(b'{"__metadata__":{"format":"bayesae"},"__metadata__":{"format":"bayesae"}}', b""),
    }.items()  # fmt: skip


@pytest.mark.parametrize(("name", "data"), list(other_files()), ids=lambda v: v if isinstance(v, str) else "")
def test_other_files_are_refused(name, data, load, capsys):
    check_refused(load, data)
    assert not capsys.readouterr().out


def test_places_without_a_file_are_named(tmp_path):
    for path in (tmp_path, tmp_path / "none", tmp_path / "none" / "file", "", "/dev/null"):
        for function in (files.load, files.describe):
            with pytest.raises(FileError, match="path"):
                function(path)


def test_after_all_of_it_the_whole_file_still_loads(whole, load):
    assert isinstance(load(whole), bae.Predictive)
