"""Small convolutions on a CPU, alone and beside busy processes, by how OpenMP's threads wait.

    python -m benchmarks.openmp                    # about 2 minutes; run it on an idle machine
    python -m benchmarks.openmp --seconds 3 --rounds 1

Each setting runs in a process of its own, in turn with the others. The load is one busy process per core.
Prints a table and writes benchmarks/results/openmp_cpu.json.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import tyro
from torch import nn

from benchmarks.rounds import RESULTS, environment, save_json, spread
from hyperalign.openmp import WAITING, wait_passively

CHANNELS, SIDE = 32, 16
WARM_UP = 20
DEFAULT, OURS = "default", "hyperalign"


@dataclass(frozen=True, slots=True)
class Options:
    """Measures convolutions per second with several settings of OpenMP."""

    seconds: float = 5.0
    """Length of one measurement."""
    rounds: int = 3
    """Measurements of each setting, alone and under load."""
    out: Path = RESULTS
    """Folder of the JSON file."""
    child: bool = False
    """Measures once in this process and prints the rate; the command starts itself so."""


def settings() -> dict[str, dict[str, str]]:
    """Returns the compared variables of the environment by name."""
    ours: dict[str, str] = {}
    wait_passively(ours)
    return {DEFAULT: {}, OURS: ours, "GOMP_SPINCOUNT=0": {"GOMP_SPINCOUNT": "0"}}


@torch.no_grad()
def convolutions_per_second(seconds: float) -> float:
    """Returns how many 3 x 3 convolutions of a (1, CHANNELS, SIDE, SIDE) input this process does."""
    layer = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
    x_BCHW = torch.randn(1, CHANNELS, SIDE, SIDE)
    for _ in range(WARM_UP):
        layer(x_BCHW)
    start, count = time.monotonic(), 0
    while (elapsed := time.monotonic() - start) < seconds:
        layer(x_BCHW)
        count += 1
    return count / elapsed


def measure_apart(setting: dict[str, str], seconds: float) -> float:
    """Returns the rate in a new process whose environment has the setting."""
    variables = {name: value for name, value in os.environ.items() if name not in WAITING} | setting
    command = [sys.executable, "-m", "benchmarks.openmp", "--child", "--seconds", str(seconds)]
    done = subprocess.run(command, env=variables, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout)


@contextmanager
def load(processes: int) -> Iterator[None]:
    """Keeps processes busy during the block."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def measure(options: Options) -> dict[str, dict[str, list[float]]]:
    """Returns the rates by load and by setting."""
    loads = {"idle": 0, "loaded": os.cpu_count() or 1}
    rates: dict[str, dict[str, list[float]]] = {name: {key: [] for key in settings()} for name in loads}
    for _ in range(options.rounds):
        for name, processes in loads.items():
            for key, setting in settings().items():
                with load(processes):
                    rates[name][key].append(measure_apart(setting, options.seconds))
    return rates


def table(rates: dict[str, dict[str, list[float]]]) -> str:
    """Returns the rates as a Markdown table."""
    lines = [
        "| machine | setting | convolutions/s: median [min, max] | times the default |",
        "|---|---|---|---|",
    ]
    for name, by_setting in rates.items():
        default = median(by_setting[DEFAULT])
        for key, values in by_setting.items():
            found = spread(values)
            shown = f"{found['median']:.0f} [{found['min']:.0f}, {found['max']:.0f}]"
            lines.append(f"| {name} | {key} | {shown} | {found['median'] / default:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Measures, prints and saves."""
    options = tyro.cli(Options, description=__doc__)
    if options.child:
        print(convolutions_per_second(options.seconds))
        return
    load_before = os.getloadavg()[0] if sys.platform != "win32" else None
    rates = measure(options)
    print(table(rates))
    results: dict[str, Any] = {
        "environment": environment(torch.device("cpu"), ()) | {"clock": "wall", "load_before": load_before},
        "convolution": {"channels": CHANNELS, "side": SIDE, "kernel": 3, "batch": 1},
        "settings": settings(),
        "convolutions_per_second": {
            name: {key: spread(values) for key, values in by_setting.items()}
            for name, by_setting in rates.items()
        },
    }
    save_json(results, options.out / "openmp_cpu.json")


if __name__ == "__main__":
    main()
