"""Missing entries of tables: how near are means, how sharp and how honest are draws, against scikit-learn's imputers?

Data: the UCI tables of `datasets.load`, all but boston, features only; 1,000 rows of each, drawn by the seed, columns
standardised. Entries are hidden completely at random (MCAR, 20, 50 and 80 %), and at random (MAR, 50 %): a third of the
columns stays as it is, and half of the others' entries are hidden by a logistic law of random combinations of these.
Every row keeps one entry. The incomplete table is imputed by itself, and only hidden entries are scored, against what
stood there.

Methods: the column's mean; ``KNNImputer``; ``IterativeImputer``; the same with ``sample_posterior=True``, 19 times
("iterative, draws"); ``BayesianImputer`` ("one network"); and three of these, trained apart, their draws pooled
("ensemble": weights are uncertain, and so are held-out rows and the noise fitted on them). Measured: root mean squared
error of the mean; CRPS, the fair one of draws, or the absolute error of a method that has but one value; coverage of
90 % intervals from draws, and their mean width.

Target: the best CRPS on most tables; the last table says on how many each method has it.
Runtime: ``--fast`` (scikit-learn's wine, 178 rows) under a minute of one core.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_wine
from sklearn.exceptions import ConvergenceWarning
from sklearn.experimental import enable_iterative_imputer  # noqa: F401 - makes the next import possible
from sklearn.impute import IterativeImputer, KNNImputer, SimpleImputer

import bayesae as bae
from bayesae import metrics, report


@dataclass(frozen=True)
class Config:
    """One table."""

    data: str
    n_rows: int = 1_000
    epochs: int = 300
    n_members: int = 3
    n_draws: int = 99
    n_chained: int = 19
    n_rounds: int = 10
    settings: tuple[tuple[str, float], ...] = (("MCAR", 0.2), ("MCAR", 0.5), ("MCAR", 0.8), ("MAR", 0.5))


KNOWN = {name: Config(name) for name in bae.datasets.NAMES if name.startswith("uci/")}
FAST = Config("wine", epochs=30, n_members=2, n_rounds=2, settings=(("MCAR", 0.5),))
SUMMARY = "all settings"
METHODS = ("mean", "KNN", "iterative", "iterative, draws", "one network", "ensemble")


def rows_of(config: Config, seed: int) -> np.ndarray:
    """Standardised columns of a table; those that never vary are left out."""
    if config.data == "wine":
        table = np.asarray(load_wine(return_X_y=True)[0])
    else:
        number = None if config.data == "uci/miniboone" else 0
        table = torch.cat(bae.datasets.load(config.data, split=("train", "test"), seed=number)).numpy()
    chosen = np.random.RandomState(seed).permutation(len(table))[: config.n_rows]
    table = table[np.sort(chosen)]
    table = table[:, table.std(0) > 0]
    return (table - table.mean(0)) / table.std(0)


def hidden(table: np.ndarray, kind: str, rate: float, seed: int) -> np.ndarray:
    """Which entries are hidden, (N, D); one of every row is not."""
    generator, (n_rows, n_columns) = np.random.RandomState(1000 + seed), table.shape
    level = generator.rand(n_rows, n_columns)
    if kind == "MCAR":
        found = level < rate
    else:
        seen = np.sort(generator.permutation(n_columns)[: max(1, n_columns // 3)])
        score = table[:, seen] @ generator.randn(len(seen), n_columns)
        score /= score.std(0) + 1e-12
        low, high = -20.0, 20.0
        for _ in range(60):  # the offset at which the mean probability is the rate
            middle = 0.5 * (low + high)
            low, high = (middle, high) if expit(1.5 * score + middle).mean() < rate else (low, middle)
        found = level < expit(1.5 * score + low)
        found[:, seen] = False
    found[np.arange(n_rows), generator.randint(n_columns, size=n_rows)] &= ~found.all(1)
    return found


def expit(x: np.ndarray) -> np.ndarray:
    """The logistic function."""
    return 1 / (1 + np.exp(-x))


Imputation = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray | None]]


def imputers(config: Config, seed: int) -> dict[str, Imputation]:
    """From an incomplete table to means, and draws (M, N, D) where a method has them."""

    def one_value(imputer: SimpleImputer | KNNImputer | IterativeImputer) -> Imputation:
        return lambda table: (np.asarray(imputer.fit_transform(table)), None)

    def chained(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        seeds = range(1000 * seed, 1000 * seed + config.n_chained)
        made = (IterativeImputer(sample_posterior=True, max_iter=config.n_rounds, random_state=one) for one in seeds)
        draws = np.stack([np.asarray(imputer.fit_transform(table)) for imputer in made])
        return draws.mean(0), draws

    members: list[tuple[np.ndarray, np.ndarray]] = []  # trained once for both

    def networks(table: np.ndarray, n_members: int) -> tuple[np.ndarray, np.ndarray]:
        while len(members) < n_members:
            number = 100 * seed + len(members)
            imputer = bae.BayesianImputer(epochs=config.epochs, random_state=number, n_draws=config.n_draws)
            members.append((imputer.fit_transform(table), imputer.sample(table)))
        means, draws = zip(*members[:n_members], strict=True)
        each = config.n_draws // n_members
        return np.mean(means, 0), np.concatenate([some[:: len(some) // each][:each] for some in draws])

    return {
        "mean": one_value(SimpleImputer()),
        "KNN": one_value(KNNImputer()),
        "iterative": one_value(IterativeImputer(max_iter=config.n_rounds, random_state=seed)),
        "iterative, draws": chained,
        "one network": lambda table: networks(table, 1),
        "ensemble": lambda table: networks(table, config.n_members),
    }


def scores(truth: np.ndarray, where: np.ndarray, mean: np.ndarray, draws: np.ndarray | None) -> dict[str, float]:
    """Of the hidden entries."""
    error = (mean - truth)[where]
    found = {"RMSE": float(np.sqrt((error**2).mean()))}
    if draws is None:
        return found | {"CRPS": float(np.abs(error).mean())}
    values = np.sort(draws[:, where], 0)
    crps = metrics.crps_of_draws(torch.from_numpy(values), torch.from_numpy(truth[where]), is_fair=True)
    place = round(0.05 * (len(values) + 1))
    low, high = values[place - 1], values[-place]
    inside = (low <= truth[where]) & (truth[where] <= high)
    return found | {
        "CRPS": float(crps.mean()),
        "coverage 90": float(inside.mean()),
        "width 90": float((high - low).mean()),
    }


def run(config: Config, flags: report.Flags, records: report.Records) -> None:
    """All methods on one table."""
    for seed in flags.seeds:
        table = rows_of(config, seed)
        for kind, rate in config.settings:
            where = hidden(table, kind, rate, seed)
            incomplete = np.where(where, np.nan, table)
            for name, impute in imputers(config, seed).items():
                if flags.methods is not None and name not in flags.methods:
                    continue
                start = time.process_time()
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", ConvergenceWarning)  # ten rounds are scikit-learn's default
                    mean, draws = impute(incomplete)
                setting = f"{kind} {100 * rate:g} %"
                found = scores(table, where, mean, draws) | {"seconds": time.process_time() - start}
                for metric, value in found.items():
                    records.add(data=config.data, setting=setting, method=name, metric=metric, seed=seed, value=value)
                print(f"{config.data}, {setting}, seed {seed}, {name}: {found}", flush=True)
            if flags.json:
                records.save(flags.json, keeps_others=True)


def summarise(records: report.Records) -> report.Records:
    """CRPS as a share of the column mean's, mean over settings and over tables; cells with the best CRPS."""
    cells: dict[tuple[str, str], dict[str, float]] = {}
    for data, setting in dict.fromkeys((row.data, row.setting) for row in records.rows):
        where = {"data": data, "setting": setting, "metric": "CRPS"}
        values = {name: records.values(method=name, **where) for name in METHODS}
        if all(values.values()):  # all methods have run
            cells[data, setting] = {name: statistics.fmean(found) for name, found in values.items()}
    found = report.Records()
    if not cells:
        return found
    tables = list(dict.fromkeys(data for data, _ in cells))
    for name in METHODS:
        shares = {
            table: [cell[name] / cell["mean"] for (data, _), cell in cells.items() if data == table] for table in tables
        }
        means = {table: statistics.fmean(values) for table, values in shares.items()}
        where: dict[str, Any] = {"setting": SUMMARY, "method": name, "seed": 0}
        for table, value in (means | {"all tables": statistics.fmean(means.values())}).items():
            found.add(data=table, metric="CRPS share", value=value, **where)
        n_best = sum(min(cell, key=cell.__getitem__) == name for cell in cells.values())
        found.add(data="all tables", metric=f"best of {len(cells)}", value=n_best, **where)
    return found


