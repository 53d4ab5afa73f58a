"""Keeping the images with the best scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker

from ..hyperalign.hosts.comfy import batches as batches
from ..hyperalign.selection import select
from .aliases import aliases
from .choices import choice_problem
from .sockets import threshold_input


class HyperAlignSelect(io.ComfyNode):
    """Splits a batch by its scores."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declares the node."""
        return io.Schema(
            node_id="HyperAlignSelect",
            display_name="Select by Reward",
            category="HyperAlign",
            **aliases("filter images", "top k", "pick best", "sort images", "threshold"),
            description="Keeps the images with the best scores, best first, with their latents, masks and seeds. "
            "The others come out of outputs of their own. What follows an empty output is quietly skipped.",
            is_input_list=True,
            inputs=_inputs(),
            outputs=[*_outputs(""), *_outputs("rejected_")],
        )

    @classmethod
    def validate_inputs(cls, mode: Any = "top-k") -> bool | str:
        """Refuses an unknown mode before anything runs; inputs are lists here."""
        return choice_problem(cls, mode=mode) or True

    @classmethod
    def execute(
        cls,
        images: Any,
        scores: list[float],
        mode: Any,
        k: list[int],
        threshold: list[float],
        latents: Any = None,
        masks: Any = None,
        seeds: list[int] | None = None,
    ) -> io.NodeOutput:
        """Returns the chosen, then the rejected."""
        images = batches.joined("images", images)
        latent = batches.joined_latents(latents) if latents else None
        mask = batches.joined("masks", masks) if masks else None
        halves = select(scores, mode[0], k[0], threshold[0])
        outputs = [_half(half, scores, images, latent, mask, seeds) for half in halves]
        return io.NodeOutput(*outputs[0], *outputs[1])


def _half(
    indices: Sequence[int], scores: list[float], images: Any, latent: Any, mask: Any, seeds: list[int] | None
) -> list[Any]:
    """Returns images, latents, masks, indices, seeds and scores; an absent one ends what would follow it."""
    absent, count = ExecutionBlocker(None), len(scores)
    picked = batches.pick("images", images, indices, count)
    outputs: list[Any] = [
        picked,
        absent if latent is None else batches.pick_latents(latent, indices, count),
        absent if mask is None else batches.pick_masks(mask, indices, count),
        list(indices),
        batches.pick_seeds(seeds, indices, count) if seeds else [absent],
        [scores[index] for index in indices],
    ]
    return outputs if indices else [absent, absent, absent, [absent], [absent], [absent]]


def _inputs() -> list[io.Input]:
    return [
        io.Image.Input("images", tooltip="The images that were scored, in the same order."),
        io.Float.Input(
            "scores",
            force_input=True,
            tooltip="One score per image, from Reward Score or Best-of-N Sampler; greater is better, 0 is a score like any.",
        ),
        io.Combo.Input(
            "mode",
            options=["top-k", "threshold", "sort"],
            default="top-k",
            tooltip="top-k = the k best; threshold = all that reach the threshold; sort = all, none rejected. "
            "Always best first.",
        ),
        io.Int.Input(
            "k",
            default=1,
            min=1,
            max=4096,
            tooltip="How many images top-k keeps; all of fewer. 0 is refused. The other modes do not look at it.",
        ),
        threshold_input(
            "The least score that the mode threshold keeps, in the reward's own units; 0 = a score of 0 or more."
        ),
        io.Latent.Input("latents", optional=True, tooltip="The images' latents; they follow the selection."),
        io.Mask.Input(
            "masks", optional=True, tooltip="The images' masks; they follow the selection. One serves all."
        ),
        io.Int.Input(
            "seeds",
            optional=True,
            force_input=True,
            tooltip="The images' seeds as a list, from Best-of-N Sampler; 0 is a seed like any. One serves all.",
        ),
    ]


def _outputs(prefix: str) -> list[io.Output]:
    which = "rejected" if prefix else "chosen"
    return [
        io.Image.Output(display_name=f"{prefix}images", tooltip=f"The {which} images, best first."),
        io.Latent.Output(display_name=f"{prefix}latents", tooltip=f"The latents of the {which} images."),
        io.Mask.Output(display_name=f"{prefix}masks", tooltip=f"The masks of the {which} images."),
        io.Int.Output(
            display_name=f"{prefix}indices",
            is_output_list=True,
            tooltip=f"Places of the {which} images in the batch that came in; 0 = the first.",
        ),
        io.Int.Output(
            display_name=f"{prefix}seeds", is_output_list=True, tooltip=f"The seeds of the {which} images."
        ),
        io.Float.Output(
            display_name=f"{prefix}scores",
            is_output_list=True,
            tooltip=f"The scores of the {which} images.",
        ),
    ]
