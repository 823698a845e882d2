"""Strange rows of tables: our defaults beside PyOD's autoencoders and scikit-learn's detectors, on 13 ADBench tables.

Data: the tables of ``bayesae.datasets.load("adbench/...")``. Half of the normal rows train, the other half and all
anomalies test; rows with equal values fall on one side. A seed sets the split and every method's own randomness.
Everybody runs with the defaults of their release and sees what their documentation asks for: ours, PyOD's two (which
standardise by themselves) and the isolation forest the table as it is, the local outlier factor standardised columns,
because it measures distances. No method sees a test row or a label.

Our noise model, posterior and code size were chosen with held-out normal training rows in view. But an early prototype
was compared with others by the test labels of six tables (breastw, cardio, ionosphere, wdbc, thyroid, wilt), and its
scales by column, one hidden layer and learning rate were kept: ranks are therefore given on the other seven tables too.

Methods: ``BayesianOutlierDetector()`` is minus the log predictive density with a noise scale for every column and the
weights' variance; "bayesae, Gaussian noise" the same with Gaussian in place of Student-t noise. Two ablations score
with the *same trained network* as the first: "bayesae, weights known" leaves the weights' variance out, and "bayesae,
plain error" is the squared error of the scaled columns, the usual score of an autoencoder. PyOD's ``AutoEncoder`` and
``VAE``, scikit-learn's ``IsolationForest`` and ``LocalOutlierFactor(novelty=True)``.

Measures: AUROC and average precision (AUPR) of anomalies against normal test rows, seconds of fitting and scoring (of
the shared network in the row of ours), and mean ranks over the tables (1 is best, ties share) among our default and
the peers, with a 95 % interval from resampling tables; the ends are averaged over seeds. Our other scores are ranked in
the default's place.

Run: ``python -m benchmarks.adbench --json benchmarks/results/adbench.json`` with ``BAYESAE_DATA`` set, PyOD by
``pip install pyod``. ``--fast`` takes three small tables and one seed; ``--methods`` only some.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.ensemble import IsolationForest
from sklearn.neighbors import LocalOutlierFactor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import bayesae as bae
from bayesae import report
from bayesae.datasets.adbench import TABLES

SMALL = ("adbench/breastw", "adbench/ionosphere", "adbench/wdbc")
# tables whose test labels were looked at while the estimator was made: a first prototype was compared on them
SEEN = ("breastw", "cardio", "ionosphere", "wdbc", "thyroid", "wilt")
SETS = {
    "all tables": tuple(TABLES),
    "tables never looked at": tuple(table for table in TABLES if table.removeprefix("adbench/") not in SEEN),
}
N_RESAMPLES = 1000


class Run(NamedTuple):
    """What one contender gave: scores of the test rows by method (higher = stranger), and seconds of both steps."""

    scores: dict[str, np.ndarray]
    fit_s: float
    score_s: float


Contender = Callable[[np.ndarray, np.ndarray, int], Run]


def ours(train: np.ndarray, test: np.ndarray, seed: int) -> Run:
    """The estimator with its defaults, and two plainer scores of the network that it trained."""
    start = time.perf_counter()
    detector = bae.BayesianOutlierDetector(random_state=seed).fit(train)
    fitted = time.perf_counter()
    scores = detector.anomaly_score(test)
    scored = time.perf_counter()
    rows = torch.from_numpy((test - detector.mean_) / detector.scale_)
    with torch.no_grad():
        outputs = detector.model_(rows)
        known = -detector.model_.likelihood.log_prob(outputs, rows)
        error = ((outputs - rows) ** 2).sum(1)
    methods = {"bayesae": scores, "bayesae, weights known": known.numpy(), "bayesae, plain error": error.numpy()}
    return Run(methods, fitted - start, scored - fitted)


def gaussian(train: np.ndarray, test: np.ndarray, seed: int) -> Run:
    """The estimator with Gaussian noise, one scale a column and no other change."""
    noise = bae.likelihoods.Gaussian(per_output=True, floor=0.01)
    start = time.perf_counter()
    detector = bae.BayesianOutlierDetector(likelihood=noise, random_state=seed).fit(train)
    fitted = time.perf_counter()
    scores = detector.anomaly_score(test)
    return Run({"bayesae, Gaussian noise": scores}, fitted - start, time.perf_counter() - fitted)


def pyod(name: str, module: str) -> Contender:
    """One of PyOD's detectors, imported when it runs; its ``decision_function`` is high for outliers."""

    def run(train: np.ndarray, test: np.ndarray, seed: int) -> Run:
        from importlib import import_module

        kind = getattr(import_module(f"pyod.models.{module}"), name)
        return timed(f"PyOD {name}", kind(random_state=seed, verbose=0), train, test, sign=1)

    return run


def forest(train: np.ndarray, test: np.ndarray, seed: int) -> Run:
    """scikit-learn's isolation forest, on the table as it is."""
    return timed("IsolationForest", IsolationForest(random_state=seed), train, test, sign=-1)


def local_outlier_factor(train: np.ndarray, test: np.ndarray, seed: int) -> Run:
    """scikit-learn's local outlier factor, on standardised columns; nothing random."""
    model = make_pipeline(StandardScaler(), LocalOutlierFactor(novelty=True))
    return timed("LocalOutlierFactor", model, train, test, sign=-1)


