"""What labels of a few rows make of codes: nearest neighbours or a linear probe on means or on draws of the code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

N_CLASSES = 10


@dataclass(frozen=True)
class Codes:
    """Codes of all rows, K draws each, (K, N, Z); means are one draw.

    Args:
        train: Of the training rows.
        test: Of the test rows.
    """

    train: Tensor
    test: Tensor


def predict(kind: str, value: float, x: Tensor, y: Tensor, x_test: Tensor) -> Tensor:
    """Probabilities (M, C), means over draws (K, M, Z) of the test rows, from draws (K, n, Z) of labelled rows."""
    n_draws, flat, labels = len(x), x.flatten(0, 1).numpy(), y.repeat(len(x)).numpy()
    # K draws of a row count as one row: for the penalty, and among the neighbours
    if kind == "probe":
        fitted = LogisticRegression(C=value / n_draws, max_iter=2000).fit(flat, labels)
    else:
        fitted = KNeighborsClassifier(int(value) * n_draws).fit(flat, labels)
    shares = torch.as_tensor(fitted.predict_proba(x_test.flatten(0, 1).numpy()))
    if kind == "neighbours":  # and one more neighbour, of all classes alike
        shares = (value * shares + 1 / N_CLASSES) / (value + 1)
    return shares.reshape(*x_test.shape[:2], N_CLASSES).mean(0)


def classify(values: Sequence[float], kind: str, given: Codes, rows: Tensor, y: Tensor) -> Tensor:
    """Probabilities of the test rows (M, C) from labels ``y`` of some training rows, as `subset` orders them.

    Args:
        values: Neighbours, or inverse penalties of the probe, of which cross-validation takes one; of one label a class
            the first is taken.
        kind: "neighbours" or "probe".
        given: The codes.
        rows: Numbers of the labelled rows.
        y: Their labels.

    Returns:
        The probabilities.
    """
    # one scale for all directions, which says nothing of their use
    scale = given.train.flatten(0, 1).var(0).mean().sqrt()
    x, x_test = given.train[:, rows] / scale, given.test / scale

    def held_out(value: float) -> float:
        """Mean log-probability of each half of the labelled rows, given the other."""
        fold = torch.arange(len(rows)) // N_CLASSES % 2
        total = 0.0
        for half in (fold == 0, fold == 1):
            total -= scores(predict(kind, value, x[:, ~half], y[~half], x[:, half]), y[half])["NLL"]
        return total

    value = values[0] if len(rows) == N_CLASSES else max(values, key=held_out)
    return predict(kind, value, x, y, x_test)


def scores(p: Tensor, y: Tensor) -> dict[str, float]:
    """Accuracy, negative log-likelihood in nats a row, and the expected calibration error (15 bins) of the label."""
    confidence, label = p.double().max(-1)
    is_right = (label == y).double()
    bins = (confidence * 15).long().clamp(max=14)
    gaps = torch.zeros(15, dtype=torch.double).index_add(0, bins, is_right - confidence)
    nll = -p.double().gather(1, y[:, None]).clamp(min=1e-300).log().mean()
    return {"accuracy": float(is_right.mean()), "NLL": float(nll), "ECE": float(gaps.abs().sum() / len(y))}


def subset(y: Tensor, n: int, seed: int) -> Tensor:
    """Row numbers of n random rows of each class, the classes in turn; halves of an even n have all classes."""
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    return torch.stack([order[y[order] == label][:n] for label in range(N_CLASSES)], 1).flatten()
