"""What a person waits for besides sampling: loading, first steps, prompts, preprocessing, swapped models.

    python -m benchmarks.waits                         # a GPU: under a minute
    python -m benchmarks.waits --device cpu            # first steps at 128 px and half width

Hypernetworks and base models have their true shape and random weights; files were just written, so that they
are read from memory. Prints a table and writes benchmarks/results/waits_<device>.json. COMFYUI_PATH names
another ComfyUI than build/'s, whose model management and CLIP vocabulary are used.
"""

from __future__ import annotations

import gc
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.bases import FAMILIES, TRUE_BLOCKS, Name, Size, build, random_hyperalign, true_size
from benchmarks.comfy_sampling import enter_comfyui
from benchmarks.rounds import RESULTS, Run, environment, interleaved, save_json, slug, spread, timed
from hyperalign import checkpoint
from hyperalign.hosts.diffusers.adapter import spec_of
from hyperalign.hosts.diffusers.session import attach
from hyperalign.hypernetwork import HyperNetworkConfig
from hyperalign.rewards import loading
from hyperalign.rewards.images import check_images, network_pixels
from hyperalign.rewards.text import CLIP
from scripts.host_tree import comfyui_tree
from train.models.architectures import ModelSize, architecture

ROOT = Path(__file__).parents[1]
Section = Literal["load", "first step", "preprocessing", "prompt", "reward", "swap"]
Rows = dict[str, list[float]]
"""Milliseconds of every run by what was waited for."""
PROMPT = "a photograph of an astronaut riding a horse"
REWARD = "clip"
"""Its published file is a .safetensors in the layout of its network."""
REWARD_FILE = loading.PUBLISHED[REWARD].files[0]
PREPROCESSED = {"hpsv2.1, hpsv2": "hpsv2.1", "clip, pickscore, imagereward, aesthetic": "clip",
                "siglip-aesthetic": "siglip-aesthetic"}  # fmt: skip
"""The rewards that share a preprocessing, by one of them."""
PERCEPTION_BLOCKS = 4
FIRST = """
import sys, time
from pathlib import Path
import torch
from hyperalign import checkpoint
from hyperalign.rewards import loading
clock = time.process_time if sys.argv[1] == "cpu" else time.perf_counter
start = clock()
{}
print(1000 * (clock() - start))
"""


@dataclass(frozen=True, slots=True)
class Options:
    """Measures what a person waits for."""

    device: Literal["cuda", "cpu"] = "cuda" if torch.cuda.is_available() else "cpu"
    """Where models run; files are loaded by the CPU."""
    sections: tuple[Section, ...] = ("load", "first step", "preprocessing", "prompt", "reward", "swap")
    """What is measured; prompt, reward and swap need ComfyUI."""
    families: tuple[Name, ...] = ("sd15", "sdxl", "flux")
    """Whose hypernetworks are loaded."""
    pixels: int | None = None
    """Side of the image of the first steps: 512 on a GPU and 128 on a CPU if not given."""
    narrow: int | None = None
    """Divides the width of SD 1.5 in the first steps: 1 on a GPU and 2 on a CPU if not given."""
    images: tuple[int, ...] = (1, 8)
    """Images preprocessed at once."""
    sides: tuple[int, ...] = (512, 1024)
    """Their sides in pixels."""
    repeats: int = 5
    """Measured runs, mostly after one to warm up."""
    out: Path = RESULTS
    """Folder of the JSON file."""

    @property
    def torch_device(self) -> torch.device:
        """Where models run."""
        return torch.device(self.device)

    @property
    def base_size(self) -> Size:
        """The size of SD 1.5 in the first steps."""
        on_gpu = self.device == "cuda"
        pixels, narrow = self.pixels or (512 if on_gpu else 128), self.narrow or (1 if on_gpu else 2)
        return Size(pixels, true_size("sd15").text_tokens, 0, 0, narrow)

    @property
    def half(self) -> torch.dtype:
        """The type of weights in use."""
        return torch.float16 if self.device == "cuda" else torch.float32


