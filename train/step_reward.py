"""Trains SPO's step-aware preference model: a reward that judges one-step predictions at any noise level.

python train/step_reward.py --recipe R --out models/step_reward/sd15.safetensors
accelerate launch train/step_reward.py --recipe R --pairs data/pairs --out models/step_reward/sd15.safetensors

R is the recipe of the SPO run: its base model makes the predictions, and its spo.step_reward names the file.
The pairs are those of train/encode.py --pairs, of the embedded tiny model its own scenes. Stop it at any
time; the same command goes on from its last checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

if not __package__:
    # `python train/step_reward.py` puts train/ on sys.path, where train.py hides the package `train`.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
import tyro
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from hyperalign.errors import HyperAlignError
from hyperalign.files import first_line
from hyperalign.rewards import Reward, loading
from hyperalign.schedule import Schedule
from train.checkpoints import TrainingCheckpoints
from train.config import TrainConfig
from train.data.streams import PairDataset
from train.inputs import RunInputs, load_inputs
from train.methods.pairs import Pairs
from train.models.base import cfg_conditions
from train.models.rewards import load_reward
from train.models.step_aware import (
    StepAware,
    StepAwareHeader,
    base_fingerprint,
    make_step_aware,
    meta_network,
    save_step_aware,
)
from train.objective import NoisedImages, guided_prediction, noised_states, without_nan
from train.preflight.smoke import smoke_config, smoke_shape
from train.processes import average_gradients, mean_number
from train.randomness import StepRandomness, normal, sample_u
from train.recipe import load_recipe
from train.step_reward_options import Options
from train.transfer import to_device


def pairs_recipe(options: Options) -> TrainConfig:
    """Returns the recipe, made to read pairs instead of rewards and validation. Raises HyperAlignError."""
    config = load_recipe(options.recipe)
    if options.smoke:
        config = smoke_config(config)
    guidance = options.guidance_scale
    o = dataclasses.replace(
        config.objective, method="dpo", rewards={}, reward_weight=0.0, preference_weight=1.0,
        guidance_scale=config.objective.guidance_scale if guidance is None else guidance,
    )  # fmt: skip
    folder = config.data.preference if options.pairs is None else options.pairs
    return dataclasses.replace(
        config,
        objective=o,
        data=dataclasses.replace(config.data, preference=folder),
        validation=dataclasses.replace(config.validation, every=0, rewards={}),
    )


def noised_pairs(
    pairs: PairDataset, inputs: RunInputs, count: int, position: int, randomness: StepRandomness
) -> Pairs:
    """Returns this process's pairs, both images of one at the same timestep with the same noise."""
    rng, part, whole = randomness.generator(0), randomness.part(count), count * randomness.processes
    x0, rejected, captions = pairs.pairs(position, whole, rng, part)
    t_B = inputs.base.noise_schedule.at_position(sample_u(whole, (0.0, 1.0), "uniform", rng)[part])
    eps = normal((whole, *x0.shape[1:]), rng)[part]
    x0, rejected, eps = (to_device(latents, inputs.base.device) for latents in (x0, rejected, eps))
    return Pairs(NoisedImages(x0, eps, eps, t_B, captions), rejected)


@torch.no_grad()
def predicted_images(inputs: RunInputs, pairs: Pairs, guidance_scale: float) -> tuple[Tensor, Tensor]:
    """Returns the decoded one-step predictions of all pairs (2B, 3, H, W), and which are finite (2B,)."""
    base, images = inputs.base, pairs.both()
    cond, uncond = cfg_conditions(base, inputs.encoder, images.captions, guidance_scale)
    states = noised_states(base, Schedule("S"), images, cond, uncond)
    output = guided_prediction(None, base, states, guidance_scale)
    x0, _ = base.noise_schedule.predictions(states.x, output, states.t_B)
    return without_nan(base.decode(x0).float())


