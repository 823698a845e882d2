"""How well are distances between codes known, and do shortest curves keep to the data?

Data: scikit-learn's digits (8 x 8, grey levels 0 to 1, embedded), 1,000 training images; ``--data mnist fashion-mnist``
(or ``--full`` for all): 10,000 of these. Images and pairs are the same for all seeds, which train anew. An autoencoder
with a code of two is trained. Two posteriors over the weights of its decoder: the linearised diagonal Laplace (16
draws; on the digits alone, for its price), and an ensemble. Its codes are held, and five members learn to decode them:
each starts from the autoencoder's decoder and is trained on with a resample of the rows, so that codes mean the same to
all.

Curves between random pairs of codes of two different classes: the straight line; the geodesic of one decoder (the first
member: no weight uncertainty); geodesics of the expected metric of all members, and of the Laplace draws; and those of
independent draws of either, whose spread makes regions long where decoders do not agree. Each is the better of two
solutions, from a straight start and from a path along a graph of encoded images. "Off the data" is the distance in grey
levels (root of the summed squares) from the decoded curve, averaged over members, to the nearest training image, its
mean along the decoded length and over pairs; "less one decoder's" the difference to the geodesics of one decoder, with
95 % intervals from resampled pairs. "Length" is under the members' expected metric, a share of the straight line's.
"Variation" is the standard deviation of a pair's distance over the members, a share of its mean, and "over retrainings"
that over the seeds, each with an encoder of its own, of distances in units of their mean over pairs. What adds the same
to all distances makes them vary less and tells nothing: "agreement" is the rank correlation of the pairs' distances
between two seeds, mean over seeds.

Expected (checked at the end): the expected metric's geodesics are 0.95 ± 0.03 as long as straight lines on the digits.
Runtime: some minutes on two cores for the digits, half an hour for the others; ``--fast`` a few seconds.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from numpy import corrcoef
from scipy.stats import rankdata
from torch import Tensor

import bayesae as bae
from bayesae import geometry, report

# tables say how many curves have converged
warnings.filterwarnings("ignore", category=RuntimeWarning, message=".*not converged")


@dataclass(frozen=True)
class Config:
    """One data set."""

    data: str = "digits"
    hidden: tuple[int, ...] = (64, 32)
    epochs: int = 100
    own_epochs: int = 30
    n_members: int = 5
    n_weight_draws: int = 16
    learning_rate: float = 3e-3
    batch_size: int = 64
    n_train: int = 1_000
    n_nodes: int = 500
    n_pairs: int = 200
    n_segments: int = 32


FAST = Config(epochs=8, own_epochs=2, n_members=2, n_weight_draws=2, n_pairs=4, n_nodes=30, n_segments=16)
OF_IMAGES = {"hidden": (256, 64), "epochs": 20, "own_epochs": 10, "n_train": 10_000, "n_weight_draws": 0}
KNOWN = {"digits": Config()} | {
    name: Config(name, learning_rate=1e-3, batch_size=128, **OF_IMAGES)  # pyright: ignore[reportArgumentType]
    for name in ("mnist", "fashion-mnist")
}
STRAIGHT, ONE = "straight line", "one decoder"
COLOURS = {
    STRAIGHT: "black",
    ONE: "tab:orange",
    "expected metric": "tab:red",
    "independent draws": "tab:blue",
    "Laplace: expected metric": "tab:purple",
    "Laplace: independent draws": "tab:green",
}


@dataclass(frozen=True)
class World:
    """Images, decoders (B, 2) -> (S, B, D) of members and of Laplace draws, and pairs of codes of one seed."""

    train: Tensor
    codes: Tensor
    labels: Tensor
    decoder: geometry.DecoderDraws
    laplace: Callable[[Tensor], Tensor] | None
    starts: Tensor
    ends: Tensor


@dataclass(frozen=True)
class Curves:
    """Points (P, n + 1, 2), distances under the curves' own metric (P,), the share that converged, and seconds."""

    points: Tensor
    distances: Tensor
    converged: float
    seconds: float


