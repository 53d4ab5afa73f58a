"""The shipped recipes: what each changes of the one it extends, what its header says, and what it costs."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts import recipe_costs
from train.config import TrainConfig
from train.models.sd3 import SHIFT
from train.noise import DiffusionSchedule, FlowSchedule, NoiseSchedule, resolution_shift
from train.recipe import as_table, load_recipe, tomllib

RECIPES = Path(__file__).parents[2] / "train" / "recipes"
ALL = {path.relative_to(RECIPES).with_suffix("").as_posix(): path for path in sorted(RECIPES.rglob("*.toml"))}
REAL = [name for name, path in ALL.items() if not path.stem.startswith("tiny")]
COLUMNS = {"hpsv2.1", "pickscore", "imagereward", "clip", "aesthetic"}
"""Of Table 3."""
HPS, PICKSCORE = {"hpsv2.1": 1.0}, {"pickscore": 0.01}
PICKAPIC, HPD = "data/preference-sd15-512", "data/preference-hpd-sd15-512"


def raw(name: str) -> dict[str, Any]:
    return tomllib.loads(ALL[name].read_text(encoding="utf-8"))


EXTENDING = [name for name in ALL if "extends" in raw(name)]


def keys(table: dict[str, Any]) -> dict[tuple[str, str], Any]:
    """Every value by the name of its table and its own."""
    return {(name, key): value for name, part in table.items() for key, value in part.items()}


@pytest.mark.parametrize("name", ALL)
def test_shipped_recipes_load_and_write_to_a_folder_of_their_name(name: str) -> None:
    assert load_recipe(ALL[name]).run.out == Path("runs") / name


@pytest.mark.parametrize("name", EXTENDING)
def test_a_recipe_differs_from_the_one_it_extends_in_what_it_names(name: str) -> None:
    own = raw(name)
    parent = keys(as_table(load_recipe(ALL[name].parent / own.pop("extends"))))
    child = keys(as_table(load_recipe(ALL[name])))
    different = {key for key, value in child.items() if value != parent[key]}
    assert {("run", "out")} < different <= set(keys(own))
    assert {key: child[key] for key in keys(own)} == keys(own)


@pytest.mark.parametrize("name", ALL)
def test_the_commands_of_a_header_name_their_own_recipe(name: str) -> None:
    commands = re.findall(r"--recipe (\S+)", ALL[name].read_text(encoding="utf-8"))
    assert len(commands) >= 2
    assert set(commands) == {f"train/recipes/{name}.toml"}


@pytest.mark.parametrize("name", ["sd15", "sdxl", "flux", "sd35m", "tiny"])
def test_a_static_lora_is_its_s_recipe_without_conditioning_at_a_rate_of_its_own(name: str) -> None:
    s, static = load_recipe(ALL[f"{name}_s"]), load_recipe(ALL[f"{name}_static"])
    assert static.network == dataclasses.replace(s.network, conditioning="none")
    assert dataclasses.replace(static.optim, lr=s.optim.lr) == s.optim
    assert dataclasses.replace(static, network=s.network, run=s.run, optim=s.optim) == s


@pytest.mark.parametrize(
    ("name", "rewards", "preference"),
    [
        ("hpsv2_pickapic", HPS, PICKAPIC), ("hpsv2_hpd", HPS, HPD),
        ("pickscore_pickapic", PICKSCORE, PICKAPIC), ("pickscore_hpd", PICKSCORE, HPD),
        ("only_pickapic", {}, PICKAPIC), ("only_hpd", {}, HPD),
        ("only_hpsv2", HPS, None), ("only_pickscore", PICKSCORE, None),
    ],
)  # fmt: skip
def test_the_rows_of_table_3(name: str, rewards: dict[str, float], preference: str | None) -> None:
    config = load_recipe(ALL[f"table3/{name}"])
    paper = load_recipe(ALL["sd15_s_paper"])
    assert config.objective.optimised == rewards
    assert bool(config.objective.reward_weight) == bool(rewards)
    assert set(config.validation.rewards) == COLUMNS - set(rewards)
    assert config.objective.needs_preference_images == (preference is not None)
    if preference:
        assert config.data.preference == Path(preference)
        assert ("HPD" in config.data.preference_name) == ("hpd" in preference)
    assert (config.model, config.network, config.optim) == (paper.model, paper.network, paper.optim)


def noise_schedule(config: TrainConfig) -> NoiseSchedule:
    match config.model.base:
        case "flux":
            return FlowSchedule(1.0, resolution_shift((config.model.resolution // 16) ** 2))
        case "sd3":
            return FlowSchedule(1000.0, SHIFT)
        case _:
            return DiffusionSchedule()


@pytest.mark.parametrize(
    "name", [name for name, path in ALL.items() if load_recipe(path).objective.method == "hyperalign"]
)
def test_the_reward_looks_at_the_steps_with_a_tenth_of_signal_or_more(name: str) -> None:
    config = load_recipe(ALL[name])
    schedule = noise_schedule(config)
    signals = schedule.signal(torch.tensor(schedule.timesteps(config.objective.rollout_steps)))
    assert config.objective.skip_first == int((signals < 0.1 - 1e-4).sum())
    assert (config.objective.reward_weighting == "signal") == (name in REAL)


def cost(config: TrainConfig) -> str:
    return recipe_costs.cost_of_recipe(config).line()


@pytest.mark.parametrize("name", ["sd15_s", "table3/pickscore_hpd"])
def test_a_header_says_what_the_recipe_costs_now(name: str) -> None:
    text = ALL[name].read_text(encoding="utf-8")
    again = "run python scripts/recipe_costs.py"
    assert recipe_costs.cost_line(text) == cost(load_recipe(ALL[name])), again
    assert recipe_costs.with_cost(text, recipe_costs.cost_line(text)) == text, again


@pytest.mark.parametrize("name", REAL)
def test_every_header_says_a_cost(name: str) -> None:
    line = recipe_costs.cost_line(ALL[name].read_text(encoding="utf-8"))
    assert re.match(
        r"[\d.]+ s a step; [\d.]+ GPU hours on 4 H100; peak \d+ GiB; disk [\d.]+ GiB \(passes of \d+, rec",
        line,
    )
    assert ("not measured" in line) == name.startswith("sd35m")


def test_the_readme_has_the_table_of_the_headers() -> None:
    readme = recipe_costs.README.read_text(encoding="utf-8")
    assert recipe_costs.with_table(readme) == readme, "run python scripts/recipe_costs.py"


def test_a_cost_line_replaces_the_older_one() -> None:
    text = "# A recipe.\n#   resume:   the same\n# More.\n"
    once = recipe_costs.with_cost(text, "1 s")
    assert once == "# A recipe.\n#   resume:   the same\n#   cost:     1 s\n# More.\n"
    assert recipe_costs.with_cost(once, "2 s") == once.replace("1 s", "2 s")
