"""Few labels: do draws of the code, or the unlabelled rows, make more of 1, 10 or 100 labels a class?

Data: scikit-learn's digits (embedded), or with ``--full`` 10,000 images; 1, 10 and 100 labels a class, in several
random choices of the labelled rows for each seed.

Codes are learnt without labels: a plain autoencoder, a VAE, a Variational Laplace autoencoder; and after the fact a
Laplace posterior over the plain autoencoder's weights (linearised or run as networks), or over the code of plain
autoencoder and VAE. Labels come in afterwards: nearest neighbours and a linear probe on code means or on draws of the
code (each labelled row K times; test probabilities averaged over K draws). Neighbours and the probe's penalty are
chosen by two-fold cross-validation within the labelled rows. Last, networks that take labels as their context
classify by Bayes' rule with log p(x | y), trained on the labelled rows alone or on all rows with labels drawn for the
others. The table has accuracy, the negative log-likelihood of the test labels and the calibration error of their
probabilities.

Expected on the digits (checked at the end, means of three seeds, in CLAIMS): in two dimensions draws of a linearised
weight posterior gain 0.02 of accuracy over the plain code at 10 labels a class and the same weights run as networks
lose 0.06; the Laplace posterior of the code gains 0.04 to 0.05. In eight dimensions nothing beats the pixels by much,
and draws of a VAE's code lose 0.07 at one label. Unlabelled rows under labels drawn for them gain 0.13 at one label a
class, unsteadily.
Runtime: digits five minutes of one core a seed; ``--fast`` ten seconds.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from labelled_codes import N_CLASSES, Codes, classify, scores, subset
from torch import Tensor, nn

import bayesae as bae
from bayesae import codes, evaluation, objectives, report

METRICS = ("accuracy", "NLL", "ECE")
CANDIDATES = {"neighbours": (1, 3, 10, 30), "probe": (1, 10, 100)}
# the code of a row under a wrong label is badly determined; no label is then close to the right one
warnings.filterwarnings("ignore", "the effective sample size is near", RuntimeWarning)


@dataclass(frozen=True)
class Config:
    """One data set, and what is fixed before any label is seen.

    Args:
        data: Name.
        hidden: Widths of the encoder's layers, the decoder's in reverse.
        epochs: Passes over the rows without labels.
        n_train: Rows, all if None.
        n_test: Rows, all if None.
        n_latents: Sizes of the code; the networks that take labels have the last.
        n_labels: Labels a class.
        n_subsets: Random choices of the labelled rows, for each number of labels.
        n_subsets_bayes: As many of them for the networks that take labels.
        n_draws: K, draws of the code of a row.
        candidates: Neighbours, and C of the probe (the inverse of its penalty), of which two-fold cross-validation
            within the labelled rows chooses; of one label a class the first is taken.
        n_steps: Training steps on labelled rows alone.
        n_rounds: Times that labels are drawn for the unlabelled rows.
        epochs_a_round: Passes over all rows under these labels.
        n_importance: Draws of the code for log p(x | y).
        learning_rate: Of Adam.
        batch_size: Rows a step.
    """

    data: str
    hidden: tuple[int, ...]
    epochs: int
    n_train: int | None = None
    n_test: int | None = None
    n_latents: tuple[int, ...] = (2, 8)
    n_labels: tuple[int, ...] = (1, 10, 100)
    n_subsets: tuple[int, ...] = (10, 5, 2)
    n_subsets_bayes: int = 2
    n_draws: int = 5
    candidates: Mapping[str, tuple[float, ...]] = field(default_factory=lambda: dict(CANDIDATES))
    n_steps: int = 400
    n_rounds: int = 10
    epochs_a_round: int = 3
    n_importance: int = 64
    learning_rate: float = 3e-3
    batch_size: int = 128


DIGITS = Config("digits", (64, 64), 80)
IMAGES = Config("mnist", (200, 200), 20, 10_000, 1000)
FAST = Config(
    "digits", (16,), 2, 400, 60, (2,), (1, 10), (2, 1), 1, 3, n_steps=5, n_rounds=1, epochs_a_round=1, n_importance=8
)


def network(
    config: Config, n_latents: int, n_pixels: int, size: int, seed: int, scale: float | None = None
) -> bae.Autoencoder:
    """Of ``size`` numbers a code dimension from the encoder; with a noise scale the networks take labels."""
    torch.manual_seed(seed)
    n_more = 0 if scale is None else N_CLASSES
    shape = n_latents if size == 1 else (n_latents, size)
    decoder = bae.nets.mlp(n_latents + n_more, config.hidden[::-1], n_pixels, activation=nn.ReLU)
    encoder = bae.nets.mlp(n_pixels + n_more, config.hidden, shape, activation=nn.ReLU)
    likelihood = bae.likelihoods.Gaussian(scale)
    if scale is None:
        return bae.Autoencoder(encoder, decoder, likelihood)
    encoder, decoder = (bae.nets.Conditional(part, N_CLASSES) for part in (encoder, decoder))
    return bae.Autoencoder(encoder, decoder, likelihood, data_shape=(n_pixels,))


def by_codes(
    model: bae.Autoencoder, posterior: codes.CodePosterior, train: Tensor, test: Tensor, n_draws: int, seed: int
) -> list[Codes]:
    """Means and draws of a Normal posterior over the code."""
    means, draws = [], []
    # noise is keyed on the row's number: the two sets must not share it
    for number, rows in enumerate((train, test)):
        batch = bae.Batch(rows)
        with torch.no_grad(), bae.random.scope(2 * seed + number):
            means.append(codes.law_of(posterior, model.live(), batch).loc)
            draws.append(posterior(model.live(), batch, n_latent_draws=n_draws).latents[:, 0])
    return [Codes(*means), Codes(*draws)]


def by_weights(model: bae.Autoencoder, train: Tensor, test: Tensor, n_draws: int, seed: int) -> dict[str, Codes]:
    """Codes under draws of the weights, linearised in them and by running the networks."""
    weights = bae.fit_weights(bae.weights.Laplace(), model, train, seed=seed)
    found = {}
    for name, linearised in (("", True), (", run as networks", False)):
        predictive = bae.Predictive(model, weights, linearised=linearised)
        # one call, so that all rows meet the same weights
        latents = predictive(torch.cat([train, test]), n_weight_draws=n_draws, seed=seed).latents[0]
        first, second = latents.split([len(train), len(test)], 1)
        found[f"AE, Laplace over weights{name}: draws"] = Codes(first, second)
    return found


def represent(config: Config, n_latents: int, train: Tensor, test: Tensor, seed: int) -> tuple[dict[str, Codes], float]:
    """All codes, none of which has seen a label; and the noise scale of the VAE."""
    found = {"pixels": Codes(train[None], test[None])}
    settings = {"epochs": config.epochs, "batch_size": config.batch_size, "learning_rate": config.learning_rate}
    n_pixels = train.shape[1]
    plain = network(config, n_latents, n_pixels, 1, seed)
    bae.fit_model(plain, train, seed=seed, **settings)
    vae = network(config, n_latents, n_pixels, 2, seed)
    bae.fit_model(vae, train, objective=objectives.elbo, codes=codes.amortised, seed=seed, **settings)
    through = network(config, n_latents, n_pixels, 1, seed)
    bae.fit_model(through, train, objective=objectives.elbo, codes=codes.Laplace(1), seed=seed, **settings)
    after = codes.Laplace(16)
    posteriors = {
        "VAE": (vae, codes.amortised),
        "Variational Laplace": (through, codes.Laplace(1)),
        "AE, Laplace over code": (plain, after),
        "VAE, Laplace over code": (vae, after),
    }
    with torch.no_grad():
        found["AE"] = Codes(plain.live().encode(train), plain.live().encode(test))
    found |= by_weights(plain, train, test, config.n_draws, seed)
    for name, (model, posterior) in posteriors.items():
        means, draws = by_codes(model, posterior, train, test, config.n_draws, seed)
        found |= {f"{name}: means": means, f"{name}: draws": draws}
    return found, float(vae.likelihood.variance(train[:1]).mean()) ** 0.5


def label_evidence(
    model: bae.Autoencoder, x: Tensor, posterior: codes.CodePosterior, n_draws: int, seed: int
) -> Tensor:
    """Log p(x | y) for every label, (N, C); one draw gives a bound. Labels share the noise."""
    values = []
    for label in range(N_CLASSES):
        batch = bae.Batch(x, context=torch.full((len(x),), float(label)))
        settings: dict[str, Any] = {"codes": posterior, "n_latent_draws": n_draws, "seed": seed, "progress": False}
        values.append(evaluation.log_evidence(model, batch, **settings).log_evidence[0])
    return torch.stack(values, -1).double()  # nats apart, whose exponentials are no float32


def by_bayes(
    config: Config, scale: float, train: Tensor, test: Tensor, rows: Tensor, y: Tensor, seed: int
) -> dict[str, Tensor]:
    """Probabilities by Bayes' rule under a conditional VAE of labelled rows, and of all rows with labels drawn."""
    model = network(config, config.n_latents[-1], train.shape[1], 2, seed, scale)
    settings: dict[str, Any] = {"batch_size": config.batch_size, "learning_rate": config.learning_rate}
    settings |= {"objective": objectives.elbo, "codes": codes.amortised}
    x, y = train[rows], y.float()
    epochs = math.ceil(config.n_steps / math.ceil(len(rows) / config.batch_size))
    bae.fit_model(model, bae.Batch(x, context=y), epochs=epochs, seed=seed, **settings)
    proposal, n = codes.Laplace(4), config.n_importance
    found = {"conditional VAE, labelled rows": label_evidence(model, test, proposal, n, seed).softmax(-1)}
    is_free = torch.ones(len(train), dtype=torch.bool)
    is_free[rows] = False
    free = train[is_free]
    for number in range(config.n_rounds):
        logits = label_evidence(model, free, codes.amortised, 1, number)
        with bae.random.scope(number):
            drawn = torch.distributions.Categorical(logits=logits).sample()
        everything = bae.Batch(torch.cat([x, free]), context=torch.cat([y, drawn.float()]))
        bae.fit_model(model, everything, epochs=config.epochs_a_round, seed=number, **settings)
    return found | {"M2, all rows": label_evidence(model, test, proposal, n, seed).softmax(-1)}


