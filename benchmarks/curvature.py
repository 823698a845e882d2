"""The curvature engine side by side with its peers: time, memory, agreement.

``python -m benchmarks.curvature --quick --json PATH`` takes less than ten minutes on two cores (slow peers get one
image, and the note says so); without ``--quick`` there are more rounds, more images for the peers, more sizes, and the
GPU if there is one. Peers that are not installed, or that cannot answer a question, give null and the reason.

Each question has a process of its own, in which we, every peer and one plain forward and backward pass of the same
batch take turns; times are medians, for the whole batch. Memory is the largest resident set above that after the
imports, the network and one forward pass, in a fresh process for every contender. ``relative_error`` is that between
our answer and the peer's, relative to the largest number in a layer.

Run on a quiet machine: ``python -m benchmarks.curvature --json benchmarks/results/curvature.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure, records
from benchmarks.contenders import Contender
from benchmarks.questions import QUESTIONS, Question

__all__ = ["main"]

# seconds after which a process is given up
_LIMITS = {True: 240, False: 1800}


def _child(given: argparse.Namespace, device: str, threads: int, *extra: str) -> dict[str, Any]:
    """What a process of our own prints, or ``reason``."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.curvature", "--device", device, *extra]
    command += ["--threads", str(threads), *(["--quick"] if given.quick else [])]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    limit = _LIMITS[given.quick]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment)
    except subprocess.TimeoutExpired:
        return {"reason": f"not done in {limit} s"}
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or [""]
        return {"reason": last[0][:400] or f"the process ended with {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def _peaks(given: argparse.Namespace, question: Question, device: str, found: dict[str, Any]) -> dict[str, float | str]:
    """Memory of us and of the peers that answered, two processes at a time."""

    def one(who: Contender) -> float | str:
        their = found["peers"].get(who.name, {"setting": who.settings[0], "images": question.batch})
        extra = ("--setting", str(their["setting"]), "--images", str(their["images"]))
        # one thread, or two processes at a time would wait for each other
        result = _child(given, device, 1, "--measure", f"{question.name}:{who.name}", *extra)
        return result["peak_mb"] if "peak_mb" in result else result["reason"]

    whos = [question.ours, *(peer for peer in question.peers if peer.name in found["peers"])]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip([who.name for who in whos], pool.map(one, whos), strict=True))


def _measure(given: argparse.Namespace) -> dict[str, Any]:
    name, who = given.measure.split(":", 1)
    question = QUESTIONS[name]
    if who == "times":
        return measure.times(question, given.device, is_quick=given.quick)
    contender = next(c for c in (question.ours, *question.peers) if c.name == who)
    return measure.memory(question, given.device, contender, given.setting, given.images)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="less than ten minutes")
    parser.add_argument("--json", type=Path, help="write environment and records to this file")
    parser.add_argument("--only", nargs="+", help="questions whose name starts with one of these")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    for name, kind in (("--measure", str), ("--device", str), ("--setting", int), ("--images", int)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    return parser


def main() -> None:
    """Measure, print the table, write the records."""
    given = _parser().parse_args()
    if given.measure:
        warnings.simplefilter("ignore")
        torch.set_num_threads(given.threads)
        print(json.dumps(_measure(given)))
        return
    chosen = [q for q in QUESTIONS.values() if q.is_in_quick or not given.quick]
    if given.only:
        chosen = [q for q in chosen if q.name.startswith(tuple(given.only))]
    if not chosen:
        raise SystemExit(f"no question of that name; there are {', '.join(QUESTIONS)}")
    environment, rows = records.environment(given.threads), []
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() and not given.quick else [])]
    begun = time.perf_counter()
    for device in devices:
        for question in chosen:
            start = time.perf_counter()
            found = _child(given, device, given.threads, "--measure", f"{question.name}:times")
            peaks = _peaks(given, question, device, found) if "ours" in found else {}
            new = records.question_records(question, device, found, peaks, is_quick=given.quick)
            rows += new
            for r in new:
                print(records.line(r), flush=True)
            if "plan" in found:
                print(found["plan"])
            print(f"  {time.perf_counter() - start:.0f} s", flush=True)
        rows += filter(None, [records.growth(rows, device)])
    environment["total_s"] = time.perf_counter() - begun
    print(f"\n{records.table(rows)}\n\n{environment['total_s']:.0f} s in all")
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(json.dumps(row) for row in rows)
        given.json.write_text(f'{{"environment": {json.dumps(environment)},\n"records": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