def score_gaps(
    model: StepAware, inputs: RunInputs, pairs: Pairs, guidance_scale: float
) -> tuple[Tensor, Tensor]:
    """Returns the scores of preferred less those of rejected images (B,), and which pairs are finite."""
    images, finite_2B = predicted_images(inputs, pairs, guidance_scale)
    both = pairs.both()
    u_2B = both.t_B / inputs.base.noise_schedule.last_timestep
    preferred_B, rejected_B = model(images, both.captions, u_2B).chunk(2)
    first_B, second_B = finite_2B.chunk(2)
    return preferred_B - rejected_B, first_B & second_B


def pair_loss(gap_B: Tensor, finite_B: Tensor) -> Tensor:
    """Returns the mean cross-entropy of softmax over a pair's two scores: -log sigmoid(s_w - s_l)."""
    return torch.where(finite_B, -F.logsigmoid(gap_B), 0.0).mean()


class StepRewardTraining:
    """A training in one file, with checkpoints in a folder beside it."""

    def __init__(self, options: Options, accelerator: Accelerator) -> None:
        """Loads everything, and the last checkpoint if there is one. Raises HyperAlignError."""
        options.check()
        config, device = pairs_recipe(options), accelerator.device
        self.config, self.accelerator = config, accelerator
        name = options.reward or next(iter(load_recipe(options.recipe).objective.rewards), "")
        meta_network(name)
        self.base = "random weights" if options.smoke else base_fingerprint(config)
        self.options = dataclasses.replace(options, steps=3) if options.smoke else options
        self.checkpoints = TrainingCheckpoints(options.out.with_suffix(".checkpoints"), 1)
        self.identity = self.options.identity(name, self.base, config.objective.guidance_scale)
        saved = self._saved()
        shape = smoke_shape(config, device) if options.smoke else None
        torch.manual_seed(options.seed)
        self.model = make_step_aware(self._reward(name), options.tower)
        self.inputs = load_inputs(config, accelerator, shape)
        self.parameters = list(self.model.trained().values())
        self.optimiser = torch.optim.AdamW(self.parameters, options.lr, weight_decay=options.weight_decay)
        self.step, self.right = 0, list[float]()
        if saved is not None:
            self._resume(saved)

    def _reward(self, name: str) -> Reward:
        """Returns a reward of this training's own, in float32: its image tower is changed."""
        device = self.accelerator.device
        if self.options.smoke:
            return loading.random_weights(name, device=device, dtype=torch.float32)
        return load_reward(self.config, name, device, torch.float32)

    def _saved(self) -> dict[str, Any] | None:
        out, folder = self.options.out, self.checkpoints.folder
        saved = self.checkpoints.newest()
        if saved is None and out.exists():
            raise HyperAlignError(f"{out} is there already. Delete it, or choose another --out.")
        if saved is not None and saved["identity"] != self.identity:
            before, now = json.loads(saved["identity"]), json.loads(self.identity)
            changes = (
                f"{key} was {before.get(key)} and is {now[key]}" for key in now if before.get(key) != now[key]
            )
            raise HyperAlignError(
                f"{folder} holds another training: {'; '.join(changes)}. Delete it, or choose another --out."
            )
        return saved

    def _resume(self, saved: dict[str, Any]) -> None:
        with torch.no_grad():
            for name, parameter in self.model.trained().items():
                parameter.copy_(saved["weights"][name])
        self.optimiser.load_state_dict(saved["optimiser"])
        self.step, self.right = saved["step"], saved["right"]

    def fit(self, show: Callable[[dict[str, float]], None]) -> None:
        """Trains to the last step and writes the file. Raises HyperAlignError."""
        while self.step < self.options.steps:
            show(self._train_step())
            if self.step % self.options.checkpoint_every == 0 and self.accelerator.is_main_process:
                self._save_checkpoint()
        if self.accelerator.is_main_process:
            save_step_aware(self.options.out, self.model, self._header())
            shutil.rmtree(self.checkpoints.folder, ignore_errors=True)

    def _train_step(self) -> dict[str, float]:
        """Takes a step; returns its loss and the share of pairs that the model ranks right."""
        options, accelerator = self.options, self.accelerator
        processes = accelerator.num_processes
        randomness = StepRandomness(options.seed, self.step, accelerator.process_index, processes)
        if self.inputs.pairs is None:
            raise HyperAlignError("There are no pairs of images; set data.preference or --pairs.")
        position = self.step * options.batch * processes
        pairs = noised_pairs(self.inputs.pairs, self.inputs, options.batch, position, randomness)
        gap_B, finite_B = score_gaps(self.model, self.inputs, pairs, self.config.objective.guidance_scale)
        loss = pair_loss(gap_B, finite_B)
        self.optimiser.zero_grad()
        loss.backward()
        average_gradients(self.parameters, accelerator)
        norm = nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for group in self.optimiser.param_groups:
            group["lr"] = options.learning_rate(self.step)
        if bool(torch.isfinite(norm)):
            self.optimiser.step()
        self.step += 1
        right = mean_number(float((gap_B > 0).float().mean()), accelerator)
        self.right.append(right)
        return {"loss": mean_number(float(loss.detach()), accelerator), "right": right}

    def _save_checkpoint(self) -> None:
        weights = {name: value.detach() for name, value in self.model.trained().items()}
        state = {"step": self.step, "weights": weights, "optimiser": self.optimiser.state_dict()}
        self.checkpoints.save(state | {"right": self.right, "identity": self.identity}, self.step)

    def accuracy(self) -> tuple[float, float]:
        """Returns the share of pairs ranked right in the first and in the last tenth of the steps."""
        tenth = max(1, len(self.right) // 10)
        first, last = self.right[:tenth], self.right[-tenth:]
        return sum(first) / len(first), sum(last) / len(last)

    def _header(self) -> StepAwareHeader:
        o, data = self.config.objective, self.config.data
        asked = {key: value for key, value in asdict(self.options).items() if key != "out"}
        training: dict[str, Any] = {
            key: value.name if isinstance(value, Path) else str(value) for key, value in asked.items()
        }
        training |= {
            "guidance_scale": o.guidance_scale, "data": data.preference_name or data.preference.name,
            "pairs_right": self.accuracy(),
        }  # fmt: skip
        versions = {name: metadata.version(name) for name in ("torch", "diffusers", "transformers")}
        return StepAwareHeader(
            self.base, self.model.reward.name, self.model.tower, training,
            versions | {"python": platform.python_version()},
        )  # fmt: skip


def run(options: Options, accelerator: Accelerator) -> StepRewardTraining:
    """Trains with a progress bar in the main process. Raises HyperAlignError."""
    training = StepRewardTraining(options, accelerator)
    quiet = not accelerator.is_main_process
    bar: tqdm[Any] = tqdm(total=training.options.steps, initial=training.step, disable=quiet)

    def show(metrics: dict[str, float]) -> None:
        bar.set_postfix({key: f"{value:.3f}" for key, value in metrics.items()})
        bar.update(1)

    with bar:
        training.fit(show)
    return training


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = tyro.cli(Options, args=arguments, description=__doc__)
    accelerator = Accelerator()
    try:
        training = run(options, accelerator)
    except HyperAlignError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except torch.cuda.OutOfMemoryError as error:
        print(
            f"error: the GPU's memory is full ({first_line(error)}) Lower --batch, now {options.batch}, give "
            '--no-tower or model.gradient_checkpointing = "all", and choose another --out.',
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("\nStopped; run the same command again to go on from its last checkpoint.", file=sys.stderr)
        return 130
    if accelerator.is_main_process:
        before, after = training.accuracy()
        print(
            f"Wrote {options.out}: it ranked {before:.1%} of the noised pairs right in the first tenth of "
            f"the steps, and {after:.1%} in the last."
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
