"""How many code dimensions? The evidence with codes integrated out, against held-out likelihood and the truth.

Data: (a) probabilistic PCA of 12 numbers with 4 code dimensions, 200 rows, noise 1 ("clear") and 2 ("faint": the
weakest of the four directions is near the noise); (b) scikit-learn's digits (8 x 8) and (c) Fashion-MNIST (28 x 28),
with uniform noise of one grey level so that densities are those of continuous numbers. 1000 digits train, 300 validate,
497 test; of Fashion-MNIST 2000, 500 and 1000.

Models: (a) linear decoders with Gaussian noise of one learned scale and the exact posterior of the code
(``codes.Laplace(1, "newton")``, a full covariance), 1 to 8 dimensions, trained to the mode under N(0, 1) on the
weights. (b), (c) a VAE with one hidden layer (32 and 64 units), 1 to 32 dimensions, the same prior. The bound of a
diagonal VAE is no further criterion in (a): with columns at right angles, which training finds, it is the likelihood.

Criteria, all but the held-out likelihood from the training rows alone: `evaluation.integrated_evidence` with the
observed information ("dense"), outer products of scores, and their diagonal (the only one for thousands of weights);
the likelihood itself; BIC (of the free weights, DZ + D - Z (Z - 1) / 2); Minka's evidence of PCA (scikit-learn's
``n_components="mle"``); and the columns that `evaluation.CodeRelevance` leaves of the largest model. Log-likelihoods of
(b) and (c) are importance-sampled with ``codes.Laplace`` as the proposal of every model, nats an image.

Expected over ten seeds, three of images (checked at the end). (a) On clear data the evidence picks 4 in all ten seeds,
with every structure, as BIC, Minka and held-out rows do; relevance in 9 (± 1.5), the likelihood of the training rows
never: it takes 8. On faint data "dense" picks 4 in 8 (± 2), Minka and outer products in 7, BIC and the diagonal in 6,
relevance in 3, 500 more rows in 9 (± 2). (b) On digits the evidence picks 8 each time and validation rows 8 to 32,
because likelihoods hardly differ from 8 on: 23.0 and 23.5 nats a test image (± 1.5); the rank correlation of evidence
and validation likelihood is 0.87 ± 0.12. Relevance leaves 9 of 32. (c) On Fashion-MNIST all agree on 32, the largest,
with a rank correlation of 1.00 ± 0.06; relevance leaves 24. So on data of a known dimension the evidence needs no
held-out rows. On images, where 2000 steps overfit at no size, it is no better a guide than the training rows' own
likelihood, and errs towards small codes.
Runtime: about forty minutes on one core of a busy machine; ``--fast`` about half a minute.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib.pyplot as plt
import torch
from sklearn.decomposition import PCA
from torch import Tensor

import bayesae as bae
from bayesae import evaluation, report

TRUE_SIZE, N_OUTPUTS, N_BATCHES = 4, 12, 20  # batches an epoch, of images
EXACT = bae.codes.Laplace(1, "newton")  # of a linear decoder the posterior itself
NOISES = {"clear": 1.0, "faint": 2.0}
STRUCTURES: dict[str, Literal["dense", "outer_product", "diagonal"]] = {
    "dense": "dense",
    "outer product": "outer_product",
    "diagonal": "diagonal",
}
CRITERIA = (*STRUCTURES, "BIC", "Minka", "relevance", "training rows", "held-out rows")


@dataclass(frozen=True)
class Config:
    """What the recipe fixes."""

    sizes: tuple[int, ...] = tuple(range(1, 9))
    noises: tuple[str, ...] = tuple(NOISES)
    epochs: int = 150
    image_sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    image_sets: tuple[str, ...] = ("digits", "fashion-mnist")
    image_steps: int = 2000
    n_image_seeds: int = 3
    n_draws: int = 200


FULL = Config()
FAST = Config((3, 4, 5), ("clear",), 150, (1, 4, 16), ("digits",), 200, 1, 20)


@dataclass(frozen=True)
class Images:
    """Rows of one data set, and the decoder's hidden units."""

    train: Tensor
    validation: Tensor
    test: Tensor
    hidden: int


