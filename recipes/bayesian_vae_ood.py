"""Do Bayesian variational autoencoders know what they do not know? Weight posteriors x scores x pairs of data sets.

Data: 10,000 training images of Fashion-MNIST or MNIST, 1,000 more to choose steps by and to centre typicality on, and
1,000 test images of Fashion-MNIST, MNIST, KMNIST and Omniglot (968). Set BAYESAE_DATA to the folder of the data.

A VAE (784-256-64-16, mirrored, tanh) is trained with Bernoulli or with Gaussian outputs of one learned scale.
Posteriors over the weights of its decoder or of both networks: SGHMC with scale adaptation, four chains; Bayes by
backprop; SWAG; Laplace, diagonal and linearised; an ensemble of five. All have the passes over the data that the
training had ("MAP, trained on" is the network after as many more), and the step that gives the validation images of
the first seed the highest log predictive density; no score is looked at.

log p(x | theta) is estimated with importance samples from the encoder's posterior, the same noise for all weight draws.
Scores are those of `bayesae.ood`; "corrected" ones add what a pixel can attain at most, which is not the same for all
images under Bernoulli outputs. The background of the likelihood ratio and the densities of codes are fitted once, at
the trained network; the regret, 20 steps an image and draw, is that of the trained network alone. AUROC of every score,
with bootstrap intervals, average precision and false-positive rate for the main ones ("SHOWN"). Three settings: images
as they are; pixels whose standard deviation over the training images is 0.1 at most set to 0 on both sides, in the
validation images too ("border zeroed"); and among images of the same brightness or complexity
(`metrics.matched_auroc`). Batches are of ten images.

**The rule of choice, fixed beforehand**: the posterior and score with the highest AUROC on Fashion-MNIST against
Omniglot, mean over outputs and seeds, is the recommended one; the other pairs report it and do not choose it.

Expected (seed 0, checked at the end): the Bernoulli density takes MNIST for more familiar than Fashion-MNIST (AUROC
0.30), which the correction (0.975) and the deviation of SGHMC draws (0.94) repair; the Gaussian one has 0.98. The rule
chooses the density less the complexity, which fails with MNIST familiar (0.02). All of it is in docs/scores.md.
Runtime: two to three hours of one core a seed; ``--fast`` three minutes.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import torch
from numpy import corrcoef
from scipy.stats import rankdata
from torch import Tensor

import bayesae as bae
from bayesae import ood, report, weights

warnings.filterwarnings("ignore", category=RuntimeWarning, module="bayesae|__main__")  # samplers on their steps
FAMILIAR = ("fashion-mnist", "mnist")
CHOICE = "fashion-mnist / omniglot"
OUTPUTS: dict[str, Callable[[], Any]] = {"Bernoulli": bae.likelihoods.Bernoulli, "Gaussian": bae.likelihoods.Gaussian}
LEARN: dict[str, Any] = {"objective": bae.objectives.elbo, "codes": bae.codes.amortised}
PLAIN = "log density"
POINT, LONGER = "MAP", "MAP, trained on"
Scores = dict[str, Tensor]
CORRECTED, LESS_COMPLEXITY = "log density, corrected", "log density - complexity"
SHOWN = (PLAIN, CORRECTED, LESS_COMPLEXITY, "WAIC", "disagreement", "weight entropy", "deviation")
DRAWN = {PLAIN: "o", "WAIC": "s", "disagreement": "D", "weight entropy": "^", "deviation": "v", "weight variance": "x"}
PUBLISHED = {  # core.md C.3, from memory there and unverified: Fashion-MNIST against MNIST
    "published VAE: log density": 0.557, "published VAE: likelihood ratio": 0.617, "published VAE: typicality": 0.482,
    "published VAE: WAIC": 0.541, "published SGHMC, decoder: disagreement": 0.904,
    "published SGHMC, all: disagreement": 0.921,
}  # fmt: skip
EXPECTED = {  # AUROC of the recorded run, with room for another seed
    ("fashion-mnist / mnist", "Bernoulli", f"MAP: {PLAIN}"): (0.30, 0.1),
    ("fashion-mnist / mnist", "Bernoulli", f"MAP: {CORRECTED}"): (0.975, 0.02),
    ("fashion-mnist / mnist", "Bernoulli", "SGHMC, all: deviation"): (0.93, 0.05),
    ("fashion-mnist / mnist", "Gaussian", f"MAP: {PLAIN}"): (0.975, 0.02),
    ("mnist / fashion-mnist", "Bernoulli", "MAP: log density - complexity"): (0.02, 0.05),
}
NAMES = {
    "negative_log_predictive": PLAIN, "negative_expected_log_density": "expected log density", "waic": "WAIC",
    "typicality": "typicality", "log_density_deviation": "deviation", "disagreement": "disagreement",
    "weight_entropy": "weight entropy", "code_variance": "code variance", "code_volume": "code volume",
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """What the recipe fixes."""

    n_train: int = 10_000
    n_validation: int = 1_000
    n_test: int = 1_000
    hidden: tuple[int, ...] = (256, 64)
    n_latents: int = 16
    epochs: int = 20
    n_members: int = 5
    n_chains: int = 4
    n_weight_draws: int = 16
    n_latent_draws: int = 8
    n_resamples: int = 100
    perturbed: float = 0.2
    batch: int = 10
    lit: float = 0.1


FAST = Config(300, 60, 40, (16,), 2, 4, 2, 2, 4, 2, 5)


def chains(config: Config, step: float, **options: Any) -> weights.SGHMC:  # noqa: ANN401
    """Second half of four chains, thinned to about ten draws each."""
    thinning = max(1, config.epochs * config.n_train // 128 // 20)
    kept: dict[str, Any] = {"burn_in": 0.5, "thinning": thinning, "n_chains": config.n_chains, "epochs": config.epochs}
    return weights.SGHMC(step, preconditioner=weights.ScaleAdaptation(), **kept, **options)


METHODS: dict[str, tuple[Callable[..., Any], tuple[float, ...]]] = {
    "SGHMC": (chains, (1e-5, 1e-4, 1e-3)),
    "Bayes by backprop": (
        lambda c, step, **o: weights.MeanField(c.epochs, step, estimator="local", **o), (1e-5, 1e-4, 1e-3)
    ),
    "SWAG": (lambda c, step, **o: weights.SWAG(c.epochs // 2, c.epochs, step, **o), (1e-6, 1e-5, 1e-4, 1e-3)),
    "Laplace": (lambda c, step, **o: weights.Laplace(**o), (0.0,)),
    "ensemble": (lambda c, step, **o: weights.Ensemble(c.n_members, c.epochs, **o), (0.0,)),
}  # fmt: skip
SUBSETS = {"decoder": ("decoder.**",), "all": ("**",)}


class World(NamedTuple):
    """Images of one familiar set: what trains, what chooses, and test images by set."""

    train: Tensor
    validation: Tensor
    tests: dict[str, Tensor]


def make_world(config: Config, familiar: str, seed: int) -> World:
    """Familiar training and validation rows by the seed; first test images of all sets, flat."""
    rows = bae.datasets.load(familiar, split="train").flatten(1)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    rows = rows[order[: config.n_train + config.n_validation]]
    train, validation = rows.split([config.n_train, config.n_validation])
    others = [name for name in ("fashion-mnist", "mnist", "kmnist", "omniglot") if name != familiar]
    tests = {name: bae.datasets.load(name, split="test")[: config.n_test].flatten(1) for name in (familiar, *others)}
    return World(train, validation, tests)


def train(config: Config, rows: Tensor, validation: Tensor, output: str, seed: int) -> bae.Autoencoder:
    """A VAE."""
    torch.manual_seed(seed)
    n_pixels = rows.shape[1]
    encoder = bae.nets.mlp(n_pixels, config.hidden, (config.n_latents, 2))
    decoder = bae.nets.mlp(config.n_latents, config.hidden[::-1], n_pixels)
    model = bae.Autoencoder(encoder, decoder, OUTPUTS[output]())
    bae.fit_model(model, rows, validation=validation, epochs=config.epochs, seed=seed, **LEARN)
    return model


def perturb(rows: Tensor, share: float, seed: int) -> Tensor:
    """A share of the pixels replaced by uniform noise: what the background model of the likelihood ratio learns."""
    hit, noise = torch.rand(2, *rows.shape, generator=torch.Generator().manual_seed(seed))
    return torch.where(hit < share, noise, rows)


def fit(config: Config, method: Any, model: bae.Autoencoder, rows: Tensor, seed: int) -> bae.Predictive:  # noqa: ANN401
    """One posterior over the weights; Laplace at the mean code, the others under the evidence lower bound."""
    learn = {} if isinstance(method, (weights.Laplace, weights.MAP)) else LEARN
    found = bae.fit_weights(method, model, rows, seed=seed, **learn)
    return bae.Predictive(model, found, bae.codes.amortised)


def draws_of(config: Config, predictive: bae.Predictive, rows: Tensor, **options: Any) -> bae.Draws:  # noqa: ANN401
    """Codes and weights; of few particles each once."""
    n_atoms = predictive.weights.n_atoms
    n = None if n_atoms is not None and n_atoms <= config.n_weight_draws else config.n_weight_draws
    return predictive(rows, n_weight_draws=n, seed=0, **{"n_latent_draws": config.n_latent_draws, **options})


def choose(config: Config, name: str, model: bae.Autoencoder, world: World, seed: int) -> tuple[float, str]:
    """The candidate step that the validation rows like best, for all weights, and what each came to."""
    make, steps = METHODS[name]
    if len(steps) == 1:
        return steps[0], "one"
    densities = {}
    for step in steps:
        try:
            predictive = fit(config, make(config, step), model, world.train, seed)
            densities[step] = -float(ood.negative_log_predictive(draws_of(config, predictive, world.validation)).mean())
        except bae.errors.NonFiniteError:  # diverged: a fair answer of a step that is too large
            densities[step] = -float("inf")
    return max(densities, key=densities.__getitem__), str(densities)


def scores_of(
    config: Config, predictive: bae.Predictive, rows: Tensor, familiar: Tensor, fitted: OfOneNetwork
) -> Scores:
    """Every score that one posterior gives, (B,) each."""
    draws = draws_of(config, predictive, rows)
    found = {NAMES[name]: score for name, score in ood.all_scores(draws, familiar).items() if name in NAMES}
    found[CORRECTED] = found[PLAIN] + ood.attainable(predictive.model.likelihood, rows)
    found |= fitted.scores(draws, rows)
    if draws.log_likelihood.shape[1] == 1:
        return found
    found["weight entropy, T = D"] = ood.weight_entropy(draws, temperature=rows.shape[1])
    kept = []
    for part in rows.split(200):  # of fewer codes: the outputs of all are held at once
        some = draws_of(config, predictive, part, n_latent_draws=2, keep_outputs=True)
        assert some.outputs is not None
        means = some.likelihood.mean(some.outputs).mean(0)
        variance = ((means - means.mean(0)) ** 2).mean(0)
        noise = some.likelihood.variance(some.outputs).mean((0, 1))
        kept.append((ood.information_gain(some), variance.sum(-1), (variance / noise.clamp_min(1e-3)).sum(-1)))
    columns = (torch.cat(column) for column in zip(*kept, strict=True))
    return found | dict(zip(("information gain", "weight variance", "weight variance / noise"), columns, strict=True))


class OfOneNetwork:
    """What is fitted at the trained network: background, densities of codes, refined codes."""

    def __init__(self, config: Config, model: bae.Autoencoder, world: World, output: str, seed: int) -> None:
        self.config, self.world = config, world
        point = bae.fit_weights(weights.MAP(), model, world.train)
        self.start, self.refined = (
            bae.Predictive(model, point, codes)
            for codes in (
                bae.codes.amortised,
                bae.codes.Refined(n_steps=20, learning_rate=0.02, n_directions=min(4, config.n_latents)),
            )
        )
        rows = perturb(world.train, config.perturbed, seed)
        background = train(config, rows, perturb(world.validation, config.perturbed, seed + 1), output, seed)
        self.background = bae.Predictive(
            background, bae.fit_weights(weights.MAP(), background, rows), bae.codes.amortised
        )
        codes = self.start(world.train, n_latent_draws=1, seed=0).latents[0, 0]
        self.mahalanobis, self.flow = ood.Mahalanobis.fit(codes), ood.CodeFlow.fit(codes, seed=seed, progress=False)

    def regret(self, rows: Tensor) -> Scores:
        """What refined codes gain, (B,), of the trained network."""
        start, refined = (draws_of(self.config, one, rows) for one in (self.start, self.refined))
        return {"likelihood regret": ood.likelihood_regret(start, refined)}

    def scores(self, draws: bae.Draws, rows: Tensor) -> Scores:
        """Corrected densities, and densities of codes, of any posterior's draws, (B,) each."""
        plain, complexity = ood.negative_log_predictive(draws), ood.input_complexity(rows)
        return {
            "likelihood ratio": ood.likelihood_ratio(draws, draws_of(self.config, self.background, rows)),
            LESS_COMPLEXITY: plain - complexity.to(plain),
            "codes: Mahalanobis": self.mahalanobis(draws.latents),
            "codes: flow": self.flow(draws.latents),
        }


