"""ComfyUI's own KSampler with Apply HyperAlign against the same MODEL without it.

    python -m benchmarks.comfy_sampling                                   # a GPU, 512 px, 50 steps
    python -m benchmarks.comfy_sampling --device cpu --pixels 64 --repeats 3

A Stable Diffusion 1.5 of true shape with random weights is generated to a file once and loaded by the host's
Load Diffusion Model: fp8 by that node's weight_dtype, fp16 and bf16 as the host's --fp16-unet and --bf16-unet
do it. Runs go through the stock KSampler node, interleaved with runs of the plain MODEL. Prints a table and
writes benchmarks/results/comfy_sampling_sd15_<device>.json. COMFYUI_PATH names another ComfyUI than build/'s.
"""

from __future__ import annotations

import gc
import importlib
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
import tyro
from safetensors.torch import save_file
from torch import nn

from benchmarks.bases import build, random_hyperalign, true_size
from benchmarks.rounds import RESULTS, Row, environment, figures, rounds, save_json, slug, table
from hyperalign.errors import HyperAlignError
from hyperalign.families.unet import SD15
from hyperalign.hosts.merging import Merging
from hyperalign.hypernetwork import HyperNetworkConfig
from scripts.host_tree import comfyui_tree

ROOT = Path(__file__).resolve().parents[1]
FILE = "random_sd15.safetensors"
TRUE_PIXELS = 512
CFG = 7.0
Weights = Literal["fp16", "bf16", "fp8_e4m3fn", "fp8_e5m2"]
RowName = Literal["I prefix", "P prefix", "S prefix", "S separate", "I separate", "P separate"]
HOST_CONFIG: dict[str, Any] = {
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
}
"""The host's words for Stable Diffusion 1.5's U-Net."""


@dataclass(frozen=True, slots=True)
class Options:
    """Measures Apply HyperAlign inside ComfyUI."""

    device: Literal["cuda", "cpu"] = "cuda" if torch.cuda.is_available() else "cpu"
    """Where the host samples."""
    weights: tuple[Weights, ...] = ("fp16", "bf16", "fp8_e4m3fn")
    """How the host keeps the base model's weights."""
    pixels: int = TRUE_PIXELS
    """Side of the image."""
    steps: int | None = None
    """Steps of a run: 50 on a GPU and 2 on a CPU if not given."""
    repeats: int = 5
    """Rounds for each kind of weights."""
    minutes: float = 8.0
    """For all of it; each kind of weights gets an even share, and one round at least."""
    rows: tuple[RowName, ...] = ("I prefix", "P prefix", "S prefix", "S separate")
    """What is measured beside the plain MODEL."""
    merging: Merging = "auto"
    """Whether the weights of a sample are merged or added."""
    network: HyperNetworkConfig = field(default_factory=HyperNetworkConfig)
    """The hypernetwork's sizes."""
    out: Path = RESULTS
    """Folder of the JSON file."""


def enter_comfyui(device: str) -> None:
    """Makes ComfyUI importable; its tree goes first on the path, because `nodes` must be the host's."""
    tree = comfyui_tree(Path(sys.executable))
    others = [path for path in sys.path if Path(path or ".").resolve() != ROOT]
    sys.path[:] = [str(tree), *others, str(ROOT)]
    from comfy.cli_args import args

    args.cpu = device == "cpu"


def host_nodes() -> Any:
    """Returns the host's module of stock nodes; type checkers take our package of that name for it."""
    return importlib.import_module("nodes")


def write_unet(path: Path) -> None:
    """Writes Stable Diffusion 1.5's U-Net in the original key layout, half precision, 1.7 GB."""
    import comfy.utils as utils

    names: Mapping[str, str] = utils.unet_to_diffusers(HOST_CONFIG)
    base = build("sd15", true_size("sd15"), torch.device("cpu"), torch.float16)
    state = {f"model.diffusion_model.{names[key]}": value for key, value in base.model.state_dict().items()}
    save_file(state, path)


@contextmanager
def loaded(folder: Path, weights: Weights) -> Iterator[Any]:
    """Yields the MODEL with its weights kept as asked, and frees it at the end."""
    import comfy.model_management as management
    import folder_paths
    from comfy.cli_args import args

    folder_paths.add_model_folder_path("diffusion_models", str(folder), is_default=True)
    before = args.fp16_unet, args.bf16_unet
    args.fp16_unet, args.bf16_unet = weights == "fp16", weights == "bf16"
    try:
        kept = weights if weights.startswith("fp8") else "default"
        yield host_nodes().UNETLoader().load_unet(FILE, kept)[0]
    finally:
        args.fp16_unet, args.bf16_unet = before
        management.unload_all_models()
        gc.collect()
        management.soft_empty_cache()


