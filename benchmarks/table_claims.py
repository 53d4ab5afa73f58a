"""What the paper's tables and Figure 12 claim, and whether the rows confirm it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from train.evaluation.table import DIVERSITY, TASK_MEAN, Difference, Metric

Verdict = Literal["confirmed", "refuted", "undecided"]
KEPT = 0.9
"""Share of the base model's diversity that counts as kept."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A claim with what was measured for it."""

    text: str
    measured: str
    verdict: Verdict

    def as_json(self) -> dict[str, Any]:
        """Returns it as JSON types."""
        return asdict(self)


def claims_of(metrics: Sequence[Metric], titles: dict[str, str], optimised: str) -> list[Claim]:
    """Returns the verdicts on the claims whose rows are there.

    Args:
        metrics: with the rows as their sets.
        titles: of the rows.
        optimised: the reward that trainings raise; all other figures are held out.
    """
    by_name = {metric.name: metric for metric in metrics}
    found: list[Claim] = []

    def claim(text: str, name: str, more: str, less: str, factor: float = 1.0) -> None:
        metric = by_name.get(name)
        if metric is None or more not in metric.prompts or less not in metric.prompts:
            return
        difference = gap(metric, more, less, factor)
        share = f"{factor:g} x " if factor != 1.0 else ""
        said = f"{name}, {titles[more]} less {share}{titles[less]}: {interval_text(difference)}"
        found.append(Claim(text, said, verdict(difference)))

    reward_only, preferred_only, ours = "s-reward-only", "s-preference-only", "hyperalign-s"
    claim("Table 3: reward alone raises its own reward most", optimised, reward_only, ours)
    claim("Table 3: reward alone loses held-out figures", TASK_MEAN, ours, reward_only)
    claim("Table 3: preferred images alone gain little; reward adds to them", TASK_MEAN, ours, preferred_only)
    claim("Tables 1, 2, 4: weights for each step beat one generation", TASK_MEAN, ours, "hyperalign-i")
    if (metric := by_name.get(TASK_MEAN)) is not None:
        for text, rivals in (("every other trained method", TRAINED), ("test-time methods", TEST_TIME)):
            if there := [row for row in rivals if row in metric.prompts]:
                claim(
                    f"Tables 1, 2, 4: HyperAlign-S beats {text}",
                    TASK_MEAN,
                    ours,
                    max(there, key=metric.value),
                )
    for row in ("dance-grpo", "mix-grpo"):
        claim("Figure 12: group methods lose diversity", DIVERSITY, "base", row)
    claim("Figure 12: HyperAlign keeps diversity", DIVERSITY, ours, "base", KEPT)
    return found


TRAINED = (
    "alignprop",
    "draft",
    "dpo",
    "kto",
    "spo",
    "dance-grpo",
    "mix-grpo",
    "srpo",
    "sft",
    "reward-only",
    "static",
)
TEST_TIME = ("best-of-n", "epsilon-greedy", "das", "freedom", "dymo")


def gap(metric: Metric, more: str, less: str, factor: float) -> Difference:
    """Returns by how much a row's metric is above another's times a factor, paired over prompts."""
    sets = {"more": metric.prompts[more], "less": factor * metric.prompts[less]}
    return Metric(metric.name, sets, metric.strata).difference("more", "less")


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
