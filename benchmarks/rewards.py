"""Speed and memory of the rewards at full size with random weights, and the overhead outside the network.

    python -m benchmarks.rewards                                        # a GPU: 16 images of 1024 pixels
    python -m benchmarks.rewards --device cpu --gradient-batch 2 --repeats 1 --rewards hpsv2.1

Per reward: images a second and the share of the time outside the reward's network (checks, resizing,
normalisation; prompts are encoded once and cached), then images a second and memory of a score with its
gradient to the pixels, with and without recomputation of activations. Prints a table and writes
benchmarks/results/rewards_<device>.json.
"""

from __future__ import annotations

import ctypes
import gc
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import nn

from benchmarks.rounds import GIB, RESULTS, environment, save_json, slug, spread, timed
from hyperalign.errors import HyperAlignError
from hyperalign.rewards import Reward
from hyperalign.rewards.loading import PUBLISHED, random_weights
from hyperalign.rewards.networks import set_checkpointing

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
PROMPT = "a photograph of an astronaut riding a horse"
LIMIT = 0.2
"""The greatest share of the time that scoring may spend outside the network."""


@dataclass(frozen=True, slots=True)
class Options:
    """Measures rewards of full size with random weights."""

    rewards: tuple[str, ...] = ("hpsv2.1", "imagereward", "clip")
    """By name; hpsv2 and pickscore have the network of hpsv2.1, aesthetic that of clip."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """cuda or cpu."""
    dtype: str = "bfloat16"
    """Of the encoders: bfloat16, float16 or float32."""
    batch: int = 16
    """Images scored at once."""
    gradient_batch: int = 16
    """Images scored at once with a gradient."""
    pixels: int = 1024
    """Their side."""
    repeats: int = 5
    """Measured runs, after one warm-up run."""
    out: Path = RESULTS
    """Folder of the JSON file."""


def main(options: Options) -> dict[str, Any]:
    """Measures, prints the table and returns the metrics. Raises HyperAlignError on a value out of range."""
    _check(options)
    device = torch.device(options.device)
    results: dict[str, Any] = {
        "setting": environment(device, ["transformers"]) | asdict(options) | {"out": options.out.name},
        "rows": {name: measure(name, options, device) for name in options.rewards},
    }
    save_json(results, options.out / f"rewards_{slug(device)}.json")
    print(table(results))
    return results


def measure(name: str, options: Options, device: torch.device) -> dict[str, Any]:
    """Returns the metrics of one reward."""
    reward = random_weights(name, device=device, dtype=DTYPES[options.dtype])
    images_BCHW = torch.rand(options.batch, 3, options.pixels, options.pixels, device=device)
    leaves_BCHW = images_BCHW[: options.gradient_batch].clone().requires_grad_()

    def score() -> None:
        with torch.no_grad():
            reward.score(images_BCHW, [PROMPT] * len(images_BCHW))

    def gradient() -> None:
        scores_B = reward.score(leaves_BCHW, [PROMPT] * len(leaves_BCHW))
        torch.autograd.grad(scores_B.sum(), leaves_BCHW)

    row: dict[str, Any] = {"score": _forward(reward, score, options, device)}
    for label, enabled in (("gradient, recomputing", True), ("gradient", False)):
        set_checkpointing(reward.module, enabled)
        row[label] = _gradient(gradient, len(leaves_BCHW), options, device)
    return row


def _forward(
    reward: Reward, score: Callable[[], None], options: Options, device: torch.device
) -> dict[str, Any]:
    seconds, outside = list[float](), list[float]()
    score()
    with inside(reward.module, device) as clock, peak_memory(device) as memory:
        for _ in range(options.repeats):
            clock.seconds = 0.0
            taken, _ = timed(score, device)
            seconds.append(taken)
            outside.append(1.0 - clock.seconds / taken)
    return {
        "images_per_s": spread([options.batch / taken for taken in seconds]),
        "outside_network": spread(outside),
        "peak_gib": memory.peak / GIB,
    }


def _gradient(run: Callable[[], None], count: int, options: Options, device: torch.device) -> dict[str, Any]:
    with peak_memory(device) as memory:
        run()
        rates = [count / timed(run, device)[0] for _ in range(options.repeats)]
    return {"images_per_s": spread(rates), "peak_gib": memory.peak / GIB}


@dataclass(slots=True)
class Clock:
    """Seconds inside a network's modules."""

    seconds: float = 0.0


@contextmanager
def inside(network: nn.Module, device: torch.device) -> Iterator[Clock]:
    """Counts the time from the start of each outermost module of a network to its end."""
    clock, entered = Clock(), list[float]()

    def enter(_module: nn.Module, _arguments: Any) -> None:
        entered.append(_now(device) if not entered else 0.0)

    def leave(_module: nn.Module, _arguments: Any, _output: Any) -> None:
        started = entered.pop()
        if not entered:
            clock.seconds += _now(device) - started

    handles = [module.register_forward_pre_hook(enter) for module in network.modules()]
    handles += [module.register_forward_hook(leave) for module in network.modules()]
    try:
        yield clock
    finally:
        for handle in handles:
            handle.remove()


@dataclass(slots=True)
class Memory:
    """The peak number of bytes in use, weights included."""

    peak: float = 0.0


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Memory]:
    """Measures the allocator's peak on a GPU, or that of the process, sampled every 20 ms, on a CPU."""
    memory, done = Memory(), threading.Event()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield memory
        memory.peak = torch.cuda.max_memory_allocated(device)
        return
    ctypes.CDLL(None).malloc_trim(0)  # glibc would keep the memory that the last measurement freed

    def watch() -> None:
        while not done.wait(0.02):
            memory.peak = max(memory.peak, resident())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield memory
    finally:
        done.set()
        watcher.join()


def resident() -> int:
    """Returns the bytes of the process that are in memory (Linux)."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096


def table(results: Mapping[str, Any]) -> str:
    """Returns the metrics as a Markdown table."""
    setting = results["setting"]
    lines = [
        f"{setting['device_name']}, {setting['dtype']}, {setting['pixels']} px, {setting['batch']} images "
        f"({setting['gradient_batch']} with gradient); memory is all memory in use",
        "",
        "| reward | images/s | outside the network | GiB "
        "| with gradient, recomputing | GiB | with gradient | GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in results["rows"].items():
        cells = [name]
        for label in ("score", "gradient, recomputing", "gradient"):
            part = row[label]
            cells.append(f"{part['images_per_s']['median']:.3g}")
            if "outside_network" in part:
                share = part["outside_network"]["median"]
                cells.append(f"{share:.1%}{'' if share <= LIMIT else ' (too much)'}")
            cells.append(f"{part['peak_gib']:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _now(device: torch.device) -> float:
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def _check(options: Options) -> None:
    if unknown := [name for name in options.rewards if name not in PUBLISHED]:
        raise HyperAlignError(f"There is no reward {unknown[0]!r}; expected some of {', '.join(PUBLISHED)}.")
    if options.dtype not in DTYPES:
        raise HyperAlignError(f"dtype is {options.dtype!r}; expected one of {', '.join(DTYPES)}.")
    sizes = (options.batch, options.gradient_batch, options.pixels, options.repeats)
    if min(sizes) < 1 or options.gradient_batch > options.batch:
        raise HyperAlignError(
            f"batch, gradient batch, pixels and repeats are {sizes}; expected at least 1, and no "
            "larger gradient batch than batch."
        )


if __name__ == "__main__":
    main(tyro.cli(Options))
