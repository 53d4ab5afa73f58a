"""One optimiser step of L_R and L_G on a base model of true shape with random weights.

    python -m benchmarks.training --base sd15                       # a GPU, true size
    python -m benchmarks.training --base sd15 --device cpu --narrow 2 --resolution 128

It is the trainer's own step on a smoke run's inputs, timed by phase: rollout, reward loss (guided
x0-hat, decoder, reward, and back), preference loss, optimiser. Utilisation is the model's own operations,
without what gradient checkpointing recomputes, over the rate of a large matrix product measured in the same
process. Prints a table and writes benchmarks/results/training_<base>_<device>.json; the name also says when
prompts, gradient steps, layout or compilation are not the recipe's: training_flux_2x2_compiled_<device>.json.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import tyro
from accelerate import Accelerator
from torch import Tensor

from benchmarks.rounds import GIB, RESULTS, environment, save_json, slug, spread, timed
from hyperalign.errors import HyperAlignError
from hyperalign.targets import PerceptionMode
from train.config import GradientCheckpointing, RunConfig, TrainConfig, ValidationConfig
from train.inputs import smoke_inputs
from train.log import Metrics
from train.methods.hyperalign import preference_pass, reward_pass, rewarded_states
from train.methods.step import Step, StepMetrics
from train.models.architectures import FULL_SIZES, ModelSize
from train.models.load import backbone_dtype
from train.models.text_encoders import text_lengths
from train.preflight.costs import matrix_rate
from train.preflight.estimate import Work, step_memory, step_work
from train.preflight.fit import fitted
from train.preflight.smoke import memory_bytes
from train.preflight.step_costs import StepCosts, costs_of_shape, without_recomputation
from train.recipe import load_recipe
from train.trainer import Trainer

RECIPES = {"sd15": "sd15_s", "sdxl": "sdxl_s", "flux": "flux_s", "sd3": "sd35m_s"}
FOLDER = Path(__file__).parents[1] / "train" / "recipes"
REWARD = "hpsv2.1"
TERA = 1e12
Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class Options:
    """Measures one training step; what is not given is the recipe's."""

    base: Literal["sd15", "sdxl", "flux", "sd3"] = "sd15"
    """The base model: train/recipes has a recipe for each."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """cuda or cpu."""
    bf16: bool = True
    """Frozen models in bfloat16, or float32; the hypernetwork is float32."""
    batch: int | None = None
    """Prompts of a step."""
    preferred: int | None = None
    """Preference images of a step."""
    micro_batch: int | None = None
    """Images in one backward pass; else the recipe's. What is `auto` is chosen for the device."""
    timesteps: int | None = None
    """Steps of each rollout that get a gradient."""
    rollout_steps: int | None = None
    """Steps of the rollout."""
    resolution: int | None = None
    """Side of the images in pixels."""
    text_tokens: int | None = None
    """Padding of the text, where it is a choice; else the recipe's longest."""
    reward: str = REWARD
    """Any of hyperalign.rewards.loading, with random weights."""
    mode: PerceptionMode = "prefix"
    """prefix or separate perception."""
    gradient_checkpointing: GradientCheckpointing | None = None
    """What recomputes activations in backward passes; else the recipe's."""
    channels_last: bool = False
    """U-Net and decoder with their channels last."""
    compile: bool = False
    """torch.compile for the blocks of backbone and rewards."""
    conditional_only: bool = False
    """Gradient through the conditional prediction alone."""
    double_blocks: int | None = None
    """Fewer double blocks (flux) or joint blocks (sd3), to fit a small memory."""
    single_blocks: int | None = None
    """Fewer single blocks (flux)."""
    narrow: int = 1
    """Divides the width of every layer of the backbone."""
    repeats: int = 5
    """Steps that are measured, after one to warm up."""
    minutes: float = 8.0
    """No step begins that would end later; the first one always runs."""
    profile: Path | None = None
    """Folder for torch.profiler's table of one more step."""
    out: Path = RESULTS
    """Folder of the JSON file."""