def compare(
    config: Config, inside: Scores, outside: Scores, images: tuple[Tensor, Tensor], centre: Tensor, is_full: bool
) -> Iterator[tuple[str, str, str, float]]:
    """AUROC of every score, more of the main ones; among images alike in brightness or complexity.

    Yields:
        Setting, score, metric, value.
    """
    brightness, complexity = [x.mean(1) for x in images], [*map(ood.input_complexity, images)]
    matched = {"matched brightness": brightness, "matched complexity": complexity}
    tens = [one[PLAIN].unfold(0, config.batch, config.batch) for one in (inside, outside)]
    batches = [ood.batch_typicality(centre, rows, n_resamples=1).statistics for rows in tens]
    yield "", f"typicality, batches of {config.batch}", "AUROC", bae.metrics.auroc(*batches)
    for name, familiar in inside.items():
        if name not in outside:  # codes that do not span all dimensions have no volume
            continue
        pair = familiar, outside[name]
        yield "", name, "AUROC", bae.metrics.auroc(*pair)
        if not is_full:
            continue
        for setting, by in matched.items():
            yield setting, name, "AUROC", bae.metrics.matched_auroc(*pair, *by)
        ranks = rankdata(familiar), rankdata(brightness[0])
        yield "", name, "rank correlation with brightness", float(corrcoef(*ranks)[0, 1])
        if name in SHOWN:
            interval = bae.metrics.bootstrap_interval(bae.metrics.auroc, *pair, n_resamples=config.n_resamples)
            more = {"low": interval.low, "high": interval.high, "AUPR": bae.metrics.aupr(*pair)}
            for metric, value in (more | {"FPR at 95 %": bae.metrics.fpr_at_tpr(*pair)}).items():
                yield "", name, metric, value


