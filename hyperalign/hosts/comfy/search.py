"""Best-of-N and noise search with the host's own sampling: previews, progress over all samples, Cancel.

Cancelling raises the host's InterruptProcessingException in a sampler step, which also clears the host's
flag. If it is caught after a sample is finished, the host continues with the next node, as after a complete
search.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import comfy.sample
import comfy.utils
import latent_preview
import torch
from comfy.model_management import InterruptProcessingException, throw_exception_if_processing_interrupted
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...errors import HyperAlignError
from ...finite import all_finite
from ...search import Candidate, Plan, Search
from . import trajectory
from .rewards import HostReward, NotFinite
from .sampling import check_steps, start_of

CANCELLED: Counter[int] = Counter()
"""Number of cancelled searches by seed. It is part of the host's cache key: otherwise the host would return
the result of the cancelled search the next time."""


@dataclass(frozen=True, slots=True)
class SearchResult:
    """The best samples of a search, best first, and all candidates."""

    latents: Tensor
    images_BHWC: Tensor
    scores: list[float]
    seeds: list[int]
    tried: list[tuple[int, float]]
    """Seed and score of each candidate; NaN or infinite if it failed."""
    cancelled: bool

    def table(self, reward: str, planned: int) -> str:
        """Returns a text table of all candidates; kept and failed ones are marked."""
        shown = [f"{score:+8.4f}" if math.isfinite(score) else "  failed" for _, score in self.tried]
        lines = [
            f"{index:>3}  seed {seed:<20} {score}{'  *' if seed in self.seeds else ''}"
            for index, ((seed, _), score) in enumerate(zip(self.tried, shown, strict=True))
        ]
        failed = shown.count("  failed")
        state = "cancelled, best so far" if self.cancelled else "done"
        state += f", {failed} failed" if failed else ""
        return "\n".join([f"{reward}: {len(self.tried)} of {planned} ({state})", *lines])


@dataclass(frozen=True, slots=True)
class Sampling:
    """The arguments of the host's KSampler, except seed and noise."""

    model: ModelPatcher
    positive: Any
    negative: Any
    latent: dict[str, Any]
    steps: int
    cfg: float
    sampler_name: str
    scheduler: str
    denoise: float

    def start(self) -> Tensor:
        """Returns the latent (1, ...) to start from. Raises HyperAlignError if it is not of one image."""
        start = start_of(self.model, self.latent)
        if len(start) != 1:
            raise HyperAlignError(
                f"Found {len(start)} latents to start from; expected 1, because the node creates its own "
                "batches. Set batch_size of the empty latent to 1."
            )
        if start.ndim == 5 and start.shape[2] != 1:
            raise HyperAlignError(
                f"Found a latent of {start.shape[2]} frames; expected 1: the search is for images, not for "
                "videos. Set length of the empty latent to 1."
            )
        return start

    def noise(self, start: Tensor, seed: int) -> Tensor:
        """Returns the noise (1, ...) that KSampler starts from with this seed."""
        noise: Any = comfy.sample.prepare_noise(start, seed)
        return noise

    def run(self, start: Tensor, candidates: Sequence[Candidate], callback: Callable[..., None]) -> Tensor:
        """Returns the samples (B, ...) of candidates; the host's generator has the seed of the first one."""
        noise = torch.cat([candidate.noise for candidate in candidates])
        return comfy.sample.sample(
            self.model, noise, self.steps, self.cfg, self.sampler_name, self.scheduler, self.positive,
            self.negative, start.expand_as(noise), denoise=self.denoise,
            noise_mask=self.latent.get("noise_mask"), seed=candidates[0].seed, callback=callback,
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        )  # fmt: skip

    def run_searched(
        self,
        start: Tensor,
        candidate: Candidate,
        callback: Callable[..., None],
        plan: Plan,
        score: trajectory.Score,
    ) -> Tensor:
        """Returns the sample (1, ...) of a candidate, with a search over the noise of every step."""
        sampler = trajectory.sampler(self.sampler_name, plan, candidate.seed, score)
        sigmas = trajectory.sigmas(self.model, self.sampler_name, self.scheduler, self.steps, self.denoise)
        return comfy.sample.sample_custom(
            self.model, candidate.noise, self.cfg, sampler, sigmas, self.positive, self.negative, start,
            noise_mask=self.latent.get("noise_mask"), callback=callback, seed=candidate.seed,
        )  # fmt: skip


