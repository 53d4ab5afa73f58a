"""Sampling with HyperAlign against the unpatched base model, random weights of true shape.

    python -m benchmarks.sampling --model sd15                      # a GPU, true size, 50 steps
    python -m benchmarks.sampling --model sd15 --device cpu --pixels 128 --steps 4 --dtype float32

Rows: the base, a static LoRA by peft on the same layers, and HyperAlign I, P (three key times) and S with
`prefix` and `separate` perception. A run is a whole sampling run; base and row take turns, and the ratio is
to the base run right before. Prints a table and writes benchmarks/results/sampling_<model>_<device>.json.
"""

from __future__ import annotations

import importlib
import importlib.util
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
import tyro
from torch import Tensor, nn

from benchmarks.bases import Base, Name, Size, build, random_hyperalign, true_size, twin
from benchmarks.captured import CapturedForward, Pipeline
from benchmarks.rounds import RESULTS, Row, environment, figures, interleaved, rounds, save_json, slug, table
from hyperalign.checkpoint import HyperAlign
from hyperalign.errors import HyperAlignError
from hyperalign.hosts.diffusers.adapter import Adapter, Call
from hyperalign.hosts.diffusers.session import Session, attach
from hyperalign.hosts.merging import Merging
from hyperalign.hypernetwork import HyperNetworkConfig
from hyperalign.schedule import Variant
from hyperalign.targets import PerceptionMode

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
COMPILED_BLOCKS = {"resnets", "transformer_blocks", "single_transformer_blocks"}
Compiled = Literal["none", "hypernetwork", "backbone", "both", "captured"]
RowName = Literal["LoRA", "I prefix", "P prefix", "S prefix", "S separate", "I separate", "P separate"]


@dataclass(frozen=True, slots=True)
class Options:
    """Measures sampling with HyperAlign against the unpatched base model."""

    model: Name = "sd15"
    """sd15 and sdxl with classifier-free guidance, flux (dev), sd35 (medium, with guidance)."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """cuda or cpu."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Of the base model; the hypernetwork runs in float32."""
    pixels: int | None = None
    """Side of the image; the model's own if not given."""
    steps: int | None = None
    """Steps of a run: 50 on a GPU and 4 on a CPU if not given."""
    repeats: int = 5
    """Rounds."""
    minutes: float = 8.0
    """No round begins that would end later; the first one always runs."""
    rows: tuple[RowName, ...] = ("LoRA", "I prefix", "P prefix", "S prefix", "S separate")
    """What is measured beside the base."""
    compile: Compiled = "none"
    """What torch.compile compiles; a compiled backbone is compiled in every row, the base's too. `captured`
    captures every row's forwards as CUDA graphs instead."""
    merging: Merging = "auto"
    """Whether the weights of a sample are merged or added."""
    capture: bool = False
    """Whether the generations of S are replayed as CUDA graphs."""
    compile_mode: Literal["default", "reduce-overhead", "max-autotune-no-cudagraphs"] = "default"
    """reduce-overhead uses CUDA graphs."""
    network: HyperNetworkConfig = field(default_factory=HyperNetworkConfig)
    """The hypernetwork's sizes."""
    perception_blocks: int = 4
    """First blocks of a transformer that perceive."""
    text_tokens: int | None = None
    """Length of the text; the pipeline's own if not given."""
    double_blocks: int | None = None
    """Fewer double blocks (flux) or joint blocks (sd35), to fit a small memory."""
    single_blocks: int | None = None
    """Fewer single blocks (flux)."""
    narrow: int = 1
    """Divides the width of every layer, for a quick try."""
    profile: Path | None = None
    """Folder for one torch.profiler table per row."""
    out: Path = RESULTS
    """Folder of the JSON file."""


