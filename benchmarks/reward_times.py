"""What the reward's gradient is worth at each step of a rollout, on the embedded model.

    python -m benchmarks.reward_times

For each step of the training sampler the gradient of L_R (Eq 8) through that step alone is averaged over
prompts, and the parameters move along it by the same distance, once for each step. What counts is how much
the finished images of other prompts gain by that, in the reward and in the metrics that nobody optimises.
The signal's share is alpha^2 / (alpha^2 + sigma^2). Writes benchmarks/results/reward_times.json.
"""

from __future__ import annotations

import copy
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from hyperalign.checkpoint import HyperAlign, load
from hyperalign.hosts.diffusers.adapter import Adapter
from hyperalign.hosts.diffusers.tiny import load_tiny
from hyperalign.tiny.weights import HYPERNETWORKS
from train.models.base import cfg_conditions
from train.models.tiny import Tiny
from train.objective import Rewards, reward_loss, rollout_states
from train.processes import gradient_of
from train.recipe import load_recipe
from train.rollout import rollout
from train.sampling import initial_noise
from train.start import new_hyperalign
from train.tiny.dataset import training_prompts
from train.tiny.evaluate import Scores, sample_all, score
from train.tiny.inputs import tiny_reward

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True)
class Options:
    """Measures the gain of one gradient step for every step of a rollout."""

    start: str = "tiny_s"
    """The embedded hypernetwork whose weights move; `new` is an untrained one."""
    batches: int = 8
    """Batches of prompts whose gradients are averaged."""
    batch: int = 8
    """Prompts of a batch, as in training."""
    validation: int = 96
    """Prompts whose images are scored before and after."""
    validation_steps: int = 12
    """Sampling steps of those images."""
    distance: float = 5e-4
    """Length of the move as a share of the parameters' norm."""
    steps: int = 8
    """Steps of the rollout."""
    out: Path = RESULTS / "reward_times.json"
    """Where the figures go."""


@dataclass(frozen=True, slots=True)
class Setting:
    """The embedded model, its reward, and the hypernetwork to move."""

    base: Tiny
    rewards: Rewards
    hyperalign: HyperAlign
    guidance_scale: float


def gradients(setting: Setting, options: Options) -> Tensor:
    """Returns the gradient of L_R through each step alone for each batch, (steps, batches, parameters)."""
    base, network = setting.base, setting.hyperalign.network.requires_grad_(True)
    adapter, schedule = Adapter(base.backbone, setting.hyperalign), setting.hyperalign.header.schedule
    found: list[list[Tensor]] = [[] for _ in range(options.steps)]
    for batch in tqdm(range(options.batches), "gradients"):
        prompts = training_prompts(options.batch, seed=batch)
        noise = torch.stack([initial_noise(i, batch, base.latent_shape) for i in range(options.batch)])
        cond, uncond = cfg_conditions(base, base, prompts, setting.guidance_scale)
        trajectory = rollout(
            base, adapter, schedule, cond, uncond, noise,
            steps=options.steps, guidance_scale=setting.guidance_scale,
        )  # fmt: skip
        for step in range(options.steps):
            network.zero_grad()
            loss, _ = reward_loss(
                adapter, base, setting.rewards, rollout_states(trajectory, [step], cond, uncond, prompts),
                guidance_scale=setting.guidance_scale, cap=float("inf"),
            )  # fmt: skip
            loss.backward()
            found[step].append(gradient_of(network.parameters()))
    network.requires_grad_(False)
    return torch.stack([torch.stack(each) for each in found])


def moved(hyperalign: HyperAlign, gradient: Tensor, distance: float) -> HyperAlign:
    """Returns a copy whose parameters went down the gradient by a share of their norm."""
    network = copy.deepcopy(hyperalign.network)
    vector = torch.nn.utils.parameters_to_vector(network.parameters())
    change = -distance * vector.norm() * gradient / gradient.norm()
    torch.nn.utils.vector_to_parameters(vector + change, network.parameters())
    return HyperAlign(network, hyperalign.header)


def signal_to_noise(gradients_BN: Tensor) -> float:
    """Returns |E g|^2 / E |g - E g|^2 over batches: how far one batch's gradient points the common way."""
    mean_N, spread_N = gradients_BN.mean(dim=0), gradients_BN.var(dim=0)
    size = mean_N.square().sum() - spread_N.sum() / len(gradients_BN)  # unbiased
    return float(size / spread_N.sum())


def gain(before: Scores, after: Scores) -> dict[str, tuple[float, float]]:
    """Returns the mean of each metric's paired difference and its standard error over prompts."""
    pairs = {
        name: getattr(after, name).float() - getattr(before, name).float()
        for name in ("reward", "validation_reward", "correct", "style")
    }
    return {
        name: (float(change.mean()), float(change.mean(dim=1).std() / len(change) ** 0.5))
        for name, change in pairs.items()
    }


def measured(setting: Setting, options: Options) -> list[dict[str, Any]]:
    """Returns a row for each step of the rollout."""
    base, noise = setting.base, setting.base.noise_schedule

    def scores(hyperalign: HyperAlign) -> Scores:
        return score(sample_all(
            base, hyperalign, options.validation, seeds=(0,), steps=options.validation_steps,
            guidance_scale=setting.guidance_scale,
        ))  # fmt: skip

    gradients_SBN, before = gradients(setting, options), scores(setting.hyperalign)
    rows: list[dict[str, Any]] = []
    for t, gradients_BN in zip(noise.timesteps(options.steps), tqdm(gradients_SBN, "gains"), strict=True):
        mean_N = gradients_BN.mean(dim=0)
        after = scores(moved(setting.hyperalign, mean_N, options.distance))
        rows.append({
            "t": t,
            "signal": float(noise.signal(torch.tensor([t]))),
            "norm": float(gradients_BN.norm(dim=1).mean()),
            "signal_to_noise": signal_to_noise(gradients_BN),
            "gain": gain(before, after),
        })  # fmt: skip
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the rows as Markdown."""
    names = list(rows[0]["gain"])
    lines = [
        f"| t | signal | norm | signal to noise | {' | '.join(names)} |",
        "|---" * (4 + len(names)) + "|",
    ]
    for row in rows:
        gains = " | ".join(f"{mean:+.3f} ± {error:.3f}" for mean, error in row["gain"].values())
        figures = f"{row['t']:.0f} | {row['signal']:.3f} | {row['norm']:.3g} | {row['signal_to_noise']:.3f}"
        lines.append(f"| {figures} | {gains} |")
    return "\n".join(lines)


def setting_of(options: Options) -> Setting:
    """Returns what is measured."""
    config, device = load_recipe(ROOT / "train" / "recipes" / "tiny_s.toml"), torch.device("cpu")
    base = Tiny(load_tiny(device))
    torch.manual_seed(config.run.seed)
    hyperalign = (
        new_hyperalign(config, base.backbone, config.schedule())
        if options.start == "new"
        else load(HYPERNETWORKS / f"{options.start}.safetensors")
    )
    rewards = Rewards({"tiny reward": tiny_reward(device)}, {"tiny reward": 1.0})
    return Setting(base, rewards, hyperalign, config.objective.guidance_scale)


def main(options: Options) -> None:
    """Measures, prints the table and writes the figures."""
    rows = measured(setting_of(options), options)
    print(table(rows))
    described = {**asdict(options), "out": options.out.name}
    versions = {"torch": torch.__version__, "processor": platform.processor() or platform.machine()}
    options.out.write_text(json.dumps({"options": described, "versions": versions, "rows": rows}, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Options))
