"""Judging pictures."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..hyperalign.hosts import comfy_rewards
from ..hyperalign.rewards import tiny
from .sockets import RewardType


class HyperAlignRewardLoader(io.ComfyNode):
    """Loads a reward model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declares the node."""
        return io.Schema(
            node_id="HyperAlignRewardLoader",
            display_name="Reward Model Loader",
            category="HyperAlign",
            description="Loads a model that judges how well pictures fit their prompts.",
            inputs=[
                io.Combo.Input(
                    "reward",
                    options=list(tiny.NAMES),
                    tooltip="tiny reward = what the tiny hypernetworks were trained with; tiny held-out reward = an "
                    "independent judge no training has seen. Both read EmojiScenes prompts only.",
                )
            ],
            outputs=[RewardType.Output(display_name="reward", tooltip="For Reward Score.")],
        )

    @classmethod
    def execute(cls, reward: str) -> io.NodeOutput:
        """Returns the reward under the host's memory management."""
        return io.NodeOutput(comfy_rewards.hosted(tiny.load(reward)))


class HyperAlignRewardScore(io.ComfyNode):
    """Scores a batch of pictures."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declares the node."""
        return io.Schema(
            node_id="HyperAlignRewardScore",
            display_name="Reward Score",
            category="HyperAlign",
            description="Scores every picture of a batch against its prompt; greater is better.",
            is_output_node=True,
            inputs=[
                RewardType.Input("reward", tooltip="From Reward Model Loader."),
                io.Image.Input("images", tooltip="One picture or a batch; each gets its own score."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default="a red heart",
                    tooltip="One line = the prompt of all pictures; or one line per picture, in their order. "
                    "0 lines = judged against the empty prompt.",
                ),
            ],
            outputs=[
                io.Float.Output(
                    display_name="scores", is_output_list=True, tooltip="One score per picture, as a list."
                ),
                io.Float.Output(display_name="mean", tooltip="The mean of the scores."),
                io.String.Output(display_name="table", tooltip="Scores and prompts as a text table."),
            ],
        )

    @classmethod
    def execute(cls, reward: Any, images: Any, prompt: str) -> io.NodeOutput:
        """Returns the scores, their mean and a table."""
        prompts = comfy_rewards.prompts_for(prompt, len(images))
        scores = reward.score(images, prompts)
        table = comfy_rewards.score_table(reward.reward.name, prompts, scores)
        return io.NodeOutput(scores, sum(scores) / len(scores), table, ui=ui.PreviewText(table))
