"""Has the stream changed? Which monitor of an autoencoder's scores says so, how soon, and how often in vain?

Data: scikit-learn's digits (embedded), familiar 0 to 7, strangers 8 and 9; with ``--full`` or ``--data`` also
Fashion-MNIST from ``BAYESAE_DATA`` with MNIST as strangers. One autoencoder, MAP; the score of an image is minus its
log predictive density. Images that nothing was fitted on give 200 (1,000) calibration scores and a stream, 200 (50)
times in another random order for each seed. After 100 (500) rows the stream

- goes on as it was (**no drift**): images are exchangeable, so that every alarm is false,
- takes in strangers, a share that grows to one half (**strangers come**),
- gets noisy, up to a standard deviation of 0.2 grey levels (**noise grows**),
- or loses the half of the classes with the higher scores (**classes go**): what is left is *too* familiar.

Shares and noise grow over a third of the 100 (1,000) rows that follow. "Each row alone" is `ood.threshold` at 1 % a
row. The other monitors are set to a chance of 1 % at most for a false alarm *anywhere in the stream*: martingales by
their level, CUSUM and Shiryaev-Roberts by 1 % over the number of rows, typicality of windows of 20 (100) rows by 1 %
over the number of windows. "Any false alarm" is the share of streams without drift in which there was one; "found" the
share of drifting streams, of those without an alarm before the change, that raise one after it; "delay" the mean number
of rows from the change to it, of those found.

Promised, and checked at the end against the number of streams (99 % binomial intervals, from both sides where the
chance is known): each row alone raises a false alarm in 0.751 of the streams of the digits (1 - C(200, 2) / C(400, 2))
and in nearly all of the 1,500 rows of Fashion-MNIST; permuted windows in 0.01; martingales, CUSUM and Shiryaev-Roberts
in 0.01 at most, which a monitor that never spoke would keep, too: what they find is checked below.

Expected on digits, means over seeds 0 to 2 (checked at the end):

- The published bootstrap takes the mean of 200 calibration rows as known, and has alarms in 0.0325 ± 0.01 of the
  streams, more than any chance of 0.01 gives.
- Noise is found by every monitor but "each row alone" in nine streams of ten and more, after 47 ± 8 rows by typicality,
  50 ± 5 by the jumper, 66 ± 10 by CUSUM.
- Strangers: 0.80 ± 0.15 found by Shiryaev-Roberts, 0.75 ± 0.15 by the jumper, 0.37 ± 0.3 by the power mixture.
- That classes are gone, the mean of 20 scores hardly shows (0.02 ± 0.015 found), ranks do: 0.34 ± 0.2 by
  Shiryaev-Roberts. The power mixture bets on strange rows alone and finds no more than it may find in vain.

On Fashion-MNIST (checked where it was run) every monitor but the power mixture finds every kind, typicality 0.78 ± 0.15
of the streams whose classes go. Delays: strangers 186 ± 20 rows by typicality, 216 ± 15 by the power mixture, 241 ± 15
by the jumper; noise 188 ± 10 by Shiryaev-Roberts, 195 ± 10 by the jumper, 263 ± 20 by typicality; classes 171 ± 20 by
Shiryaev-Roberts.

Runtime: half a minute of one core for the digits, minutes for Fashion-MNIST; ``--fast`` a few seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib.pyplot as plt
import torch
from torch import Tensor

import bayesae as bae
from bayesae import report

LEVEL = 0.01
CONFIDENCE = 0.99
SETTINGS = ("no drift", "strangers come", "noise grows", "classes go")
EACH_ROW = "each row alone"
RESAMPLED: tuple[Literal["permutation", "bootstrap"], ...] = ("permutation", "bootstrap")
N_NOISES = 11


@dataclass(frozen=True)
class Config:
    """What the recipe fixes."""

    data: str
    hidden: tuple[int, ...]
    latent_dim: int
    epochs: int
    n_train: int
    n_validation: int
    n_calibration: int
    n_before: int
    n_after: int
    window: int
    n_streams: int = 200
    noise: float = 0.2

    @property
    def n_rows(self) -> int:
        """Of a stream."""
        return self.n_before + self.n_after

    @property
    def monitors(self) -> dict[str, bae.ood.DriftMonitor]:
        """Each with a chance of LEVEL at most for a false alarm anywhere in a stream."""
        rare = LEVEL / self.n_rows  # n rows see a false alarm with probability n times this
        return {
            "martingale, jumper": bae.ood.DriftMonitor(LEVEL),
            "martingale, power mixture": bae.ood.DriftMonitor(LEVEL, bet=bae.ood.PowerMixture()),
            "CUSUM, jumper": bae.ood.DriftMonitor(rare, "cusum"),
            "Shiryaev-Roberts, jumper": bae.ood.DriftMonitor(rare, "shiryaev-roberts"),
        }

    @property
    def window_level(self) -> float:
        """Level of each window, whose sum over a stream is LEVEL."""
        return LEVEL * self.window / self.n_rows

    @property
    def n_resamples(self) -> int:
        """As many as that level needs."""
        return math.ceil(1 / self.window_level) - 1


DIGITS = Config("digits", (64, 32), 4, 80, 720, 144, 200, 100, 100, 20)
GARMENTS = Config("fashion-mnist", (256, 64), 16, 10, 10_000, 1_000, 1_000, 500, 1_000, 100, n_streams=50)
FAST = Config("digits", (64, 32), 4, 5, 720, 144, 200, 100, 100, 20, n_streams=20)


JUMPER, MIXTURE, CUSUM, ROBERTS = DIGITS.monitors
CLAIMS = [  # data, setting, method, metric, mean over seeds, tolerance
    ("digits", "no drift", "typicality, bootstrap", "any false alarm", 0.0325, 0.01),
    ("digits", "noise grows", "typicality, permutation", "delay", 47, 8),
    ("digits", "noise grows", JUMPER, "delay", 50, 5),
    ("digits", "noise grows", CUSUM, "delay", 66, 10),
    ("digits", "strangers come", ROBERTS, "found", 0.80, 0.15),
    ("digits", "strangers come", JUMPER, "found", 0.75, 0.15),
    ("digits", "strangers come", MIXTURE, "found", 0.37, 0.3),
    ("digits", "classes go", "typicality, permutation", "found", 0.02, 0.015),
    ("digits", "classes go", ROBERTS, "found", 0.34, 0.2),
    ("fashion-mnist", "strangers come", "typicality, permutation", "delay", 186, 20),
    ("fashion-mnist", "strangers come", MIXTURE, "delay", 216, 15),
    ("fashion-mnist", "strangers come", JUMPER, "delay", 241, 15),
    ("fashion-mnist", "noise grows", ROBERTS, "delay", 188, 10),
    ("fashion-mnist", "noise grows", JUMPER, "delay", 195, 10),
    ("fashion-mnist", "noise grows", "typicality, permutation", "delay", 263, 20),
    ("fashion-mnist", "classes go", "typicality, permutation", "found", 0.78, 0.15),
    ("fashion-mnist", "classes go", ROBERTS, "delay", 171, 20),
]


@dataclass(frozen=True)
class Scores:
    """Scores of images on which nothing was fitted.

    Args:
        noisy: Familiar images without noise and under more and more of it, (N_NOISES, N).
        strangers: Strange images, (M,).
        is_staying: Whether a familiar image is of a class that stays when the others go, (N,).
    """

    noisy: Tensor
    strangers: Tensor
    is_staying: Tensor

    @property
    def familiar(self) -> Tensor:
        """Without noise, (N,)."""
        return self.noisy[0]


def load(config: Config) -> tuple[Tensor, Tensor, Tensor]:
    """Familiar images, their classes, and strangers; those to train on come first."""
    split = ("train", "test")
    if config.data == "digits":
        images, labels = map(torch.cat, zip(*bae.datasets.load("digits", split=split, labels=True), strict=True))
        return images[labels < 8], labels[labels < 8], images[labels >= 8]
    train, test = bae.datasets.load(config.data, split=split, labels=True)
    strangers = bae.datasets.load("mnist", split="test")
    n_fitted = config.n_train + config.n_validation
    images, labels = (torch.cat([a[:n_fitted], b]) for a, b in zip(train, test, strict=True))
    return images, labels, strangers


def score(config: Config, seed: int) -> Scores:
    """Train one network and score everything that streams are made of."""
    images, labels, strangers = load(config)
    generator = torch.Generator().manual_seed(seed)
    if config.data == "digits":
        order = torch.randperm(len(images), generator=generator)
        images, labels = images[order], labels[order]
    train, validation, held_out = images.tensor_split([config.n_train, config.n_train + config.n_validation])
    labels = labels[config.n_train + config.n_validation :]
    torch.manual_seed(seed)
    n_pixels = train[0].numel()
    encoder = bae.nets.mlp(n_pixels, config.hidden, config.latent_dim)
    decoder = bae.nets.mlp(config.latent_dim, config.hidden[::-1], n_pixels)
    model = bae.Autoencoder(encoder, decoder, bae.likelihoods.Gaussian())
    bae.fit_model(model, train, validation=validation, epochs=config.epochs, seed=seed)
    predictive = bae.Predictive(model, bae.fit_weights(bae.weights.MAP(), model, train, seed=seed))

    def of(x: Tensor) -> Tensor:
        return bae.ood.negative_log_density(predictive.moments(x), x)

    grain = torch.randn(held_out.shape, generator=generator)
    noisy = torch.stack([of((held_out + sd * grain).clamp(0, 1)) for sd in torch.linspace(0, config.noise, N_NOISES)])
    medians = {int(name): float(noisy[0, labels == name].median()) for name in labels.unique()}
    staying = sorted(medians, key=medians.__getitem__)[: len(medians) // 2]
    return Scores(noisy, of(strangers), torch.isin(labels, torch.tensor(staying)))


def stream(scores: Scores, setting: str, config: Config, seed: int) -> tuple[Tensor, Tensor]:
    """Calibration scores and a stream that changes after n_before rows: the same images in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(scores.familiar), generator=generator)
    calibration, rest = order.tensor_split([config.n_calibration])
    before, after = rest.tensor_split([config.n_before])
    if setting == "classes go":
        after = after[scores.is_staying[after]]
    after = after[: config.n_after]
    growth = torch.linspace(0, 3, len(after)).clamp(max=1)
    drifting = scores.familiar[after]
    if setting == "strangers come":
        comes = torch.rand(len(after), generator=generator) < 0.5 * growth
        strangers = scores.strangers[torch.randperm(len(scores.strangers), generator=generator)[: len(after)]]
        drifting = torch.where(comes, strangers, drifting)
    elif setting == "noise grows":
        drifting = scores.noisy[(growth * (N_NOISES - 1)).round().long(), after]
    return scores.familiar[calibration], torch.cat([scores.familiar[before], drifting])


