"""Base against HyperAlign S, P, I and a static LoRA on validation prompts of the embedded model.

    python -m benchmarks.alignment
    python -m benchmarks.alignment --hypernetworks FOLDER --against ONE --out FILE   # any others

Prints a table with 95 % bootstrap intervals of the paired differences to the base and writes
benchmarks/results/alignment.json. Prompts and noise are the same for every method.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
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
from hyperalign.tiny.geneval import summarise
from hyperalign.tiny.weights import HYPERNETWORKS
from train.models.tiny import Tiny
from train.tiny.evaluate import Samples, Scores, sample_all, score
from train.validation import save_grid

METHODS = ("tiny_s", "tiny_p", "tiny_i", "tiny_static")
"""Those of the package, in this order; others follow by name."""
RESULTS = Path(__file__).parent / "results"
RESAMPLES = 2000


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


def overall(correct_PS: Tensor, families: list[str]) -> float:
    """Returns GenEval's overall: the mean of the families' shares."""
    return _overall(correct_PS.float().mean(dim=1), _members(families))


def _members(families: list[str]) -> Tensor:
    names = sorted(set(families))
    return torch.tensor([[float(family == name) for family in families] for name in names])


def _overall(share_P: Tensor, members_FP: Tensor) -> float:
    return float((members_FP @ share_P / members_FP.sum(dim=1)).mean())


def interval(difference_of: Callable[[Tensor], float], families: list[str]) -> tuple[float, float]:
    """Returns the 95 % percentile bootstrap interval of a statistic of resampled prompts.

    Prompts are resampled within their family, so that every family keeps its weight.
    """
    generator = torch.Generator().manual_seed(0)
    groups = [
        torch.tensor([i for i, f in enumerate(families) if f == name]) for name in sorted(set(families))
    ]
    values: list[float] = []
    for _ in range(RESAMPLES):
        rows = torch.cat([g[torch.randint(len(g), (len(g),), generator=generator)] for g in groups])
        values.append(difference_of(rows))
    low, high = torch.tensor(values, dtype=torch.float64).quantile(
        torch.tensor([0.025, 0.975], dtype=torch.float64)
    )
    return float(low), float(high)


def compare(scores: Scores, base: Scores, families: list[str]) -> dict[str, Any]:
    """Returns the paired differences to the base with their intervals."""
    result: dict[str, Any] = {}
    members = _members(families)
    gain_P = scores.correct.float().mean(dim=1) - base.correct.float().mean(dim=1)

    def overall_of(rows: Tensor) -> float:
        return _overall(gain_P[rows], members[:, rows])

    low, high = interval(overall_of, families)
    result["geneval_overall"] = {
        "difference": overall_of(torch.arange(len(families))),
        "low": low,
        "high": high,
    }
    pairs = {
        "reward": scores.reward - base.reward,
        "validation_reward": scores.validation_reward - base.validation_reward,
        "style": scores.style - base.style,
        "diversity": (scores.diversity - base.diversity)[:, None],
    }
    for name, difference_PS in pairs.items():
        mean_P = difference_PS.mean(dim=1)
        low, high = interval(lambda rows, mean_P=mean_P: float(mean_P[rows].mean()), families)
        result[name] = {"difference": float(mean_P.mean()), "low": low, "high": high}
    ratio = float(scores.diversity.mean() / base.diversity.mean())
    low, high = interval(
        lambda rows: float(scores.diversity[rows].mean() / base.diversity[rows].mean()), families
    )
    result["diversity_ratio"] = {"difference": ratio, "low": low, "high": high}
    return result


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
            if key not in versus:
                return ""
            v = versus[key]
            return f"{v['difference']:+.3f} [{v['low']:+.3f}, {v['high']:+.3f}]"

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


def differences(versus: dict[str, Any]) -> str:
    """Returns what no training optimised of a comparison, in one line."""
    return ", ".join(
        f"{name.replace('_', ' ')} {v['difference']:+.3f} [{v['low']:+.3f}, {v['high']:+.3f}]"
        for name, v in versus.items()
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