def linear_world(seed: int, noise: float) -> tuple[Tensor, Tensor]:
    """Training and held-out rows of probabilistic PCA, the training rows' mean taken off."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(N_OUTPUTS, TRUE_SIZE, generator=generator, dtype=torch.float64)
    codes = torch.randn(700, TRUE_SIZE, generator=generator, dtype=torch.float64)
    x = codes @ weight.mT + noise * torch.randn(700, N_OUTPUTS, generator=generator, dtype=torch.float64)
    x = x - x[:200].mean(0)
    return x[:200], x[200:]


def fit_linear(x: Tensor, size: int, epochs: int, seed: int) -> bae.Autoencoder:
    """The mode of a linear decoder: the objective is log p(x) without noise, so that steps of all rows settle."""
    torch.manual_seed(seed)
    encoder, decoder = bae.nets.mlp(N_OUTPUTS, [], size), bae.nets.mlp(size, [], N_OUTPUTS)
    model = bae.Autoencoder(encoder, decoder, bae.likelihoods.Gaussian()).double()
    options = {"objective": bae.objectives.elbo, "codes": EXACT, "n_latent_draws": 2, "schedule": "cosine"}
    bae.fit_model(model, x, epochs=epochs, batch_size=len(x), learning_rate=0.1, seed=seed, progress=False, **options)
    return model


def relevant(model: bae.Autoencoder, x: Tensor, epochs: int, seed: int) -> int:
    """Code dimensions that automatic relevance leaves, alternated with training."""
    relevance = evaluation.CodeRelevance(burn_in=max(1, epochs // 8), every=5)
    options = {"objective": bae.objectives.elbo, "codes": bae.codes.amortised, "schedule": "cosine"}
    rate, batch_size = (2e-2, 50) if len(x) == 200 else (2e-3, len(x) // N_BATCHES)
    history = bae.fit_model(
        model,
        x,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=rate,
        evidence=relevance,
        seed=seed,
        progress=False,
        **options,
    )
    found = evaluation.code_relevance(model, x, weight_prior=history.weight_prior, seed=seed)
    return int(found.is_active.sum())


def choose_linear(
    x: Tensor, held_out: Tensor, config: Config, seed: int
) -> tuple[dict[str, int], dict[str, list[float]]]:
    """The size that each criterion picks, and their values by size, nats a row."""
    values: dict[str, list[float]] = {name: [] for name in CRITERIA if name not in ("Minka", "relevance")}
    for size in config.sizes:
        model = fit_linear(x, size, config.epochs, seed)
        for name, structure in STRUCTURES.items():
            found = evaluation.integrated_evidence(model, x, EXACT, structure=structure, seed=seed)
            values[name].append(found.log_evidence / len(x))
        for name, rows in (("training rows", x), ("held-out rows", held_out)):
            estimate = evaluation.log_evidence(model, rows, codes=EXACT, n_latent_draws=4, seed=seed, progress=False)
            values[name].append(float(estimate.log_evidence.mean()))
        n_free = N_OUTPUTS * size + N_OUTPUTS - size * (size - 1) / 2
        values["BIC"].append(values["training rows"][-1] - 0.5 * n_free * math.log(len(x)) / len(x))
    picks = {name: config.sizes[max(range(len(row)), key=row.__getitem__)] for name, row in values.items()}
    picks["Minka"] = int(PCA("mle", svd_solver="full").fit(x.numpy()).n_components_)
    largest = config.sizes[-1]
    torch.manual_seed(seed)
    encoder, decoder = bae.nets.mlp(N_OUTPUTS, [], (largest, 2)), bae.nets.mlp(largest, [], N_OUTPUTS)
    diagonal = bae.Autoencoder(encoder, decoder, bae.likelihoods.Gaussian()).double()
    picks["relevance"] = relevant(diagonal, x, config.epochs, seed)
    return picks, values


def load(name: str, seed: int) -> Images:
    """Images with their noise, split at random."""
    generator = torch.Generator().manual_seed(seed)
    if name == "digits":
        rows = torch.cat(bae.datasets.load(name, split=("train", "test")))
        n_levels, sizes, hidden = 17, (1000, 300, 497), 32
    else:
        rows = bae.datasets.load(name, split="train")
        n_levels, sizes, hidden = 256, (2000, 500, 1000), 64
    rows = rows.flatten(1)[torch.randperm(len(rows), generator=generator)[: sum(sizes)]]
    rows = ((n_levels - 1) * rows + torch.rand(rows.shape, generator=generator)) / n_levels
    train, validation, test = rows.split(sizes)
    return Images(train, validation, test, hidden)


def image_model(images: Images, size: int, seed: int) -> bae.Autoencoder:
    """A VAE with one hidden layer and one learned noise scale."""
    torch.manual_seed(seed)
    n_pixels, hidden = images.train.shape[1], (images.hidden,)
    encoder, decoder = bae.nets.mlp(n_pixels, hidden, (size, 2)), bae.nets.mlp(size, hidden, n_pixels)
    return bae.Autoencoder(encoder, decoder, bae.likelihoods.Gaussian())


def measure(images: Images, size: int, config: Config, seed: int) -> dict[str, float]:
    """Evidence and likelihoods of one code size, nats an image."""
    model = image_model(images, size, seed)
    options = {"objective": bae.objectives.elbo, "codes": bae.codes.amortised, "schedule": "cosine"}
    bae.fit_model(
        model,
        images.train,
        epochs=config.image_steps // N_BATCHES,
        batch_size=len(images.train) // N_BATCHES,
        learning_rate=2e-3,
        seed=seed,
        progress=False,
        **options,
    )
    proposal = bae.codes.Laplace()
    found = evaluation.integrated_evidence(
        model, images.train, proposal, structure="diagonal", n_latent_draws=16, seed=seed
    )
    result = {}
    for name in ("train", "validation", "test"):
        rows = getattr(images, name)
        estimate = evaluation.log_evidence(
            model, rows, codes=proposal, n_latent_draws=config.n_draws, seed=seed, progress=False
        )
        result[f"{name} log p"] = float(estimate.log_evidence.mean())
    penalty = (found.log_evidence - found.log_likelihood) / len(images.train)
    return result | {"evidence": result["train log p"] + penalty}


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Spearman's."""
    ranks = [torch.tensor(values).argsort().argsort().double() for values in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def draw(
    linear: dict[str, list[dict[str, list[float]]]],
    images: dict[str, list[dict[int, dict[str, float]]]],
    config: Config,
    path: Path,
) -> None:
    """Criteria by code size, relative to each one's own best, mean over seeds."""
    n_panels = len(linear) + len(images)
    figure, axes = plt.subplots(1, n_panels, figsize=(4.2 * n_panels, 4), layout="constrained", squeeze=False)
    panels = iter(axes[0])
    for setting, runs in linear.items():
        axis = next(panels)
        for name in runs[0]:
            means = torch.tensor([run[name] for run in runs]).mean(0)
            axis.plot(config.sizes, means - means.max(), marker="o", ms=3, label=name)
        axis.axvline(TRUE_SIZE, color="0.8", zorder=0)
        axis.set(title=f"probabilistic PCA, {setting}", xlabel="code dimensions", ylim=(-0.8, 0.05))
    for data, runs in images.items():
        axis = next(panels)
        for name in ("evidence", "train log p", "validation log p", "test log p"):
            means = torch.tensor([[row[name] for row in run.values()] for run in runs]).mean(0)
            axis.plot(config.image_sizes, means - means.max(), marker="o", ms=3, label=name)
        axis.set(title=data, xlabel="code dimensions", xscale="log")
        axis.set_xticks(config.image_sizes, [str(size) for size in config.image_sizes])
    axes[0, 0].set_ylabel("nats a row, less the best")
    for axis in (axes[0, 0], axes[0, -1]):
        axis.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    print(f"figure: {path}")


def main() -> None:
    """Run all seeds, print the tables, write records and the figure."""
    flags = report.flags(__doc__, seeds=tuple(range(10)))
    config = FAST if flags.fast else FULL
    records, start = report.Records(), time.perf_counter()
    linear: dict[str, list[dict[str, list[float]]]] = {}
    images: dict[str, list[dict[int, dict[str, float]]]] = {}

    def adder(data: str, seed: int) -> Callable[[str, str, str, float], None]:
        def add(setting: str, method: str, metric: str, value: float) -> None:
            records.add(data=data, setting=setting, method=method, metric=metric, seed=seed, value=value)

        return add

    for setting in config.noises:
        for seed in flags.seeds:
            picks, values = choose_linear(*linear_world(seed, NOISES[setting]), config, seed)
            linear.setdefault(setting, []).append(values)
            add = adder("probabilistic PCA", seed)
            for name in CRITERIA:
                add(setting, name, "code size", picks[name])
                add(setting, name, "true", float(picks[name] == TRUE_SIZE))
            print(f"{setting}, seed {seed}: {picks} ({time.perf_counter() - start:.0f} s)", flush=True)
    for data in config.image_sets:
        for seed in flags.seeds[: config.n_image_seeds]:
            rows = load(data, seed)
            found = {size: measure(rows, size, config, seed) for size in config.image_sizes}
            images.setdefault(data, []).append(found)
            add = adder(data, seed)
            for size, row in found.items():
                for metric, value in row.items():
                    add(f"code {size}", "VAE", metric, value)
            columns = {name: [row[name] for row in found.values()] for name in found[config.image_sizes[0]]}
            for name in ("evidence", "train log p"):
                add("all sizes", name, "rank correlation", rank_correlation(columns[name], columns["validation log p"]))
            for name in ("evidence", "train log p", "validation log p", "test log p"):
                size = max(found, key=lambda size: found[size][name])
                add("choice", name, "code size", size)
                add("choice", name, "test log p", found[size]["test log p"])
            kept = relevant(
                image_model(rows, config.image_sizes[-1], seed), rows.train, config.image_steps // N_BATCHES, seed
            )
            add("choice", "relevance", "code size", kept)
            print(f"{data}, seed {seed} ({time.perf_counter() - start:.0f} s)", flush=True)
    for kept, metrics in (
        ([row for row in records.rows if row.data == "probabilistic PCA"], ["code size", "true"]),
        (
            [row for row in records.rows if row.method == "VAE"],
            ["evidence", "train log p", "validation log p", "test log p"],
        ),
        ([row for row in records.rows if row.setting == "choice"], ["code size", "test log p"]),
        ([row for row in records.rows if row.setting == "all sizes"], None),
    ):
        print(report.table(report.Records(kept), metrics=metrics))
    if flags.json:
        records.save(flags.json)
    draw(linear, images, config, flags.figures / "code_size.png")
    if not flags.fast:
        for setting, method, value, tolerance in (
            ("clear", "dense", 1.0, 0.1),
            ("clear", "held-out rows", 1.0, 0.1),
            ("clear", "relevance", 0.9, 0.15),
            ("clear", "training rows", 0.0, 0.1),
            ("faint", "dense", 0.8, 0.2),
            ("faint", "held-out rows", 0.9, 0.2),
        ):
            records.expect(value, tolerance, setting=setting, method=method, metric="true")
        for data, value, tolerance in (("digits", 0.87, 0.12), ("fashion-mnist", 1.0, 0.06)):
            records.expect(value, tolerance, data=data, method="evidence", metric="rank correlation")
        for method, value in (("evidence", 23.0), ("validation log p", 23.5)):
            records.expect(value, 1.5, data="digits", setting="choice", method=method, metric="test log p")


if __name__ == "__main__":
    main()
