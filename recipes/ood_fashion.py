"""Does a posterior over weights tell unfamiliar images better than the reconstruction error does?

Data: 10,000 training images of MNIST or Fashion-MNIST and 1,000 more for the noise (55,000 and 5,000 with
``--full``); the first 5,000 (10,000) test images of MNIST, Fashion-MNIST and KMNIST. Network 784-256-64-Z-64-256-784,
Z of 2 and 32, tanh, Gaussian pixels of one estimated noise variance, 20 epochs. Set BAYESAE_DATA to the folder of
the data, or be online for the first run.

**The score named beforehand** is `ood.negative_log_density` of the exact linearised Laplace predictive: minus the log
predictive density of the image, every pixel with its full variance (noise + weights). It is the one that a
statistician would defend on all pairs: it is the only one here that asks how probable the image is under the fitted
model, so it counts an error that the variance does not explain *and* a variance that familiar images do not have.
The plain reconstruction error is the same density with one variance for all pixels and images.

**Why the summed weight variance alone is inverted on Fashion-MNIST against MNIST.** A weight w_ij moves a unit by
a_j * dw_ij: its contribution to the variance is a_j squared times Var[w_ij]. An MNIST digit is mostly black, so
most first-layer inputs a_j are 0 and move nothing; a garment fills the frame and moves thousands of weights. The sum
over pixels therefore measures first of all how much is lit, and garments are lit more: the *familiar* images have
the larger variance.

**Why the prior decides what the summed variance sees.** Weights that training images hardly move keep the prior's
variance. At a precision of 1 that is far above what the others have, so that any image that uses them stands out; the
evidence finds a much larger precision, and with a code of 2 most of the difference goes. Both are in the table
("Laplace" and "Laplace, prior 1"). Every AUROC is given twice, as the images are and with the pixels that no training
image lights set to 0 in both sets ("border zeroed"). Where 10,000 garments light every pixel the two are equal; on
MNIST zeroing takes little away even at a precision of 1, presumably because pixels that are lit *rarely* do what
never-lit ones do.

Expected over seeds 0 to 2 (checked at the end of a run that is neither ``--fast`` nor ``--full``): on Fashion-MNIST
against MNIST with a code of 32 an AUROC of 0.97 ± 0.02 for the named score and of 0.25 ± 0.1 for the summed weight
variance; on all pairs the named score within 0.02 of the plain reconstruction error.
Runtime: about an hour on one core for all seeds and methods (``--methods`` runs some and keeps the
other records), 20 s with ``--fast``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib.pyplot as plt
import torch
from torch import Tensor
from tqdm import tqdm

import bayesae as bae
from bayesae import report

NAMED = "neg. log density"
BASELINE = "reconstruction error"
PRIOR_1 = "Laplace, prior 1"


@dataclass(frozen=True)
class Config:
    """What the recipe fixes."""

    n_train: int = 10_000
    n_validation: int = 1_000
    n_test: int = 5_000
    epochs: int = 20
    latent_dims: tuple[int, ...] = (2, 32)
    hidden: tuple[int, ...] = (256, 64)
    n_members: int = 5
    n_weight_draws: int = 32
    n_resamples: int = 100
    pairs: tuple[tuple[str, str], ...] = (
        ("mnist", "kmnist"),
        ("mnist", "fashion-mnist"),
        ("fashion-mnist", "mnist"),
    )


FAST = Config(
    n_train=1_000,
    n_validation=500,
    n_test=300,
    epochs=5,
    latent_dims=(2,),
    n_members=2,
    n_weight_draws=8,
    n_resamples=20,
)
FULL = Config(n_train=55_000, n_validation=5_000, n_test=10_000)


def scores_of(predictive: bae.Predictive, x: Tensor, n_weight_draws: int) -> dict[str, Tensor]:
    """Every score of one predictive, (N,) each."""
    moments = predictive.moments(x)
    scores = {
        NAMED: bae.ood.negative_log_density(moments, x),
        BASELINE: bae.ood.reconstruction_error(moments, x),
    }
    n_atoms = predictive.weights.n_atoms
    if n_atoms == 1:
        return scores
    scores["weight variance"] = bae.ood.weight_variance(moments)
    if not n_weight_draws:
        return scores
    draws = predictive(x, n_weight_draws=None if n_atoms else n_weight_draws, seed=0)
    return scores | {
        "neg. log predictive": bae.ood.negative_log_predictive(draws),
        "waic": bae.ood.waic(draws),
        "disagreement": bae.ood.disagreement(draws),
    }


def fit(
    config: Config, train: Tensor, validation: Tensor, z: int, seed: int, only: tuple[str, ...] | None
) -> dict[str, bae.Predictive]:
    """The posteriors over the weights of one architecture; MAP in any case."""
    torch.manual_seed(seed)
    encoder = bae.nets.mlp(784, config.hidden, z)
    decoder = bae.nets.mlp(z, config.hidden[::-1], 784)
    model = bae.Autoencoder(encoder, decoder, bae.likelihoods.Gaussian())
    bae.fit_model(model, train, validation=validation, epochs=config.epochs, seed=seed)
    methods = {
        "MAP": bae.weights.MAP(),
        "ensemble": bae.weights.Ensemble(config.n_members, epochs=config.epochs),
        "Laplace": bae.weights.Laplace(),
        PRIOR_1: bae.weights.Laplace(tunes_prior=False),
    }
    return {
        name: bae.Predictive(model, bae.fit_weights(method, model, train, seed=seed))
        for name, method in methods.items()
        if only is None or name in {"MAP", *only}
    }


def difference(familiar: Tensor, strange: Tensor) -> float:
    """AUROC of the first column of scores minus that of the second, for a paired interval."""
    first, second = (bae.metrics.auroc(familiar[:, i], strange[:, i]) for i in (0, 1))
    return first - second


def compare(
    config: Config, test: Tensor, strange: dict[str, Tensor], predictives: dict[str, bae.Predictive]
) -> Iterator[tuple[str, str, str, float]]:
    """AUROC of every method and score, and the named score's gain over the plain reconstruction error.

    Yields:
        Strange set, method, metric, value.
    """
    n_draws = {name: 0 if name == PRIOR_1 else config.n_weight_draws for name in predictives}
    inside = {name: scores_of(predictive, test, n_draws[name]) for name, predictive in predictives.items()}
    for name, images in strange.items():
        outside = {m: scores_of(predictive, images, n_draws[m]) for m, predictive in predictives.items()}
        base = inside["MAP"][BASELINE], outside["MAP"][BASELINE]
        for method, scores in inside.items():
            for score, familiar in scores.items():
                found = outside[method][score]
                if score not in {NAMED, BASELINE}:
                    yield name, f"{method}: {score}", "AUROC", bae.metrics.auroc(familiar, found)
                    continue
                interval = bae.metrics.bootstrap_interval(
                    bae.metrics.auroc, familiar, found, n_resamples=config.n_resamples
                )
                for metric, value in zip(("AUROC", "low", "high"), interval, strict=True):
                    yield name, f"{method}: {score}", metric, value
            if method == "MAP":
                continue  # of one network the two scores rank alike
            pairs = (torch.stack([s[NAMED], b], -1) for s, b in zip((scores, outside[method]), base, strict=True))
            interval = bae.metrics.bootstrap_interval(difference, *pairs, n_resamples=config.n_resamples)
            for metric, value in zip(("gain", "gain low", "gain high"), interval, strict=True):
                yield name, f"{method}: {NAMED}", metric, value


def run(
    config: Config, seed: int, records: report.Records, only: tuple[str, ...] | None = None
) -> dict[str, bae.Predictive]:
    """One seed: every pair and code size; returns the last predictives for the figure."""
    predictives: dict[str, bae.Predictive] = {}
    for familiar in dict.fromkeys(pair[0] for pair in config.pairs):
        rows = images_of(familiar, "train")
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
        train, validation = rows[order[: config.n_train]], rows[order[config.n_train :][: config.n_validation]]
        test = images_of(familiar, "test")[: config.n_test]
        lit = train.amax(0) > 0
        strange = {b: images_of(b, "test")[: config.n_test] for a, b in config.pairs if a == familiar}
        for z in config.latent_dims:
            start = time.perf_counter()
            predictives = fit(config, train, validation, z, seed, only)
            for method, predictive in predictives.items():
                if only is not None and method not in only:
                    continue
                moments = predictive.moments(test)
                quality = {
                    "log density": float(moments.log_prob(test).flatten(1).sum(1).mean()),
                    "calibration error": bae.metrics.quantile_calibration(moments.mean, moments.total, test).error,
                }
                for metric, value in quality.items():
                    records.add(
                        data=familiar, setting=f"code {z}", method=method, metric=metric, seed=seed, value=value
                    )
            for border, keep in (("as is", torch.ones_like(lit)), ("border zeroed", lit)):
                kept = {name: images * keep for name, images in strange.items()}
                for name, method, metric, value in compare(config, test * keep, kept, predictives):
                    if only is not None and method.split(":")[0] not in only:
                        continue
                    records.add(
                        data=f"{familiar} / {name}",
                        setting=f"code {z}, {border}",
                        method=method,
                        metric=metric,
                        seed=seed,
                        value=value,
                    )
            tqdm.write(f"seed {seed}, {familiar}, code {z}: {time.perf_counter() - start:.0f} s")
    return predictives


def images_of(name: str, split: Literal["train", "test"]) -> Tensor:
    """Images alone, (N, 1, 28, 28)."""
    return bae.datasets.load(name, split=split)


def draw(config: Config, predictive: bae.Predictive, path: Path) -> None:
    """Where the summed variance is inverted: Fashion-MNIST against MNIST, score by score, with examples."""
    garments, digits = (images_of(name, "test")[: min(1_000, config.n_test)] for name in ("fashion-mnist", "mnist"))
    figure = plt.figure(figsize=(11, 9), layout="constrained")
    grid = figure.add_gridspec(3, 2, height_ratios=(1.3, 1, 1))
    moments = {"fashion-mnist (familiar)": (garments, predictive.moments(garments))}
    moments["mnist (strange)"] = digits, predictive.moments(digits)
    high = max(float(m.weights[:8].max()) for _, m in moments.values()) ** 0.5
    for column, (name, (rows, m)) in enumerate(moments.items()):
        axes = [figure.add_subplot(grid[0, column].subgridspec(3, 1)[i]) for i in range(3)]
        bae.plots.images(axes[0], rows[:8], title="image", high=1.0)
        bae.plots.images(axes[1], m.mean[:8].clamp(0, 1), title="mean", high=1.0)
        bae.plots.images(axes[2], m.weights[:8].sqrt(), title="sd due to\nweights", cmap="magma", high=high)
        axes[0].set_title(f"{name}; sd from 0 to {high:.2f} grey levels")
    kinds = {
        "negative log density (nats)": lambda rows, m: bae.ood.negative_log_density(m, rows),
        "reconstruction error (grey level squared)": lambda rows, m: bae.ood.reconstruction_error(m, rows),
        "summed weight variance (grey level squared)": lambda rows, m: bae.ood.weight_variance(m),
        "lit pixels (share above 0.1)": lambda rows, m: (rows > 0.1).float().flatten(1).mean(1),
    }
    for number, (label, score) in enumerate(kinds.items()):
        axes = figure.add_subplot(grid[1 + number // 2, number % 2])
        bae.plots.score_histograms(axes, {name: score(*pair) for name, pair in moments.items()}, xlabel=label)
    figure.suptitle(f"Fashion-MNIST against MNIST, linearised Laplace, code of {config.latent_dims[-1]}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    """Run all seeds, print the tables, write records and the figure."""
    flags = report.flags(__doc__, seeds=(0, 1, 2), has_full=True)
    config = FAST if flags.fast else FULL if flags.full else Config()
    records, predictives = report.Records(), {}
    for seed in flags.seeds:
        predictives = run(config, seed, records, flags.methods)
        if flags.json:
            records.save(flags.json, keeps_others=flags.methods is not None)
    print(report.table(records, metrics=["log density", "calibration error"]), end="\n\n")
    print(report.table(records, metrics=["AUROC", "low", "high", "gain", "gain low", "gain high"]))
    if flags.methods is not None:
        return
    draw(config, predictives["Laplace"], flags.figures / "ood_fashion.png")
    if not flags.fast and not flags.full:
        inverted = {"data": "fashion-mnist / mnist", "setting": "code 32, as is", "metric": "AUROC"}
        records.expect(0.97, 0.02, method=f"Laplace: {NAMED}", **inverted)
        records.expect(0.25, 0.1, method="Laplace: weight variance", **inverted)
        for data in dict.fromkeys(f"{a} / {b}" for a, b in config.pairs):
            records.expect(0.0, 0.02, data=data, method=f"Laplace: {NAMED}", metric="gain")


if __name__ == "__main__":
    main()
