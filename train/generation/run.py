"""Draws the images of a run that are not on disk yet, and keeps its record."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from hyperalign.errors import HyperAlignError
from hyperalign.files import cannot_write, check_writable, replacing
from hyperalign.image_files import DECODING_ERRORS
from hyperalign.image_sets import (
    MAKE_ROOM,
    RECORD,
    RunRecord,
    Settings,
    check_same_settings,
    image_path,
    open_image_set,
    read_record,
    summarise_seconds,
    write_metadata,
    write_record,
)
from hyperalign.threads import Threads
from hyperalign.tiny.text_encoder import tokenize_batch
from train.config import TrainConfig
from train.data.prompts import load_prompt_list
from train.generation.das import Das
from train.generation.dymo import SD15, TABLES, Dymo
from train.generation.entities import Pairs, pairs_of_prompts
from train.generation.freedom import Freedom
from train.generation.gradients import ImageValue, require_gradient
from train.generation.models import (
    base_digest,
    check_rewards,
    method_digest,
    method_name,
    open_reward,
    open_sampler,
    token_counter,
)
from train.generation.options import SIDE, STEERED, Options, configured
from train.generation.step_search import StepSearch
from train.generation.test_time import PIXELS_PER_CELL, RewardGuidance, search
from train.models.base import Base
from train.models.kernels import attention_kernels
from train.models.load import PIPELINES
from train.objective import without_nan
from train.sampling import Sampler, initial_noise, seed_of

TINY_SIDE = 64
SECONDS_KEY, NOT_FINITE_KEY = "seconds", "not finite"
"""What an image's file says about itself."""
PACKAGES = ("torch", "diffusers", "transformers", "accelerate")
LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Job:
    """One image to draw."""

    prompt: int
    """Index in the list."""
    image: int
    """Index among the images of the prompt."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a command draws, checked before anything large is loaded."""

    options: Options
    config: TrainConfig
    metadata: list[dict[str, Any]]
    settings: Settings
    pairs: list[Pairs] = field(default_factory=list[Pairs])
    """DyMO's, of each prompt's tokens."""

    @property
    def jobs(self) -> list[Job]:
        """All images, in the order of their prompts and seeds."""
        seeds = range(self.settings.images_per_prompt)
        return [Job(prompt, image) for prompt in range(len(self.metadata)) for image in seeds]


def planned(options: Options) -> Plan:
    """Returns what the options ask for.

    Raises:
        HyperAlignError: wrong options or prompts, missing files, or a folder with other images.
    """
    options.check()
    config, rows = configured(options), load_prompt_list(options.prompts)
    rows = rows[: options.limit or None]
    if config.model.base == "tiny":
        tokenize_batch([row["prompt"] for row in rows])
    if options.test_time != "none":
        check_rewards(config)
    dymo = options.test_time == "dymo"
    pairs = pairs_of_prompts(options.dymo, rows, token_counter(config)) if dymo else []
    side = TINY_SIDE if config.model.base == "tiny" else config.model.resolution
    path = options.method_path
    settings = Settings(
        base=config.model.base,
        base_files=base_digest(config),
        method=method_name(options),
        method_file="" if path is None else path.name,
        method_sha256="" if path is None else method_digest(path),
        options=method_options(options, config)
        | ({"semantic_prompts": sum(map(bool, pairs))} if dymo else {}),
        steps=config.validation.steps,
        guidance_scale=config.objective.guidance_scale,
        width=side,
        height=side,
        seed=options.seed,
        images_per_prompt=options.images_per_prompt,
        prompts=len(rows),
        prompts_sha256=hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
        precision="bfloat16" if config.optim.bf16 else "float32",
    )
    _check_folder(options.out, settings)
    return Plan(options, config, rows, settings, pairs)


def method_options(options: Options, config: TrainConfig) -> dict[str, Any]:
    """Returns what decides the images of a method besides its file, as JSON types."""
    found: dict[str, Any] = {}
    if config.model.base != "tiny" and PIPELINES[config.model.base].variable_length:
        found["text_length"] = config.data.text_lengths[0]
    if options.hypernetwork != Path() or options.lora != Path():
        found["strength"] = options.strength
    if options.test_time != "none":
        found["rewards"] = dict(config.objective.rewards)
    if options.searches:
        chosen, local = options.search, options.test_time != "best-of-N"
        found["candidates"] = chosen.candidates
        found |= {"round_size": chosen.round_size, "radius": chosen.radius} if local else {}
        found |= {"epsilon": chosen.epsilon} if options.test_time == "epsilon-greedy" else {}
    settings = {
        "das": options.das, "freedom": options.freedom, "dymo": options.dymo,
        "epsilon-greedy-steps": options.step_search,
    }  # fmt: skip
    if options.test_time in settings:
        found |= asdict(settings[options.test_time])
    if options.test_time == "dymo":
        own = options.dymo.entities
        found["entities"] = "" if own == Path() else method_digest(own)
    if options.test_time == "guidance":
        own = options.guidance
        found |= {"strength": own.strength, "start": own.start, "end": own.end}
        found |= {"gradient": own.gradient, "decode_size": own.decode_size}
    return json.loads(json.dumps(found))  # a record is read with lists for tuples


