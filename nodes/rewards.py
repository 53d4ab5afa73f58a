"""Loading reward models and scoring images."""

from __future__ import annotations

import json
from typing import Any

from comfy.cli_args import args
from comfy_api.latest import io, ui

from ..hyperalign.hosts.comfy import reward_files
from ..hyperalign.hosts.comfy.rewards import chained, score_table
from ..hyperalign.prompts import LINES, prompts_for_batches
from ..hyperalign.rewards.loading import NAMES
from .aliases import aliases
from .choices import check_choices, choice_problem
from .drawing import with_badges
from .score_files import save_scored
from .sockets import RewardType, lines_input, only, prompt_input


class HyperAlignRewardLoader(io.ComfyNode):
    """Loads a reward model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declares the node."""
        return io.Schema(
            node_id="HyperAlignRewardLoader",
            display_name="Reward Model Loader",
            category="HyperAlign",
            **aliases("hps", "pickscore", "imagereward", "aesthetic", "clip score", "preference model"),
            description="Loads a reward model from models/hyperalign_rewards. It scores images by prompt alignment, human "
            "preference or aesthetic quality. Chain several loaders to combine their scores into one. Nothing is "
            "downloaded unless download is on.",
            inputs=_loader_inputs(),
            outputs=[
                RewardType.Output(
                    display_name="reward",
                    tooltip="For Reward Score, Best-of-N Sampler, Reward Guidance, Compare or chain of another loader.",
                )
            ],
        )

    @classmethod
    def validate_inputs(
        cls, reward: str | None = None, download: bool | None = False, combination: str | None = None
    ) -> bool | str:
        """Names missing weights before anything runs; the host passes None for a linked input."""
        unknown = choice_problem(cls, reward=reward, combination=combination)
        missing = reward_files.problem(reward) if reward is not None and download is False else None
        return unknown or missing or True

    @classmethod
    def fingerprint_inputs(
        cls, reward: str | None = None, combination: str | None = "sum", **_: Any
    ) -> tuple[float, list[tuple[int, int]]]:
        """Makes the host load replaced files, and rebuild z-scores after a new calibration.

        The value of a linked input is None: it may be any reward, and z-score.
        """
        names = NAMES if reward is None else (reward,)
        states = [state for name in names for state in reward_files.file_states(name)]
        return reward_files.calibrated_at() if combination in ("z-score", None) else 0.0, states

    @classmethod
    def execute(
        cls,
        reward: str,
        weight: float = 1.0,
        combination: Any = "sum",
        download: bool = False,
        chain: Any = None,
    ) -> io.NodeOutput:
        """Returns the reward under the host's memory management."""
        check_choices(cls, reward=reward, combination=combination)
        own = reward_files.load(reward, fetch=download)
        calibrations = reward_files.calibrations() if chain is not None and combination == "z-score" else {}
        return io.NodeOutput(chained(chain, own, weight, combination, calibrations))


