"""The hypernetworks of a run: the base model's figures, the best, what is kept, and where it began."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hyperalign import checkpoint
from hyperalign.card import card_path
from hyperalign.errors import HyperAlignError
from hyperalign.families.unet import TINY
from train import export
from train.config import ModelConfig, ObjectiveConfig, OptimConfig, TrainConfig, ValidationConfig
from train.preflight.input_checks import check_start
from train.recipe import load_recipe
from train.results import deciding_rewards, gain_over_base
from train.train import outcome

Runs = Callable[..., Any]
ROOT = Path(__file__).parents[2]
QUICK: dict[str, Any] = {"prompt_batch": 1, "rollout_steps": 2, "timesteps": 1}
SHARES = {"same": 0.99, "prompt": 0.004, "time": 0.006, "interaction": 0.0}
GAIN = {"averaged": {"validation_reward": {"gain": 0.5, "low": 0.25, "high": 0.75}}}
BASE = {"validation_reward": 1.0, "spread": {"validation_reward": 2.0}}


class Figures:
    """A validation with given figures, in the order of the calls; the base model's are `BASE`."""

    def __init__(self, values: Sequence[float]) -> None:
        self.values, self.asked = iter(values), list[str]()

    def __call__(self, hyperalign: Any, grid: Path, is_last: bool = False) -> dict[str, Any]:
        self.asked.append("base" if hyperalign is None else grid.stem)
        if hyperalign is None:
            return dict(BASE)
        conditioning = {"shares": SHARES} | ({"gain": GAIN} if is_last else {})
        return {"validation_reward": next(self.values), "conditioning": conditioning}


@pytest.fixture
def validated(small_run: Runs) -> Runs:
    """Returns a run of as many steps as there are figures, each of them validated."""

    def trainer_of(*values: float, steps: int = 0, **sections: Any) -> Any:
        run = small_run(
            objective=QUICK, optim={"steps": steps or len(values)},
            validation={"every": 1} | sections.pop("validation", {}), **sections,
        )  # fmt: skip
        run.inputs = dataclasses.replace(run.inputs, validate=Figures(values))
        return run

    return trainer_of


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def files_of(out: Path) -> list[str]:
    return sorted(path.stem for path in out.glob("*.safetensors"))


def weights(module: Any) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in module.parameters()])


# The base model first


def test_the_base_model_is_validated_once_before_the_first_step(validated: Runs, tmp_path: Path) -> None:
    run = validated(2.0, 3.0)
    run.fit()
    assert run.inputs.validate.asked == ["base", "00001", "00002"]
    rows = rows_of(tmp_path)
    assert rows[0]["baseline"] == BASE
    assert "baseline" not in rows[1]
    again = validated(4.0, steps=3)
    again.fit()
    assert again.inputs.validate.asked == ["00003"]
    assert checkpoint.read_header(run.path).training["baseline"]["validation_reward"] == 1.0


def test_without_validation_the_base_model_is_not_sampled(validated: Runs, tmp_path: Path) -> None:
    run = validated(steps=1, validation={"every": 0})
    run.fit()
    assert run.inputs.validate.asked == []
    assert files_of(tmp_path) == ["hypernetwork"]