def search(sampling: Sampling, plan: Plan, reward: HostReward, vae: Any, prompt: str) -> SearchResult:
    """Samples candidates batch by batch and keeps the best; memory does not grow with their number.

    When the user cancels, the best samples so far are returned; if no sample is finished yet, the host's
    exception is raised. A sample that diverges counts as failed, and the search continues without it.

    Raises:
        HyperAlignError: no step, a LATENT of other than one image, combination rank, a sampler whose steps
            cannot be searched, an input that the reward rejects, or every sample diverged.
    """
    check_steps(sampling.steps)
    if plan.mode == "epsilon-greedy-steps":
        trajectory.check_sampler(sampling.sampler_name)
    if reward.combination == "rank":
        raise HyperAlignError(
            "Ranks compare the images of one batch, but a search generates them one after the other; "
            "expected combination sum or z-score. Choose it in the last Reward Model Loader."
        )
    start = sampling.start()
    state = Search[tuple[Tensor, Tensor]](plan, partial(sampling.noise, start))
    progress = Progress(sampling, plan)

    def score(latents: Tensor) -> list[float]:
        return _scores(reward, decoded(vae, latents), prompt)

    def sample(candidates: Sequence[Candidate]) -> Tensor:
        callback = progress.callback(len(state.tried), len(candidates))
        if plan.mode == "epsilon-greedy-steps":
            return sampling.run_searched(start, candidates[0], callback, plan, score)
        return sampling.run(start, candidates, callback)

    cancelled = False
    try:
        while candidates := state.propose():
            latents = sample(candidates)
            images_BHWC = decoded(vae, latents)
            scores = _scores(reward, images_BHWC, prompt)
            # Clones, because a view of one sample would keep the memory of its whole batch.
            pairs = zip(latents.cpu(), images_BHWC.cpu(), strict=True)
            state.record(candidates, scores, [(latent.clone(), image.clone()) for latent, image in pairs])
            progress.show_best(state)
            throw_exception_if_processing_interrupted()
    except InterruptProcessingException:
        if not state.kept:
            raise
        cancelled = True
        CANCELLED[plan.seed] += 1
    if not state.kept:
        raise HyperAlignError(
            f"All {len(state.tried)} samples have NaN or infinite pixels or scores; expected finite numbers. "
            "The sampler, the VAE or the reward diverged: lower cfg, or start ComfyUI with --fp32-vae."
        )
    return _result(state, cancelled)


class Progress:
    """The host's progress bar over all samples, with a preview of the best image and the current one."""

    def __init__(self, sampling: Sampling, plan: Plan) -> None:
        self._steps = sampling.steps
        self._bar = comfy.utils.ProgressBar(plan.count * sampling.steps)
        self._previewer: Any = latent_preview.get_previewer(
            sampling.model.load_device, sampling.model.model.latent_format
        )
        self._best: Any = None

    def callback(self, done: int, batch: int) -> Callable[..., None]:
        """Returns the host's step callback for a batch, after `done` finished samples."""

        def after_step(step: int, x0: Tensor, _x: Tensor, total: int) -> None:
            value = done * self._steps + round((step + 1) / total * self._steps * batch)
            self._bar.update_absolute(value, preview=self._preview(x0))

        return after_step

    def show_best(self, state: Search[tuple[Tensor, Tensor]]) -> None:
        """Shows the best image so far, if there is one."""
        shown = None
        if state.kept:
            _, image_HWC = state.kept[0].sample
            self._best = latent_preview.preview_to_image(image_HWC[..., :3], do_scale=False)
            shown = "JPEG", self._best, latent_preview.MAX_PREVIEW_RESOLUTION
        self._bar.update_absolute(len(state.tried) * self._steps, preview=shown)

    def _preview(self, x0: Tensor) -> Any:
        """Returns the current image, to the right of the best one; None if previews are off."""
        if self._previewer is None:
            return None
        kind, current, limit = self._previewer.decode_latent_to_preview_image("JPEG", x0)
        if self._best is None:
            return kind, current, limit
        width, height = self._best.size
        canvas = self._best.resize((2 * width, height))
        canvas.paste(self._best, (0, 0))
        canvas.paste(current.resize((width, height)), (width, 0))
        return kind, canvas, 2 * limit


def decoded(vae: Any, latents: Tensor) -> Tensor:
    """Returns the images (B, H, W, C) of latents; frames are flattened as in the host's VAE Decode.

    Raises HyperAlignError unless there is one image per latent.
    """
    images: Tensor = vae.decode(latents)
    images_BHWC = images.flatten(0, 1) if images.ndim == 5 else images
    if len(images_BHWC) != len(latents):
        raise HyperAlignError(
            f"The VAE makes {len(images_BHWC)} images of {len(latents)} latents; expected one image per "
            "latent. Connect the VAE of an image model, not of a video model."
        )
    return images_BHWC


def _scores(reward: HostReward, images_BHWC: Tensor, prompt: str) -> list[float]:
    """Returns one score per image, NaN for diverged images, for which a reward would reject the batch."""
    finite = [all_finite(image_HWC) for image_HWC in images_BHWC]
    if not any(finite):
        return [math.nan] * len(images_BHWC)
    try:
        scores = reward.score(images_BHWC[torch.tensor(finite)], [prompt] * sum(finite))
    except NotFinite as error:
        scores = error.scores
    remaining = iter(scores)
    return [next(remaining) if is_finite else math.nan for is_finite in finite]


def _result(state: Search[tuple[Tensor, Tensor]], cancelled: bool) -> SearchResult:
    latents, images = zip(*(scored.sample for scored in state.kept), strict=True)
    return SearchResult(
        torch.stack(latents),
        torch.stack(images),
        [scored.score for scored in state.kept],
        [scored.seed for scored in state.kept],
        state.tried,
        cancelled,
    )
