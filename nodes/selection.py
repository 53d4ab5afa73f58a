"""Keeping the images with the best scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker

from ..hyperalign.hosts.comfy import batches
from ..hyperalign.selection import select
from .aliases import aliases
from .choices import check_choices, choice_problem
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
            description="Keeps the images with the best scores, best first, with their latents, masks and seeds. The "
            "rejected images have their own outputs. Nodes after an empty output are skipped without an error.",
            is_input_list=True,
            inputs=_inputs(),
            outputs=[*_outputs(""), *_outputs("rejected_")],
        )

    @classmethod
    def validate_inputs(cls, mode: Any = None) -> bool | str:
        """Rejects an unknown mode before anything runs; inputs are lists here."""
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
        """Returns the selected images, then the rejected images."""
        check_choices(cls, mode=mode)
        images = batches.joined("images", images)
        latent = batches.joined_latents(latents) if latents else None
        mask = batches.joined("masks", masks) if masks else None
        halves = select(scores, mode[0], k[0], threshold[0])
        outputs = [_half(half, scores, images, latent, mask, seeds) for half in halves]
        return io.NodeOutput(*outputs[0], *outputs[1])


def _half(
    indices: Sequence[int], scores: list[float], images: Any, latent: Any, mask: Any, seeds: list[int] | None
) -> list[Any]:
    """Returns images, latents, masks, indices, seeds and scores; an absent output blocks the nodes after it."""
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
        io.Image.Input("images", tooltip="The scored images, in the same order as scores."),
        io.Float.Input(
            "scores",
            force_input=True,
            tooltip="One score per image, from Reward Score or Best-of-N Sampler; higher is better, 0 is a valid score.",
        ),
        io.Combo.Input(
            "mode",
            options=["top-k", "threshold", "sort"],
            default="top-k",
            tooltip="top-k = the k best images; threshold = all images whose score reaches threshold; sort = all images, "
            "none rejected. Always best first.",
        ),
        io.Int.Input(
            "k",
            default=1,
            min=1,
            max=4096,
            tooltip="Number of images that top-k keeps; all images if there are fewer. Not used in other modes. 0 is rejected.",
        ),
        threshold_input(
            "Minimum score in mode threshold, on the reward's scale; 0 = a score of 0 or higher."
        ),
        io.Latent.Input(
            "latents", optional=True, tooltip="The latents of the images; selected together with them."
        ),
        io.Mask.Input(
            "masks",
            optional=True,
            tooltip="The masks of the images; selected together with them. A single mask applies to all images.",
        ),
        io.Int.Input(
            "seeds",
            optional=True,
            force_input=True,
            tooltip="The seeds of the images as a list, from Best-of-N Sampler; 0 is a valid seed. A single seed applies to all images.",
        ),
    ]


def _outputs(prefix: str) -> list[io.Output]:
    which = "rejected" if prefix else "selected"
    return [
        io.Image.Output(display_name=f"{prefix}images", tooltip=f"The {which} images, best first."),
        io.Latent.Output(display_name=f"{prefix}latents", tooltip=f"The latents of the {which} images."),
        io.Mask.Output(display_name=f"{prefix}masks", tooltip=f"The masks of the {which} images."),
        io.Int.Output(
            display_name=f"{prefix}indices",
            is_output_list=True,
            tooltip=f"Indices of the {which} images in the input batch; 0 = the first image.",
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
