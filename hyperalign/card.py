"""The model card of a hypernetwork file: its sources, how it was made, what to beware of."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from .checkpoint import Header, read_header, rewrite_header
from .errors import HyperAlignError
from .files import cannot_write, write_text
from .provenance import HUB, Source

PAPER = "https://arxiv.org/abs/2601.15968"
LICENCES = {
    "Apache-2.0": "license: apache-2.0",
    "CreativeML Open RAIL-M": "license: creativeml-openrail-m",
    "CreativeML Open RAIL++-M": "license: openrail++",
}
"""The hub's identifiers of the base models' licences; other licences are named by link."""

WARNINGS = (
    "**Biases.** The base model, the reward and the preference dataset each carry preferences of the people "
    "and images they came from, and alignment can amplify them: who is shown, in which role, how dressed, in "
    "which style. Audit the reward (`python -m hyperalign audit`) and compare images of the groups "
    "that matter to you with and without HyperAlign before you rely on it.",
    "**Reward hacking.** A reward is a proxy. Judge by what was not optimised: validation rewards, diversity "
    "over seeds, and people.",
    "**Misuse.** What follows prompts more closely follows harmful, misleading and identity-revealing ones "
    "more closely too. Moderate prompts and images where others can use the model, mark images as "
    "generated, and do not depict real people without their consent.",
    "**Licences.** Those above go on to apply; some forbid commercial use, or certain uses.",
)
"""The paper's section 9, and what this project adds."""


def card(header: Header, name: str) -> str:
    """Returns the model card in Markdown, with the front matter that the Hugging Face hub reads.

    Args:
        header: of the file.
        name: of the file, without its ending.
    """
    parts = [
        "\n".join(["---", *_front_matter(header), "---"]),
        f"# {name}",
        _summary(header),
        "## What shaped it",
        *_shaped(header.origins),
        "## Figures",
        _figures(header.training),
        "## How it was made",
        _making(header),
        "## Use",
        f"ComfyUI: put the file into `models/hyperalign` and wire HyperAlign Loader and Apply HyperAlign.\n\n"
        f'diffusers: `hyperalign.attach(pipe, "{name}.safetensors")`.',
        "## Before you use it",
        "\n".join(f"- {warning}" for warning in WARNINGS),
        f"The method is that of [HyperAlign]({PAPER}).",
    ]
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def card_path(path: Path) -> Path:
    """Returns where the card of a hypernetwork lies: beside it, with the ending .md."""
    return path.with_suffix(".md")


def write_card(path: Path, header: Header) -> Path:
    """Writes the card of a hypernetwork beside it, atomically, and returns its path."""
    write(card_path(path), card(header, path.stem))
    return card_path(path)


def record(path: Path) -> Header:
    """Writes what the words of an older file's header tell into it as sources; no tensor's bytes change.

    Raises:
        HyperAlignError: not a hypernetwork, or its header names neither reward nor data.
    """
    header = read_header(path)
    if not header.origins:
        raise HyperAlignError(
            f"The header of {path.name} does not say how it was trained; expected a reward or preference "
            "data in it. Ask whoever trained it."
        )
    recorded = replace(header, sources=header.origins)
    rewrite_header(path, recorded)
    return recorded


def _front_matter(header: Header) -> Iterator[str]:
    bases, _, data = (
        _of_kind(header.origins, kind) for kind in ("base model", "reward", "preference dataset")
    )
    for base in bases:
        yield LICENCES.get(base.licence, "license: other")
        if base.licence not in LICENCES:
            yield f"license_name: {json.dumps(base.licence)}"
            yield f"license_link: {base.page}"
        if base.page.startswith(f"{HUB}/"):
            yield f"base_model: {base.page.removeprefix(f'{HUB}/')}"
            yield "base_model_relation: adapter"
    prefix = f"{HUB}/datasets/"
    if published := [one.page.removeprefix(prefix) for one in data if one.page.startswith(prefix)]:
        yield "datasets:"
        yield from (f"- {name}" for name in published)
    yield "pipeline_tag: text-to-image"
    yield "tags:"
    yield from ("- hyperalign", "- hypernetwork", "- alignment", "- arxiv:2601.15968")


def _summary(header: Header) -> str:
    bases = ", ".join(base.name for base in _of_kind(header.origins, "base model")) or header.family
    when = {
        "S": "at every model evaluation",
        "P": f"at {len(header.schedule.key_times)} key times and the start",
        "I": "once, at the start",
    }[header.schedule.variant]
    return (
        f"A HyperAlign hypernetwork for **{bases}**: while the model samples, it looks at the noisy latent, "
        f"the time and the prompt, and writes rank-{header.network.rank} weights into {len(header.targets)} "
        f"attention projections, {when} (variant {header.schedule.variant})."
    )


def _shaped(sources: Sequence[Source]) -> Iterator[str]:
    if not sources:
        yield "The file does not say. Ask whoever trained it, and treat licence and biases as unknown."
        return
    rows = ["| | what | licence | known biases |", "|---|---|---|---|"]
    for source in sources:
        title = f"[{source.title}]({source.page})" if source.page else source.title
        cells = (source.kind, title, source.licence, source.biases or "none known; nobody may have looked")
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    yield "\n".join(rows)


def _figures(training: dict[str, Any]) -> str:
    metrics = cast("dict[str, Any]", training.get("metrics") or {})
    numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
    if not numbers:
        return "None recorded in the file."
    optimised = cast("dict[str, Any]", training.get("recipe", {}).get("objective", {}).get("rewards", {}))
    rows = ["| on validation prompts | |", "|---|---|"]
    for name, value in numbers.items():
        rows.append(f"| {name}{' (optimised)' if name in optimised else ''} | {value:.4g} |")
    return "\n".join(rows) + (
        "\n\nThe trainer's last evaluation. What was optimised rises even where images get worse; read the "
        "others."
    )


def _making(header: Header) -> str:
    training = header.training
    steps = f"{training['steps']} training steps. " if "steps" in training else ""
    unsafe = f" Preference images: {training['unsafe']}." if training.get("unsafe") else ""
    recipe = training.get("recipe")
    text = f"{steps}Perception: {header.mode}.{unsafe}"
    if not recipe:
        return text
    return f"{text} The recipe:\n\n```json\n{json.dumps(recipe, indent=1)}\n```"


def _of_kind(sources: Sequence[Source], kind: str) -> list[Source]:
    return [source for source in sources if source.kind == kind]


def write(path: Path, text: str) -> None:
    """Writes a card whole or not at all. Raises HyperAlignError."""
    with cannot_write(path, "Make room, or choose another path."):
        write_text(path, text)
