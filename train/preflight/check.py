"""`--check`: reports in seconds everything that would stop a recipe's run, and estimates its cost."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from hyperalign.errors import HyperAlignError
from hyperalign.files import free_bytes
from hyperalign.hosts.diffusers.adapter import spec_of
from train.config import TrainConfig
from train.inputs import reward_names, training_prompts, validation_prompts
from train.methods.passes import step_passes
from train.models.load import backbone_dtype
from train.models.step_aware import check_step_aware
from train.models.text_encoders import check_cache_limit, text_bytes, text_lengths
from train.preflight.attention import try_attention
from train.preflight.costs import matrix_rate
from train.preflight.estimate import (
    ASSUMED_SHARE,
    Memory,
    checkpoint_bytes,
    export_bytes,
    step_memory,
    step_seconds,
    step_work,
    validation_work,
)
from train.preflight.fit import USUAL_CARD, costs_of_folder, described, fitted, is_automatic, what_fits
from train.preflight.input_checks import (
    GIB,
    Problems,
    backbone_of,
    check_base,
    check_diversity_encoder,
    check_encoders,
    check_folder_writable,
    check_reward,
    check_room,
    check_start,
    check_trackers,
    preference_captions,
    saved_step,
    uncached,
)
from train.preflight.step_costs import StepCosts
from train.tiny.check import check_tiny

TERA = 1e12


@dataclass(frozen=True, slots=True)
class Device:
    """The device of the check, which the run is expected to use too."""

    device: torch.device
    name: str
    memory: int | None
    """Bytes of a GPU."""


def check(config: TrainConfig) -> str:
    """Returns the size and cost of the run; what is not exact is named an estimate.

    Raises:
        HyperAlignError: all that would stop the run later, as a numbered list.
    """
    if config.model.base == "tiny":
        return check_tiny(config)
    problems, device = Problems(), present_device()
    memory, automatic = device.memory or USUAL_CARD, is_automatic(config)
    config, costs = problems.run(lambda: fitted(config, memory, costs_of_folder)) or (config, None)
    lines = check_inputs(config, problems, costs)
    if costs is not None:
        rate = matrix_rate(device.device, backbone_dtype(config), repeats=3)
        if device.device.type == "cuda":
            lines.append(problems.run(lambda: try_attention(config, device.device)) or "attention: fails")
        else:
            lines.append(f"attention on a GPU: {', '.join(config.run.attention_kernels)}, in this order")
        choice = [described(config, memory)] if automatic else []
        lines = [*sizes(config, costs), *lines, *choice, *estimates(config, costs, device, rate)]
    if problems.found:
        listed = "\n".join(f"{number}. {text}" for number, text in enumerate(problems.found, 1))
        count = "1 problem" if len(problems.found) == 1 else f"{len(problems.found)} problems"
        raise HyperAlignError("\n".join([f"the run cannot start, {count}:", listed, "", *lines]))
    return "\n".join([f"recipe is sound: {config.optim.steps} steps", *lines])


def check_inputs(config: TrainConfig, problems: Problems, costs: StepCosts | None) -> list[str]:
    """Checks everything that is read or written; returns what was found."""
    run = problems.run
    run(lambda: check_base(config))
    prompts = run(lambda: training_prompts(config)) or []
    validation = run(lambda: validation_prompts(config)) or []
    channels = 16 if config.model.base in ("flux", "sd3") else 4
    captions, images = run(lambda: preference_captions(config, channels)) or ([], "none")
    for name in reward_names(config):
        run(lambda name=name: check_reward(config, name))
    run(lambda: check_diversity_encoder(config))
    run(lambda: check_step_aware(config))
    if config.run.init_from != Path():
        run(lambda: check_start(config, spec_of(backbone_of(config))))
    for folder, option in ((config.run.out, "run.out"), (config.data.embeddings, "data.embeddings")):
        run(lambda folder=folder, option=option: check_folder_writable(folder, option))
    run(lambda: check_trackers(config))
    step = run(lambda: saved_step(config)) or 0
    texts = list(dict.fromkeys([*prompts, *validation, *captions, ""]))
    new = run(lambda: uncached(config, texts))
    if new is None:  # without the encoders it is unknown what is cached
        new = [len(texts)] * len(text_lengths(config))
    if any(new):
        run(lambda: check_encoders(config))
        run(lambda: check_cache_limit(config, new))
    lines = [
        f"data: {len(prompts)} prompts, {len(validation)} for validation, {len(captions)} captions of images",
        f"preference images: {images}",
        f"resumes from step {step} in {config.run.out}" if step else f"starts anew in {config.run.out}",
    ]
    return lines if costs is None else [*lines, check_disk(config, problems, costs, new)]


def check_disk(config: TrainConfig, problems: Problems, costs: StepCosts, new: list[int]) -> str:
    """Checks the free space of the disks; returns what is needed and free."""
    texts = sum(count * size for count, size in zip(new, text_bytes(config), strict=True))
    needs = {
        "checkpoints": (config.run.out, checkpoint_bytes(config, costs)),
        "hypernetworks": (config.run.out, export_bytes(config, costs)),
        "embeddings": (config.data.embeddings, texts),
    }
    problems.run(lambda: check_room(needs))
    listed = ", ".join(f"{name} {count / GIB:.1f} GiB" for name, (_, count) in needs.items())
    free = free_bytes(config.data.embeddings) / GIB
    return f"disk: {listed} ({max(new)} texts to encode once); {free:.1f} GiB free"


def sizes(config: TrainConfig, costs: StepCosts) -> list[str]:
    """Returns the exact sizes: parameters, targets, the batch."""
    o, model, processes = config.objective, config.model, launched()
    millions = {name: f"{name} {count / 1e6:.1f} M" for name, count in costs.parameters.items()}
    hypernetwork = millions.pop("hypernetwork")
    measured = [name for name in config.validation.rewards if name not in o.rewards]
    passes = step_passes(config)
    rewarded, preferred = passes.reward_batch * processes, passes.preference_batch * processes
    return [
        f"{model.base} at {model.resolution} pixels, variant {model.variant}, {model.mode} perception",
        f"frozen parameters: {', '.join(millions.values())}"
        + (f" ({', '.join(measured)} only measured)" if measured else ""),
        f"trained parameters: {hypernetwork} for {costs.targets} attention projections",
        f"a step of {processes} process{'es' * (processes > 1)}: {passes.rollouts * processes} rollouts of "
        f"{o.rollout_steps} steps, {rewarded} images with reward gradient, {preferred} preference images",
    ]


def estimates(config: TrainConfig, costs: StepCosts, device: Device, rate: float) -> list[str]:
    """Returns the estimates: operations, memory, time."""
    work, memory = step_work(config, costs), step_memory(config, costs)
    shares = ", ".join(f"{name} {value / work.total:.0%}" for name, value in asdict(work).items())
    seconds = step_seconds(config, costs, rate, launched())
    validation = validation_work(config, costs, launched())
    speed = (
        f"estimate of speed: {3600 / seconds:.1f} steps/h on {device.name}, "
        f"{config.optim.steps * seconds / 3600:.1f} h for all, if {ASSUMED_SHARE:.0%} of the "
        f"{rate / TERA:.2f} TFLOP/s that its matrix products reach are used"
    )
    if device.memory is None:
        usual = 3600 / step_seconds(config, costs, 100 * TERA, launched(), share=1.0)
        speed = f"{speed}; {usual:.1f} steps/h on a GPU for every 100 TFLOP/s that it reaches in training"
    validations = (
        f"estimate of a validation: {validation / TERA:.0f} TFLOP in each process, as much as "
        f"{validation / work.total:.1f} steps, every {config.validation.every} steps and once at the start"
    )
    return [
        f"estimate of a step: {work.total / TERA:.0f} TFLOP in each process ({shares})",
        *([validations] if config.validation.every else []),
        memory_line(memory, device, lambda total: what_fits(config, total, costs_of_folder)),
        speed,
    ]


def memory_line(memory: Memory, device: Device, fitting: Callable[[int], str]) -> str:
    """Returns the estimated peak by phase, and whether the GPU has that much memory.

    `fitting` says what to set for a GPU of some bytes.
    """
    phases = ", ".join(f"{name} {size / GIB:.1f}" for name, size in memory.phases.items())
    peak = memory.peak / GIB
    line = (
        f"estimate of peak memory: {peak:.1f} GiB: frozen weights {memory.weights / GIB:.1f}, hypernetwork "
        f"and optimiser {memory.optimiser / GIB:.1f}, and the greatest of {phases}"
    )
    if device.memory is None:
        return f"{line}; no GPU was found to compare with"
    total = device.memory / GIB
    if memory.peak > device.memory:
        return f"{line}; WARNING: {device.name} has {total:.1f} GiB: {fitting(device.memory)}"
    return f"{line}; {device.name} has {total:.1f} GiB"


def launched() -> int:
    """Returns how many processes `accelerate launch` started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def present_device() -> Device:
    """Returns the GPU of this process, or the processor."""
    if not torch.cuda.is_available():
        return Device(torch.device("cpu"), "this processor (no GPU was found)", None)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return Device(
        device, torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device).total_memory
    )
