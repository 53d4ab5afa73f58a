"""Recipes are strict: what they do not know they refuse, with a hint."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperalign.errors import HyperAlignError
from train.config import ObjectiveConfig, OptimConfig, TrainConfig
from train.recipe import as_table, check_choices, load_recipe
from train.train import Switches, main, parse

RECIPES = Path(__file__).parents[2] / "train" / "recipes"


def recipe(tmp_path: Path, text: str, name: str = "r.toml") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[optim]\nlrr = 1.0", "unknown key 'lrr'. Did you mean 'lr'"),
        ("[optim]\nlr = 'fast'", "expected a number"),
        ("[optim]\nsteps = 0", "optim.steps is 0; expected 1 or more"),
        ("[optim]\nlr = -1.0", "optim.lr"),
        ("[objective]\nskip_first = 10", "skip_first"),
        ("[objective]\nreward_weight = 0.0\npreference_weight = 0.0", "at least one above 0"),
        ("[objective]\nrewards = 3", "expected a table"),
        ("[objective]\nrewards = { clip = 'much' }", "rewards.clip is 'much'; expected a number"),
        ("[objective]\nrewards = {}", "objective.rewards is empty"),
        ("[objective]\nreward_range = [0.5, 0.1]", "reward_range"),
        ("[objective]\nreward_range = [0.1]", r"reward_range is \[0.1\]; expected 2 values, found 1"),
        ("[objective]\nreward_range = ['a', 'b']", r"reward_range\[0\] is 'a'; expected a number"),
        ("[objective]\nreward_range = 0.5", "reward_range is 0.5; expected a list of 2 values"),
        ("[data]\ntext_lengths = [256, 'a']", r"text_lengths\[1\] is 'a'; expected a whole number"),
        ("[data]\ntext_lengths = [256.0]", r"text_lengths\[0\] is 256.0; expected a whole number"),
        ("[data]\ntext_lengths = []", r"text_lengths is \(\); expected numbers above 0"),
        ("[model]\nkey_times = ['a']", r"key_times\[0\] is 'a'; expected a number"),
        ("[run]\ntrackers = 'wandb'", "trackers is 'wandb'; expected a list of values"),
        ("[run]\ntrackers = [1]", r"trackers\[0\] is 1; expected a text"),
        ("[run]\nout = 3", "out is 3; expected a path"),
        ("[optim]\nbf16 = 1", "bf16 is 1; expected true or false"),
        ("[model]\nbase = 3", "base is 3; expected 'tiny', 'sd15', 'sdxl', 'flux' or 'sd3'.$"),
        ("[model]\nvariant = 's'", "variant is 's'; expected 'S', 'P' or 'I'. Did you mean 'S'?"),
        ("[model]\nresolution = 500", "a multiple of 64"),
        ("[model]\nvariant = 'P'\nkey_times = [0.2, 0.5]", "Key times"),
        ("optim = 3", "expected a table"),
        ("[optim\nlr = 1", "not valid TOML"),
        ("[optim]\nsteps = " + "9" * 5000, "not valid TOML: .*digits"),
        ("[optim]\nlr = " + "9" * 400, "lr is 99.* [.][.][.]; expected a number"),
        ("x = " + "{a=" * 5000, "not valid TOML: maximum recursion"),
    ],
)
def test_wrong_recipes_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(HyperAlignError, match=message):
        load_recipe(recipe(tmp_path, text))


def literals(kind: type[Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every field of the configuration that takes one of a few words."""
    for name, hint in get_type_hints(kind).items():
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield from literals(hint, (*prefix, name))
        elif get_origin(hint) is Literal:
            yield (*prefix, name), hint


CHOICES = [
    pytest.param(table, name, value, id=f"{table}.{name}-{value}")
    for (table, name), hint in literals(TrainConfig)
    for value in get_args(hint)
]


def test_the_configuration_has_choices() -> None:
    named = {".".join(path) for path, _ in literals(TrainConfig)}
    assert {"model.base", "model.vae", "objective.state", "network.conditioning"} <= named


@pytest.mark.parametrize(("table", "name", "value"), CHOICES)
def test_a_misspelt_choice_of_a_recipe_names_the_nearest(
    tmp_path: Path, table: str, name: str, value: str
) -> None:
    with pytest.raises(HyperAlignError, match=f"{name} is '{value}x'; .*Did you mean '{value}'"):
        load_recipe(recipe(tmp_path, f'[{table}]\n{name} = "{value}x"'))