@dataclass(frozen=True, slots=True)
class Method:
    """One way to sample: a model of its own, with HyperAlign attached or without."""

    model: nn.Module
    pipeline: Pipeline | None = None
    session: Session | None = None
    captured: CapturedForward | None = None

    @property
    def generations(self) -> int:
        """How often the last run generated weights."""
        if self.captured is not None:
            return self.captured.generations
        return 0 if self.session is None else self.session.generations

    def begin(self, times_T: Tensor) -> None:
        """Begins a run, which forgets the weights of the last one."""
        if self.pipeline is not None:
            self.pipeline.scheduler.timesteps = times_T
        if self.captured is not None:
            self.captured.begin()

    def predict(self, call: Call) -> Tensor:
        """Returns the prediction of one forward, as a pipeline asks for it."""
        if self.captured is not None:
            return self.captured(call)
        return self.model(**call, return_dict=False)[0]


def size_of(options: Options) -> Size:
    """Returns the true size with what the options reduce."""
    given = {
        "pixels": options.pixels, "text_tokens": options.text_tokens,
        "double_blocks": options.double_blocks, "single_blocks": options.single_blocks,
    }  # fmt: skip
    changes = {key: value for key, value in given.items() if value is not None}
    return replace(true_size(options.model), narrow=options.narrow, **changes)


def with_lora(base: Base, rank: int) -> nn.Module:
    """Returns the model with a static LoRA on every attention projection, by diffusers and peft."""
    from peft import LoraConfig  # pyright: ignore[reportMissingImports, reportUnknownVariableType]

    torch.manual_seed(2)
    model: Any = twin(base.model)
    names = [target.name for target in base.spec.targets("separate")]
    model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=names, init_lora_weights=False))
    return model.requires_grad_(False)


@torch.no_grad()
def sample(method: Method, base: Base, steps: int) -> Tensor:
    """Returns the latents after a whole run: equal Euler steps from pure noise, guided as usual."""
    x_1 = base.noise
    times_T = torch.linspace(1, 1 / steps, steps, device=x_1.device) * base.spec.last_timestep
    method.begin(times_T)
    for t in times_T:
        x_1 = x_1 - base.guided(method.predict(base.call(x_1, t))) / steps
    return x_1


def methods(
    options: Options, base: Base, networks: Mapping[PerceptionMode, HyperAlign]
) -> dict[str, Method | str]:
    """Returns each row's method, or the reason why it cannot be measured; the base comes first.

    Every method has a model of its own over the same weights: neither peft's layers nor a compiled
    graph of one gets into another.
    """
    if options.compile in ("hypernetwork", "both"):
        for hyperalign in networks.values():
            hyperalign.network.compile(mode=options.compile_mode)
    found: dict[str, Method | str] = {}
    for name in ("base", *options.rows):
        if name == "LoRA" and importlib.util.find_spec("peft") is None:
            found[name] = "peft missing"
        elif options.compile in ("backbone", "both"):
            found[name] = compiled(options, name, base, networks)
        elif options.compile == "captured":
            plain = method(options, name, base, networks)
            found[name] = replace(plain, captured=CapturedForward(plain.model, plain.session))
        else:
            found[name] = method(options, name, base, networks)
    return found


def method(
    options: Options,
    name: str,
    base: Base,
    networks: Mapping[PerceptionMode, HyperAlign],
    compile_backbone: bool = False,
) -> Method:
    """Returns a row's method."""
    model = with_lora(base, options.network.rank) if name == "LoRA" else twin(base.model)
    if compile_backbone:
        compile_blocks(model, options.compile_mode)
    if name in ("base", "LoRA"):
        return Method(model)
    variant, mode = name.split()
    hyperalign, pipeline = networks[cast(PerceptionMode, mode)], Pipeline(model)
    session = attach(cast(Any, pipeline), hyperalign, variant=cast(Variant, variant), merging=options.merging)
    return Method(model, pipeline, session)


def compile_blocks(model: nn.Module, mode: str) -> None:
    """Compiles every block by itself, which takes seconds where the whole model takes minutes."""
    config: Any = importlib.import_module("torch._dynamo.config")
    config.cache_size_limit = 64  # one graph for each shape of block in each row
    for name, part in model.named_modules():
        if set(name.split(".")[-2:-1]) & COMPILED_BLOCKS:
            part.forward = torch.compile(part.forward, mode=mode, dynamic=False)


