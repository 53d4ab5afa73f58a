"""The model card of a hypernetwork file: its sources, metrics, training and risks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from .checkpoint import Header
from .conditioning import sentences
from .files import cannot_write, write_text
from .finite import is_finite
from .provenance import HUB, Source

PAPER = "https://arxiv.org/abs/2601.15968"
LICENCES = {
    "Apache-2.0": "license: apache-2.0",
    "CreativeML Open RAIL-M": "license: creativeml-openrail-m",
    "CreativeML Open RAIL++-M": "license: openrail++",
}
"""The hub's identifiers of the base models' licences; a card links to other licences."""

WARNINGS = (
    "**Biases.** The base model, the reward and the preference dataset each carry preferences of the people "
    "and images they came from, and alignment can amplify them: who is shown, in which role, how dressed, in "
    "which style. Audit the reward (`python -m hyperalign audit`) and compare images of the groups "
    "that matter to you with and without HyperAlign before you rely on it.",
    "**Reward hacking.** A reward is a proxy. Evaluate by what was not optimised: validation rewards, "
    "diversity over seeds, and people.",
    "**Misuse.** A model that follows prompts more closely also follows harmful, misleading and "
    "identity-revealing ones more closely. Moderate prompts and images where others can use the model, mark "
    "images as generated, and do not depict real people without their consent.",
    "**Licences.** Those above apply to this file, too; some forbid commercial use, or certain uses.",
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
        "## Sources",
        _sources(header.sources),
        "## Metrics",
        "\n\n".join([_metrics(header.training), *sentences(header.training)]),
        "## Training",
        _training(header),
        "## Use",
        f"ComfyUI: put the file into `models/hyperalign` and connect HyperAlign Loader and Apply "
        f'HyperAlign.\n\ndiffusers: `hyperalign.attach(pipe, "{name}.safetensors")`.',
        "## Before you use it",
        "\n".join(f"- {warning}" for warning in WARNINGS),
        f"The method is that of [HyperAlign]({PAPER}).",
    ]
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def card_path(path: Path) -> Path:
    """Returns the path of a hypernetwork's card: beside the file, with the ending .md."""
    return path.with_suffix(".md")


def write_card(path: Path, header: Header) -> Path:
    """Writes the card of a hypernetwork beside it, atomically, and returns its path."""
    write(card_path(path), card(header, path.stem))
    return card_path(path)


def _front_matter(header: Header) -> Iterator[str]:
    bases, _, data = (
        _of_kind(header.sources, kind) for kind in ("base model", "reward", "preference dataset")
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
    bases = ", ".join(base.name for base in _of_kind(header.sources, "base model")) or header.family
    when = {
        "S": "at every model evaluation",
        "P": f"at {len(header.schedule.key_times)} key times and the start",
        "I": "once, at the start",
    }[header.schedule.variant]
    return (
        f"A HyperAlign hypernetwork for **{bases}**: while the model samples, it receives the noisy latent, "
        f"the timestep and the prompt, and generates rank-{header.network.rank} weights for "
        f"{len(header.targets)} attention projections, {when} (variant {header.schedule.variant})."
    )


def _sources(sources: Sequence[Source]) -> str:
    if not sources:
        return "Not recorded in the file. Ask its author, and treat licence and biases as unknown."
    rows = ["| | name | licence | known biases |", "|---|---|---|---|"]
    for source in sources:
        title = f"[{source.title}]({source.page})" if source.page else source.title
        cells = (source.kind, title, source.licence, source.biases or "none recorded")
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def _metrics(training: dict[str, Any]) -> str:
    metrics = _table(training.get("metrics"))
    numbers = {name: value for name, value in metrics.items() if is_finite(value)}
    if not numbers:
        return "None recorded in the file."
    optimised = _table(_table(_table(training.get("recipe")).get("objective")).get("rewards"))
    rows = ["| on validation prompts | |", "|---|---|"]
    for name, value in numbers.items():
        rows.append(f"| {name}{' (optimised)' if name in optimised else ''} | {value:.4g} |")
    return "\n".join(rows) + (
        "\n\nThe trainer's last evaluation. An optimised reward rises even where images get worse; "
        "compare the others."
    )


def _training(header: Header) -> str:
    training = header.training
    steps = f"{training['steps']} training steps. " if "steps" in training else ""
    unsafe = f" Preference images: {training['unsafe']}." if training.get("unsafe") else ""
    recipe = training.get("recipe")
    text = f"{steps}Perception: {header.mode}.{unsafe}"
    if not recipe:
        return text
    return f"{text} The recipe:\n\n```json\n{json.dumps(recipe, indent=1)}\n```"


def _table(value: Any) -> dict[str, Any]:
    """Returns a table of a file's header, an empty one for anything else."""
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _of_kind(sources: Sequence[Source], kind: str) -> list[Source]:
    return [source for source in sources if source.kind == kind]


def write(path: Path, text: str) -> None:
    """Writes a card whole or not at all. Raises HyperAlignError."""
    with cannot_write(path, "Make room, or choose another path."):
        write_text(path, text)