def make_world(config: Config, seed: int) -> World:
    """Train network and members; the images and pairs are those of every seed."""
    images, labels = bae.datasets.load(config.data, split="train", labels=True)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(images), generator=generator)[: config.n_train]
    train, labels = images[order].flatten(1), labels[order]
    pairs = torch.randint(len(train), (8 * config.n_pairs, 2), generator=generator)
    pairs = pairs[labels[pairs[:, 0]] != labels[pairs[:, 1]]][: config.n_pairs]
    torch.manual_seed(seed)
    n_pixels, likelihood = train.shape[1], bae.likelihoods.Gaussian
    encoder = bae.nets.mlp(n_pixels, config.hidden, 2)
    first = bae.Autoencoder(encoder, bae.nets.mlp(2, config.hidden[::-1], n_pixels), likelihood())
    options = {"learning_rate": config.learning_rate, "batch_size": config.batch_size}
    bae.fit_model(first, train, epochs=config.epochs, seed=seed, **options)
    with torch.no_grad():
        codes = first.encoder(train).reshape(len(train), 2)
    members = []
    for number in range(config.n_members):
        # the codes are data: each member learns to decode a resampled part of them
        resample = torch.Generator().manual_seed(1000 * seed + number)
        some = torch.randint(len(train), (len(train),), generator=resample)
        own = bae.Autoencoder(torch.nn.Identity(), deepcopy(first.decoder), likelihood())
        batch = bae.Batch(codes[some], target=train[some])
        bae.fit_model(own, batch, epochs=config.own_epochs, seed=1000 * seed + number, **options)
        members.append(own.decoder.requires_grad_(False))
    laplace = None
    if config.n_weight_draws:
        posterior = bae.fit_weights(bae.weights.Laplace(subset=["decoder.**"]), first, train, seed=seed)
        laplace = bae.Predictive(first, posterior).decoder(config.n_weight_draws, seed=seed)
    return World(train, codes, labels, geometry.DecoderDraws(members), laplace, codes[pairs[:, 0]], codes[pairs[:, 1]])


def shortest(config: Config, metric: geometry.SegmentEnergy, world: World) -> Curves:
    """The better of a straight start and one along a graph of encoded images."""
    start, n = time.perf_counter(), config.n_segments
    graph = geometry.neighbour_graph(metric.as_metric(), world.codes[: config.n_nodes])
    found = geometry.geodesics(metric, world.starts, world.ends, n_segments=n, graph=graph)
    converged = float(found.has_converged.double().mean())
    return Curves(found.points, found.length, converged, time.perf_counter() - start)


def curves_of(config: Config, world: World) -> dict[str, Curves]:
    """Every kind of curve; the straight line's distance is the codes' own."""
    straight = geometry.straight_lines(world.starts, world.ends, config.n_segments)
    metrics: dict[str, geometry.SegmentEnergy] = {
        ONE: geometry.Pullback(world.decoder.singles[0]),
        "expected metric": geometry.Pullback(world.decoder),
        "independent draws": geometry.IndependentDraws(world.decoder),
    }
    if world.laplace is not None:
        metrics["Laplace: expected metric"] = geometry.Pullback(world.laplace)
        metrics["Laplace: independent draws"] = geometry.IndependentDraws(world.laplace)
    found = {STRAIGHT: Curves(straight, (world.ends - world.starts).norm(dim=1), 1.0, 0.0)}
    return found | {name: shortest(config, metric, world) for name, metric in metrics.items()}


def off_the_data(world: World, points: Tensor) -> Tensor:
    """Distance of decoded curves to their nearest training images, mean along the decoded length, (P,)."""
    with torch.no_grad():
        decoded = world.decoder(points.flatten(0, 1)).mean(0)
    nearest = torch.cat([torch.cdist(part, world.train).amin(1) for part in decoded.split(1024)])
    nearest = nearest.unflatten(0, points.shape[:2])
    steps = geometry.Pullback(world.decoder).segments(points).sqrt()
    return (steps * (nearest[:, 1:] + nearest[:, :-1]) / 2).sum(1) / steps.sum(1)


def resampled(values: Tensor, n_resamples: int = 1000) -> tuple[float, float, float]:
    """Mean over pairs, and the ends of its 95 % interval under resampling of pairs."""
    chosen = torch.randint(len(values), (n_resamples, len(values)), generator=torch.Generator().manual_seed(0))
    low, high = values[chosen].mean(1).quantile(torch.tensor([0.025, 0.975]).to(values)).tolist()
    return float(values.mean()), low, high


def measure(config: Config, world: World, records: report.Records, seed: int) -> dict[str, Curves]:
    """Add the rows of one seed; the curves."""
    expected, found = geometry.Pullback(world.decoder), curves_of(config, world)
    straight = geometry.chord_length(expected, found[STRAIGHT].points)
    off = {name: off_the_data(world, curves.points) for name, curves in found.items()}
    for name, curves in found.items():
        mean, low, high = resampled(off[name] - off[ONE])
        values = {
            "length": float((geometry.chord_length(expected, curves.points) / straight).mean()),
            "off the data": float(off[name].mean()),
            "less one decoder's": mean,
            "low": low,
            "high": high,
            "converged": curves.converged,
            "seconds": curves.seconds,
        }
        for metric, value in values.items():
            records.add(data=config.data, setting="curves", method=name, metric=metric, seed=seed, value=value)
    draws = geometry.distance_draws(world.decoder, world.starts, world.ends, n_segments=config.n_segments)
    value = float(draws.variation().median())
    records.add(data=config.data, setting="curves", method=ONE, metric="variation", seed=seed, value=value)
    return found


