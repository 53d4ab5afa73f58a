"""The tiny evaluators as modules: shapes, gradients, decoding, errors. The build measures quality."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hyperalign.errors import HyperAlignError
from hyperalign.tiny import evaluators, weights
from hyperalign.tiny.evaluators import (
    TinyDetector,
    TinyReward,
    TinyStyleClassifier,
    TinyValidationReward,
    decode_centres,
)
from hyperalign.tiny.prompts import COLORS, NOUNS
from hyperalign.tiny.text_encoder import tokenize_batch

TOKENS = tokenize_batch(["a dog left of a cat", "an emoji of three red hearts"])
Rewards = type[TinyReward] | type[TinyValidationReward]


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


def images(count: int = 2) -> Tensor:
    return torch.rand(count, 3, 64, 64)


@pytest.mark.parametrize("kind", [TinyReward, TinyValidationReward])
def test_a_reward_scores_each_image_alone(kind: Rewards) -> None:
    reward, batch = kind().eval(), images()
    scores = reward(batch, TOKENS)
    alone = torch.cat([reward(batch[i : i + 1], TOKENS[i : i + 1]) for i in range(2)])
    assert scores.shape == (2,)
    assert torch.allclose(scores, alone, atol=1e-4)
    assert float(scores.detach().abs().max()) <= float(reward.scale().detach())


@pytest.mark.parametrize("kind", [TinyReward, TinyValidationReward])
def test_a_reward_has_a_gradient_at_every_pixel(kind: Rewards) -> None:
    batch = images().requires_grad_()
    kind()(batch, TOKENS).sum().backward()
    assert batch.grad is not None
    assert bool(batch.grad.isfinite().all())
    assert float((batch.grad == 0).float().mean()) < 0.01


@pytest.mark.parametrize("kind", [TinyReward, TinyValidationReward])
def test_a_reward_depends_on_positions(kind: Rewards) -> None:
    reward, images = kind().eval(), torch.ones(1, 3, 64, 64)
    images[:, :, 20:40, 4:24] = 0.0
    here, there = reward.embed_images(images), reward.embed_images(images.flip(-1))
    assert here.shape == (1, evaluators.EMBEDDING)
    assert not torch.allclose(here, there, atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (3, 64, 64), (1, 4, 64, 64)])
@pytest.mark.parametrize("kind", [TinyReward, TinyValidationReward])
def test_a_reward_refuses_other_shapes(kind: Rewards, shape: tuple[int, ...]) -> None:
    with pytest.raises(HyperAlignError, match="64, 64"):
        kind()(torch.zeros(shape), TOKENS[:1].expand(shape[0], -1))


def test_a_reward_refuses_unpaired_prompts() -> None:
    with pytest.raises(HyperAlignError, match="one row of 16 tokens per image"):
        TinyReward()(images(3), TOKENS)


def heat_with(*peaks: tuple[str, int, int, float]) -> Tensor:
    heat = torch.zeros(1, len(NOUNS), 16, 16)
    for noun, row, column, value in peaks:
        heat[0, NOUNS.index(noun), row, column] = value
    return heat


def test_decoding_names_colours_only_for_shapes() -> None:
    colors = torch.zeros(1, len(COLORS), 16, 16)
    colors[:, COLORS.index("green")] = 1.0
    (found,) = decode_centres(heat_with(("dog", 3, 2, 0.9), ("heart", 12, 12, 0.8)), colors, 0.5)
    assert [(d.noun, d.color) for d in found] == [("dog", None), ("heart", "green")]
    assert (found[0].x, found[0].y) == (10.0, 14.0)


def test_one_object_gives_one_detection() -> None:
    heat = heat_with(
        ("dog", 5, 5, 0.9), ("cat", 5, 5, 0.7), ("pig", 6, 7, 0.8), ("cat", 5, 9, 0.6), ("key", 0, 0, 0.3)
    )
    (found,) = decode_centres(heat, torch.zeros(1, len(COLORS), 16, 16), 0.5)
    assert [d.noun for d in found] == ["dog", "cat"], (
        "the pig is within 10 pixels, the key below the threshold"
    )
    assert [d.noun for d in decode_centres(heat, torch.zeros(1, 8, 16, 16), 0.2)[0]] == ["dog", "cat", "key"]


def test_detector_and_style_shapes() -> None:
    nouns, colors = TinyDetector()(images())
    assert nouns.shape == (2, len(NOUNS), 16, 16)
    assert colors.shape == (2, len(COLORS), 16, 16)
    assert len(TinyDetector().detect(images())) == 2
    chance = TinyStyleClassifier()(images())
    assert chance.shape == (2,)
    assert bool(((chance > 0) & (chance < 1)).all())


def test_weights_of_another_version_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(_: str) -> tuple[dict[str, Tensor], dict[str, object]]:
        return {"body.0.weight": torch.zeros(1)}, {}

    monkeypatch.setattr(evaluators, "load_part", other)
    with pytest.raises(HyperAlignError, match="do not fit this version"):
        evaluators.load_style_classifier()


@pytest.mark.skipif(not weights.part_path("style").is_file(), reason="the evaluators have not been built yet")
def test_the_committed_evaluators_load_frozen() -> None:
    loaded = (
        evaluators.load_reward(),
        evaluators.load_validation_reward(),
        evaluators.load_detector(),
        evaluators.load_style_classifier(),
    )
    assert all(not p.requires_grad for module in loaded for p in module.parameters())
    assert not any(module.training for module in loaded)
    assert 0.0 < float(loaded[2].threshold) < 1.0
