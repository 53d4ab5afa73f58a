"""What tracing costs: ComfyUI's own KSampler on an aligned MODEL with a trace against the same without.

    python -m benchmarks.trace                             # the tiny model with its committed hypernetwork S
    python -m benchmarks.trace --model sd15 --device cuda  # true shape, random weights

Variant S, which generates weights at every evaluation and so has most to record. `weights` is what HyperAlign
Trace and HyperAlign Trace PCA want, `weights and predictions` what a trace with a reward wants. Whole runs
are interleaved with untraced ones; as their spread on a busy machine is greater than what is sought, the time
inside the recording functions is measured too, by itself, and given as a share of the untraced run. Drawing
comes after sampling, in the trace node; it is timed apart. Prints a table and writes
benchmarks/results/trace.json (trace_sd15_<device>.json for sd15). COMFYUI_PATH names another ComfyUI.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from benchmarks.bases import random_hyperalign
from benchmarks.comfy_sampling import FILE, ROOT, enter_comfyui, host_nodes, loaded, write_unet
from benchmarks.rounds import (
    RESULTS,
    Row,
    environment,
    figures,
    interleaved,
    rounds,
    save_json,
    slug,
    spread,
    table,
    timed,
)
from hyperalign.families.unet import SD15
from hyperalign.hosts.tracing import Recorder, TracedRun
from hyperalign.hypernetwork import HyperNetworkConfig

CFG = 4.0
KEEPS_PREDICTIONS = {"weights": False, "weights and predictions": True}
"""What is recorded, and whether one-step predictions are part of it."""
RECORDING = ("begin_evaluation", "enter_call", "write", "note_strengths")
"""The functions of a traced run that an untraced one has too, or does without."""


@dataclass(frozen=True, slots=True)
class Options:
    """Measures the overhead of tracing inside ComfyUI."""

    model: Literal["tiny", "sd15"] = "tiny"
    """The base model: the embedded one, or Stable Diffusion 1.5 of true shape with random weights in fp16."""
    device: Literal["cuda", "cpu"] = "cpu"
    """Where the host samples."""
    steps: int = 25
    """Steps of a run."""
    batch: int = 1
    """Images generated at once."""
    pixels: int = 512
    """Side of the image of sd15; the tiny model has 64."""
    repeats: int = 40
    """Rounds."""
    minutes: float = 10.0
    """For all rounds; one at least."""
    out: Path = RESULTS
    """Folder of the JSON file."""


@contextmanager
def subject(options: Options) -> Iterator[tuple[Any, Any, int, int]]:
    """Yields MODEL, hypernetwork, side of the latents and width of the conditioning."""
    import comfy.ops

    from hyperalign.hosts.comfy.model import hosted, load
    from hyperalign.hosts.comfy.tiny import load_tiny
    from hyperalign.tiny.weights import HYPERNETWORKS

    if options.model == "tiny":
        with torch.inference_mode():
            yield load_tiny()[0], load(HYPERNETWORKS / "tiny_s.safetensors"), 16, 128
        return
    with tempfile.TemporaryDirectory() as folder:
        write_unet(Path(folder) / FILE)
        with loaded(Path(folder), "fp16") as model:
            made = random_hyperalign(
                SD15, "prefix", HyperNetworkConfig(), 0, torch.device("cpu"), comfy.ops.manual_cast
            )
            yield model, hosted(made), options.pixels // 8, 768


def sampling(model: Any, options: Options, side: int, width: int) -> Callable[[], Any]:
    """Returns one run of the stock KSampler node."""
    generator = torch.Generator().manual_seed(0)
    tokens = 77 if options.model == "sd15" else 16
    positive, negative = ([[torch.randn(1, tokens, width, generator=generator), {}]] for _ in range(2))
    latent = {"samples": torch.zeros(options.batch, 4, side, side)}
    arguments = (model, 0, options.steps, CFG, "euler", "normal", positive, negative, latent)

    def run() -> Any:
        with torch.inference_mode():
            return host_nodes().KSampler().sample(*arguments)[0]

    return run


def drawing(recorder: Recorder) -> Callable[[], Any]:
    """Returns what HyperAlign Trace does, from the recorded run to image and JSON."""
    plot = _pack_module("nodes.trace_plot")
    trace = importlib.import_module("hyperalign.trace")

    def draw() -> Any:
        run = recorder.select().trace()
        return plot.trace_plot(run), json.dumps(trace.as_json(run))

    return draw


@contextmanager
def stopwatch(device: torch.device) -> Iterator[list[float]]:
    """Yields a list that collects the seconds of every call of what records.

    The calls' share of a plain run is part of them, so their sum is a little too great.
    """
    from hyperalign.hosts.comfy.model import Adapter

    taken: list[float] = []
    places: list[tuple[Any, str, Callable[..., Any]]] = []
    for owner, names in ((Adapter, ("_note", "_keep")), (TracedRun, RECORDING)):
        for name in names:
            places.append((owner, name, getattr(owner, name)))
            setattr(owner, name, _timed(getattr(owner, name), taken, device))
    try:
        yield taken
    finally:
        for owner, name, original in places:
            setattr(owner, name, original)


def _timed(function: Callable[..., Any], taken: list[float], device: torch.device) -> Callable[..., Any]:
    def timed_function(*args: Any, **kwargs: Any) -> Any:
        if device.type == "cuda":
            torch.cuda.synchronize()
        result: list[Any] = []
        seconds, _ = timed(lambda: result.append(function(*args, **kwargs)), device)
        taken.append(seconds)
        return result[0]

    return timed_function


def recording_ms(run: Callable[[], Any], device: torch.device, repeats: int = 7) -> dict[str, float]:
    """Returns the milliseconds that a traced run spends on recording."""
    sums: list[float] = []
    for _ in range(repeats):
        with stopwatch(device) as taken:
            run()
        sums.append(1000 * sum(taken))
    return spread(sums)


def measure(options: Options) -> dict[str, Any]:
    """Measures in rounds; the file is written anew after every round."""
    import comfy.utils
    import comfyui_version

    from hyperalign.hosts.comfy.model import apply

    device = torch.device(options.device)
    torch.set_num_threads(1)
    comfy.utils.set_progress_bar_enabled(False)
    results: dict[str, Any] = {
        "setting": {
            "model": options.model, **environment(device, ("pillow",)),
            "comfyui": comfyui_version.__version__, "steps": options.steps, "batch": options.batch,
            "cfg": CFG, "sampler": "euler", "variant": "S",
        }
    }  # fmt: skip
    name = "trace.json" if options.model == "tiny" else f"trace_sd15_{slug(device)}.json"
    with subject(options) as (model, hyperalign, side, width):
        results["setting"]["latents"] = [options.batch, 4, side, side]
        recorders = {kind: Recorder(keeps_predictions=kept) for kind, kept in KEEPS_PREDICTIONS.items()}
        runs = {
            kind: sampling(apply(model, hyperalign, variant="S", recorder=recorder), options, side, width)
            for kind, recorder in recorders.items()
        }
        base = sampling(apply(model, hyperalign, variant="S"), options, side, width)
        for run in (base, *runs.values()):
            run()
        results["drawing_ms"] = spread(
            interleaved({"drawing": drawing(recorders["weights"])}, torch.device("cpu"), 5)["drawing"]
        )
        results["recording_ms"] = {kind: recording_ms(run, device) for kind, run in runs.items()}
        results["recorded_bytes"] = {kind: each.recordings[-1].bytes for kind, each in recorders.items()}
        report = partial(_report, results, options, options.out / name)
        rounds(base, runs, device, options.repeats, time.monotonic() + 60 * options.minutes, report)
    return results


def _report(results: dict[str, Any], options: Options, path: Path, rows: dict[str, Row], plain: Row) -> None:
    results["rounds"] = len(next(iter(rows.values())).seconds)
    results["rows"] = {
        name: figures(row, options.steps) for name, row in {"not traced": plain, **rows}.items()
    }
    for row in results["rows"].values():
        row["generations"] = options.steps
    run_ms = 1000 * results["rows"]["not traced"]["run_s"]["median"]
    results["recording_share"] = {
        kind: taken["median"] / run_ms for kind, taken in results["recording_ms"].items()
    }
    save_json(results, path)


def _pack_module(name: str) -> Any:
    """Imports a module of the pack as the host does: under another name, because `nodes` is the host's."""
    pack = "benchmarked_hyperalign"
    if pack not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            pack, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )
        if spec is None or spec.loader is None:
            raise ImportError(f"{ROOT} holds no package.")
        sys.modules[pack] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[pack])
    return importlib.import_module(f"{pack}.{name}")


def main(options: Options) -> dict[str, Any]:
    """Measures, prints a table and returns the figures."""
    results = measure(options)
    s = results["setting"]
    title = (
        f"Tracing of {s['model']} in ComfyUI {s['comfyui']}, latents {s['latents']}, CFG, {s['steps']} "
        f"steps, variant S, {results['rounds']} rounds, {s['device_name']}, torch {s['versions']['torch']}"
    )
    print(table(title, results["rows"]))
    kept = ", ".join(f"{size / 2**20:.1f} MiB {kind}" for kind, size in results["recorded_bytes"].items())
    for kind, share in results["recording_share"].items():
        taken = results["recording_ms"][kind]["median"]
        print(f"\nRecording {kind}: {taken:.2f} ms a run, {share:.2%} of it.")
    print(f"\nDrawing and JSON: {results['drawing_ms']['median']:.0f} ms. Kept of a run: {kept}.")
    return results


if __name__ == "__main__":
    chosen = tyro.cli(Options)
    enter_comfyui(chosen.device)
    main(chosen)
