"""The node texts in all languages: `locales/<language>/{nodeDefs,main}.json`.

English is generated from the nodes' schemas: `python3 scripts/locales.py` starts ComfyUI, writes locales/en
and reports which texts of the other languages are missing, superfluous or possibly out of date.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # at the end: see "nodes" in CONTRIBUTING.md

from hyperalign.errors import HyperAlignError
from scripts.common import ROOT, ScriptError, say
from scripts.environment import enter_environment
from scripts.host import exit_on_termination
from scripts.schemas import ObjectInfo, inputs_of, own_nodes, read_object_info

Texts = dict[str, Any]
"""The content of one file: nested, with strings at the ends."""
LOCALES = ROOT / "locales"
ENGLISH = "en"
TRANSLATED = ("zh", "ja", "ko")
FILES = ("nodeDefs.json", "main.json")


def english(info: ObjectInfo) -> dict[str, Texts]:
    """Returns the English texts by file name, in the structure that ComfyUI's front end expects."""
    nodes = own_nodes(info)
    kinds = {kind for node in nodes.values() for kind in _socket_types(node)}
    main = {
        "nodeCategories": {part: part for node in nodes.values() for part in node["category"].split("/")},
        "dataTypes": {kind: kind for kind in sorted(kinds) if kind.startswith("HYPERALIGN")},
    }
    return {"nodeDefs.json": {name: _node(node) for name, node in nodes.items()}, "main.json": main}


def _socket_types(node: dict[str, Any]) -> Iterator[str]:
    yield from (kind for _, _, kind, _ in inputs_of(node))
    yield from node["output"]


def _node(node: dict[str, Any]) -> Texts:
    inputs: Texts = {}
    for name, _, _, options in inputs_of(node):
        inputs[name] = _text(options.get("display_name") or name, options.get("tooltip"))
        if options.get("control_after_generate"):
            inputs["control_after_generate"] = {"name": "control after generate"}
    outputs = zip(node["output_name"], node["output_tooltips"], strict=True)
    texts: Texts = {"display_name": node["display_name"], "description": node["description"]}
    if inputs:
        texts["inputs"] = inputs
    return texts | {"outputs": {str(place): _text(*each) for place, each in enumerate(outputs)}}


def _text(name: str, tooltip: str | None) -> Texts:
    return {"name": name, "tooltip": tooltip} if tooltip else {"name": name}


def flat(texts: Texts, path: str = "") -> dict[str, str]:
    """Returns the strings by their paths, such as HyperAlignApply.inputs.model.tooltip."""
    found: dict[str, str] = {}
    for key, value in texts.items():
        place = f"{path}.{key}" if path else key
        found |= flat(value, place) if isinstance(value, dict) else {place: value}
    return found


def read(language: str, file: str) -> Texts:
    """Returns the content of a committed file; empty if there is no file."""
    path = LOCALES / language / file
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _write(language: str, file: str, texts: Texts) -> None:
    path = LOCALES / language / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(texts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _translation_work(file: str, before: dict[str, str], now: dict[str, str]) -> Iterator[str]:
    """Yields what a translator has to do after the English texts changed from `before` to `now`."""
    changed = [key for key in now if key in before and before[key] != now[key]]
    for language in TRANSLATED:
        there = flat(read(language, file))
        yield from (f"{language}/{file} has no {key}: {now[key]}" for key in now if key not in there)
        yield from (
            f"{language}/{file} has {key}, which English does not have" for key in there if key not in now
        )
        yield from (f"{language}/{file} {key} may be out of date: {now[key]}" for key in changed)


def main() -> int:
    """Writes the English texts and reports on the other languages; returns the exit status."""
    exit_on_termination()
    try:
        info = read_object_info(enter_environment(Path(__file__).resolve()))
    except (ScriptError, HyperAlignError, OSError) as error:
        say(f"Error: {error}")
        return 1
    work: list[str] = []
    for file, texts in english(info).items():
        before = flat(read(ENGLISH, file))
        _write(ENGLISH, file, texts)
        work += _translation_work(file, before, flat(texts))
    for line in work:
        say(line)
    say(f"Wrote {ENGLISH}; {len(work)} texts of other languages need work.")
    return 1 if work else 0


if __name__ == "__main__":
    sys.exit(main())
