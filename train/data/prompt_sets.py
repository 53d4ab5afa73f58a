"""The prompt lists of training and of the paper's four tests, from the published files.

The paper tests on 1K prompts of Pick-a-Pic, 500 of HPD, 1K of PartiPrompts and 2K images of GenEval, four of
each prompt; it does not say which. Here a prompt's hash decides, so the lists are the same everywhere.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hyperalign.errors import HyperAlignError
from hyperalign.files import cannot_write, write_bytes, write_text
from hyperalign.geneval.prompts import read_metadata
from train.data.prompts import load_prompts

HPD_STYLES = ("anime", "concept-art", "paintings", "photo")
"""The styles of HPDv2's benchmark, 800 prompts each."""
PICKAPIC_TEST, HPD_TEST, PARTI_TEST = 1000, 500, 1000
"""The paper's numbers of test prompts."""
REPORT_FILE = "prompt_sets.json"


@dataclass(frozen=True, slots=True)
class PublishedFile:
    """A file to download: where it is looked for, and the command."""

    pattern: str
    """Below the folder of published files; a pattern may match several."""
    size: str
    command: str
    """With {folder} for that folder."""


PICKAPIC_COMMAND = (
    "hf download yuvalkirstain/pickapic_v2_no_images --repo-type dataset --local-dir {folder}/pickapic"
)
HPD_COMMAND = (
    'hf download zhwang/HPDv2 --repo-type dataset --include "benchmark/*.json" --local-dir {folder}/hpdv2'
)
GITHUB = "https://raw.githubusercontent.com"
PUBLISHED = {
    "pickapic train": PublishedFile("pickapic/data/train-*.parquet", "282 MB", PICKAPIC_COMMAND),
    "pickapic validation": PublishedFile(
        "pickapic/data/validation_unique-*.parquet", "149 kB", PICKAPIC_COMMAND
    ),
    "pickapic test": PublishedFile("pickapic/data/test_unique-*.parquet", "151 kB", PICKAPIC_COMMAND),
    **{
        f"hpd {style}": PublishedFile(f"hpdv2/benchmark/{style}.json", size, HPD_COMMAND)
        for style, size in zip(HPD_STYLES, ("63 kB", "86 kB", "81 kB", "45 kB"), strict=True)
    },
    "parti": PublishedFile(
        "parti/PartiPrompts.tsv", "123 kB",
        f"curl -L --create-dirs -o {{folder}}/parti/PartiPrompts.tsv "
        f"{GITHUB}/google-research/parti/main/PartiPrompts.tsv",
    ),
    "geneval": PublishedFile(
        "geneval/evaluation_metadata.jsonl", "85 kB",
        f"curl -L --create-dirs -o {{folder}}/geneval/evaluation_metadata.jsonl "
        f"{GITHUB}/djghosh13/geneval/main/prompts/evaluation_metadata.jsonl",
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class PromptSets:
    """Disjoint lists of prompts by the name of their file, and what was counted on the way."""

    lists: dict[str, list[str]]
    geneval: bytes
    """GenEval's metadata as it was published."""
    report: dict[str, dict[str, int]]


def find_published(folder: Path) -> dict[str, list[Path]]:
    """Returns the published files by name.

    Raises:
        HyperAlignError: some are missing; names each, with the commands that download them.
    """
    found = {name: sorted(folder.glob(file.pattern)) for name, file in PUBLISHED.items()}
    missing = [PUBLISHED[name] for name, files in found.items() if not files]
    if missing:
        commands = "\n".join(dict.fromkeys(file.command.format(folder=folder) for file in missing))
        listed = ", ".join(f"{file.pattern} ({file.size})" for file in missing)
        raise HyperAlignError(f"{folder} lacks {listed}. Download them with\n{commands}")
    return found


def make_prompt_sets(files: dict[str, list[Path]], train: int, validation: int) -> PromptSets:
    """Returns the training list, the validation list and the test lists.

    No training or validation prompt equals one of any test source, whether that source's prompt was chosen or
    not; prompts are equal that differ in case, punctuation and spaces alone.

    Args:
        files: the published files by name.
        train: prompts of the training list; fewer if there are not as many.
        validation: prompts of the validation list.

    Raises:
        HyperAlignError: a file cannot be read, or holds too few prompts.
    """
    sources = {
        name: [prompt for path in paths for prompt in _one_line(load_prompts(path))]
        for name, paths in files.items()
    }
    tests = {
        "test_pickapic": chosen([*sources["pickapic validation"], *sources["pickapic test"]], PICKAPIC_TEST),
        "test_hpd": [
            prompt
            for style in HPD_STYLES
            for prompt in chosen(sources[f"hpd {style}"], HPD_TEST // len(HPD_STYLES))
        ],
        "test_parti": chosen(sources["parti"], PARTI_TEST),
    }
    geneval = files["geneval"][0]
    read_metadata(geneval)
    kept, report = dict[str, list[str]](), dict[str, dict[str, int]]()
    taken = {normalised(prompt) for prompt in sources["geneval"]}
    report["test_geneval"] = {"written": len(sources["geneval"])}
    for name, prompts in tests.items():
        kept[name], report[name] = without(prompts, taken)
        taken |= {normalised(prompt) for prompt in kept[name]}
    forbidden = {
        normalised(prompt)
        for name, prompts in sources.items() if name != "pickapic train"
        for prompt in prompts
    }  # fmt: skip
    pool, counts = without(sources["pickapic train"], forbidden)
    if len(pool) <= validation:
        raise HyperAlignError(
            f"{files['pickapic train'][0].parent} leaves {len(pool)} training prompts; expected more than "
            f"the {validation} of the validation list. Download Pick-a-Pic again, or lower --validation."
        )
    by_hash = sorted(pool, key=_hash)
    lists = {
        "validation": set(by_hash[:validation]),
        "prompts": set(by_hash[validation : validation + train]),
    }
    for name, members in lists.items():
        kept[name] = [prompt for prompt in pool if prompt in members]
        report[name] = counts | {"written": len(kept[name])}
    return PromptSets(kept, geneval.read_bytes(), report)


def write_prompt_sets(sets: PromptSets, out: Path) -> dict[str, Path]:
    """Writes one prompt a line, GenEval's metadata, and counts and checksums. Raises HyperAlignError."""
    paths = {name: out / f"{name}.txt" for name in sets.lists} | {"test_geneval": out / "test_geneval.jsonl"}
    with cannot_write(out, "Choose another --out, or make room."):
        for name, prompts in sets.lists.items():
            write_text(paths[name], "".join(f"{prompt}\n" for prompt in prompts))
        write_bytes(paths["test_geneval"], sets.geneval)
        table = {
            path.name: sets.report[name] | {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
            for name, path in paths.items()
        }
        write_text(out / REPORT_FILE, json.dumps(table, indent=1) + "\n")
    return paths


def normalised(prompt: str) -> str:
    """Returns a prompt's letters and digits in lower case, with single spaces; itself if it has none."""
    text = unicodedata.normalize("NFKC", prompt).casefold()
    words = "".join(letter if letter.isalnum() else " " for letter in text).split()
    return " ".join(words) or prompt.strip()


def chosen(prompts: Sequence[str], count: int) -> list[str]:
    """Returns `count` distinct prompts that their hashes decide, in the source's order.

    Raises:
        HyperAlignError: there are fewer.
    """
    first = {normalised(prompt): prompt for prompt in reversed(prompts)}
    if len(first) < count:
        raise HyperAlignError(
            f"Found {len(first)} distinct prompts from {prompts[0]!r} on; expected at least {count}. "
            "Download the published files again."
        )
    members = set(sorted(first.values(), key=_hash)[:count])
    return [prompt for prompt in dict.fromkeys(prompts) if prompt in members]


def without(prompts: Iterable[str], taken: set[str]) -> tuple[list[str], dict[str, int]]:
    """Returns the distinct prompts that are not taken, and how many were read and left out and why."""
    kept, read, overlap = dict[str, str](), 0, 0
    for prompt in prompts:
        read += 1
        name = normalised(prompt)
        overlap += name in taken
        if name not in taken:
            kept.setdefault(name, prompt)
    counts = {"read": read, "duplicates": read - overlap - len(kept), "in other lists": overlap}
    return list(kept.values()), counts | {"written": len(kept)}


def _hash(prompt: str) -> str:
    return hashlib.sha256(normalised(prompt).encode()).hexdigest()


def _one_line(prompts: Iterable[str]) -> list[str]:
    return [" ".join(prompt.split()) for prompt in prompts]
