"""Memory over 200 runs inside ComfyUI that alternate hypernetworks, interrupts and unloads.

    python -m benchmarks.soak                                   # the embedded model; two minutes on a CPU

Every run reads a hypernetwork from its file, applies it to the one MODEL and samples: S, P, I and a static
one in turn, four runs each with added and with merged weights. The host interrupts every third run after half
its steps and frees all models after every fifth. Prints what the process holds after some of the runs and
writes benchmarks/results/soak_<device>.json. COMFYUI_PATH names another ComfyUI than build/'s.
"""

from __future__ import annotations

import gc
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from benchmarks.comfy_sampling import enter_comfyui
from benchmarks.rounds import RESULTS, environment, save_json, slug
from hyperalign.hosts.merging import Merging

HYPERNETWORKS = Path(__file__).parents[1] / "hyperalign" / "tiny" / "hypernetworks"
NAMES = ("tiny_s", "tiny_p", "tiny_i", "tiny_static")
MERGINGS: tuple[Merging, ...] = ("additive", "merged")
INTERRUPT_EVERY, UNLOAD_EVERY = 3, 5
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Options:
    """Measures the memory of many runs inside ComfyUI."""

    runs: int = 200
    """How many."""
    measured: tuple[int, ...] = (10, 100, 200)
    """After which runs the process is looked at; they compare if all of them unload, or none."""
    steps: int = 4
    """Of a run."""
    device: Literal["cuda", "cpu"] = "cuda" if torch.cuda.is_available() else "cpu"
    """Where the host samples."""
    out: Path = RESULTS
    """Folder of the JSON file."""


@dataclass(frozen=True, slots=True)
class Figures:
    """What a process holds after a run, once Python has collected its garbage."""

    run: int
    interrupted: int
    """How many runs the host has interrupted so far."""
    tensors: int
    """Those that Python's garbage collector knows."""
    tensor_mib: float
    """Their memory, each storage once."""
    loaded_models: int
    """Those that the host keeps on the device."""
    rss_mib: float
    """Memory of the process."""
    device_mib: float | None
    """Memory that PyTorch has given out on a GPU."""


def soak(runs: int, measured: Collection[int], steps: int) -> Iterator[Figures]:
    """Runs, and yields figures after the runs that are to be measured; ComfyUI has to be importable."""
    import comfy.model_management as management

    from hyperalign.hosts.comfy.model import apply, load
    from hyperalign.hosts.comfy.tiny import load_tiny

    model, clip, _ = load_tiny()
    conditions = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in ("a red heart", "")]
    interrupted = 0
    for run in range(1, runs + 1):
        hyperalign = load(HYPERNETWORKS / f"{NAMES[run % len(NAMES)]}.safetensors")
        aligned = apply(model, hyperalign, merging=MERGINGS[run // len(NAMES) % len(MERGINGS)])
        stop_at = steps // 2 if run % INTERRUPT_EVERY == 0 else None
        interrupted += not _sampled(aligned, conditions, steps, stop_at)
        del hyperalign, aligned
        if run % UNLOAD_EVERY == 0:
            management.unload_all_models()
            management.cleanup_models_gc()
            management.soft_empty_cache()
        if run in measured:
            yield figures(run, interrupted)


def _sampled(model: Any, conditions: list[Any], steps: int, stop_at: int | None) -> bool:
    """Samples with the host's KSampler; returns whether it came to the end."""
    import comfy.model_management as management
    import comfy.sample

    positive, negative = conditions

    def interrupt(step: int, *_: Any) -> None:
        if step == stop_at:
            management.interrupt_current_processing()
        management.throw_exception_if_processing_interrupted()  # the host does it where it shows progress

    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    try:
        with torch.inference_mode():
            comfy.sample.sample(
                model, noise, steps, 4.0, "euler", "normal", positive, negative, torch.zeros_like(noise),
                callback=interrupt, disable_pbar=True, seed=0,
            )  # fmt: skip
    except management.InterruptProcessingException:
        return False
    return True


def figures(run: int, interrupted: int) -> Figures:
    """Returns what the process holds now."""
    import comfy.model_management as management
    import psutil  # a requirement of ComfyUI

    gc.collect()
    # Not those of other types, such as torch.compile's, which have no memory of their own.
    tensors = [item for item in gc.get_objects() if type(item) in (torch.Tensor, torch.nn.Parameter)]
    storages = {
        storage.data_ptr(): storage.nbytes() for storage in map(torch.Tensor.untyped_storage, tensors)
    }
    device = torch.cuda.memory_allocated() / MIB if torch.cuda.is_available() else None
    return Figures(
        run, interrupted, len(tensors), sum(storages.values()) / MIB, len(management.current_loaded_models),
        psutil.Process().memory_info().rss / MIB, device,
    )  # fmt: skip


def main(options: Options) -> dict[str, Any]:
    """Measures, prints a table and returns the figures."""
    import comfyui_version

    device = torch.device(options.device)
    setting = {
        **environment(device, ("safetensors",)), "comfyui": comfyui_version.__version__, "runs": options.runs,
        "steps": options.steps, "hypernetworks": NAMES, "mergings": MERGINGS,
        "interrupt_every": INTERRUPT_EVERY, "unload_every": UNLOAD_EVERY,
    }  # fmt: skip
    results: dict[str, Any] = {"setting": setting, "figures": []}
    columns = ("run", "interrupted", "tensors", "MiB of tensors", "loaded models", "MiB of the process")
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for one in soak(options.runs, options.measured, options.steps):
        results["figures"].append(asdict(one))
        save_json(results, options.out / f"soak_{slug(device)}.json")
        print(
            f"| {one.run} | {one.interrupted} | {one.tensors} | {one.tensor_mib:.2f} | {one.loaded_models} "
            f"| {one.rss_mib:.0f} |"
        )
    return results


if __name__ == "__main__":
    chosen = tyro.cli(Options)
    enter_comfyui(chosen.device)
    main(chosen)
