"""Records of a run: from measurements to what is written and printed."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import quartiles
from benchmarks.questions import Question

__all__ = ["environment", "growth", "line", "question_records", "table", "write"]

_PACKAGES = (
    "bayesae", "torch", "laplace-torch", "backpack-for-pytorch", "curvlinops-for-pytorch", "asdfghjkl", "stochman",
)  # fmt: skip
Record = dict[str, Any]


def write(path: Path, threads: int, records: list[dict[str, Any]]) -> None:
    """Records and what they were measured on, as the README's tables read them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": environment(threads), "records": records}, indent=1) + "\n")


def environment(threads: int) -> Record:
    """What the numbers depend on and the code does not say."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "python": platform.python_version(),
        **versions,
        "system": f"{platform.system()} {platform.machine()}",
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def question_records(
    question: Question, device: str, found: Record, peaks: dict[str, float | str], *, is_quick: bool = False
) -> list[Record]:
    """One record a peer, or one of ours alone where there is none.

    Args:
        question: What was asked.
        device: Where.
        found: From `measure.times`.
        peaks: Memory in megabytes by contender's name, or why there is no number.
        is_quick: Which peers ran.

    Returns:
        The records.
    """
    if "ours" not in found:
        return [{"question": question.name, "device": device, "ours_s": None, "peer": None, "reason": found["reason"]}]
    ours, passes = statistics.median(found["ours"]), statistics.median(found["forward_backward"])
    common = {
        "question": question.name,
        "device": device,
        "batch": question.batch,
        "ours_s": ours,
        "ours_first_s": found["ours_first_s"],
        "forward_backward_s": passes,
        "over_forward_backward": ours / passes,
        "ours_peak_mb": _number(peaks.get(question.ours.name)),
        "pixels": question.pixels,
        "plan": found.get("plan"),
        "floor_s": found.get("floor_s"),
        "fraction_of_floor": found["floor_s"] / ours if "floor_s" in found else None,
    }
    result = []
    for peer in question.running(is_quick) or [None]:
        name = peer.name if peer else ""
        record = {
            **common,
            "peer": name or None,
            "peer_s": None,
            "ratio": None,
            "peer_peak_mb": None,
            "relative_error": None,
        }
        record["spread"] = {"ours_s": quartiles(found["ours"])}
        reasons, notes = [found["reasons"].get(name)], [question.note]
        their = found["peers"].get(name)
        if their is not None:
            record["peer_s"] = statistics.median(their["seconds"])
            record["ratio"] = record["peer_s"] / ours
            record["relative_error"] = their["error"]
            record["peer_setting"], record["peer_images"] = their["setting"], their["images"]
            record["spread"]["peer_s"] = quartiles(their["seconds"])
            record["peer_peak_mb"] = _number(peaks.get(name))
            if their["images"] != question.batch:
                notes.append(f"peer measured on {their['images']} images, its time scaled to {question.batch}")
            reasons.append(_text(peaks.get(name)))
        reasons.append(_text(peaks.get(question.ours.name)))
        record["reason"] = "; ".join(filter(None, reasons)) or None
        record["note"] = "; ".join(filter(None, notes)) or None
        targets = dict(question.targets)
        if their is None or (peer is not None and not peer.is_held_to_ratio):
            targets.pop("ratio", None)
        record["target"], record["reached"] = targets, _reached(record, targets)
        result.append(record)
    return result


def _number(value: float | str | None) -> float | None:
    return None if isinstance(value, str) else value


def _text(value: float | str | None) -> str | None:
    return f"memory: {value}" if isinstance(value, str) else None


def _reached(record: Record, targets: dict[str, float]) -> dict[str, bool | None]:
    """Whether each target was; None where its number is missing."""
    fields = {"ratio": "ratio", "over_forward_backward": "over_forward_backward", "peak_mb": "ours_peak_mb"}
    reached: dict[str, bool | None] = {}
    for name, target in targets.items():
        value = record[fields[name]]
        reached[name] = None if value is None else value >= target if name == "ratio" else value <= target
    return reached


def growth(records: Sequence[Record], device: str) -> Record | None:
    """Exponents of time and memory over sizes, by least squares on logarithms.

    Args:
        records: Of all questions.
        device: Which of them.

    Returns:
        A record, or None with fewer than two sizes.
    """
    series = [r for r in records if r.get("pixels") and r["device"] == device and r["ours_peak_mb"] is not None]
    if len(series) < 2:
        return None
    pixels = [float(r["pixels"]) for r in series]
    seconds = [r["ours_s"] for r in series]
    # below a megabyte it is pages, not tensors
    peaks = [max(r["ours_peak_mb"], 1.0) for r in series]
    record = {"question": "growth", "device": device, "peer": None, "pixels": pixels, "ours_s": seconds}
    record |= {"ours_peak_mb": peaks, "ratio": None, "reason": None, "note": "MLP of 256, 64, 2; constants shared"}
    record["time_exponent"], record["memory_exponent"] = _slope(pixels, seconds), _slope(pixels, peaks)
    record["target"] = {"time_exponent": 1.0, "memory_exponent": 1.0}
    record["reached"] = {name: record[name] <= 1 for name in record["target"]}
    return record


def _slope(x: Sequence[float], y: Sequence[float]) -> float:
    return statistics.linear_regression([math.log(v) for v in x], [math.log(v) for v in y]).slope


def table(records: Sequence[Record]) -> str:
    """A Markdown table with one line a record.

    Args:
        records: The records.

    Returns:
        The table; milliseconds and megabytes, and whether targets were reached.
    """
    header = ["question", "peer", "ours ms", "/ f+b", "peer ms", "ratio", "MB", "peer MB", "error", "targets"]
    lines = [header, [*(["---"] * len(header))]]
    for r in records:
        if r["question"] == "growth":
            cells = [f"time ^{r['time_exponent']:.2f}", "", "", "", f"^{r['memory_exponent']:.2f}", "", ""]
        else:
            cells = [
                _cell(r.get("ours_s"), 1000), _cell(r.get("over_forward_backward")), _cell(r.get("peer_s"), 1000),
                _cell(r.get("ratio")), _cell(r.get("ours_peak_mb")), _cell(r.get("peer_peak_mb")),
                _cell(r.get("relative_error")),
            ]  # fmt: skip
        question = r["question"] + ("" if r["device"] == "cpu" else f" ({r['device']})")
        lines.append([question, r["peer"] or "", *cells, _targets(r)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    rows = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines]
    missing = [f"{r['question']}, {r['peer'] or 'ours'}: {r['reason']}" for r in records if r.get("reason")]
    return "\n".join([*rows, *(["", *missing] if missing else [])])


def line(record: Record) -> str:
    """A record on one line, for progress."""
    parts = [record["question"], record["peer"] or "ours alone", f"ours {_cell(record['ours_s'], 1000)} ms"]
    if record.get("over_forward_backward"):
        parts.append(f"{record['over_forward_backward']:.2f} f+b")
    if record.get("ratio"):
        parts.append(f"{_cell(record['ratio'])}x, error {record['relative_error']:.1e}")
    return "  ".join([*parts, *filter(None, [record.get("reason")])])


def _cell(value: float | None, scale: float = 1.0) -> str:
    return "" if value is None else f"{value * scale:.3g}" if abs(value * scale) < 1000 else f"{value * scale:,.0f}"


def _targets(record: Record) -> str:
    words = {True: "reached", False: "MISSED", None: "not measured"}
    signs = {"ratio": "ratio >=", "over_forward_backward": "f+b <=", "peak_mb": "MB <="}
    found = record.get("reached", {}).items()
    return ", ".join(f"{signs.get(k, k + ' <=')} {record['target'][k]:g} {words[v]}" for k, v in found)
