"""What ends a run early, at any moment of a step or of a validation: nothing is counted by half or twice."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from hyperalign.hypernetwork import HyperNetworkConfig
from train import trainer as loop
from train.config import DataConfig, ObjectiveConfig, OptimConfig, RunConfig, TrainConfig, ValidationConfig
from train.data.shards import ShardHeader, shard_path, write_shard
from train.inputs import load_inputs
from train.models.image_encoder import image_encoder
from train.trainer import Stopped, Trainer

ROOT = Path(__file__).parents[2]
OF_BASE = {"first number": 0.0}
OBJECTIVE = ObjectiveConfig(prompt_batch=2, rollout_steps=3, timesteps=1, preference_batch=4)


def config_of(out: Path, shards: Path, checkpoint_every: int = 100) -> TrainConfig:
    return TrainConfig(
        network=HyperNetworkConfig(layers=1),
        objective=OBJECTIVE,
        optim=OptimConfig(steps=3, warmup_steps=1, lr=1e-2, bf16=False),
        data=DataConfig(scenes=16, cache=ROOT / "build" / "tiny", preference=shards),
        validation=ValidationConfig(every=2),
        run=RunConfig(out=out, checkpoint_every=checkpoint_every),
    )


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    encoder = image_encoder(TrainConfig(), torch.device("cpu"))
    names = [str(index) for index in range(40)]
    header = ShardHeader(["a red circle"] * 40, names, encoder.fingerprint, encoder.resolution)
    latents = torch.randn(40, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    write_shard(shard_path(folder, 0), {(64, 64): latents}, header)
    return folder


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole")
    trainer(config_of(out, shards)).fit()
    return out


def trainer(config: TrainConfig, validate: Callable[..., dict[str, Any]] | None = None) -> Trainer:
    accelerator = Accelerator(cpu=True)
    found = load_inputs(config, accelerator)

    def metrics(hyperalign: Any, grid: Path) -> dict[str, Any]:
        if hyperalign is None:
            return OF_BASE
        return {"first number": float(next(hyperalign.network.parameters()).flatten()[0])}

    return Trainer(config, dataclasses.replace(found, validate=validate or metrics), accelerator)


def curve(out: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    timings = ("seconds", "seconds_left", "images_per_second")
    return [{key: value for key, value in row.items() if key not in timings} for row in rows]


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
    kind: type[BaseException], shards: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, loss = trainer(config_of(tmp_path, shards)), loop.preference_loss

    def ends(*given: Any) -> Any:
        if run.step == 1:
            raise kind
        return loss(*given)

    with monkeypatch.context() as patch, pytest.raises(kind):
        patch.setattr(loop, "preference_loss", ends)
        run.fit()
    state = newest(tmp_path)
    assert (state["step"], state["images_seen"]) == (1, OBJECTIVE.preference_batch)
    trainer(config_of(tmp_path, shards)).fit()
    assert curve(tmp_path) == curve(whole)
    assert newest(tmp_path)["images_seen"] == 3 * OBJECTIVE.preference_batch


def test_a_trainer_whose_pass_was_cut_off_goes_on_by_itself(
    shards: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(config_of(tmp_path, shards))
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(loop, "preference_loss", lambda *_: 1 / 0)
        run.fit()
    run.fit()
    assert curve(tmp_path) == curve(whole)


def test_ctrl_c_in_the_middle_of_a_step_waits_for_its_end(shards: Path, whole: Path, tmp_path: Path) -> None:
    run = trainer(config_of(tmp_path, shards))
    run.optimiser.step = after(run.optimiser.step, signals(signal.SIGINT))
    with pytest.raises(Stopped):
        run.fit()
    assert newest(tmp_path)["step"] == 1
    trainer(config_of(tmp_path, shards)).fit()
    assert curve(tmp_path) == curve(whole)


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_after_a_request_ends_at_once_and_saves_no_half_step(
    first: int, shards: Path, whole: Path, tmp_path: Path
) -> None:
    run = trainer(config_of(tmp_path, shards, checkpoint_every=1))
    step = run.optimiser.step
    twice = after(step, signals(first, signal.SIGINT))
    run.optimiser.step = lambda *given: (twice if run.step == 1 else step)(*given)
    with pytest.raises(KeyboardInterrupt):
        run.fit()
    assert newest(tmp_path)["step"] == 1
    trainer(config_of(tmp_path, shards)).fit()
    assert curve(tmp_path) == curve(whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_request_cuts_a_validation_off_and_the_resumed_run_begins_with_it(
    number: int, shards: Path, whole: Path, tmp_path: Path
) -> None:
    def validate(hyperalign: Any, _grid: Path) -> dict[str, Any]:
        if hyperalign is None:
            return OF_BASE
        assert newest(tmp_path)["step"] == 2, "a validation starts only when the checkpoint is saved"
        os.kill(os.getpid(), number)
        raise AssertionError("the validation continued")

    with pytest.raises(Stopped):
        trainer(config_of(tmp_path, shards), validate).fit()
    assert [row["step"] for row in curve(tmp_path)] == [0]
    resumed = trainer(config_of(tmp_path, shards))
    assert resumed.step == 2
    resumed.fit()
    assert curve(tmp_path) == curve(whole)


def test_after_a_request_no_validation_begins(shards: Path, whole: Path, tmp_path: Path) -> None:
    def validate(hyperalign: Any, _grid: Path) -> dict[str, Any]:
        if hyperalign is None:
            return OF_BASE
        raise AssertionError("a validation started")

    run = trainer(config_of(tmp_path, shards), validate)
    asked = after(run.optimiser.step, lambda: signals(signal.SIGTERM)() if run.step == 1 else None)
    run.optimiser.step = asked
    with pytest.raises(Stopped):
        run.fit()
    trainer(config_of(tmp_path, shards)).fit()
    assert curve(tmp_path) == curve(whole)


PROGRAM = """
import dataclasses, sys
from pathlib import Path
from accelerate import Accelerator
from train import relative_distance
from train import trainer as loop
from train.inputs import load_inputs
from train.recipe import load_recipe
from train.train import run

