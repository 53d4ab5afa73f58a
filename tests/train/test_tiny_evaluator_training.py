"""Training of the tiny evaluators: the labels of pairs, and the losses."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("resvg_py", reason="the build extra is not installed")

from hyperalign.tiny.prompts import COLORS, NOUNS, PALETTES, SHAPES, Content, Group, caption, split_of
from train.tiny.art import SPRITE_SIZES, STYLES, Art
from train.tiny.augment import degrade, jitter
from train.tiny.evaluators import contrastive_loss, detection_loss, preference_loss
from train.tiny.pairs import (
    GROUP_IMAGES,
    GROUP_TEXTS,
    NO_COLOR,
    Captioned,
    PairBatch,
    centre_targets,
    sample_near_miss,
    sample_pairs,
    shows_exactly,
)
from train.tiny.scenes import Scene, sample_scene

GROUPS = 4


@pytest.fixture(scope="module")
def art() -> Art:
    looks = [(n, c) for n in NOUNS for c in (COLORS if n in SHAPES else (None,))]
    keys = [(style, n, c, size) for style in STYLES for n, c in looks for size in SPRITE_SIZES]
    return Art({key: np.ones((key[3], key[3], 4), np.float32) for key in keys})


@pytest.fixture(scope="module")
def batch(art: Art) -> PairBatch:
    return sample_pairs(random.Random(0), GROUPS, art, "train", 0.5)


def test_a_batch_matches_its_labels(batch: PairBatch) -> None:
    assert batch.images_NCHW.shape == (GROUPS * GROUP_IMAGES, 3, 64, 64)
    assert len(batch.tokens_TL) == GROUPS * GROUP_TEXTS
    assert not bool((batch.positive_NT & batch.negative_NT).any())
    assert batch.positive_NT.sum(dim=1).tolist() == [1] * len(batch.scenes)
    for group in range(GROUPS):
        preferred, rejected, first, second = batch.scenes[group * GROUP_IMAGES : (group + 1) * GROUP_IMAGES]
        assert preferred.style == "fluent"
        assert preferred.content == rejected.content
        assert not shows_exactly(preferred.content, first)
        assert not shows_exactly(preferred.content, second)


def test_a_near_miss_is_found_where_all_direct_ones_are_in_the_other_split() -> None:
    shapes = [Group(shape, color) for shape in SHAPES for color in COLORS]
    for seed, first in enumerate(shapes):
        for second in shapes:
            if first.noun == second.noun or first.color == second.color:
                continue
            prompt = Captioned(Content("color_attribution", (first, second)), "a drawing of {}")
            missed = sample_near_miss(random.Random(seed), prompt, "train")
            assert missed.content != prompt.content
            assert missed.text.endswith(caption(missed.words))
            assert split_of(missed.words) == "train"


def test_some_near_misses_have_the_same_words_in_another_wording() -> None:
    rng, prompt = random.Random(0), Captioned(Content("colors", (Group("heart", "red"),)), "{}")
    missed = [sample_near_miss(rng, prompt, None) for _ in range(200)]
    reworded = [one for one in missed if one.words == prompt.words]
    assert 40 < len(reworded) < 100, "half of them try, three of five wordings ask for another colour"
    assert {one.template for one in reworded} == set(PALETTES)
    assert all(one.content != prompt.content for one in missed)


def test_the_losses_fall_with_the_right_scores(batch: PairBatch) -> None:
    none = torch.zeros(batch.positive_NT.shape)
    right = batch.positive_NT.float() * 10.0
    assert (
        contrastive_loss(right, batch) < 0.1 < contrastive_loss(none, batch) < contrastive_loss(-right, batch)
    )
    preferred = none.clone()
    preferred[::GROUP_IMAGES] = 2.2
    assert preference_loss(preferred) < preference_loss(none) < preference_loss(-preferred)


def test_the_detection_loss_is_small_for_the_truth_and_skips_colours_of_things() -> None:
    rng = random.Random(1)
    scenes = [sample_scene(rng, Content("counting", (Group("dog", count=3),))) for _ in range(3)]
    heat, colors = centre_targets(scenes, 16)
    assert int((heat == 1.0).sum()) == 9
    assert bool((colors == NO_COLOR).all())
    scenes.append(sample_scene(rng, Content("colors", (Group("heart", "red"),))))
    heat, colors = centre_targets(scenes, 16)
    assert set(colors.unique().tolist()) == {NO_COLOR, COLORS.index("red")}
    blank = torch.zeros(4, len(NOUNS) + len(COLORS), 16, 16)
    knowing = blank.clone()
    knowing[:, : len(NOUNS)] = torch.where(heat == 1.0, 8.0, -8.0)
    assert detection_loss(knowing, scenes)["centres"] < 0.01 < detection_loss(blank, scenes)["centres"]


def test_image_noise_keeps_the_range_and_repeats_with_its_seed(batch: PairBatch) -> None:
    for noise in (jitter, degrade):
        first, again = (noise(batch.images_NCHW, torch.Generator().manual_seed(7)) for _ in range(2))
        assert torch.equal(first, again)
        assert float(first.min()) >= 0.0
        assert float(first.max()) <= 1.0
        assert not torch.equal(first, batch.images_NCHW)


def test_exactness_refuses_extras() -> None:
    scene: Scene = sample_scene(random.Random(2), Content("counting", (Group("dog", count=2),)))
    assert shows_exactly(scene.content, scene)
    assert not shows_exactly(Content("single_object", (Group("dog"),)), scene)
    assert not shows_exactly(replace(scene.content, groups=(Group("dog", count=3),)), scene)
