"""Rewards under the host's memory management, alone or several as one, and their scores in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...errors import HyperAlignError
from ...rewards import Reward
from ...rewards.ensemble import Calibration, Combination, Ensemble
from .model import network_patcher

BATCH = 16
"""Images judged at once, so that memory does not grow with the batch that was connected."""


class NotFinite(HyperAlignError):
    """A score is NaN or infinite.

    Args:
        name: the reward it is of.
        index: the first such image, from 0.
        scores: those of all images, for who goes on without such an image.
    """

    def __init__(self, name: str, index: int, scores: list[float]) -> None:
        super().__init__(
            f"{name} gives image {index + 1} of {len(scores)} a score that is NaN or infinite; expected a "
            "number. The reward overflows in half precision or its weights are damaged: start ComfyUI with "
            "--force-fp32, or get its weight file again."
        )
        self.scores = scores


@dataclass(frozen=True, slots=True)
class Member:
    """A reward with the patcher that lets the host load and unload it."""

    reward: Reward
    patcher: ModelPatcher
    weight: float = 1.0

    def score(self, images_BHWC: Tensor, prompts: Sequence[str]) -> Tensor:
        """Returns one score (B,) per image in float32 on the CPU. Raises HyperAlignError."""
        load_models([self.patcher])
        with torch.no_grad():
            parts = [
                self.reward.score(images_BHWC[at : at + BATCH].movedim(-1, 1), prompts[at : at + BATCH])
                for at in range(0, max(len(images_BHWC), 1), BATCH)
            ]
        return torch.cat(parts).float().cpu()


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a reward, or an ensemble, says of a batch of images."""

    name: str
    prompts: list[str]
    scores: list[float]
    breakdown: dict[str, list[float]]
    """Each member's own scores, by its name."""

    @property
    def mean(self) -> float:
        """The mean of the scores."""
        return sum(self.scores) / len(self.scores)


@dataclass(frozen=True, slots=True)
class HostReward:
    """One reward or several as an ensemble; each is loaded by itself when its turn comes."""

    members: tuple[Member, ...]
    ensemble: Ensemble | None = None
    """How several are combined; None for one alone."""
    combination: Combination = "sum"

    @property
    def name(self) -> str:
        """A short name for tables."""
        return self.members[0].reward.name if self.ensemble is None else self.ensemble.name

    @property
    def patchers(self) -> list[ModelPatcher]:
        """The members' patchers, for who needs all of them loaded at once."""
        return [member.patcher for member in self.members]

    def judge(self, images_BHWC: Tensor, prompts: Sequence[str]) -> Judgement:
        """Returns the scores of images and what they are made of.

        Raises:
            NotFinite: a score is no number.
            HyperAlignError: another number of prompts, or what a reward refuses.
        """
        if len(prompts) != len(images_BHWC):
            raise HyperAlignError(
                f"Found {len(images_BHWC)} images and {len(prompts)} prompts; expected one prompt per "
                "image. Repeat the prompt for every image."
            )
        parts = {member.reward.name: member.score(images_BHWC, prompts) for member in self.members}
        combined = parts[self.name] if self.ensemble is None else self.ensemble.combine(parts)
        breakdown = {name: part.tolist() for name, part in parts.items()}
        scores: list[float] = combined.tolist()
        for name, column in (*breakdown.items(), (self.name, scores)):
            for index, score in enumerate(column):
                if not math.isfinite(score):
                    raise NotFinite(name, index, scores)
        return Judgement(self.name, list(prompts), scores, breakdown)

    def score(self, images_BHWC: Tensor, prompts: Sequence[str]) -> list[float]:
        """Returns one score per image. Raises as `judge`."""
        return self.judge(images_BHWC, prompts).scores

    def differentiable(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Returns scores (B,) with their gradient; `patchers` must be loaded. Raises HyperAlignError."""
        judge = self.members[0].reward if self.ensemble is None else self.ensemble
        return judge.score(images_BCHW, prompts)


def hosted(reward: Reward) -> HostReward:
    """Puts a reward under the host's memory management."""
    return HostReward((Member(reward, network_patcher(reward.module)),))


def chained(
    chain: HostReward | None,
    own: HostReward,
    weight: float,
    combination: Combination,
    calibrations: Mapping[str, Calibration],
) -> HostReward:
    """Returns a reward alone, or added to those before it, whose combination it decides.

    Raises HyperAlignError where `Ensemble` does.
    """
    before = () if chain is None else chain.members
    members = (*before, replace(own.members[0], weight=weight))
    if len(members) == 1:
        return HostReward(members)
    pairs = [(member.reward, member.weight) for member in members]
    return HostReward(members, Ensemble(pairs, combination, calibrations), combination)


def load_models(patchers: Sequence[ModelPatcher]) -> None:
    """Has the host load networks of ours, whole, so that gradients can go through them."""
    # Weights moved in the host's inference mode could never take part in a gradient.
    with torch.inference_mode(False):
        comfy.model_management.load_models_gpu(list(patchers), force_full_load=True)


def prompts_for(text: str, count: int) -> list[str]:
    """Returns one prompt per image: one line serves all, or there is a line for each.

    Raises:
        HyperAlignError: another number of lines.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [""]
    if len(lines) == 1:
        return lines * count
    if len(lines) != count:
        raise HyperAlignError(
            f"Found {len(lines)} lines of prompts for {count} images; expected 1 line for all of them, "
            f"or {count} lines, one per image."
        )
    return lines


def score_table(judgement: Judgement) -> str:
    """Returns a text table: one line per image with the score, each member's where there are several."""
    several = len(judgement.breakdown) > 1
    columns = [judgement.scores, *(judgement.breakdown.values() if several else ())]
    rows = zip(*columns, strict=True)
    lines = [
        f"{index:>3}  {'  '.join(f'{value:+8.4f}' for value in row)}  {prompt}"
        for index, (row, prompt) in enumerate(zip(rows, judgement.prompts, strict=True))
    ]
    heading = f"{judgement.name}" + (f"  (score | {' | '.join(judgement.breakdown)})" if several else "")
    return "\n".join([heading, *lines, f"mean {judgement.mean:+8.4f}"])
