"""What ends a run early, at any moment of a step or of a validation: nothing is counted by half or twice."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from in_processes import in_processes
from tiny_runs import curve, one_of_two_fails

from train.methods import hyperalign as losses
from train.trainer import Stopped, Trainer

OF_BASE = {"first number": 0.0}
Runs = Callable[..., Trainer]


def first_number(hyperalign: Any, _grid: Path, _is_last: bool) -> dict[str, Any]:
    """A validation."""
    if hyperalign is None:
        return OF_BASE
    return {"first number": float(next(hyperalign.network.parameters()).flatten()[0])}


@pytest.fixture
def run_of(small_run: Runs) -> Runs:
    """Returns a run of three short steps that validates after the second and the third."""

    def trainer_of(out: Path, *, checkpoint_every: int = 100, validate: Any = first_number) -> Trainer:
        run = small_run(
            out, optim={"steps": 3, "warmup_steps": 1}, validation={"every": 2},
            objective={"prompt_batch": 1, "rollout_steps": 2, "timesteps": 1},
            run={"checkpoint_every": checkpoint_every},
        )  # fmt: skip
        run.inputs = dataclasses.replace(run.inputs, validate=validate)
        return run

    return trainer_of


@pytest.fixture
def whole(run_of: Runs, tmp_path: Path) -> list[dict[str, Any]]:
    """The log of a run that nothing disturbed."""
    run_of(tmp_path / "whole").fit()
    return curve(tmp_path / "whole")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "run"


def newest(out: Path) -> dict[str, Any]:
    return torch.load(sorted((out / "checkpoints").iterdir())[-1])


def after(step: Any, happens: Callable[[], None]) -> Callable[..., Any]:
    """Returns an optimiser's step after which something happens."""

    def then(*given: Any, **named: Any) -> Any:
        step(*given, **named)
        happens()

    return then


def signals(*numbers: int) -> Callable[[], None]:
    def send() -> None:
        for number in numbers:
            os.kill(os.getpid(), number)

    return send


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize("kind", [KeyboardInterrupt, torch.cuda.OutOfMemoryError])
def test_an_end_inside_a_pass_saves_the_step_before(
    kind: type[BaseException],
    run_of: Runs,
    whole: list[dict[str, Any]],
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, loss = run_of(out), losses.preference_loss

    def ends(*given: Any) -> Any:
        if run.step == 1:
            raise kind
        return loss(*given)

    with monkeypatch.context() as patch, pytest.raises(kind):
        patch.setattr(losses, "preference_loss", ends)
        run.fit()
    state = newest(out)
    assert (state["step"], state["images_seen"]) == (1, run.config.objective.preference_batch)
    run_of(out).fit()
    assert curve(out) == whole
    assert newest(out)["images_seen"] == 3 * run.config.objective.preference_batch


def test_a_trainer_whose_pass_was_cut_off_goes_on_by_itself(
    run_of: Runs, whole: list[dict[str, Any]], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(out)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(losses, "preference_loss", lambda *_: 1 / 0)
        run.fit()
    run.fit()
    assert curve(out) == whole


def test_ctrl_c_in_the_middle_of_a_step_waits_for_its_end(
    run_of: Runs, whole: list[dict[str, Any]], out: Path
) -> None:
    run = run_of(out)
    run.optimiser.step = after(run.optimiser.step, signals(signal.SIGINT))
    with pytest.raises(Stopped):
        run.fit()
    assert newest(out)["step"] == 1
    run_of(out).fit()
    assert curve(out) == whole


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_after_a_request_ends_at_once_and_saves_no_half_step(
    first: int, run_of: Runs, whole: list[dict[str, Any]], out: Path
) -> None:
    run = run_of(out, checkpoint_every=1)
    step = run.optimiser.step
    twice = after(step, signals(first, signal.SIGINT))
    run.optimiser.step = lambda *given: (twice if run.step == 1 else step)(*given)
    with pytest.raises(KeyboardInterrupt):
        run.fit()
    assert newest(out)["step"] == 1
    run_of(out).fit()
    assert curve(out) == whole


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_request_cuts_a_validation_off_and_the_resumed_run_begins_with_it(
    number: int, run_of: Runs, whole: list[dict[str, Any]], out: Path
) -> None:
    def validate(hyperalign: Any, _grid: Path, _is_last: bool) -> dict[str, Any]:
        if hyperalign is None:
            return OF_BASE
        assert newest(out)["step"] == 2, "a validation starts only when the checkpoint is saved"
        os.kill(os.getpid(), number)
        raise AssertionError("the validation continued")

    with pytest.raises(Stopped):
        run_of(out, validate=validate).fit()
    assert [row["step"] for row in curve(out)] == [0]
    resumed = run_of(out)
    assert resumed.step == 2
    resumed.fit()
    assert curve(out) == whole


def test_after_a_request_no_validation_begins(run_of: Runs, whole: list[dict[str, Any]], out: Path) -> None:
    def validate(hyperalign: Any, _grid: Path, _is_last: bool) -> dict[str, Any]:
        if hyperalign is None:
            return OF_BASE
        raise AssertionError("a validation started")

    run = run_of(out, validate=validate)
    asked = after(run.optimiser.step, lambda: signals(signal.SIGTERM)() if run.step == 1 else None)
    run.optimiser.step = asked
    with pytest.raises(Stopped):
        run.fit()
    run_of(out).fit()
    assert curve(out) == whole


def test_a_process_that_fails_ends_the_others_which_save_what_is_done(out: Path, tmp_path: Path) -> None:
    other, broken = in_processes(2, tmp_path, one_of_two_fails, out)
    assert other.status != 0 != broken.status
    assert "this process is broken" in broken.errors
    assert "error: Another process failed in step 2 and reports the reason." in other.errors
    state = newest(out)
    assert (state["step"], state["images_seen"]) == (2, 8)
    # One process measures the key times, all have them.
    assert [path.name for path in out.glob("measured-*")] == ["measured-0"]
    own, others = ((out / f"times-{rank}").read_text(encoding="utf-8") for rank in (0, 1))
    assert own == others == str(tuple(state["key_times"]))
