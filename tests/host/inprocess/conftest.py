"""ComfyUI imported into the test process, and a tiny model with random weights to try things on."""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor

from hyperalign.checkpoint import Header, save
from hyperalign.families.unet import TINY
from hyperalign.hypernetwork import HyperNetwork, HyperNetworkConfig
from hyperalign.schedule import Schedule
from hyperalign.targets import BaseSpec
from hyperalign.tiny.text_encoder import TinyTextEncoder
from hyperalign.tiny.weights import AUTOENCODER_CONFIG, UNET_CONFIG

ROOT = Path(__file__).resolve().parents[3]
sys.path.append(str(Path(__file__).parent))  # small_families.py
SCALING_FACTOR = 0.7


@pytest.fixture(scope="session", autouse=True)
def comfy(comfyui_path: Path) -> ModuleType:
    """The host's package; its tree goes first on the path, because `nodes` must be the host's."""
    sys.path.insert(0, str(comfyui_path))
    from comfy.cli_args import args

    args.cpu = not torch.cuda.is_available()

    return sys.modules["comfy"]


@pytest.fixture(scope="session")
def pack(comfy: ModuleType) -> ModuleType:
    """The pack, imported under a strange name as the host does it."""
    name = "custom_nodes_hyperalign_under_test"
    spec = importlib.util.spec_from_file_location(
        name, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Tiny:
    """The same random weights in diffusers' and in the host's classes."""

    unet: UNet2DConditionModel
    autoencoder: AutoencoderKL
    text_encoder: TinyTextEncoder
    model: Any
    clip: Any
    vae: Any

    def condition(self, text: str, **extra: object) -> list[Any]:
        """CONDITIONING of a prompt, as CLIP Text Encode makes it."""
        return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text), add_dict=extra)


@pytest.fixture(scope="session")
def tiny(comfy: ModuleType) -> Tiny:
    from hyperalign.hosts.comfy.tiny import build_clip, build_model, build_vae

    torch.manual_seed(0)
    unet = UNet2DConditionModel(**UNET_CONFIG).eval().requires_grad_(False)
    autoencoder = AutoencoderKL(**AUTOENCODER_CONFIG).eval().requires_grad_(False)
    text_encoder = TinyTextEncoder().eval().requires_grad_(False)
    with torch.inference_mode():
        model = build_model(unet.state_dict(), SCALING_FACTOR)
        clip, vae = build_clip(text_encoder.state_dict()), build_vae(autoencoder.state_dict())
    return Tiny(unet, autoencoder, text_encoder, model, clip, vae)


@pytest.fixture(scope="session")
def save_hyperalign() -> Callable[..., Path]:
    """Writes a hypernetwork whose B_aux is not zero, so that it changes images."""

    def write(
        path: Path,
        mode: str = "prefix",
        variant: str = "S",
        seed: int = 1,
        spec: BaseSpec = TINY,
        perception_blocks: int = 0,
        **config: Any,
    ) -> Path:
        torch.manual_seed(seed)
        targets = spec.targets(mode, perception_blocks)
        sizes = HyperNetworkConfig(**config)
        network = HyperNetwork(sizes, targets, spec.feature_channels, spec.text_channels)
        for b_aux in network.b_aux:
            torch.nn.init.normal_(b_aux, std=0.02)
        times = (0.8, 0.5) if variant == "P" else ()
        header = Header(
            spec.fingerprint(), mode, spec.feature_channels, spec.text_channels, targets, sizes,
            Schedule(variant, times), perception_blocks=perception_blocks,
        )  # fmt: skip
        save(path, network, header, dtype=torch.float32)
        return path

    return write


@pytest.fixture(scope="session")
def make_hyperalign(
    comfy: ModuleType, save_hyperalign: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Any]:
    from hyperalign.hosts.comfy.model import load

    def make(**options: Any) -> Any:
        return load(save_hyperalign(tmp_path_factory.mktemp("hyperalign") / "made.safetensors", **options))

    return make


@pytest.fixture(scope="session")
def sample(tiny: Tiny) -> Callable[..., Tensor]:
    """Samples with the host's own KSampler; returns latents (B, 4, 16, 16)."""
    import comfy.sample

    def run(
        model: Any,
        prompt: Any = "a red heart",
        negative: Any = "",
        steps: int = 4,
        cfg: float = 4.0,
        sampler: str = "euler",
        scheduler: str = "normal",
        noise: Tensor | None = None,
        callback: Callable[..., None] | None = None,
        **options: Any,
    ) -> Tensor:
        conditions = [tiny.condition(text) if isinstance(text, str) else text for text in (prompt, negative)]
        if noise is None:
            noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(7))
        with torch.inference_mode():
            return comfy.sample.sample(
                model, noise, steps, cfg, sampler, scheduler, *conditions, torch.zeros_like(noise),
                callback=callback, disable_pbar=True, seed=3, **options,
            )  # fmt: skip

    return run


@dataclass(frozen=True)
class Shallow:
    """A U-Net of few layers, which torch.compile traces in seconds, and guided sampling with it."""

    model: Any
    sample: Callable[[Any], Tensor]


@pytest.fixture(scope="session")
def shallow_unet(comfy: ModuleType) -> Callable[[BaseSpec], Shallow]:
    from small_families import euler_in_comfyui, unet_conditioning, unet_models

    def make(spec: Any) -> Shallow:
        torch.manual_seed(6)
        with torch.no_grad():
            _, model = unet_models(spec)
        positive, negative = unet_conditioning(spec), unet_conditioning(spec, seed=7)
        noise, sigmas = torch.randn(2, 4, 8, 8), (14.6, 3.0, 1.0, 0.4, 0.0)
        return Shallow(model, lambda model: euler_in_comfyui(model, noise, positive, sigmas, negative, 4.0))

    return make


@pytest.fixture
def runs(caplog: pytest.LogCaptureFixture) -> Callable[[], list[dict[str, str]]]:
    """The runs reported so far: [{"variant": "S", "targets": "42/42", ...}]."""
    caplog.set_level("INFO")

    def read() -> list[dict[str, str]]:
        lines = [m for m in caplog.messages if m.startswith("HyperAlign run: ")]
        return [dict(pair.split("=") for pair in line.split(": ")[1].split()) for line in lines]

    return read


@pytest.fixture(scope="module", params=["flux", "sd3"])
def family(comfy: ModuleType, request: pytest.FixtureRequest) -> tuple[Any, ...]:
    """A reduced transformer: dimensions, diffusers' model, the host's, and how to call the former."""
    from small_families import FAMILIES

    torch.manual_seed(3)
    spec, build, call, velocity = FAMILIES[request.param]
    with torch.no_grad():
        ours, theirs = build()
    return spec, ours.eval().requires_grad_(False), theirs, call, velocity


@pytest.fixture
def copied():
    """Copies a base model, with layers of its own as on another GPU; its configuration cannot be copied."""

    def copy_of(model):
        current, model.current_patcher = getattr(model, "current_patcher", None), None
        try:
            return copy.deepcopy(model, {id(model.model_config): model.model_config})
        finally:
            model.current_patcher = current

    return copy_of
