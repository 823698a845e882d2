"""A fitted `BayesianImputer` comes back from a file and fills in the same bits; its method is data, never code."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from sklearn.base import clone

import bayesae as bae
from bayesae import codes, files, imputation
from bayesae.errors import BayesAEError, UnsupportedError
from bayesae.files import codes as in_files
from tests.files.test_damage import as_skeleton, value_of, with_tree

pytestmark = pytest.mark.filterwarnings("ignore:of the rows imputed:RuntimeWarning")

ROWS = np.random.RandomState(0).randn(40, 5) * [1, 2, 3, 4, 5]
TABLE = np.where(np.random.RandomState(1).rand(40, 5) < 0.2, np.nan, ROWS)
TABLE[:, 0] = ROWS[:, 0]
ARGUMENTS = {"hidden": [4], "latent_dim": 2, "epochs": 2, "random_state": 0, "n_draws": 4}
CHAINS = {"n_burn_in": 2, "n_steps": 8}
METHODS = {
    "none": None,
    "FixedPoint": imputation.FixedPoint(5, 0.1, noise=True),
    "PseudoGibbs": imputation.PseudoGibbs(**CHAINS),
    "MetropolisGibbs": imputation.MetropolisGibbs(**CHAINS, n_chains=np.int64(1)),
    "ImportanceResampling": imputation.ImportanceResampling(7),
    "ImportanceResampling of a proposal": imputation.ImportanceResampling(7, codes.Refined(codes.amortised, 2)),
    "CodeLaplace": imputation.CodeLaplace(2),
    "CodeHMC": imputation.CodeHMC(**CHAINS),
    "CodeHMC of its own": imputation.CodeHMC(**CHAINS, hmc=codes.HMC(3, 0.7, 0.1, whitening=None)),
    "CodeHMC in an encoder's coordinates": imputation.CodeHMC(**CHAINS, hmc=codes.HMC(whitening=codes.amortised)),
}


def imputer(**kwargs):
    return bae.BayesianImputer(**(ARGUMENTS | kwargs)).fit(TABLE)


@pytest.mark.parametrize("name", METHODS)
def test_fills_in_the_same_bits(name, tmp_path):
    before = imputer(method=METHODS[name])
    bae.save(before, tmp_path / "file")
    after = bae.load(tmp_path / "file")
    assert type(after) is bae.BayesianImputer and vars(before).keys() == vars(after).keys()
    assert np.array_equal(before.transform(TABLE), after.transform(TABLE))
    assert np.array_equal(before.sample(TABLE, 6), after.sample(TABLE, 6))
    assert after.method == before.method and before.history_ == after.history_ and after.n_features_in_ == 5
    clone(after)


def test_a_network_in_a_method_comes_back(tmp_path):
    flow = codes.AutoregressiveFlow(2, 1, hidden=[4]).double().eval()
    before = imputer(method=imputation.ImportanceResampling(7, codes.Flowed(codes.amortised, flow)))
    bae.save(before, tmp_path / "file")
    other = bae.load(tmp_path / "file").method.proposal.flow
    assert not other.training and other.state_dict().keys() == flow.state_dict().keys()
    assert all(torch.equal(other.state_dict()[name], leaf) for name, leaf in flow.state_dict().items())


@pytest.mark.parametrize(
    "kwargs",
    [
        {"weights": bae.weights.Ensemble(2, epochs=1)},
        {"weights": bae.weights.MeanField(epochs=2)},
        {"likelihood": bae.likelihoods.Gaussian(per_output=True), "standardise": False},
    ],
    ids=["ensemble", "mean field", "likelihood"],
)
def test_with_other_arguments_too(kwargs, tmp_path):
    before = imputer(**kwargs)
    bae.save(before, tmp_path / "file")
    after = bae.load(tmp_path / "file")
    assert np.array_equal(before.sample(TABLE), after.sample(TABLE))
    assert np.array_equal(before.fit(TABLE).transform(TABLE), after.fit(TABLE).transform(TABLE))


def test_what_transform_gives_is_as_it_was_set(tmp_path):
    before = imputer().set_output(transform="default")
    bae.save(before, tmp_path / "file")
    after = bae.load(tmp_path / "file")
    assert vars(after)["_sklearn_output_config"] == {"transform": "default"}
    assert files.describe(tmp_path / "file")["output"] == "default"
    other = bae.BayesianAutoencoder(hidden=[4], epochs=1, random_state=0).fit(ROWS)
    bae.save(other.set_output(transform="default"), tmp_path / "other")
    assert vars(bae.load(tmp_path / "other"))["_sklearn_output_config"] == {"transform": "default"}


TABLES = in_files._METHODS | in_files._SAMPLERS


@pytest.mark.parametrize(("cls", "kinds"), list(TABLES.items()), ids=lambda value: getattr(value, "__name__", ""))
def test_the_table_has_every_field(cls, kinds):
    assert list(kinds) == [field.name for field in dataclasses.fields(cls) if field.init]


def test_the_table_has_every_method():
    public = [getattr(imputation, name) for name in imputation.__all__]
    known = [one for one in public if dataclasses.is_dataclass(one) and hasattr(one, "n_parallel")]
    assert set(known) == set(in_files._METHODS)


@dataclasses.dataclass(frozen=True)
class MyMethod(imputation.CodeLaplace):
    """Somebody's own."""


