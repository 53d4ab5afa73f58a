"""What a hypernetwork's conditioning is worth: its own weights against the same weights averaged.

Images are sampled from the same prompts and noise, each time with weights that lack what they depended on:

- `averaged`: one mean over all prompts, noises and steps, which serves the empty prompt too: a static LoRA
- `averaged over prompts`: at each step the mean over all prompts
- `averaged over times`: for each image the mean over its steps
- `of another prompt`: those generated for the next prompt of the list

What the images lose by it is the conditioning gain. A share of the weights that depends on the prompt
(`weight_shares`) is a symptom of conditioning; the gain is the effect.

Averaging cores averages the weight changes, as dW = B_aux K A_aux is linear in K.

Shape letters: N images, E evaluations, G generations, M targets, D = b, A = a.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hyperalign.checkpoint import HyperAlign
from hyperalign.conditioning import CHANGES, Change
from hyperalign.errors import HyperAlignError
from hyperalign.hosts.run_state import Chunk, Run, Time
from hyperalign.hosts.tracing import TracedRun
from hyperalign.schedule import Schedule
from hyperalign.trace_energy import image_shares
from train.analysis.weights import trace_prompts
from train.evaluation.table import Metric, Numbers
from train.log import Metrics
from train.sampling import SampledImages, Sampler, draw_all

SHARE_PROMPTS, SHARE_STEPS = 32, 6
"""What the shares are measured on: a small part of a validation's work."""

Judge = Callable[[SampledImages], Mapping[str, Numbers]]
"""Images -> by metric, the value of each prompt (P,), greater being better."""
Strata = Mapping[str, Sequence[Sequence[int]]]
"""By metric, the groups of prompts whose means it averages; a metric without any averages all prompts."""


def identity(values: Tensor) -> Tensor:
    """Returns the values."""
    return values


class GivenRun(Run):
    """A run whose weights are given instead of generated."""

    def __init__(self, schedule: Schedule, cores_EBMDA: Sequence[Tensor]) -> None:
        """Takes the weights of each evaluation."""
        super().__init__(schedule)
        self._given = cores_EBMDA

    def due(self, chunks: Sequence[Chunk], u: float | Time) -> list[int]:
        """Returns that nothing is due."""
        del chunks, u
        return []

    def cores(self, chunks: Sequence[Chunk]) -> Tensor:
        """Returns the weights of the current evaluation."""
        del chunks
        return self._given[self.evaluations - 1]


@dataclass(frozen=True, slots=True)
class Generated:
    """The weights that were generated for N images, on the CPU."""

    halves: tuple[Tensor, ...]
    """Each (G, N, M, D, A): those of the prompts and, with classifier-free guidance, of the empty prompt."""
    used: tuple[int, ...]
    """The generation whose weights each evaluation uses, E."""

    def changed(self, change: Change, setting: Setting) -> Generated:
        """Returns weights that lack what they depended on; those that all images share have N = 1."""
        counts_G = torch.bincount(torch.tensor(self.used)).to(self.halves[0])
        part_G = (counts_G / counts_G.sum()).view(-1, 1, 1, 1, 1)
        by_time = [(part_G * half).sum(dim=0, keepdim=True) for half in self.halves]
        if change == "averaged":
            mean = setting.shared(torch.stack(by_time).mean(dim=(0, 2)).unsqueeze(1))
            return Generated((mean,) * len(self.halves), (0,) * len(self.used))
        if change == "averaged over times":
            return Generated(tuple(by_time), (0,) * len(self.used))
        if change == "averaged over prompts":
            means = (setting.shared(half.mean(dim=1, keepdim=True)) for half in self.halves)
            return Generated(tuple(means), self.used)
        return Generated(tuple(half.roll(-len(setting.seeds), dims=1) for half in self.halves), self.used)

    def rows(self, images: slice, device: torch.device) -> list[Tensor]:
        """Returns the cores of each evaluation for some images, as a sampler stacks their two halves."""
        count = images.stop - images.start

        def cores(generation: int) -> Tensor:
            return torch.cat([
                half[generation].expand(count, -1, -1, -1) if half.shape[1] == 1 else half[generation, images]
                for half in self.halves
            ]).to(device)  # fmt: skip

        made = [cores(generation) for generation in range(len(self.halves[0]))]
        return [made[generation] for generation in self.used]


@dataclass(frozen=True, slots=True)
class Setting:
    """What is sampled: every prompt at every seed."""

    sampler: Sampler
    prompts: Sequence[str]
    seeds: Sequence[int]
    batch: int
    indices: Sequence[int] | None = None
    """The prompts' places in the whole list, which decide their noise; None for a whole list."""
    shared: Callable[[Tensor], Tensor] = identity
    """Averages over the processes that share the prompts."""

    @property
    def hyperalign(self) -> HyperAlign:
        """The hypernetwork that the sampler has. Raises HyperAlignError if it has none."""
        adapter = self.sampler.adapter
        if adapter is None:
            raise HyperAlignError("Nothing generates weights: the sampler has no hypernetwork. Give it one.")
        return HyperAlign(adapter.network, adapter.header)

    @property
    def schedule(self) -> Schedule:
        """When the hypernetwork generates."""
        return self.hyperalign.header.schedule

    def sampled(self, run_of: Callable[[slice], Run]) -> SampledImages:
        """Samples all images, each batch with the weights of its run."""
        return draw_all(self.sampler, self.prompts, self.seeds, self.batch, self.indices, run_of)