@dataclass(frozen=True, slots=True)
class Phase:
    """What was measured of a part of one step."""

    seconds: float
    peak_gib: float | None
    """Unknown on a CPU."""


class TimedTrainer(Trainer):
    """The trainer, with what each phase of its last step took."""

    phases: dict[str, Phase]

    def measured_step(self) -> dict[str, Phase]:
        """Takes a step; returns its phases."""
        self.phases, self._method = {}, self._by_phases
        self._train_step()
        return self.phases

    def _by_phases(self, step: Step) -> Iterator[StepMetrics]:
        """HyperAlign's method, a phase after the other."""
        states = self._timed("rollout", lambda: rewarded_states(step))
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)  # what follows belongs to the gradient
        metrics = self._timed("reward", lambda: reward_pass(step, states))
        yield metrics | self._timed("preference", lambda: preference_pass(step))

    def _apply_gradient(self, measured: dict[str, Tensor]) -> Metrics:
        return self._timed("optimiser", lambda: super(TimedTrainer, self)._apply_gradient(measured))

    def _timed(self, name: str, run: Callable[[], Found]) -> Found:
        found: list[Found] = []
        self.phases[name] = Phase(*timed(lambda: found.append(run()), self.device))
        return found[0]


def shape_of(options: Options) -> ModelSize:
    """Returns the backbone's shape, with what the options reduce."""
    given = {"double_blocks": options.double_blocks, "single_blocks": options.single_blocks}
    changes = {name: value for name, value in given.items() if value is not None}
    return replace(FULL_SIZES[options.base], width_divisor=options.narrow, **changes)


def recipe_of(options: Options) -> TrainConfig:
    """Returns the recipe of the base model. Raises HyperAlignError."""
    return load_recipe(FOLDER / f"{RECIPES[options.base]}.toml")


def config_of(options: Options, out: Path) -> TrainConfig:
    """Returns the recipe with what the options change. Raises HyperAlignError."""
    recipe = recipe_of(options)
    o = recipe.objective
    steps, timesteps = options.rollout_steps or o.rollout_steps, options.timesteps or o.timesteps
    return replace(
        recipe,
        model=replace(
            recipe.model, resolution=options.resolution or recipe.model.resolution, mode=options.mode,
            gradient_checkpointing=options.gradient_checkpointing or recipe.model.gradient_checkpointing,
            channels_last=options.channels_last, compile=options.compile,
        ),
        objective=replace(
            o, rewards={options.reward: 1.0}, prompt_batch=options.batch or o.prompt_batch,
            preference_batch=options.preferred or o.preference_batch,
            micro_batch=options.micro_batch or o.micro_batch,
            timesteps=timesteps, rollout_steps=steps,
            # The last steps: every rollout then runs to its end, and repeats are alike.
            skip_first=steps - timesteps,
            conditional_only=options.conditional_only,
        ),
        optim=replace(recipe.optim, bf16=options.bf16),
        data=replace(recipe.data, text_lengths=(options.text_tokens or max(recipe.data.text_lengths),)),
        validation=ValidationConfig(every=0),
        run=RunConfig(out=out),
    )  # fmt: skip


def reductions(options: Options, config: TrainConfig) -> list[str]:
    """Returns what is smaller than the recipe at its true size, in words."""
    recipe, shape = recipe_of(options), shape_of(options)
    true, blocks = FULL_SIZES[options.base], "joint blocks" if options.base == "sd3" else "double blocks"
    pairs = [
        (config.model.resolution, recipe.model.resolution, "px"),
        (max(text_lengths(config)), max(text_lengths(recipe)), "text tokens"),
        (config.objective.rollout_steps, recipe.objective.rollout_steps, "rollout steps"),
        (shape.double_blocks, true.double_blocks, blocks),
        (shape.single_blocks, true.single_blocks, "single blocks"),
        (options.reward, REWARD, "as reward"),
    ]
    words = [f"{found} {what} instead of {usual}" for found, usual, what in pairs if found != usual]
    return words + ([f"backbone {shape.width_divisor} times narrower"] if shape.width_divisor != 1 else [])


