"""Rewards under the host's memory management, single or as an ensemble, and their scores as text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...errors import HyperAlignError
from ...prompts import on_one_line
from ...rewards import Reward
from ...rewards.ensemble import Calibration, Combination, Ensemble
from .model import network_patcher

BATCH = 16
"""Number of images scored at once, so that memory does not grow with the connected batch."""


class NotFinite(HyperAlignError):
    """A score is NaN or infinite.

    Args:
        name: the reward.
        index: index of the first such image.
        scores: scores of all images, for callers that continue without the image.
    """

    def __init__(self, name: str, index: int, scores: list[float]) -> None:
        super().__init__(
            f"{name} gives image {index + 1} of {len(scores)} a score that is NaN or infinite; expected a "
            "number. The reward overflows in half precision or its weights are damaged: start ComfyUI with "
            "--force-fp32, or download its weight file again."
        )
        self.scores = scores


@dataclass(frozen=True, slots=True)
class Member:
    """A reward with the patcher through which the host loads and unloads it."""

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

    def score_batches(self, batches: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        """Returns one score per image of several batches (B, H, W, C), as `score`."""
        ends = list(accumulate(len(batch) for batch in batches))
        starts = [0, *ends[:-1]]
        return torch.cat(
            [
                self.score(batch, prompts[start:end])
                for batch, start, end in zip(batches, starts, ends, strict=True)
            ]
        )


@dataclass(frozen=True, slots=True)
class BatchScores:
    """Scores of a batch of images by a reward or an ensemble."""

    name: str
    prompts: list[str]
    scores: list[float]
    breakdown: dict[str, list[float]]
    """The scores of each member, by its name."""

    @property
    def mean(self) -> float:
        """The mean of the scores."""
        return sum(self.scores) / len(self.scores)


@dataclass(frozen=True, slots=True)
class HostReward:
    """One reward, or several as an ensemble; each is loaded separately when it is used."""

    members: tuple[Member, ...]
    ensemble: Ensemble | None = None
    """How several rewards are combined; None for a single reward."""
    combination: Combination = "sum"

    @property
    def name(self) -> str:
        """A short name for tables."""
        return self.members[0].reward.name if self.ensemble is None else self.ensemble.name

    @property
    def patchers(self) -> list[ModelPatcher]:
        """The members' patchers, for callers that need all of them loaded at once."""
        return [member.patcher for member in self.members]

    def score_batch(self, images: Tensor | Sequence[Tensor], prompts: Sequence[str]) -> BatchScores:
        """Returns the scores of images, and those of each member.

        Args:
            images: (B, H, W, C), or several such batches, which may differ in size.
            prompts: one per image.

        Raises:
            NotFinite: a score is NaN or infinite.
            HyperAlignError: a wrong number of prompts, or an input that a reward rejects.
        """
        batches = [images] if isinstance(images, Tensor) else images
        count = sum(len(batch) for batch in batches)
        if len(prompts) != count:
            raise HyperAlignError(
                f"Found {count} images and {len(prompts)} prompts; expected one prompt per "
                "image. Repeat the prompt for every image."
            )
        parts = {member.reward.name: member.score_batches(batches, prompts) for member in self.members}
        combined = parts[self.name] if self.ensemble is None else self.ensemble.combine(parts)
        breakdown = {name: part.tolist() for name, part in parts.items()}
        scores: list[float] = combined.tolist()
        for name, column in (*breakdown.items(), (self.name, scores)):
            for index, score in enumerate(column):
                if not math.isfinite(score):
                    raise NotFinite(name, index, scores)
        return BatchScores(self.name, list(prompts), scores, breakdown)

    def score(self, images_BHWC: Tensor, prompts: Sequence[str]) -> list[float]:
        """Returns one score per image. Raises as `score_batch`."""
        return self.score_batch(images_BHWC, prompts).scores

    def differentiable(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Returns scores (B,) with their gradient; `patchers` must be loaded. Raises HyperAlignError."""
        reward = self.members[0].reward if self.ensemble is None else self.ensemble
        return reward.score(images_BCHW, prompts)


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
    """Returns a single reward, or a chain with the reward appended and its combination.

    Raises HyperAlignError as `Ensemble`.
    """
    before = () if chain is None else chain.members
    members = (*before, replace(own.members[0], weight=weight))
    if len(members) == 1:
        return HostReward(members)
    pairs = [(member.reward, member.weight) for member in members]
    return HostReward(members, Ensemble(pairs, combination, calibrations), combination)


def load_models(patchers: Sequence[ModelPatcher]) -> None:
    """Makes the host load networks of this pack completely, so that gradients can go through them."""
    # Weights that are moved in inference mode cannot be part of a backward pass.
    with torch.inference_mode(False):
        comfy.model_management.load_models_gpu(list(patchers), force_full_load=True)


def score_table(batch: BatchScores) -> str:
    """Returns a text table: one line per image with its score, and each member's if there are several."""
    several = len(batch.breakdown) > 1
    columns = [batch.scores, *(batch.breakdown.values() if several else ())]
    rows = zip(*columns, strict=True)
    lines = [
        f"{index:>3}  {'  '.join(f'{value:+8.4f}' for value in row)}  {on_one_line(prompt)}"
        for index, (row, prompt) in enumerate(zip(rows, batch.prompts, strict=True))
    ]
    heading = f"{batch.name}" + (f"  (score | {' | '.join(batch.breakdown)})" if several else "")
    return "\n".join([heading, *lines, f"mean {batch.mean:+8.4f}"])
