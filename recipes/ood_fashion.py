"""Does a posterior over weights tell unfamiliar images better than the reconstruction error does?

Data: 10,000 training images (60,000 with ``--full``) of MNIST or Fashion-MNIST and 1,000 more for the noise
(5,000 with ``--full``); all 10,000 test images of MNIST, Fashion-MNIST and KMNIST. Network 784-256-64-Z-64-256-784,
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
the larger variance. In the other direction (MNIST in, Fashion-MNIST out) the same effect looks like a success, all the
more through pixels that no training image lights: weights on them keep their prior variance. That is why every AUROC
is given twice, as the images are and with those never-lit pixels set to 0 in both sets ("border zeroed").

Expected: asserted below for ``--fast`` only as sanity; the measured table is in the README, whoever wins.
Runtime: about 35 minutes for three seeds on two cores, 20 s with ``--fast``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor
from tqdm import tqdm

import bayesae as bae
from bayesae import report

NAMED = "neg. log density"


@dataclass(frozen=True)
class Config:
    """What the recipe fixes."""

    n_train: int = 10_000
    n_validation: int = 1_000
    n_test: int = 10_000
    epochs: int = 20
    latent_dims: tuple[int, ...] = (2, 32)
    hidden: tuple[int, ...] = (256, 64)
    n_members: int = 5
    n_weight_draws: int = 32
    n_resamples: int = 200
    pairs: tuple[tuple[str, str], ...] = (
        ("mnist", "kmnist"),
        ("mnist", "fashion-mnist"),
        ("fashion-mnist", "mnist"),
    )


FAST = Config(n_train=1_000, n_validation=500, n_test=500, epochs=5, latent_dims=(2,), n_members=2, n_resamples=50)


def scores_of(predictive: bae.Predictive, x: Tensor, n_weight_draws: int | None) -> dict[str, Tensor]:
    """Every score of one predictive, (N,) each."""
    moments = predictive.moments(x)
    scores = {
        NAMED: bae.ood.negative_log_density(moments, x),
        "reconstruction error": bae.ood.reconstruction_error(moments, x),
    }
    if predictive.weights.n_atoms == 1:
        return scores
    draws = predictive(x, n_weight_draws=n_weight_draws, seed=0)
    return scores | {
        "weight variance": bae.ood.weight_variance(moments),
        "neg. log predictive": bae.ood.negative_log_predictive(draws),
        "waic": bae.ood.waic(draws),
        "disagreement": bae.ood.disagreement(draws),
    }


def fit(config: Config, train: Tensor, validation: Tensor, z: int, seed: int) -> dict[str, bae.Predictive]:
    """The three posteriors over the weights of one architecture."""
    torch.manual_seed(seed)
    encoder = bae.nets.mlp(784, config.hidden, z)
    decoder = bae.nets.mlp(z, config.hidden[::-1], 784)
    model = bae.Autoencoder(encoder, decoder, bae.likelihoods.Gaussian())
    bae.fit_model(model, train, validation=validation, epochs=config.epochs, seed=seed)
    methods = {
        "MAP": bae.weights.MAP(),
        "ensemble": bae.weights.Ensemble(config.n_members, epochs=config.epochs),
        "Laplace": bae.weights.Laplace(),
    }
    return {
        name: bae.Predictive(model, bae.fit_weights(method, model, train, seed=seed))
        for name, method in methods.items()
    }


def run(config: Config, seed: int, load: Callable[[str, str], Tensor], records: report.Records) -> dict[str, Tensor]:
    """One seed: every pair and code size; returns the named score of the last code size for the figure."""
    shown: dict[str, Tensor] = {}
    for familiar in dict.fromkeys(pair[0] for pair in config.pairs):
        rows = load(familiar, "train")
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
        n = min(config.n_train, len(rows) - config.n_validation)
        train, validation = rows[order[:n]], rows[order[n : n + config.n_validation]]
        lit = train.amax(0) > 0
        strange = {name: load(name, "test")[: config.n_test] for first, name in config.pairs if first == familiar}
        test = load(familiar, "test")[: config.n_test]
        for z in config.latent_dims:
            for method, predictive in fit(config, train, validation, z, seed).items():
                for border, keep in (("as is", torch.ones_like(lit)), ("border zeroed", lit)):
                    start = time.perf_counter()
                    draws = None if method == "ensemble" else config.n_weight_draws
                    inside = scores_of(predictive, test * keep, draws)
                    for name, images in strange.items():
                        outside = scores_of(predictive, images * keep, draws)
                        for score in inside:
                            interval = bae.metrics.bootstrap_interval(
                                bae.metrics.auroc, inside[score], outside[score], n_resamples=config.n_resamples
                            )
                            for metric, value in zip(("AUROC", "low", "high"), interval, strict=True):
                                records.add(
                                    data=f"{familiar} / {name}",
                                    setting=f"code {z}, {border}",
                                    method=f"{method}: {score}",
                                    metric=metric,
                                    seed=seed,
                                    value=value,
                                )
                            if method == "Laplace" and border == "as is" and score in {NAMED, "weight variance"}:
                                shown[f"{familiar}|{name}|{score}|in"] = inside[score]
                                shown[f"{familiar}|{name}|{score}|out"] = outside[score]
                    tqdm.write(f"seed {seed} {familiar} code {z} {method} {border}: {time.perf_counter() - start:.0f} s")
    return shown


def draw(shown: dict[str, Tensor], config: Config, path: Path) -> None:
    """Histograms of the named score and of the summed weight variance, a column a pair."""
    figure, axes = plt.subplots(2, len(config.pairs), figsize=(4 * len(config.pairs), 6), layout="constrained")
    for column, (familiar, strange) in enumerate(config.pairs):
        for row, score in enumerate((NAMED, "weight variance")):
            key = f"{familiar}|{strange}|{score}"
            label = "negative log density (nats)" if row == 0 else "summed weight variance (grey level squared)"
            sets = {f"{familiar} (familiar)": shown[f"{key}|in"], f"{strange} (strange)": shown[f"{key}|out"]}
            bae.plots.score_histograms(axes[row, column], sets, xlabel=label)
        axes[0, column].set_title(f"{familiar} / {strange}")
    figure.suptitle(f"Linearised Laplace, code of {config.latent_dims[-1]}: the density and the variance alone")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    """Run all seeds, print the table, write records and the figure."""
    flags = report.flags(__doc__, seeds=(0, 1, 2))
    config = FAST if flags.fast else Config(n_train=55_000, n_validation=5_000) if flags.full else Config()
    records = report.Records()
    shown: dict[str, Tensor] = {}
    for seed in flags.seeds[:1] if flags.fast else flags.seeds:
        shown = run(config, seed, lambda name, split: bae.datasets.load(name, split=split), records)
        if flags.json:
            records.save(flags.json)
    print(report.table(records))
    if flags.figures:
        draw(shown, config, flags.figures / "ood_fashion.png")


if __name__ == "__main__":
    main()
