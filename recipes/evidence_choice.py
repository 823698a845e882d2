"""Which network, which noise, which prior: does the evidence of the training rows choose as held-out rows would?

Data: scikit-learn's digits (8 x 8, 17 grey levels, embedded), with uniform noise of one level on every pixel so that
densities are those of continuous numbers (a pixel that is always 0 would otherwise have any density one likes).
300 images train, 500 are held out to choose by, the rest (997) test.

Models: code sizes 2, 8 and 16 times hidden widths 8, 32 and 128 with Gaussian noise of one scale; and for two of these
sizes a Gaussian scale for every pixel, Student-t noise, and Gaussian noise whose scale the network gives. All are
densities of the same 64 numbers, so that they can be compared; a Bernoulli likelihood of the grey levels is a
probability of something else, and its evidence says nothing beside theirs.

Each is trained by `fit_model(..., evidence=Evidence(Laplace("kronecker")))`: prior precision and noise come from the
training rows alone. Then three priors stand around the same weights: precision 1, the one that maximises the evidence,
and one for every layer. "Log evidence" is per training row, "log density" the mean log predictive density of held-out
and test rows (nats an image, with every pixel's full variance, linearised). The evidence of an autoencoder is that of a
regression of x on itself: the code has seen x, so neither criterion counts the bits of a code.

Expected over the default seeds (checked at the end): the rank correlation over models between log evidence and held-out
log density is 0.91 ± 0.06, among the nine with Gaussian noise 0.97 ± 0.06. The evidence takes the Gaussian with a scale
for every pixel and the code of 8 each time, at 56.7 ± 1.5 nats a test image, the held-out rows another model, at
59.7 ± 1.5; the mean of all models is 36.5. So the evidence ranks, at no cost in rows, but here its choice is 3 nats
below that of 500 more images: it charges wide networks more than they cost (128 hidden units against 32), and scales by
pixel less. About the prior it says little: it always prefers the finest tuning, while held-out rows prefer the same one
of the three in a fifth of the networks, because posteriors around one mode differ by less than a nat or so.
Runtime: about seven minutes on one core; ``--fast`` about twenty seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor

import bayesae as bae
from bayesae import report
from bayesae.likelihoods import Gaussian, HeteroscedasticGaussian, StudentT
from bayesae.types import Likelihood

N_PIXELS, N_TRAIN, N_HELD_OUT = 64, 300, 500
NOISE: dict[str, Callable[[], Likelihood]] = {
    "Gaussian": Gaussian,
    "Gaussian per pixel": lambda: Gaussian(per_output=True),
    "Student-t": StudentT,
    "Gaussian by the network": HeteroscedasticGaussian,
}
PRIORS = ("prior 1", "tuned", "tuned by layer")
CHOOSERS = ("log evidence", "held-out log density")


@dataclass(frozen=True)
class Choice:
    """One model to choose among."""

    noise: str
    code: int
    hidden: int

    def __str__(self) -> str:
        return f"{self.noise}, code {self.code}, hidden {self.hidden}"


@dataclass(frozen=True)
class Config:
    """What the recipe fixes."""

    choices: tuple[Choice, ...]
    epochs: int = 200
    learning_rate: float = 5e-3
    batch_size: int = 50


SIZES = [(code, hidden) for code in (2, 8, 16) for hidden in (8, 32, 128)]
OTHERS = [(noise, *size) for noise in list(NOISE)[1:] for size in ((2, 32), (8, 32))]
FULL = Config(tuple(Choice("Gaussian", *size) for size in SIZES) + tuple(Choice(*other) for other in OTHERS))
FAST = Config((*FULL.choices[:4], *FULL.choices[-5::2]), epochs=20)


def make_world(seed: int) -> dict[str, Tensor]:
    """The digits with their noise, split at random."""
    images = torch.cat(bae.datasets.load("digits", split=("train", "test"))).flatten(1)
    generator = torch.Generator().manual_seed(seed)
    images = (16 * images + torch.rand(images.shape, generator=generator)) / 17
    parts = images[torch.randperm(len(images), generator=generator)]
    sizes = [N_TRAIN, N_HELD_OUT, len(images) - N_TRAIN - N_HELD_OUT]
    return dict(zip(("train", "held-out", "test"), parts.split(sizes), strict=True))


def fit(choice: Choice, config: Config, train: Tensor, seed: int) -> bae.Autoencoder:
    """Train one model to the prior and the noise of its evidence."""
    torch.manual_seed(seed)
    hidden = (choice.hidden,)
    n_out = (N_PIXELS, 2) if choice.noise == "Gaussian by the network" else N_PIXELS
    encoder, decoder = bae.nets.mlp(N_PIXELS, hidden, choice.code), bae.nets.mlp(choice.code, hidden, n_out)
    model = bae.Autoencoder(encoder, decoder, NOISE[choice.noise]())
    bae.fit_model(
        model,
        train,
        epochs=config.epochs,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        schedule="cosine",
        evidence=bae.Evidence(burn_in=10, every=10),
        seed=seed,
    )
    return model


def measure(model: bae.Autoencoder, world: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Evidence a row and log densities under each prior."""
    structures = {
        "prior 1": bae.weights.Laplace("kronecker", tunes_prior=False),
        "tuned": bae.weights.Laplace("kronecker"),
        "tuned by layer": bae.weights.Laplace("kronecker", prior_groups="layer"),
    }
    results = {}
    for prior, laplace in structures.items():
        weights = bae.fit_weights(laplace, model, world["train"])
        assert isinstance(weights, bae.families.KroneckerNormal)
        predictive = bae.Predictive(model, weights)
        scores = {
            kind: bae.ood.negative_log_density(predictive.moments(world[kind], seed=0), world[kind])
            for kind in ("held-out", "test")
        }
        results[prior] = {"log evidence": weights.info["log_evidence"] / N_TRAIN} | {
            f"{kind} log density": -float(score.mean()) for kind, score in scores.items()
        }
    return results


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Spearman's."""
    ranks = [torch.tensor(values).argsort().argsort().double() for values in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def choose(found: dict[Choice, dict[str, dict[str, float]]], name: str) -> tuple[str, dict[str, float]]:
    """The model, with its prior, that a criterion takes: its name and what was measured of it."""
    rows = {f"{choice}, {prior}": row for choice, priors in found.items() for prior, row in priors.items()}
    best = max(rows, key=lambda row: rows[row][name])
    return best, rows[best]


def draw(found: list[dict[Choice, dict[str, dict[str, float]]]], path: Path) -> None:
    """Evidence against held-out density, model by model; and both against the size of the network."""
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.8), layout="constrained")
    colours = dict(zip(NOISE, ("C0", "C1", "C2", "C3"), strict=True))
    for run in found:
        for choice, priors in run.items():
            row = priors["tuned"]
            size = 12 + 5 * choice.code
            axes[0].scatter(row[CHOOSERS[0]], row[CHOOSERS[1]], s=size, color=colours[choice.noise], alpha=0.6, lw=0)
    for noise, colour in colours.items():
        axes[0].scatter([], [], color=colour, label=noise)
    axes[0].set(xlabel="log evidence (nats a training image)", ylabel="held-out log density (nats an image)")
    axes[0].set_title("every model and seed; larger dots, larger codes", fontsize=10)
    axes[0].legend(fontsize=8)
    for axis, name in zip(axes[1:], CHOOSERS, strict=True):
        for number, code in enumerate(sorted({choice.code for choice in found[0]})):
            chosen = sorted({c for c in found[0] if c.noise == "Gaussian" and c.code == code}, key=lambda c: c.hidden)
            for prior, style in zip(PRIORS, (":", "-", "--"), strict=True):
                means = [sum(run[c][prior][name] for run in found) / len(found) for c in chosen]
                label = f"code {code}, {prior}" if prior == "tuned" or number == 0 else None
                axis.plot([c.hidden for c in chosen], means, style, marker="o", ms=3, color=f"C{number}", label=label)
        axis.set(xscale="log", xlabel="hidden units", ylabel=f"{name} (nats an image)")
        axis.set_title("Gaussian noise, mean over seeds", fontsize=10)
        axis.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    print(f"figure: {path}")


