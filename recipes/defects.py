"""Which pixel is strange? Known defects on real images, and where each score sees them.

Data: Fashion-MNIST from ``BAYESAE_DATA`` (10,000 training images, 1,000 more for noise and reference, the first 1,000
test images), or scikit-learn's digits without it. Every test image gets six defects in turn, around a random lit pixel:
a **scratch** of the opposite tone, a smooth **stain**, a square **patch** of another class, a square **missing**, a
disc of **blur**, a disc of **noise**. A pixel is defect if it changed by more than 0.1 grey levels.

Network 784-256-64-32-64-256-784, tanh, Gaussian pixels of one estimated noise variance. Scores of a pixel: the squared
error of the one network (the baseline); its contribution to minus the log predictive density (`ood.contributions`) of
the linearised Laplace posterior and of an ensemble of five; the same with a noise scale for every pixel (same weights,
scales estimated on the 1,000); "- familiar": less the pixel's mean over those 1,000 clean images; "mean - sd": mean
contribution over the weight posterior less one standard deviation. **"Position alone"** is the mean squared error of
clean images at that pixel: it sees no image, and is the chance level that counts here, because defects lie where
garments are. Pixel AUROC and AUPR pool all images, PRO-0.3 is `metrics.per_region_overlap`, image AUROC compares
sums over pixels with those of the clean images.

What came out (first seed; all of it in benchmarks/results/defects.json):

- **Laplace's density does not beat the squared error pixel by pixel**: 0.979 against 0.979 on scratches, 0.795 against
  0.794 on missing parts, 0.643 against 0.633 on stains, where it gains most.
- **Noise per pixel helps, with or without a posterior**: 0.672 on stains, 0.658 (0.624) on blurs, 0.795 (0.778) on
  patches, 0.805 on missing parts; only scratches lose, by 0.002. Whole images are ranked worse (0.716 against 0.746 for
  missing parts).
- **Stains and blurs are not found**: position alone reaches 0.665 and 0.641. Presumably the network draws a smooth blob
  as it does any garment, and blurs what it reconstructs anyway.
- Taking the familiar mean off takes the position's share off, and lowers every pooled AUROC (0.729 against 0.794 on
  missing parts).
- **The standard deviation of a contribution does not sharpen the map**: "mean - sd" loses up to 0.045 with one noise
  scale and moves by less than 0.004 with one per pixel. It ranks whole images a little better (0.772 against 0.753 on
  scratches).

Expected over seeds 0 to 2 (checked at the end of a full run on Fashion-MNIST): pixel AUROC of the squared error
0.98 ± 0.02 on scratches and 0.79 ± 0.04 on missing parts; a gain of 0 ± 0.015 for Laplace's density on every defect, of
0.04 ± 0.03 for MAP with noise per pixel on stains, and of -0.065 ± 0.04 for the squared error less its familiar mean on
missing parts. Runtime: 24 minutes on one core beside other work; ``--fast`` half a minute.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor
from torch.nn import functional as F

import bayesae as bae
from bayesae import report

CHANGED = 0.1  # grey levels: a pixel is defect if the defect changed it by more
BASELINE = "MAP: squared error"
POSITION = "position alone"
WITH_REFERENCE = (BASELINE, "Laplace: density", "Laplace, noise per pixel: density")


@dataclass(frozen=True)
class Config:
    """What the recipe fixes."""

    data: str = "fashion-mnist"
    n_train: int = 10_000
    n_validation: int = 1_000
    n_test: int = 1_000
    hidden: tuple[int, ...] = (256, 64)
    latent_dim: int = 32
    epochs: int = 20
    learning_rate: float = 1e-3
    batch_size: int = 128
    n_members: int = 5
    noise_floor: float = 0.02  # of noise per pixel: far below what counts as a defect
    n_resamples: int = 60


DIGITS = Config("digits", 1_000, 250, 359, (64, 32), 8, 80, 5e-3, 64)
FAST = replace(DIGITS, epochs=10, n_members=2, n_resamples=20)


def near(image: Tensor, centre: tuple[int, int]) -> Tensor:
    """Distance of every pixel from one, in pixels."""
    y, x = torch.meshgrid(*(torch.arange(n) for n in image.shape), indexing="ij")
    return torch.hypot((y - centre[0]).float(), (x - centre[1]).float())


def opposite(image: Tensor, centre: tuple[int, int]) -> float:
    """White on dark and black on light."""
    return float(image[centre] < 0.5)


def scratch(image: Tensor, centre: tuple[int, int], other: Tensor, generator: torch.Generator) -> Tensor:
    """A line of one pixel's width, half the image long, at any angle."""
    angle = math.pi * float(torch.rand((), generator=generator))
    along = torch.linspace(-0.25, 0.25, 4 * len(image)) * len(image)
    y, x = (
        c + (along * slope).round().long() for c, slope in zip(centre, (math.sin(angle), math.cos(angle)), strict=True)
    )
    inside = (y >= 0) & (x >= 0) & (y < image.shape[0]) & (x < image.shape[1])
    result = image.clone()
    result[y[inside], x[inside]] = opposite(image, centre)
    return result