def patched(model: Any, options: Options) -> tuple[dict[str, Any], list[nn.Module]]:
    """Returns each row's MODEL and the hypernetworks."""
    import comfy.ops

    from hyperalign.hosts.comfy.model import apply, hosted

    networks = {
        mode: hosted(
            random_hyperalign(SD15, mode, options.network, 0, torch.device("cpu"), comfy.ops.manual_cast)
        )
        for mode in ("prefix", "separate")
    }
    split = {name: name.split() for name in options.rows}
    models = {
        name: apply(model, networks[mode], variant=cast(Any, variant), merging=options.merging)
        for name, (variant, mode) in split.items()
    }
    return models, [h.hyperalign.network for h in networks.values()]


def draw(model: Any, options: Options, steps: int) -> torch.Tensor:
    """Returns the latents of one run of the stock KSampler node."""
    generator = torch.Generator().manual_seed(0)
    positive, negative = ([[torch.randn(1, 77, 768, generator=generator), {}]] for _ in range(2))
    latent = {"samples": torch.zeros(1, 4, options.pixels // 8, options.pixels // 8)}
    with torch.inference_mode():
        arguments = (0, steps, CFG, "euler", "normal", positive, negative, latent)
        return host_nodes().KSampler().sample(model, *arguments)[0]["samples"]


def generations(model: Any, networks: list[nn.Module], options: Options, steps: int) -> int:
    """Returns how often a run generates weights, and warms the MODEL up."""
    calls: list[nn.Module] = []

    def count(network: nn.Module, _inputs: Any, _output: Any) -> None:
        calls.append(network)

    handles = [network.register_forward_hook(count) for network in networks]
    draw(model, options, steps)
    for handle in handles:
        handle.remove()
    draw(model, options, steps)  # as it runs where nobody counts
    return len(calls)


def measure(options: Options) -> dict[str, Any]:
    """Measures every kind of weights in turn; the file is written anew after every round.

    Raises HyperAlignError if a row's hypernetwork did nothing.
    """
    import comfy.utils
    import comfyui_version

    device = torch.device(options.device)
    steps = options.steps or (50 if device.type == "cuda" else 2)
    small = [f"{options.pixels} px instead of {TRUE_PIXELS}"] if options.pixels != TRUE_PIXELS else []
    results: dict[str, Any] = {
        "setting": {
            "model": "sd15", **environment(device, ()), "comfyui": comfyui_version.__version__,
            "pixels": options.pixels, "reduced": small, "steps": steps, "cfg": CFG, "sampler": "euler",
            "hypernetwork": asdict(options.network), "merging": options.merging,
            "allocator": torch.cuda.get_allocator_backend() if device.type == "cuda" else None,
        },
        "weights": {},
    }  # fmt: skip
    merging = "" if options.merging == "auto" else f"_{options.merging}"
    path = options.out / f"comfy_sampling_sd15_{slug(device)}{merging}.json"
    comfy.utils.set_progress_bar_enabled(False)
    with tempfile.TemporaryDirectory() as folder:
        write_unet(Path(folder) / FILE)
        for weights in options.weights:
            deadline = time.monotonic() + 60 * options.minutes / len(options.weights)
            with loaded(Path(folder), weights) as model:
                measure_model(model, weights, options, steps, deadline, results, path)
    return results


def measure_model(
    model: Any,
    weights: str,
    options: Options,
    steps: int,
    deadline: float,
    results: dict[str, Any],
    path: Path,
) -> None:
    """Fills in the figures of one kind of weights."""
    models, networks = patched(model, options)
    draw(model, options, steps)
    written = {name: generations(row, networks, options, steps) for name, row in models.items()}
    if idle := [name for name, count in written.items() if not count]:
        raise HyperAlignError(f"{', '.join(idle)} wrote no weights; update HyperAlign or ComfyUI.")
    inner = model.model
    found = {"weights": str(inner.get_dtype()), "compute": str(inner.manual_cast_dtype or inner.get_dtype())}

    def report(rows: dict[str, Row], plain: Row) -> None:
        measured = {name: figures(row, steps) for name, row in {"base": plain, **rows}.items()}
        for name, row in measured.items():
            row["generations"] = written.get(name, 0)
        repeats = len(next(iter(rows.values())).seconds) if rows else 0
        results["weights"][weights] = {"dtypes": found, "repeats": repeats, "rows": measured}
        save_json(results, path)

    runs = {name: partial(draw, row, options, steps) for name, row in models.items()}
    device = torch.device(options.device)
    rounds(partial(draw, model, options, steps), runs, device, options.repeats, deadline, report)


def main(options: Options) -> dict[str, Any]:
    """Measures, prints one table for each kind of weights and returns the figures."""
    results = measure(options)
    s = results["setting"]
    reduced = "reduced: " + ", ".join(s["reduced"]) if s["reduced"] else "true size"
    for weights, found in results["weights"].items():
        title = (
            f"sd15 in ComfyUI {s['comfyui']}, {s['pixels']} px, CFG, {s['steps']} steps, {found['repeats']} "
            f"rounds, weights {weights} ({found['dtypes']['compute']} at work), {s['device_name']}, "
            f"torch {s['versions']['torch']}; {reduced}"
        )
        print(table(title, found["rows"]) + "\n")
    return results


if __name__ == "__main__":
    chosen = tyro.cli(Options)
    enter_comfyui(chosen.device)
    main(chosen)
