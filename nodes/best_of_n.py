"""Drawing many and keeping the best."""

from __future__ import annotations

import math
from typing import Any

from comfy_api.latest import io, ui

from ..hyperalign.hosts.comfy import model as host
from ..hyperalign.hosts.comfy import search as comfy_search
from ..hyperalign.search import MODES, Plan
from .aliases import aliases
from .choices import choice_problem
from .sampler import sampling_widgets
from .sockets import (
    HyperAlignType,
    RewardType,
    conditioning_inputs,
    strength_input,
    threshold_input,
    variant_input,
)


class HyperAlignBestOfN(io.ComfyNode):
    """Samples several seeds and keeps what a reward likes best."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declares the node."""
        return io.Schema(
            node_id="HyperAlignBestOfN",
            display_name="Best-of-N Sampler",
            category="HyperAlign",
            **aliases("batch seeds", "seed search", "noise search", "zero order", "test-time scaling"),
            description="KSampler for several seeds that keeps the images a reward likes best. Costs as much time "
            "as it draws images; memory does not grow with them. Cancel returns the best so far.",
            inputs=[*_sockets(), *sampling_widgets(), *_search_widgets(), *_noise_widgets(), *_optional()],
            outputs=_outputs(),
        )

    @classmethod
    def validate_inputs(
        cls,
        variant: str = "auto",
        sampler_name: str = "euler",
        scheduler: str = "normal",
        mode: str = MODES[0],
    ) -> bool | str:
        """Refuses unknown choices before anything runs; the host itself checks the numbers."""
        chosen = {"variant": variant, "sampler_name": sampler_name, "scheduler": scheduler, "mode": mode}
        return choice_problem(cls, **chosen) or True

    @classmethod
    def fingerprint_inputs(cls, seed: int | None = None, **_: Any) -> int:
        """Makes the host draw again after a search that was cancelled, instead of giving its result."""
        # A linked seed is not known yet: the host gives None.
        return comfy_search.CANCELLED.total() if seed is None else comfy_search.CANCELLED[seed]

    @classmethod
    def execute(
        cls, model: Any, reward: Any, vae: Any, prompt: str, latent_image: Any, seed: int, count: int,
        mode: Any, batch_size: int, keep: int, early_stop: bool, threshold: float, radius: float,
        epsilon: float, round_size: int, hypernetwork: Any = None, variant: Any = "auto",
        strength: float = 1.0, iterations: int = 4, **sampling: Any,
    ) -> io.NodeOutput:  # fmt: skip
        """Returns the best latents and images with their scores and seeds."""
        stop_at = threshold if early_stop else math.inf
        plan = Plan(count, seed, mode, batch_size, keep, stop_at, round_size, radius, epsilon, iterations)
        if hypernetwork is not None:
            model = host.apply(model, hypernetwork, strength, variant=variant)
        settings = comfy_search.Sampling(model, latent=latent_image, **sampling)
        found = comfy_search.search(settings, plan, reward, vae, prompt)
        table = found.table(reward.name, count)
        latent = {key: value for key, value in latent_image.items() if key != "batch_index"}
        latent["samples"] = found.latents
        return io.NodeOutput(
            latent, found.images_BHWC, found.scores, found.seeds, table, ui=ui.PreviewText(table)
        )


def _sockets() -> list[io.Input]:
    return [
        io.Model.Input("model", tooltip="Any model that KSampler takes. It is not changed."),
        *conditioning_inputs(),
        io.Latent.Input(
            "latent_image",
            tooltip="One latent to start from, an empty one for new images; its batch_size is 1.",
        ),
        io.Vae.Input("vae", tooltip="Decodes each sample so that it can be judged."),
        RewardType.Input("reward", tooltip="From Reward Model Loader. A chain combined by rank is refused."),
        io.String.Input(
            "prompt",
            multiline=True,
            default="a red heart",
            tooltip="The prompt the images are judged against, usually that of positive; empty = against the empty prompt.",
        ),
    ]


def _search_widgets() -> list[io.Input]:
    return [
        io.Int.Input(
            "count",
            default=8,
            min=1,
            max=4096,
            tooltip="How many images are drawn at most; time grows with it, memory does not. 0 is refused.",
        ),
        io.Combo.Input(
            "mode",
            options=list(MODES),
            default="best-of-N",
            tooltip="best-of-N = every image from its own seed: seed, seed + 1, ...; zero-order = rounds of noise "
            "near the best so far; epsilon-greedy = the same, with fresh noise now and then; epsilon-greedy-steps = "
            "each image from its own seed, with the noise of every step searched; needs an ancestral sampler.",
        ),
        io.Int.Input(
            "batch_size",
            default=1,
            min=1,
            max=64,
            tooltip="How many images are drawn at once. 1 = least memory; more is faster on large GPUs. 0 is refused.",
        ),
        io.Int.Input(
            "keep", default=1, min=1, max=256, tooltip="How many of the best are returned. 0 is refused."
        ),
        io.Boolean.Input(
            "early_stop",
            default=False,
            tooltip="On = the first score that reaches the threshold ends the search.",
        ),
        threshold_input(
            "The score that ends the search if early_stop is on, in the reward's own units; 0 = a score of 0 or more."
        ),
    ]


def _noise_widgets() -> list[io.Input]:
    """Returns what only the modes that search near the best noise look at."""
    return [
        io.Float.Input(
            "radius",
            default=0.5,
            min=0.01,
            max=10.0,
            step=0.01,
            tooltip="How far zero-order and epsilon-greedy go from the best noise, as a part of fresh noise, and how "
            "far at most epsilon-greedy-steps. 0 would draw the same image again and is refused; small = variations "
            "of the best.",
        ),
        io.Float.Input(
            "epsilon",
            default=0.4,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="How often epsilon-greedy and epsilon-greedy-steps draw fresh noise, as a fraction. 0 = never, "
            "which is zero-order; 1 = always, which is best-of-N.",
        ),
        io.Int.Input(
            "round_size",
            default=4,
            min=1,
            max=256,
            tooltip="After how many images zero-order and epsilon-greedy move to the best noise so far; in "
            "epsilon-greedy-steps, how many noises each round of a step tries. 0 is refused.",
        ),
    ]


def _optional() -> list[io.Input]:
    inputs: list[io.Input] = [
        HyperAlignType.Input("hypernetwork", tooltip="From HyperAlign Loader; every image is then aligned."),
        variant_input(),
        strength_input(),
        io.Int.Input(
            "iterations",
            default=4,
            min=1,
            max=256,
            tooltip="Rounds of round_size noises that epsilon-greedy-steps tries at every step; the paper has 20 of 4. "
            "Each noise costs a model evaluation, a decoding and a reward. Other modes do not look at it; 0 is refused.",
        ),
    ]
    for each in inputs:
        each.optional = True
    return inputs


def _outputs() -> list[io.Output]:
    return [
        io.Latent.Output(display_name="latent", tooltip="The kept latents, best first."),
        io.Image.Output(display_name="images", tooltip="The kept images, best first."),
        io.Float.Output(
            display_name="scores", is_output_list=True, tooltip="The kept images' scores, as a list."
        ),
        io.Int.Output(
            display_name="seeds",
            is_output_list=True,
            tooltip="The kept images' seeds, as a list. In mode best-of-N, KSampler draws the same image from one.",
        ),
        io.String.Output(
            display_name="table", tooltip="Every candidate's seed and score; kept ones have a star."
        ),
    ]
