"""Settings of the training methods; the defaults are those of their authors' code for Stable Diffusion."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from train.ranges import require

MethodName = Literal["hyperalign", "alignprop", "dpo", "kto", "dance_grpo", "mix_grpo", "srpo", "spo"]


PAIRED: tuple[MethodName, ...] = ("dpo", "kto")
"""Methods that read pairs of images."""
TABLES: dict[MethodName, str] = {
    "alignprop": "alignprop", "dpo": "dpo", "kto": "kto", "dance_grpo": "grpo", "mix_grpo": "grpo",
    "srpo": "srpo", "spo": "spo",
}  # fmt: skip
"""The tables of a recipe with the methods' settings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AlignPropConfig:
    """AlignProp: the reward's gradient through the last steps of a rollout."""

    last_steps: int = 0
    """Steps with a gradient: DRaFT-K. 0 draws them for each training step, as AlignProp does."""
    mean_share: float = 0.16
    """Mean of the drawn steps, as a share of the rollout's."""
    std_share: float = 0.1
    """Standard deviation of the drawn steps, as a share of the rollout's."""
    eta: float = 1.0
    """Noise of DDIM's steps; 0 for a flow."""

    def __post_init__(self) -> None:
        """Checks ranges. Raises HyperAlignError."""
        require(self.last_steps >= 0, "alignprop.last_steps", self.last_steps, "0 or more")
        require(0 <= self.eta <= 1, "alignprop.eta", self.eta, "0 to 1")
        require(self.std_share >= 0, "alignprop.std_share", self.std_share, "0 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class DpoConfig:
    """Diffusion-DPO: pairs of a preferred and a rejected image."""

    beta: float = 5000.0
    """How strongly the model is held to the base model. On the mean over dimensions of the errors: 2,000 to
    5,000 for diffusion, about 100 for a flow."""

    def __post_init__(self) -> None:
        """Checks ranges. Raises HyperAlignError."""
        require(self.beta > 0, "dpo.beta", self.beta, "above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class KtoConfig:
    """Diffusion-KTO: single images, each desirable or not."""

    beta: float = 5000.0
    """Slope of the utility."""
    desirable_share: float = 0.8
    """Share of desirable images in a batch."""
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __post_init__(self) -> None:
        """Checks ranges. Raises HyperAlignError."""
        share = self.desirable_share
        require(self.beta > 0, "kto.beta", self.beta, "above 0")
        require(0 < share < 1, "kto.desirable_share", share, "above 0 and below 1: images of both kinds")


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpoConfig:
    """DanceGRPO and MixGRPO: groups of samples of one prompt, compared with each other."""

    group: int = 16
    """Samples of each prompt."""
    updates: int = 2
    """Updates from one rollout; each takes its share of the samples."""
    eta: float = 1.0
    """Noise of a stochastic step: DDIM's for diffusion, of the SDE for a flow (0.3)."""
    same_noise: bool = True
    """Begin all samples of a group with the same noise."""
    trained_share: float = 1.0
    """DanceGRPO: share of a rollout's stochastic steps that are trained, drawn for each sample."""
    clip_range: float = 1e-4
    """Of the ratio of densities, which are means over dimensions."""
    advantage_clip: float = 5.0
    window: int = 4
    """MixGRPO: steps that are stochastic and trained; the others are deterministic."""
    window_interval: int = 25
    """MixGRPO: training steps until the window moves."""
    window_stride: int = 1
    """MixGRPO: by how many steps it moves."""

    def __post_init__(self) -> None:
        """Checks ranges. Raises HyperAlignError."""
        group = self.group
        require(group >= 2, "grpo.group", group, "2 or more: samples are compared with each other")
        divides = self.updates >= 1 and group % self.updates == 0
        require(divides, "grpo.updates", self.updates, f"a divisor of grpo.group, {group}")
        require(self.eta > 0, "grpo.eta", self.eta, "above 0: without noise a group's samples are one")
        require(0 < self.trained_share <= 1, "grpo.trained_share", self.trained_share, "above 0, at most 1")
        require(self.clip_range > 0, "grpo.clip_range", self.clip_range, "above 0")
        require(self.advantage_clip > 0, "grpo.advantage_clip", self.advantage_clip, "above 0")
        require(self.window >= 1, "grpo.window", self.window, "1 or more")
        require(self.window_interval >= 1, "grpo.window_interval", self.window_interval, "1 or more")
        require(self.window_stride >= 1, "grpo.window_stride", self.window_stride, "1 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class SrpoConfig:
    """SRPO: Direct-Align with a reward that compares two wordings of the prompt."""

    positions: tuple[float, float] = (0.5, 0.9)
    """Positions of a run, 1 at its start, between which the reward acts."""
    stride: float = 0.1
    """Length of its one step, as a share of that range."""
    positive: tuple[str, ...] = (
        "Natural-lighting. {}", "Detail. {}", "Detailed. {}", "Real. {}",
    )  # fmt: skip
    """Wordings of the prompt that the image should suit, in turn."""
    negative: tuple[str, ...] = (
        "Concept art. {}", "Painting. {}", "Anime. {}", "Flat. {}", "Oil. {}",
    )  # fmt: skip
    """Wordings that it should not."""
    discount_denoising: tuple[float, float] = (0.1, 0.25)
    """Weight of the positive wording beyond the negative one's, at the last and at the first position."""
    discount_inversion: tuple[float, float] = (0.3, 0.01)
    """Weight of the negative wording beyond the positive one's, for the step in the other direction."""

    def __post_init__(self) -> None:
        """Checks ranges. Raises HyperAlignError."""
        low, high = self.positions
        require(0 < low < high < 1, "srpo.positions", self.positions, "0 < low < high < 1")
        require(0 < self.stride <= 1, "srpo.stride", self.stride, "above 0, at most 1")
        for name, wordings in (("positive", self.positive), ("negative", self.negative)):
            fits = bool(wordings) and all("{}" in wording for wording in wordings)
            require(fits, f"srpo.{name}", wordings, "wordings with {} in the prompt's place")


@dataclass(frozen=True, slots=True, kw_only=True)
class SpoConfig:
    """SPO: at each step several candidates for the next x, whose best and worst are a pair."""

    step_reward: Path = Path()
    """Step-aware preference model of train/step_reward.py, made for this base model from a reward in
    objective.rewards. Empty: those rewards score the one-step predictions as they are."""
    reward_scale: float = 1.0
    """Factor of those rewards without a step-aware model: 100 for HPSv2 and CLIP, which are cosines."""
    candidates: int = 4
    """Drawn from each x_t (SDXL: 2)."""
    threshold: float = 0.3
    """Least gap of the probabilities of best and worst (SDXL: 0.4): softmax of their scores, in logits."""
    beta: float = 10.0
    """How strongly the model is held to the base model."""
    clip_range: float = 0.1
    """Of the ratio of densities, which are means over dimensions."""
    skipped_share: float = 0.2
    """Share of a rollout's steps, the first, without candidates."""
    updates: int = 16
    """Updates from one rollout, at most one for each step with candidates; each takes its share of them."""
    eta: float = 1.0
    """Noise of a step: DDIM's for diffusion, of the SDE for a flow (0.3)."""

    def __post_init__(self) -> None:
        """Checks ranges. Raises HyperAlignError."""
        candidates, share, clip = self.candidates, self.skipped_share, self.clip_range
        require(candidates >= 2, "spo.candidates", candidates, "2 or more: the best and the worst are a pair")
        require(0 <= self.threshold < 1, "spo.threshold", self.threshold, "0 up to 1")
        require(0 < self.reward_scale < math.inf, "spo.reward_scale", self.reward_scale, "above 0")
        require(self.beta > 0, "spo.beta", self.beta, "above 0")
        require(0 < clip < 1, "spo.clip_range", clip, "above 0 and below 1")
        require(0 <= share < 1, "spo.skipped_share", share, "0 up to 1")
        require(self.updates >= 1, "spo.updates", self.updates, "1 or more")
        require(self.eta > 0, "spo.eta", self.eta, "above 0: without noise all candidates are one")

    @property
    def least_gap(self) -> float:
        """The threshold as a gap of scores: sigmoid(g) - sigmoid(-g) = tanh(g / 2)."""
        return 2.0 * math.atanh(self.threshold)

    def first_step(self, steps: int) -> int:
        """Returns the index of a rollout's first step with candidates."""
        return round(self.skipped_share * steps)
