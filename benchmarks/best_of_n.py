"""Memory of Best-of-N Sampler over its samples, inside ComfyUI, on the embedded model.

    python -m benchmarks.best_of_n              # N = 16, one at a time
    python -m benchmarks.best_of_n --count 64

Reads after every sample how much memory the process has (and, on a GPU, how much the host has reserved
there). Flat means: from the second quarter to the last, less is added than all images and latents would
need if they were kept. Prints a table and writes benchmarks/results/best_of_n_<device>.json. COMFYUI_PATH
names another ComfyUI than build/'s.
"""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from benchmarks.rewards import resident
from benchmarks.rounds import GIB, RESULTS, environment, save_json, slug
from hyperalign.errors import HyperAlignError
from scripts.host_tree import comfyui_tree

PROMPT = "a red heart"
MIB = 1 << 20
KEPT = 64 * 64 * 3 * 4 + 16 * 16 * 4 * 4
"""Bytes of one of the embedded model's images and its latent."""


@dataclass(frozen=True, slots=True)
class Options:
    """Measures the memory of Best-of-N over its samples."""

    count: int = 16
    """N, at least 4."""
    steps: int = 8
    """Steps of each sample."""
    mode: Literal["best-of-N", "zero-order", "epsilon-greedy", "epsilon-greedy-steps"] = "best-of-N"
    """How candidates are found."""
    device: Literal["cuda", "cpu"] = "cuda" if torch.cuda.is_available() else "cpu"
    """Where the host samples."""
    out: Path = RESULTS
    """Folder of the JSON file."""


def main(options: Options) -> dict[str, Any]:
    """Measures, prints the table and returns the figures. Raises HyperAlignError on a count below 4."""
    if options.count < 4:
        raise HyperAlignError(f"count is {options.count}; expected at least 4, to compare two halves.")
    device = torch.device(options.device)
    samples = measure(options, device)
    results: dict[str, Any] = {
        "setting": environment(device, []) | asdict(options) | {"out": options.out.name},
        "samples": samples,
        "growth_mib": growth([sample["host_mib"] for sample in samples]),
        "limit_mib": options.count * KEPT / MIB,
    }
    save_json(results, options.out / f"best_of_n_{slug(device)}.json")
    print(table(results))
    return results


def measure(options: Options, device: torch.device) -> list[dict[str, float]]:
    """Returns the memory after each sample of one search."""
    host = _host(options.device)
    model, clip, vae = host["tiny"].load_tiny()
    reward = _Weighed(host["rewards"].hosted(host["tiny_rewards"].load("tiny reward")), device)
    condition = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (PROMPT, "")]
    sampler = "euler_ancestral" if options.mode == "epsilon-greedy-steps" else "euler"
    start = {"samples": torch.zeros(1, 4, 16, 16)}
    settings = host["search"].Sampling(model, *condition, start, options.steps, 4.0, sampler, "normal", 1.0)
    plan = host["plan"].Plan(options.count, mode=options.mode)
    with torch.inference_mode():
        host["search"].search(settings, plan, reward, vae, PROMPT)
    return reward.samples


class _Weighed:
    """The host's reward, which records the memory whenever it scores."""

    combination = "sum"

    def __init__(self, reward: Any, device: torch.device) -> None:
        self.samples: list[dict[str, float]] = []
        self._reward = reward
        self._device = device

    def score(self, images_BHWC: torch.Tensor, prompts: Sequence[str]) -> list[float]:
        scores: list[float] = self._reward.score(images_BHWC, prompts)
        gc.collect()
        reserved = torch.cuda.memory_reserved(self._device) if self._device.type == "cuda" else 0
        self.samples.append({"host_mib": resident() / MIB, "device_gib": reserved / GIB})
        return scores


def growth(values: Sequence[float]) -> float:
    """Returns how much greater the last quarter is than the second one, as medians, at least 0."""
    quarter = len(values) // 4
    early, late = (
        sorted(part)[len(part) // 2] for part in (values[quarter : 2 * quarter], values[-quarter:])
    )
    return max(0.0, late - early)


def table(results: Mapping[str, Any]) -> str:
    """Returns the figures as a Markdown table."""
    samples = results["samples"]
    lines = ["| after sample | host MiB | device GiB |", "|---|---|---|"]
    shown = sorted({0, len(samples) // 4, len(samples) // 2, len(samples) - 1})
    lines += [
        f"| {at + 1} | {samples[at]['host_mib']:.1f} | {samples[at]['device_gib']:.2f} |" for at in shown
    ]
    flat = "flat" if results["growth_mib"] <= results["limit_mib"] else "NOT flat"
    return "\n".join(
        [*lines, f"{flat}: {results['growth_mib']:.2f} MiB more from the second quarter to the last"]
    )


def _host(device: str) -> dict[str, Any]:
    """Returns the adapter's modules with ComfyUI's tree ahead on the path."""
    sys.path.insert(0, str(comfyui_tree(Path(sys.executable))))
    importlib.import_module("comfy.cli_args").args.cpu = device == "cpu"
    names = {
        "tiny": "hyperalign.hosts.comfy.tiny",
        "rewards": "hyperalign.hosts.comfy.rewards",
        "search": "hyperalign.hosts.comfy.search",
        "tiny_rewards": "hyperalign.rewards.tiny",
        "plan": "hyperalign.search",
    }
    return {key: importlib.import_module(name) for key, name in names.items()}


if __name__ == "__main__":
    main(tyro.cli(Options))
