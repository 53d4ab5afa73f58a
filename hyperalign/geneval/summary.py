"""GenEval's metrics: the share of correct images in each task, and both definitions of "overall"."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean

from ..errors import HyperAlignError


@dataclass(frozen=True, slots=True)
class Summary:
    """The counts of an evaluation."""

    tasks: dict[str, tuple[int, int]]
    """By task, in order of occurrence: correct images and all images."""
    prompts: tuple[int, int]
    """Prompts with at least one correct image, and all prompts."""

    @property
    def task_mean(self) -> float:
        """The mean of the tasks' shares: the official "overall score"."""
        return fmean(correct / count for correct, count in self.tasks.values())

    @property
    def image_weighted(self) -> float:
        """The share of correct images among all; papers print it as "overall", too."""
        return sum(correct for correct, _ in self.tasks.values()) / sum(
            count for _, count in self.tasks.values()
        )


def summarise(results: Iterable[tuple[str, str, bool]]) -> Summary:
    """Returns the metrics of (task, prompt, whether the image is correct).

    Raises HyperAlignError when there is none.
    """
    tasks: dict[str, tuple[int, int]] = {}
    prompts: dict[str, bool] = {}
    for tag, prompt, is_correct in results:
        correct, count = tasks.get(tag, (0, 0))
        tasks[tag] = (correct + is_correct, count + 1)
        prompts[prompt] = prompts.get(prompt, False) or is_correct
    if not tasks:
        raise HyperAlignError("There is nothing to summarise: no image was evaluated; evaluate at least one.")
    return Summary(tasks, (sum(prompts.values()), len(prompts)))


def table(summary: Summary) -> str:
    """Returns the metrics as lines of text."""
    lines = [
        f"{tag:<16} {correct / count:8.2%}  ({correct} of {count})"
        for tag, (correct, count) in summary.tasks.items()
    ]
    correct, count = summary.prompts
    lines += [
        f"{'prompts':<16} {correct / count:8.2%}  ({correct} of {count} with a correct image)",
        f"overall, mean of tasks   {summary.task_mean:.5f}  (the official definition)",
        f"overall, image-weighted  {summary.image_weighted:.5f}",
    ]
    return "\n".join(lines)
