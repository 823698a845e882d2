"""Every posterior over weights on one trained autoencoder: density, calibration, unfamiliar images, and the price.

Data: scikit-learn's digits 0 to 7 (embedded; 60 % train, 15 % validate, the rest test; unfamiliar are 8 and 9, mirrored
digits, and blends of two), or with ``--full`` also 10,000 images of Fashion-MNIST against MNIST (1,000 more validate,
2,000 test images of each). One network each, trained by `fit_model` (MAP); every method starts from it and has as many
passes over the data as its training had, but for ensembles, which train their members anew.

One score for all, named beforehand: `ood.negative_log_density`, minus the log predictive density with every pixel's
full variance. "log density" is its mean over familiar test images, nats an image, "calibration error" the mean distance
of the pixels' predictive quantiles from what comes, and "cost" CPU time over that of the network's own training. Steps
and rates ("step") are those of the listed candidates that give the validation rows of the *first* seed the highest
density; test images choose nothing. Noise is that of the validation rows under the plain network, but for
`OnlineLaplace`, which learns its own.

Expected on the digits (checked at the end, means of seeds 0 to 2): log densities of 34.2 for the network, 35.3 to 35.7
for the Laplace posteriors at a fiftieth of a training, 38.4 to 38.8 for SWAG, SGHMC, SGNHT and an ensemble at about one
training (four chains are one mapped pass), 40.0 for SWAG over an ensemble at four. The score tells left-out digits from
familiar ones by an AUROC of 0.93 to 0.96 whatever the posterior; only on blends does one help by more than 0.03 (SWAG,
scale-adapted and cyclical SGHMC: 0.83 to 0.85, the network 0.80), and ensembles and dropout lose. The best step of
SWAG and of the scale-adapted chains is the largest candidate.

On Fashion-MNIST (recorded with seed 0, not checked): 525 for the network, 527 to 529 for Laplace posteriors, 531 for
SWAG, 540 for scale-adapted SGHMC, 541 for SWAG over an ensemble; mean fields and dropout lose. The AUROC against MNIST
is 0.964 to 0.971 whatever the posterior.
Runtime: digits four minutes of one core a seed and seven more to choose steps, images an hour with them; ``--fast``
half a minute.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import ood_digits
import torch
from ood_digits import World, make_world
from torch import Tensor

import bayesae as bae
from bayesae import report, weights

# what samplers have to say of their steps is in the table of candidates
warnings.filterwarnings("ignore", category=RuntimeWarning, module="bayesae|__main__")


@dataclass(frozen=True)
class Config:
    """One data set."""

    data: str
    hidden: tuple[int, ...]
    n_latents: int
    epochs: int
    learning_rate: float
    batch_size: int
    n_members: int = 5
    n_chains: int = 4
    n_draws: int = 32
    n_train: int | None = None
    n_validation: int | None = None
    n_test: int | None = None


DIGITS = Config("digits", (64, 32), 4, 80, 5e-3, 64)
IMAGES = Config("fashion-mnist", (256, 64), 32, 20, 1e-3, 128, n_train=10_000, n_validation=1_000, n_test=2_000)
FAST = Config("digits", (16,), 2, 4, 5e-3, 64, n_members=2, n_chains=2, n_draws=4)


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Args:
        make: From the configuration and a step to the method.
        steps: Candidates on the digits; one is no choice.
        for_images: Candidates on images, whose likelihood is curved a thousand times more; None: the same.
    """

    make: Callable[[Config, float], Any]
    steps: tuple[float, ...] = (math.nan,)
    for_images: tuple[float, ...] | None = None

    def candidates(self, config: Config) -> tuple[float, ...]:
        """Of a data set."""
        return self.steps if config.data == "digits" or self.for_images is None else self.for_images


