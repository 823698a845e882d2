"""Half of every image missing: do intervals hold the pixels, and does the uncertainty of the weights help them?

Data: 10,000 training images of MNIST (``--data fashion-mnist`` for Fashion-MNIST), 2,000 more for the noise, the first
500 test images. A variational autoencoder 784-256-64-16 and back (rectifiers), trained on complete images, with noise
of every pixel fitted on the held-out ones: Gaussian, or Student's t of four degrees of freedom, whose tails are those
of errors rather, or Gaussian with a scale that the decoder gives ("noise of the code"); over its weights MAP (one
network, weights taken as known), the linearised diagonal Laplace posterior of the decoder, and an ensemble of five.
Missing are the lower half of every image, or half of its pixels, at random. Codes come by importance resampling from a
Laplace approximation given the observed pixels: the encoder has seen no incomplete image.

Measured on missing pixels against what stood there: root mean squared error of the mean; and on those whose deviation
over the training images exceeds 0.1 the coverage of 50, 80 and 90 % intervals from 99 draws (95 of an ensemble of
five), and the log-likelihood a pixel of the law of the noise with the moments of the draws. Of one fitted noise all
posteriors have that of the one network, so that what differs is the spread of codes and weights. "Recalibrated"
intervals are those of `calibration.Isotonic`, fitted on missing pixels of 250 further images under the same kind of
mask. A small classifier, trained on the same complete images, judges completions: accuracy of the class with the
largest mean probability over the draws, and the calibration error of that probability in 15 bins (ECE), beside those of
complete images ("complete") and of images with 0 in the missing pixels ("zeros").

Target: coverage within five points of nominal. The table says what is.
Runtime: ``--fast`` (digits) about a minute of one core.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from sklearn.neural_network import MLPClassifier
from torch import Tensor, nn

import bayesae as bae
from bayesae import report, weights
from bayesae.types import Likelihood


@dataclass(frozen=True)
class Config:
    """One data set."""

    data: str
    hidden: tuple[int, ...] = (256, 64)
    n_latents: int = 16
    epochs: int = 30
    learning_rate: float = 1e-3
    n_members: int = 5
    n_weight_draws: int = 11
    n_draws: int = 99
    n_proposals: int = 200
    n_train: int = 10_000
    n_validation: int = 2_000
    n_calibration: int = 250
    n_test: int = 500
    least_deviation: float = 0.1
    floor: float = 0.05


KNOWN = {name: Config(name) for name in ("mnist", "fashion-mnist")}
FAST = Config("digits", (32,), 4, 20, 5e-3, n_members=3, n_train=1_000, n_validation=200, n_calibration=60, n_test=60)
POSTERIORS: dict[str, Callable[[Config], weights.WeightInference]] = {
    "MAP": lambda c: weights.MAP(),
    "Laplace": lambda c: weights.Laplace(subset=["decoder.**"]),
    "ensemble": lambda c: weights.Ensemble(c.n_members, c.epochs, c.learning_rate),
}
NOISES: dict[str, Callable[[float], Likelihood]] = {
    "": lambda floor: bae.likelihoods.Gaussian(per_output=True, floor=floor),
    ", Student-t": lambda floor: bae.likelihoods.StudentT(per_output=True, floor=floor),
    ", noise of the code": lambda floor: bae.likelihoods.HeteroscedasticGaussian(floor),
}
LEVELS = (0.5, 0.8, 0.9)
SETTINGS = ("lower half", "random half")


def mask_of(setting: str, images: Tensor, seed: int) -> Tensor:
    """True where a pixel is observed."""
    if setting == "lower half":
        mask = torch.ones_like(images, dtype=torch.bool)
        mask[..., images.shape[-2] // 2 :, :] = False
        return mask
    return torch.rand(images.shape, generator=torch.Generator().manual_seed(100 + seed)) < 0.5


def network(config: Config, noise: str, train: Tensor, validation: Tensor, seed: int) -> bae.Autoencoder:
    """The trained variational autoencoder, its noise that of held-out images."""
    torch.manual_seed(seed)
    n_pixels = train[0].numel()
    encoder = bae.nets.mlp(n_pixels, config.hidden, (config.n_latents, 2), activation=nn.ReLU)
    likelihood = NOISES[noise](config.floor)
    n_outputs = (n_pixels, 2) if isinstance(likelihood, bae.likelihoods.HeteroscedasticGaussian) else n_pixels
    decoder = bae.nets.mlp(config.n_latents, config.hidden[::-1], n_outputs, activation=nn.ReLU)
    model = bae.Autoencoder(encoder, decoder, likelihood)
    bae.fit_model(
        model,
        train,
        epochs=config.epochs,
        learning_rate=config.learning_rate,
        objective=bae.objectives.elbo,
        codes=bae.codes.amortised,
        validation=validation,
        seed=seed,
    )
    return model


def predictive_of(name: str, config: Config, model: bae.Autoencoder, train: Tensor, seed: int) -> bae.Predictive:
    """With one of the weight posteriors."""
    drawn = {"objective": bae.objectives.elbo, "codes": bae.codes.amortised}
    options = drawn if name == "ensemble" else {}
    posterior = bae.fit_weights(POSTERIORS[name](config), model, train, seed=seed, **options)
    return bae.Predictive(model, posterior, bae.codes.amortised)


def coverage(interval: Callable[[float], tuple[Tensor, Tensor]], images: Tensor, where: Tensor) -> dict[str, float]:
    """Shares of these pixels within intervals."""
    found = {}
    for level in LEVELS:
        low, high = interval(level)
        inside = (low <= images) & (images <= high)
        found[f"coverage {100 * level:g}"] = float(inside[where].double().mean())
    return found


def scores(found: bae.Imputations, images: Tensor, is_alive: Tensor) -> dict[str, float]:
    """Of the missing pixels."""
    missing = ~found.mask
    alive = missing & is_alive
    result = {"RMSE": float((found.mean - images)[missing].square().mean().sqrt())}
    result |= coverage(found.interval, images, alive)
    result["log-likelihood"] = float(found.log_prob(images)[alive].double().mean())
    parts = found.moments
    for name in ("noise", "code", "weights"):
        result[f"share of {name}"] = float(getattr(parts, name)[alive].sum() / parts.total[alive].sum())
    return result | {"ESS": float(found.ess.mean())}


def judged(classifier: MLPClassifier, draws: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy of the class with the largest mean probability over draws (M, N, ...), and that probability's ECE."""
    chance = torch.stack([torch.as_tensor(classifier.predict_proba(one.flatten(1).numpy())) for one in draws]).mean(0)
    largest, found = chance.double().max(1)
    is_right = (found == labels).double()
    ece = bae.metrics.ece(largest.clamp(max=1), is_right, n_bins=15).error
    return {"accuracy": float(is_right.mean()), "ECE": float(ece)}