class KeptRun(TracedRun):
    """A run that keeps its weights on the CPU, since those of all images are needed together."""

    def write(self, chunk: Chunk, cores_RMDA: Tensor, u: float | Time) -> None:
        """Also moves what is remembered."""
        super().write(chunk, cores_RMDA, u)
        evaluation, cores = self.written[chunk].pop()
        self.written[chunk].append((evaluation, cores.cpu()))


def own_weights(setting: Setting) -> tuple[SampledImages, Generated]:
    """Samples with the hypernetwork's own weights; returns the images and the weights."""
    runs: list[KeptRun] = []

    def run_of(_: slice) -> Run:
        runs.append(KeptRun(setting.schedule, keeps_predictions=False))
        return runs[-1]

    images = setting.sampled(run_of)
    halves = 2 if setting.sampler.base.cfg else 1
    written = [next(iter(run.written.values())) for run in runs]  # a rollout is one chunk
    batches = [torch.stack([cores for _, cores in each]).chunk(halves, dim=1) for each in written]
    at = [evaluation for evaluation, _ in written[0]]
    used = tuple(sum(a <= evaluation for a in at) - 1 for evaluation in range(runs[0].evaluations))
    return images, Generated(tuple(torch.cat(parts, dim=1) for parts in zip(*batches, strict=True)), used)


def given_weights(setting: Setting, weights: Generated) -> SampledImages:
    """Samples with given weights."""
    device = setting.sampler.base.device
    return setting.sampled(lambda images: GivenRun(setting.schedule, weights.rows(images, device)))


@torch.no_grad()
def conditioning_gain(
    setting: Setting, judge: Judge, strata: Strata, progress: Callable[[], object] = lambda: None
) -> dict[str, dict[str, Any]]:
    """Returns what is lost without conditioning: own weights less changed ones.

    Args:
        setting: what is sampled, with the hypernetwork.
        judge: scores images by metrics that no training optimised.
        strata: the groups of prompts of its metrics.
        progress: is called after each of the 5 rounds of sampling.

    Returns:
        By change and metric, `gain` and the ends `low` and `high` of its 95 % interval; without these where
        a group has one prompt, which cannot be resampled.

    Raises:
        HyperAlignError: fewer than 2 prompts.
    """
    check_prompts(len(setting.prompts))
    images, weights = own_weights(setting)
    own = judge(images)
    progress()
    found: dict[str, dict[str, Any]] = {}
    for change in CHANGES:
        changed = judge(given_weights(setting, weights.changed(change, setting)))
        found[change] = {name: _difference(own[name], changed[name], strata.get(name, ())) for name in own}
        progress()
    return found


def _difference(own_P: Numbers, changed_P: Numbers, strata: Sequence[Sequence[int]]) -> dict[str, float]:
    found = Metric("", {"own": own_P, "changed": changed_P}, strata).difference("own", "changed")
    return {"gain": found.value} | ({} if found.interval is None else found.interval._asdict())


def weight_shares(setting: Setting, steps: int = SHARE_STEPS) -> dict[str, float]:
    """Returns the shares of PARTS in the energy of the weights; all prompts start from one noise.

    So what differs between the prompts is the prompts' alone. Empty for weights of zero. Raises
    HyperAlignError for fewer than 2 prompts.
    """
    check_prompts(len(setting.prompts))
    sampler = setting.sampler
    traces = trace_prompts(
        sampler.base, sampler.encoder, setting.hyperalign, setting.prompts[:SHARE_PROMPTS], steps=steps,
        guidance_scale=sampler.guidance_scale, batch=setting.batch, same_noise=True,
    )  # fmt: skip
    return image_shares([*traces])


def conditioning(setting: Setting, judge: Judge, strata: Strata, with_gain: bool) -> Metrics:
    """Returns the `shares` and, if asked for, the `gain`; nothing for a static LoRA or a single prompt."""
    if setting.hyperalign.network.is_static or len(setting.prompts) < 2:
        return {}
    gain = {"gain": conditioning_gain(setting, judge, strata)} if with_gain else {}
    return {"conditioning": {"shares": weight_shares(setting), **gain}}


def check_conditional(hyperalign: HyperAlign) -> None:
    """Raises HyperAlignError for a static LoRA, whose weights depend on nothing."""
    if hyperalign.network.is_static:
        raise HyperAlignError(
            "The file is a static LoRA (conditioning none): its weights are the same for all prompts and "
            "times, so there is nothing to measure. Name a hypernetwork that generates weights."
        )


def check_prompts(count: int) -> None:
    """Raises HyperAlignError for fewer than 2 prompts, whose weights cannot differ by prompt."""
    if count < 2:
        raise HyperAlignError(
            f"Found {count} prompt; what depends on the prompt shows over 2 or more. Give a longer list."
        )