def chains(kind: Callable[..., Any], steps: Sequence[tuple[float, ...]], **options: Any) -> Method:  # noqa: ANN401
    """A sampler of four chains that keeps the second half, thinned to about ten draws a chain."""

    def make(config: Config, step: float) -> Any:  # noqa: ANN401
        n_steps = config.epochs * math.ceil((config.n_train or 860) / config.batch_size)
        kept = {"thinning": max(1, n_steps // 40), "n_chains": config.n_chains, "epochs": config.epochs}
        return kind(step, **{"burn_in": 0.5, **kept, **options})

    return Method(make, *steps)


def ensemble(config: Config, step: float, **options: Any) -> weights.Ensemble:  # noqa: ANN401
    """Members trained as the network was."""
    return weights.Ensemble(config.n_members, config.epochs, config.learning_rate, **options)


SMALL = (1e-7, 1e-6, 1e-5), (1e-10, 1e-9, 1e-8)
SCALED = (1e-6, 1e-5, 1e-4, 1e-3), (1e-5, 1e-4, 1e-3)
RATES = (1e-5, 1e-4, 1e-3), (1e-6, 1e-5, 1e-4)
BOUNDS = (1e-4, 1e-3, 5e-3), (1e-5, 1e-4, 1e-3)
METHODS = {
    "MAP": Method(lambda c, s: weights.MAP()),
    "Laplace, diagonal": Method(lambda c, s: weights.Laplace()),
    "Laplace, Kronecker": Method(lambda c, s: weights.Laplace("kronecker")),
    "Laplace, low rank": Method(lambda c, s: weights.Laplace("low_rank")),
    "online Laplace": Method(lambda c, s: weights.OnlineLaplace(c.epochs, s), *RATES),
    "SWAG, diagonal": Method(lambda c, s: weights.SWAG(0, c.epochs, s), *RATES),
    "SWAG": Method(lambda c, s: weights.SWAG(min(20, c.epochs // 2), c.epochs, s), *RATES),
    "mean field, shared weights": Method(lambda c, s: weights.MeanField(c.epochs, s), *BOUNDS),
    "mean field, local": Method(lambda c, s: weights.MeanField(c.epochs, s, estimator="local"), *BOUNDS),
    "mean field, Flipout": Method(lambda c, s: weights.MeanField(c.epochs, s, estimator="flipout"), *BOUNDS),
    "factor covariance": Method(lambda c, s: weights.MeanField(c.epochs, s, rank=5), *BOUNDS),
    "SGLD": chains(weights.SGLD, SMALL),
    "SGLD, preconditioned": chains(
        partial(weights.SGLD, preconditioner=weights.RMSProp()), (SCALED[0], (1e-8, 1e-7, 1e-6))
    ),
    "SGLD, cyclical": chains(partial(weights.SGLD, schedule=weights.Cyclical(4)), SMALL, burn_in=0.0),
    "SGHMC": chains(weights.SGHMC, SMALL),
    "SGHMC, scale-adapted": chains(partial(weights.SGHMC, preconditioner=weights.ScaleAdaptation()), SCALED),
    "SGHMC, cyclical": chains(partial(weights.SGHMC, schedule=weights.Cyclical(4)), SMALL, burn_in=0.0),
    "SGNHT": chains(weights.SGNHT, SMALL),
    "ensemble": Method(ensemble),
    "randomised MAP": Method(partial(ensemble, is_randomised=True)),
    "dropout": Method(lambda c, s: weights.Dropout(s, epochs=c.epochs), (0.01, 0.05, 0.2)),
    "Laplace over an ensemble": Method(lambda c, s: weights.MixtureOf(ensemble(c, s), weights.Laplace())),
    "SWAG over an ensemble": Method(
        lambda c, s: weights.MixtureOf(ensemble(c, s), weights.SWAG(min(20, c.epochs // 2), c.epochs, s)),
        (1e-5, 1e-4),
        (1e-6, 1e-5),
    ),
}


# mean log density over seeds 0 to 2, nats an image
EXPECTED = {
    "MAP": 34.2, "Laplace, diagonal": 35.7, "online Laplace": 37.1, "SWAG": 38.5, "mean field, local": 37.1,
    "SGHMC": 38.6, "ensemble": 38.5, "SWAG over an ensemble": 40.0,
}  # fmt: skip


def digits(config: Config, seed: int) -> World:
    """Digits 0 to 7, and what is unfamiliar beside them: the world of ``ood_digits.py``."""
    return make_world(ood_digits.Config(), seed)


def garments(config: Config, seed: int) -> World:
    """Fashion-MNIST, and MNIST beside it."""
    rows = bae.datasets.load("fashion-mnist", split="train")
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
    assert config.n_train is not None
    assert config.n_validation is not None
    tests = {name: bae.datasets.load(name, split="test")[: config.n_test] for name in ("fashion-mnist", "mnist")}
    train, validation = rows[: config.n_train], rows[config.n_train :][: config.n_validation]
    return World(train, validation, {"familiar": tests["fashion-mnist"], "mnist": tests["mnist"]})


def network(config: Config, world: World, seed: int) -> tuple[bae.Autoencoder, float]:
    """The trained network, and the CPU seconds that it took."""
    torch.manual_seed(seed)
    n_pixels = world.train[0].numel()
    encoder = bae.nets.mlp(n_pixels, config.hidden, config.n_latents)
    decoder = bae.nets.mlp(config.n_latents, config.hidden[::-1], n_pixels)
    model = bae.Autoencoder(encoder, decoder, bae.likelihoods.Gaussian())
    start = time.process_time()
    bae.fit_model(
        model,
        world.train,
        validation=world.validation,
        epochs=config.epochs,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        seed=seed,
    )
    return model, time.process_time() - start


def fit(method: Any, model: bae.Autoencoder, world: World, config: Config, seed: int) -> bae.Predictive:  # noqa: ANN401
    """One method."""
    found = bae.fit_weights(method, model, world.train, batch_size=config.batch_size, seed=seed)
    return bae.Predictive(model, found)


def moments_of(predictive: bae.Predictive, rows: Tensor, n_draws: int) -> bae.Moments:
    """In closed form, of all particles, or of ``n_draws`` draws."""
    has_closed_form = predictive.is_linearised or predictive.weights.n_atoms is not None
    return predictive.moments(rows, n_weight_draws=None if has_closed_form else n_draws, seed=0)


def measure(predictive: bae.Predictive, world: World, n_draws: int) -> dict[str, float]:
    """The table's row."""
    moments = {kind: moments_of(predictive, rows, n_draws) for kind, rows in world.tests.items()}
    scores = {kind: bae.ood.negative_log_density(moments[kind], rows) for kind, rows in world.tests.items()}
    familiar, rows = moments["familiar"], world.tests["familiar"]
    aurocs = {
        f"AUROC {kind}": bae.metrics.auroc(scores["familiar"], score)
        for kind, score in scores.items()
        if kind != "familiar"
    }
    return {
        "log density": -float(scores["familiar"].mean()),
        "calibration error": bae.metrics.quantile_calibration(familiar.mean, familiar.total, rows).error,
        "weights' share": float(familiar.weights.sum() / familiar.total.sum()),
        **aurocs,
    }


def choose(method: Method, model: bae.Autoencoder, world: World, config: Config, seed: int) -> tuple[float, list[str]]:
    """The candidate that the validation rows like best, and what each of them came to."""
    steps = method.candidates(config)
    if len(steps) == 1:
        return steps[0], []
    densities, words = [], []
    for step in steps:
        try:
            predictive = fit(method.make(config, step), model, world, config, seed)
            moments = moments_of(predictive, world.validation, config.n_draws)
            density = -float(bae.ood.negative_log_density(moments, world.validation).mean())
        except bae.errors.NonFiniteError:  # diverged: a fair answer of a step that is too large
            density = -math.inf
        densities.append(density)
        words.append(f"{step:g}: {density:.2f}")
    return steps[densities.index(max(densities))], words


def run(config: Config, flags: report.Flags, records: report.Records) -> None:
    """All methods and seeds on one data set."""
    make = digits if config.data == "digits" else garments
    steps: dict[str, float] = {}
    for seed in flags.seeds:
        world = make(config, seed)
        model, training = network(config, world, seed)
        for name, method in METHODS.items():
            if flags.methods is not None and name not in flags.methods:
                continue
            if name not in steps:
                steps[name], words = choose(method, model, world, config, seed)
                print(f"{config.data}, {name}: {', '.join(words) or 'nothing to choose'}", flush=True)
                if words and all(word.endswith("-inf") for word in words):
                    raise bae.errors.NonFiniteError(
                        "a step that does not diverge", name, "Add smaller ones to its list."
                    )
            start = time.process_time()
            predictive = fit(method.make(config, steps[name]), model, world, config, seed)
            values = {"cost": (time.process_time() - start) / training}
            if not math.isnan(steps[name]):
                values["step"] = steps[name]
            for metric, value in {**measure(predictive, world, config.n_draws), **values}.items():
                records.add(data=config.data, setting="test", method=name, metric=metric, seed=seed, value=value)
            if flags.json:
                records.save(flags.json, keeps_others=True)


def draw(records: report.Records, name: str, path: Path) -> None:
    """Density against price, and the score's AUROC, method by method."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 6.5), layout="constrained")
    rows = [row for row in records.rows if row.data == name]
    methods = list(dict.fromkeys(row.method for row in rows))
    kinds = [m for m in dict.fromkeys(row.metric for row in rows) if m.startswith("AUROC")]
    colours = plt.get_cmap("tab20")
    for place, method in enumerate(methods):
        where = {"data": name, "method": method}
        cost = records.mean(metric="cost", **where)
        density = records.mean(metric="log density", **where)
        style = {"color": colours(place % 20), "marker": "o" if place < 20 else "s", "linestyle": ""}
        left.plot(cost, density, **style)
        for kind, marker in zip(kinds, "osD", strict=False):
            right.plot(records.mean(metric=kind, **where), place, marker=marker, color=colours(place % 20))
    left.set_xscale("log")
    title = f"{name} (colours as on the right; squares are its last three)"
    left.set(xlabel="cost (network trainings)", ylabel="log density (nats an image)", title=title)
    right.set_yticks(range(len(methods)), methods)
    right.invert_yaxis()
    right.grid(axis="x", alpha=0.3)
    signs = ", ".join(f"{kind.removeprefix('AUROC ')} {sign}" for kind, sign in zip(kinds, "○□◇", strict=False))
    right.set(xlabel=f"AUROC of the negative log density: {signs}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"figure: {path}")


def main() -> None:
    """Run the data sets, print the tables, write records and the figure."""
    known = {config.data: config for config in (DIGITS, IMAGES)}
    flags = report.flags(__doc__, seeds=(0, 1, 2), has_full=True, data=tuple(known))
    configs = [FAST] if flags.fast else [known[name] for name in flags.data]
    records = report.Records()
    for config in configs:
        run(config, flags, records)
        of_data = report.Records([row for row in records.rows if row.data == config.data])
        print(report.table(of_data), end="\n\n")
    found = report.Records.load(flags.json) if flags.json else records
    if DIGITS in configs and flags.methods is None:
        for name, value in EXPECTED.items():
            records.expect(value, 1.0, data="digits", method=name, metric="log density")
    for name in dict.fromkeys(row.data for row in found.rows):
        suffix = "" if name == DIGITS.data else "_images"
        draw(found, name, flags.figures / f"weight_posteriors{suffix}.png")


if __name__ == "__main__":
    main()