def first_alarms(scores: Scores, setting: str, config: Config, seed: int) -> dict[str, list[int | None]]:
    """Row of the first alarm in each stream, or None, by method."""
    streams = [stream(scores, setting, config, 10_000 * seed + number) for number in range(config.n_streams)]
    found: dict[str, list[int | None]] = {}
    ranks = []
    for number, (calibration, values) in enumerate(streams):
        beyond = (values > bae.ood.threshold(calibration, LEVEL)).nonzero()
        found.setdefault(EACH_ROW, []).append(int(beyond[0]) + 1 if len(beyond) else None)
        for method in RESAMPLED:
            monitor = bae.ood.TypicalityMonitor(config.window, config.window_level, method, config.n_resamples)
            state, _ = monitor.update(monitor.init(calibration, seed=number), values)
            found.setdefault(f"typicality, {method}", []).append(state.alarmed_at)
        any_bet = bae.ood.DriftMonitor()
        ranks.append(any_bet.update(any_bet.init(calibration, seed=number), values)[1].p_values)
    for name, monitor in config.monitors.items():
        # the p-values do not depend on the bet: one ranking serves all, and all streams go side by side
        is_alarm = monitor.log_statistics(torch.stack(ranks)) >= monitor.log_limit
        found[name] = [int(row.int().argmax()) + 1 if bool(row.any()) else None for row in is_alarm]
    return found


