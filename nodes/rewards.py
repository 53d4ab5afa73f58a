"""Judging images."""

from __future__ import annotations

import json
from typing import Any

from comfy.cli_args import args
from comfy_api.latest import io, ui

from ..hyperalign.hosts.comfy import reward_files as files
from ..hyperalign.hosts.comfy import rewards as comfy_rewards
from ..hyperalign.rewards.loading import NAMES
from .aliases import aliases
from .choices import choice_problem
from .drawing import with_badges
from .score_files import save_scored
from .sockets import RewardType, prompt_input


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
            description="Loads a model that judges images from models/hyperalign_rewards: by their prompt, as people "
            "prefer them, or by their looks alone. Several in a chain judge as one. Nothing is downloaded unless you "
            "ask for it.",
            inputs=_loader_inputs(),
            outputs=[
                RewardType.Output(
                    display_name="reward",
                    tooltip="For Reward Score, Best-of-N Sampler, Reward Guidance, Compare or the chain of another loader.",
                )
            ],
        )

    @classmethod
    def validate_inputs(
        cls, reward: str = NAMES[0], download: bool = False, combination: str = "sum"
    ) -> bool | str:
        """Names missing weights before anything runs; the host leaves out a linked input's value."""
        unknown = choice_problem(cls, reward=reward, combination=combination)
        return unknown or (None if download else files.problem(reward)) or True

    @classmethod
    def fingerprint_inputs(cls, combination: str | None = "sum", **_: Any) -> float:
        """Makes the host build z-scores again after a new calibration; a linked input's value is None."""
        return files.calibrated_at() if combination in ("z-score", None) else 0.0

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
        own = files.load(reward, fetch=download)
        calibrations = files.calibrations() if chain is not None and combination == "z-score" else {}
        return io.NodeOutput(comfy_rewards.chained(chain, own, weight, combination, calibrations))


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
            description="Scores every image of a batch against its prompt; greater is better. Shows each image "
            "with its score, and saves them with it if you like.",
            is_output_node=True,
            inputs=[
                RewardType.Input("reward", tooltip="From Reward Model Loader."),
                io.Image.Input("images", tooltip="One image or a batch; each gets its own score."),
                prompt_input(),
                *_saving_inputs(),
            ],
            outputs=[
                io.Float.Output(
                    display_name="scores", is_output_list=True, tooltip="One score per image, as a list."
                ),
                io.Float.Output(display_name="mean", tooltip="The mean of the scores."),
                io.String.Output(display_name="table", tooltip="Scores and prompts as a text table."),
                io.String.Output(
                    display_name="breakdown",
                    tooltip="Each reward's own scores as JSON: one list of numbers per reward.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, sidecar: str = "CSV") -> bool | str:
        """Refuses an unknown kind of table before anything runs."""
        return choice_problem(cls, sidecar=sidecar) or True

    @classmethod
    def execute(
        cls,
        reward: Any,
        images: Any,
        prompt: str,
        save: bool = False,
        filename_prefix: str = "hyperalign/scored",
        sidecar: str = "CSV",
        calibrate: bool = False,
    ) -> io.NodeOutput:
        """Returns the scores, their mean, a table and the breakdown; shows images with badges."""
        judgement = reward.judge(images, comfy_rewards.prompts_for(prompt, len(images)))
        if calibrate:
            files.store_calibrations(judgement)
        if save:
            save_scored(images, judgement, filename_prefix, sidecar, _workflow_of(cls.hidden))
        table, breakdown = comfy_rewards.score_table(judgement), json.dumps(judgement.breakdown)
        badged = with_badges(images, [f"{score:.4f}" for score in judgement.scores])
        shown = ui.PreviewImage(badged, cls=cls).as_dict() | ui.PreviewText(table).as_dict()
        return io.NodeOutput(judgement.scores, judgement.mean, table, breakdown, ui=shown)


def _workflow_of(hidden: Any) -> dict[str, Any]:
    """Returns what the host writes into its own images, unless it is told not to."""
    if args.disable_metadata or hidden is None:
        return {}
    return ({"prompt": hidden.prompt} if hidden.prompt else {}) | dict(hidden.extra_pnginfo or {})


def _loader_inputs() -> list[io.Input]:
    return [
        io.Combo.Input(
            "reward",
            options=list(NAMES),
            tooltip="hpsv2.1, hpsv2, pickscore, imagereward and clip judge how well an image fits its prompt; "
            "aesthetic and siglip-aesthetic its looks alone; the tiny ones read EmojiScenes prompts only. The "
            "weights belong into models/hyperalign_rewards.",
        ),
        io.Float.Input(
            "weight",
            default=1.0,
            min=-100.0,
            max=100.0,
            step=0.05,
            optional=True,
            tooltip="Factor of this reward among several. 0 = it is shown but does not count; below 0 = what it "
            "likes is avoided. Without effect on a reward alone.",
        ),
        io.Combo.Input(
            "combination",
            options=["sum", "z-score", "rank"],
            default="sum",
            optional=True,
            tooltip="How several are combined; the last loader of a chain decides. sum = weighted sum as they are; "
            "z-score = in units of each one's spread, calibrated by Reward Score; rank = mean place in the batch, "
            "from 0 = worst to 1 = best.",
        ),
        io.Boolean.Input(
            "download",
            default=False,
            optional=True,
            tooltip="On = fetch missing weights (up to 4 GB) from their source page, resumable. Off = nothing is "
            "ever downloaded; a missing file is named with its size, page and folder.",
        ),
        RewardType.Input(
            "chain", optional=True, tooltip="Another Reward Model Loader; both then judge together."
        ),
    ]


def _saving_inputs() -> list[io.Input]:
    return [
        io.Boolean.Input(
            "save",
            default=False,
            optional=True,
            tooltip="On = save the images to the output folder with their scores in the PNG's text.",
        ),
        io.String.Input(
            "filename_prefix",
            default="hyperalign/scored",
            optional=True,
            tooltip="Start of the saved files' names; a / makes a subfolder of the output folder.",
        ),
        io.Combo.Input(
            "sidecar",
            options=["CSV", "JSONL", "none"],
            default="CSV",
            optional=True,
            tooltip="A table beside the saved images that grows by one line for each; none = no table.",
        ),
        io.Boolean.Input(
            "calibrate",
            default=False,
            optional=True,
            tooltip="On = keep each reward's mean and spread over these images in "
            "models/hyperalign_rewards/calibrations.json, which z-score reads. Give it 50 images or more.",
        ),
    ]