out = Path(sys.argv[1])
recipe = load_recipe(Path("train/recipes/tiny_p.toml"))
config = dataclasses.replace(
    recipe,
    model=dataclasses.replace(recipe.model, key_times=(), key_count=1),
    objective=dataclasses.replace(recipe.objective, prompt_batch=2, rollout_steps=3, timesteps=1,
                                  skip_first=1, preference_batch=2),
    optim=dataclasses.replace(recipe.optim, steps=9, bf16=False),
    data=dataclasses.replace(recipe.data, scenes=16),
    validation=dataclasses.replace(recipe.validation, every=0),
    run=dataclasses.replace(recipe.run, out=out, checkpoint_every=100),
)
accelerator = Accelerator()
search, loss = relative_distance.base_key_times, loop.preference_loss

def measured(*given, **named):
    (out / f"measured-{accelerator.process_index}").touch()
    return search(*given, **named | {"steps": 8, "prompts": 2})

def fails(*given):
    if trainer.step == 2 and accelerator.process_index == 1:
        raise RuntimeError("this process is broken")
    return loss(*given)

relative_distance.base_key_times, loop.preference_loss = measured, fails
out.mkdir(parents=True, exist_ok=True)
trainer = loop.Trainer(config, load_inputs(config, accelerator), accelerator)
(out / f"times-{accelerator.process_index}").write_text(str(trainer.schedule.key_times))
sys.exit(run(trainer))
"""


def test_a_process_that_fails_ends_the_others_which_save_what_is_done(tmp_path: Path) -> None:
    program, out = tmp_path / "program.py", tmp_path / "run"
    program.write_text(PROGRAM, encoding="utf-8")
    launch = (sys.executable, "-W", "ignore", "-m", "accelerate.commands.launch", "--multi_gpu",
              "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
              "--dynamo_backend", "no")  # fmt: skip
    paths = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*launch, str(program), str(out)], cwd=ROOT, env=os.environ | paths,
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "this process is broken" in done.stderr
    assert "error: Another process failed in step 2 and reports the reason." in done.stderr
    state = newest(out)
    assert (state["step"], state["images_seen"]) == (2, 8)
    # One process measures the key times, all have them.
    assert [path.name for path in out.glob("measured-*")] == ["measured-0"]
    own, other = ((out / f"times-{rank}").read_text(encoding="utf-8") for rank in (0, 1))
    assert own == other == str(tuple(state["key_times"]))