def timed(name: str, model: Any, train: np.ndarray, test: np.ndarray, *, sign: int) -> Run:  # noqa: ANN401
    """Fit and score; ``sign`` turns scores so that higher = stranger."""
    start = time.perf_counter()
    model.fit(train)
    fitted = time.perf_counter()
    scores = sign * np.asarray(model.decision_function(test))
    return Run({name: scores}, fitted - start, time.perf_counter() - fitted)


CONTENDERS: dict[str, Contender] = {
    "bayesae": ours,
    "bayesae, Gaussian noise": gaussian,
    "PyOD AutoEncoder": pyod("AutoEncoder", "auto_encoder"),
    "PyOD VAE": pyod("VAE", "vae"),
    "IsolationForest": forest,
    "LocalOutlierFactor": local_outlier_factor,
}


def measure(table: str, seed: int, contenders: Sequence[str], records: report.Records) -> dict[str, str]:
    """Records of one table and seed; why a contender is missing, by name."""
    (train, _), (test, labels) = bae.datasets.load(table, split=("train", "test"), labels=True, seed=seed)
    missing = {}
    for contender in contenders:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of peers, about their own dependencies
                run = CONTENDERS[contender](train.numpy(), test.numpy(), seed)
        except ImportError as error:
            missing[contender] = f"{error}: pip install pyod"
            continue
        for method, values in run.scores.items():
            scores = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float64))
            found = {
                "AUROC": bae.metrics.auroc(scores[labels == 0], scores[labels == 1]),
                "AUPR": bae.metrics.aupr(scores[labels == 0], scores[labels == 1]),
            }
            if method == contender:
                found |= {"fit s": run.fit_s, "score s": run.score_s}
            for metric, value in found.items():
                records.add(data=table, setting="", method=method, metric=metric, seed=seed, value=value)
    return missing


def add_ranks(records: report.Records) -> None:
    """Mean ranks over tables of every seed, with the interval that resampling tables gives.

    The field is our default and the peers; another of our scores is ranked in the default's place, so that no method
    gains by having sisters.
    """
    tables = list(dict.fromkeys(row.data for row in records.rows if row.data not in SETS))
    for name, chosen in SETS.items():
        some = [table for table in tables if table in chosen]
        for seed in dict.fromkeys(row.seed for row in records.rows):
            for metric in ("AUROC", "AUPR"):
                values = {
                    (row.data, row.method): row.value
                    for row in records.rows
                    if row.seed == seed and row.metric == metric and row.data in some
                }
                methods = list(dict.fromkeys(method for _, method in values))
                methods = [method for method in methods if all((table, method) in values for table in some)]
                peers = [method for method in methods if not method.startswith("bayesae")]
                for method in methods:
                    field = [method if method not in peers else "bayesae", *(peer for peer in peers if peer != method)]
                    field = [method, *(one for one in field if one != method and one in methods)]
                    ranks = mean_ranks(np.array([[values[table, one] for one in field] for table in some]))[:, 0]
                    resampled = np.random.RandomState(0).randint(len(some), size=(N_RESAMPLES, len(some)))
                    low, high = np.quantile(ranks[resampled].mean(1), [0.025, 0.975])
                    mean = float(np.mean([values[table, method] for table in some]))
                    found = {f"{metric} rank": ranks.mean(), "low": low, "high": high, metric: mean}
                    for key, value in found.items():
                        key = f"{metric} rank {key}" if key in {"low", "high"} else key
                        records.add(data=name, setting="", method=method, metric=key, seed=seed, value=value)


def mean_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks of every row's numbers, 1 for the largest; equal ones share the mean of their places."""
    larger = (values[:, None, :] > values[:, :, None]).sum(2)
    equal = (values[:, None, :] == values[:, :, None]).sum(2)
    return larger + (equal + 1) / 2


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its tables."""
    flags = report.flags(__doc__, seeds=(0, 1, 2), argv=argv)
    torch.set_num_threads(1)  # small networks: a second thread costs more than it brings
    contenders = [name for name in CONTENDERS if flags.methods is None or name in flags.methods]
    tables, seeds = (SMALL, flags.seeds[:1]) if flags.fast else (tuple(TABLES), flags.seeds)
    records, missing = report.Records(), {}
    for table in tables:
        for seed in seeds:
            missing |= measure(table, seed, contenders, records)
            print(f"{table} seed {seed} done", flush=True)
        if flags.json and not flags.methods:  # an hour's work is not lost
            records.save(flags.json)
    for name, reason in missing.items():
        print(f"left out: {name} ({reason})")
    if flags.json and flags.methods and flags.json.exists():  # others keep their numbers; ranks are of all
        kept = [row for row in report.Records.load(flags.json).rows if row.data not in SETS]
        records = report.Records(({row.key: row for row in kept} | {row.key: row for row in records.rows}).values())
    add_ranks(records)
    overall = report.Records(row for row in records.rows if row.data in SETS)
    single = report.Records(row for row in records.rows if row.data not in SETS)
    for metric in ("AUROC", "AUPR", "fit s", "score s"):
        print(f"\n{metric}\n{report.table(single, metrics=[metric], columns='method')}")
    print(f"\nranks\n{report.table(overall)}")
    if flags.json:
        records.save(flags.json)


if __name__ == "__main__":
    main()