class HyperAlignRewardScore(io.ComfyNode):
    """Scores a batch of images."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declares the node."""
        return io.Schema(
            node_id="HyperAlignRewardScore",
            display_name="Reward Score",
            category="HyperAlign",
            **aliases("rate images", "aesthetic score", "judge", "evaluate", "quality"),
            description="Scores every image of a batch against its prompt; higher is better. Shows each image with its "
            "score and can save the images together with their scores.",
            is_input_list=True,
            is_output_node=True,
            inputs=[
                RewardType.Input("reward", tooltip="From Reward Model Loader."),
                io.Image.Input("images", tooltip="One image or a batch; each image gets its own score."),
                prompt_input(),
                *_saving_inputs(),
                lines_input(),
            ],
            outputs=[
                io.Float.Output(
                    display_name="scores", is_output_list=True, tooltip="One score per image, as a list."
                ),
                io.Float.Output(display_name="mean", tooltip="The mean of the scores."),
                io.String.Output(display_name="table", tooltip="Scores and prompts as a text table."),
                io.String.Output(
                    display_name="breakdown",
                    tooltip="The scores of each reward in the chain as JSON: one list of numbers per reward.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, sidecar: Any = None, lines: Any = None) -> bool | str:
        """Rejects unknown choices before anything runs; inputs are lists here."""
        return choice_problem(cls, sidecar=sidecar, lines=lines) or True

    @classmethod
    def execute(
        cls, reward: Any, images: Any, prompt: Any, save: Any = False, filename_prefix: Any = "hyperalign/scored",
        sidecar: Any = "CSV", calibrate: Any = False, lines: Any = LINES[0],
    ) -> io.NodeOutput:  # fmt: skip
        """Returns the scores, their mean, a table and the breakdown; shows images with badges."""
        reward, save, prefix, sidecar, calibrate, lines = only(
            reward=reward, save=save, filename_prefix=filename_prefix, sidecar=sidecar, calibrate=calibrate,
            lines=lines,
        )  # fmt: skip
        check_choices(cls, sidecar=sidecar, lines=lines)
        batches = images if isinstance(images, list) else [images]
        prompts = prompts_for_batches(prompt, [len(batch) for batch in batches], lines)
        scored = reward.score_batch(batches, prompts)
        if calibrate:
            reward_files.store_calibrations(scored)
        if save:
            save_scored(_frames(batches), scored, prefix, sidecar, _workflow_of(cls.hidden))
        return _shown(cls, _frames(batches), scored)


def _frames(batches: Any) -> list[Any]:
    return [image_HWC for images_BHWC in batches for image_HWC in images_BHWC]


def _shown(cls: Any, images: list[Any], scored: Any) -> io.NodeOutput:
    """Returns the outputs of Reward Score, and what it shows."""
    table, breakdown = score_table(scored), json.dumps(scored.breakdown)
    badged: Any = [
        with_badges(image_HWC[None], [f"{score:.4f}"])[0]
        for image_HWC, score in zip(images, scored.scores, strict=True)
    ]
    shown = ui.PreviewImage(badged, cls=cls).as_dict() | ui.PreviewText(table).as_dict()
    return io.NodeOutput(scored.scores, scored.mean, table, breakdown, ui=shown)


def _workflow_of(hidden: Any) -> dict[str, Any]:
    """Returns the metadata that the host stores in its own images; empty with --disable-metadata."""
    if args.disable_metadata or hidden is None:
        return {}
    return ({"prompt": hidden.prompt} if hidden.prompt else {}) | dict(hidden.extra_pnginfo or {})


def _loader_inputs() -> list[io.Input]:
    return [
        io.Combo.Input(
            "reward",
            options=list(NAMES),
            tooltip="hpsv2.1, hpsv2, pickscore, imagereward and clip score how well an image matches its prompt; "
            "aesthetic and siglip-aesthetic score aesthetic quality only; the tiny rewards work with EmojiScenes "
            "prompts only. Put the weights into models/hyperalign_rewards.",
        ),
        io.Float.Input(
            "weight",
            default=1.0,
            min=-100.0,
            max=100.0,
            step=0.05,
            optional=True,
            tooltip="Weight of this reward in a chain. 0 = shown but not counted; below 0 = lower scores are better. No "
            "effect on a single reward.",
        ),
        io.Combo.Input(
            "combination",
            options=["sum", "z-score", "rank"],
            default="sum",
            optional=True,
            tooltip="How the rewards of a chain are combined; the last loader decides. sum = weighted sum of the scores; "
            "z-score = weighted sum of standardised scores, calibrated with Reward Score; rank = mean rank in the "
            "batch, from 0 = worst to 1 = best.",
        ),
        io.Boolean.Input(
            "download",
            default=False,
            optional=True,
            tooltip="On = download missing weights (up to 4 GB) from their source page, resumable. Off = nothing is "
            "downloaded; the error message names the missing file, its size, source page and folder.",
        ),
        RewardType.Input(
            "chain", optional=True, tooltip="Another Reward Model Loader, to combine both rewards."
        ),
    ]


def _saving_inputs() -> list[io.Input]:
    return [
        io.Boolean.Input(
            "save",
            default=False,
            optional=True,
            tooltip="On = save the images to the output folder, with their scores in the PNG metadata.",
        ),
        io.String.Input(
            "filename_prefix",
            default="hyperalign/scored",
            optional=True,
            tooltip="Prefix of the file names; a / creates a subfolder in the output folder.",
        ),
        io.Combo.Input(
            "sidecar",
            options=["CSV", "JSONL", "none"],
            default="CSV",
            optional=True,
            tooltip="Table of scores next to the saved images, with one line per image; none = no table.",
        ),
        io.Boolean.Input(
            "calibrate",
            default=False,
            optional=True,
            tooltip="On = store each reward's mean and standard deviation over these images in "
            "models/hyperalign_rewards/calibrations.json, for z-score. Use at least 50 images.",
        ),
    ]