def compiled(
    options: Options, name: str, base: Base, networks: Mapping[PerceptionMode, HyperAlign]
) -> Method | str:
    """Returns a method with a compiled model, or why not: it must predict what the eager one does."""
    late, early = torch.tensor([0.1, 1.0], device=base.noise.device) * base.spec.last_timestep
    calls = [base.call(base.noise, early), base.call(0.1 * base.noise.flip(-1), late)]
    fast = method(options, name, base, networks, compile_backbone=True)

    @torch.no_grad()
    def predictions(method: Method) -> list[Tensor]:
        method.begin(torch.stack([early, late]))
        return [method.predict(call) for call in calls]

    def distance(some: list[Tensor], others: list[Tensor]) -> list[float]:
        return [float((a - b).norm() / b.norm()) for a, b in zip(some, others, strict=True)]

    wanted = predictions(method(options, name, base, networks))
    change = min(distance(wanted, predictions(Method(base.model))))
    error = max(distance(predictions(fast), wanted))
    if name != "base" and error > 0.1 * change:
        return f"compiled, its prediction is {error:.0%} off; {name} changes the base's by {change:.0%}"
    return fast


@torch.no_grad()
def parts(base: Base, hyperalign: HyperAlign, repeats: int) -> dict[str, float]:
    """Returns the milliseconds of a forward and of what HyperAlign adds to it, in medians.

    `deltas` is the difference of two forwards, with given cores and without; `perception` is a pass over
    the perception blocks alone, which `separate` adds and `prefix` does not need.
    """
    adapter = Adapter(base.model, hyperalign)
    call = base.call(base.noise, torch.tensor(0.5 * base.spec.last_timestep, device=base.noise.device))
    perceived = adapter.perceive(call)
    cores_BMDA = adapter.network(perceived)
    found = interleaved(
        {
            "forward": partial(adapter.forward, call, None),
            "adapted": partial(adapter.forward, call, cores_BMDA),
            "generation": partial(adapter.network, perceived),
            "perception": partial(adapter.perceive, call),
        },
        base.noise.device,
        repeats,
    )
    pairs = zip(found["adapted"], found["forward"], strict=True)
    found["deltas"] = [adapted - forward for adapted, forward in pairs]
    return {
        name: statistics.median(found[name]) for name in ("forward", "deltas", "generation", "perception")
    }


