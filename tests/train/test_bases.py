"""Base models behind one protocol: the conventions of diffusers' pipelines; checkpointing changes nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, FluxPipeline
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperalign.errors import HyperAlignError
from hyperalign.hosts.diffusers.adapter import Adapter
from hyperalign.hypernetwork import HyperNetworkConfig
from hyperalign.schedule import Schedule
from hyperalign.targets import PerceptionMode
from train.config import BaseName, ModelConfig, ObjectiveConfig, OptimConfig, TrainConfig
from train.data.random_inputs import TEXT_WIDTHS, RandomPromptEncoder
from train.models.architectures import (
    FULL_SIZES,
    ModelSize,
    architecture,
    autoencoder,
    descending_sizes,
    largest_within,
    parameter_count,
    with_random_weights,
)
from train.models.autoencoder import Autoencoder
from train.models.base import Base, Conditions, with_guidance
from train.models.flux import Flux, pack, position_ids, unpack
from train.models.image_encoder import image_encoder
from train.models.load import PIPELINES, check_folder, load_base, make_base
from train.models.text_encoders import text_fingerprint
from train.objective import NoisedImages, Rewards, noised_states, preference_loss, reward_loss
from train.start import new_hyperalign

NAMES: tuple[BaseName, ...] = ("sd15", "sdxl", "flux", "sd3")
SMALL = {
    "sd15": ModelSize(width_divisor=10),
    "sdxl": ModelSize(width_divisor=10),
    "flux": ModelSize(double_blocks=3, single_blocks=2, width_divisor=12),
    "sd3": ModelSize(double_blocks=4, width_divisor=12),
}
CPU = torch.device("cpu")


def config_of(name: BaseName, mode: PerceptionMode = "prefix") -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(base=name, resolution=64, mode=mode, perception_blocks=2),
        network=HyperNetworkConfig(layers=1, width=32, heads=4),
        objective=ObjectiveConfig(guidance_scale=3.0),
        optim=OptimConfig(bf16=False),
    )


def small_base(name: BaseName) -> Base:
    with torch.device("meta"):
        backbone = architecture(name, SMALL[name])
    decoder = AutoencoderTiny(
        latent_channels=autoencoder_channels(name), encoder_block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4, num_encoder_blocks=(1,) * 4, num_decoder_blocks=(1,) * 4,
    )  # fmt: skip
    decoder.eval().requires_grad_(False)
    backbone = with_random_weights(backbone, CPU, torch.float32)
    return make_base(config_of(name), backbone, Autoencoder(decoder), "epsilon")


def autoencoder_channels(name: BaseName) -> int:
    with torch.device("meta"):
        module: Any = autoencoder(name)
    return module.config.latent_channels


@pytest.fixture(scope="module", params=NAMES)
def base(request: pytest.FixtureRequest) -> tuple[BaseName, Base]:
    torch.manual_seed(0)
    return request.param, small_base(request.param)


def texts(name: BaseName, prompts: list[str]) -> Conditions:
    return RandomPromptEncoder(*TEXT_WIDTHS[name], (8,), CPU).conditions(prompts)


def losses(name: BaseName, base: Base, adapter: Adapter, schedule: Schedule) -> torch.Tensor:
    """Both losses of two images, as a training step adds them up."""
    generator = torch.Generator().manual_seed(1)
    x0, noise, other = torch.randn(3, 2, *base.latent_shape, generator=generator).unbind()
    prompts = ["a cat", "two trees"]
    uncond = texts(name, ["", ""]) if base.cfg else None
    t_B = base.noise_schedule.nearest(torch.tensor([0.5, 0.8]))
    cond = with_guidance(base, texts(name, prompts), 3.0)
    states = noised_states(base, schedule, NoisedImages(x0, noise, other, t_B, prompts), cond, uncond)
    bright = Rewards({"bright": lambda images, _: images.square().mean(dim=(1, 2, 3))}, {"bright": 1.0})
    reward, _ = reward_loss(adapter, base, bright, states, guidance_scale=3.0, cap=float("inf"))
    return reward + preference_loss(adapter, base, x0, noise, states)


@pytest.mark.parametrize("schedule", [Schedule("S"), Schedule("I")], ids=lambda s: s.variant)
@pytest.mark.parametrize("mode", ["prefix", "separate"])
def test_checkpointed_activations_give_the_same_gradient(
    base: tuple[BaseName, Base], mode: PerceptionMode, schedule: Schedule
) -> None:
    name, model = base
    torch.manual_seed(0)
    hyperalign = new_hyperalign(config_of(name, mode), model.backbone, schedule)
    for parameter in hyperalign.network.b_aux:
        torch.nn.init.normal_(parameter, std=0.02)
    adapter = Adapter(model.backbone, hyperalign)

    def gradients() -> list[torch.Tensor]:
        hyperalign.network.zero_grad()
        losses(name, model, adapter, schedule).backward()
        return [p.grad.clone() for p in hyperalign.network.parameters() if p.grad is not None]

    plain = gradients()
    backbone: Any = model.backbone
    adapter.checkpoint_activations()
    calls: list[int] = []
    last = backbone.get_submodule(hyperalign.header.targets[-1].name)
    handle = last.register_forward_hook(lambda *_: calls.append(1))
    try:
        saved = gradients()
    finally:
        handle.remove()
        backbone.disable_gradient_checkpointing()
    assert len(calls) == 4  # two forwards and the replay of each
    assert len(plain) == len(list(hyperalign.network.parameters()))
    for one, other in zip(plain, saved, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


@settings(deadline=None)
@given(rows=st.integers(1, 3), height=st.integers(1, 4), width=st.integers(1, 4), channels=st.integers(1, 4))
def test_packing_is_flux_pipelines_own_and_can_be_undone(
    rows: int, height: int, width: int, channels: int
) -> None:
    x = torch.randn(rows, channels, 2 * height, 2 * width)
    theirs = FluxPipeline._pack_latents(x, rows, channels, 2 * height, 2 * width)
    assert torch.equal(pack(x), theirs)
    assert torch.equal(unpack(theirs, (2 * height, 2 * width)), x)


def test_position_ids_are_flux_pipelines_own() -> None:
    theirs = FluxPipeline._prepare_latent_image_ids(1, 3, 5, CPU, torch.float32)
    assert torch.equal(position_ids(6, 10, CPU), theirs)


def test_schnell_has_neither_shift_nor_guidance() -> None:
    with torch.device("meta"):
        transformer = architecture("flux", SMALL["flux"])
    transformer.register_to_config(guidance_embeds=False)
    model = Flux(transformer, Autoencoder(AutoencoderTiny()), 64)
    assert model.noise_schedule.timesteps(4) == [1.0, 0.75, 0.5, 0.25]
    call = model.call(torch.zeros(1, 4, 8, 8), torch.ones(1), texts("flux", ["a cat"]))
    assert call["guidance"] is None


@pytest.mark.parametrize("name", NAMES)
def test_full_sizes_have_the_published_parameter_counts(name: BaseName) -> None:
    positions_of_sd3 = 384 * 384 * 1536  # in its file, but not learned
    published = {
        "sd15": 0.860e9,
        "sdxl": 2.567e9,
        "flux": 11.90e9,
        "sd3": 2.470e9 - positions_of_sd3,
    }
    assert parameter_count(name, FULL_SIZES[name]) == pytest.approx(published[name], rel=0.01)


@pytest.mark.parametrize("name", NAMES)
def test_smaller_sizes_shrink_until_they_fit(name: BaseName) -> None:
    sizes = [parameter_count(name, shape) for shape in descending_sizes(name)]
    assert sizes == sorted(sizes, reverse=True)
    assert largest_within(name, sizes[0]) == FULL_SIZES[name]
    assert parameter_count(name, largest_within(name, sizes[1])) == sizes[1]
    assert parameter_count(name, largest_within(name, 0)) == sizes[-1]


def saved(name: BaseName, folder: Path) -> TrainConfig:
    """Writes a small base model in diffusers' layout."""
    classes = PIPELINES[name]
    with torch.device("meta"):
        backbone: Any = architecture(name, SMALL[name])
    with_random_weights(backbone, CPU, torch.float32).save_pretrained(folder / classes.subfolder)  # pyright: ignore
    AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=autoencoder_channels(name),
    ).save_pretrained(folder / "vae")  # fmt: skip
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text('{"prediction_type": "v_prediction"}')
    config = config_of(name)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, path=folder))


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_in_diffusers_layout_is_read(tmp_path: Path, name: BaseName) -> None:
    config = saved(name, tmp_path)
    model = load_base(config, CPU)
    pixels = torch.rand(1, 3, 64, 64)
    latents = model.encode(pixels)
    assert tuple(latents.shape[1:]) == model.latent_shape
    assert model.decode(latents).shape == pixels.shape
    encoder = image_encoder(config, CPU)
    torch.testing.assert_close(encoder.encode(pixels), latents)
    assert encoder.resolution == 64
    if name in ("sd15", "sdxl"):
        assert getattr(model.noise_schedule, "prediction", "") == "v_prediction"


def test_a_missing_model_is_named_with_where_it_goes(tmp_path: Path) -> None:
    config = config_of("flux")
    model = dataclasses.replace(config.model, path=tmp_path, hub="black-forest-labs/FLUX.1-dev")
    with pytest.raises(
        HyperAlignError, match="transformer/config.json.*Put black-forest-labs/FLUX.1-dev.*--download"
    ):
        check_folder(dataclasses.replace(config, model=model))
    single = dataclasses.replace(config.model, path=tmp_path / "flux1-dev.safetensors")
    with pytest.raises(HyperAlignError, match="single file.*diffusers' layout"):
        check_folder(dataclasses.replace(config, model=single))


def test_a_damaged_model_is_named(tmp_path: Path) -> None:
    config = saved("sd15", tmp_path)
    next((tmp_path / "unet").glob("*.safetensors")).write_bytes(b"half")
    with pytest.raises(HyperAlignError, match="cannot be read"):
        load_base(config, CPU)


def test_other_text_encoders_have_another_fingerprint(tmp_path: Path) -> None:
    config = saved("sd15", tmp_path)
    before = text_fingerprint(config)
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "text_encoder" / "model.safetensors").write_bytes(b"weights")
    assert text_fingerprint(config) != before
