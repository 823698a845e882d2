"""How time, memory and agreement are measured; each of these functions has a process of its own."""

from __future__ import annotations

import importlib
import io
import resource
import statistics
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bayesae import curvature
from benchmarks.contenders import Answer, Contender, Run
from benchmarks.nets import Problem
from benchmarks.questions import Question

__all__ = ["floor", "forward_backward", "largest_error", "memory", "quartiles", "times"]

Found = dict[str, Any]


def largest_error(answer: Answer, other: Answer) -> float:
    """Largest difference, each entry relative to the largest number in it.

    Args:
        answer: Of one.
        other: Of the other, the same names and shapes.

    Returns:
        The largest over entries.

    Raises:
        ValueError: If names or shapes differ, or a number is not finite.
    """
    if {k: v.shape for k, v in answer.items()} != {k: v.shape for k, v in other.items()}:
        raise ValueError("answers of different names or shapes")
    pairs = [(answer[name].double(), other[name].double()) for name in answer]
    if not all(bool(part.isfinite().all()) for pair in pairs for part in pair):
        raise ValueError("numbers that are not finite")
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-300)) for a, b in pairs)


def forward_backward(problem: Problem) -> Run:
    """One plain pass of a batch, squared error, gradients of all weights: the yardstick."""
    network = problem.flat()

    def run(x: Tensor) -> None:
        network.zero_grad()
        nn.functional.mse_loss(network(x), x.flatten(1), reduction="sum").backward()

    return run


def _seconds(run: Run, x: Tensor) -> tuple[float, Any]:
    if x.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    found = run(x)
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start, found