def measure(options: Options) -> dict[str, Any]:
    """Measures one step; the file is written anew after every repeat. Raises HyperAlignError."""
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise HyperAlignError("device is cuda, but torch finds no GPU. Use --device cpu and a small size.")
    shape = shape_of(options)
    deadline = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory() as folder:
        asked = config_of(options, Path(folder))
        config, costs = fitted(asked, memory_bytes(device), partial(costs_of_shape, shape=shape))
        own = without_recomputation(config)
        works = step_work(config, costs), step_work(own, costs_of_shape(own, shape))
        accelerator = Accelerator(cpu=device.type == "cpu")
        trainer = TimedTrainer(config, smoke_inputs(config, accelerator, shape), accelerator)
        results = {
            "setting": setting(options, config, trainer, costs),
            "estimate": {
                "tflop": {name: value / TERA for name, value in asdict(works[0]).items()},
                "gib": {name: size / GIB for name, size in asdict(step_memory(config, costs)).items()},
                "peak_gib": step_memory(config, costs).peak / GIB,
            },
        }
        path = options.out / f"{name_of(options, config)}_{slug(trainer.device)}.json"
        trainer.measured_step()
        rates, steps = [rate_of(config, trainer.device)], list[dict[str, Phase]]()
        for _ in range(options.repeats):
            began = time.monotonic()
            steps.append(trainer.measured_step())
            rates.append(rate_of(config, trainer.device))
            results |= metrics(steps, *works, statistics.median(rates), images(config))
            save_json(results, path)
            if 2 * time.monotonic() - began > deadline:
                break
        if options.profile:
            profile(trainer, options.profile / f"{path.stem}.txt")
    return results


def name_of(options: Options, config: TrainConfig) -> str:
    """Returns the name of a result: the base model, and what is not as in its recipe."""
    o, recipe = config.objective, recipe_of(options).objective
    batches = o.prompt_batch, o.timesteps
    parts = {
        f"_{o.prompt_batch}x{o.timesteps}": batches != (recipe.prompt_batch, recipe.timesteps),
        "_channels_last": options.channels_last,
        "_compiled": options.compile,
    }
    return f"training_{options.base}" + "".join(part for part, present in parts.items() if present)


