"""Base against HyperAlign S, P, I and a static LoRA on validation prompts of the embedded model.

    python -m benchmarks.alignment
    python -m benchmarks.alignment --hypernetworks FOLDER --against ONE --out FILE   # any others

Prints a table with 95 % bootstrap intervals of the paired differences to the base and writes
benchmarks/results/alignment.json. Prompts and noise are the same for every method.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from hyperalign.checkpoint import load
from hyperalign.errors import HyperAlignError
from hyperalign.hosts.diffusers.tiny import load_tiny
from hyperalign.intervals import percentile_interval
from hyperalign.tiny.geneval import summarise
from hyperalign.tiny.weights import HYPERNETWORKS
from train.evaluation.table import Difference, Metric, Numbers
from train.models.tiny import Tiny
from train.tiny.evaluate import Samples, Scores, sample_all, score
from train.validation import save_grid

METHODS = ("tiny_s", "tiny_p", "tiny_i", "tiny_static")
"""Those of the package, in this order; others follow by name."""
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True)
class Options:
    """Measures every method on validation prompts."""

    prompts: int = 240
    """Validation prompts, the six families in turn."""
    seeds: tuple[int, ...] = (0, 1)
    """Noise seeds of each prompt."""
    steps: int = 25
    """DDIM steps."""
    guidance: float = 4.0
    """Classifier-free guidance."""
    hypernetworks: Path = HYPERNETWORKS
    """Folder of hypernetworks; a file's name is its method's."""
    against: str = "tiny_static"
    """Another method, besides the base, that all are compared with."""
    grids: Path | None = None
    """Folder for one image sheet per method."""
    out: Path = RESULTS / "alignment.json"
    """Where the figures go."""


def compare(own: Scores, other: Scores, families: Sequence[str]) -> dict[str, dict[str, float]]:
    """Returns the paired differences of two methods with their intervals, and the ratio of their diversities.

    GenEval's prompts are resampled within their family, so that every family keeps its weight.
    """
    groups = [[n for n, family in enumerate(families) if family == name] for name in dict.fromkeys(families)]
    found = {"geneval_overall": values(difference(own.correct.float(), other.correct.float(), groups))}
    for name in ("reward", "validation_reward", "style"):
        found[name] = values(difference(getattr(own, name), getattr(other, name)))
    found["diversity"] = values(difference(own.diversity[:, None], other.diversity[:, None]))
    found["diversity_ratio"] = ratio_of_means(own.diversity, other.diversity)
    return found


def difference(own_PS: Tensor, other_PS: Tensor, strata: Sequence[Sequence[int]] = ()) -> Difference:
    """Returns the mean of the paired differences over prompts."""
    sets = {"own": own_PS.double().mean(dim=1).numpy(), "other": other_PS.double().mean(dim=1).numpy()}
    return Metric("", sets, strata).difference("own", "other")


def values(found: Difference) -> dict[str, float]:
    """Returns a difference with its interval, if it has one."""
    return {"difference": found.value} | ({} if found.interval is None else found.interval._asdict())


def ratio_of_means(own_P: Tensor, other_P: Tensor) -> dict[str, float]:
    """Returns the ratio of two means over the same prompts with its interval."""
    pair = (own_P.double().numpy(), other_P.double().numpy())
    interval = percentile_interval(pair, ratio, paired=True)
    return {"difference": float(ratio(*pair))} | interval._asdict()


def ratio(own: Numbers, other: Numbers, axis: int = -1) -> Any:
    """Returns the ratio of the means along an axis."""
    return own.mean(axis=axis) / other.mean(axis=axis)


def measure(options: Options) -> dict[str, Any]:
    """Samples and scores every method."""
    base = Tiny(load_tiny())
    scores: dict[str, Scores] = {}
    rows: dict[str, Any] = {}
    families: list[str] = []
    for name, path in tqdm(methods_of(options.hypernetworks).items()):
        samples: Samples = sample_all(
            base, load(path) if path else None, options.prompts,
            seeds=options.seeds, steps=options.steps, guidance_scale=options.guidance,
        )  # fmt: skip
        if options.grids:
            save_grid(samples, options.grids / f"{name}.png", rows=8)
        families = [content.family for content in samples.contents]
        scores[name] = score(samples)
        rows[name] = means(scores[name], families) | {
            "seconds_per_image": samples.seconds_per_image,
            "generations_per_run": samples.generations_per_run,
        }
        if name != "base":
            rows[name]["versus_base"] = compare(scores[name], scores["base"], families)
    if other := scores.get(options.against):
        for name in scores.keys() - {"base", options.against}:
            rows[name]["versus_other"] = compare(scores[name], other, families)
    setting = {
        "prompts": options.prompts,
        "seeds": list(options.seeds),
        "steps": options.steps,
        "cfg": options.guidance,
        "against": options.against,
        "sampler": "DDIM, trailing timesteps",
        "torch": torch.__version__,
        "device": f"{base.device.type}, {platform.machine()}",
    }
    return {"setting": setting, "methods": rows}


def methods_of(folder: Path) -> dict[str, Path | None]:
    """Returns the hypernetworks of a folder by method; the base has none. Raises HyperAlignError if empty."""
    found = {path.stem: path for path in sorted(folder.glob("*.safetensors"))}
    if not found:
        raise HyperAlignError(f"There is no hypernetwork (*.safetensors) in {folder}. Name another folder.")
    first = [name for name in METHODS if name in found]
    return {"base": None, **{name: found[name] for name in first}, **found}


def means(scores: Scores, families: list[str]) -> dict[str, Any]:
    """Returns the means over all images."""
    marks = [(f, bool(c)) for f, row in zip(families, scores.correct.tolist(), strict=True) for c in row]
    return {
        "reward": float(scores.reward.mean()),
        "validation_reward": float(scores.validation_reward.mean()),
        "geneval": summarise(marks),  # pyright: ignore
        "style": float(scores.style.mean()),
        "diversity": float(scores.diversity.mean()),
    }


def table(results: dict[str, Any]) -> str:
    """Returns the figures as a Markdown table."""
    lines = [
        "| method | GenEval | difference | validation reward | difference | reward | Fluent | diversity "
        "ratio | weights generated |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in results["methods"].items():
        versus = row.get("versus_base", {})

        def cell(key: str, versus: dict[str, Any] = versus) -> str:
            return interval_text(versus[key]) if key in versus else ""

        ratio = cell("diversity_ratio").replace("+", "") or "1"
        lines.append(
            f"| {name} | {row['geneval']['overall']:.3f} | {cell('geneval_overall')} "
            f"| {row['validation_reward']:.3f} | {cell('validation_reward')} "
            f"| {row['reward']:.3f} | {row['style']:.3f} | {ratio} "
            f"| {row['generations_per_run']} |"
        )
    lines += [
        f"\n{name} against {results['setting']['against']}: {differences(row['versus_other'])}"
        for name, row in results["methods"].items()
        if "versus_other" in row
    ]
    return "\n".join(lines)


def interval_text(found: Mapping[str, float]) -> str:
    """Returns a difference with its interval, if it has one."""
    text = f"{found['difference']:+.3f}"
    return f"{text} [{found['low']:+.3f}, {found['high']:+.3f}]" if "low" in found else text


def differences(versus: dict[str, Any]) -> str:
    """Returns what no training optimised of a comparison, in one line."""
    return ", ".join(
        f"{name.replace('_', ' ')} {interval_text(found)}"
        for name, found in versus.items()
        if name in ("geneval_overall", "validation_reward")
    )


def families_table(results: dict[str, Any]) -> str:
    """Returns each method's share of right images per family as a Markdown table."""
    methods = results["methods"]
    families = [name for name in methods["base"]["geneval"] if name != "overall"]
    rows = [
        f"| {method} | " + " | ".join(f"{row['geneval'][family]:.3f}" for family in families) + " |"
        for method, row in methods.items()
    ]
    titles = " | ".join(family.replace("_", " ") for family in families)
    return "\n".join([f"| method | {titles} |", "|---" * (len(families) + 1) + "|", *rows])


def main(options: Options) -> None:
    """Measures, prints the table and writes the figures."""
    results = measure(options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1), encoding="utf-8")
    print(table(results))
    print()
    print(families_table(results))


if __name__ == "__main__":
    main(tyro.cli(Options))