def profile(method: Method, base: Base, path: Path) -> None:
    """Writes torch.profiler's table of one run of two steps."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if base.noise.is_cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as recorded:
        sample(method, base, 2)
    order = "self_cuda_time_total" if base.noise.is_cuda else "self_cpu_time_total"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(recorded.key_averages().table(sort_by=order, row_limit=40), encoding="utf-8")


def measure(options: Options) -> dict[str, Any]:
    """Measures every row; the file is written anew after every round. Raises HyperAlignError."""
    began, device = time.monotonic(), torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise HyperAlignError("device is cuda, but torch finds no GPU. Use --device cpu and a small size.")
    size, steps = size_of(options), options.steps or (50 if device.type == "cuda" else 4)
    base = build(options.model, size, device, DTYPES[options.dtype])
    modes: tuple[PerceptionMode, ...] = ("prefix", "separate")
    networks: dict[PerceptionMode, HyperAlign] = {
        mode: random_hyperalign(base.spec, mode, options.network, options.perception_blocks, device)
        for mode in modes
    }
    found = methods(options, base, networks)
    results: dict[str, Any] = {
        "setting": setting(options, size, steps, base, networks),
        "rows": {name: {"not_measured": why} for name, why in found.items() if isinstance(why, str)},
    }
    path = options.out / file_name(options, device)
    running = {name: method for name, method in found.items() if not isinstance(method, str)}
    runs = {name: partial(sample, method, base, steps) for name, method in running.items()}

    def report(rows: dict[str, Row], plain: Row) -> None:
        measured = {name: figures(row, steps) for name, row in {"base": plain, **rows}.items()}
        for name, row in measured.items():
            row["generations"] = running[name].generations
        everything = {**results["rows"], **measured}
        results["rows"] = {name: everything[name] for name in found}
        results["setting"]["repeats"] = len(next(iter(rows.values()), plain).seconds)
        save_json(results, path)

    results["parts_ms"] = {mode: parts(base, networks[mode], max(3, options.repeats)) for mode in modes}
    for run in running.values():
        sample(run, base, 2)
    rounds(runs.pop("base"), runs, device, options.repeats, began + 60 * options.minutes, report)
    if options.profile:
        for name, method in running.items():
            profile(method, base, options.profile / f"{path.stem}_{name.replace(' ', '_')}.txt")
    return results


def setting(
    options: Options, size: Size, steps: int, base: Base, networks: Mapping[PerceptionMode, HyperAlign]
) -> dict[str, Any]:
    """Returns everything the figures depend on."""
    return {
        "model": options.model,
        **environment(base.noise.device, ("diffusers", "peft")),
        **asdict(size),
        "reduced": size.reductions(options.model),
        "dtype": options.dtype,
        "rows": base.rows,
        "steps": steps,
        "repeats": 0,
        "compile": options.compile,
        "merging": options.merging,
        "capture": options.capture,
        "compile_mode": options.compile_mode,
        "perception_blocks": networks["prefix"].header.perception_blocks,
        "hypernetwork": asdict(options.network),
        "targets": {mode: len(h.header.targets) for mode, h in networks.items()},
        "parameters": {
            "base": sum(p.numel() for p in base.model.parameters()),
            **{mode: sum(p.numel() for p in h.network.parameters()) for mode, h in networks.items()},
        },
    }


def file_name(options: Options, device: torch.device) -> str:
    """Returns sampling_<model>_<device>.json, with what was compiled."""
    tails = {"none": "", "captured": "_captured"}
    tail = tails.get(options.compile, f"_compiled-{options.compile}")
    merging = ("" if options.merging == "auto" else f"_{options.merging}") + "_graph" * options.capture
    graphs = "" if options.compile_mode == "default" else f"-{options.compile_mode}"
    return f"sampling_{options.model}_{slug(device)}{tail}{graphs if tail else ''}{merging}.json"


def title(results: Mapping[str, Any]) -> str:
    """Returns one line that says what was measured, and what was reduced."""
    s = results["setting"]
    reduced = "; reduced: " + ", ".join(s["reduced"]) if s["reduced"] else "; true size"
    parts = {"none": "", "captured": ", captured as CUDA graphs"}
    compiled_parts = (
        parts.get(s["compile"], f", torch.compile of {s['compile']}") + f", weights {s['merging']}"
    )
    return (
        f"{s['model']}, {s['pixels']} px, {s['rows']} rows a forward, {s['steps']} steps, {s['repeats']} "
        f"rounds, {s['dtype']}, {s['device_name']}, torch {s['versions']['torch']}"
        f"{compiled_parts}, weights {s['merging']}{reduced}"
    )


def parts_table(results: Mapping[str, Any]) -> str:
    """Returns where the time goes as a Markdown table."""
    lines = ["| ms | forward | deltas | one generation | perception |", "|---|---|---|---|---|"]
    for mode, p in results["parts_ms"].items():
        lines.append(f"| {mode} | " + " | ".join(f"{value:.1f}" for value in p.values()) + " |")
    return "\n".join(lines)


def main(options: Options) -> dict[str, Any]:
    """Measures, prints the tables and returns the figures."""
    results = measure(options)
    print(table(title(results), results["rows"]))
    print()
    print(parts_table(results))
    return results


if __name__ == "__main__":
    main(tyro.cli(Options))