def generate(plan: Plan, accelerator: Accelerator, progress: Callable[[int, int], object]) -> RunRecord:
    """Draws this process's share of the missing images, and returns the record of all.

    Args:
        plan: what to draw.
        accelerator: of all processes, which share the folder.
        progress: called with this process's images that are there and that it draws in all.

    Raises:
        HyperAlignError: a file is missing or damaged, or the disk refuses.
    """
    folder, settings = plan.options.out, plan.settings
    missing = [job for job in plan.jobs if not is_whole(image_path(folder, job.prompt, job.image))]
    accelerator.wait_for_everyone()  # all have seen the same images before one writes another
    own = missing[accelerator.process_index :: accelerator.num_processes]
    environment = describe(plan, accelerator)
    progress(0, len(own))
    if missing:
        draw = drawing(plan, accelerator.device)
        if accelerator.is_main_process:
            _warn(plan)
            write_record(folder, RunRecord(settings, environment=environment))
            write_metadata(folder, plan.metadata)
        accelerator.wait_for_everyone()
        with attention_kernels(plan.config.run.attention_kernels, accelerator.device):
            _draw_all(plan, own, draw, progress)
    accelerator.wait_for_everyone()
    record = _finished(plan, environment)
    if accelerator.is_main_process:
        write_metadata(folder, plan.metadata)
        write_record(folder, record)
        open_image_set(folder)
    accelerator.wait_for_everyone()
    return record


def _warn(plan: Plan) -> None:
    """Says for how many prompts DyMO has no semantic objective, unless that was asked for."""
    without = sum(not pairs for pairs in plan.pairs)
    if without and plan.options.dymo.semantic != "off":
        LOG.warning(
            "DyMO steers %d of %d prompts by the reward alone: the base model has no cross-attention, or "
            "neither --dymo.entities nor GenEval's metadata names two entities of theirs, or one with an "
            "attribute.",
            without,
            len(plan.pairs),
        )


def is_whole(path: Path) -> bool:
    """Returns whether an image is there and its file undamaged."""
    try:
        with Image.open(path) as image:
            image.verify()
    except DECODING_ERRORS:
        return False
    return True


def describe(plan: Plan, accelerator: Accelerator) -> dict[str, Any]:
    """Returns what decides the time of the images and their rounding alone."""
    device = accelerator.device
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine(),
        "processes": accelerator.num_processes,
        "batch": plan.options.batch,
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "prompts_file": plan.options.prompts.name,
        "recipe": plan.options.recipe.name,
    }


Draw = Callable[[Sequence[Job]], Tensor]
"""Jobs -> images (B, 3, H, W) in [0, 1] on the CPU; one that is not finite stays so."""


def drawing(plan: Plan, device: torch.device) -> Draw:
    """Returns what draws images by the chosen method. Raises HyperAlignError on a missing or damaged file."""
    options, prompts = plan.options, [row["prompt"] for row in plan.metadata]
    sampler = open_sampler(options, plan.config, device)
    base = sampler.base
    if options.searches:
        reward = open_reward(plan.config, base.device)
        return lambda jobs: torch.stack(
            [
                search(sampler, reward, options, prompts[job.prompt], job.prompt, options.seed + job.image)
                for job in jobs
            ]
        )
    if options.test_time == "epsilon-greedy-steps":
        return _searched(plan, sampler)
    cell = PIXELS_PER_CELL.get(plan.config.model.base, 8)
    if options.test_time in STEERED:
        return _steered(plan, sampler, SIDE // cell)
    if options.test_time == "guidance":
        reward = open_reward(plan.config, base.device)
        guidance = RewardGuidance(base, reward, options.guidance, sampler.steps, cell)
        if options.guidance.gradient == "through-model":
            _save_memory(base)
        sampler = replace(sampler, guide_for=guidance.guide_for)

    def draw(jobs: Sequence[Job]) -> Tensor:
        noises = [initial_noise(job.prompt, options.seed + job.image, base.latent_shape) for job in jobs]
        return sampler.draw([prompts[job.prompt] for job in jobs], torch.stack(noises))[0]

    return draw


def _searched(plan: Plan, sampler: Sampler) -> Draw:
    """Returns what draws with searched noise. Raises HyperAlignError if a reward is missing."""
    options, device = plan.options, sampler.base.device
    reward = open_reward(plan.config, device)
    own = StepSearch(sampler, reward, options.step_search, options.batch)

    def draw(jobs: Sequence[Job]) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=sampler.bf16):
            prompts = [plan.metadata[job.prompt]["prompt"] for job in jobs]
            drawn = zip(prompts, jobs, strict=True)
            return torch.stack([own.draw(text, job.prompt, options.seed + job.image) for text, job in drawn])

    return draw


