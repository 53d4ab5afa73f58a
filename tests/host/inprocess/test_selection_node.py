"""Select by Reward: every kind of row follows, and an empty half ends what would follow it."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import pytest
import torch

SCORES = [0.2, 0.9, -0.1, 0.5]


@pytest.fixture
def select(pack: ModuleType) -> Any:
    """The node, called as the host does: every input in a list."""
    node = importlib.import_module(f"{pack.__name__}.nodes.selection").HyperAlignSelect

    def run(scores=SCORES, mode="top-k", k=1, threshold=0.0, images=None, **optional: Any) -> list[Any]:
        images = [torch.arange(4.0).view(4, 1, 1, 1).expand(4, 2, 2, 3)] if images is None else images
        return node.execute(images, scores, [mode], [k], [threshold], **optional).result

    return run


def blocked(output: Any) -> bool:
    from comfy_execution.graph_utils import ExecutionBlocker

    return isinstance(output[0] if isinstance(output, list) else output, ExecutionBlocker)


def test_all_rows_follow_the_images(select):
    latent = {
        "samples": torch.arange(4.0).view(4, 1, 1, 1), "noise_mask": torch.arange(4.0).view(4, 1, 1),
        "batch_index": [7, 8, 9, 10],
    }  # fmt: skip
    result = select(k=2, latents=[latent], masks=[torch.arange(4.0).view(4, 1, 1)], seeds=[11, 12, 13, 14])
    for half, expected in ((result[:6], [1, 3]), (result[6:], [0, 2])):
        images, latents, masks, indices, seeds, scores = half
        assert images[:, 0, 0, 0].tolist() == expected
        assert latents["samples"].flatten().tolist() == expected
        assert latents["noise_mask"].flatten().tolist() == expected
        assert latents["batch_index"] == [7 + index for index in expected]
        assert masks.flatten().tolist() == expected
        assert (indices, seeds) == (expected, [11 + index for index in expected])
        assert scores == [SCORES[index] for index in expected]


def test_a_mask_or_a_seed_alone_serves_all(select):
    result = select(mode="sort", masks=[torch.ones(1, 2, 2)], seeds=[5])
    assert result[2].shape == (4, 2, 2)
    assert result[4] == [5, 5, 5, 5]


def test_a_mask_of_an_inpainted_batch_serves_its_whole_batch(select):
    inpainted = [
        {
            "samples": torch.full((2, 4, 1, 1), float(place)),
            "noise_mask": torch.full((1, 1, 8, 8), float(place)),
        }
        for place in range(2)
    ]
    latents = select(mode="sort", latents=inpainted)[1]
    assert latents["samples"][:, 0, 0, 0].tolist() == [0, 1, 0, 1]
    assert latents["noise_mask"].shape == (4, 1, 8, 8)
    assert latents["noise_mask"][:, 0, 0, 0].tolist() == [0, 1, 0, 1]


def test_an_empty_half_blocks_what_follows(select):
    kept = select(mode="threshold", threshold=2.0)
    assert all(blocked(output) for output in kept[:6])
    assert kept[6].shape[0] == 4
    assert all(blocked(output) for output in select(mode="sort")[6:])


def test_what_was_not_connected_is_blocked(select):
    result = select(k=2)
    assert [blocked(output) for output in result[:6]] == [False, True, True, False, True, False]


def test_images_may_come_one_by_one(select):
    single = [torch.full((1, 2, 2, 3), float(index)) for index in range(4)]
    latents = [{"samples": torch.full((1, 4, 2, 2), float(index))} for index in range(4)]
    result = select(k=2, images=single, latents=latents)
    assert result[0][:, 0, 0, 0].tolist() == [1, 3]
    assert result[1]["samples"][:, 0, 0, 0].tolist() == [1, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scores": [1.0]}, "4 images and 1 scores"),
        ({"latents": [{"samples": torch.zeros(1, 4, 2, 2)}]}, "1 latents and 4 scores"),
        ({"seeds": [1, 2]}, "2 seeds and 4 scores"),
        ({"images": [torch.zeros(2, 2, 2, 3), torch.zeros(2, 3, 2, 3)]}, "different sizes"),
        ({"scores": [float("nan")] * 4}, "numbers only"),
    ],
)
def test_rows_that_do_not_belong_together_are_refused(select, options, message):
    with pytest.raises(Exception, match=message):
        select(**options)
