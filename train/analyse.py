"""Measures what a hypernetwork generates over a prompt list: Figures 8, 9 and 12, and its conditioning.

python train/analyse.py weights --recipe train/recipes/tiny_s.toml --hypernetwork tiny_s.safetensors
python train/analyse.py diversity --recipe R --hypernetworks S.safetensors P.safetensors --prompts parti.tsv
python train/analyse.py conditioning --recipe R --hypernetwork S.safetensors --store

`weights` samples every prompt once and writes into --out, each as PNG and JSON:
dynamics (Fig 8): how the weights differ from those of the first step, at each step;
variation (Fig 9): principal components of the weights of all prompts, at a few steps;
division: how much of the weights is the same for all, by prompt, by time, and of both together.

`diversity` (Fig 12) samples every prompt from several noises, with the base model and each hypernetwork, and
writes the images of a few prompts and the diversity of all.

`conditioning` samples every prompt with the hypernetwork's own weights and with weights that are averaged, or
another prompt's, and writes what the images lose by it; --store writes that into the file, too.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

if not __package__:
    # `python train/analyse.py` puts train/ on the path, where train.py would hide the package `train`.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import torch
import tyro
from accelerate import Accelerator
from tqdm import tqdm

from hyperalign.card import write_card
from hyperalign.checkpoint import HyperAlign, check_base, load, read_header, store_training
from hyperalign.conditioning import CHANGES, sentences
from hyperalign.errors import HyperAlignError
from hyperalign.files import cannot_write, check_writable, first_line, write_text
from hyperalign.hosts.diffusers.adapter import Adapter, spec_of
from hyperalign.hosts.diffusers.tiny import load_tiny
from hyperalign.rewards import loading
from hyperalign.tiny.prompts import content_of
from hyperalign.trace import Trace
from train.analysis import conditioning, diversity, plots, weights
from train.config import TrainConfig
from train.data.prompts import load_prompts
from train.data.streams import PromptList
from train.inputs import load_rewards, sampling_inputs, validation_prompts
from train.models.image_embedding import KEY, Embed, load_encoder, unoptimised_reward
from train.models.kernels import attention_kernels
from train.models.load import check_folder
from train.preflight.input_checks import backbone_of
from train.recipe import load_recipe
from train.sampling import Sampler
from train.tiny.dataset import validation_prompts as tiny_prompts
from train.tiny.evaluate import PROMPT_SEED, judged
from train.validation import rewards_judge

TINY_PROMPTS = 240
WEIGHT_FILES = ("dynamics", "variation", "division")
DISK = "Free the disk or choose another --out, and run the same command again."


@dataclass(frozen=True, slots=True, kw_only=True)
class Common:
    """What both commands sample."""

    recipe: Path
    """Recipe whose base model and CFG scale are used."""
    prompts: Path = Path()
    """Prompt list: .txt, .jsonl, .json, .parquet or .tsv. Empty takes the recipe's validation prompts."""
    steps: int = 50
    """Sampling steps; the paper's tests have 50."""
    batch: int = 8
    """Images to sample at once; lower it where the GPU's memory is full."""
    seed: int = 0
    """Of the noise, and of which prompts are drawn from a longer list."""
    out: Path = Path("analysis")
    """Folder of the results."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights(Common):
    """Figures 8 and 9, and the division of the weights' energy."""

    hypernetwork: Path
    """The hypernetwork, of any variant."""
    count: int = 200
    """Prompts drawn at random from the list, as in Figure 9; 0 takes all. Their weights stay in memory: for
    variant S on FLUX.1 about 0.3 MB a prompt and step."""
    panels: int = 6
    """Steps that Figure 9 shows."""
    same_noise: bool = False
    """All prompts start from one noise: what differs between them is then theirs alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Images(Common):
    """Figure 12."""

    hypernetworks: tuple[Path, ...]
    """Hypernetworks to compare with the base model."""
    count: int = 24
    """Prompts drawn at random from the list; 0 takes all."""
    seeds: int = 8
    """Images of each prompt."""
    shown: int = 3
    """Prompts whose images are drawn; the figures are of all."""
    diversity_encoder: Path | None = None
    """Folder of an image encoder in transformers' layout (DINOv2, for instance) whose embedding measures
    diversity. Without one it is the recipe's, or a reward that the recipe measures and does not optimise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditioning(Common):
    """What the conditioning is worth: own weights against averaged ones, on the same prompts and noise."""

    hypernetwork: Path
    """The hypernetwork, of any variant but a static LoRA. Weights of all images stay in memory: for
    variant S on FLUX.1 about 0.3 MB an image and step."""
    count: int = 0
    """Prompts drawn at random from the list; 0 takes all."""
    seeds: int = 1
    """Images of each prompt."""
    store: bool = False
    """Also write the figures into the header and the model card of the hypernetwork."""


