"""`--check` of a recipe for the embedded tiny model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from hyperalign.errors import HyperAlignError
from train.checkpoints import TrainingCheckpoints, run_identity
from train.config import DataConfig, RunConfig, TrainConfig
from train.preflight.check import check
from train.tiny.art import STYLES


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    """A recipe whose art is there already."""
    (tmp_path / "cache" / "art").mkdir(parents=True)
    for style in STYLES:
        (tmp_path / "cache" / "art" / f"{style}.json").write_text("{}", encoding="utf-8")
    return TrainConfig(data=DataConfig(cache=tmp_path / "cache"), run=RunConfig(out=tmp_path / "run"))


def test_what_is_not_estimated_is_said(config: TrainConfig) -> None:
    report = check(config)
    assert f"starts anew in {config.run.out}" in report
    assert "not estimated for the embedded tiny model: peak memory, speed" in report
    assert not config.run.out.exists()


def test_a_saved_state_is_gone_on_from_with_its_own_recipe_only(config: TrainConfig) -> None:
    state = {"step": 7, "identity": json.dumps(run_identity(config))}
    TrainingCheckpoints(config.run.out / "checkpoints", keep=1).save(state, 7)
    assert f"resumes from step 7 in {config.run.out}" in check(config)
    other = dataclasses.replace(config, optim=dataclasses.replace(config.optim, weight_decay=0.5))
    with pytest.raises(HyperAlignError, match="a run of another recipe"):
        check(other)


def test_a_checkpoint_that_cannot_be_read_is_reported_before_the_run(config: TrainConfig) -> None:
    states = TrainingCheckpoints(config.run.out / "checkpoints", keep=1)
    states.save({"step": 7, "identity": json.dumps(run_identity(config))}, 7)
    (path,) = states.folder.glob("step-*.pt")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(HyperAlignError, match="None of the 1 training checkpoints"):
        check(config)


def test_a_tracker_that_is_not_installed_is_reported_before_the_run(config: TrainConfig) -> None:
    wanted = dataclasses.replace(config, run=dataclasses.replace(config.run, trackers=("no_such_tracker",)))
    with pytest.raises(HyperAlignError, match="run.trackers names '?no_such_tracker"):
        check(wanted)