def stain(image: Tensor, centre: tuple[int, int], other: Tensor, generator: torch.Generator) -> Tensor:
    """A smooth blob, at most 70 % opaque."""
    share = 0.7 * torch.exp(-0.5 * (near(image, centre) / (0.1 * len(image))) ** 2)
    return (1 - share) * image + share * opposite(image, centre)


def _window(image: Tensor, centre: tuple[int, int]) -> tuple[slice, slice]:
    half = len(image) // 7
    return tuple(slice(max(0, c - half), c + half) for c in centre)  # pyright: ignore[reportReturnType] - two of them


def patch(image: Tensor, centre: tuple[int, int], other: Tensor, generator: torch.Generator) -> Tensor:
    """A square of an image of another class, from the same place."""
    result, window = image.clone(), _window(image, centre)
    result[window] = other[window]
    return result


def missing(image: Tensor, centre: tuple[int, int], other: Tensor, generator: torch.Generator) -> Tensor:
    """A square set to the background."""
    result = image.clone()
    result[_window(image, centre)] = 0
    return result


def blur(image: Tensor, centre: tuple[int, int], other: Tensor, generator: torch.Generator) -> Tensor:
    """A disc of means over 5 x 5 pixels (3 x 3 of small images)."""
    size = 5 if len(image) > 10 else 3
    means = F.avg_pool2d(F.pad(image[None, None], [size // 2] * 4, mode="replicate"), size, 1)[0, 0]
    return torch.where(near(image, centre) < 0.2 * len(image), means, image)


def noise(image: Tensor, centre: tuple[int, int], other: Tensor, generator: torch.Generator) -> Tensor:
    """A disc of Normal noise of scale 0.3, cut to [0, 1]."""
    noisy = (image + 0.3 * torch.randn(image.shape, generator=generator)).clamp(0, 1)
    return torch.where(near(image, centre) < 0.2 * len(image), noisy, image)


DEFECTS = (scratch, stain, patch, missing, blur, noise)


@dataclass(frozen=True)
class World:
    """Images of one seed: two sets to fit on, clean test images, and (images, masks) by the defect's name."""

    train: Tensor
    validation: Tensor
    test: Tensor
    defects: dict[str, tuple[Tensor, Tensor]]


def make_world(config: Config, seed: int) -> World:
    """Split the training images and paste the defects; images that a defect changes in fewer than 3 pixels go."""
    rows = bae.datasets.load(config.data)
    test, names = (part[: config.n_test] for part in bae.datasets.load(config.data, split="test", labels=True))
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(rows), generator=generator)
    train, validation = rows[order].split([config.n_train, len(rows) - config.n_train])
    defects = {}
    for defect in DEFECTS:
        changed = test.clone()
        for index, image in enumerate(test[:, 0]):
            lit = (image > 0.2).nonzero()
            centre = lit[torch.randint(len(lit), (), generator=generator)].tolist()
            others = (names != names[index]).nonzero()[:, 0]
            other = test[others[torch.randint(len(others), (), generator=generator)], 0]
            changed[index, 0] = defect(image, tuple(centre), other, generator)
        masks = (changed - test).abs() > CHANGED
        kept = masks.flatten(1).sum(1) >= 3
        defects[defect.__name__] = changed[kept], masks[kept]
    return World(train, validation[: config.n_validation], test, defects)


def uncertain(predictive: bae.Predictive, x: Tensor) -> bae.ood.Contributions:
    """Contributions over the weight posterior: in closed form where outputs are Normal, else over all networks."""
    if predictive.weights.n_atoms is None:
        return bae.ood.contribution_moments(predictive.moments(x), x)
    return bae.ood.contribution_draws(predictive(x, keep_outputs=True), x)


def parts_of(predictives: dict[str, bae.Predictive], x: Tensor) -> dict[str, Tensor]:
    """Every score of every pixel by name, of the shape of x; the first is the baseline, in grey levels squared."""
    parts = {}
    for name, predictive in predictives.items():
        moments = predictive.moments(x)
        if name == "MAP":  # its density ranks pixels as the squared error does
            parts[BASELINE] = (x - moments.mean) ** 2
            continue
        parts[f"{name}: density"] = bae.ood.contributions(moments, x)
        if predictive.weights.n_atoms != 1:
            spread = uncertain(predictive, x)
            parts[f"{name}: mean - sd"] = spread.mean - spread.standard_deviation
    return parts


def scores_of(predictives: dict[str, bae.Predictive], familiar: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    """`parts_of`, some of them less their mean over familiar images, and that mean alone: it knows no image."""
    parts = parts_of(predictives, x)
    less = {f"{name} - familiar": parts[name] - familiar[name] for name in WITH_REFERENCE}
    return parts | less | {POSITION: familiar[BASELINE].expand(x.shape)}


def fit(config: Config, world: World, seed: int) -> dict[str, bae.Predictive]:
    """One network; posteriors over its weights with one noise scale, and with one for every pixel."""
    torch.manual_seed(seed)
    n_pixels = world.train[0].numel()
    encoder = bae.nets.mlp(n_pixels, config.hidden, config.latent_dim)
    decoder = bae.nets.mlp(config.latent_dim, config.hidden[::-1], n_pixels)
    model = bae.Autoencoder(encoder, decoder, bae.likelihoods.Gaussian())
    bae.fit_model(
        model,
        world.train,
        validation=world.validation,
        epochs=config.epochs,
        learning_rate=config.learning_rate,
        batch_size=config.batch_size,
        seed=seed,
    )
    # the same weights: what differs is the noise alone
    own_noise = bae.wrap(encoder, decoder, bae.likelihoods.Gaussian(per_output=True, floor=config.noise_floor))
    bae.estimate_noise(own_noise, world.validation)
    ensemble = bae.weights.Ensemble(config.n_members, config.epochs, config.learning_rate)
    plan = {
        "MAP": (model, bae.weights.MAP()),
        "Laplace": (model, bae.weights.Laplace()),
        "ensemble": (model, ensemble),
        "MAP, noise per pixel": (own_noise, bae.weights.MAP()),
        "Laplace, noise per pixel": (own_noise, bae.weights.Laplace()),
    }
    return {
        name: bae.Predictive(
            owner, bae.fit_weights(method, owner, world.train, batch_size=config.batch_size, seed=seed)
        )
        for name, (owner, method) in plan.items()
    }


def compare(
    config: Config, world: World, predictives: dict[str, bae.Predictive], has_intervals: bool
) -> Iterator[tuple[str, str, str, float]]:
    """How well every score finds the pixels of every defect, and the images that have one.

    Intervals are the bootstrap's over images, of the baseline's AUROC and of the others' gain over it.

    Yields:
        Defect, score, metric, value.
    """
    familiar = {name: part.mean(0) for name, part in parts_of(predictives, world.validation).items()}
    clean = scores_of(predictives, familiar, world.test)
    for kind, (images, masks) in world.defects.items():
        yield kind, BASELINE, "images", len(images)
        yield kind, BASELINE, "defect pixels", float(masks.float().mean())
        scores = scores_of(predictives, familiar, images)
        aurocs: dict[str, float] = {}
        for name, values in scores.items():
            aurocs[name] = bae.metrics.pixel_auroc(values, masks)
            yield kind, name, "pixel AUROC", aurocs[name]
            yield kind, name, "gain", aurocs[name] - aurocs[BASELINE]
            yield kind, name, "pixel AUPR", bae.metrics.pixel_aupr(values, masks)
            yield kind, name, "PRO-0.3", bae.metrics.per_region_overlap(values, masks)
            if name != POSITION:
                sums = (part.flatten(1).sum(1) for part in (clean[name], values))
                yield kind, name, "image AUROC", bae.metrics.auroc(*sums)
            if not has_intervals:
                continue
            base = None if name == BASELINE else scores[BASELINE]
            interval = bae.metrics.pixel_auroc_interval(values, masks, baseline=base, n_resamples=config.n_resamples)
            what = "pixel AUROC" if base is None else "gain"
            yield from (
                (kind, name, f"{what}, {end}", value) for end, value in zip(("low", "high"), interval[1:], strict=True)
            )


def calibration(predictives: dict[str, bae.Predictive], x: Tensor) -> Iterator[tuple[str, str, float]]:
    """Does the standard deviation of a contribution foretell how far networks trained anew disagree about it?

    Yields:
        Method, metric, value.
    """
    spread = uncertain(predictives["ensemble"], x).standard_deviation.flatten().double()
    n = predictives["ensemble"].weights.n_atoms
    assert n is not None
    own = uncertain(predictives["Laplace"], x).standard_deviation.flatten().double()
    yield "Laplace", "sd, rank correlation with the ensemble's", _rank_correlation(own, spread)
    spread = spread * math.sqrt(n / (n - 1))  # divisor n - 1: of the population that the members are drawn from
    yield "Laplace", "sd over the ensemble's (medians)", float(own.median() / spread.median())
    yield "Laplace", "sd over the ensemble's (root mean squares)", float(own.norm() / spread.norm())


def _rank_correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([values.argsort().argsort().double() for values in (a, b)]))[0, 1])


def draw(
    predictives: dict[str, bae.Predictive], world: World, records: report.Records, path: Path, number: int = 7
) -> None:
    """One image of every defect with three maps of it, and what all of them come to."""
    figure = plt.figure(figsize=(12, 11), layout="constrained")
    halves = figure.add_gridspec(2, 1, height_ratios=(2.6, 1))
    top, bottom = figure.add_subfigure(halves[0]), figure.add_subfigure(halves[1])
    axes = top.subplots(4, len(world.defects))
    laplace = predictives["Laplace, noise per pixel"]
    reference = bae.ood.contributions(laplace.moments(world.validation), world.validation).mean(0)
    columns = []
    for kind, (images, masks) in world.defects.items():
        x = images[number : number + 1]
        error = (x - predictives["MAP"].moments(x).mean) ** 2
        parts = bae.ood.contributions(laplace.moments(x), x, reference=reference)
        columns.append((kind, x[0], masks[number], error[0], parts[0], uncertain(laplace, x).standard_deviation[0]))
    labels = (
        "squared error\n(grey levels squared)",
        "contribution, minus its\nfamiliar mean (nats)",
        "its sd due to\nweights (nats)",
    )
    highs = [max(float(torch.quantile(column[i], 0.99)) for column in columns) for i in (3, 4, 5)]
    for column, (kind, x, mask, *maps) in zip(axes.T, columns, strict=True):
        bae.plots.heat_map(column[0], x, torch.zeros_like(x), high=1.0, outline=mask)
        column[0].set_title(kind)
        for ax, values, high in zip(column[1:], maps, highs, strict=True):
            bae.plots.heat_map(ax, x, values, high=high, outline=mask)
    for row, label in zip(axes[1:], labels, strict=True):
        top.colorbar(row[0].images[-1], ax=row.tolist(), label=label, extend="max")
    top.suptitle(
        "Defects (pixels outlined) and three maps of each; what is low is transparent. "
        "Contributions: Laplace, noise per pixel"
    )
    ax = bottom.subplots()
    shown = [
        POSITION,
        BASELINE,
        "Laplace: density",
        "ensemble: density",
        "Laplace, noise per pixel: density",
        "Laplace, noise per pixel: density - familiar",
    ]
    for index, method in enumerate(shown):
        for place, kind in enumerate(world.defects):
            rows = [r.value for r in records.rows if (r.setting, r.method, r.metric) == (kind, method, "pixel AUROC")]
            x = [place + 0.12 * (index - 2.5)] * len(rows)
            ax.plot(x, rows, "o", color=f"C{index}", markersize=5, label=method if place == 0 else None)
    ax.axhline(0.5, color="0.7", linewidth=1)
    ax.set_xticks(range(len(world.defects)), list(world.defects))
    ax.set_ylabel("pixel AUROC, pooled\n(a dot a seed; 0.5 is chance)")
    ax.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"figure: {path}")