def main(options: Options) -> dict[str, Any]:
    """Measures, prints the table and returns the figures. Raises ScriptError without ComfyUI."""
    measure = {
        "load": loads, "first step": first_steps, "preprocessing": preprocessing, "prompt": prompts,
        "reward": reward_files, "swap": swaps,
    }  # fmt: skip
    rows: Rows = {}
    setting = environment(options.torch_device, ("diffusers", "transformers", "safetensors"))
    written = asdict(options) | {"out": options.out.name, "reduced": options.base_size.reductions("sd15")}
    results: dict[str, Any] = {"setting": setting | written, "rows": {}}
    with tempfile.TemporaryDirectory() as folder:
        for section in measure:
            if section not in options.sections:
                continue
            rows |= measure[section](options, Path(folder))
            results["rows"] = {name: spread(values) for name, values in rows.items()}
            save_json(results, options.out / f"waits_{slug(options.torch_device)}.json")
            gc.collect()
    print(table(results))
    return results


def loads(options: Options, folder: Path) -> Rows:
    """Returns the time of loading hypernetworks, whole and in parts."""
    rows: Rows = {}
    for name in options.families:
        with torch.device("meta"):
            spec = spec_of(architecture(FAMILIES[name], ModelSize(*TRUE_BLOCKS[name], 1)))
        made = random_hyperalign(spec, "prefix", HyperNetworkConfig(), PERCEPTION_BLOCKS, torch.device("cpu"))
        path = folder / f"{name}.safetensors"
        checkpoint.save(path, made.network, made.header)
        size = f"load {name} ({len(made.header.targets)} layers, {path.stat().st_size / 1e6:.0f} MB)"
        rows[f"{size}, the first of a process"] = first(f"checkpoint.load(Path({str(path)!r}))", options)
        parts: dict[str, Run] = {
            size: partial(checkpoint.load, path),
            f"load {name}: header": partial(checkpoint.read_header, path),
            f"load {name}: modules": partial(checkpoint.sized_network, made.header),
        }
        rows |= interleaved(parts, options.torch_device, options.repeats)
    return rows


def first(statement: str, options: Options) -> list[float]:
    """Returns the milliseconds of a statement in processes that have imported PyTorch and nothing else."""
    command = [sys.executable, "-W", "ignore", "-c", FIRST.format(statement), options.device]
    runs = (
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        for _ in range(min(3, options.repeats))
    )
    return [float(done.stdout) for done in runs]


@torch.no_grad()
def first_steps(options: Options, folder: Path) -> Rows:
    """Returns the time of attaching SD 1.5 to a file, of the first forward after it and of a later one."""
    device = options.torch_device
    base = build("sd15", options.base_size, device, options.half)
    made = random_hyperalign(base.spec, "prefix", HyperNetworkConfig(), 0, torch.device("cpu"))
    path = folder / "attached.safetensors"
    checkpoint.save(path, made.network, made.header)
    call = base.call(base.noise, torch.tensor(0.5 * base.spec.last_timestep, device=device))
    rows: Rows = {"base forward": [], "attach": [], "first forward after attach": [], "later forward": []}
    for repeat in range(-1, options.repeats):  # the run before the first one also warms the base model up
        plain = partial(base.model, **call)
        plain()
        seconds = {"base forward": timed(plain, device)[0]}
        sessions: list[Any] = []

        def attached(into: list[Any] = sessions) -> None:
            into.append(attach(base.model, path, variant="S"))

        seconds["attach"] = timed(attached, device)[0]
        seconds["first forward after attach"] = timed(plain, device)[0]
        seconds["later forward"] = timed(plain, device)[0]
        sessions[0].detach()
        for name, taken in seconds.items() if repeat >= 0 else ():
            rows[name].append(1000 * taken)
    return rows


@torch.no_grad()
def preprocessing(options: Options, _folder: Path) -> Rows:
    """Returns the time from images, which a host has on the CPU, to the input of each reward's network.

    It covers the check of the values, `check` alone and its share in the whole.
    """
    device = options.torch_device
    network = nn.Linear(1, 1).to(device, options.half)  # tells device and type
    parts: dict[str, Run] = {}
    places = ["cpu"] if options.device == "cpu" else ["cpu", "cuda"]
    for count, side, place in itertools.product(options.images, options.sides, places):
        images_BCHW = torch.rand(count, side, side, 3, device=place).movedim(-1, 1)
        size = f"{count} x {side} px" + (f" from {place}" if len(places) > 1 else "")
        parts[f"check of values, {size}"] = partial(check_images, images_BCHW)
        for names, name in PREPROCESSED.items():
            parts[f"preprocessing of {names}, {size}"] = partial(_to_network, images_BCHW, network, name)
    return interleaved(parts, device, options.repeats)