def over_retrainings(config: Config, records: report.Records, distances: dict[str, list[Tensor]]) -> None:
    """Variation of a pair's distance over trainings, in units of the mean over pairs, and how they rank pairs."""
    for name, of_seeds in distances.items():
        scaled = torch.stack([one / one.mean() for one in of_seeds])
        ends = resampled(scaled.std(0) / scaled.mean(0))
        ranks = torch.from_numpy(corrcoef(rankdata(scaled.numpy(), axis=1)))
        agreement = float(ranks[~torch.eye(len(ranks), dtype=torch.bool)].mean())
        for metric, value in zip(("variation", "low", "high", "agreement"), (*ends, agreement), strict=True):
            records.add(data=config.data, setting="over retrainings", method=name, metric=metric, seed=0, value=value)


def draw(config: Config, world: World, found: dict[str, Curves], path: Path) -> None:
    """The code space with curves, a band, and film strips of one pair."""
    metric, curves = geometry.Pullback(world.decoder), {name: one.points for name, one in found.items()}
    figure = plt.figure(figsize=(12, 8.5), layout="constrained")
    halves = figure.add_gridspec(2, 1, height_ratios=(1.7, 1))
    top, bottom = figure.add_subfigure(halves[0]), figure.add_subfigure(halves[1])
    left, right = top.subplots(1, 2)
    low, high = world.codes.amin(0), world.codes.amax(0)
    margin = 0.05 * (high - low)
    for axes in (left, right):
        bae.plots.volume_background(
            axes, lambda z: geometry.log_volume_element(metric, z), low - margin, high + margin, cmap="Greys"
        )
    left.scatter(
        world.codes[:, 0].numpy(), world.codes[:, 1].numpy(), c=world.labels.numpy(), cmap="tab10", s=4, linewidths=0
    )
    longest = (curves["expected metric"] - curves["straight line"]).norm(dim=-1).amax(1).argsort(descending=True)
    bae.plots.code_curves(left, {name: points[longest[:40:10]] for name, points in curves.items()}, colours=COLOURS)
    left.set_title("Curves between four pairs of codes")
    one = longest[:3]
    band = geometry.geodesic_band(world.decoder, world.starts[one], world.ends[one])
    bae.plots.curve_band(right, band.points, colour="tab:orange", label="each member's own geodesic")
    bae.plots.code_curves(right, {"expected metric": band.expected.points}, colours=COLOURS)
    spread = float(band.distances.variation().mean())
    right.set_title(f"Geodesics of the members; distances vary by {100 * spread:.0f} %")
    times = torch.linspace(0, 1, 12)
    frames, side = {}, round(world.train.shape[1] ** 0.5)
    for name, points in curves.items():
        along = geometry.Polyline(points[one[:1]])(times)[0]
        frames[name] = world.decoder(along).mean(0).reshape(-1, side, side).clamp(0, 1)
    axes = bottom.subplots()
    bae.plots.film_strip(axes, frames, high=1.0)
    axes.set_title("Decoded along the curves of one pair, at equal times")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    print(f"figure: {path}")


def main() -> None:
    """Run all seeds, print the tables, write records and figures."""
    flags = report.flags(__doc__, seeds=(0, 1, 2), has_full=True, data=tuple(KNOWN))
    records = report.Records()
    for config in [FAST] if flags.fast else [KNOWN[name] for name in flags.data]:
        distances: dict[str, list[Tensor]] = {}
        for number, seed in enumerate(flags.seeds):
            world = make_world(config, seed)
            found = measure(config, world, records, seed)
            for name, curves in found.items():
                distances.setdefault(name, []).append(curves.distances)
            if number == 0:
                draw(config, world, found, flags.figures / f"geodesics_{config.data}.png")
            print(f"{config.data}, seed {seed}: { ({n: round(c.seconds) for n, c in found.items()}) } s", flush=True)
        if len(flags.seeds) > 1:
            over_retrainings(config, records, distances)
        if flags.json:
            records.save(flags.json, keeps_others=True)
    print(report.table(records, settings=["curves"]))
    if not flags.fast and "digits" in flags.data:
        records.expect(0.95, 0.03, data="digits", method="expected metric", metric="length")


if __name__ == "__main__":
    main()
