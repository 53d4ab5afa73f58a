"""Generating many images and keeping the best."""

from __future__ import annotations

import math
from typing import Any

from comfy_api.latest import io, ui

from ..hyperalign.hosts.comfy.model import apply
from ..hyperalign.hosts.comfy.sampling import sampled
from ..hyperalign.hosts.comfy.search import CANCELLED, Sampling, search
from ..hyperalign.search import MODES, Plan
from .aliases import aliases
from .choices import check_choices, choice_problem
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
    """Samples several seeds and keeps the images with the best reward scores."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declares the node."""
        return io.Schema(
            node_id="HyperAlignBestOfN",
            display_name="Best-of-N Sampler",
            category="HyperAlign",
            **aliases("batch seeds", "seed search", "noise search", "zero order", "test-time scaling"),
            description="KSampler for several seeds that keeps the images with the best reward scores. Time grows with the "
            "number of generated images, memory does not. Cancel returns the best images so far.",
            inputs=[*_sockets(), *sampling_widgets(), *_search_widgets(), *_noise_widgets(), *_optional()],
            outputs=_outputs(),
        )

    @classmethod
    def validate_inputs(
        cls,
        variant: str | None = None,
        sampler_name: str | None = None,
        scheduler: str | None = None,
        mode: str | None = None,
    ) -> bool | str:
        """Rejects unknown choices before anything runs; the host itself checks numbers."""
        chosen = {"variant": variant, "sampler_name": sampler_name, "scheduler": scheduler, "mode": mode}
        return choice_problem(cls, **chosen) or True

    @classmethod
    def fingerprint_inputs(cls, seed: int | None = None, **_: Any) -> int:
        """Makes the host search again after a cancelled search, instead of returning its cached result."""
        # A linked seed is not known yet: the host passes None.
        return CANCELLED.total() if seed is None else CANCELLED[seed]

    @classmethod
    def execute(
        cls, model: Any, reward: Any, vae: Any, prompt: str, latent_image: Any, seed: int, count: int,
        mode: Any, batch_size: int, keep: int, early_stop: bool, threshold: float, radius: float,
        epsilon: float, round_size: int, hypernetwork: Any = None, variant: Any = "auto",
        strength: float = 1.0, iterations: int = 4, **sampling: Any,
    ) -> io.NodeOutput:  # fmt: skip
        """Returns the best latents and images with their scores and seeds."""
        check_choices(cls, mode=mode, variant=variant, **sampling)
        stop_at = threshold if early_stop else math.inf
        plan = Plan(count, seed, mode, batch_size, keep, stop_at, round_size, radius, epsilon, iterations)
        if hypernetwork is not None:
            model = apply(model, hypernetwork, strength, variant=variant)
        settings = Sampling(model, latent=latent_image, **sampling)
        found = search(settings, plan, reward, vae, prompt)
        table = found.table(reward.name, count)
        latent = sampled(latent_image, found.latents)
        latent.pop("batch_index", None)
        return io.NodeOutput(
            latent, found.images_BHWC, found.scores, found.seeds, table, ui=ui.PreviewText(table)
        )


def _sockets() -> list[io.Input]:
    return [
        io.Model.Input("model", tooltip="Any model that works with KSampler. It is not changed."),
        *conditioning_inputs(),
        io.Latent.Input(
            "latent_image",
            tooltip="The latent to denoise, empty for new images. Its batch_size must be 1.",
        ),
        io.Vae.Input("vae", tooltip="Decodes each sample for the reward."),
        RewardType.Input(
            "reward", tooltip="From Reward Model Loader. A chain with combination rank is rejected."
        ),
        io.String.Input(
            "prompt",
            multiline=True,
            default="a red heart",
            tooltip="The prompt that the images are scored against, usually the same as in positive. Empty = the empty prompt.",
        ),
    ]


def _search_widgets() -> list[io.Input]:
    return [
        io.Int.Input(
            "count",
            default=8,
            min=1,
            max=4096,
            tooltip="Maximum number of images to generate; time grows with it, memory does not. 0 is rejected.",
        ),
        io.Combo.Input(
            "mode",
            options=list(MODES),
            default="best-of-N",
            tooltip="best-of-N = one seed per image: seed, seed + 1, ...; zero-order = rounds of noise near the best noise "
            "so far; epsilon-greedy = zero-order with occasional new random noise; epsilon-greedy-steps = one seed "
            "per image, with a search over the noise of every step; needs an ancestral sampler.",
        ),
        io.Int.Input(
            "batch_size",
            default=1,
            min=1,
            max=64,
            tooltip="Number of images per batch. 1 = least memory; more is faster on large GPUs. 0 is rejected.",
        ),
        io.Int.Input(
            "keep", default=1, min=1, max=256, tooltip="Number of best images to return. 0 is rejected."
        ),
        io.Boolean.Input(
            "early_stop",
            default=False,
            tooltip="On = the search stops at the first score that reaches threshold.",
        ),
        threshold_input(
            "The score at which the search stops if early_stop is on, on the reward's scale; 0 = a score of 0 or higher."
        ),
    ]


def _noise_widgets() -> list[io.Input]:
    """Returns the widgets for the modes that search near the best noise."""
    return [
        io.Float.Input(
            "radius",
            default=0.5,
            min=0.01,
            max=10.0,
            step=0.01,
            tooltip="Distance of new noise from the best noise, as a fraction of random noise; in epsilon-greedy-steps, "
            "the maximum distance. Small = variations of the best image; 0 would repeat that image and is rejected.",
        ),
        io.Float.Input(
            "epsilon",
            default=0.4,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="How often epsilon-greedy and epsilon-greedy-steps sample new random noise, as a fraction. 0 = never, "
            "as in zero-order; 1 = always, as in best-of-N.",
        ),
        io.Int.Input(
            "round_size",
            default=4,
            min=1,
            max=256,
            tooltip="Images per round in zero-order and epsilon-greedy, after which they continue from the best noise so "
            "far; in epsilon-greedy-steps, noise candidates per round of a step. 0 is rejected.",
        ),
    ]


def _optional() -> list[io.Input]:
    inputs: list[io.Input] = [
        HyperAlignType.Input(
            "hypernetwork",
            tooltip="From HyperAlign Loader: applied to every image. Not connected = the model as it is.",
        ),
        variant_input(),
        strength_input(),
        io.Int.Input(
            "iterations",
            default=4,
            min=1,
            max=256,
            tooltip="Rounds per step in epsilon-greedy-steps, each with round_size noise candidates; the paper uses 20 "
            "rounds of 4. Each candidate costs a model evaluation, a VAE decode and a reward score. Not used in "
            "other modes. 0 is rejected.",
        ),
    ]
    for each in inputs:
        each.optional = True
    return inputs


def _outputs() -> list[io.Output]:
    return [
        io.Latent.Output(display_name="latent", tooltip="The best latents, best first."),
        io.Image.Output(display_name="images", tooltip="The best images, best first."),
        io.Float.Output(
            display_name="scores", is_output_list=True, tooltip="The scores of these images, as a list."
        ),
        io.Int.Output(
            display_name="seeds",
            is_output_list=True,
            tooltip="The seeds of these images, as a list. In mode best-of-N, KSampler gives the same image for the same seed.",
        ),
        io.String.Output(
            display_name="table",
            tooltip="Seed and score of every candidate; the returned ones are marked with *.",
        ),
    ]
