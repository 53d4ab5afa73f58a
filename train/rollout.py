"""Sampling with the current hypernetwork: rollouts whose states the reward loss starts from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hyperalign.hosts.diffusers.adapter import Adapter
from hyperalign.hosts.run_state import Chunk, Run
from hyperalign.schedule import Schedule
from train.models.base import Base, Conditions, join


def guided(cond: Tensor, uncond: Tensor, guidance: float) -> Tensor:
    """Returns the classifier-free guided prediction (Ho and Salimans 2022, eq 6)."""
    return uncond + guidance * (cond - uncond)


@dataclass(slots=True)
class Trajectory:
    """A rollout: states x_t (before each step) and when weights were generated."""

    states: list[Tensor]
    times: list[float]
    generated_at: list[int]
    """For each step, the index of the step that generated the weights it used."""
    generations: int
    predictions: list[Tensor]
    """x0-hat of each step."""
    final: Tensor


class Model:
    """The model of one run: the base model, with weights that its schedule renews where it is adapted."""

    def __init__(self, base: Base, adapter: Adapter | None, schedule: Schedule, strength: float) -> None:
        self.base, self.adapter, self.strength = base, adapter, strength
        self.run = Run(schedule)

    def predict(self, x: Tensor, t: float, conditions: Conditions) -> Tensor:
        """Returns the model's output for the samples (x, t, conditions), generating weights when due."""
        call = self.base.call(x, torch.full((x.shape[0],), t, device=x.device), conditions)
        if self.adapter is None:
            output = self.base.backbone(**call)[0]
        else:
            output = self.adapter.predict(self.run, Chunk(None, 0, tuple(x.shape)), call, self.strength)
        return self.base.prediction(output, x)


@torch.no_grad()
def rollout(
    base: Base,
    adapter: Adapter | None,
    schedule: Schedule,
    cond: Conditions,
    uncond: Conditions | None,
    noise_BCHW: Tensor,
    *,
    steps: int,
    guidance: float,
    strength: float = 1.0,
    until: int | None = None,
) -> Trajectory:
    """Samples deterministically: DDIM (Song et al. 2021, eq 12 with eta 0), or Euler for a flow.

    Both are the same step: x0-hat and its noise, mixed anew for the next time.

    Args:
        base: the base model.
        adapter: adapts it; None samples the base.
        schedule: when weights are generated.
        cond: the prompts.
        uncond: the empty prompt for each row; None where guidance is an input of the model.
        noise_BCHW: the initial noise.
        steps: sampling steps.
        guidance: classifier-free guidance scale.
        strength: strength of the adaptation.
        until: stop before this step, once its state is there; None goes to the end.
    """
    times = base.process.times(steps)
    model = Model(base, adapter, schedule, strength)
    conditions = cond if uncond is None else join(cond, uncond)
    x, states, generated_at, predictions = noise_BCHW, list[Tensor](), list[int](), list[Tensor]()
    for index, t in enumerate(times):
        before = model.run.generations
        states.append(x)
        if index == until:
            break
        if uncond is None:
            output = model.predict(x, t, conditions)
        else:
            output = guided(*model.predict(torch.cat([x, x]), t, conditions).chunk(2), guidance)
        generated_at.append(index if model.run.generations > before or not generated_at else generated_at[-1])
        x0, noise = base.process.predictions(x, output, torch.full((x.shape[0],), t, device=x.device))
        predictions.append(x0)
        last = index + 1 == steps
        x = (
            x0
            if last
            else base.process.add_noise(x0, noise, torch.full_like(x[:, 0, 0, 0], times[index + 1]))
        )
    return Trajectory(states, times, generated_at, model.run.generations, predictions, x)