def main() -> None:
    """Run all seeds, print the tables, write records and the figure."""
    flags = report.flags(__doc__, seeds=(0, 1, 2))
    if flags.methods is not None:
        fix = "Leave it out."
        raise bae.errors.UnsupportedError("a run of all methods: they share a baseline and a figure", "--methods", fix)
    config = FAST if flags.fast else Config() if "BAYESAE_DATA" in os.environ else DIGITS
    records, predictives, world = report.Records(), {}, None
    for seed in flags.seeds:
        start = time.perf_counter()
        world = make_world(config, seed)
        predictives = fit(config, world, seed)
        print(f"seed {seed}: fitted after {time.perf_counter() - start:.0f} s", flush=True)
        for kind, method, metric, value in compare(config, world, predictives, has_intervals=seed == flags.seeds[0]):
            records.add(data=config.data, setting=kind, method=method, metric=metric, seed=seed, value=value)
        for method, metric, value in calibration(predictives, world.test):
            records.add(data=config.data, setting="clean images", method=method, metric=metric, seed=seed, value=value)
        print(f"seed {seed}: {time.perf_counter() - start:.0f} s", flush=True)
        if flags.json:
            records.save(flags.json)
    assert world is not None
    print(report.table(records, metrics=["pixel AUROC", "pixel AUPR", "gain", "PRO-0.3", "image AUROC"]))
    draw(predictives, world, records, flags.figures / "defects.png")
    if config == Config():
        records.expect(0.98, 0.02, setting="scratch", method=BASELINE, metric="pixel AUROC")
        records.expect(0.79, 0.04, setting="missing", method=BASELINE, metric="pixel AUROC")
        for kind in world.defects:
            records.expect(0.0, 0.015, setting=kind, method="Laplace: density", metric="gain")
        records.expect(0.04, 0.03, setting="stain", method="MAP, noise per pixel: density", metric="gain")
        records.expect(-0.065, 0.04, setting="missing", method=f"{BASELINE} - familiar", metric="gain")


if __name__ == "__main__":
    main()
