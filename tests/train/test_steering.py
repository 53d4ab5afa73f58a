"""DAS and FreeDoM: the gradient through the model, a step's size, and images by the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from hyperalign.errors import HyperAlignError
from hyperalign.hosts.diffusers.tiny import load_tiny
from hyperalign.tiny.evaluators import load_reward
from hyperalign.tiny.text_encoder import tokenize_batch
from train import generate
from train.generation import run
from train.generation.das import Das
from train.generation.freedom import Freedom
from train.generation.gradients import Evaluated, ImageValue, evaluated, rms, shift
from train.generation.models import open_sampler
from train.generation.options import (
    DasOptions,
    DymoOptions,
    FreedomOptions,
    GuidanceOptions,
    Options,
    SearchOptions,
    StepSearchOptions,
)
from train.generation.passes import image_passes
from train.models.tiny import Tiny
from train.noise import DiffusionSchedule
from train.sampling import Sampler, initial_noise
from train.transitions import coefficients, ddim

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "train" / "recipes" / "tiny_s.toml"
MEAN, VARIANCE = 0.4, 0.25


class GaussianDenoiser:
    """The exact model of images N(MEAN, VARIANCE); its guidance is a constant away."""

    guidance_scale = 3.0

    def outputs(self, x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        alpha, sigma = coefficients(DiffusionSchedule(), t)
        gain = alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2)
        eps = (x - alpha * (MEAN + gain * (x - alpha * MEAN))) / sigma
        return eps, eps - 0.1


def test_the_gradient_is_that_through_the_model() -> None:
    schedule, t = DiffusionSchedule(), 600.0
    x = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    denoiser: Any = GaussianDenoiser()
    found = evaluated(denoiser, schedule, x, t, lambda x0: -0.5 * (x0 - 2.0).square().sum(dim=(1, 2, 3)))
    alpha, sigma = coefficients(schedule, t)
    gain = alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2)
    torch.testing.assert_close(found.gradient, gain * (2.0 - found.x0), atol=1e-5, rtol=1e-4)
    assert found.correction is not None
    torch.testing.assert_close(found.correction, torch.full_like(x, 0.1))
    assert not found.x0.requires_grad


def test_a_value_without_gradient_or_a_broken_one_is_one_sentence() -> None:
    denoiser: Any = GaussianDenoiser()
    x = torch.zeros(1, 1, 2, 2)
    with pytest.raises(HyperAlignError, match="has no gradient to the image"):
        evaluated(denoiser, DiffusionSchedule(), x, 600.0, lambda x0: torch.ones(1))
    with pytest.raises(HyperAlignError, match="NaN or infinite"):
        evaluated(denoiser, DiffusionSchedule(), x, 600.0, lambda x0: (x0 * torch.nan).sum(dim=(1, 2, 3)))


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_a_shift_has_the_size_it_is_told_whatever_the_gradients(scale: float) -> None:
    gradient = scale * torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    size = torch.tensor([1.0, 2.0, 0.5]).view(3, 1, 1, 1)
    found = shift(Evaluated(gradient, gradient, None, torch.zeros(3), gradient), 0.2, size)
    torch.testing.assert_close(rms(found), 0.2 * size, rtol=1e-4, atol=0)
    assert torch.equal(found.sign(), gradient.sign())


@pytest.fixture(scope="module")
def base() -> Tiny:
    return Tiny(load_tiny())


class TinyReward:
    """The embedded model's reward behind what values call."""

    def __init__(self) -> None:
        self.network = load_reward().eval().requires_grad_(False)

    def score(self, images: Tensor, prompts: Any) -> Tensor:
        return self.network(images.clamp(0.0, 1.0), tokenize_batch(list(prompts)))


def sampler_of(base: Tiny, steps: int = 8) -> Sampler:
    return Sampler(base, base, None, steps, 4.0)


def value_of(base: Tiny, prompts: list[str]) -> Any:
    reward: Any = TinyReward()
    return ImageValue(base, reward, prompts, 16)


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(n) for n in range(count)]


@torch.no_grad()
def ddpm_by_hand(base: Tiny, prompts: list[str], noise: Tensor, steps: int) -> Tensor:
    """Returns images of plain sampling with the noise that FreeDoM draws."""
    schedule, sources = base.noise_schedule, generators(len(prompts))
    texts = {
        "context": torch.cat(
            [base.conditions(prompts)["context"], base.conditions([""] * len(prompts))["context"]]
        )
    }
    x, timesteps = noise, schedule.timesteps(steps)
    for index, t in enumerate(timesteps):
        call = base.call(torch.cat([x, x]), torch.full((2 * len(x),), t), texts)
        cond, uncond = base.backbone(**call)[0].chunk(2)
        x0, eps = schedule.predictions(x, uncond + 4.0 * (cond - uncond), torch.full((len(x),), t))
        if index + 1 == steps:
            return base.decode(x0).clamp(0.0, 1.0)
        drawn = torch.stack([torch.randn(x.shape[1:], generator=source) for source in sources])
        x = ddim(1.0)(schedule, x, x0, eps, t, timesteps[index + 1]).sample(drawn)
    return x


