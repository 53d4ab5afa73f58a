"""DyMO (Xie and Gong 2024, arXiv 2412.00759): two objectives' gradients through the model, by turns.

Early steps bring attributes to their entities in the cross-attention maps (L_sem), late ones raise the reward
of the decoded one-step prediction (-L_pref); those between do both, with weights by how much the prediction
still changes. A moved step is taken again, the more often the steeper its objective is: time travel renoises
x_s to x_t. The reward stands for the authors' step-aware model; their ten distorted copies of a prediction
are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from hyperalign.schedule import Schedule
from train.generation.attention_maps import AttendingDenoiser, semantic_loss
from train.generation.entities import Pairs
from train.generation.gradients import Evaluated, ImageValue, evaluated, rms, shift, step_size
from train.generation.options import DymoOptions
from train.models.base import cfg_conditions
from train.rollout import Denoiser, SampledModel
from train.sampling import Sampler, initial_noise, seed_of
from train.transitions import ddim, renoised

BOTH_FROM, PREFERENCE_FROM = 0.16, 0.5
"""Shares of a run at which both objectives begin, and the semantic one ends (steps 8 and 25 of 50)."""


class Phase(NamedTuple):
    """Steps of a run that share their settings."""

    semantic: bool
    preference: bool
    strength: float
    """Size of a shift, relative to `step_size`, or to rms(e_c - e_u) alone where not `by_scale`."""
    by_scale: bool
    repeats: float
    """How often a step is repeated, for each unit of the first gradient's norm."""


class Table(NamedTuple):
    """The authors' settings of a base model."""

    semantic_weight: float
    end: float
    """Share of the run after which steps are plain."""
    phases: tuple[Phase, Phase, Phase]
    """Semantic, both, preference."""


SD15 = Table(10.0, 1.0, (
    Phase(True, False, 0.2, True, 1.0),
    Phase(True, True, 1.0, False, 1.0),
    Phase(False, True, 1.0, False, 3.0),
))  # fmt: skip
SDXL = Table(50.0, 0.92, (
    Phase(True, False, 0.2, True, 0.5),
    Phase(True, True, 0.2, True, 0.5),
    Phase(False, True, 0.6, True, 1.5),
))  # fmt: skip
FLUX = Table(10.0, 1.0, (
    Phase(True, False, 0.2, True, 1.0),
    Phase(True, True, 0.2, True, 1.0),
    Phase(False, True, 0.2, True, 3.0),
))  # fmt: skip
"""Not the authors': guidance is an input there, and a shift is 0.2 of a flow's step, as in `freedom.py`."""
TABLES = {"sdxl": SDXL, "flux": FLUX}
"""SD 1.5's for the other base models."""


@dataclass(frozen=True, slots=True)
class Dymo:
    """Draws images of one prompt, one at a time."""

    sampler: Sampler
    value: ImageValue
    pairs: Pairs
    table: Table
    options: DymoOptions

    def draw(self, index: int, seed: int) -> Tensor:
        """Returns the image (3, H, W); the prompt's index and the seed decide all random numbers."""
        base, steps, schedule = self.sampler.base, self.sampler.steps, self.sampler.base.noise_schedule
        timesteps, move = schedule.timesteps(steps), ddim(self.options.eta)
        generator = torch.Generator().manual_seed(seed_of(index, seed))
        objective = Objective(self)
        x = initial_noise(index, seed, base.latent_shape)[None].to(base.device)

        def normal() -> Tensor:
            return torch.randn(x.shape, generator=generator).to(x)

        for at, (t, s) in enumerate(pairwise(timesteps)):
            if (phase := self.phase(at / steps)) is None:
                x = move(schedule, x, *objective.plain(x, t), t, s).sample(normal())
                continue
            done, repeats = 0, 0
            while done <= repeats:
                x_t = renoised(schedule, x, s, t, normal()) if done else x
                found = objective.evaluated(x_t, t, phase)
                if not done:
                    steepness = phase.repeats * float(found.gradient.norm())
                    repeats = int(min(steepness, self.options.most_repeats))
                step = move(schedule, x_t, found.x0, found.eps, t, s).sample(normal())
                x = step + self.shift(found, phase, t, s)
                done += 1
        with torch.no_grad():
            x0, _ = objective.plain(x, timesteps[-1])
            return base.decode(x0)[0].float().clamp(0.0, 1.0).cpu()

    def phase(self, done: float) -> Phase | None:
        """Returns the phase of a step before which a share of the run is done; None for a plain step."""
        first, last = self.options.optimised
        if not first <= done < min(last, self.table.end):
            return None
        found = self.table.phases[(done >= BOTH_FROM) + (done >= PREFERENCE_FROM)]
        found = found._replace(semantic=found.semantic and bool(self.pairs))
        return found if found.semantic or found.preference else None

    def shift(self, found: Evaluated, phase: Phase, t: float, s: float) -> Tensor:
        """Returns how far a step is moved."""
        strength, schedule = self.options.strength * phase.strength, self.sampler.base.noise_schedule
        if found.correction is not None and not phase.by_scale:
            return shift(found, strength, rms(found.correction))
        return shift(found, strength, step_size(found, schedule, self.sampler.guidance_scale, t, s))