@pytest.mark.parametrize(("table", "name", "value"), CHOICES)
def test_a_misspelt_choice_of_the_command_line_names_the_nearest(table: str, name: str, value: str) -> None:
    options = [f"--{table}.{name}", f"--{table}.{name.replace('_', '-')}"]
    for option in options:
        for arguments in ([option, f"{value}x"], [f"{option}={value}x"]):
            with pytest.raises(HyperAlignError, match=f"{option} is '{value}x'; .*Did you mean '{value}'"):
                check_choices(["--run.out", "x", *arguments])
        check_choices([option, value, "--run.out", f"{value}x"])
    with pytest.raises((HyperAlignError, SystemExit)):
        parse([options[0], f"{value}x"])


def test_a_missing_recipe_names_the_shipped_ones(tmp_path: Path) -> None:
    with pytest.raises(HyperAlignError, match="train/recipes"):
        load_recipe(tmp_path / "none.toml")


def test_a_recipe_changes_only_the_keys_it_names_of_the_one_it_extends(tmp_path: Path) -> None:
    recipe(tmp_path, "[optim]\nlr = 0.5\nsteps = 7\n[objective]\nrewards = { clip = 1.0 }", "base.toml")
    recipe(tmp_path, 'extends = "base.toml"\n[optim]\nsteps = 8', "middle.toml")
    (tmp_path / "sub").mkdir()
    text = 'extends = "../middle.toml"\n[objective]\nrewards = { pickscore = 2.0 }'
    config = load_recipe(recipe(tmp_path / "sub", text))
    assert (config.optim.lr, config.optim.steps) == (0.5, 8)
    assert config.objective.rewards == {"pickscore": 2.0}
    default = TrainConfig()
    assert config == dataclasses.replace(
        default,
        optim=dataclasses.replace(default.optim, lr=0.5, steps=8),
        objective=dataclasses.replace(default.objective, rewards={"pickscore": 2.0}),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('extends = "none.toml"', "There is no recipe .*none.toml, which .*r.toml extends"),
        ("extends = 3", "r.toml: extends is 3; expected a path in quotes"),
        ("extends = ['base.toml']", r"r.toml: extends is \['base.toml'\]; expected a path in quotes"),
        ('extends = "r.toml"', "The recipes are a loop: r.toml extends r.toml"),
        ('extends = "back.toml"', "The recipes are a loop: r.toml extends back.toml extends r.toml"),
        ('extends = "wrong.toml"', "wrong.toml: optim has the unknown key 'lrr'. Did you mean 'lr'"),
        ('extends = "base.toml"\n[optim]\nlrr = 1.0', "r.toml: optim has the unknown key 'lrr'"),
        ('extends = "base.toml"\n[objective]\nrollout_steps = 3', "objective.skip_first is 4"),
        ('[optim]\nextends = "base.toml"', "unknown key 'extends'"),
        (f'extends = "{"a" * 3000}"', "There is no recipe .*aaa ..., which .*r.toml extends"),
        ('extends = "a\\u0000"', "There is no recipe"),
    ],
)
def test_a_wrong_recipe_that_extends_another_is_refused(tmp_path: Path, text: str, message: str) -> None:
    recipe(tmp_path, "[objective]\nskip_first = 4", "base.toml")
    recipe(tmp_path, "[optim]\nlrr = 1.0", "wrong.toml")
    recipe(tmp_path, 'extends = "r.toml"', "back.toml")
    with pytest.raises(HyperAlignError, match=message):
        load_recipe(recipe(tmp_path, text))


def test_the_command_line_wins_over_the_recipe(tmp_path: Path) -> None:
    path = recipe(tmp_path, "[optim]\nlr = 0.5\nsteps = 7")
    config, switches = parse(["--recipe", str(path), "--optim.lr", "0.25", "--check"])
    assert (config.optim.lr, config.optim.steps) == (0.25, 7)
    assert switches == Switches(check=True, smoke=False, download=False)


@settings(deadline=None)
@given(st.floats(1e-6, 1.0), st.integers(1, 10_000), st.floats(0.0, 10.0))
def test_a_resolved_recipe_reads_back_as_itself(lr: float, steps: int, weight: float) -> None:
    config = TrainConfig(
        optim=OptimConfig(lr=lr, steps=steps), objective=ObjectiveConfig(reward_weight=weight)
    )
    table = as_table(config)
    from train.recipe import _from_table

    table["objective"].pop("reward_cap")
    assert _from_table(TrainConfig(), table, "r") == config


def test_a_wrong_recipe_on_the_command_line_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--recipe", str(recipe(tmp_path, "[optim]\nlrr = 1.0"))]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_check_finds_a_folder_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    path = RECIPES / "tiny_s.toml"
    assert main(["--recipe", str(path), "--check", "--run.out", str(tmp_path / "file" / "run")]) == 2
    assert "not a folder" in capsys.readouterr().err


def test_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().optim.lr = 1.0  # pyright: ignore