def test_freedom_without_guided_steps_is_plain_sampling(base: Tiny) -> None:
    prompts = ["a red heart", "two dogs"]
    noise = torch.stack([initial_noise(n, 0, base.latent_shape) for n in range(2)])
    off = FreedomOptions(guided=(0.0, 0.0), travelled=(0.0, 0.0))
    found = Freedom(sampler_of(base), value_of(base, prompts), off).draw(noise, generators(2))
    torch.testing.assert_close(found, ddpm_by_hand(base, prompts, noise, 8), atol=1e-5, rtol=1e-4)


def test_freedom_raises_the_reward(base: Tiny) -> None:
    prompts = ["a red heart", "two dogs", "a fish left of a cat"]
    noise = torch.stack([initial_noise(n, 0, base.latent_shape) for n in range(3)])
    plain = ddpm_by_hand(base, prompts, noise, 8)
    steered = Freedom(sampler_of(base), value_of(base, prompts), FreedomOptions()).draw(noise, generators(3))
    reward = TinyReward()
    with torch.no_grad():
        assert float((reward.score(steered, prompts) - reward.score(plain, prompts)).mean()) > 0.5


def test_das_draws_the_same_image_for_the_same_seed(base: Tiny) -> None:
    das = Das(sampler_of(base, 4), value_of(base, ["a red heart"] * 3), DasOptions(particles=3, alpha=1.0))
    first = das.draw(0, 5)
    assert first.shape == (3, 64, 64)
    assert torch.equal(first, das.draw(0, 5))
    assert not torch.equal(first, das.draw(0, 6))


@pytest.mark.parametrize("method", ["das", "freedom"])
def test_the_command_draws_by_them_and_records_their_settings(tmp_path: Path, method: str) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red heart\ntwo dogs\n", encoding="utf-8")
    arguments = [
        "--recipe", str(RECIPE), "--prompts", str(prompts), "--out", str(tmp_path / "out"),
        "--test-time", method, "--steps", "4", "--images-per-prompt", "1", "--das.particles", "2",
    ]  # fmt: skip
    assert generate.main(arguments) == 0
    images = sorted((tmp_path / "out").glob("*/samples/*.png"))
    assert len(images) == 2
    assert Image.open(images[0]).size == (64, 64)
    record = json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8"))
    options = record["settings"]["options"]
    assert options["eta"] == 1.0
    assert ("particles" in options) == (method == "das")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DasOptions(particles=0).check(), "--das.particles is 0; expected 1 or more"),
        (lambda: DasOptions(alpha=0.0).check(), "--das.alpha is 0.0; expected above 0"),
        (lambda: FreedomOptions(travels=0).check(), "--freedom.travels is 0; expected 1 or more"),
        (lambda: FreedomOptions(guided=(0.7, 0.3)).check(), "--freedom.guided is"),
    ],
)
def test_options_out_of_range_are_one_sentence(make: Any, message: str) -> None:
    with pytest.raises(HyperAlignError, match=message):
        make()


@pytest.mark.parametrize(
    "method",
    ["none", "best-of-N", "epsilon-greedy", "epsilon-greedy-steps", "guidance", "das", "freedom", "dymo"],
)
def test_the_counted_passes_are_those_of_an_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Any
) -> None:
    forwards, backwards = [0], [0]

    def count(module: Any, given: Any, named: Any, output: Any) -> None:
        rows = len(named["sample"])
        forwards[0] += rows
        backwards[0] += rows * output[0].requires_grad

    def counted(*arguments: Any) -> Sampler:
        sampler = open_sampler(*arguments)
        sampler.base.backbone.register_forward_hook(count, with_kwargs=True)
        return sampler

    monkeypatch.setattr(run, "open_sampler", counted)
    (tmp_path / "prompts.txt").write_text("a red heart\n", encoding="utf-8")
    entities = tmp_path / "entities.json"
    entities.write_text('{"a red heart": [["heart", "red"]]}', encoding="utf-8")
    options = Options(
        prompts=tmp_path / "prompts.txt", out=tmp_path / "out", recipe=RECIPE, test_time=method, steps=5,
        images_per_prompt=1, search=SearchOptions(candidates=3), das=DasOptions(particles=2),
        guidance=GuidanceOptions(gradient="through-model"),
        dymo=DymoOptions(most_repeats=0, entities=entities),
        step_search=StepSearchOptions(rounds=2, candidates=3),
    )  # fmt: skip
    run.generate(run.planned(options), Accelerator(cpu=True), lambda done, total: None)
    expected = image_passes(options, steps=5, cfg=True)
    assert (forwards[0], backwards[0]) == (expected.forwards, expected.backwards)
