"""Recipes: TOML files over the defaults of `train.config`, read strictly."""

from __future__ import annotations

import dataclasses
import difflib
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from hyperalign.errors import HyperAlignError, shortened, shown
from hyperalign.files import first_line, is_file
from hyperalign.finite import is_finite
from train.config import TrainConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

EXPECTED = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text in quotes",
    Path: "a path in quotes",
}


def load_recipe(path: Path) -> TrainConfig:
    """Returns the configuration of a recipe file, over that of the recipe it `extends`, else the defaults.

    A key replaces the other recipe's whole value, also that of a table such as `rewards`.

    Raises:
        HyperAlignError: no such file, not TOML, an unknown key, a wrong type, a misspelt choice, a value
            out of range, or recipes that extend each other.
    """
    return _load(path, ())


def _load(path: Path, above: tuple[Path, ...]) -> TrainConfig:
    """Returns the configuration of a recipe that those above it extend, the last one directly."""
    if not is_file(path):
        needs = f", which {above[-1]} extends" if above else ""
        raise HyperAlignError(
            f"There is no recipe {shortened(str(path))}{needs}. The shipped ones are in train/recipes."
        )
    if path.resolve() in [recipe.resolve() for recipe in above]:
        chain = " extends ".join(recipe.name for recipe in (*above, path))
        raise HyperAlignError(f"The recipes are a loop: {chain}. Remove `extends` from one of them.")
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # TOML's errors are of ValueError
        said = shortened(first_line(error))
        raise HyperAlignError(f"The recipe {path} is not valid TOML: {said}. Correct that line.") from error
    parent = TrainConfig()
    if "extends" in raw:
        other = _read(Path, raw.pop("extends"), f"{path.name}: extends")
        parent = _load(path.parent / other, (*above, path))
    return _from_table(parent, raw, path.name)


def check_choices(arguments: Sequence[str]) -> None:
    """Raises HyperAlignError for a misspelt choice on the command line, such as `--model.base sdx`."""
    choices = dict(_choices(TrainConfig))
    words = [word for argument in arguments for word in argument.split("=", 1)]
    for option, value in pairwise(words):
        name = option.removeprefix("--").replace("-", "_")
        if option.startswith("--") and name in choices:
            _member(choices[name], value, option)


def _choices(kind: type[Any], prefix: str = "") -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yields each field that takes one of a few words, by its dotted name, with those words."""
    for key, hint in get_type_hints(kind).items():
        if get_origin(hint) is Literal:
            yield f"{prefix}{key}", get_args(hint)
        elif isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield from _choices(hint, f"{prefix}{key}.")


def _from_table(parent: Any, table: dict[str, Any], where: str) -> Any:
    """Returns a configuration with the keys of a table changed."""
    known = get_type_hints(type(parent))
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in known:
            raise HyperAlignError(
                f"{where} has the unknown key {shown(key)}. {_nearest(key, known)}Known keys: "
                f"{', '.join(known)}."
            )
        values[key] = _read(known[key], value, f"{where}: {key}", getattr(parent, key))
    return dataclasses.replace(parent, **values)


def _read(hint: Any, value: Any, where: str, parent: Any = None) -> Any:
    """Returns TOML's value as the type of its field; a configuration of its own changes the parent's."""
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise HyperAlignError(
                f"{where} is {shown(value)}; expected a table such as [{where.split()[-1]}]."
            )
        return _from_table(parent, cast("dict[str, Any]", value), where)
    if kind is Literal:
        return _member(inner, value, where)
    if kind is Union:  # a number, or a word
        number, word = inner
        if type(value) is not number and value not in get_args(word):
            words = " or ".join(map(repr, get_args(word)))
            raise HyperAlignError(f"{where} is {shown(value)}; expected {EXPECTED[number]} or {words}.")
        return value
    if kind is dict:
        if not isinstance(value, dict):
            raise HyperAlignError(f"{where} is {shown(value)}; expected a table such as {{ name = 1.0 }}.")
        table = cast("dict[str, Any]", value)
        return {key: _read(inner[1], item, f"{where}.{key}") for key, item in table.items()}
    if kind is tuple:
        return _items(inner, value, where)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool) and is_finite(value):
        return float(value)
    if type(value) is not kind:
        raise HyperAlignError(f"{where} is {shown(value)}; expected {EXPECTED[kind]}.")
    return value


def _items(kinds: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    """Returns a list as a tuple: as many values as there are kinds, or any number of the first kind."""
    count = None if kinds[-1] is Ellipsis else len(kinds)
    if not isinstance(value, list):
        size = "values" if count is None else f"{count} values"
        raise HyperAlignError(f"{where} is {shown(value)}; expected a list of {size}.")
    items = cast("list[Any]", value)
    if count not in (None, len(items)):
        raise HyperAlignError(f"{where} is {shown(items)}; expected {count} values, found {len(items)}.")
    each = kinds if count else (kinds[0],) * len(items)
    pairs = enumerate(zip(each, items, strict=True))
    return tuple(_read(kind, item, f"{where}[{i}]") for i, (kind, item) in pairs)


def _member(choices: tuple[str, ...], value: Any, where: str) -> str:
    if value not in choices:
        expected = f"{', '.join(map(repr, choices[:-1]))} or {choices[-1]!r}"
        hint = _nearest(str(value), choices)
        raise HyperAlignError(f"{where} is {shown(value)}; expected {expected}. {hint}".rstrip())
    return value


def _nearest(word: str, known: Iterable[str]) -> str:
    spellings = {choice.lower(): choice for choice in known}
    close = difflib.get_close_matches(word.lower(), spellings, n=1)
    return f"Did you mean {spellings[close[0]]!r}? " if close else ""


def as_table(config: object, paths: bool = True) -> dict[str, Any]:
    """Returns the configuration as JSON and TOML types, without `paths` nothing of a machine's folders."""

    def plain(value: Any) -> Any:
        if isinstance(value, Path):
            return value.as_posix()
        if isinstance(value, tuple):
            return list(cast("tuple[Any, ...]", value))
        if not isinstance(value, dict):
            return value
        items = cast("dict[str, Any]", value).items()
        return {key: plain(item) for key, item in items if paths or not isinstance(item, Path)}

    return plain(dataclasses.asdict(cast(Any, config)))
