"""Timing in interleaved rounds: a base run stands right before every run it is compared with."""

from __future__ import annotations

import json
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from hyperalign.files import write_text

RESULTS = Path(__file__).parent / "results"
GIB = 2**30
Run = Callable[[], object]


@dataclass(slots=True)
class Row:
    """What was measured of one method."""

    seconds: list[float] = field(default_factory=list[float])
    ratios: list[float] = field(default_factory=list[float])
    """Each run's time over that of the base run right before it."""
    peak_gib: float | None = None
    """Greatest memory allocated on a GPU; unknown on a CPU."""


def rounds(base: Run, others: Mapping[str, Run], device: torch.device, repeats: int, deadline: float,
           report: Callable[[dict[str, Row], Row], None]) -> None:  # fmt: skip
    """Times base, A, base, B, ... for each round, so that drift of the machine hits all alike.

    Args:
        base: one run of the base, already warm.
        others: one run of each method, already warm.
        device: where they run.
        repeats: rounds.
        deadline: `time.monotonic()` after which no round begins that would not end by then; the
            first round always runs.
        report: takes what was measured of the methods and of the base, after every round.
    """
    rows, plain = {name: Row() for name in others}, Row()
    for _ in range(repeats):
        began = time.monotonic()
        if not others:
            plain.seconds.append(timed(base, device)[0])
        for name, run in others.items():
            reference, plain.peak_gib = timed(base, device)
            plain.seconds.append(reference)
            seconds, rows[name].peak_gib = timed(run, device)
            rows[name].seconds.append(seconds)
            rows[name].ratios.append(seconds / reference)
        report(rows, plain)
        if time.monotonic() + (time.monotonic() - began) > deadline:
            break


def timed(run: Run, device: torch.device) -> tuple[float, float | None]:
    """Returns the seconds of a run, and the peak GiB on a GPU.

    Wall time to the last kernel on a GPU, processor time on a CPU: others' work on a shared machine
    lengthens the one and not the other.
    """
    if device.type != "cuda":
        start = time.process_time()
        run()
        return time.process_time() - start, None
    torch.cuda.reset_peak_memory_stats(device)
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start, torch.cuda.max_memory_allocated(device) / GIB


def interleaved(parts: Mapping[str, Run], device: torch.device, repeats: int) -> dict[str, list[float]]:
    """Returns the milliseconds of each part's runs; the parts take turns after one run to warm up."""
    taken: dict[str, list[float]] = {name: [] for name in parts}
    for repeat in range(repeats + 1):
        for name, run in parts.items():
            seconds, _ = timed(run, device)
            if repeat:
                taken[name].append(1000 * seconds)
    return taken


def spread(values: Sequence[float]) -> dict[str, float]:
    """Returns the median with the least and the greatest value."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def figures(row: Row, forwards: int) -> dict[str, Any]:
    """Returns a row as JSON types; the base has no ratio."""
    result: dict[str, Any] = {"ratio": spread(row.ratios)} if row.ratios else {}
    return result | {
        "run_s": spread(row.seconds),
        "ms_per_forward": spread([1000 * seconds / forwards for seconds in row.seconds]),
        "peak_gib": row.peak_gib,
    }


def table(title: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the figures as a Markdown table; a row that has `not_measured` says why."""
    lines = [
        title, "",
        "| row | time / base: median [min, max] | ms a forward | peak GiB | weights generated |",
        "|---|---|---|---|---|",
    ]  # fmt: skip
    for name, row in rows.items():
        if why := row.get("not_measured"):
            lines.append(f"| {name} | not measured: {why} | | | |")
            continue
        ratio, peak = row.get("ratio"), row["peak_gib"]
        ratio_text = f"{ratio['median']:.3f} [{ratio['min']:.3f}, {ratio['max']:.3f}]" if ratio else "1"
        peak_text = "" if peak is None else f"{peak:.2f}"
        lines.append(
            f"| {name} | {ratio_text} | {row['ms_per_forward']['median']:.1f} | {peak_text} "
            f"| {row.get('generations', '')} |"
        )
    return "\n".join(lines)


def environment(device: torch.device, packages: Sequence[str]) -> dict[str, Any]:
    """Returns what a figure depends on besides the code."""
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "device": device.type,
        "device_name": device_name(device),
        "clock": "wall" if device.type == "cuda" else "processor time of the process",
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("torch", *packages)},
    }


def device_name(device: torch.device) -> str:
    """Returns the processor's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def slug(device: torch.device) -> str:
    """Returns the device's name for a file's name: `cpu`, `nvidia-h200`."""
    name = device_name(device) if device.type == "cuda" else device.type
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def save_json(results: Mapping[str, Any], path: Path) -> None:
    """Writes beside the target and moves into place: a reader sees the old file or the whole new one."""
    write_text(path, json.dumps(results, indent=1) + "\n")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