def run(config: Config, flags: report.Flags, records: report.Records) -> dict[str, bae.Imputations]:
    """All posteriors and masks on one data set; the last seed's imputations by setting, of the last posterior."""
    shown = {}
    for seed in flags.seeds:
        (rows, classes), (test, labels) = bae.datasets.load(config.data, split=("train", "test"), labels=True)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
        held_out, order = order.tensor_split([config.n_validation + config.n_calibration])
        validation, calibration = rows[held_out].split([config.n_validation, config.n_calibration])
        chosen = order if flags.full else order[: config.n_train]
        train, images, labels = rows[chosen], test[: config.n_test], labels[: config.n_test]
        is_alive = train.std(0) > config.least_deviation
        classifier = MLPClassifier((100,), max_iter=200, early_stopping=True, random_state=seed)
        classifier.fit(train.flatten(1).numpy(), classes[chosen].numpy())

        def add(setting: str, method: str, values: dict[str, float], seed: int = seed) -> None:
            for metric, value in values.items():
                records.add(data=config.data, setting=setting, method=method, metric=metric, seed=seed, value=value)

        masks = {setting: mask_of(setting, images, seed) for setting in SETTINGS}
        for setting, mask in masks.items():
            zeros = float((images == 0)[~mask & is_alive].double().mean())
            add(setting, "complete", judged(classifier, images[None], labels) | {"share of zeros": zeros})
            add(setting, "zeros", judged(classifier, (images * mask)[None], labels))
        method = bae.imputation.ImportanceResampling(config.n_proposals, bae.codes.Laplace(6, "line_search"))
        models: dict[str, bae.Autoencoder] = {}
        for noise, posterior in product(NOISES, POSTERIORS):
            name = posterior + noise
            if flags.methods is not None and name not in flags.methods:
                continue
            start = time.process_time()
            if noise not in models:
                models[noise] = network(config, noise, train, validation, seed)
            predictive = predictive_of(posterior, config, models[noise], train, seed)
            n_weights = {"MAP": 1, "Laplace": config.n_weight_draws, "ensemble": config.n_members}[posterior]
            n_draws = config.n_draws - config.n_draws % n_weights
            options: dict[str, Any] = {"method": method, "n_weight_draws": n_weights, "n_draws": n_draws, "seed": seed}
            for setting, mask in masks.items():
                found = bae.impute(predictive, images, mask, **options)
                add(setting, name, scores(found, images, is_alive))
                add(setting, name, judged(classifier, found.draws, labels))
                if not noise:
                    shown[setting] = found
                known = mask_of(setting, calibration, seed + 1000)
                held = bae.impute(predictive, calibration, known, keep_draws=False, **options).moments
                law = bae.calibration.Isotonic().fit(held, calibration, ~known & is_alive)
                mended = coverage(partial(law.interval, found.moments), images, ~mask & is_alive)
                add(setting, f"{name}, recalibrated", mended)
            print(f"{config.data}, seed {seed}, {name}: {time.process_time() - start:.0f} CPU seconds", flush=True)
            if flags.json:
                records.save(flags.json, keeps_others=True)
    return shown