def _quietly(function: Callable[[], Any]) -> Any:  # noqa: ANN401
    """Peers print; the standard output is for the result."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        return function()


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}"


def _fastest(contender: Contender, problem: Problem, x: Tensor) -> tuple[int, Run]:
    """The setting of the lowest time, each tried once."""
    if len(contender.settings) == 1:
        return contender.settings[0], contender.prepare(problem, contender.settings[0])
    runs = {setting: contender.prepare(problem, setting) for setting in contender.settings}
    for run in runs.values():
        run(x[:1])
    best = min(runs, key=lambda setting: _seconds(runs[setting], x)[0])
    return best, runs[best]


class _Entrant:
    """A peer that runs, its rows, and its times so far."""

    def __init__(self, peer: Contender, question: Question, problem: Problem, ours: Run, *, is_quick: bool) -> None:
        images = peer.images[0 if is_quick else 1] or question.batch
        self.images = min(images, question.batch)
        x = problem.batches[0, : self.images]
        self.setting, self.run = _fastest(peer, problem, x)
        first, found = _seconds(self.run, x)
        self.error = largest_error(peer.answer(problem, found), question.ours.answer(problem, ours(x)))
        # a call of many seconds has no start-up worth leaving out
        self.seconds = [first] if first > 5 else []

    def step(self, batch: Tensor, budget: float) -> None:
        """One more time, if there is budget for it."""
        if not self.seconds or sum(self.seconds) + max(self.seconds) < budget:
            self.seconds.append(_seconds(self.run, batch[: self.images])[0])


def times(question: Question, device: str, *, is_quick: bool, rounds: int | None = None) -> Found:
    """Times of ours, of a forward and backward pass and of every peer, interleaved in rounds.

    Args:
        question: What is asked.
        device: Where.
        is_quick: Few rounds, and few images for slow peers.
        rounds: In place of 9 or 25.

    Returns:
        Medians, quartiles, errors and reasons; of peers under ``peers``.
    """
    problem = question.problem(device)
    batches, yardstick = problem.batches, forward_backward(problem)
    ours = question.ours.prepare(problem, question.ours.settings[0])
    first = _seconds(ours, batches[0])[0]
    entrants: dict[str, _Entrant] = {}
    reasons: dict[str, str] = {}
    for peer in question.running(is_quick):
        try:
            entrants[peer.name] = _quietly(lambda peer=peer: _Entrant(peer, question, problem, ours, is_quick=is_quick))
        except Exception as error:  # noqa: BLE001 - a peer that cannot is a result
            reasons[peer.name] = _reason(error)
    own: list[float] = []
    passes: list[float] = []
    budget = 6.0 if is_quick else 60.0
    for i in range(rounds or (9 if is_quick else 25)):
        batch = batches[i % len(batches)]
        yardstick(batch)  # untimed: after a peer of gigabytes the caches are its own
        passes.append(_seconds(yardstick, batch)[0])
        own.append(_seconds(ours, batch)[0])
        for entrant in entrants.values():
            _quietly(lambda entrant=entrant, batch=batch: entrant.step(batch, budget))
    result: Found = {"ours_first_s": first, "ours": own, "forward_backward": passes, "reasons": reasons}
    result["peers"] = {
        name: {
            "seconds": [s * question.batch / entrant.images for s in entrant.seconds],
            "images": entrant.images,
            "setting": entrant.setting,
            "error": entrant.error,
        }
        for name, entrant in entrants.items()
    }
    if question.shows_floor:
        result["floor_s"] = floor(problem, ours)
    if question.shows_plan:
        linear = curvature.Linearisation(problem.network)
        result["plan"] = str(curvature.plan(linear, batches[0], problem.likelihood.output_hessian))
    return result


def memory(question: Question, device: str, who: Contender, setting: int, images: int) -> Found:
    """Largest memory above that after imports, the network and one forward pass.

    Args:
        question: What is asked.
        device: Where.
        who: Ours or a peer.
        setting: Of the contender.
        images: Rows.

    Returns:
        ``peak_mb``.
    """
    for module in who.imports:
        _quietly(lambda module=module: importlib.import_module(module))
    problem = question.problem(device)
    for name in question.reads:
        getattr(problem, name)
    x = problem.batches[0, :images].clone()
    with torch.no_grad():
        problem.network(x)
    is_cuda = torch.device(device).type == "cuda"
    if is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
    else:
        _forget_peak()
        before = resident()
    _quietly(lambda: who.prepare(problem, setting)(x))
    after = torch.cuda.max_memory_allocated() / 2**20 if is_cuda else resident()
    return {"peak_mb": after - before}


def resident() -> float:
    """Largest resident set in megabytes, since `_forget_peak` where the system can forget."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _forget_peak() -> None:
    """Importing takes more memory than what is left of it, which would hide that much growth."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def floor(problem: Problem, ours: Run) -> float:
    """Least time that this machine needs for our operations, or for moving what must be moved.

    Operations over the rate of a large product, or bytes over the rate of a large copy, whichever takes longer. The
    bytes are those of the batch, the weights, the answer and, written and read once, what the layers put out.

    Args:
        problem: The network and the batches.
        ours: Us.

    Returns:
        Seconds.
    """
    from torch.utils.flop_counter import FlopCounterMode

    x = problem.batches[0]
    with FlopCounterMode(display=False) as counter:
        ours(x)
    a = torch.rand(2048, 2048, device=x.device)
    big = torch.rand(2**26, device=x.device)
    target = torch.empty_like(big)
    flops = 2 * 2048**3 / min(_seconds(lambda b: a @ b, a)[0] for _ in range(7))
    bandwidth = 2 * big.nbytes / min(_seconds(target.copy_, big)[0] for _ in range(7))
    moved, value = x.nbytes + 2 * sum(leaf.nbytes for leaf in problem.params.values()), x
    with torch.no_grad():
        for layer in problem.network:
            value = layer(value)
            moved += 2 * value.nbytes
    return max(counter.get_total_flops() / flops, moved / bandwidth)


def quartiles(values: list[float]) -> list[float]:
    """Lower and upper quartile, or the one value twice."""
    if len(values) < 2:
        return values * 2
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, high]
