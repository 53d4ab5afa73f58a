"""Several rewards as one: a weighted sum, a sum of z-scores, or an average of ranks."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ..errors import HyperAlignError
from ..files import write_text
from . import Reward

Combination = Literal["sum", "z-score", "rank"]


@dataclass(frozen=True, slots=True)
class Calibration:
    """A reward's mean and deviation over reference images."""

    mean: float
    std: float


class Ensemble:
    """A reward that combines several rewards.

    - `sum`: sum of w_i s_i. Rewards have very different ranges; the weights must allow for that.
    - `z-score`: sum of w_i (s_i - mean_i) / std_i.
    - `rank`: weighted mean of each image's rank within its batch, from 0 for the worst to 1 for the
      best. It has no gradient, and for a single image it is always 0.5.

    Args:
        members: each reward with its weight.
        combination: how they are combined.
        calibrations: by the rewards' names; needed for `z-score`.

    Raises:
        HyperAlignError: no member, one twice, a weight that is not finite, or a calibration that is missing
            or has no deviation.
    """

    def __init__(
        self,
        members: Sequence[tuple[Reward, float]],
        combination: Combination = "sum",
        calibrations: Mapping[str, Calibration] | None = None,
    ) -> None:
        self._rewards = [reward for reward, _ in members]
        self._weights = [weight for _, weight in members]
        self._combination = combination
        names = [reward.name for reward in self._rewards]
        _check_members(names, self._weights, combination)
        self._calibrations = _calibrations_of(names, calibrations or {}) if combination == "z-score" else []
        self.name = " + ".join(names)
        self.module = nn.ModuleDict({str(index): reward.module for index, reward in enumerate(self._rewards)})

    def score(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Returns one score (B,) per image, as `Reward.score`; `rank` refuses images with a gradient."""
        return self.combine(self.breakdown(images_BCHW, prompts))

    def score_finite(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Returns one score (B,) per image, as `Reward.score_finite`; `rank` as in `score`."""
        self._check_gradient(images_BCHW)
        return self.combine(
            {reward.name: reward.score_finite(images_BCHW, prompts) for reward in self._rewards}
        )

    def breakdown(self, images_BCHW: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Returns the scores (B,) of each member by its name. Raises as `score`."""
        self._check_gradient(images_BCHW)
        return {reward.name: reward.score(images_BCHW, prompts) for reward in self._rewards}

    def _check_gradient(self, images_BCHW: Tensor) -> None:
        if self._combination == "rank" and images_BCHW.requires_grad and torch.is_grad_enabled():
            raise HyperAlignError(
                "Ranks have no gradient, but the images require one. Combine the rewards as sum or z-score."
            )

    def combine(self, scores: Mapping[str, Tensor]) -> Tensor:
        """Returns the ensemble's scores (B,) from its members' scores, on the first member's device."""
        members = list(scores.values())
        columns = torch.stack([score.to(members[0].device) for score in members], dim=1)
        weights = columns.new_tensor(self._weights)
        if self._combination == "rank":
            return (ranks(columns) * weights).sum(dim=1) / weights.sum()
        if self._combination == "z-score":
            means, deviations = (
                columns.new_tensor([getattr(calibration, key) for calibration in self._calibrations])
                for key in ("mean", "std")
            )
            columns = (columns - means) / deviations
        return (columns * weights).sum(dim=1)

    def embed_images(self, images_BCHW: Tensor) -> Tensor:
        """Returns the members' embeddings concatenated to unit length, as `Reward.embed_images`."""
        parts = [reward.embed_images(images_BCHW) for reward in self._rewards]
        joined_BD = torch.cat([part.to(parts[0].device) for part in parts], dim=1)
        return joined_BD / math.sqrt(len(parts))


def ranks(scores_BN: Tensor) -> Tensor:
    """Returns ranks (B, N) down each column, 0 for the worst to 1 for the best; ties share their mean."""
    difference_BBN = scores_BN[:, None] - scores_BN[None]
    beaten_BN = (difference_BBN > 0).sum(dim=1) + ((difference_BBN == 0).sum(dim=1) - 1) / 2
    count = scores_BN.shape[0]
    return beaten_BN.to(scores_BN) / (count - 1) if count > 1 else torch.full_like(scores_BN, 0.5)


def calibrate(scores: Tensor) -> Calibration:
    """Returns the calibration of a reward from its scores of reference images (at least 2).

    Raises HyperAlignError on fewer, on scores that are all equal, or on NaN and infinite ones.
    """
    std = float(scores.std()) if scores.numel() > 1 else 0.0
    if std == 0.0:
        raise HyperAlignError(
            f"Found {scores.numel()} scores to calibrate with, all equal; expected some that differ. Score "
            "more images."
        )
    if not math.isfinite(std):
        raise HyperAlignError(
            f"Found scores to calibrate with whose deviation is {std}; expected finite ones. Remove the "
            "images whose score is NaN or infinite."
        )
    return Calibration(float(scores.mean()), std)


def save_calibrations(path: Path, calibrations: Mapping[str, Calibration]) -> None:
    """Writes calibrations by reward name, as JSON, atomically."""
    rows = {name: {"mean": c.mean, "std": c.std} for name, c in calibrations.items()}
    write_text(path, json.dumps(rows, indent=1) + "\n")


def load_calibrations(path: Path) -> dict[str, Calibration]:
    """Reads a file of `save_calibrations`. Raises HyperAlignError if it is missing or damaged."""
    try:
        rows = cast("dict[str, dict[str, Any]]", json.loads(path.read_text(encoding="utf-8")))
        return {name: Calibration(float(row["mean"]), float(row["std"])) for name, row in rows.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise HyperAlignError(
            f"{path} is not a file of calibrations ({error!r}); expected "
            '{"reward": {"mean": 0.27, "std": 0.02}, ...}. Calibrate the rewards again.'
        ) from error


def _check_members(names: Sequence[str], weights: Sequence[float], combination: Combination) -> None:
    if not names or len(set(names)) != len(names):
        raise HyperAlignError(
            f"Found the rewards {list(names)}; expected at least one, and none twice. Give the one that "
            "should count more a greater weight."
        )
    if not all(math.isfinite(weight) for weight in weights) or (combination == "rank" and sum(weights) <= 0):
        raise HyperAlignError(
            f"Found the weights {list(weights)}; expected finite numbers, for ranks with a sum above 0. "
            "Use 1 for each."
        )


def _calibrations_of(names: Sequence[str], found: Mapping[str, Calibration]) -> list[Calibration]:
    for name in names:
        if name not in found:
            raise HyperAlignError(
                f"There is no calibration for {name}; found {', '.join(found) or 'none'}. Calibrate it on "
                "reference images, or combine the rewards as sum or rank."
            )
        if not (math.isfinite(found[name].mean) and 0.0 < found[name].std < math.inf):
            raise HyperAlignError(
                f"The calibration of {name} is {found[name]}; expected a finite mean and a std above 0. "
                "Calibrate it again."
            )
    return [found[name] for name in names]
