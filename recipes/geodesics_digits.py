"""How well are distances between codes known, and do shortest curves keep to the data?

Data: scikit-learn's digits (8 x 8, grey levels 0 to 1, embedded). An autoencoder with a code of two is trained on 60 %
of the training images. Its codes are then held, and the members of an ensemble learn to decode them: each starts from
the autoencoder's decoder and is trained on with a resample of the rows, so that codes mean the same to all.

Curves between random pairs of codes of two different digits: the straight line, the geodesic of one decoder (the
first), the geodesic of the expected metric of all, and that of independent draws, whose spread makes regions long where
the decoders do not agree. "Off the data" is the distance in grey levels (root of the summed squares) from the decoded
curve, averaged over members, to the nearest training image, its mean over the curve and pairs. "Length" is under the
expected metric, a share of the straight line's. "Variation" is the standard deviation of a pair's distance over the
members, a share of its mean: how far one training's distances can be trusted.

Expected (checked at the end): the expected metric's geodesics are 0.95 ± 0.03 as long as straight lines. They do
not keep nearer to the training images than straight lines do on seed 0, nor do those of independent draws.
Runtime: some minutes on two cores; ``--fast`` a few seconds.
"""

from __future__ import annotations

import time
import warnings
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor

import bayesae as bae
from bayesae import geometry, report


@dataclass(frozen=True)
class Config:
    """What the recipe fixes."""

    hidden: tuple[int, ...] = (64, 32)
    epochs: int = 100
    own_epochs: int = 30
    n_members: int = 5
    learning_rate: float = 3e-3
    batch_size: int = 64
    n_pairs: int = 50
    n_segments: int = 32


FAST = Config(epochs=8, own_epochs=2, n_members=2, n_pairs=4, n_segments=16)
CURVES = ("straight line", "one decoder", "expected metric", "independent draws")


@dataclass(frozen=True)
class World:
    """Images of one seed, the decoders (B, 2) -> (S, B, 64) and pairs of codes."""

    train: Tensor
    codes: Tensor
    labels: Tensor
    members: list[torch.nn.Module]
    starts: Tensor
    ends: Tensor

    def decoder(self, z: Tensor) -> Tensor:
        """Outputs of all members."""
        return torch.stack([member(z).flatten(1) for member in self.members])


def make_world(config: Config, seed: int) -> World:
    """Train the members and draw the pairs."""
    images, labels = bae.datasets.load("digits", split="train", labels=True)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)[: int(0.6 * len(images))]
    train, names = images[order], labels[order]
    torch.manual_seed(seed)
    encoder = bae.nets.mlp(64, config.hidden, 2)
    first = bae.Autoencoder(encoder, bae.nets.mlp(2, config.hidden[::-1], 64), bae.likelihoods.Gaussian())
    options = {"learning_rate": config.learning_rate, "batch_size": config.batch_size}
    bae.fit_model(first, train, epochs=config.epochs, seed=seed, **options)
    with torch.no_grad():
        codes = first.encoder(train.flatten(1)).reshape(len(train), 2)
    members = []
    for number in range(config.n_members):
        # the codes are data: each member learns to decode a resampled part of them
        some = torch.randint(len(train), (len(train),), generator=generator)
        own = bae.Autoencoder(torch.nn.Identity(), deepcopy(first.decoder), bae.likelihoods.Gaussian())
        batch = bae.Batch(codes[some], target=train.flatten(1)[some])
        bae.fit_model(own, batch, epochs=config.own_epochs, seed=1000 * seed + number, **options)
        members.append(own.decoder.requires_grad_(False))
    starts, ends = [], []
    while len(starts) < config.n_pairs:
        i, j = torch.randint(len(train), (2,), generator=generator).tolist()
        if names[i] != names[j]:
            starts.append(codes[i])
            ends.append(codes[j])
    return World(train.flatten(1), codes, names, members, torch.stack(starts), torch.stack(ends))