def draw(shown: dict[str, bae.Imputations], images: Tensor, path: Path) -> None:
    """Four images a setting: truth, what is observed, mean, deviation and eight draws."""
    names = ("truth", "observed", "mean", "deviation", *(f"draw {k + 1}" for k in range(8)))
    figure, grid = plt.subplots(
        4 * len(shown), len(names), figsize=(len(names), 4.6 * len(shown)), layout="constrained", squeeze=False
    )
    for number, (setting, found) in enumerate(shown.items()):
        spread = found.draws[torch.linspace(0, len(found.draws) - 1, 8).long()]
        for row in range(4):
            truth, mask = images[row, 0], found.mask[row, 0]
            pictures = [truth, truth * mask, found.mean[row, 0], found.variance[row, 0].sqrt(), *spread[:, row, 0]]
            for axes, name, picture in zip(grid[4 * number + row], names, pictures, strict=True):
                axes.imshow(picture.clamp(0, 1), cmap="gray", vmin=0, vmax=0.6 if name == "deviation" else 1)
                axes.set_xticks([])
                axes.set_yticks([])
                if row == 0:
                    axes.set_title(f"{name}\n{setting}" if name == "truth" else name, fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"figure: {path}")


def main() -> None:
    """Run the data sets, print the tables, write records and the figure."""
    flags = report.flags(__doc__, has_full=True, data=tuple(KNOWN))
    configs = [FAST] if flags.fast else [KNOWN[name] for name in flags.data]
    records = report.Records()
    columns = ["RMSE", *(f"coverage {100 * level:g}" for level in LEVELS), "log-likelihood", "accuracy", "ECE"]
    columns += [f"share of {name}" for name in ("noise", "code", "weights", "zeros")] + ["ESS"]
    for config in configs:
        shown = run(config, flags, records)
        of_data = report.Records([row for row in records.rows if row.data == config.data])
        known = {row.metric for row in of_data.rows}
        print(report.table(of_data, metrics=[name for name in columns if name in known]), end="\n\n")
        if flags.json:
            records.save(flags.json, keeps_others=True)
        if shown:
            images = bae.datasets.load(config.data, split="test")[: config.n_test]
            name = "impute_mnist.png" if config in (FAST, KNOWN["mnist"]) else f"impute_{config.data}.png"
            draw(shown, images, flags.figures / name)


if __name__ == "__main__":
    main()
