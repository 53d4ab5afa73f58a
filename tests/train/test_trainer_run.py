"""A run of the trainer on the small base: what it saves, when, and with what it resumes."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from torch import Tensor

from hyperalign import checkpoint
from hyperalign.card import card, card_path
from hyperalign.errors import HyperAlignError
from train.methods.settings import TABLES
from train.recipe import as_table
from train.sampling import sample
from train.trainer import Trainer

Runs = Callable[..., Any]
THREE: dict[str, Any] = {"steps": 3}
QUICK: dict[str, Any] = {"prompt_batch": 1, "rollout_steps": 2, "timesteps": 1}


@pytest.fixture
def small_run(small_run: Runs) -> Runs:
    """The steps of these runs are as short as they can be."""

    def trainer_of(*given: Any, objective: dict[str, Any] | None = None, **named: Any) -> Any:
        return small_run(*given, objective=QUICK | (objective or {}), **named)

    return trainer_of


class DivergesOnce:
    """A decoder whose first image of the second step is NaN."""

    def __init__(self, base: Any) -> None:
        self.base, self.run, self.decode = base, None, base.decode

    def __call__(self, latents_BCHW: Tensor) -> Tensor:
        images = self.decode(latents_BCHW)
        step: Any = self.run
        return images * float("nan") if step.step == 1 else images


def rows_of(out: Path) -> list[dict[str, Any]]:
    """Returns the log without what a clock decides."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [
        {name: value for name, value in row.items() if not name.startswith(("seconds", "images"))}
        for row in rows
    ]


def checkpoints_of(out: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("step-")) for path in (out / "checkpoints").glob("*.pt"))


def newest(out: Path) -> dict[str, Any]:
    return torch.load(sorted((out / "checkpoints").iterdir())[-1])


