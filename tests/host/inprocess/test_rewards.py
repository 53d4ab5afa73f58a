"""Rewards under the host's memory management, in its inference mode, with its own vocabulary."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import open_clip
import pytest
import torch

from hyperalign.rewards import Reward, loading, text

PROMPTS = ["a red heart", "a dog"]


@pytest.fixture(params=["tiny reward", "aesthetic"])
def reward(request: pytest.FixtureRequest) -> Reward:
    """The tiny one, and one of transformers' networks in its true size with random weights."""
    return loading.random_weights(request.param, dtype=torch.float32)


def test_scores_are_the_core_s_and_gradients_are_still_to_be_had(comfy: ModuleType, reward: Reward) -> None:
    from hyperalign.hosts.comfy.rewards import hosted

    images_BCHW = torch.rand(2, 3, 48, 64)
    with torch.inference_mode():
        scores = hosted(reward).score(images_BCHW.movedim(1, -1), PROMPTS)
    images_BCHW.requires_grad_()
    again = reward.score(images_BCHW, PROMPTS)
    assert scores == pytest.approx(again.tolist(), rel=1e-4)
    again.sum().backward()
    assert images_BCHW.grad is not None
    assert float(images_BCHW.grad.abs().sum()) > 0


def test_the_host_s_vocabulary_gives_clip_s_tokens(comfy: ModuleType) -> None:
    import comfy.sd1_clip

    folder = Path(str(comfy.sd1_clip.__file__)).parent / "sd1_tokenizer"
    found = text.CLIP.load(folder)(PROMPTS)
    assert torch.equal(found, open_clip.get_tokenizer("ViT-H-14")(PROMPTS))
