"""`--check`: everything that can go wrong with a recipe, found in seconds, and what the run will take."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass

import torch

from hyperalign.errors import HyperAlignError
from train.config import TrainConfig
from train.models.load import backbone_dtype
from train.models.text_encoders import text_lengths
from train.preflight.costs import matrix_rate
from train.preflight.estimate import (
    ASSUMED_SHARE,
    Memory,
    evaluation_work,
    states_bytes,
    step_memory,
    step_seconds,
    step_work,
)
from train.preflight.inputs import (
    GIB,
    Complaints,
    autoencoder_of,
    backbone_of,
    check_base,
    check_encoders,
    check_reward,
    check_room,
    check_trackers,
    check_writable,
    free_bytes,
    preferred_captions,
    saved_step,
    training_prompts,
    uncached,
    validation_prompts,
)
from train.preflight.parts import Parts, parts_of

LOWER = (
    "lower objective.micro_batch, or set objective.conditional_only, model.checkpointing all, or "
    "model.vae taesd"
)
TERA = 1e12


@dataclass(frozen=True, slots=True)
class Device:
    """Where the check runs; the run is expected to run on the same."""

    device: torch.device
    name: str
    memory: int | None
    """Bytes of a GPU."""


def check(config: TrainConfig) -> str:
    """Returns what the run will take; what is not exact is called an estimate.

    Raises:
        HyperAlignError: whatever would stop the run later, all of it at once, one sentence each.
    """
    if config.model.base == "tiny":
        from train.tiny.check import check_tiny

        return check_tiny(config)
    complaints = Complaints()
    parts = complaints.hear(lambda: parts_of(config, backbone_of(config), autoencoder_of(config)))
    lines = inputs(config, complaints, parts)
    if parts is not None:
        device = present_device()
        rate = matrix_rate(device.device, backbone_dtype(config), repeats=3)
        lines = [*sizes(config, parts), *lines, *estimates(config, parts, device, rate)]
    if complaints.found:
        listed = "\n".join(f"{number}. {text}" for number, text in enumerate(complaints.found, 1))
        count = "1 problem" if len(complaints.found) == 1 else f"{len(complaints.found)} problems"
        raise HyperAlignError("\n".join([f"the run cannot start, {count}:", listed, "", *lines]))
    return "\n".join([f"recipe is sound: {config.optim.steps} steps", *lines])


def inputs(config: TrainConfig, complaints: Complaints, parts: Parts | None) -> list[str]:
    """Looks at everything that is read or written; returns what was found."""
    hear, side = complaints.hear, config.model.resolution // 8
    hear(lambda: check_base(config))
    prompts = hear(lambda: training_prompts(config)) or []
    validation = hear(lambda: validation_prompts(config)) or []
    shape = (16 if config.model.base in ("flux", "sd3") else 4, side, side)
    captions = hear(lambda: preferred_captions(config, shape)) or []
    for name in dict.fromkeys([*config.objective.rewards, *config.eval.rewards]):
        hear(lambda name=name: check_reward(config, name))
    for folder, option in ((config.run.out, "run.out"), (config.data.embeddings, "data.embeddings")):
        hear(lambda folder=folder, option=option: check_writable(folder, option))
    hear(lambda: check_trackers(config))
    step = hear(lambda: saved_step(config)) or 0
    texts = list(dict.fromkeys([*prompts, *validation, *captions, ""]))
    new = hear(lambda: uncached(config, texts))
    if new is None:  # without the encoders nothing can be known to be cached
        new = [len(texts)] * len(text_lengths(config))
    if any(new):
        hear(lambda: check_encoders(config))
    lines = [
        f"data: {len(prompts)} prompts, {len(validation)} held out, {len(captions)} captions of images",
        f"goes on from step {step} in {config.run.out}" if step else f"starts anew in {config.run.out}",
    ]
    return lines if parts is None else [*lines, disk(config, complaints, parts, new)]


def disk(config: TrainConfig, complaints: Complaints, parts: Parts, new: list[int]) -> str:
    """Looks for room on the disks; returns what is needed of it."""
    size = backbone_dtype(config).itemsize
    texts = size * sum(count * numbers for count, numbers in zip(new, parts.text_numbers, strict=True))
    needs = {
        "states": (config.run.out, states_bytes(config, parts)),
        "embeddings": (config.data.embeddings, texts),
    }
    complaints.hear(lambda: check_room(needs))
    listed = ", ".join(f"{name} {count / GIB:.1f} GiB" for name, (_, count) in needs.items())
    free = free_bytes(config.data.embeddings) / GIB
    return f"disk: {listed} ({max(new)} texts to encode once); {free:.1f} GiB free"


def sizes(config: TrainConfig, parts: Parts) -> list[str]:
    """Returns what is exact: parameters, targets, the batch."""
    o, model, processes = config.objective, config.model, launched()
    millions = {name: f"{name} {count / 1e6:.1f} M" for name, count in parts.parameters.items()}
    hypernetwork = millions.pop("hypernetwork")
    watched = [name for name in config.eval.rewards if name not in o.rewards]
    rewarded = o.prompts * o.timesteps * processes * bool(o.reward_weight)
    preferred = o.preferred * processes * bool(o.preference_weight)
    return [
        f"{model.base} at {model.resolution} pixels, variant {model.variant}, {model.mode} perception",
        f"frozen parameters: {', '.join(millions.values())}"
        + (f" ({', '.join(watched)} only watched)" if watched else ""),
        f"trained parameters: {hypernetwork} for {parts.targets} attention projections",
        f"a step of {processes} process{'es' * (processes > 1)}: {o.prompts * processes} rollouts of "
        f"{o.rollout_steps} steps, {rewarded} images with reward gradient, {preferred} preference images",
    ]


def estimates(config: TrainConfig, parts: Parts, device: Device, rate: float) -> list[str]:
    """Returns what is not exact: work, memory, time."""
    work, memory = step_work(config, parts), step_memory(config, parts)
    shares = ", ".join(f"{name} {value / work.total:.0%}" for name, value in asdict(work).items())
    seconds = step_seconds(config, parts, rate, launched())
    evaluation = evaluation_work(config, parts, launched())
    speed = (
        f"estimate of speed: {3600 / seconds:.1f} steps/h on {device.name}, "
        f"{config.optim.steps * seconds / 3600:.1f} h for all, if {ASSUMED_SHARE:.0%} of the "
        f"{rate / TERA:.2f} TFLOP/s that its matrix products reach are used"
    )
    if device.memory is None:
        usual = 3600 / step_seconds(config, parts, 100 * TERA, launched(), share=1.0)
        speed = f"{speed}; {usual:.1f} steps/h on a GPU for every 100 TFLOP/s that it reaches in training"
    evaluations = (
        f"estimate of an evaluation: {evaluation / TERA:.0f} TFLOP in each process, as much as "
        f"{evaluation / work.total:.1f} steps, every {config.eval.every} steps"
    )
    return [
        f"estimate of a step: {work.total / TERA:.0f} TFLOP in each process ({shares})",
        *([evaluations] if config.eval.every else []),
        memory_line(memory, device),
        speed,
    ]


def memory_line(memory: Memory, device: Device) -> str:
    """Returns the expected peak by part, and whether the GPU has that much."""
    moments = ", ".join(f"{name} {size / GIB:.1f}" for name, size in memory.moments.items())
    peak = memory.peak / GIB
    line = (
        f"estimate of peak memory: {peak:.1f} GiB: frozen weights {memory.weights / GIB:.1f}, hypernetwork "
        f"and optimiser {memory.optimiser / GIB:.1f}, and the greatest of {moments}"
    )
    if device.memory is None:
        return f"{line}; no GPU was found to compare with"
    total = device.memory / GIB
    if memory.peak > device.memory:
        return f"{line}; WARNING: {device.name} has {total:.1f} GiB: {LOWER}"
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
