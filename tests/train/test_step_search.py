"""epsilon-greedy-steps: the noise of each step against the best by hand, on a Gaussian and by the command."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from hyperalign.errors import HyperAlignError
from hyperalign.search import epsilon_greedy
from train import generate
from train.generation.options import StepSearchOptions
from train.generation.step_search import StepSearch, perturbed
from train.noise import DiffusionSchedule, FlowSchedule, NoiseSchedule
from train.sampling import Sampler, initial_noise, seed_of
from train.transitions import coefficients, ddim

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "train" / "recipes" / "tiny_s.toml"
MEAN, VARIANCE = 0.5, 0.01
SCHEDULES = [DiffusionSchedule(), FlowSchedule(1000.0, 1.0)]


def exact(schedule: NoiseSchedule, x: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """Returns x0-hat and eps-hat of images N(MEAN, VARIANCE)."""
    alpha, sigma = coefficients(schedule, t)
    gain = alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2)
    x0 = MEAN + gain * (x - alpha * MEAN)
    return x0, (x - alpha * x0) / sigma


class GaussianBase:
    """The exact model of images of one value, each N(MEAN, VARIANCE)."""

    cfg = False
    latent_shape = (1, 1, 1)
    device = torch.device("cpu")

    def __init__(self, schedule: NoiseSchedule) -> None:
        self.noise_schedule = schedule
        self.asked: list[tuple[int, float]] = []

    def call(self, x: Tensor, t_B: Tensor, conditions: Any) -> dict[str, Any]:
        assert len(conditions["text"]) == len(x)
        self.asked.append((len(x), float(t_B[0])))
        return {"x": x, "t": float(t_B[0])}

    def backbone(self, x: Tensor, t: float) -> tuple[Tensor]:
        x0, eps = exact(self.noise_schedule, x, t)
        return (eps if isinstance(self.noise_schedule, DiffusionSchedule) else eps - x0,)

    def prediction(self, output: Tensor, x: Tensor) -> Tensor:
        return output

    def decode(self, latents: Tensor) -> Tensor:
        return latents.expand(-1, 3, -1, -1)

    def conditions(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        return {"text": torch.zeros(len(prompts), 1)}


class Brightness:
    """A reward by a function of an image's value; it has no gradient."""

    name, module = "brightness", nn.Identity()

    def __init__(self, target: float | None = None) -> None:
        self.target = target

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        assert len(images) == len(prompts)
        value = images.detach().mean(dim=(1, 2, 3))
        return value if self.target is None else -(value - self.target).square()


def drawn(
    schedule: NoiseSchedule,
    own: StepSearchOptions,
    target: float | None = None,
    steps: int = 4,
    batch: int = 8,
    seed: int = 7,
) -> tuple[float, GaussianBase]:
    base: Any = GaussianBase(schedule)
    reward: Any = Brightness(target)
    image = StepSearch(Sampler(base, base, None, steps, 1.0), reward, own, batch).draw("a", 3, seed)
    assert image.shape == (3, 1, 1)
    return float(image[0]), base


def by_hand(schedule: NoiseSchedule, own: StepSearchOptions, target: float | None, steps: int = 4) -> float:
    """Returns the image of fresh noise that is the best of each step's last round."""
    generator = torch.Generator().manual_seed(seed_of(3, 7))
    x, timesteps = initial_noise(3, 7, (1, 1, 1))[None], schedule.timesteps(steps)
    for t, s in itertools.pairwise(timesteps):
        step = ddim(own.eta)(schedule, x, *exact(schedule, x, t), t, s)
        tried = [torch.randn(1, 1, 1, 1, generator=generator) for _ in range(1 + own.rounds * own.candidates)]
        ends = [step.sample(noise) for noise in tried[-own.candidates :]]
        seen = [float(exact(schedule, end, s)[0].clamp(0.0, 1.0)) for end in ends]
        rated = [value if target is None else -((value - target) ** 2) for value in seen]
        x = ends[int(np.argmax(rated))]
    return float(exact(schedule, x, timesteps[-1])[0].clamp(0.0, 1.0))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["diffusion", "flow"])
@pytest.mark.parametrize("target", [None, 0.42], ids=["linear", "quadratic"])
def test_fresh_candidates_alone_are_a_best_of_each_step(
    schedule: NoiseSchedule, target: float | None
) -> None:
    own = StepSearchOptions(rounds=2, candidates=3, epsilon=1.0)
    assert drawn(schedule, own, target)[0] == pytest.approx(by_hand(schedule, own, target), abs=1e-5)


def test_candidates_are_evaluated_at_the_step_they_lead_to_as_many_at_once_as_the_batch() -> None:
    own = StepSearchOptions(rounds=2, candidates=3)
    found, base = drawn(SCHEDULES[0], own, steps=2, batch=2)
    t, s = SCHEDULES[0].timesteps(2)
    assert base.asked == [(1, t), (2, s), (1, s), (2, s), (1, s), (1, s)]
    assert found == pytest.approx(drawn(SCHEDULES[0], own, steps=2)[0], abs=1e-6)