def run(config: Config, seed: int, records: report.Records, methods: Sequence[str] | None) -> dict[str, Codes]:
    """Everything of one seed; gives the codes of the smallest size."""

    def is_wanted(method: str) -> bool:
        return methods is None or method in methods

    splits = bae.datasets.load(config.data, split=("train", "test"), labels=True)
    (train, y), (test, y_test) = (
        (x[:n].flatten(1), y[:n]) for (x, y), n in zip(splits, (config.n_train, config.n_test), strict=True)
    )
    first: dict[str, Codes] = {}

    def add(setting: str, method: str, n: int, found: Sequence[dict[str, float]]) -> None:
        where = {"data": config.data, "setting": setting, "method": method, "seed": seed}
        for metric in found[0]:
            values = torch.tensor([one[metric] for one in found])
            records.add(metric=f"{metric} {n}", value=float(values.mean()), **where)
            if len(values) > 1:
                records.add(metric=f"{metric} {n}, sd over subsets", value=float(values.std()), **where)

    scale = 0.0
    for n_latents in config.n_latents:
        represented, scale = represent(config, n_latents, train, test, seed)
        first = first or represented
        for n, n_subsets in zip(config.n_labels, config.n_subsets, strict=True):
            chosen = [subset(y, n, 100 * seed + number) for number in range(n_subsets)]
            for method, given in ((name, one) for name, one in represented.items() if is_wanted(name)):
                for kind, values in config.candidates.items():
                    found = [scores(classify(values, kind, given, rows, y[rows]), y_test) for rows in chosen]
                    add(f"code {n_latents}, {kind}", method, n, found)
    for n in config.n_labels if any(map(is_wanted, BAYES)) else ():
        chosen = [subset(y, n, 100 * seed + number) for number in range(config.n_subsets_bayes)]
        by_subset = [by_bayes(config, scale, train, test, rows, y[rows], seed) for rows in chosen]
        for method in filter(is_wanted, by_subset[0]):
            add(f"code {config.n_latents[-1]}, Bayes", method, n, [scores(p[method], y_test) for p in by_subset])
    return first