def curves_of(config: Config, world: World) -> dict[str, tuple[Tensor, float, float]]:
    """Points (P, n + 1, 2) of every kind of curve, the share that converged, and seconds."""
    metrics: dict[str, geometry.SegmentEnergy] = {
        "one decoder": geometry.Pullback(lambda z: world.members[0](z).flatten(1)[None]),
        "expected metric": geometry.Pullback(world.decoder),
        "independent draws": geometry.IndependentDraws(world.decoder),
    }
    found = {"straight line": (geometry.straight_lines(world.starts, world.ends, config.n_segments), 1.0, 0.0)}
    for name, metric in metrics.items():
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # the table says how many have converged
            curves = geometry.geodesics(metric, world.starts, world.ends, n_segments=config.n_segments)
        share = float(curves.has_converged.double().mean())
        found[name] = (curves.points, share, time.perf_counter() - start)
    return found


def measure(config: Config, world: World, records: report.Records, seed: int) -> dict[str, Tensor]:
    """Add the rows of one seed; the curves."""
    expected, found = geometry.Pullback(world.decoder), curves_of(config, world)
    straight = geometry.chord_length(expected, found["straight line"][0])
    for name, (points, converged, seconds) in found.items():
        decoded = world.decoder(points.flatten(0, 1)).mean(0)
        values = {
            "length": float((geometry.chord_length(expected, points) / straight).mean()),
            "off the data": float(torch.cdist(decoded, world.train).amin(1).mean()),
            "converged": converged,
            "seconds": seconds,
        }
        for metric, value in values.items():
            records.add(data="digits", setting="code 2", method=name, metric=metric, seed=seed, value=value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        draws = geometry.distance_draws(world.decoder, world.starts, world.ends, n_segments=config.n_segments)
    value = float(draws.variation().median())
    records.add(data="digits", setting="code 2", method="one decoder", metric="variation", seed=seed, value=value)
    return {name: points for name, (points, _, _) in found.items()}


def draw(world: World, curves: dict[str, Tensor], path: Path) -> None:
    """The code space with curves, a band, and film strips of one pair."""
    metric = geometry.Pullback(world.decoder)
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
    colours: dict[str, str] = dict(zip(CURVES, ("black", "tab:orange", "tab:red", "tab:blue"), strict=True))
    bae.plots.code_curves(left, {name: points[longest[:4]] for name, points in curves.items()}, colours=colours)
    left.set_title("Curves between four pairs of codes")
    one = longest[:3]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        band = geometry.geodesic_band(world.decoder, world.starts[one], world.ends[one])
    bae.plots.curve_band(right, band.points, colour="tab:orange", label="each member's own geodesic")
    bae.plots.code_curves(right, {"expected metric": band.expected.points}, colours=colours)
    spread = float(band.distances.variation().mean())
    right.set_title(f"Geodesics of the members; distances vary by {100 * spread:.0f} %")
    times = torch.linspace(0, 1, 12)
    frames = {}
    for name, points in curves.items():
        along = geometry.Polyline(points[one[:1]])(times)[0]
        frames[name] = world.decoder(along).mean(0).reshape(-1, 8, 8).clamp(0, 1)
    axes = bottom.subplots()
    bae.plots.film_strip(axes, frames, high=1.0)
    axes.set_title("Decoded along the curves of one pair, at equal times")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    print(f"figure: {path}")


def main() -> None:
    """Run all seeds, print the table, write records and the figure."""
    flags = report.flags(__doc__, seeds=(0, 1, 2))
    config = FAST if flags.fast else Config()
    records = report.Records()
    world, curves = None, {}
    for seed in flags.seeds:
        world = make_world(config, seed)
        curves = measure(config, world, records, seed)
    print(report.table(records, methods=list(CURVES)))
    if flags.json:
        records.save(flags.json)
    if world is not None:
        draw(world, curves, flags.figures / "geodesics_digits.png")
    if not flags.fast:
        records.expect(0.95, 0.03, method="expected metric", metric="length")


if __name__ == "__main__":
    main()
