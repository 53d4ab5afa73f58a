"""Rollouts: sampling with the current hypernetwork; the reward loss starts from their states x_t."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hyperalign.hosts.diffusers.adapter import Adapter
from hyperalign.hosts.run_state import Chunk, Run
from hyperalign.schedule import Schedule
from train.models.base import Base, Conditions, join
from train.noise import implied_noise


def guided(cond: Tensor, uncond: Tensor, guidance_scale: float) -> Tensor:
    """Returns the classifier-free guided prediction (Ho and Salimans 2022, eq 6)."""
    return uncond + guidance_scale * (cond - uncond)


@dataclass(slots=True)
class Trajectory:
    """A rollout: its states x_t before each step, and when its weights were generated."""

    states: list[Tensor]
    timesteps: list[float]
    generated_at: list[int]
    """For each state, the index of the one that its weights are generated from."""
    generations: int
    predictions: list[Tensor]
    """x0-hat of each step."""
    final: Tensor


class SampledModel:
    """The model that one run samples: the base model, with weights that the run's schedule renews."""

    def __init__(
        self,
        base: Base,
        adapter: Adapter | None,
        schedule: Schedule,
        strength: float,
        run: Run | None = None,
    ) -> None:
        self.base, self.adapter, self.strength = base, adapter, strength
        self.run = Run(schedule) if run is None else run

    def predict(self, x: Tensor, t: float, conditions: Conditions) -> Tensor:
        """Returns the model's output for the samples (x, t, conditions), generating weights when due."""
        call = self.base.call(x, torch.full((x.shape[0],), t, device=x.device), conditions)
        if self.adapter is None:
            output = self.base.backbone(**call)[0]
        else:
            u = t / self.base.noise_schedule.last_timestep
            output = self.adapter.predict(self.run, Chunk(None, 0, tuple(x.shape)), call, u, self.strength)
        return self.base.prediction(output, x)


class Denoiser:
    """The one-step predictions of a run's model, with classifier-free guidance where it has any."""

    def __init__(
        self, model: SampledModel, cond: Conditions, uncond: Conditions | None, guidance_scale: float
    ) -> None:
        self.base, self.guidance_scale = model.base, guidance_scale
        self._model, self._has_uncond = model, uncond is not None
        self._conditions = cond if uncond is None else join(cond, uncond)

    def outputs(self, x: Tensor, t: float) -> tuple[Tensor, Tensor | None]:
        """Returns the model's outputs for the prompts and for the empty prompt, None where it has none."""
        if not self._has_uncond:
            return self._model.predict(x, t, self._conditions), None
        cond, uncond = self._model.predict(torch.cat([x, x]), t, self._conditions).chunk(2)
        return cond, uncond

    def predictions(self, x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        """Returns x0-hat and eps-hat."""
        cond, uncond = self.outputs(x, t)
        output = cond if uncond is None else guided(cond, uncond, self.guidance_scale)
        return self.base.noise_schedule.predictions(x, output, torch.full((x.shape[0],), t, device=x.device))


Move = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""Index of a step, x_t, x0-hat and eps-hat -> the x of the next timestep."""
Guide = Callable[[Denoiser, Tensor, int], Tensor | None]
"""Model, x_t and index of a step -> the x0-hat to go on with; None for the model's own."""


def generation_steps(schedule: Schedule, times: Sequence[float]) -> list[int]:
    """Returns for each of the times u of a run the index of the one that generates the weights it uses."""
    steps = list[int]()
    for index, u in enumerate(times):
        due = schedule.is_due(u, schedule.segment(times[steps[-1]]) if steps else None)
        steps.append(index if due else steps[-1])
    return steps


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
    guidance_scale: float,
    strength: float = 1.0,
    until: int | None = None,
    run: Run | None = None,
    guide: Guide | None = None,
    move: Move | None = None,
) -> Trajectory:
    """Samples deterministically: DDIM (Song et al. 2021, eq 12 with eta 0), or Euler for a flow.

    Both are the same step: x0-hat and eps-hat, mixed for the next timestep. The last step ends at x0-hat.

    Args:
        base: the base model.
        adapter: adapts it; None samples the unadapted model.
        schedule: when weights are generated.
        cond: the prompts.
        uncond: the empty prompt for each sample; None where the guidance is an input of the model.
        noise_BCHW: the initial noise.
        steps: sampling steps.
        guidance_scale: of classifier-free guidance.
        strength: strength of the adaptation.
        until: stop before this step, with its state x_t as the last; None takes all steps.
        run: keeps the run's weights, as a `TracedRun` does for those who look at them; None for a plain one.
        guide: moves x0-hat at the steps that it chooses.
        move: takes the steps but the last, with noise of its own; None takes them deterministically.
    """
    timesteps = base.noise_schedule.timesteps(steps)
    model = SampledModel(base, adapter, schedule, strength, run)
    denoiser = Denoiser(model, cond, uncond, guidance_scale)
    x, states, predictions = noise_BCHW, list[Tensor](), list[Tensor]()
    for index, t in enumerate(timesteps):
        states.append(x)
        if index == until:
            break
        moved = None if guide is None else guide(denoiser, x, index)
        if moved is None:
            x0, eps = denoiser.predictions(x, t)
        else:
            t_B = torch.full((x.shape[0],), t, device=x.device)
            x0, eps = moved, implied_noise(base.noise_schedule, x, moved, t_B)
        predictions.append(x0)
        if index + 1 == steps:
            x = x0
        elif move is not None:
            x = move(index, x, x0, eps)
        else:
            t_next_B = torch.full_like(x[:, 0, 0, 0], timesteps[index + 1])
            x = base.noise_schedule.add_noise(x0, eps, t_next_B)
    times = [t / base.noise_schedule.last_timestep for t in timesteps[: len(states)]]
    generated_at = generation_steps(schedule, times)
    return Trajectory(states, timesteps, generated_at, model.run.generations, predictions, x)