def test_other_validation_settings_validate_the_base_model_again(
    validated: Runs, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    validated(9.0).fit()
    with caplog.at_level(logging.WARNING):
        run = validated(2.0, steps=2, validation={"every": 2, "steps": 3})
    assert "the base model is validated again" in caplog.text
    run.fit()
    assert run.inputs.validate.asked == ["base", "00002"]
    assert run.results.best == {"step": 2, "gain": 0.5}
    assert ["baseline" in row for row in rows_of(tmp_path)] == [True, True]


# The best, and what is kept


def test_the_best_is_kept_and_says_why(validated: Runs, tmp_path: Path) -> None:
    run = validated(2.0, 5.0, 3.0, 4.0, run={"keep_exports": 2})
    averages: list[Tensor] = []
    run.fit(lambda row: averages.append(weights(run.average)))
    assert files_of(tmp_path) == [
        "hypernetwork", "hypernetwork-best", "hypernetwork-step-000003", "hypernetwork-step-000004",
    ]  # fmt: skip
    best = checkpoint.load(tmp_path / "hypernetwork-best.safetensors")
    assert torch.equal(weights(best.network), averages[1].half().float())
    assert best.header.training["steps"] == 2
    assert best.header.training["best"] == {"step": 2, "gain": 2.0}
    assert best.header.training["metrics"] == {"validation_reward": 5.0, "gain": 2.0}
    assert card_path(tmp_path / "hypernetwork-best.safetensors").is_file()
    report = json.loads((tmp_path / "best.json").read_text(encoding="utf-8"))
    assert report == {
        "step": 2, "gain": 2.0, "file": "hypernetwork-best.safetensors",
        "decided_by": {"validation_reward": 1.0}, "metrics": {"validation_reward": 5.0, "gain": 2.0},
        "baseline": {"validation_reward": 1.0, "spread/validation_reward": 2.0},
    }  # fmt: skip
    assert [row["best"]["step"] for row in rows_of(tmp_path)] == [1, 2, 2, 2]
    assert [row["validation"]["gain"] for row in rows_of(tmp_path)] == [0.5, 2.0, 1.0, 1.5]
    last = checkpoint.read_header(tmp_path / "hypernetwork-step-000004.safetensors").training
    assert (last["steps"], last["best"]["step"]) == (4, 2)


def test_the_best_of_a_run_that_goes_on_is_remembered(validated: Runs, tmp_path: Path) -> None:
    validated(5.0, run={"keep_exports": 0}).fit()
    run = validated(3.0, 6.0, steps=2, run={"keep_exports": 0})
    run.fit()
    assert run.results.best == {"step": 1, "gain": 2.0}
    assert files_of(tmp_path) == ["hypernetwork", "hypernetwork-best"]
    assert checkpoint.read_header(tmp_path / "hypernetwork-best.safetensors").training["steps"] == 1


def test_the_conditioning_of_the_last_validation_stands_in_the_file(validated: Runs, tmp_path: Path) -> None:
    run = validated(2.0, 3.0)
    run.fit()
    finished, best = (checkpoint.load(path).header for path in (run.path, run.results.best_path))
    assert (
        finished.training["conditioning"] == best.training["conditioning"] == {"shares": SHARES, "gain": GAIN}
    )
    assert not any(name.startswith("conditioning") for name in finished.training["metrics"])
    first = rows_of(tmp_path)[0]["validation"]
    assert first["conditioning"] == {"shares": SHARES}
    card = run.path.with_suffix(".md").read_text(encoding="utf-8")
    assert "0.4 % of these weights depend on the prompt" in card
    assert "averaged into one LoRA for all prompts and times: validation reward -0.5 [-0.75, -0.25]." in card
    resumed = validated(4.0, steps=3)
    assert resumed.results.conditioning == {"shares": SHARES, "gain": GAIN}


def test_a_run_whose_weights_hardly_depend_on_the_prompt_says_so(validated: Runs) -> None:
    status, message = outcome(validated(2.0), lambda _: None)
    assert status == 0
    wrote, remark = message.splitlines()
    assert wrote.startswith("Wrote ")
    assert remark.startswith("Only 0.4 % of the generated weights depend on the prompt")


def test_figures_that_are_not_finite_are_never_the_best(validated: Runs, tmp_path: Path) -> None:
    run = validated(math.nan, 1.5, math.nan)
    run.fit()
    assert run.results.best["step"] == 2


def test_rewards_that_no_loss_optimises_decide() -> None:
    def decided(
        optimised: dict[str, float], measured: dict[str, float], **objective: Any
    ) -> dict[str, float]:
        return deciding_rewards(
            TrainConfig(
                model=ModelConfig(base="sd15"),
                objective=ObjectiveConfig(rewards=optimised, **objective),
                validation=ValidationConfig(rewards=measured),
            )
        )

    assert decided({"hps": 1.0}, {"pick": 2.0, "hps": 1.0, "off": 0.0}) == {"pick": 2.0}
    assert decided({"hps": 1.0}, {}) == {"hps": 1.0}
    assert decided({"hps": 1.0}, {"hps": 3.0}, reward_weight=0.0) == {"hps": 3.0}
    assert deciding_rewards(TrainConfig()) == {"validation_reward": 1.0}


def test_rewards_of_any_scale_count_alike() -> None:
    base = {"a": 20.0, "b": 0.3, "c": 1.0, "spread": {"a": 2.0, "b": 0.1, "c": 0.0}}
    now = {"a": 21.0, "b": 0.4, "c": 3.0}
    assert gain_over_base(now, base, {"a": 1.0, "b": 1.0}) == pytest.approx(1.5)
    assert gain_over_base(now, base, {"b": 0.5}) == pytest.approx(0.5)
    assert gain_over_base(now, base, {"c": 1.0}) == pytest.approx(2.0)
    assert gain_over_base(now, base, {"d": 1.0}) is None
    assert gain_over_base(now, {}, {"a": 1.0}) is None


# More steps


def test_a_run_may_grow_and_its_rate_is_that_of_the_longer_cosine(
    small_run: Runs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    small_run(objective=QUICK, optim={"steps": 2}).fit()
    with caplog.at_level(logging.WARNING):
        run = small_run(objective=QUICK, optim={"steps": 4})
    assert "optim.steps was 2 and is 4" in caplog.text
    rates: list[float] = []
    run.fit(lambda row: rates.append(run.optimiser.param_groups[0]["lr"]))
    longer = OptimConfig(steps=4, warmup_steps=0, lr=1e-2)
    assert rates == [longer.learning_rate(2), longer.learning_rate(3)]
    assert rates[0] == pytest.approx(0.5e-2)
    assert [row["step"] for row in rows_of(tmp_path)] == [0, 1, 2, 3]
    assert checkpoint.read_header(run.path).training["steps"] == 4


def test_a_run_does_not_shrink_below_the_steps_it_took(small_run: Runs) -> None:
    small_run(objective=QUICK, optim={"steps": 3}).fit()
    small_run(objective=QUICK, optim={"steps": 3})
    with pytest.raises(HyperAlignError, match=r"optim.steps is 2, but the run in .* has taken 3 steps"):
        small_run(objective=QUICK, optim={"steps": 2})


# Another hypernetwork's weights


def test_a_new_run_begins_with_the_weights_of_another(small_run: Runs, tmp_path: Path) -> None:
    first = small_run(tmp_path / "first", objective=QUICK)
    first.fit()
    begun: dict[str, Any] = {
        "objective": QUICK, "model": {"variant": "I"}, "off_zero": False, "optim": {"steps": 2},
        "run": {"init_from": first.path, "seed": 3},
    }  # fmt: skip
    run = small_run(tmp_path / "second", **begun)
    start = checkpoint.load(first.path)
    assert torch.equal(weights(run.network), weights(start.network))
    assert torch.equal(weights(run.average), weights(run.network))
    with pytest.raises(KeyboardInterrupt):
        run.fit(interrupted)
    first.path.unlink()  # a resumed run does not look for it
    resumed = small_run(tmp_path / "second", **begun)
    assert torch.equal(weights(resumed.network), weights(run.network))
    resumed.fit()
    header = checkpoint.read_header(resumed.path)
    origin = header.training["init_from"]
    assert origin.pop("sha256")
    assert origin == {
        "file": "hypernetwork.safetensors", "variant": "S", "steps": 1, "reward": "letters",
        "preference_data": "EmojiScenes",
    }  # fmt: skip
    assert header.schedule.variant == "I"


def interrupted(row: dict[str, Any]) -> None:
    raise KeyboardInterrupt


def test_what_the_other_one_was_trained_with_is_named_too(small_run: Runs, tmp_path: Path) -> None:
    first = small_run(tmp_path / "first", objective=QUICK)
    first.results._facts = {"reward": "letters", "preference_data": "HPDv2"}
    first.fit()
    run = small_run(tmp_path / "second", objective=QUICK, run={"init_from": first.path})
    names = [source.name for source in run.results.header(0).sources]
    assert names == ["embedded tiny model", "tiny preference reward", "EmojiScenes", "HPDv2"]


def test_another_architecture_is_refused_by_its_fields(
    small_run: Runs, make_base: Callable[..., Any], tmp_path: Path
) -> None:
    first = small_run(tmp_path / "first", objective=QUICK)
    first.fit()
    run: dict[str, Any] = {"init_from": first.path}
    with pytest.raises(HyperAlignError, match=r"do not fit this recipe: mode is prefix and should be separ"):
        small_run(tmp_path / "second", objective=QUICK, model={"mode": "separate"}, run=run)
    with pytest.raises(HyperAlignError, match=r"targets is .* layers"):
        small_run(tmp_path / "third", objective=QUICK, base=make_base(everywhere=True), run=run)
    with pytest.raises(HyperAlignError, match="There is no file"):
        small_run(tmp_path / "fourth", objective=QUICK, run={"init_from": tmp_path / "none.safetensors"})


def test_a_check_says_so_before_the_run(tmp_path: Path) -> None:
    recipe = load_recipe(ROOT / "train" / "recipes" / "tiny_p.toml")
    start = ROOT / "hyperalign" / "tiny" / "hypernetworks" / "tiny_s.safetensors"
    config = dataclasses.replace(
        recipe, run=dataclasses.replace(recipe.run, out=tmp_path / "run", init_from=start)
    )
    check_start(config, TINY)
    wider = dataclasses.replace(config, network=dataclasses.replace(config.network, width=64))
    with pytest.raises(HyperAlignError, match=r"network.width is \d+ and should be 64"):
        check_start(wider, TINY)


# A training checkpoint becomes a hypernetwork


@pytest.mark.parametrize("raw", [False, True])
def test_a_training_checkpoint_becomes_a_hypernetwork(
    small_run: Runs, tmp_path: Path, raw: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    run = small_run(objective=QUICK, optim={"steps": 2}, run={"checkpoint_every": 1})
    taken: list[Any] = []
    run.fit(lambda row: taken.append((weights(run.average), weights(run.network))))
    saved, out = tmp_path / "checkpoints" / "step-000001.pt", tmp_path / "made" / "one.safetensors"
    arguments = ["--checkpoint", str(saved), "--out", str(out), *(["--raw"] if raw else [])]
    assert export.main(arguments) == 0
    assert f"Wrote {out}" in capsys.readouterr().out
    made = checkpoint.load(out)
    assert torch.equal(weights(made.network), taken[0][raw].half().float())
    finished = checkpoint.read_header(run.path)
    training = {name: value for name, value in made.header.training.items() if name != "weights"}
    assert training == finished.training | {"steps": 1}
    assert ("weights" in made.header.training) is raw
    assert dataclasses.replace(made.header, training={}) == dataclasses.replace(finished, training={})
    assert card_path(out).is_file()


def test_what_is_no_usable_checkpoint_is_one_sentence(
    small_run: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = small_run(objective=QUICK)
    run.fit()
    saved, out = tmp_path / "checkpoints" / "step-000001.pt", tmp_path / "made.safetensors"

    def said(path: Path, name: str = "made.safetensors") -> str:
        assert export.main(["--checkpoint", str(path), "--out", str(tmp_path / name)]) == 2
        assert not out.exists()
        return capsys.readouterr().err

    state = torch.load(saved)
    torch.save({name: value for name, value in state.items() if name != "header"}, tmp_path / "old.pt")
    assert "kept no header in training checkpoints" in said(tmp_path / "old.pt")
    state["average"]["b_aux.0"].fill_(math.nan)
    torch.save(state, tmp_path / "nan.pt")
    assert "NaN or infinite weights (b_aux.0, 1 tensors)" in said(tmp_path / "nan.pt")
    (tmp_path / "half.pt").write_bytes(saved.read_bytes()[:500])
    assert "cannot be read as a training checkpoint" in said(tmp_path / "half.pt")
    assert "cannot be read as a training checkpoint" in said(tmp_path / "missing.pt")
    assert "expected a file that ends in .safetensors" in said(saved, "made.pt")
