"""What the paper's tables and Figure 12 claim, and whether the rows confirm it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from train.evaluation.table import DIVERSITY, TASK_MEAN, Difference, Metric

Verdict = Literal["confirmed", "refuted", "undecided"]
Contrast = Mapping[str, float]
"""By row, what its metric is multiplied with in a sum that is compared with zero."""
KEPT = 0.9
"""Share of the base model's diversity that counts as kept."""
OURS, ONCE, REWARD_ONLY, PREFERRED_ONLY = "hyperalign-s", "hyperalign-i", "s-reward-only", "s-preference-only"
TRAINED = (
    "alignprop", "draft", "dpo", "kto", "spo", "dance-grpo", "mix-grpo", "srpo", "sft", "reward-only",
    "static",
)  # fmt: skip
TEST_TIME = ("best-of-n", "epsilon-greedy", "das", "freedom", "dymo")


@dataclass(frozen=True, slots=True)
class Claim:
    """A claim with what was measured for it."""

    text: str
    measured: str
    verdict: Verdict

    def as_json(self) -> dict[str, Any]:
        """Returns it as JSON types."""
        return asdict(self)


def claims_of(
    metrics: Sequence[Metric],
    by_seed: Mapping[str, Mapping[str, Sequence[float]]],
    titles: Mapping[str, str],
    optimised: str,
) -> list[Claim]:
    """Returns the verdicts on the claims whose rows are there.

    Args:
        metrics: with the rows as their sets.
        by_seed: by metric and row, its value for each training; one value where a row is not trained.
        titles: of the rows.
        optimised: the reward that trainings raise; all other figures are held out.
    """
    found: list[Claim] = []
    by_name = {metric.name: metric for metric in metrics}
    for text, name, contrast in contrasts_of(by_name, optimised):
        metric = by_name.get(name)
        if metric is None or not contrast.keys() <= metric.prompts.keys():
            continue
        difference = contrast_of(metric, contrast)
        said = f"{name}, {contrast_text(contrast, titles)}: {interval_text(difference)}"
        seeds = seed_contrasts(by_seed.get(name, {}), contrast)
        if len(seeds) > 1:
            said += f"; by seed {', '.join(f'{value:+.3f}' for value in seeds)}"
        found.append(Claim(text, said, verdict(difference)))
    return found


def contrasts_of(metrics: Mapping[str, Metric], optimised: str) -> list[tuple[str, str, Contrast]]:
    """Returns each claim, the metric it is about, and the sum of rows that it says is above zero.

    Claims about quality come once for each held-out figure: GenEval and the rewards that no training raises.
    """
    names = [name for name in metrics if name not in (optimised, DIVERSITY)]
    held_out = names[: names.index(TASK_MEAN) + 1] if TASK_MEAN in names else names
    found: list[tuple[str, str, Contrast]] = [
        ("Table 3: reward alone raises its own reward most", optimised, {REWARD_ONLY: 1, OURS: -1})
    ]
    claims: list[tuple[str, Contrast]] = [
        ("Table 3: reward alone loses held-out figures", {OURS: 1, REWARD_ONLY: -1}),
        ("Table 3: reward alone falls below the base model there", {"base": 1, REWARD_ONLY: -1}),
        (
            "Table 3: preferred images alone bring less than half of the gain",
            {OURS: 0.5, "base": 0.5, PREFERRED_ONLY: -1},
        ),
        ("Table 3: reward adds to preferred images", {OURS: 1, PREFERRED_ONLY: -1}),
        ("Tables 1, 2, 4: HyperAlign-S beats the base model", {OURS: 1, "base": -1}),
        ("Tables 1, 2, 4: weights for each step beat one generation", {OURS: 1, ONCE: -1}),
    ]
    found += [(text, name, contrast) for text, contrast in claims for name in held_out]
    for text, rivals in (("every other trained method", TRAINED), ("test-time methods", TEST_TIME)):
        for name in held_out:
            if there := [row for row in rivals if row in metrics[name].prompts]:
                strongest = max(there, key=metrics[name].value)
                found.append((f"Tables 1, 2, 4: HyperAlign-S beats {text}", name, {OURS: 1, strongest: -1}))
    for row in ("dance-grpo", "mix-grpo"):
        found.append(("Figure 12: group methods lose diversity", DIVERSITY, {"base": 1, row: -1}))
    found.append(("Figure 12: HyperAlign keeps diversity", DIVERSITY, {OURS: 1, "base": -KEPT}))
    return found


def contrast_of(metric: Metric, contrast: Contrast) -> Difference:
    """Returns a sum of rows with its interval, paired over prompts."""
    values = np.sum([factor * metric.prompts[row] for row, factor in contrast.items()], axis=0)
    sets = {"sum": values, "zero": np.zeros_like(values)}
    return Metric(metric.name, sets, metric.strata).difference("sum", "zero")


def seed_contrasts(values: Mapping[str, Sequence[float]], contrast: Contrast) -> list[float]:
    """Returns the sum for each training seed; nothing where the seeds of a row are unknown."""
    if not contrast.keys() <= values.keys():
        return []
    count = max(len(values[row]) for row in contrast)
    return [
        sum(factor * values[row][seed % len(values[row])] for row, factor in contrast.items())
        for seed in range(count)
    ]


def contrast_text(contrast: Contrast, titles: Mapping[str, str]) -> str:
    """Returns a sum of rows in words: those that are added, less the others."""
    named = {
        row: titles[row] if abs(factor) == 1 else f"{abs(factor):g} x {titles[row]}"
        for row, factor in contrast.items()
    }
    more, less = (
        " + ".join(named[row] for row, factor in contrast.items() if (factor > 0) is positive)
        for positive in (True, False)
    )
    return f"{more} less {less}"


def verdict(found: Difference) -> Verdict:
    """Returns confirmed where the interval is above zero, refuted where it is below."""
    if found.interval is None or not found.is_significant:
        return "undecided"
    return "confirmed" if found.interval.low > 0.0 else "refuted"


def interval_text(found: Difference) -> str:
    """Returns a difference with its interval."""
    if found.interval is None:
        return f"{found.value:+.3f}"
    low, high = found.interval
    return f"{found.value:+.3f} [{low:+.3f}, {high:+.3f}]"