def measure(alarms: list[int | None], setting: str, config: Config) -> dict[str, float]:
    """How often a stream without drift raises an alarm; how often and when one with it does, if it was quiet before."""
    if setting == SETTINGS[0]:
        return {"any false alarm": sum(alarm is not None for alarm in alarms) / len(alarms)}
    quiet = [alarm for alarm in alarms if alarm is None or alarm > config.n_before]
    delays = [alarm - config.n_before for alarm in quiet if alarm is not None]
    measured = {"found": len(delays) / len(quiet)} if quiet else {}
    return measured | ({"delay": sum(delays) / len(delays)} if delays else {})


def draw(scores: Scores, config: Config, seed: int, path: Path) -> None:
    """One stream of each kind: martingales above, p-values of windows below."""
    figure, axes = plt.subplots(2, len(SETTINGS), figsize=(16, 7), layout="constrained", sharey="row", sharex=True)
    monitors = {name: config.monitors[f"martingale, {name}"] for name in ("jumper", "power mixture")}
    for column, setting in enumerate(SETTINGS):
        calibration, values = stream(scores, setting, config, 10_000 * seed)
        change = config.n_before if setting != SETTINGS[0] else None
        upper, lower = axes[0, column], axes[1, column]
        lines: dict[str, Tensor] = {}
        for name, monitor in monitors.items():
            lines[name] = monitor.update(monitor.init(calibration, seed=0), values)[1].log_statistics
        limit = monitors["jumper"].log_limit
        bae.plots.stream_trace(upper, lines, limit=limit, change=change, label="log martingale, nats")
        windows = values.unfold(0, config.window, config.window)
        lines = {}
        for method in RESAMPLED:
            lines[method] = bae.ood.batch_typicality(
                calibration, windows, method=method, n_resamples=config.n_resamples
            ).p_values
        lower.set_yscale("log")
        label = f"p-value of the mean score of {config.window} rows"
        bae.plots.stream_trace(lower, lines, limit=config.window_level, label=label, change=change, every=config.window)
        upper.set_title(f"{config.data}: {setting}")
        upper.set_xlabel("")
        if column:
            for panel in (upper, lower):
                panel.set_ylabel("")
        if column != 1:
            for panel in (upper, lower):
                panel.get_legend().remove()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"figure: {path}")


