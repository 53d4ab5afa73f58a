"""Recipes with any values, keys and damage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fuzzing import ODD, Case, changed, damaged, fuzzed
from hypothesis import given
from hypothesis import strategies as st

from train.config import TrainConfig
from train.recipe import as_table, load_recipe

ROOT = Path(__file__).resolve().parents[3]
SHIPPED = [path.read_bytes() for path in sorted((ROOT / "train" / "recipes").rglob("*.toml"))]
DEFAULTS = as_table(TrainConfig())


def toml(value: Any) -> str:
    """Returns a JSON value in TOML's syntax, which has no null."""
    match value:
        case dict():
            items = (f"{json.dumps(key)} = {toml(item)}" for key, item in value.items() if item is not None)
            return "{" + ", ".join(items) + "}"
        case list():
            return "[" + ", ".join(toml(item) for item in value if item is not None) + "]"
        case float():
            return repr(value) if "e" in repr(value) or "." in repr(value) else repr(value).lower()
        case _:
            return json.dumps(value, ensure_ascii=False)


@st.composite
def some_settings(draw: st.DrawFn) -> dict[str, Any]:
    """A few settings in their tables, of which one or more are changed, and now and then an odd table."""
    tables = draw(st.lists(st.sampled_from(sorted(DEFAULTS)), min_size=1, max_size=3, unique=True))
    recipe: dict[str, Any] = {}
    for table in tables:
        keys = draw(st.lists(st.sampled_from(sorted(DEFAULTS[table])), min_size=1, max_size=4, unique=True))
        recipe[table] = {key: DEFAULTS[table][key] for key in keys}
    if draw(st.integers(0, 4)) == 0:
        recipe["extends"] = draw(st.sampled_from(["case.toml", "other.toml", ".", "a\0b", "a" * 3000]) | ODD)
    found = draw(changed(recipe))
    return found if isinstance(found, dict) else {"model": found}


@st.composite
def recipes(draw: st.DrawFn) -> bytes:
    match draw(st.sampled_from(["settings"] * 5 + ["shipped", "damaged", "text"])):
        case "settings":
            items = draw(some_settings()).items()
            lines = [f"{json.dumps(key)} = {toml(value)}" for key, value in items if value is not None]
            return "\n".join(lines).encode("utf-8", "surrogatepass")
        case "shipped":
            return draw(damaged(draw(st.sampled_from(SHIPPED))))
        case "damaged":
            keys = ["model", "optim.steps", "x"]
            start = draw(st.sampled_from(keys)) + " = "
            odd = st.sampled_from(
                ["[" * 100_000, "{a=" * 5000, "9" * 5000, "2020-13-01", "1e999", "0x" + "f" * 400]
            )
            return (start + draw(odd)).encode()
        case _:
            return draw(st.text()).encode("utf-8", "surrogatepass")


def use(path: Path) -> None:
    config = load_recipe(path)
    json.dumps(as_table(config), ensure_ascii=False).encode("utf-8")


@fuzzed()
@given(recipes())
def test_any_recipe_is_read_or_refused(case: Case, content: bytes) -> None:
    case.check("case.toml", content, use)
