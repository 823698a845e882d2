"""Scores come in as any array or tensor, say the same whichever it is, and belong to the caller afterwards."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import bayesae as bae
from bayesae import decisions, ood
from tests.ood.test_scores import draws, moments

F64 = {"dtype": torch.float64}


def read_only(values):
    array = values.numpy().copy()
    array.setflags(write=False)
    return array


DOORS = {
    "array": lambda values: values.numpy().copy(),
    "read-only": read_only,
    "backwards": lambda values: np.flip(np.flip(values.numpy()).copy()),
    "column": lambda values: torch.stack([values, values], -1)[..., 0],
    "array's column": lambda values: np.stack([values.numpy(), values.numpy()], -1)[..., 0],
    "other byte order": lambda values: values.numpy().astype(">f8"),
    "gradient": lambda values: values.clone().requires_grad_(),
    "inference": lambda values: torch.inference_mode()(values.clone)(),
}


def drifted(scores):
    monitor = ood.DriftMonitor()
    return monitor.update(monitor.init(scores[:20], seed=0), scores[20:])[1]


def windows(scores):
    monitor = ood.TypicalityMonitor(window=10, level=0.1, n_resamples=9)
    return monitor.update(monitor.init(scores[:20], seed=0), scores[20:])[1]


QUESTIONS = {
    "threshold": lambda s: ood.threshold(s, 0.1),
    "p_values": lambda s: ood.ConformalCalibration.fit(s[:20]).p_values(s[20:]),
    "smoothed": lambda s: ood.ConformalCalibration.fit(s[:20]).smoothed_p_values(s[20:], seed=0),
    "combined": lambda s: ood.CombinedCalibration.fit(s.reshape(20, 2)).p_values(s.reshape(20, 2)),
    "DriftMonitor": drifted,
    "log_statistics": lambda s: ood.DriftMonitor().log_statistics(s),
    "TypicalityMonitor": windows,
    "batch_typicality": lambda s: ood.batch_typicality(s[:20], s[20:].reshape(2, 10), n_resamples=9),
    "typicality": lambda s: ood.typicality(s[:20], s[20:]),
    "all_scores": lambda s: ood.all_scores(draws([[-1.0, -2.0]]), s)["typicality"],
    "merge_p_values": lambda s: ood.merge_p_values(s.reshape(20, 2), "mean"),
    "benjamini_hochberg": lambda s: ood.benjamini_hochberg(s),
    "null_share": lambda s: ood.null_share(s),
    "risk_coverage": lambda s: decisions.risk_coverage(s[:20], s[20:]),
    "selective_threshold": lambda s: decisions.selective_threshold(s[:20], s[20:], risk=0.8, n_thresholds=2),
    "reference": lambda s: ood.contributions(moments([[0.0] * 40], [[0.1] * 40]), torch.zeros(1, 40), reference=s),
    "density": lambda s: ood.negative_log_density(moments([[0.0] * 40], [[0.1] * 40]), s.reshape(1, 40)),
    "error": lambda s: ood.reconstruction_error(moments([[0.0] * 40], [[0.1] * 40]), s.reshape(1, 40)),
    "attainable": lambda s: ood.attainable(bae.likelihoods.Bernoulli(), s.reshape(4, 10)),
    "input_complexity": lambda s: ood.input_complexity(s.reshape(4, 10)),
    "joint_information": lambda s: ood.joint_information(s.reshape(40, 1, 1)),
    "acquire": lambda s: decisions.acquire(s.reshape(40, 1, 1), 3),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("question", QUESTIONS)
def test_every_door_leads_to_one_answer(question, door):
    """Without a warning, which the suite takes as an error."""
    scores = 1 - torch.rand(40, **F64)
    expected, found = QUESTIONS[question](scores), QUESTIONS[question](DOORS[door](scores))
    for one, other in zip(*((part if isinstance(part, tuple) else (part,)) for part in (expected, found)), strict=True):
        assert_close(torch.as_tensor(other).detach(), torch.as_tensor(one), rtol=0, atol=0)


def test_whole_numbers_have_distances_that_are_none():
    assert_close(ood.typicality(torch.tensor([1, 2]), torch.tensor([1, 2])), torch.tensor([0.5, 0.5], **F64))


def test_typicality_passes_a_gradient_on():
    scores = torch.tensor([3.0, -1.0], requires_grad=True)
    ood.typicality(scores, torch.tensor([0.0, 2.0])).sum().backward()
    assert_close(scores.grad, torch.tensor([1.0, -1.0]))


@pytest.mark.parametrize("door", [lambda v: v, lambda v: v.numpy()], ids=["tensor", "array"])
def test_what_the_caller_does_to_calibration_scores_later_changes_nothing(door):
    """Float64 on the CPU, which needs no conversion, and sorted, which a sort leaves where it is."""
    for fit in (
        lambda s: ood.ConformalCalibration.fit(s).by_group[None],
        lambda s: ood.CombinedCalibration.fit(s[:, None]).combined.by_group[None],
        lambda s: ood.DriftMonitor().init(s, seed=0).scores,
        lambda s: ood.TypicalityMonitor().init(s, seed=0).calibration,
        lambda s: ood.Mahalanobis.fit(s.reshape(-1, 1)).means,
    ):
        scores = torch.arange(40, **F64)
        kept = fit(door(scores))
        before = kept.clone()
        scores += 1000
        assert torch.equal(kept, before)


def test_what_the_caller_does_to_a_streams_scores_later_changes_nothing():
    scores = torch.arange(30, **F64)
    for monitor, kept in ((ood.DriftMonitor(), "scores"), (ood.TypicalityMonitor(window=50), "waiting")):
        state, _ = monitor.update(monitor.init(torch.zeros(5), seed=0), scores)
        before = getattr(state, kept).clone()
        scores += 1000
        assert torch.equal(getattr(state, kept), before)


def test_missing_values_of_read_only_arrays():
    x, m = read_only(torch.tensor([[0.0, math.nan]])), moments([[0.0, 1.0]], [[0.0, 0.0]])
    mask = ~np.isnan(x)
    mask.setflags(write=False)
    assert_close(ood.reconstruction_error(m, x, mask), torch.zeros(1, **F64))
    assert bool(ood.negative_log_density(m, x, mask).isfinite().all())
