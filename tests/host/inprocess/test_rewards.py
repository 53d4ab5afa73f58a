"""Rewards under the host's memory management, in its inference mode, with its own vocabulary."""

from __future__ import annotations

import importlib
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


def test_a_replaced_file_makes_the_host_load_the_reward_again(
    pack: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import folder_paths

    monkeypatch.setitem(folder_paths.folder_names_and_paths, "hyperalign_rewards", ([str(tmp_path)], set()))
    loader = importlib.import_module(f"{pack.__name__}.nodes.rewards").HyperAlignRewardLoader
    path = tmp_path / loading.PUBLISHED["aesthetic"].files[-1].path
    path.parent.mkdir(parents=True, exist_ok=True)
    for linked in ("aesthetic", None):
        path.unlink(missing_ok=True)
        found = [loader.fingerprint_inputs(reward=linked)]
        for content in (b"damaged", b"whole file"):
            path.write_bytes(content)
            found += [loader.fingerprint_inputs(reward=linked), loader.fingerprint_inputs(reward=linked)]
        assert found[1] == found[2] != found[0]
        assert found[3] == found[4] != found[2]
    assert loader.fingerprint_inputs(reward="clip") == loader.fingerprint_inputs(reward="tiny reward")


def test_the_host_s_vocabulary_gives_clip_s_tokens(comfy: ModuleType) -> None:
    import comfy.sd1_clip

    folder = Path(str(comfy.sd1_clip.__file__)).parent / "sd1_tokenizer"
    found = text.CLIP.load(folder)(PROMPTS)
    assert torch.equal(found, open_clip.get_tokenizer("ViT-H-14")(PROMPTS))