def test_a_search_finds_better_images_than_chance_and_more_rounds_better_ones() -> None:
    def mean(own: StepSearchOptions) -> float:
        return sum(drawn(SCHEDULES[0], own, steps=3, seed=seed)[0] for seed in range(20)) / 20

    chance, short = mean(StepSearchOptions(rounds=1, candidates=1)), mean(StepSearchOptions(rounds=2))
    assert chance < short < mean(StepSearchOptions(rounds=20, keep_best=True))


def test_a_step_without_noise_is_not_searched() -> None:
    _, base = drawn(SCHEDULES[0], StepSearchOptions(eta=1e-6))
    assert [count for count, _ in base.asked] == [1, 1, 1, 1]


def rounds_of(own: StepSearchOptions, dimensions: int = 1) -> list[list[Tensor]]:
    """Returns the candidates of each round for the reward -(n - 2)^2."""
    generator, rng, rounds = torch.Generator().manual_seed(5), random.Random(5), list[list[Tensor]]()

    def score(candidates: list[Tensor]) -> list[float]:
        rounds.append(candidates)
        return [-float((one - 2.0).square().sum()) for one in candidates]

    def fresh() -> Tensor:
        return torch.randn(1, dimensions, generator=generator)

    rounds.append([epsilon_greedy(own.plan(), fresh, score, rng, perturbed, own.keep_best)])
    return rounds


def test_with_the_best_one_kept_the_score_never_falls() -> None:
    *rounds, _ = rounds_of(StepSearchOptions(rounds=30, keep_best=True))
    reached = [max(-float((one - 2.0).square().sum()) for one in found) for found in rounds]
    best = np.maximum.accumulate(reached)
    for end in range(1, 31):
        chosen = rounds_of(StepSearchOptions(rounds=end, keep_best=True))[-1][0]
        assert -float((chosen - 2.0).square().sum()) == pytest.approx(best[end - 1])
    assert reached != sorted(reached)  # a round alone may be worse


@pytest.mark.parametrize("dimensions", [1, 16, 4096])
def test_near_candidates_are_at_most_the_radius_away(dimensions: int) -> None:
    own = StepSearchOptions(rounds=12, epsilon=0.0)
    *rounds, _ = rounds_of(own, dimensions)
    far = own.radius * math.sqrt(dimensions)
    steps = list[float]()
    for before, found in itertools.pairwise(rounds):
        pivot = max(before, key=lambda one: -float((one - 2.0).square().sum()))
        steps += [float((one - pivot).norm()) for one in found]
    assert max(steps) <= far * (1 + 1e-4)
    assert max(steps) > 0.7 * far


def command(out: Path, prompts: Path, *more: str) -> list[str]:
    return [
        "--recipe", str(RECIPE), "--prompts", str(prompts), "--out", str(out), "--steps", "2",
        "--precision", "float32", "--test-time", "epsilon-greedy-steps", "--step-search.rounds", "2", *more,
    ]  # fmt: skip


def test_the_command_draws_the_same_images_in_any_batch_and_records_its_settings(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red heart\ntwo dogs\n", encoding="utf-8")
    shown: list[Any] = []
    for name, batch, limit in (("all", "8", "0"), ("each", "1", "0")):
        out = tmp_path / name
        more = ("--images-per-prompt", "2", "--batch", batch, "--limit", limit)
        assert generate.main(command(out, prompts, *more)) == 0
        paths = sorted(out.glob("*/samples/*.png"))
        assert len(paths) == 4
        shown.append([np.asarray(Image.open(path)).astype(int) for path in paths])
    for first, second in zip(*shown, strict=True):
        assert np.abs(first - second).max() <= 1
    last = sorted((tmp_path / "all").glob("*/samples/*.png"))[-1]
    last.unlink()
    assert generate.main(command(tmp_path / "all", prompts, "--images-per-prompt", "2")) == 0
    assert np.abs(np.asarray(Image.open(last)).astype(int) - shown[0][-1]).max() <= 1
    settings = json.loads((tmp_path / "all" / "run.json").read_text(encoding="utf-8"))["settings"]
    assert settings["method"] == "epsilon-greedy-steps"
    assert settings["options"] == {
        "rewards": {"tiny reward": 1.0}, "rounds": 2, "candidates": 4, "epsilon": 0.4, "radius": 0.15,
        "eta": 1.0, "keep_best": False, "rescale": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (StepSearchOptions(rounds=0), "--step-search.rounds is 0; expected 1 or more"),
        (StepSearchOptions(candidates=0), "--step-search.candidates is 0; expected 1 or more"),
        (StepSearchOptions(epsilon=1.5), "--step-search.epsilon is 1.5; expected 0 to 1"),
        (StepSearchOptions(radius=0.0), "--step-search.radius is 0.0; expected above 0"),
        (StepSearchOptions(eta=0.0), "--step-search.eta is 0.0; expected above 0"),
    ],
)
def test_options_out_of_range_are_one_sentence(own: StepSearchOptions, message: str) -> None:
    with pytest.raises(HyperAlignError, match=message):
        own.check()
