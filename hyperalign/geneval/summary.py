"""GenEval's metrics: the share of right images in each task, and both definitions of "overall"."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean

from ..errors import HyperAlignError


@dataclass(frozen=True, slots=True)
class Summary:
    """What a run has come to."""

    tasks: dict[str, tuple[int, int]]
    """By task, in the order they came: right images and all images."""
    prompts: tuple[int, int]
    """Prompts with at least one right image, and all prompts."""

    @property
    def task_mean(self) -> float:
        """The mean of the tasks' shares: the official "overall score"."""
        return fmean(right / count for right, count in self.tasks.values())

    @property
    def image_weighted(self) -> float:
        """The share of right images among all; papers print it as "overall", too."""
        return sum(right for right, _ in self.tasks.values()) / sum(count for _, count in self.tasks.values())


def summarise(results: Iterable[tuple[str, str, bool]]) -> Summary:
    """Returns the metrics of (task, prompt, whether the image is right).

    Raises HyperAlignError when there is none.
    """
    tasks: dict[str, tuple[int, int]] = {}
    prompts: dict[str, bool] = {}
    for tag, prompt, correct in results:
        right, count = tasks.get(tag, (0, 0))
        tasks[tag] = (right + correct, count + 1)
        prompts[prompt] = prompts.get(prompt, False) or correct
    if not tasks:
        raise HyperAlignError("There is nothing to summarise: no image was judged; judge at least one.")
    return Summary(tasks, (sum(prompts.values()), len(prompts)))


def table(summary: Summary) -> str:
    """Returns the metrics as lines of text."""
    lines = [
        f"{tag:<16} {right / count:8.2%}  ({right} of {count})"
        for tag, (right, count) in summary.tasks.items()
    ]
    right, count = summary.prompts
    lines += [
        f"{'prompts':<16} {right / count:8.2%}  ({right} of {count} with a right image)",
        f"overall, mean of tasks   {summary.task_mean:.5f}  (the official definition)",
        f"overall, image-weighted  {summary.image_weighted:.5f}",
    ]
    return "\n".join(lines)