def run(
    config: Config, familiar: str, output: str, seed: int, records: report.Records, only: tuple[str, ...] | None
) -> None:
    """One VAE, every posterior over its weights, every score and pair."""
    world = make_world(config, familiar, seed)
    model = train(config, world.train, world.validation, output, seed)
    chosen = only or (POINT, LONGER, *METHODS)
    lit = world.train.std(0) > config.lit
    zeroed = world.validation * lit, {name: x * lit for name, x in world.tests.items()}
    worlds = {"as is": (world.validation, world.tests), "border zeroed": zeroed}

    def add(data: str, setting: str, method: str, metric: str, value: float) -> None:
        records.add(data=data, setting=f"{output}, {setting}", method=method, metric=metric, seed=seed, value=value)

    add(familiar, "border zeroed", POINT, "share of pixels zeroed", 1 - float(lit.double().mean()))
    alone = OfOneNetwork(config, model, world, output, seed)

    def judge(name: str, predictive: bae.Predictive, more: Callable[[Tensor], Scores] | None = None) -> None:
        for border, (validation, tests) in worlds.items():
            centre = ood.negative_log_predictive(draws_of(config, predictive, validation))
            found = {
                kind: scores_of(config, predictive, x, centre, alone) | (more(x) if more else {})
                for kind, x in tests.items()
            }
            for kind, scores in found.items():
                if kind == familiar:
                    continue
                pair, whole = (tests[familiar], tests[kind]), border == "as is"
                for setting, score, metric, value in compare(config, found[familiar], scores, pair, centre, whole):
                    add(f"{familiar} / {kind}", setting or border, f"{name}: {score}", metric, value)
        quality = draws_of(config, predictive, world.tests[familiar])
        add(familiar, "as is", name, PLAIN, -float(ood.negative_log_predictive(quality).mean()))
        if quality.log_likelihood.shape[1] > 1:
            add(familiar, "as is", name, "share saturated", ood.share_saturated(quality))

    if POINT in chosen:
        judge(POINT, fit(config, weights.MAP(), model, world.train, seed), alone.regret)
    if LONGER in chosen:  # the passes that chains have
        longer = deepcopy(model)
        bae.fit_model(longer, world.train, validation=world.validation, epochs=config.epochs, seed=seed, **LEARN)
        judge(LONGER, fit(config, weights.MAP(), longer, world.train, seed))
    for name, (make, steps) in METHODS.items():
        if name not in chosen:
            continue
        known = records.values(data=familiar, setting=f"{output}, as is", method=name, metric="step")
        step, words = (known[0], "as before") if known else choose(config, name, model, world, seed)
        print(f"{familiar}, {output}, {name}: step {step:g} of {words}", flush=True)
        if len(steps) > 1:
            add(familiar, "as is", name, "step", step)
        for kind, subset in SUBSETS.items():
            start = time.process_time()
            predictive = fit(config, make(config, step, subset=subset), model, world.train, seed)
            add(familiar, "as is", f"{name}, {kind}", "CPU s", time.process_time() - start)
            judge(f"{name}, {kind}", predictive)