def weights(module: Any) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in module.parameters()])


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Two training checkpoints hold the same, bit for bit."""
    assert found.keys() == expected.keys()
    for part in ("network", "average"):
        assert all(torch.equal(found[part][key], value) for key, value in expected[part].items())
    moments, others = found["optimiser"]["state"], expected["optimiser"]["state"]
    assert all(torch.equal(moments[i][key], others[i][key]) for i in others for key in others[i])
    for name in expected.keys() - {"network", "average", "optimiser", "unlogged"}:
        assert found[name] == expected[name], name


# A new run


def test_the_seed_decides_a_new_network(small_run: Runs, tmp_path: Path) -> None:
    first = small_run(tmp_path / "a", off_zero=False)
    torch.rand(3)
    again = small_run(tmp_path / "b", off_zero=False)
    other = small_run(tmp_path / "c", off_zero=False, run={"seed": 1})
    assert torch.equal(weights(first.network), weights(again.network))
    assert not torch.equal(weights(first.network), weights(other.network))
    assert torch.equal(weights(first.average), weights(first.network))
    assert first.average is not first.network
    assert (first.step, first.images_seen, first.skipped) == (0, 0, 0)


def test_threads_are_set_where_the_recipe_names_them(small_run: Runs, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        small_run(tmp_path / "a")
        assert torch.get_num_threads() == 2
        small_run(tmp_path / "b", run={"threads": 1})
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("model", "recomputes"),
    [
        ({"base": "sd15"}, True), ({"base": "sd15", "gradient_checkpointing": "decoder"}, False),
        ({"base": "tiny"}, False),
    ],
    ids=str,
)  # fmt: skip
def test_a_real_backbone_recomputes_where_the_recipe_says(
    small_run: Runs, model: dict[str, Any], recomputes: bool
) -> None:
    assert small_run(model=model).base.backbone.is_gradient_checkpointing is recomputes


def test_without_an_accelerator_it_makes_its_own(small_run: Runs, tmp_path: Path) -> None:
    run = small_run(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    assert Trainer(run.config, run.inputs).device.type == run.accelerator.device.type


# Saving and validating


@pytest.mark.parametrize(
    ("every", "checkpoint_every", "validated", "saved"),
    [(2, 100, [2, 4, 5], [2, 4, 5]), (0, 2, [], [2, 4, 5]), (5, 3, [5], [3, 5]), (0, 100, [], [5])],
)
def test_when_a_run_is_validated_and_saved(
    small_run: Runs, tmp_path: Path, every: int, checkpoint_every: int, validated: list[int], saved: list[int]
) -> None:
    run = small_run(
        optim={"steps": 5}, validation={"every": every}, run={"checkpoint_every": checkpoint_every}
    )
    averages: list[float] = []
    rows: list[dict[str, Any]] = []

    def note(row: dict[str, Any]) -> None:
        rows.append(row)
        if "validation" in row:
            averages.append(float(run.average.b_aux[0].flatten()[0]))

    run.fit(note)
    seen = run.inputs.validate.seen
    assert [grid for _, _, grid in seen] == [tmp_path / "grids" / f"0000{step}.png" for step in validated]
    assert run.inputs.validate.last == [grid for _, _, grid in seen if grid.stem == "00005"]
    assert [first for first, _, _ in seen] == averages
    assert [row["step"] + 1 for row in rows if "validation" in row] == validated
    assert checkpoints_of(tmp_path) == saved
    if validated:
        assert rows[-1]["validation"] == {
            "letters": averages[-1],
            "more": {"count": len(seen)},
            "words": "none",
        }
        flat = {"letters": averages[-1], "more/count": float(len(seen))}
        assert newest(tmp_path)["metrics"] == flat
        assert checkpoint.load(run.path).header.training["metrics"] == flat


def test_the_finished_hypernetwork_says_how_it_was_made(small_run: Runs, tmp_path: Path) -> None:
    run = small_run(optim={"steps": 2, "weight_decay": 0.3})
    assert run.optimiser.defaults["weight_decay"] == 0.3
    run.fit()
    assert run.path == tmp_path / "hypernetwork.safetensors"
    loaded = checkpoint.load(run.path)
    assert torch.equal(weights(loaded.network), weights(run.average).half().float())
    assert not torch.equal(weights(loaded.network), weights(run.network).half().float())
    recipe = as_table(run.config, paths=False) | {"run": {"seed": 0}}
    recipe = {name: table for name, table in recipe.items() if name not in TABLES.values()}
    assert loaded.header.training == {
        "steps": 2, "reward": "letters", "preference_data": "EmojiScenes", "metrics": {}, "recipe": recipe,
    }  # fmt: skip
    names = [source.name for source in loaded.header.sources]
    assert names == ["embedded tiny model", "tiny preference reward", "EmojiScenes"]
    assert loaded.header.sources[1].weight == 2.0
    assert card_path(run.path).read_text(encoding="utf-8") == card(loaded.header, "hypernetwork")
    saved = newest(tmp_path)
    assert (saved["step"], saved["images_seen"], saved["skipped"], saved["processes"]) == (2, 6, 0, 1)
    assert (saved["metrics"], saved["unlogged"], saved["key_times"]) == ({}, {}, [])
    assert json.loads(saved["identity"])["optim.weight_decay"] == 0.3


class Tracker(GeneralTracker):
    """Keeps what it is told."""

    name = "kept"
    requires_logging_directory = False
    tracker = None

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, Any]]] = []
        self.finished = False

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        pass

    def log(self, values: dict[str, Any], step: int | None = None, **more: Any) -> None:
        self.rows.append((step, values))

    def finish(self) -> None:
        self.finished = True


def test_trackers_are_told_the_numbers_of_each_step_and_the_end(small_run: Runs) -> None:
    tracker = Tracker()
    accelerator = Accelerator(cpu=True, log_with=[tracker])
    accelerator.init_trackers("run")
    small_run(accelerator=accelerator, optim={"steps": 2}, validation={"every": 2}).fit()
    assert [step for step, _ in tracker.rows] == [0, 1]
    assert "validation/letters" in tracker.rows[1][1]
    assert all(isinstance(value, float) for _, row in tracker.rows for value in row.values())
    assert tracker.finished


# Resuming


class End(BaseException):
    """Ends a run in the middle."""


def ends_at(step: int) -> Callable[[dict[str, Any]], None]:
    def on_step(row: dict[str, Any]) -> None:
        if row["step"] == step:
            raise End

    return on_step


def test_a_run_resumes_exactly(small_run: Runs, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"optim": THREE, "objective": {"state": "mixed"}}
    small_run(tmp_path / "whole", **settings).fit()
    with pytest.raises(End):
        small_run(tmp_path / "parts", **settings).fit(ends_at(0))
    assert checkpoints_of(tmp_path / "parts") == [1]
    resumed = small_run(tmp_path / "parts", **settings)
    assert resumed.step == 1
    resumed.fit()
    assert rows_of(tmp_path / "parts") == rows_of(tmp_path / "whole")
    same(newest(tmp_path / "parts"), newest(tmp_path / "whole"))


def test_what_was_counted_is_resumed(small_run: Runs, tmp_path: Path) -> None:
    def nan(images: Tensor, prompts: Any) -> Tensor:
        return images.mean(dim=(1, 2, 3)) * float("nan")

    settings: dict[str, Any] = {"optim": THREE, "validation": {"every": 1}, "reward": nan}
    with pytest.raises(End):
        small_run(**settings).fit(ends_at(1))
    resumed = small_run(**settings)
    assert (resumed.step, resumed.skipped, resumed.images_seen) == (2, 2, 6)
    saved = resumed.export()
    assert checkpoint.load(saved).header.training["metrics"]["more/count"] == 2.0


def test_lines_of_steps_that_no_checkpoint_has_are_removed(small_run: Runs, tmp_path: Path) -> None:
    small_run(optim=THREE, run={"checkpoint_every": 1}).fit()
    whole = rows_of(tmp_path)
    (tmp_path / "checkpoints" / "step-000003.pt").unlink()
    resumed = small_run(optim=THREE, run={"checkpoint_every": 1})
    assert rows_of(tmp_path) == whole[:1]  # the checkpoint holds the line of its own last step
    resumed.fit()
    assert rows_of(tmp_path) == whole


@pytest.mark.parametrize("ended_at", [2, 3])
def test_a_run_that_ended_in_its_validation_begins_with_it(
    small_run: Runs, tmp_path: Path, ended_at: int
) -> None:
    settings: dict[str, Any] = {"optim": THREE, "validation": {"every": 2}}
    run = small_run(**settings)
    validate = run.inputs.validate

    class Broken(type(validate)):
        def __call__(self, *given: Any) -> Any:
            if run.step == ended_at:
                raise End
            return super().__call__(*given)

    validate.__class__ = Broken
    with pytest.raises(End):
        run.fit()
    assert [row["step"] for row in rows_of(tmp_path)] == list(range(ended_at - 1))
    assert newest(tmp_path)["unlogged"]["step"] == ended_at - 1
    resumed = small_run(**settings)
    resumed.fit()
    grids = [grid.stem for _, _, grid in resumed.inputs.validate.seen]
    assert grids == [f"0000{step}" for step in (2, 3) if step >= ended_at]
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert ["validation" in row for row in rows] == [False, True, True]


def test_a_run_that_is_cut_off_in_its_first_step_saves_its_start(small_run: Runs, tmp_path: Path) -> None:
    run = small_run(reward=lambda images, prompts: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.fit()
    assert checkpoints_of(tmp_path) == [0]
    assert newest(tmp_path)["images_seen"] == 0


def test_a_step_that_was_cut_off_inside_its_passes_is_taken_again_from_its_start(
    small_run: Runs, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"optim": THREE, "objective": {"state": "noised"}}
    small_run(tmp_path / "whole", **settings).fit()
    run = small_run(tmp_path / "parts", **settings)
    images = run.inputs.preference
    batch, calls = images.batch, iter(range(100))

    def broken(*given: Any) -> Any:
        if next(calls) == 3:  # the preference loss of the second step; the reward's gradient is there
            raise End
        return batch(*given)

    images.batch = broken
    with pytest.raises(End):
        run.fit()
    assert checkpoints_of(tmp_path / "parts") == [1]
    assert newest(tmp_path / "parts")["images_seen"] == 4
    run.fit()
    assert rows_of(tmp_path / "parts") == rows_of(tmp_path / "whole")
    same(newest(tmp_path / "parts"), newest(tmp_path / "whole"))


def test_a_torn_step_saves_nothing(small_run: Runs, tmp_path: Path) -> None:
    run = small_run(optim=THREE)

    def torn() -> None:
        raise End

    run.optimiser.step = torn
    with pytest.raises(End):
        run.fit()
    assert not (tmp_path / "checkpoints").exists()


def test_a_changed_recipe_is_told_and_another_one_is_refused(
    small_run: Runs, caplog: pytest.LogCaptureFixture
) -> None:
    small_run().fit()
    with caplog.at_level(logging.WARNING):
        small_run(optim={"lr": 0.5})
    assert "optim.lr was 0.01 and is 0.5" in caplog.text
    with pytest.raises(HyperAlignError, match="another recipe"):
        small_run(optim={"weight_decay": 0.5})


def test_an_image_that_is_not_finite_costs_its_step_and_is_counted(small_run: Runs, tmp_path: Path) -> None:
    run = small_run(optim=THREE)
    run.base.decode = diverging = DivergesOnce(run.base)
    diverging.run = run
    run.fit()
    rows = rows_of(tmp_path)
    assert [row["not_finite"] for row in rows] == [0.0, 1.0, 0.0]
    assert rows[-1]["skipped_in_all"] == sum(row["skipped"] for row in rows) <= 1
    assert checkpoint.load(run.path)


def test_a_validation_scores_an_image_that_is_not_finite_as_grey(small_run: Runs, make_base: Any) -> None:
    base = make_base(everywhere=False)
    decode = base.decode
    base.decode = lambda x: torch.cat([decode(x)[:1] * float("nan"), decode(x)[1:]])
    found = sample(base, base, None, ["a", "b"], seeds=(0, 1), steps=1, guidance_scale=1.0)
    assert found.not_finite == 0.25
    assert bool((found.images[0, 0] == 0.5).all())
    assert bool(found.images.isfinite().all())


def test_a_prompts_noise_is_that_of_its_place_in_the_whole_list(make_base: Any) -> None:
    base, prompts = make_base(everywhere=False), ["a", "b", "c", "d"]
    given: dict[str, Any] = {"seeds": (0, 1), "steps": 2, "guidance_scale": 2.0, "batch": 2}
    whole = sample(base, base, None, prompts, **given)
    part = sample(base, base, None, prompts[1::2], indices=range(1, 4, 2), **given)
    torch.testing.assert_close(part.images, whole.images[1::2], atol=1e-5, rtol=1e-5)
    assert (whole.images[1] - whole.images[0]).abs().max() > 1e-2
