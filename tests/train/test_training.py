"""A few real steps on the embedded model: resume, interruption, every variant, load and sample."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from in_processes import in_processes, script
from PIL import Image, ImageDraw
from tiny_runs import curve, killed_in_a_save, small, trainer

from hyperalign import checkpoint
from hyperalign.card import card, card_path
from hyperalign.errors import HyperAlignError
from hyperalign.hosts.diffusers.tiny import load_tiny
from hyperalign.schedule import Variant
from hyperalign.targets import PerceptionMode
from hyperalign.tiny.prompts import COLORS
from train.data.streams import PreferenceShards
from train.models.tiny import Tiny
from train.objective import Rewards
from train.tiny.evaluate import sample_all
from train.trainer import Stopped, Trainer

ROOT = Path(__file__).parents[2]
Runs = Callable[..., Trainer]
FOUR_STEPS: dict[str, Any] = {"optim": {"steps": 4, "warmup_steps": 2}, "run": {"checkpoint_every": 2}}
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


def test_an_interrupted_run_continues_the_exact_loss_curve(tmp_path: Path) -> None:
    trainer(small(tmp_path / "whole")).fit()

    def interrupt(row: dict[str, Any]) -> None:
        if row["step"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer(small(tmp_path / "broken")).fit(interrupt)
    resumed = trainer(small(tmp_path / "broken"))
    assert resumed.step == 3
    resumed.fit()
    assert curve(tmp_path / "broken") == curve(tmp_path / "whole")
    whole, broken = (
        checkpoint.load(tmp_path / name / "hypernetwork.safetensors") for name in ("whole", "broken")
    )
    for key, value in whole.network.state_dict().items():
        assert torch.equal(value, broken.network.state_dict()[key]), key


def test_sigterm_saves_and_the_run_goes_on_from_there(small_run: Runs) -> None:
    handler = signal.getsignal(signal.SIGTERM)

    def preempt(row: dict[str, Any]) -> None:
        if row["step"] == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped):
        small_run(**FOUR_STEPS).fit(preempt)
    assert small_run(**FOUR_STEPS).step == 2
    assert signal.getsignal(signal.SIGTERM) is handler


def test_a_damaged_state_gives_way_to_the_one_before(small_run: Runs, tmp_path: Path, caplog: Any) -> None:
    small_run(**FOUR_STEPS).fit()
    newest = sorted((tmp_path / "checkpoints").iterdir())[-1]
    newest.write_bytes(newest.read_bytes()[:1000])
    assert small_run(**FOUR_STEPS).step == 2
    assert f"{newest.name} cannot be read" in caplog.text


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew(small_run: Runs, tmp_path: Path) -> None:
    small_run(**FOUR_STEPS).fit()
    for path in (tmp_path / "checkpoints").iterdir():
        path.write_bytes(b"")
    with pytest.raises(HyperAlignError, match="None of the 2 training checkpoints .* can be read"):
        small_run(**FOUR_STEPS)


def test_kill_9_in_the_middle_of_a_save_leaves_the_state_before(tmp_path: Path) -> None:
    out = tmp_path / "run"
    (killed,) = in_processes(1, tmp_path, killed_in_a_save, out)
    assert killed.status == -signal.SIGKILL, killed.errors[-2000:]
    checkpoints = out / "checkpoints"
    assert sorted(path.suffix for path in checkpoints.iterdir()) == [".partial", ".pt"]
    resumed = trainer(small(out))
    assert resumed.step == 2
    resumed.fit()
    assert {path.suffix for path in checkpoints.iterdir()} == {".pt"}
    assert len(curve(out)) == 4


def test_only_the_last_checkpoints_are_kept(small_run: Runs, tmp_path: Path) -> None:
    small_run(optim={"steps": 4}, run={"checkpoint_every": 1, "keep_checkpoints": 2}).fit()
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-000003.pt", "step-000004.pt"]


def test_a_step_that_is_not_finite_is_skipped_and_counted(small_run: Runs, tmp_path: Path) -> None:
    run = small_run(**FOUR_STEPS)
    scores = run.inputs.rewards.models["tiny reward"]

    def sometimes_nan(images: torch.Tensor, prompts: Any) -> torch.Tensor:
        return scores(images, prompts) * (float("nan") if run.step == 1 else 1.0)

    rewards = Rewards({"tiny reward": sometimes_nan}, {"tiny reward": 1.0})
    run.inputs = dataclasses.replace(run.inputs, rewards=rewards)
    run.fit()
    assert [row["skipped"] for row in curve(tmp_path)] == [False, True, False, False]
    assert curve(tmp_path)[-1]["skipped_in_all"] == 1
    for value in checkpoint.load(run.path).network.state_dict().values():
        assert torch.isfinite(value).all()


def test_a_run_that_stays_infinite_stops_and_says_what_to_lower(small_run: Runs) -> None:
    def nan(images: torch.Tensor, _: Any) -> torch.Tensor:
        return images.mean(dim=(1, 2, 3)) * float("nan")

    run = small_run(optim={"steps": 4, "bad_steps": 2}, reward=nan)
    with pytest.raises(HyperAlignError, match="not finite for 2 steps in a row.*Lower optim.lr"):
        run.fit()


def test_small_backward_passes_add_up_to_the_whole_batch(tmp_path: Path) -> None:
    def losses(micro_batch: int) -> list[dict[str, Any]]:
        config = small(tmp_path / str(micro_batch))
        objective = dataclasses.replace(config.objective, micro_batch=micro_batch)
        optim = dataclasses.replace(config.optim, lr=1e-4)
        trainer(dataclasses.replace(config, objective=objective, optim=optim)).fit()
        return curve(tmp_path / str(micro_batch))

    for whole, parts in zip(losses(0), losses(1), strict=True):
        assert parts == pytest.approx(whole, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("state", ["noised", "mixed"])
def test_the_reward_may_start_from_noised_images(tmp_path: Path, state: Any) -> None:
    config = small(tmp_path)
    trainer(dataclasses.replace(config, objective=dataclasses.replace(config.objective, state=state))).fit()
    assert all(row["grad_norm_reward"] > 0 for row in curve(tmp_path)[1:])


def test_a_run_folder_of_another_recipe_is_refused(small_run: Runs) -> None:
    small_run(optim={"steps": 1}).fit()
    with pytest.raises(HyperAlignError, match="another recipe"):
        small_run(**FOUR_STEPS, objective={"state": "noised"})


@pytest.mark.parametrize(("variant", "generations"), [("S", 4), ("P", 2), ("I", 1)])
def test_train_load_and_sample(tmp_path: Path, variant: Variant, generations: int) -> None:
    mode: PerceptionMode = "separate" if variant == "I" else "prefix"
    run = trainer(small(tmp_path, variant, mode))
    run.fit()
    loaded = checkpoint.load(run.path)
    assert loaded.header.training["steps"] == 4
    assert loaded.header.training["reward"].startswith("tiny preference reward")
    assert [source.name for source in loaded.header.sources] == [
        "embedded tiny model", "tiny preference reward", "EmojiScenes",
    ]  # fmt: skip
    assert card_path(run.path).read_text(encoding="utf-8") == card(loaded.header, "hypernetwork")
    base = Tiny(load_tiny())
    options: dict[str, Any] = {"seeds": (0,), "steps": 4, "guidance_scale": 4.0}
    aligned = sample_all(base, loaded, 2, **options)
    plain = sample_all(base, None, 2, **options)
    assert aligned.generations_per_run == generations
    assert (aligned.images - plain.images).abs().max() > 1e-4
    off = sample_all(base, loaded, 2, strength=0.0, **options)
    assert torch.equal(off.images, plain.images)


def test_a_run_in_bfloat16_writes_a_hypernetwork_that_moves_images(tmp_path: Path) -> None:
    config = small(tmp_path, "P", bf16=True)
    # Two steps of one image: processors without bfloat16 instructions convolve in it 70 times slower.
    one = dataclasses.replace(config.objective, prompt_batch=1, preference_batch=1)
    optim = dataclasses.replace(config.optim, steps=2, warmup_steps=0)
    run = trainer(dataclasses.replace(config, objective=one, optim=optim))
    run.fit()
    assert [row["grad_norm"] > 0 and not row["skipped"] for row in curve(tmp_path)] == [True, True]
    aligned, plain = (
        sample_all(Tiny(load_tiny()), network, 2, seeds=(0,), steps=4, guidance_scale=4.0)
        for network in (checkpoint.load(run.path), None)
    )
    assert (aligned.images - plain.images).abs().max() > 1e-4


def test_both_losses_reach_a_static_core(tmp_path: Path) -> None:
    trainer(small(tmp_path, conditioning="none")).fit()
    rows = curve(tmp_path)
    assert {"reward", "preference_loss"} <= rows[0].keys()
    assert rows[-1]["grad_norm"] > 0


def arguments(out: Path, prompts: int, preferred: int) -> list[str]:
    overrides = {
        "optim.steps": 3, "optim.warmup-steps": 1, "objective.prompt-batch": prompts,
        "objective.rollout-steps": 3, "objective.timesteps": 1, "objective.skip-first": 1,
        "objective.preference-batch": preferred,
        "data.scenes": 16, "validation.every": 0, "run.out": out, "run.checkpoint-every": 1,
        "model.statistics-prompts": 2,
    }  # fmt: skip
    flags = [text for key, value in overrides.items() for text in (f"--{key}", str(value))]
    return ["--recipe", "train/recipes/tiny_s.toml", "--optim.no-bf16", *flags]


def test_two_processes_train_as_one_with_twice_the_batch(tmp_path: Path) -> None:
    # `accelerate launch --cpu` starts one process whatever it is asked for; --multi_gpu starts them, the
    # variable keeps them on the CPU.
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines",
              "1", "--mixed_precision", "no", "--dynamo_backend", "no", "train/train.py"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *launch, *arguments(tmp_path / "two", 2, 4)],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (one,) = in_processes(1, tmp_path, script, "train/train.py", *arguments(tmp_path / "one", 4, 8))
    assert one.status == 0, one.errors[-2000:]
    for two, one in zip(curve(tmp_path / "two"), curve(tmp_path / "one"), strict=True):
        for name in ("grad_norm_reward", "grad_norm_preference"):  # of one process's own half
            assert two.pop(name) != one.pop(name)
        assert two == pytest.approx(one, rel=1e-4)
    states = [torch.load(tmp_path / name / "checkpoints" / "step-000003.pt") for name in ("two", "one")]
    assert [state["processes"] for state in states] == [2, 1]
    assert states[0]["images_seen"] == states[1]["images_seen"] == 24
    for key, value in states[0]["network"].items():
        # Adam's first steps are as long for the smallest gradients, rounding and all: 2e-3 with AVX2.
        assert (value - states[1]["network"][key]).norm() <= 5e-3 * value.norm()
    # Linear in the gradients, which no rounding lengthens; some parameters have a gradient of rounding alone.
    means = [
        torch.cat([moment["exp_avg"].flatten() for moment in state["optimiser"]["state"].values()])
        for state in states
    ]
    assert (means[0] - means[1]).norm() <= 1e-3 * means[0].norm()


def test_a_run_goes_on_with_another_number_of_processes_and_says_so(tmp_path: Path) -> None:
    given = arguments(tmp_path / "run", 2, 4)
    (one,) = in_processes(1, tmp_path, script, "train/train.py", *given)
    assert one.status == 0, one.errors[-2000:]
    (tmp_path / "run" / "checkpoints" / "step-000003.pt").unlink()
    two = in_processes(2, tmp_path, script, "train/train.py", *given)
    assert [process.status for process in two] == [0, 0], two
    assert "saved by 1 processes and the run continues with 2" in two[0].errors
    assert [row["step"] for row in curve(tmp_path / "run")] == [0, 1, 2]


def test_a_set_of_2000_images_goes_through_encoding_training_stop_and_resume(tmp_path: Path) -> None:
    draw_images(tmp_path / "images", 2000)
    (done,) = in_processes(
        1, tmp_path, script, "train/encode.py", "--recipe", "train/recipes/tiny_s.toml", "--source",
        str(tmp_path / "images"), "--out", str(tmp_path / "shards"), "--batch", "100",
    )  # fmt: skip
    assert done.status == 0, done.errors[-2000:]
    config = small(tmp_path / "run")
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, preference=tmp_path / "shards")
    )
    whole = dataclasses.replace(config, run=dataclasses.replace(config.run, out=tmp_path / "whole"))
    trainer(whole).fit()

    def interrupt(row: dict[str, Any]) -> None:
        if row["step"] == 1:
            raise KeyboardInterrupt

    run = trainer(config)
    assert isinstance(run.inputs.preference, PreferenceShards)
    assert len(run.inputs.preference.shards) == 2000
    with pytest.raises(KeyboardInterrupt):
        run.fit(interrupt)
    trainer(config).fit()
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")


def draw_images(folder: Path, count: int) -> None:
    folder.mkdir()
    for index in range(count):
        color, shape = COLORS[index % len(COLORS)], ("circle", "square")[index // len(COLORS) % 2]
        image = Image.new("RGB", (64, 64), "white")
        draw = ImageDraw.Draw(image)
        left = 4 + index % 24
        (draw.ellipse if shape == "circle" else draw.rectangle)([left, 20, left + 30, 50], fill=color)
        image.save(folder / f"{index:05d}.jpg")
        (folder / f"{index:05d}.txt").write_text(f"a {color} {shape}", encoding="utf-8")