def draw(records: report.Records, path: Path) -> None:
    """CRPS relative to the column mean's, and coverage, by table and setting."""
    cells = list(dict.fromkeys((row.data, row.setting) for row in records.rows))
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(3 + 0.5 * len(cells), 8), layout="constrained", sharex=True)
    for number, name in enumerate(METHODS):
        where = [{"data": data, "setting": setting} for data, setting in cells]
        known = {row.key[:4] for row in records.rows}
        for axes, metric, base in ((top, "CRPS", "mean"), (bottom, "coverage 90", None)):
            places, values = [], []
            for place, one in enumerate(where):
                if (one["data"], one["setting"], name, metric) not in known:
                    continue
                value = records.mean(**one, method=name, metric=metric)
                places.append(place + 0.1 * (number - 2))
                values.append(value / records.mean(**one, method=base, metric=metric) if base else value)
            if values:
                axes.plot(places, values, "o", color=f"C{number}", label=name, markersize=5)
    bottom.axhline(0.9, color="grey", linewidth=0.8)
    bottom.set_xticks(range(len(cells)), [f"{data}\n{setting}" for data, setting in cells], rotation=90, fontsize=7)
    top.set_ylabel("CRPS, of the column mean's")
    bottom.set_ylabel("coverage of 90 % intervals")
    for axes in (top, bottom):
        axes.legend(frameon=False, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"figure: {path}")


def main() -> None:
    """Run the tables, print them, write records and the figure."""
    flags = report.flags(__doc__, data=tuple(KNOWN))
    configs = [FAST] if flags.fast else [KNOWN[name] for name in flags.data]
    records = report.Records()
    for config in configs:
        run(config, flags, records)
        of_table = report.Records([row for row in records.rows if row.data == config.data])
        if not of_table.rows:  # --methods none: what the file holds, summed up anew
            continue
        print(report.table(of_table, metrics=["RMSE", "CRPS", "coverage 90", "width 90"]), end="\n\n")
    every = report.Records.load(flags.json) if flags.json else records
    found = report.Records(row for row in every.rows if row.setting != SUMMARY)
    summary = summarise(found)
    if summary.rows:
        print(report.table(summary, columns="method"))
    if flags.json:
        summary.save(flags.json, keeps_others=True)
    draw(found, flags.figures / "impute_tables.png")


if __name__ == "__main__":
    main()