def main() -> None:
    """Run all seeds, print the tables, write records and the figure."""
    flags = report.flags(__doc__, seeds=(0, 1, 2))
    config = FAST if flags.fast else FULL
    records, every = report.Records(), []
    for seed in flags.seeds:
        world, found, start = make_world(seed), {}, time.perf_counter()
        for choice in config.choices:
            found[choice] = measure(fit(choice, config, world["train"], seed), world)
            for prior, row in found[choice].items():
                for metric, value in row.items():
                    records.add(data="digits", setting=str(choice), method=prior, metric=metric, seed=seed, value=value)
        every.append(found)

        def add(setting: str, method: str, metric: str, value: float, seed: int = seed) -> None:
            records.add(data="digits", setting=setting, method=method, metric=metric, seed=seed, value=value)

        rows = [priors["tuned"] for priors in found.values()]
        gaussian = [priors["tuned"] for choice, priors in found.items() if choice.noise == "Gaussian"]
        for setting, kept in (("all models", rows), ("Gaussian models", gaussian)):
            value = rank_correlation(*([row[name] for row in kept] for name in CHOOSERS))
            add(setting, "tuned", "rank correlation", value)
        # of every network, whether the evidence and held-out rows order the three priors alike
        agree = [
            max(p, key=lambda k: p[k][CHOOSERS[0]]) == max(p, key=lambda k: p[k][CHOOSERS[1]]) for p in found.values()
        ]
        add("all models", "three priors", "agreement", sum(agree) / len(agree))
        for name in (*CHOOSERS, "test log density"):
            best, row = choose(found, name)
            add("choice", f"by {name}", "test log density", row["test log density"])
            print(f"seed {seed}, by {name}: {best}")
        add("choice", "mean of all models", "test log density", sum(r["test log density"] for r in rows) / len(rows))
        print(f"seed {seed}: {time.perf_counter() - start:.0f} s")
    print(report.table(records, metrics=["log evidence", "held-out log density", "test log density"], methods=PRIORS))
    chosen = [row for row in records.rows if row.setting in ("all models", "Gaussian models", "choice")]
    print(report.table(report.Records(chosen)))
    if flags.json:
        records.save(flags.json)
    draw(every, flags.figures / "evidence_choice.png")
    if not flags.fast:
        records.expect(0.91, 0.06, setting="all models", metric="rank correlation")
        records.expect(0.97, 0.06, setting="Gaussian models", metric="rank correlation")
        records.expect(56.6, 1.5, setting="choice", method="by log evidence", metric="test log density")
        records.expect(59.7, 1.5, setting="choice", method="by held-out log density", metric="test log density")


if __name__ == "__main__":
    main()