def recommended(records: report.Records) -> str:
    """By the rule of choice: "posterior: score"."""
    values: dict[str, list[float]] = {}
    for row in records.rows:
        if row.data == CHOICE and row.metric == "AUROC" and row.setting.endswith("as is"):
            values.setdefault(row.method, []).append(row.value)
    return max(values, key=lambda method: statistics.fmean(values[method]), default=f"nothing, {CHOICE} was not run")


def draw(records: report.Records, best: str, path: Path) -> None:
    """AUROC by pair: plain likelihood, the recommended score, and the scores of the weights, by posterior."""
    drawn = {(f"{output}, as is", "AUROC") for output in OUTPUTS}
    records = report.Records(row for row in records.rows if (row.setting, row.metric) in drawn)
    pairs = list(dict.fromkeys(row.data for row in records.rows))
    posteriors = list(dict.fromkeys(row.method.split(": ")[0] for row in records.rows))
    size = 13, 1.2 + 2.9 * len(pairs)
    figure, grid = plt.subplots(len(pairs), 2, figsize=size, layout="constrained", squeeze=False, sharex=True)
    for line, pair in zip(grid, pairs, strict=True):
        for axes, output in zip(line, OUTPUTS, strict=True):
            for score, marker in DRAWN.items():
                where = {"data": pair, "setting": f"{output}, as is"}
                values = {p: records.values(method=f"{p}: {score}", **where) for p in posteriors}
                points = [(statistics.fmean(v), place) for place, v in enumerate(values.values()) if v]
                if points:
                    axes.plot(*zip(*points, strict=True), marker, label=score, alpha=0.8)
            axes.axvline(0.5, color="grey", linewidth=0.8)
            axes.set_yticks(range(len(posteriors)), posteriors, fontsize=7)
            axes.invert_yaxis()
            axes.set(title=f"{pair}, {output} outputs", xlim=(-0.02, 1.02))
    for axes in grid[-1]:
        axes.set_xlabel("AUROC (mean over seeds; 0.5 is chance)")
    figure.legend(*grid[0][1].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8)
    figure.suptitle(f"Scores by weight posterior; chosen on {CHOICE}: {best}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Run what is asked for, print the tables, write records and the figure."""
    flags = report.flags(__doc__, seeds=(0, 1, 2), data=FAMILIAR)
    config, old = FAST if flags.fast else Config(), flags.json
    records = report.Records.load(old) if old and old.exists() else report.Records()  # steps once chosen, and the rest
    published: dict[str, Any] = {"data": "fashion-mnist / mnist", "setting": "published", "metric": "AUROC", "seed": 0}
    for method, value in PUBLISHED.items():
        records.add(method=method, value=value, **published)
    for seed, familiar, output in product(flags.seeds, flags.data, OUTPUTS):
        start = time.perf_counter()
        run(config, familiar, output, seed, records, flags.methods)
        if flags.json:
            records.save(flags.json, keeps_others=True)
        print(f"{familiar}, {output}, seed {seed}: {time.perf_counter() - start:.0f} s", flush=True)
    records = report.Records.load(old) if old else records  # each number once
    best = recommended(records)
    print(f"recommended, by {CHOICE}: {best}")
    shown = report.Records(row for row in records.rows if row.method in {best, *(method for _, _, method in EXPECTED)})
    if shown.rows:
        print(report.table(shown, metrics=["AUROC"]))
    for (data, output, method), (value, tolerance) in EXPECTED.items() if not flags.fast else ():
        if data.split(" / ")[0] in flags.data and flags.methods is None:
            records.expect(value, tolerance, data=data, setting=f"{output}, as is", method=method, metric="AUROC")
    draw(records, best, flags.figures / "bayesian_vae_ood.png")


if __name__ == "__main__":
    main()
