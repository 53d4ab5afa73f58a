"""Comparison of base and aligned images, pair by pair."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..hyperalign.hosts.comfy.batches import joined, paired
from ..hyperalign.prompts import LINES, on_one_line, prompts_for_batches
from .aliases import aliases
from .choices import check_choices, choice_problem
from .drawing import grid, with_badges
from .sockets import RewardType, lines_input, only, prompt_input

COLUMNS = 8


class HyperAlignCompare(io.ComfyNode):
    """Puts two batches of the same seeds side by side."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declares the node."""
        return io.Schema(
            node_id="HyperAlignCompare",
            display_name="Compare",
            category="HyperAlign",
            **aliases("side by side", "a/b", "compare images", "grid"),
            description="Shows base images above aligned images of the same seeds, with the reward score under each image. "
            "Generate both batches with the same seed, so that they differ in the alignment only.",
            is_input_list=True,
            is_output_node=True,
            inputs=[
                io.Image.Input("base", tooltip="Images without alignment: the upper row."),
                io.Image.Input(
                    "aligned",
                    tooltip="The same number of images with alignment, from the same seeds: the lower row.",
                ),
                RewardType.Input(
                    "reward",
                    tooltip="From Reward Model Loader; preferably one that was not used in training.",
                ),
                prompt_input(),
                _label_input("base"),
                _label_input("aligned"),
                lines_input(),
            ],
            outputs=[
                io.Image.Output(display_name="grid", tooltip="All images and their scores in one image."),
                io.Float.Output(
                    display_name="gain",
                    tooltip="Mean score of aligned minus mean score of base; above 0 = aligned is better.",
                ),
                io.String.Output(
                    display_name="table",
                    tooltip="The scores of each pair and the number of wins of aligned, as text.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, lines: Any = None) -> bool | str:
        """Rejects an unknown choice before anything runs; inputs are lists here."""
        return choice_problem(cls, lines=lines) or True

    @classmethod
    def execute(
        cls, base: Any, aligned: Any, reward: Any, prompt: Any, base_label: Any = "base",
        aligned_label: Any = "aligned", lines: Any = LINES[0],
    ) -> io.NodeOutput:  # fmt: skip
        """Returns the grid, the mean gain and a table."""
        reward, upper, lower, lines = only(
            reward=reward, base_label=base_label, aligned_label=aligned_label, lines=lines
        )
        check_choices(cls, lines=lines)
        counts = [len(batch) for batch in _batches(base)]
        base, aligned = joined("base", _batches(base)), joined("aligned", _batches(aligned))
        pairs = paired(base, aligned)
        prompts = prompts_for_batches(prompt, counts, lines)
        scores = reward.score(pairs, prompts * 2)
        before, after = scores[: len(base)], scores[len(base) :]
        labels = upper.strip(), lower.strip()
        image = _grid(base, aligned, before, after, labels)
        gains = [second - first for first, second in zip(before, after, strict=True)]
        table = _table(reward.name, before, after, prompts, labels)
        shown = ui.PreviewImage(image, cls=cls).as_dict() | ui.PreviewText(table).as_dict()
        return io.NodeOutput(image, sum(gains) / len(gains), table, ui=shown)


def _batches(images: Any) -> list[Any]:
    return images if isinstance(images, list) else [images]


def _label_input(row: str) -> io.String.Input:
    return io.String.Input(
        f"{row}_label",
        default=row,
        optional=True,
        tooltip=f"Text before the scores of {row}, such as the name of a setting; empty = the score only.",
    )


def _grid(base: Any, aligned: Any, before: list[float], after: list[float], labels: tuple[str, str]) -> Any:
    """Returns one image with the aligned row below each base row."""
    upper, lower = (
        with_badges(images, [f"{label} {score:.4f}".strip() for score in scores])
        for images, label, scores in zip((base, aligned), labels, (before, after), strict=True)
    )
    starts = range(0, len(upper), COLUMNS)
    return grid([row[at : at + COLUMNS] for at in starts for row in (upper, lower)])


def _table(
    name: str, before: list[float], after: list[float], prompts: list[str], labels: tuple[str, str]
) -> str:
    rows = list(zip(before, after, prompts, strict=True))
    wins = sum(second > first for first, second, _ in rows)
    lines = [
        f"{index:>3}  {first:+8.4f}  {second:+8.4f}  {second - first:+8.4f}  {on_one_line(prompt)}"
        for index, (first, second, prompt) in enumerate(rows)
    ]
    first, second = (label or row for label, row in zip(labels, ("base", "aligned"), strict=True))
    heading = f"{name}: {second} wins {wins} of {len(rows)}\n  #  {first:>8}  {second:>8}      gain"
    return "\n".join([heading, *lines])