def rate_of(config: TrainConfig, device: torch.device) -> float:
    """Returns the rate of a large matrix product by the clock that times the steps."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    return matrix_rate(device, backbone_dtype(config), clock=clock)


def images(config: TrainConfig) -> int:
    """Returns the images with gradient of one step."""
    return config.objective.prompt_batch * config.objective.timesteps + config.objective.preference_batch


def metrics(
    steps: list[dict[str, Phase]], running: Work, own: Work, rate: float, samples: int
) -> dict[str, Any]:
    """Returns medians with their spread, by phase, of both gradient passes, and of the whole step.

    Args:
        steps: the measured phases of each step.
        running: operations as they run, with recomputation.
        own: the model's own operations.
        rate: operations a second of a large matrix product.
        samples: images with gradient in a step.
    """
    phases: dict[str, Any] = {}
    groups = {name: (name,) for name in steps[0]}
    for name, parts in {**groups, "gradient": ("reward", "preference"), "step": tuple(groups)}.items():
        seconds = [sum(step[part].seconds for part in parts) for step in steps]
        peaks = [peak for step in steps for part in parts if (peak := step[part].peak_gib) is not None]
        done, counts = (sum(asdict(work).get(part, 0.0) for part in parts) for work in (running, own))
        median = statistics.median(seconds)
        phases[name] = {
            "seconds": spread(seconds),
            "peak_gib": max(peaks, default=None),
            "tflop": done / TERA,
            "model_tflop": counts / TERA,
            "utilisation": counts / median / rate,
            "with_recomputation": done / median / rate,
        }
    whole = [samples / sum(phase.seconds for phase in step.values()) for step in steps]
    return {
        "repeats": len(steps),
        "matrix_tflops": rate / TERA,
        "samples": samples,
        "samples_per_second": spread(whole),
        "phases": phases,
    }


def setting(options: Options, config: TrainConfig, trainer: Trainer, costs: StepCosts) -> dict[str, Any]:
    """Returns everything the metrics depend on."""
    o, model = config.objective, config.model
    return {
        "base": options.base,
        **environment(trainer.device, ("diffusers", "transformers", "accelerate")),
        "reduced": reductions(options, config),
        "pixels": model.resolution,
        "text_tokens": max(text_lengths(config)),
        "shape": asdict(shape_of(options)),
        "dtype": str(backbone_dtype(config)).removeprefix("torch."),
        "mode": model.mode,
        "variant": model.variant,
        "checkpointing": model.gradient_checkpointing,
        "channels_last": model.channels_last,
        "compiled": model.compile,
        "conditional_only": o.conditional_only,
        "rewards": list(o.rewards),
        "prompts": o.prompt_batch,
        "timesteps": o.timesteps,
        "rollout_steps": o.rollout_steps,
        "preferred": o.preference_batch,
        "micro_batch": o.micro_batch,
        "rows_per_image": 2 if costs.cfg else 1,
        "hypernetwork": asdict(config.network),
        "targets": costs.targets,
        "parameters": costs.parameters,
    }


def profile(trainer: TimedTrainer, path: Path) -> None:
    """Writes torch.profiler's table of one step."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if trainer.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as recorded:
        trainer.measured_step()
    order = f"self_{trainer.device.type}_time_total"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(recorded.key_averages().table(sort_by=order, row_limit=40), encoding="utf-8")


def title(results: Mapping[str, Any]) -> str:
    """Returns one line: what was measured, and what was reduced."""
    s = results["setting"]
    reduced = "; reduced: " + ", ".join(s["reduced"]) if s["reduced"] else "; true size"
    return (
        f"{s['base']}, {s['pixels']} px, batch {s['micro_batch']}, {' + '.join(s['rewards'])}, {s['mode']}, "
        f"{s['dtype']}, {s['device_name']}, torch {s['versions']['torch']}, {results['repeats']} steps"
        f", checkpointing {s['checkpointing']}{reduced}"
    )


def table(results: Mapping[str, Any]) -> str:
    """Returns the metrics as a Markdown table."""
    lines = [
        title(results), "",
        "| phase | seconds: median [min, max] | model TFLOP | utilisation | with recomputation | peak GiB |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, row in results["phases"].items():
        seconds, peak = row["seconds"], row["peak_gib"]
        times = f"{seconds['median']:.3f} [{seconds['min']:.3f}, {seconds['max']:.3f}]"
        shares = "| | | " if name == "optimiser" else (
            f"| {row['model_tflop']:.3f} | {row['utilisation']:.1%} | {row['with_recomputation']:.1%} "
        )  # fmt: skip
        lines.append(f"| {name} | {times} {shares}| {'' if peak is None else f'{peak:.2f}'} |")
    samples, expected = results["samples_per_second"], results["estimate"]["peak_gib"]
    lines += [
        "",
        f"{samples['median']:.3f} samples/s [{samples['min']:.3f}, {samples['max']:.3f}] "
        f"({results['samples']} images with gradient a step); matrix products reach "
        f"{results['matrix_tflops']:.3f} TFLOP/s; the estimate of the peak was {expected:.2f} GiB",
    ]
    return "\n".join(lines)


def main(options: Options) -> dict[str, Any]:
    """Measures, prints the table and returns the metrics."""
    results = measure(options)
    print(table(results))
    return results


if __name__ == "__main__":
    main(tyro.cli(Options))