def _steered(plan: Plan, sampler: Sampler, largest_side: int) -> Draw:
    """Returns what draws by a gradient through the model.

    Raises HyperAlignError if a reward is missing or has no gradient.
    """
    options, base = plan.options, sampler.base
    reward, prompts = open_reward(plan.config, base.device), [row["prompt"] for row in plan.metadata]
    require_gradient(reward, prompts[0], base.device)
    _save_memory(base)

    def draw(jobs: Sequence[Job]) -> Tensor:
        with torch.autocast(base.device.type, torch.bfloat16, enabled=sampler.bf16):
            if options.test_time == "freedom":
                return by_freedom(jobs)
            one = by_das if options.test_time == "das" else by_dymo
            return torch.stack([one(job) for job in jobs])

    def by_freedom(jobs: Sequence[Job]) -> Tensor:
        value = ImageValue(base, reward, [prompts[job.prompt] for job in jobs], largest_side)
        seeds = [seed_of(job.prompt, options.seed + job.image) for job in jobs]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        noises = [initial_noise(job.prompt, options.seed + job.image, base.latent_shape) for job in jobs]
        return Freedom(sampler, value, options.freedom).draw(torch.stack(noises), generators)

    def by_das(job: Job) -> Tensor:
        value = ImageValue(base, reward, [prompts[job.prompt]] * options.das.particles, largest_side)
        return Das(sampler, value, options.das).draw(job.prompt, options.seed + job.image)

    def by_dymo(job: Job) -> Tensor:
        value = ImageValue(base, reward, [prompts[job.prompt]], largest_side)
        table = TABLES.get(plan.config.model.base, SD15)
        own = Dymo(sampler, value, plan.pairs[job.prompt], table, options.dymo)
        return own.draw(job.prompt, options.seed + job.image)

    return draw


def _save_memory(base: Base) -> None:
    """Lets backward passes through the model recompute its activations."""
    backbone: Any = base.backbone
    backbone.enable_gradient_checkpointing()


def _draw_all(plan: Plan, jobs: Sequence[Job], draw: Draw, progress: Callable[[int, int], object]) -> None:
    """Draws and writes images; a thread writes those of a batch while the next one is drawn."""
    size = 1 if plan.options.one_at_a_time else plan.options.batch

    def drawn() -> Iterator[tuple[Path, Tensor, float]]:
        for first in range(0, len(jobs), size):
            chunk = jobs[first : first + size]
            started = time.monotonic()
            images = draw(chunk)
            seconds = (time.monotonic() - started) / len(chunk)
            for job, image in zip(chunk, images, strict=True):
                yield image_path(plan.options.out, job.prompt, job.image), image, seconds

    with Threads(1) as writer:
        saved = writer.in_order(lambda image: save_image(*image), drawn(), ahead=size)
        for number, _ in enumerate(saved, 1):
            progress(number, len(jobs))


def save_image(path: Path, image_CHW: Tensor, seconds: float) -> None:
    """Writes an image as PNG with its seconds, grey where it is not finite. Raises HyperAlignError."""
    shown, finite_B = without_nan(image_CHW[None])
    pixels = (shown[0].clamp(0.0, 1.0) * 255).round().byte().permute(1, 2, 0).numpy()
    said = PngInfo()
    said.add_text(SECONDS_KEY, repr(seconds))
    if not bool(finite_B.all()):
        said.add_text(NOT_FINITE_KEY, "drawn as grey")
    with cannot_write(path, MAKE_ROOM), replacing(path) as partial:
        Image.fromarray(pixels).save(partial, "PNG", pnginfo=said)


def _finished(plan: Plan, environment: dict[str, Any]) -> RunRecord:
    """Returns the record of a run whose images are all there. Raises HyperAlignError if one is missing."""
    seconds, not_finite = list[float](), 0
    for job in plan.jobs:
        path = image_path(plan.options.out, job.prompt, job.image)
        try:
            with Image.open(path) as image:
                said: dict[str, Any] = image.info
        except DECODING_ERRORS as error:
            raise HyperAlignError(
                f"{path} is not there although every process drew its share. Put --out into a folder that "
                "all machines share, and run the same command again."
            ) from error
        if SECONDS_KEY in said:
            seconds.append(float(said[SECONDS_KEY]))
        not_finite += NOT_FINITE_KEY in said
    return RunRecord(
        plan.settings, True, summarise_seconds(seconds), environment | {"not_finite": not_finite}
    )


def _check_folder(folder: Path, settings: Settings) -> None:
    """Raises HyperAlignError if images of another run are in a folder, or it cannot be written to."""
    if (record := read_record(folder)) is not None:
        check_same_settings(folder, record.settings, settings)
    elif folder.is_dir() and any(path.name.isdecimal() for path in folder.iterdir()):
        raise HyperAlignError(
            f"{folder} has images, but no {RECORD} that tells what they are. Choose another folder."
        )
    check_writable(folder / RECORD)
