"""A full GPU halves the backward passes once, and the run computes the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

Runs = Callable[..., Any]
OBJECTIVE = {"prompt_batch": 2, "timesteps": 2, "rollout_steps": 4, "preference_batch": 4}
FULL = "CUDA out of memory."


def room_for(images_at_once: int) -> Callable[[Tensor, Any], Tensor]:
    """A reward that finds the memory full above a number of images."""

    def reward(images: Tensor, prompts: Any) -> Tensor:
        if len(images) > images_at_once:
            raise torch.cuda.OutOfMemoryError(FULL)
        return images.mean(dim=(1, 2, 3))

    return reward


def losses(folder: Path) -> list[list[float]]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [[row[name] for name in ("reward_loss", "preference_loss", "grad_norm")] for row in rows]


def test_a_full_gpu_halves_the_backward_passes_and_says_so(
    small_run: Runs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    steps = {"steps": 3}
    few = {"statistics_prompts": 2}  # one batch of them in both runs
    halved = small_run(tmp_path / "halved", reward=room_for(2), objective=OBJECTIVE, optim=steps, model=few)
    halved.fit()
    said = [message for message in caplog.messages if "memory was full" in message]
    assert len(said) == 1
    assert "in step 0" in said[0]
    assert "2 images in one backward pass instead of 4" in said[0]
    assert "objective.micro_batch = 2" in said[0]
    small_run(
        tmp_path / "lower", reward=room_for(2), objective=OBJECTIVE | {"micro_batch": 2}, optim=steps,
        model=few,
    ).fit()  # fmt: skip
    assert losses(tmp_path / "halved") == losses(tmp_path / "lower")
    assert halved.images_seen == 3 * OBJECTIVE["preference_batch"]


@pytest.mark.parametrize(("room", "micro_batch"), [(1, 0), (0, 1)], ids=["a second time", "below one image"])
def test_memory_that_stays_full_ends_the_run(
    small_run: Runs, tmp_path: Path, room: int, micro_batch: int
) -> None:
    run = small_run(
        tmp_path,
        reward=room_for(room),
        objective=OBJECTIVE | {"micro_batch": micro_batch},
        optim={"steps": 2},
    )
    with pytest.raises(torch.cuda.OutOfMemoryError, match=FULL):
        run.fit()
    assert run.step == 0
    assert list((tmp_path / "checkpoints").iterdir()), "the start is saved"


def test_another_failure_is_not_taken_for_full_memory(small_run: Runs, tmp_path: Path) -> None:
    def broken(images: Tensor, prompts: Any) -> Tensor:
        raise RuntimeError("a shape is wrong")

    run = small_run(tmp_path, reward=broken, objective=OBJECTIVE, optim={"steps": 2})
    with pytest.raises(RuntimeError, match="a shape is wrong"):
        run.fit()
