"""The true architectures, on the meta device: every published tensor has its place and its shape."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import open_clip
import pytest
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from torch import Tensor, nn

from hyperalign.rewards import clip, image_reward, loading
from hyperalign.rewards.clip import ClipNetwork, ClipShape, from_open_clip
from hyperalign.rewards.image_reward import BlipShape, ImageRewardNetwork
from hyperalign.rewards.siglip_aesthetic import SiglipNetwork, SiglipShape


@pytest.fixture(autouse=True)
def small_architectures() -> None:
    """Overrides the reduction: here they have their true sizes."""


def shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state.items()}


def published_open_clip(name: str) -> CLIP:
    config = json.loads((Path(open_clip.__file__).parent / f"model_configs/{name}.json").read_text())
    quick = config.get("quick_gelu", False)
    with torch.device("meta"):
        return CLIP(
            config["embed_dim"],
            CLIPVisionCfg(**config["vision_cfg"]),
            CLIPTextCfg(**config["text_cfg"]),
            quick,
        )


@pytest.mark.parametrize(
    ("name", "shape"),
    [("ViT-H-14", clip.VIT_H_14), ("ViT-L-14-quickgelu", clip.VIT_L_14)],
)
def test_open_clip_tensors_fill_the_whole_network(name: str, shape: ClipShape) -> None:
    """HPS v2 is ViT-H-14; OpenAI's L/14 in open_clip's layout is a second, independent list of shapes."""
    with torch.device("meta"):
        network = ClipNetwork(shape)
    converted = from_open_clip(dict(published_open_clip(name).state_dict()))
    assert shapes(converted) == shapes(network.clip.state_dict())


def test_image_reward_s_tensors_fill_the_whole_network(official: ModuleType) -> None:
    published = official.image_reward_shapes(BlipShape())
    with torch.device("meta"):
        network = ImageRewardNetwork(BlipShape())
        converted = image_reward.from_official({key: torch.empty(shape) for key, shape in published.items()})
    assert shapes(converted) == shapes(network.state_dict())
    assert set(published) - set(converted) >= {"blip.vision_proj.weight", "blip.text_proj.weight"}


def test_siglip_has_the_published_size() -> None:
    with torch.device("meta"):
        network = SiglipNetwork(SiglipShape())
    assert sum(value.numel() for value in network.vision_model.state_dict().values()) == 428_225_600
    assert shapes(network.head.state_dict())["layers.8.weight"] == (1, 16)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("hpsv2.1", 986.1), ("pickscore", 986.1), ("clip", 427.6), ("imagereward", 446.2), ("aesthetic", 304.9)],
)
def test_parameters_are_as_many_as_published(name: str, millions: float) -> None:
    with torch.device("meta"):
        network: nn.Module = loading.PUBLISHED[name].network()
    assert sum(weight.numel() for weight in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)


def test_random_weights_have_the_true_architecture_and_a_gradient() -> None:
    reward = loading.random_weights("aesthetic")
    assert reward.module.clip.vision_model.embeddings.patch_embedding.weight.dtype == torch.bfloat16
    assert reward.module.head.layers["0"].weight.dtype == torch.float32
    reward.module.float()  # a processor that emulates bfloat16 takes minutes for 304 million weights
    images = torch.rand(1, 3, 60, 40, requires_grad=True)
    reward.score(images, ["a cat"]).sum().backward()
    assert images.grad is not None
    assert bool(images.grad.isfinite().all())
    assert float((images.grad == 0).float().mean()) < 0.5
