"""The properties of every reward: gradients, precision, inference mode, checkpointing, clear errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hyperalign.errors import HyperAlignError
from hyperalign.rewards import Reward, loading, tiny
from hyperalign.rewards.ensemble import Ensemble
from hyperalign.rewards.networks import set_checkpointing
from hyperalign.rewards.text import PromptCache

Load = Callable[..., Reward]
PROMPTS = ["a red heart", "a dog"]


@pytest.fixture
def load(published: Callable[[str], Path], tmp_path: Path) -> Load:
    def read(name: str, dtype: torch.dtype = torch.float32) -> Reward:
        return loading.load(name, tmp_path if name in tiny.NAMES else published(name), dtype=dtype)

    return read


every_reward = pytest.mark.parametrize("name", loading.NAMES)
published_reward = pytest.mark.parametrize("name", loading.PUBLISHED)


def gradient(reward: Reward, images: Tensor) -> tuple[Tensor, Tensor]:
    """Returns scores and the gradient of their sum."""
    images = images.clone().requires_grad_()
    scores = reward.score(images, PROMPTS)
    (grad,) = torch.autograd.grad(scores.sum(), images)
    return scores.detach(), grad


@every_reward
def test_the_gradient_is_that_of_finite_differences(name: str, load: Load) -> None:
    reward = load(name, torch.float64)
    # away from black and white, where the clamp's gradient is not the score's true derivative
    images = torch.rand(2, 3, 40, 56, dtype=torch.float64) * 0.4 + 0.3
    _, grad = gradient(reward, images)
    step = 1e-3 if name in tiny.NAMES else 1e-5  # the tiny rewards score in float32
    for pixel in [(0, 0, 20, 30), (1, 2, 5, 28), (1, 1, 39, 20)]:
        moved = torch.zeros_like(images)
        moved[pixel] = step
        high, low = (reward.score(images + sign * moved, PROMPTS).sum() for sign in (1, -1))
        expected = float(high - low) / (2 * step)
        tolerance = (1e-2 if name in tiny.NAMES else 1e-5) * float(grad.abs().max())
        assert float(grad[pixel]) == pytest.approx(expected, abs=tolerance)


@every_reward
def test_pixels_beyond_black_and_white_keep_the_gradient_that_leads_back(name: str, load: Load) -> None:
    reward = load(name)
    images = torch.rand(2, 3, 64, 64).round()
    inside = gradient(reward, images)
    beyond = gradient(reward, images * 3 - 1)
    assert torch.allclose(beyond[0], inside[0], atol=1e-5)
    leads_back = inside[1] * (images - 0.5) > 0  # descent darkens white pixels and lights black ones
    expected = torch.where(leads_back, inside[1], 0.0)
    assert torch.allclose(beyond[1], expected, atol=1e-5 * float(inside[1].abs().max()))
    assert 0.1 < float(leads_back.float().mean()) < 0.9


@every_reward
def test_half_precision_scores_in_float32_and_near_the_full_score(name: str, load: Load) -> None:
    images = torch.rand(2, 3, 70, 50)
    with torch.no_grad():
        full = load(name).score(images, PROMPTS)
        half = load(name, torch.bfloat16).score(images, PROMPTS)
    assert full.dtype == half.dtype == torch.float32
    assert torch.allclose(half, full, rtol=0.05, atol=0.05 * max(0.05, float(full.abs().max())))


@published_reward
def test_autocast_changes_nothing(name: str, load: Load) -> None:
    reward, images = load(name), torch.rand(2, 3, 40, 40)
    expected = reward.score(images, PROMPTS)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(load(name).score(images, PROMPTS), expected, rtol=1e-5)


@every_reward
def test_parameters_are_frozen_and_no_buffer_is_missing(name: str, load: Load) -> None:
    module = load(name).module
    assert not any(weight.requires_grad for weight in module.parameters())
    assert not any(tensor.is_meta for tensor in [*module.parameters(), *module.buffers()])


@every_reward
def test_embeddings_have_length_one_and_a_gradient(name: str, load: Load) -> None:
    images = torch.rand(2, 3, 40, 40, requires_grad=True)
    embeddings = load(name).embed_images(images)
    assert embeddings.shape[0] == 2
    assert torch.allclose(embeddings.norm(dim=1), torch.ones(2), atol=1e-5)
    embeddings.sum().backward()
    assert images.grad is not None
    assert float(images.grad.abs().sum()) > 0


@every_reward
def test_what_was_loaded_and_scored_in_inference_mode_still_gives_gradients(name: str, load: Load) -> None:
    """ComfyUI runs its nodes in inference mode; guidance steps out of it."""
    with torch.inference_mode():
        reward = load(name)
        reward.score(torch.rand(2, 3, 40, 40), PROMPTS)
    _, grad = gradient(reward, torch.rand(2, 3, 40, 40))
    assert float(grad.abs().sum()) > 0


@published_reward
def test_checkpointing_recomputes_the_layers_and_changes_nothing(name: str, load: Load) -> None:
    reward, images = load(name), torch.rand(2, 3, 40, 40)
    expected = gradient(reward, images)
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    names = (key for key, _ in reward.module.named_modules() if key.endswith("layers.0.mlp"))
    first = next(key for key in names if "text" not in key)
    reward.module.get_submodule(first).register_forward_pre_hook(count)
    set_checkpointing(reward.module, True)
    found = gradient(reward, images)
    assert calls == 2
    set_checkpointing(reward.module, False)
    gradient(reward, images)
    assert calls == 3
    assert torch.allclose(found[0], expected[0], rtol=1e-5)
    assert torch.allclose(found[1], expected[1], atol=1e-5 * float(expected[1].abs().max()))


@every_reward
@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "2 images and 0 prompts"),
        (["a dog"] * 3, "2 images and 3 prompts"),
        ("ab", "one string 'ab'; expected a list"),
        (["a dog", 5], "the prompt 5; expected text"),
        (
            ["a dog", "a \ud83d cat"],
            r"half a character \('\\ud83d'\) in the prompt 'a \\ud83d cat'",
        ),
    ],
)
def test_prompts_that_do_not_fit_are_refused(name: str, prompts: list[str], message: str, load: Load) -> None:
    with pytest.raises(HyperAlignError, match=message):
        load(name).score(torch.rand(2, 3, 8, 8), prompts)


@every_reward
def test_unusual_images_are_scored_or_refused_with_a_message(name: str, load: Load) -> None:
    reward = load(name)
    with torch.no_grad():
        for shape in [(1, 8, 8), (4, 8, 8), (3, 1, 1), (3, 1, 20_000), (3, 20_000, 2)]:
            assert bool(reward.score(torch.rand(2, *shape), PROMPTS).isfinite().all())
    with pytest.raises(HyperAlignError, match="NaN"):
        reward.score(torch.full((2, 3, 8, 8), float("nan")), PROMPTS)
    with pytest.raises(HyperAlignError, match="channels"):
        reward.embed_images(torch.rand(2, 8, 8, 3))


def test_a_prompt_is_encoded_once_and_the_oldest_is_dropped() -> None:
    asked: list[list[str]] = []

    def encode(prompts: list[str]) -> Tensor:
        asked.append(prompts)
        return torch.tensor([[float(len(prompt))] for prompt in prompts])

    cache = PromptCache(size=2)
    cpu = torch.device("cpu")
    assert cache.features(["a", "bb", "a"], encode, cpu).tolist() == [[1.0], [2.0], [1.0]]
    assert cache.features(["ccc", "a"], encode, cpu).tolist() == [[3.0], [1.0]]
    assert cache.features(["bb"], encode, cpu).tolist() == [[2.0]]
    assert asked == [["a", "bb"], ["ccc"], ["bb"]]


def test_more_prompts_than_the_cache_holds_are_all_scored() -> None:
    features = PromptCache(size=2).features(
        ["a", "b", "c", "d"], lambda prompts: torch.ones(len(prompts), 3), torch.device("cpu")
    )
    assert features.shape == (4, 3)


def test_an_ensemble_of_published_rewards_gives_gradients(load: Load) -> None:
    ensemble = Ensemble([(load("hpsv2.1"), 1.0), (load("imagereward"), 0.5), (load("aesthetic"), -0.1)])
    scores, grad = gradient(ensemble, torch.rand(2, 3, 40, 40))
    assert scores.shape == (2,)
    assert float(grad.abs().sum()) > 0
    assert ensemble.name == "hpsv2.1 + imagereward + aesthetic"
    assert torch.allclose(
        ensemble.embed_images(torch.rand(2, 3, 30, 30)).norm(dim=1), torch.ones(2), atol=1e-5
    )
