"""Options of step_reward.py, which trains SPO's step-aware preference model."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from hyperalign.files import check_writable
from train.ranges import require


@dataclass(frozen=True, slots=True)
class Options:
    """The recipe, the pairs, the output, and how to train; the defaults are the authors' for SD 1.5.

    They also weight each pair by one over its prompt's pairs, keep ties and train the text tower.
    """

    recipe: Path
    """Recipe whose base model and guidance make the predictions."""
    out: Path
    """The model's file (.safetensors)."""
    pairs: Path | None = None
    """Latent shards with pairs, by train/encode.py --pairs; default: data.preference of the recipe. Readers
    leave out ties."""
    reward: str = ""
    """The reward to begin with; default: the first of objective.rewards. The authors': pickscore."""
    tower: bool = True
    """Train the reward's image tower too, as the authors do; --no-tower trains the modulation alone, for a
    smaller file and less memory. The text tower stays as it is."""
    steps: int = 8000
    batch: int = 16
    """Pairs of each step, in each process."""
    lr: float = 3e-6
    """Learning rate after the warm-up; it falls linearly to 0."""
    warmup: int = 500
    weight_decay: float = 0.3
    guidance_scale: float | None = None
    """CFG scale of the predictions; default: objective.guidance_scale. The authors': 5."""
    seed: int = 0
    checkpoint_every: int = 200
    """Steps between checkpoints."""
    smoke: bool = False
    """Three steps with random weights of true shape, to test that everything runs."""

    def check(self) -> None:
        """Checks ranges. Raises HyperAlignError."""
        for name in ("steps", "batch", "checkpoint_every"):
            require(getattr(self, name) >= 1, f"--{name.replace('_', '-')}", getattr(self, name), "1 or more")
        require(self.lr > 0, "--lr", self.lr, "above 0")
        require(self.warmup >= 0, "--warmup", self.warmup, "0 or more")
        require(self.out.suffix == ".safetensors", "--out", self.out, "a file that ends in .safetensors")
        check_writable(self.out, "Choose another --out.")

    def learning_rate(self, step: int) -> float:
        """Returns the rate of a step: linear warm-up, then linear decay."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        return self.lr * (self.steps - step) / max(1, self.steps - self.warmup)

    def identity(self, reward: str, base: str, guidance_scale: float) -> str:
        """Returns what decides what a training computes, as JSON."""
        table = {key: str(value) for key, value in asdict(self).items()}
        for key in ("recipe", "out", "checkpoint_every"):
            del table[key]
        return json.dumps(table | {"reward": reward, "base": base, "guidance_scale": guidance_scale})
