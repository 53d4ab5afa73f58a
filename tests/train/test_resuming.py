"""What a resumed run continues with: changed settings, measured key times, incomplete lines of the log."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from hyperalign.errors import HyperAlignError
from hyperalign.hypernetwork import HyperNetworkConfig
from train import relative_distance
from train.checkpoints import IGNORED, MAY_CHANGE, require_same_run, run_identity
from train.config import (
    DataConfig,
    ObjectiveConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
    ValidationConfig,
)
from train.inputs import load_inputs
from train.relative_distance import BATCH, distance_curve, measuring_batch
from train.trainer import Trainer

ROOT = Path(__file__).parents[2]
Runs = Callable[..., Trainer]


def config_of(out: Path) -> TrainConfig:
    return TrainConfig(
        network=HyperNetworkConfig(layers=1),
        objective=ObjectiveConfig(prompt_batch=2, rollout_steps=3, timesteps=1, preference_batch=4),
        optim=OptimConfig(steps=3, warmup_steps=1, lr=1e-3, bf16=False),
        data=DataConfig(scenes=16, cache=ROOT / "build" / "tiny"),
        validation=ValidationConfig(every=0),
        run=RunConfig(out=out, checkpoint_every=2),
    )


def changed(config: TrainConfig, name: str, value: Any) -> TrainConfig:
    """Returns the configuration with the setting of a dotted name changed."""
    section, key = name.split(".")
    return dataclasses.replace(
        config, **{section: dataclasses.replace(getattr(config, section), **{key: value})}
    )


@pytest.fixture
def run_of(small_run: Runs, tmp_path: Path) -> Runs:
    """Returns a run of three short steps; sections of settings change the recipe."""

    def trainer_of(objective: dict[str, Any] | None = None, **sections: dict[str, Any]) -> Trainer:
        short = {"prompt_batch": 2, "rollout_steps": 3, "timesteps": 1, "preference_batch": 4,
                 "reward_weight": 1.0}  # fmt: skip
        settings: dict[str, Any] = {
            "optim": {"steps": 3, "warmup_steps": 1, "lr": 1e-3}, "run": {"checkpoint_every": 2},
        }  # fmt: skip
        for section, changes in sections.items():
            settings[section] = settings.get(section, {}) | changes
        return small_run(tmp_path, objective=short | (objective or {}), **settings)

    return trainer_of


def interrupt(run: Trainer) -> None:
    """Ends a run in its second step."""

    def ends(row: dict[str, Any]) -> None:
        if row["step"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.fit(ends)


def steps(out: Path) -> list[int]:
    lines = (out / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["step"] for line in lines]


def test_a_run_goes_on_with_smaller_backward_passes(
    run_of: Runs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    interrupt(run_of())
    resumed = run_of(objective={"micro_batch": 1})
    assert resumed.step == 2
    assert "changed settings" not in caplog.text
    resumed.fit()
    assert steps(tmp_path) == [0, 1, 2]


def test_a_run_goes_on_with_what_a_failed_one_is_told_to_lower_and_says_so(
    run_of: Runs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    interrupt(run_of())
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue square\n", encoding="utf-8")
    resumed = run_of(
        model={"gradient_checkpointing": "none", "vae": "taesd"}, optim={"lr": 1e-4},
        objective={"conditional_only": True, "reward_weight": 0.5}, data={"prompts": prompts},
    )  # fmt: skip
    (found,) = [record.message for record in caplog.records if "changed settings" in record.message]
    for words in ("objective.conditional_only was False and is True", "model.vae was full and is taesd",
                  "optim.lr was 0.001 and is 0.0001", "objective.reward_weight was 1.0 and is 0.5",
                  f"data.prompts was none and is {prompts.as_posix()} (1 files, 27 bytes)"):  # fmt: skip
        assert words in found
    assert "checkpointing" not in found
    resumed.fit()
    assert steps(tmp_path) == [0, 1, 2]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.base", "sd15"), ("model.variant", "I"), ("model.resolution", 256),
        ("model.mode", "separate"), ("network.width", 64), ("objective.rewards", {"clip": 1.0}),
        ("objective.state", "noised"), ("run.seed", 1), ("objective.method", "srpo"),
        ("data.wordings", ("{}",)), ("data.families", ("colors",)),
    ],
)  # fmt: skip
def test_what_makes_another_run_is_refused_and_named(name: str, value: Any) -> None:
    config = config_of(Path("out"))
    found = name.removeprefix("run.")
    with pytest.raises(HyperAlignError, match=f"out holds a run of another recipe: {found} was .* and is "):
        require_same_run(json.dumps(run_identity(config)), changed(config, name, value))


def test_the_settings_of_the_runs_own_method_count_and_those_of_others_do_not() -> None:
    for method, name, value in (("dpo", "dpo.beta", 7.0), ("mix_grpo", "grpo.window", 2)):
        config = changed(config_of(Path("out")), "objective.method", method)
        saved = json.dumps(run_identity(config))
        with pytest.raises(HyperAlignError, match=rf"{name} was .* and is {value}"):
            require_same_run(saved, changed(config, name, value))
        assert require_same_run(saved, changed(config, "srpo.stride", 0.2)) == []


def test_other_images_in_the_same_folder_are_noticed(tmp_path: Path) -> None:
    config = changed(config_of(tmp_path), "data.preference", tmp_path)
    saved = json.dumps(run_identity(config))
    assert require_same_run(saved, config) == []
    (tmp_path / "shard-000000.safetensors").write_bytes(b"12345")
    (words,) = require_same_run(saved, config)
    assert words.startswith("data.preference was ")
    assert words.endswith("(1 files, 5 bytes)")


def test_what_a_checkpoint_does_not_record_counts_as_unchanged() -> None:
    config = config_of(Path("out"))
    names = run_identity(config)
    assert not names.keys() & IGNORED
    assert names.keys() >= MAY_CHANGE
    del names["objective.state"]
    names["objective.conditional_only"] = True
    changes = require_same_run(json.dumps(names), config)
    assert changes == ["objective.conditional_only was True and is False"]


def test_found_key_times_are_in_the_state_and_are_not_measured_again(
    run_of: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = {"variant": "P", "key_count": 1}
    with monkeypatch.context() as patch:
        patch.setattr(relative_distance, "base_key_times", lambda *_, **__: (0.4375,))
        interrupt(run_of(model=model))
        patch.setattr(relative_distance, "base_key_times", lambda *_, **__: 1 / 0)
        resumed = run_of(model=model)
    assert resumed.schedule.key_times == (0.4375,)
    assert resumed.hyperalign.header.schedule.key_times == (0.4375,)
    assert resumed.step == 2


def test_the_search_for_key_times_samples_no_more_at_once_than_the_backward_passes(
    run_of: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [measuring_batch(limit) for limit in (0, 1, 2, 999)] == [BATCH, 1, 2, BATCH]
    seen: list[int] = []
    rollout = relative_distance.rollout

    def watched(*given: Any, **named: Any) -> Any:
        seen.append(len(given[5]))
        return rollout(*given, **named)

    monkeypatch.setattr(relative_distance, "rollout", watched)
    run_inputs = load_inputs(config_of(tmp_path), Accelerator(cpu=True))
    parts = distance_curve(run_inputs, prompts=3, steps=4, guidance_scale=4.0, batch=2)
    assert seen == [2, 1]
    assert parts == pytest.approx(
        distance_curve(run_inputs, prompts=3, steps=4, guidance_scale=4.0), rel=1e-4
    )

    def limited(*_: Any, batch: int, **__: Any) -> tuple[float, ...]:
        seen.append(batch)
        return (0.5,)

    monkeypatch.setattr(relative_distance, "base_key_times", limited)
    run_of(model={"variant": "P", "key_count": 1}, objective={"micro_batch": 2})
    assert seen[-1] == 2


@pytest.mark.parametrize("rest", ['{"step": 1, "rew', "\0\0\0\0", "5", '{"loss": 1}', "\udcff"])
def test_a_line_that_was_not_written_whole_is_dropped(
    rest: str, run_of: Runs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    interrupt(run_of())
    log = tmp_path / "log.jsonl"
    first = log.read_text(encoding="utf-8").splitlines()[0]
    log.write_bytes((first + "\n" + rest).encode("utf-8", errors="surrogateescape"))
    run_of()
    assert steps(tmp_path) == [0]
    assert "1 broken lines are removed" in caplog.text
    assert torch.load(next((tmp_path / "checkpoints").iterdir()))["step"] == 2