def promised(config: Config, n_streams: int) -> dict[str, tuple[float, float]]:
    """What keeps the promises about false alarms in streams without drift.

    Each row alone alarms beyond the calibration scores' largest but k - 1: nowhere, if the k largest of all rows are
    calibration rows, whatever the scores. Windows by permutation have their level, and few streams two alarms. The
    others' chance is LEVEL at most: any smaller share keeps that promise.

    Args:
        config: Of the streams.
        n_streams: How many there were, in all seeds.

    Returns:
        Smallest and largest share of streams with an alarm by method: an interval that holds CONFIDENCE of them.
    """
    from scipy.stats import binom

    k = int(LEVEL * (config.n_calibration + 1))
    alone = 1 - math.comb(config.n_calibration, k) / math.comb(config.n_calibration + config.n_rows, k)
    chances = {EACH_ROW: alone, "typicality, permutation": LEVEL} | dict.fromkeys(config.monitors, LEVEL)
    found = {}
    for method, chance in chances.items():
        low, high = binom.interval(CONFIDENCE, n_streams, chance)
        low = 0 if method in config.monitors else low
        found[method] = (float(low - 0.5) / n_streams, float(high + 0.5) / n_streams)
    return found


def judge(records: report.Records) -> None:
    """Check every promise and claim, means over seeds."""

    def expect_between(low: float, high: float, **where: str) -> None:
        records.expect((low + high) / 2, (high - low) / 2, **where)

    for config in (DIGITS, GARMENTS):
        no_drift = {"data": config.data, "setting": SETTINGS[0], "metric": "any false alarm"}
        n_streams = config.n_streams * len(records.values(method=EACH_ROW, **no_drift))
        if not n_streams:
            continue
        shares = promised(config, n_streams)
        for method, (low, high) in shares.items():
            expect_between(low, high, method=method, **no_drift)
        quiet = {"setting": "classes go", "method": MIXTURE, "metric": "found"}  # it bets on strange rows alone
        expect_between(*shares[MIXTURE], data=config.data, **quiet)
        for data, setting, method, metric, value, tolerance in CLAIMS:
            if data == config.data:
                records.expect(value, tolerance, data=data, setting=setting, method=method, metric=metric)


def main() -> None:
    """Run the data sets, print the tables, write records and the figure, check the numbers."""
    known = {config.data: config for config in (DIGITS, GARMENTS)}
    flags = report.flags(__doc__, seeds=(0, 1, 2), has_full=True, data=tuple(known))
    configs = [FAST] if flags.fast else [known[name] for name in flags.data]
    records = report.Records()
    for config in configs:
        for seed in flags.seeds:
            scores = score(config, seed)
            for setting in SETTINGS:
                for method, alarms in first_alarms(scores, setting, config, seed).items():
                    measured = measure(alarms, setting, config)
                    for metric, value in measured.items():
                        where = {"data": config.data, "setting": setting, "method": method, "seed": seed}
                        records.add(metric=metric, value=value, **where)
            if config is configs[0] and seed == flags.seeds[-1]:
                draw(scores, config, seed, flags.figures / "drift.png")
        of_data = report.Records([row for row in records.rows if row.data == config.data])
        print(report.table(of_data), end="\n\n")
    if flags.json:
        records.save(flags.json, keeps_others=True)
    if not flags.fast:
        judge(records)


if __name__ == "__main__":
    main()
