"""AlignProp (Prabhudesai et al. 2023, arXiv 2310.03739) and DRaFT-K (Clark et al. 2023, arXiv 2309.17400).

The loss is -R of the final image of a rollout. Its gradient passes through the last K steps, through x as
well as through the model: truncated backpropagation. AlignProp draws K for each training step, DRaFT-K
fixes it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from train.methods.rewarded import RewardTally
from train.methods.settings import AlignPropConfig
from train.methods.step import Step, StepMetrics
from train.models.base import Conditions, cfg_conditions, take
from train.objective import States, guided_prediction, scored
from train.rollout import Trajectory, generation_steps, rollout
from train.transitions import ddim


def alignprop(step: Step) -> Iterator[StepMetrics]:
    """Adds the gradient of the reward of final images."""
    o, rng = step.objective, step.randomness.generator(4)
    prompts, noise = step.prompts_and_noise(o.prompt_batch, rng)
    first = o.rollout_steps - steps_with_gradient(step.config.alignprop, o.rollout_steps, rng)
    noises = [step.normal(len(prompts), rng) for _ in range(o.rollout_steps - 1)]
    cond, uncond = cfg_conditions(step.base, step.inputs.encoder, prompts, o.guidance_scale)
    tail = Tail(step, first, prompts, cond, uncond, noises)
    with step.autocast():
        trajectory = rollout(
            step.base, step.adapter, step.schedule, cond, uncond, noise,
            steps=o.rollout_steps, guidance_scale=o.guidance_scale, until=first, move=tail.move,
        )  # fmt: skip
    tally = RewardTally()
    for part, share in step.micro_batches(len(prompts)):
        with step.autocast():
            x0 = tail.final(trajectory, part)
            loss_B, scores = scored(step.base, step.inputs.rewards, x0, prompts[part], o.reward_cap)
        step.backward(o.reward_weight * share * loss_B.mean())
        tally.add(loss_B.mean(), scores, share)
    yield tally.metrics(step)


def steps_with_gradient(config: AlignPropConfig, steps: int, rng: np.random.Generator) -> int:
    """Returns K, from 1 to all steps but the first."""
    if config.last_steps:
        return min(config.last_steps, steps)
    drawn = round(rng.normal(config.mean_share * steps, config.std_share * steps))
    return min(max(1, drawn), max(1, steps - 1))


class Tail:
    """The steps of a rollout that have a gradient, with the noise of all its steps."""

    def __init__(
        self,
        step: Step,
        first: int,
        prompts: list[str],
        cond: Conditions,
        uncond: Conditions | None,
        noises: list[Tensor],
    ) -> None:
        self.step, self.first, self.prompts, self.noises = step, first, prompts, noises
        self.cond, self.uncond = cond, uncond
        schedule = step.base.noise_schedule
        self.timesteps = schedule.timesteps(step.objective.rollout_steps)
        self.generated_at = generation_steps(
            step.schedule, [t / schedule.last_timestep for t in self.timesteps]
        )
        self.transition = ddim(step.config.alignprop.eta)

    def move(self, index: int, x: Tensor, x0: Tensor, eps: Tensor, part: slice = slice(None)) -> Tensor:
        """Returns the x of the next timestep."""
        t, s = self.timesteps[index], self.timesteps[index + 1]
        found = self.transition(self.step.base.noise_schedule, x, x0, eps, t, s)
        return found.sample(self.noises[index][part])

    def final(self, trajectory: Trajectory, part: slice) -> Tensor:
        """Returns the final latents of some samples, with their gradient through the tail's steps."""
        step, o = self.step, self.step.objective
        visited = [state[part] for state in trajectory.states]
        x = visited[-1]
        for index in range(self.first, o.rollout_steps):
            output = guided_prediction(
                step.adapter, step.base, self._states(index, x, visited, part), o.guidance_scale,
                o.conditional_only,
            )  # fmt: skip
            t_B = torch.full((len(x),), self.timesteps[index], device=x.device)
            x0, eps = step.base.noise_schedule.predictions(x, output, t_B)
            if index + 1 == o.rollout_steps:
                return x0
            x = self.move(index, x, x0, eps, part)
            visited.append(x.detach())
        return x

    def _states(self, index: int, x: Tensor, visited: list[Tensor], part: slice) -> States:
        """Returns a step's states; what its weights are generated from has no gradient."""
        source, count = self.generated_at[index], len(x)
        t_B, t_gen_B = (torch.full((count,), self.timesteps[at], device=x.device) for at in (index, source))
        uncond = None if self.uncond is None else take(self.uncond, part)
        return States(
            x, t_B, visited[source], t_gen_B, take(self.cond, part), uncond, self.prompts[part],
            [source == index] * count,
        )  # fmt: skip
