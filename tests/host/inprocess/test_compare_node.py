"""Compare: pairs of images with their scores in one."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import pytest
import torch

PROMPT = "a red heart"


@pytest.fixture
def compare(pack: ModuleType, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    import folder_paths

    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path))
    return importlib.import_module(f"{pack.__name__}.nodes.compare").HyperAlignCompare


@pytest.fixture(scope="module")
def reward(pack: ModuleType) -> Any:
    rewards = importlib.import_module(f"{pack.__name__}.hyperalign.hosts.comfy.rewards")
    return rewards.hosted(
        importlib.import_module(f"{pack.__name__}.hyperalign.rewards.tiny").load("tiny reward")
    )


def images(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 64, 96, 3, generator=torch.Generator().manual_seed(seed))


def test_the_gain_is_the_mean_difference_of_the_pairs(compare, reward):
    base, aligned = images(3), images(3, 1)
    _, gain, table = compare.execute(base, aligned, reward, PROMPT).result
    before, after = (reward.score(batch, [PROMPT] * 3) for batch in (base, aligned))
    assert gain == pytest.approx((sum(after) - sum(before)) / 3, abs=1e-4)
    wins = sum(second > first for first, second in zip(before, after, strict=True))
    assert f"aligned wins {wins} of 3" in table


def test_the_rows_can_be_named(compare, reward):
    base, aligned = images(2), images(2, 1)
    usual = compare.execute(base, aligned, reward, PROMPT).result
    named = compare.execute(base, aligned, reward, PROMPT, "strength 0.5", " strength 1 ").result
    bare = compare.execute(base, aligned, reward, PROMPT, "", "").result
    assert named[2].startswith("tiny reward: strength 1 wins")
    assert "strength 0.5  strength 1" in named[2].splitlines()[1]
    assert bare[2] == usual[2]
    assert not torch.equal(usual[0], named[0])
    assert not torch.equal(usual[0], bare[0])


@pytest.mark.parametrize(("count", "columns", "rows"), [(1, 1, 2), (3, 3, 2), (8, 8, 2), (11, 8, 4)])
def test_the_grid_has_both_images_of_every_seed(compare, reward, count, columns, rows):
    base, aligned = torch.zeros(count, 64, 96, 3), torch.full((count, 64, 96, 3), 0.5)
    image = compare.execute(base, aligned, reward, PROMPT).result[0][0]
    height, width = (128 + 14 + 8) * rows, (192 + 8) * columns  # enlarged twice, with badge and frame
    assert tuple(image.shape) == (height, width, 3)
    for row in range(rows):
        for column in range(columns):
            place = image[row * 150 + 4 : row * 150 + 132, column * 200 + 4 : column * 200 + 196]
            missing = (row // 2) * 8 + column >= count
            expected = 1.0 if missing else (128 / 255 if row % 2 else 0.0)
            assert float((place - expected).abs().max()) < 1e-6


@pytest.mark.parametrize("other", [torch.zeros(2, 64, 96, 3), torch.zeros(3, 32, 96, 3)])
def test_batches_that_are_no_pairs_are_refused(compare, reward, other):
    with pytest.raises(Exception, match="expected the same number of images of the same size"):
        compare.execute(images(3), other, reward, PROMPT)


def test_lines_are_one_prompt_and_a_list_is_one_for_each_pair(compare, reward):
    base, aligned, lines = images(2), images(2, 1), ["a red circle", "a blue heart"]
    text = "\n".join(lines)
    for given, prompts in (
        ((text,), [text] * 2),
        ((lines,), lines),
        ((text, "a", "b", "one per image"), lines),
    ):
        gain = compare.execute([base], [aligned], [reward], *given).result[1]
        before, after = reward.score(base, prompts), reward.score(aligned, prompts)
        assert gain == pytest.approx((sum(after) - sum(before)) / 2, abs=1e-4)
    halves = [base[:1], base[1:]], [aligned[:1], aligned[1:]]
    assert compare.execute(*halves, [reward], lines).result[1] == pytest.approx(gain, abs=1e-4)
    assert "lines is 'x'" in compare.validate_inputs(lines=["x"])