SCATTERS = {"AE, Laplace over weights: draws": "AE", "AE, Laplace over code: draws": "AE, Laplace over code: means",
            "VAE: draws": "VAE: means"}  # fmt: skip
LINES = {
    "pixels": ("black", ":"), "AE": ("tab:blue", "--"), "AE, Laplace over weights: draws": ("tab:blue", "-"),
    "VAE: means": ("tab:green", "--"), "VAE: draws": ("tab:green", "-"),
    "Variational Laplace: means": ("tab:orange", "--"), "Variational Laplace: draws": ("tab:orange", "-"),
}  # fmt: skip
BAYES = {"conditional VAE, labelled rows": ("tab:red", "--"), "M2, all rows": ("tab:red", "-")}


def draw(config: Config, first: dict[str, Codes], records: report.Records, path: Path) -> None:
    """Draws of the code of one labelled row a class over the codes of the test rows; scores over labels a class."""
    train, test = bae.datasets.load(config.data, split=("train", "test"), labels=True)
    figure, grid = plt.subplots(2, 3, figsize=(14, 9.5), layout="constrained")
    rows, colours = subset(train[1][: config.n_train], 1, 0), plt.get_cmap("tab10")
    for axes, (name, mean) in zip(grid[0], SCATTERS.items(), strict=True):
        given = first[name]
        centres = first[mean].test[0]
        axes.scatter(*centres.T, c=test[1][: config.n_test], cmap=colours, vmin=0, vmax=9, s=6, alpha=0.25)
        axes.set(title=name, xlabel="$z_1$", ylabel="$z_2$", xlim=axes.get_xlim(), ylim=axes.get_ylim())
        for label, row in enumerate(rows):
            axes.plot(*given.train[:, row].T, ".", color=colours(label), markersize=6, markeredgecolor="black", mew=0.4)
    small, large = f"code {config.n_latents[0]}, ", f"code {config.n_latents[-1]}, "
    panels = ((small + "neighbours", "accuracy"), (large + "probe", "accuracy"), (large + "probe", "NLL"))
    for axes, (setting, metric) in zip(grid[1], panels, strict=True):
        curves = [(setting, name, style) for name, style in LINES.items()]
        if setting == large + "probe":
            curves += [(large + "Bayes", name, style) for name, style in BAYES.items()]
        for where, name, (colour, style) in curves:
            values = [records.mean(setting=where, method=name, metric=f"{metric} {n}") for n in config.n_labels]
            values = [1 - value for value in values] if metric == "accuracy" else values
            axes.plot(config.n_labels, values, style, color=colour, marker=".", label=name)
        axes.set(title=setting, xlabel="labels a class", xscale="log", yscale="log")
        axes.set_ylabel("share of test rows wrong" if metric == "accuracy" else "NLL of the label (nats a row)")
        axes.set_xticks(config.n_labels, [str(n) for n in config.n_labels])
    figure.legend(*grid[1, 1].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    figure.suptitle(f"{config.n_draws} draws of the code of ten training rows over the mean codes of test rows (above)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"figure: {path}")


WEIGHTS, CODE, BAYES_ROWS = "AE, Laplace over weights", "AE, Laplace over code", tuple(BAYES)
CLAIMS = [
    # setting, metric, method, over, difference, tolerance
    ("code 2, neighbours", "accuracy 10", f"{WEIGHTS}: draws", "AE", 0.015, 0.02),
    ("code 2, neighbours", "accuracy 10", f"{WEIGHTS}, run as networks: draws", "AE", -0.04, 0.035),
    ("code 2, neighbours", "accuracy 10", f"{CODE}: means", "AE", 0.05, 0.03),
    ("code 2, neighbours", "accuracy 10", f"{CODE}: draws", f"{CODE}: means", 0.01, 0.02),
    ("code 8, neighbours", "accuracy 1", "VAE: draws", "VAE: means", -0.07, 0.04),
    ("code 8, probe", "NLL 10", f"{WEIGHTS}: draws", "AE", -0.005, 0.03),
    ("code 8, probe", "NLL 10", f"{CODE}: draws", f"{CODE}: means", -0.005, 0.03),
    ("code 8, Bayes", "accuracy 1", BAYES_ROWS[1], BAYES_ROWS[0], 0.13, 0.1),
]


def judge(records: report.Records) -> None:
    """Check every claim, means over seeds."""
    for setting, metric, method, over, difference, tolerance in CLAIMS:
        where = {"data": DIGITS.data, "setting": setting, "metric": metric}
        value = records.mean(method=method, **where) - records.mean(method=over, **where)
        claim = {"setting": f"claim, {setting}", "method": f"{method} over {over}", "metric": metric}
        records.add(data=DIGITS.data, seed=0, value=value, **claim)
        records.expect(difference, tolerance, **claim)
    for method, value in {BAYES_ROWS[0]: 0.915, BAYES_ROWS[1]: 0.93}.items():
        records.expect(value, 0.025, data=DIGITS.data, method=method, metric="accuracy 10")
    records.expect(0.89, 0.025, data=DIGITS.data, setting="code 8, probe", method="pixels", metric="accuracy 10")


def main() -> None:
    """Run the data sets, print the tables, write records and the figure, check the numbers."""
    flags = report.flags(__doc__, seeds=(0, 1, 2), has_full=True)
    configs = [FAST] if flags.fast else [DIGITS, *([IMAGES] if flags.full else [])]
    records = report.Records()
    for config in configs:
        first = [run(config, seed, records, flags.methods) for seed in flags.seeds][-1]
        if flags.json:
            records.save(flags.json, keeps_others=True)
        if config is configs[0] and flags.methods is None:
            draw(config, first, records, flags.figures / "few_labels.png")
    for kind, metrics in {"neighbours": ("accuracy",), "probe": METRICS, "Bayes": METRICS}.items():
        settings = list(dict.fromkeys(row.setting for row in records.rows if row.setting.endswith(kind)))
        if settings:
            shown = [f"{metric} {n}" for metric in metrics for n in configs[0].n_labels]
            print(report.table(records, metrics=shown, settings=settings), end="\n\n")
    if not flags.fast and flags.methods is None:
        judge(records)


if __name__ == "__main__":
    main()
