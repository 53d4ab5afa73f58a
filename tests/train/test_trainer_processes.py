"""Two real processes train as one with twice the batch, and what one of them meets, both know."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor

from hyperalign.errors import HyperAlignError
from train.config import TrainConfig, ValidationConfig
from train.validation import reward_validation

Runs = Callable[..., Any]
ONE = {"prompt_batch": 2, "preference_batch": 4, "rollout_steps": 3, "timesteps": 1}
EACH = ONE | {"prompt_batch": 1, "preference_batch": 2}


def in_two_processes(job: Callable[[int], Any], folder: Path) -> list[Any]:
    """Returns what `job` returns in each of two processes that Accelerate joins, or the error's text."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_work, args=(job, rank, port, folder)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


def _work(job: Callable[[int], Any], rank: int, port: str, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    try:
        result = job(rank)
    except Exception:  # noqa: BLE001
        result = traceback.format_exc()
    torch.save(result, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def gradient_and_row(run: Any) -> tuple[Tensor, dict[str, Any], int]:
    """Takes a step; returns its gradient, its row and the images seen."""
    taken: list[Tensor] = []
    rows: list[dict[str, Any]] = []
    step = run.optimiser.step

    def then() -> None:
        taken.append(torch.cat([p.grad.flatten() for p in run.network.parameters()]))
        step()

    run.optimiser.step = then
    run.fit(rows.append)
    return taken[0], (rows or [{}])[0], run.images_seen


@pytest.mark.parametrize("state", ["rollout", "noised"])
def test_two_processes_train_as_one_with_twice_the_batch(small_run: Runs, tmp_path: Path, state: str) -> None:
    def job(rank: int) -> Any:
        accelerator = Accelerator(cpu=True)
        assert accelerator.num_processes == 2
        return gradient_and_row(
            small_run(tmp_path / f"out{rank}", accelerator=accelerator, objective=EACH | {"state": state})
        )

    (gradient, row, seen), (other_gradient, other_row, _) = in_two_processes(job, tmp_path)
    expected, whole, images = gradient_and_row(small_run(tmp_path / "one", objective=ONE | {"state": state}))
    assert torch.equal(gradient, other_gradient)
    assert (gradient - expected).norm() <= 1e-3 * expected.norm()
    for name in ("reward", "reward_loss", "tiny reward", "preference_loss", "grad_norm"):
        assert row[name] == pytest.approx(whole[name], rel=1e-3), name
    assert row["images_per_second"] * row["seconds"] == pytest.approx(6)
    assert row["grad_norm_reward"] != pytest.approx(whole["grad_norm_reward"], rel=1e-4)
    assert seen == images
    # The main process alone tells and writes.
    assert other_row == {}
    assert {path.name for path in (tmp_path / "out0").iterdir()} == {
        "checkpoints", "hypernetwork.md", "hypernetwork.safetensors", "log.jsonl",
    }  # fmt: skip
    assert list((tmp_path / "out1").iterdir()) == []
    assert torch.load(next((tmp_path / "out0" / "checkpoints").iterdir()))["processes"] == 2


class Brightness:
    """A reward that tells images and prompts apart."""

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return images.mean(dim=(1, 2, 3)) + torch.tensor([float(len(prompt)) for prompt in prompts])

    def embed_images(self, images: Tensor) -> Tensor:
        return images.flatten(1)


@pytest.mark.parametrize("count", [1, 5])
def test_two_processes_validate_every_prompt_once_with_the_figures_of_one(
    make_base: Any, tmp_path: Path, count: int
) -> None:
    base, prompts = make_base(everywhere=False), ["a", "bcd", "efghi", "jk", "lmnopqr"][:count]
    config = TrainConfig(validation=ValidationConfig(steps=2))
    rewards: Any = {"brightness": Brightness()}

    def job(rank: int) -> dict[str, Any]:
        grid = tmp_path / f"{rank}.png"
        found = reward_validation(config, base, base, rewards, prompts, Accelerator(cpu=True))(None, grid)
        return {name: value for name, value in found.items() if "seconds" not in name}

    expected = job(2)
    spread = expected.pop("spread")
    for found in in_two_processes(job, tmp_path):
        assert found.pop("spread") == pytest.approx(spread, rel=1e-4)
        assert found == pytest.approx(expected, rel=1e-4)
    assert expected["diversity"] > 0
    assert (tmp_path / "0.png").read_bytes()[:4] == b"\x89PNG"
    assert not (tmp_path / "1.png").exists()


def test_the_rewards_gradient_norm_is_of_a_process_own_half(small_run: Runs, tmp_path: Path) -> None:
    def job(rank: int) -> Any:
        accelerator, norms = Accelerator(cpu=True), list[float]()
        reduce = accelerator.reduce

        def noted(values: Tensor, **options: Any) -> Any:
            if values.numel() > 20:  # the gradient, not the metrics
                norms.append(float(values.norm()))
            return reduce(values, **options)

        accelerator.reduce = noted
        objective = EACH | {"preference_weight": 0.0}
        run = small_run(tmp_path / f"out{rank}", accelerator=accelerator, objective=objective)
        return gradient_and_row(run)[1], norms

    (row, own), (_, other) = in_two_processes(job, tmp_path)
    assert [row["grad_norm_reward"]] == pytest.approx(own, rel=1e-4)
    assert own != pytest.approx(other, rel=1e-3)


def test_a_process_that_fails_ends_the_others(small_run: Runs, tmp_path: Path) -> None:
    def job(rank: int) -> Any:
        def fails(images: Tensor, prompts: Any) -> Tensor:
            if rank == 1 and run.step == 1:
                raise ZeroDivisionError("this process is broken")
            return images.mean(dim=(1, 2, 3))

        run = small_run(
            tmp_path / f"out{rank}", accelerator=Accelerator(cpu=True), objective=EACH, reward=fails,
            optim={"steps": 3},
        )  # fmt: skip
        run.fit()

    first, second = in_two_processes(job, tmp_path)
    assert "this process is broken" in second
    assert f"{HyperAlignError.__name__}: Another process failed in step 1 and reports the reason." in first


def test_a_full_gpu_of_one_process_halves_the_backward_passes_of_both(
    small_run: Runs, tmp_path: Path
) -> None:
    def job(rank: int) -> Any:
        sizes: list[int] = []

        def full_once(images: Tensor, prompts: Any) -> Tensor:
            sizes.append(len(images))
            if rank == 1 and len(images) > 1:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
            return images.mean(dim=(1, 2, 3))

        run = small_run(
            tmp_path / f"out{rank}", accelerator=Accelerator(cpu=True), reward=full_once,
            objective=ONE | {"preference_batch": 2}, optim={"steps": 2},
        )  # fmt: skip
        run.fit()
        return sizes, run.step

    found = in_two_processes(job, tmp_path)
    assert all(isinstance(one, tuple) for one in found), found
    (first, steps), (second, other_steps) = found
    assert first == second == [2, 1, 1, 1, 1]
    assert steps == other_steps == 2


def test_a_process_that_is_asked_to_end_ends_the_others_after_the_step(
    small_run: Runs, tmp_path: Path
) -> None:
    def job(rank: int) -> Any:
        run = small_run(
            tmp_path / f"out{rank}", accelerator=Accelerator(cpu=True), objective=EACH, optim={"steps": 3}
        )
        step = run.optimiser.step

        def asked() -> None:
            step()
            if rank == 1:
                os.kill(os.getpid(), 15)

        run.optimiser.step = asked
        try:
            run.fit()
        finally:
            torch.save(run.step, tmp_path / f"step{rank}.pt")

    ends = in_two_processes(job, tmp_path)
    assert all("Stopped" in end for end in ends)
    assert [torch.load(tmp_path / f"step{rank}.pt") for rank in (0, 1)] == [1, 1]