class Objective:
    """What one image's steps follow; it remembers the last one-step prediction."""

    def __init__(self, own: Dymo) -> None:
        sampler, self._own = own.sampler, own
        base, scale = sampler.base, sampler.guidance_scale
        cond, uncond = cfg_conditions(base, sampler.encoder, list(own.value.prompts), scale)
        model = SampledModel(base, None, Schedule("I"), 1.0)
        self._denoiser = Denoiser(model, cond, uncond, scale)
        self._attending = AttendingDenoiser(model, cond, uncond, scale)
        self._last: Tensor | None = None

    @torch.no_grad()
    def plain(self, x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        """Returns x0-hat and eps-hat."""
        x0, eps = self._denoiser.predictions(x, t)
        self._last = x0
        return x0, eps

    def evaluated(self, x: Tensor, t: float, phase: Phase) -> Evaluated:
        """Returns model and objective at x_t, the greater the better. Raises HyperAlignError."""
        own = self._own
        denoiser = self._attending if phase.semantic else self._denoiser

        def value(x0: Tensor) -> Tensor:
            weight, preferred = own.table.semantic_weight, 1.0
            if phase.semantic and phase.preference:
                fades, preferred = dynamic_weights(change(x0.detach(), self._last))
                weight = weight * fades
            total = torch.zeros(len(x0), device=x0.device)
            if phase.semantic:
                total = total - weight * semantic_loss(self._attending.maps_BQL, own.pairs)
            if phase.preference:
                total = total + preferred * own.options.scale * own.value(x0)
            return total

        found = evaluated(denoiser, own.sampler.base.noise_schedule, x, t, value)
        self._last = found.x0
        return found


def normalised(x0_BCHW: Tensor) -> Tensor:
    """Returns latents with mean 0 and deviation 1 in each channel."""
    var, mean = torch.var_mean(x0_BCHW.float(), dim=(2, 3), keepdim=True)
    return (x0_BCHW - mean) / (var + 1e-5).sqrt()


def change(x0_BCHW: Tensor, last_BCHW: Tensor | None) -> Tensor:
    """Returns d = |n(x0) - n(last)| / |n(last)| of each sample (B,); 0 where there is no last prediction."""
    if last_BCHW is None:
        return torch.zeros(len(x0_BCHW), device=x0_BCHW.device)
    now, then = normalised(x0_BCHW).flatten(1), normalised(last_BCHW).flatten(1)
    return (now - then).norm(dim=1) / then.norm(dim=1).clamp_min(1e-12)


def dynamic_weights(change_B: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the weights 1 - e^-d of the semantic objective, of its greatest, and e^-d of preference."""
    return 1.0 - torch.exp(-change_B), torch.exp(-change_B)