Options = (
    Annotated[Weights, tyro.conf.subcommand("weights")]
    | Annotated[Images, tyro.conf.subcommand("diversity")]
    | Annotated[Conditioning, tyro.conf.subcommand("conditioning")]
)
AnyOptions = Weights | Images | Conditioning


def chosen_prompts(options: AnyOptions, config: TrainConfig, least: int) -> list[str]:
    """Returns the prompts to sample. Raises HyperAlignError for fewer than `least`."""
    if options.prompts != Path():
        found, source = load_prompts(options.prompts), str(options.prompts)
    elif config.model.base == "tiny":
        own = tiny_prompts(TINY_PROMPTS, PROMPT_SEED, config.data.wordings)
        found, source = [text for text, _ in own], "the tiny model"
    else:
        found, source = validation_prompts(config), f"validation.prompts of {options.recipe.name}"
    if 0 < options.count < len(found):
        found = PromptList(found).sample(options.count, np.random.default_rng(options.seed))
    if len(found) < least:
        raise HyperAlignError(
            f"{source} gives {len(found)} prompts with --count {options.count}; the figures need {least} or "
            "more. Name a longer list, or raise --count."
        )
    return found


def check_options(options: AnyOptions) -> None:
    """Raises HyperAlignError for values out of range and for a folder that cannot be written to."""
    least = {"steps": 2, "batch": 1, "count": 0, "seed": 0}
    if isinstance(options, Weights):
        least["panels"] = 2
    else:
        least |= {"seeds": 2, "shown": 1} if isinstance(options, Images) else {"seeds": 1}
    for name, value in least.items():
        found = getattr(options, name)
        if found < value:
            raise HyperAlignError(f"--{name} is {found}; expected {value} or more. Change it.")
    check_writable(options.out / "probe", "Choose another --out.")


def check_fits(paths: tuple[Path, ...], config: TrainConfig) -> None:
    """Raises HyperAlignError if a hypernetwork is of another base model; reads headers alone."""
    if config.model.base == "tiny":
        spec = spec_of(load_tiny(torch.device("cpu")).unet)
    else:
        check_folder(config)
        spec = spec_of(backbone_of(config))
    for path in paths:
        try:
            check_base(read_header(path), spec)
        except HyperAlignError as error:
            raise HyperAlignError(f"{path}: {error}") from error


def one_padding(config: TrainConfig) -> TrainConfig:
    """Returns the recipe with one padding of T5's tokens, so that prompts differ by their words alone."""
    longest = max(config.data.text_lengths)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, text_lengths=(longest,)))


def loaded(path: Path, device: torch.device) -> HyperAlign:
    """Returns a trained hypernetwork on a device. Raises HyperAlignError."""
    hyperalign = load(path)
    weights.check_not_zero(hyperalign)
    hyperalign.network.to(device)
    return hyperalign


