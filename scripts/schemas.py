"""The nodes' inputs and outputs, on which saved workflows rely, compared with the committed record.

`python3 scripts/schemas.py` starts ComfyUI and shows what differs; `--update` records it. A change that
would break saved workflows is recorded only with `--breaking` too, which calls for a new major version:
see docs/compatibility.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from math import inf
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # at the end: see "nodes" in CONTRIBUTING.md

from hyperalign.errors import HyperAlignError
from scripts.common import ROOT, ScriptError, say
from scripts.environment import enter_environment
from scripts.host import Server, exit_on_termination

ObjectInfo = dict[str, Any]
Schemas = dict[str, dict[str, list[dict[str, Any]]]]
SNAPSHOT = ROOT / "tests" / "host" / "snapshots" / "schemas.json"
PREFIX = "HyperAlign"
RECORDED_OPTIONS = ("default", "min", "max", "options", "forceInput", "control_after_generate")
# Their choices are ComfyUI's samplers and the user's files.
FOREIGN_CHOICES = {"sampler_name", "scheduler", "hypernetwork"}


def read_object_info(tree: Path) -> ObjectInfo:
    """Starts a ComfyUI with the pack and returns its declarations of all nodes."""
    from hyperalign.cli.sample.client import ComfyClient

    say(f"Starting ComfyUI from {tree} ...")
    with Server(tree, "schemas") as server:
        return ComfyClient(server.url).object_info()


def own_nodes(info: ObjectInfo) -> ObjectInfo:
    """Returns the pack's declarations, by node id."""
    return {name: info[name] for name in sorted(info) if name.startswith(PREFIX)}


def inputs_of(declaration: dict[str, Any]) -> Iterator[tuple[str, str, Any, dict[str, Any]]]:
    """Yields (name, "required" or "optional", type, options) in the order in which widgets are stored."""
    for group in ("required", "optional"):
        for name, specification in declaration["input"].get(group, {}).items():
            kind, options = specification[0], specification[1] if len(specification) > 1 else {}
            if isinstance(kind, list):  # how nodes of the first API declare a list of choices
                kind, options = "COMBO", {**options, "options": kind}
            yield name, group, kind, options


def schemas_of(info: ObjectInfo) -> Schemas:
    """Returns the inputs and outputs of each of the pack's nodes."""
    return {
        name: {
            "inputs": [_input(*each) for each in inputs_of(declaration)],
            "outputs": [
                {"name": name, "type": kind, "is_list": is_list}
                for name, kind, is_list in zip(
                    declaration["output_name"],
                    declaration["output"],
                    declaration["output_is_list"],
                    strict=True,
                )
            ],
        }
        for name, declaration in own_nodes(info).items()
    }


def _input(name: str, group: str, kind: Any, options: dict[str, Any]) -> dict[str, Any]:
    recorded = {key: options[key] for key in RECORDED_OPTIONS if options.get(key) is not None}
    if name in FOREIGN_CHOICES:
        recorded.pop("options", None)
    return {"name": name, "type": kind, "optional": group == "optional", **recorded}


def breaking_changes(old: Schemas, new: Schemas) -> Iterator[str]:
    """Yields a sentence for each change that breaks saved workflows."""
    for node, before in old.items():
        if node not in new:
            yield f"{node} is gone: keep it as deprecated until a node replacement can be registered"
            continue
        yield from _broken_list(f"{node} input", before["inputs"], new[node]["inputs"], _broken_input)
        yield from _broken_list(f"{node} output", before["outputs"], new[node]["outputs"], _broken_output)
        known = {each["name"] for each in before["inputs"]}
        for added in new[node]["inputs"]:
            if added["name"] not in known and not added["optional"]:
                yield f"{node} input {added['name']!r} is new and required: make it optional"


def _broken_list(
    what: str, before: list[dict[str, Any]], after: list[dict[str, Any]], compare: Any
) -> Iterator[str]:
    names = [each["name"] for each in after]
    for place, old in enumerate(before):
        if old["name"] not in names:
            yield f"{what} {old['name']!r} was removed or renamed"
        elif names.index(old["name"]) != place:
            yield f"{what} {old['name']!r} moved from place {place} to {names.index(old['name'])}"
        else:
            yield from (f"{what} {old['name']!r} {change}" for change in compare(old, after[place]))


def _broken_input(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    if old["type"] != new["type"]:
        yield f"has type {new['type']} instead of {old['type']}"
    if old["optional"] and not new["optional"]:
        yield "is required now"
    # A workflow that was saved before a widget was there takes its default; the others decide how many
    # widget values are stored.
    for key in ("default", "forceInput", "control_after_generate"):
        if old.get(key) != new.get(key):
            yield f"has {key} {new.get(key)} instead of {old.get(key)}"
    if new.get("min", -inf) > old.get("min", -inf) or new.get("max", inf) < old.get("max", inf):
        yield f"takes {new.get('min')} to {new.get('max')} instead of {old.get('min')} to {old.get('max')}"
    gone = [choice for choice in old.get("options", []) if choice not in new.get("options", [])]
    if gone:
        yield f"no longer offers {gone}"


def _broken_output(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    for key in ("type", "is_list"):
        if old[key] != new[key]:
            yield f"has {key} {new[key]} instead of {old[key]}"


def differences(old: Schemas, new: Schemas) -> Iterator[str]:
    """Yields a line for everything that is not as recorded, breaking or not."""
    for node in sorted(old.keys() | new.keys()):
        if node not in old or node not in new:
            yield f"{node} is {'new' if node in new else 'gone'}"
            continue
        for part in ("inputs", "outputs"):
            before, after = old[node][part], new[node][part]
            if [each["name"] for each in before] != [each["name"] for each in after]:
                yield f"{node} {part}: {[x['name'] for x in before]} -> {[x['name'] for x in after]}"
                continue
            for each, now in zip(before, after, strict=True):
                if each != now:
                    yield f"{node} {part} {each['name']!r}: {each} -> {now}"


def read_snapshot() -> Schemas:
    """Returns the committed record."""
    return json.loads(SNAPSHOT.read_text(encoding="utf-8"))


def main() -> int:
    """Compares, and records if asked to; returns the process's exit status."""
    exit_on_termination()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--update", action="store_true", help="record the nodes as they are")
    parser.add_argument("--breaking", action="store_true", help="also what breaks saved workflows")
    arguments = parser.parse_args()
    try:
        found = schemas_of(read_object_info(enter_environment(Path(__file__).resolve())))
    except (ScriptError, HyperAlignError, OSError) as error:
        say(f"Error: {error}")
        return 1
    recorded = read_snapshot() if SNAPSHOT.exists() else {}
    changes, broken = list(differences(recorded, found)), list(breaking_changes(recorded, found))
    for line in [*changes, *(f"BREAKS SAVED WORKFLOWS: {line}" for line in broken)]:
        say(line)
    if broken and not arguments.breaking:
        say(f"{len(broken)} changes break saved workflows: undo them, see docs/compatibility.md.")
        return 1
    if not arguments.update:
        say("Record this with --update." if changes else "Nothing differs.")
        return 1 if changes else 0
    SNAPSHOT.parent.mkdir(parents=True, exist_ok=True)
    SNAPSHOT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    say(f"Recorded {len(found)} nodes in {SNAPSHOT.relative_to(ROOT)}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