def test_what_has_no_name_in_a_file_is_named(tmp_path):
    before = imputer(method=MyMethod())
    with pytest.raises(UnsupportedError, match=r"CodeHMC as method; got MyMethod. Call set_params\(method=None\)"):
        bae.save(before, tmp_path / "file")
    proposal = codes.Consistent(codes.amortised, abs)
    before.set_params(method=imputation.ImportanceResampling(5, proposal))
    with pytest.raises(UnsupportedError, match=r"method\.proposal; got Consistent. Call set_params"):
        bae.save(before, tmp_path / "file")
    bae.save(before.set_params(method=None), tmp_path / "file")  # the advice is sound
    assert np.array_equal(bae.load(tmp_path / "file").transform(TABLE), before.transform(TABLE))


HOSTILE = {
    "a method of code": (("arguments", "method"), as_skeleton({"name": "os", "fields": {}})),
    "a code for a method": (("arguments", "method"), as_skeleton({"name": "Laplace", "fields": {}})),
    "a method of words": (("arguments", "method"), "CodeHMC"),
    "a proposal for a method": (("arguments", "method"), "encode"),
    "no method": (("arguments",), as_skeleton({"n_draws": 3})),
    "steps of words": (("arguments", "method", "fields", "n_steps"), "many"),
    "no steps": (("arguments", "method", "fields", "n_steps"), 0),
    "a whitening of no code": (
        ("arguments", "method", "fields", "hmc", "fields", "whitening"),
        as_skeleton({"name": "CodeLaplace", "fields": {"n_steps": 2}}),
    ),
    "a sampler for a method": (("arguments", "method", "name"), "HMC"),
    "a container of code": (("output",), "os"),
    "a container that is a list": (("output",), as_skeleton([])),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_methods_are_refused(name, tmp_path):
    bae.save(imputer(method=METHODS["CodeHMC"]), tmp_path / "file")
    path, value = HOSTILE[name]

    def change(metadata):
        container, key = value_of(metadata, *path)
        container[key] = value

    whole = (tmp_path / "file").read_bytes()
    (tmp_path / "file").write_bytes(with_tree(whole, change))
    with pytest.raises(BayesAEError):
        bae.load(tmp_path / "file")


def test_a_container_of_a_detector_is_refused(tmp_path):
    bae.save(bae.BayesianOutlierDetector(hidden=[4], epochs=1, random_state=0).fit(ROWS), tmp_path / "file")

    def change(metadata):
        container, key = value_of(metadata, "output")
        container[key] = "pandas"

    (tmp_path / "file").write_bytes(with_tree((tmp_path / "file").read_bytes(), change))
    with pytest.raises(BayesAEError):
        bae.load(tmp_path / "file")