def analyse_weights(options: Weights, config: TrainConfig, accelerator: Accelerator) -> list[Path]:
    """Writes Figures 8 and 9 and the division; returns the files. Raises HyperAlignError."""
    prompts = chosen_prompts(options, config, weights.LEAST_PROMPTS)
    hyperalign = loaded(options.hypernetwork, accelerator.device)
    base, encoder = sampling_inputs(config, accelerator, prompts)
    traces = list[Trace]()
    with (
        tqdm(total=len(prompts), unit="prompt") as bar,
        attention_kernels(config.run.attention_kernels, base.device),
    ):
        for trace in weights.trace_prompts(
            base, encoder, hyperalign, prompts, steps=options.steps, batch=options.batch, seed=options.seed,
            guidance_scale=config.objective.guidance_scale, same_noise=options.same_noise,
        ):  # fmt: skip
            traces.append(trace)
            bar.update(trace.shown[0].weights_GRMF.shape[1])
    found = (
        weights.dynamics_of(traces), weights.variation_of(traces, options.panels), weights.division_of(traces)
    )  # fmt: skip
    noise = "one noise" if options.same_noise else "a noise each"
    about = (
        f"{options.hypernetwork.stem}, variant {hyperalign.header.schedule.variant}, {config.model.base}: "
        f"{len(prompts)} prompts with {noise}"
    )
    figures = (
        plots.plot_dynamics(found[0], f"Dynamics of generated weights (Fig 8)\n{about}"),
        plots.plot_variation(found[1], f"Variation of generated weights (Fig 9)\n{about}"),
        plots.plot_division(found[2], f"Division of the generated weights' energy\n{about}"),
    )
    head = setting(options, config, prompts) | {"variant": hyperalign.header.schedule.variant}
    written: list[Path] = []
    for name, figures_of, figure in zip(WEIGHT_FILES, found, figures, strict=True):
        written += write(options.out / name, head | figures_of.as_json(), figure)
    return written


def names_of(hypernetworks: Sequence[Path]) -> list[str]:
    """Returns what files are called in a figure: their folders' names where two files have the same."""
    stems = [path.stem for path in hypernetworks]
    return stems if len({*stems}) == len(stems) else [path.resolve().parent.name for path in hypernetworks]


def analyse_diversity(options: Images, config: TrainConfig, accelerator: Accelerator) -> list[Path]:
    """Writes Figure 12; returns the files. Raises HyperAlignError."""
    prompts = chosen_prompts(options, config, diversity.LEAST_PROMPTS)
    device = accelerator.device
    name, embed = embedding_of(options, config, device)
    loads = [loaded(path, device) for path in options.hypernetworks]
    named = [("base", None), *zip(names_of(options.hypernetworks), loads, strict=True)]
    base, encoder = sampling_inputs(config, accelerator, prompts)
    methods = list[diversity.Diversity]()
    with (
        tqdm(total=len(named) * len(prompts) * options.seeds, unit="image") as bar,
        attention_kernels(config.run.attention_kernels, device),
    ):
        for method, hyperalign in named:
            methods.append(diversity.diversity_of(
                method, base, encoder, hyperalign, embed, prompts, seeds=options.seeds,
                steps=options.steps, guidance_scale=config.objective.guidance_scale, batch=options.batch,
                first_seed=options.seed, shown=options.shown, progress=bar.update,
            ))  # fmt: skip
    title = (
        f"Images of one prompt from {options.seeds} noises (Fig 12)\nbelow each name the prompt's diversity: "
        f"mean of 1 - cosine over pairs of images,\nin the embedding of {name}"
    )
    report = setting(options, config, prompts) | {"encoder": name, "methods": diversity.as_json(methods)}
    return write(options.out / "diversity", report, plots.plot_diversity(methods, prompts, title))


def analyse_conditioning(options: Conditioning, config: TrainConfig, accelerator: Accelerator) -> list[Path]:
    """Writes the shares and the gain; returns the files. Raises HyperAlignError."""
    prompts = chosen_prompts(options, config, least=2)
    hyperalign = loaded(options.hypernetwork, accelerator.device)
    conditioning.check_conditional(hyperalign)
    judge, strata = judge_of(config, prompts, accelerator.device)
    base, encoder = sampling_inputs(config, accelerator, prompts)
    sampler = Sampler(
        base, encoder, Adapter(base.backbone, hyperalign), options.steps, config.objective.guidance_scale
    )
    seeds = range(options.seed, options.seed + options.seeds)
    measured = conditioning.Setting(sampler, prompts, seeds, options.batch)
    with (
        tqdm(total=1 + len(CHANGES), unit="round") as bar,
        attention_kernels(config.run.attention_kernels, base.device),
    ):
        found = {
            "shares": conditioning.weight_shares(measured),
            "gain": conditioning.conditioning_gain(measured, judge, strata, bar.update),
        }
    head = setting(options, config, prompts) | {"variant": hyperalign.header.schedule.variant}
    title = f"{options.hypernetwork.stem}: own weights against changed ones, {len(prompts)} prompts"
    written = write(options.out / "conditioning", head | found, plots.plot_conditioning(found, title))
    print("\n".join(sentences({"conditioning": found})))
    if options.store:
        store_training(options.hypernetwork, {"conditioning": found})
        written += [options.hypernetwork, write_card(options.hypernetwork, read_header(options.hypernetwork))]
    return written