def _to_network(images_BCHW: Tensor, network: nn.Module, name: str) -> None:
    check_images(images_BCHW)
    network_pixels(images_BCHW, network, loading.PUBLISHED[name].preprocess)


def prompts(options: Options, folder: Path) -> Rows:
    """Returns the time of building CLIP's tokenizer, of asking for it again, and of one prompt's tokens."""
    own = folder / "tokenizer"
    shutil.copytree(vocabulary(), own)
    versions = itertools.count(1)

    def built() -> None:
        version = next(versions)
        os.utime(own / CLIP.file_names[0], (version, version))
        CLIP.load(folder)

    parts: dict[str, Run] = {
        "tokenizer, built": built,
        "tokenizer, again": partial(CLIP.load, folder),
        "tokens of a prompt": partial(CLIP.load(vocabulary()), [PROMPT]),
    }
    return interleaved(parts, options.torch_device, options.repeats)


def reward_files(options: Options, folder: Path) -> Rows:
    """Returns the time of loading a reward's file, and of the check of its files before every run."""
    path = folder / REWARD_FILE.path
    path.parent.mkdir()
    network = loading.random_weights(REWARD, dtype=torch.float32).module.get_submodule(REWARD_FILE.part)
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, path)
    given: dict[str, Any] = {"tokenizer_folder": vocabulary()}
    load = partial(loading.load, REWARD, folder, device=options.torch_device, dtype=options.half, **given)
    parts: dict[str, Run] = {
        f"load {REWARD} ({path.stat().st_size / 1e6:.0f} MB)": load,
        f"check of {REWARD}'s files": partial(loading.check_files, REWARD, folder, **given),
    }
    rows = interleaved(parts, options.torch_device, options.repeats)
    imported = first(f"loading.random_weights({REWARD!r}, device='meta')", options)
    return rows | {f"{REWARD}'s network, the first of a process": imported}


def swaps(options: Options, _folder: Path) -> Rows:
    """Returns the time by which Best-of-N's model and reward take turns in ComfyUI.

    Where both fit the host only looks; where one has to leave it moves weights, on a GPU alone.
    """
    enter_comfyui(options.device)
    from comfy import model_management

    from hyperalign.hosts.comfy.model import network_patcher
    from hyperalign.hosts.comfy.rewards import hosted, load_models

    cpu, size = torch.device("cpu"), true_size("sd15")
    base = build("sd15", size, cpu, torch.float16)
    model = network_patcher(nn.Sequential(base.model))  # the host sets `device`, which diffusers forbids
    reward = hosted(loading.random_weights(REWARD, dtype=options.half))
    images_BHWC = torch.rand(1, size.pixels, size.pixels, 3)

    def to_model(alone: bool = False) -> None:
        if alone:
            model_management.unload_all_models()
        model_management.load_models_gpu([model])

    def to_reward(alone: bool = False) -> None:
        if alone:
            model_management.unload_all_models()
        load_models(reward.patchers)

    parts: dict[str, Run] = {
        "swap: SD 1.5, both loaded": to_model,
        f"swap: {REWARD}, both loaded": to_reward,
        f"score of an image by {REWARD}": partial(reward.score, images_BHWC, [PROMPT]),
    }
    rows = interleaved(parts, options.torch_device, options.repeats)
    if options.device == "cuda":
        alone: dict[str, Run] = {
            "swap: SD 1.5 for the other": partial(to_model, True),
            f"swap: {REWARD} for the other": partial(to_reward, True),
        }
        rows |= interleaved(alone, options.torch_device, options.repeats)
    model_management.unload_all_models()
    return rows


def vocabulary() -> Path:
    """Returns ComfyUI's folder of CLIP's vocabulary. Raises ScriptError without ComfyUI."""
    return comfyui_tree(Path(sys.executable)) / "comfy" / "sd1_tokenizer"


def table(results: Mapping[str, Any]) -> str:
    """Returns the figures as a Markdown table."""
    setting = results["setting"]
    lines = [f"{setting['device_name']}, {setting['clock']}, {setting['repeats']} runs", ""]
    if setting["reduced"] and "first step" in setting["sections"]:
        lines[0] += f"; forwards of SD 1.5 with {', '.join(setting['reduced'])}"
    lines += ["| wait | ms: median [min, max] |", "|---|---|"]
    for name, row in results["rows"].items():
        lines.append(f"| {name} | {row['median']:.3g} [{row['min']:.3g}, {row['max']:.3g}] |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(Options))