def judge_of(
    config: TrainConfig, prompts: list[str], device: torch.device
) -> tuple[conditioning.Judge, conditioning.Strata]:
    """Returns what scores images by figures that the recipe does not optimise. Raises HyperAlignError."""
    if config.model.base == "tiny":
        return judged([content_of(prompt) for prompt in prompts])
    return rewards_judge(load_rewards(config, device), config, device), {}


def embedding_of(options: Images, config: TrainConfig, device: torch.device) -> tuple[str, Embed]:
    """Returns what measures diversity with its name. Raises HyperAlignError."""
    folder = options.diversity_encoder or config.validation.diversity_encoder
    if folder != Path():
        return folder.name, load_encoder(
            folder, device, "--diversity-encoder" if options.diversity_encoder else KEY
        )
    name = unoptimised_reward(config)
    tokenizer = tokenizer_folder(config)
    reward = loading.load(name, config.data.rewards, device=device, tokenizer_folder=tokenizer)
    return name, reward.embed_images


def tokenizer_folder(config: TrainConfig) -> Path | None:
    """Returns the base model's tokenizer, which some rewards read too."""
    folder = config.model.path / "tokenizer"
    return folder if folder.is_dir() else None


def setting(options: AnyOptions, config: TrainConfig, prompts: list[str]) -> dict[str, Any]:
    """Returns what a report says of its making."""

    def plain(value: Any) -> Any:
        if isinstance(value, tuple):
            return [plain(item) for item in value]  # pyright: ignore[reportUnknownVariableType]
        return value.as_posix() if isinstance(value, Path) else value

    asked = {key: plain(value) for key, value in asdict(options).items()}
    return {"options": asked, "guidance_scale": config.objective.guidance_scale, "prompts": prompts}


def write(path: Path, report: dict[str, Any], figure: Any) -> list[Path]:
    """Writes a report and its figure, each whole or not at all. Raises HyperAlignError."""
    with cannot_write(path, DISK):
        write_text(path.with_suffix(".json"), json.dumps(report, indent=1, ensure_ascii=False) + "\n")
        plots.save(figure, path.with_suffix(".png"))
    return [path.with_suffix(".json"), path.with_suffix(".png")]


def analyse(options: AnyOptions) -> list[Path]:
    """Writes the figures and returns their files. Raises HyperAlignError."""
    config = one_padding(load_recipe(options.recipe))
    check_options(options)
    paths = options.hypernetworks if isinstance(options, Images) else (options.hypernetwork,)
    check_fits(paths, config)
    accelerator = Accelerator()
    if isinstance(options, Weights):
        return analyse_weights(options, config, accelerator)
    if isinstance(options, Images):
        return analyse_diversity(options, config, accelerator)
    return analyse_conditioning(options, config, accelerator)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options: Any = tyro.cli(Options, args=arguments, description=__doc__)  # pyright: ignore
    try:
        written = analyse(options)
    except HyperAlignError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except torch.cuda.OutOfMemoryError as error:
        print(
            f"error: the GPU's memory is full ({first_line(error)}) Lower --batch, now {options.batch}; if 1 "
            "is too many, lower model.resolution in the recipe.",
            file=sys.stderr,
        )
        return 1
    print("\n".join(f"Wrote {path}" for path in written))
    return 0


if __name__ == "__main__":
    sys.exit(main())
