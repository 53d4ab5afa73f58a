"""What a hypernetwork's conditioning is worth: weights are taken away from what they depend on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hyperalign import checkpoint
from hyperalign.checkpoint import HyperAlign, load
from hyperalign.conditioning import CHANGES, sentences
from hyperalign.errors import HyperAlignError
from hyperalign.hosts.diffusers.adapter import Adapter
from hyperalign.hosts.diffusers.tiny import load_tiny
from hyperalign.schedule import Schedule
from hyperalign.tiny.weights import HYPERNETWORKS
from hyperalign.trace_energy import PARTS
from train import analyse
from train.analysis.conditioning import (
    Generated,
    Setting,
    conditioning,
    conditioning_gain,
    given_weights,
    own_weights,
    weight_shares,
)
from train.models.tiny import Tiny
from train.sampling import SampledImages, Sampler

ROOT = Path(__file__).parents[2]
PROMPTS = ["a red heart", "two dogs", "a cat left of a dog"]
STEPS = 4


@pytest.fixture(scope="module")
def base() -> Tiny:
    return Tiny(load_tiny())


def random_hypernetwork(variant: str, seed: int = 0, constant: bool = False) -> HyperAlign:
    """Returns a hypernetwork whose weights differ much by prompt and time, or not at all."""
    found = load(HYPERNETWORKS / "tiny_p.safetensors")
    torch.manual_seed(seed)
    with torch.no_grad():
        for matrix in found.network.b_aux:
            matrix.normal_(std=0.02)
        found.network.head.weight.normal_(std=0.0 if constant else 0.3)
    keys = (0.6,) if variant == "P" else ()
    header = dataclasses.replace(found.header, schedule=Schedule(variant, keys))  # type: ignore[arg-type]
    return HyperAlign(found.network, header)


def setting_of(base: Tiny, hyperalign: HyperAlign, seeds: Sequence[int] = (0, 1), batch: int = 4) -> Setting:
    sampler = Sampler(base, base, Adapter(base.backbone, hyperalign), STEPS, 4.0)
    return Setting(sampler, PROMPTS, seeds, batch)


@pytest.mark.parametrize("variant", ["S", "P", "I"])
def test_given_their_own_weights_images_are_those_of_the_hypernetwork(base: Tiny, variant: str) -> None:
    setting = setting_of(base, random_hypernetwork(variant))
    images, weights = own_weights(setting)
    assert len(weights.halves[0]) == {"S": STEPS, "P": 2, "I": 1}[variant]
    assert torch.equal(given_weights(setting, weights).images, images.images)
    assert images.images.shape == (len(PROMPTS), 2, 3, 64, 64)


def test_each_change_takes_away_what_it_says(base: Tiny) -> None:
    setting = setting_of(base, random_hypernetwork("P"))
    generator = torch.Generator().manual_seed(3)
    halves = tuple(torch.randn(2, 6, 3, 4, 4, generator=generator) for _ in range(2))
    weights = Generated(halves, (0, 0, 0, 1))
    by_time = [0.75 * half[0] + 0.25 * half[1] for half in halves]
    averaged = weights.changed("averaged", setting)
    expected = torch.stack(by_time).mean(dim=(0, 1))
    assert averaged.used == (0,) * 4
    for half in averaged.halves:
        assert torch.allclose(half, expected.expand(1, 1, 3, 4, 4))
    for half, found in zip(by_time, weights.changed("averaged over times", setting).halves, strict=True):
        assert torch.allclose(found[0], half)
    over_prompts = weights.changed("averaged over prompts", setting)
    assert over_prompts.used == weights.used
    assert torch.allclose(over_prompts.halves[1], halves[1].mean(dim=1, keepdim=True))
    other = weights.changed("of another prompt", setting)
    assert other.used == weights.used
    assert torch.equal(other.halves[0][:, 0], halves[0][:, 2])  # the first seed of the next prompt
    assert torch.equal(other.halves[0][:, 5], halves[0][:, 1])


def test_averages_are_those_of_all_processes(base: Tiny) -> None:
    setting = dataclasses.replace(
        setting_of(base, random_hypernetwork("P")), shared=lambda mean: 0.5 * (mean + torch.ones_like(mean))
    )
    weights = Generated((torch.zeros(2, 6, 3, 4, 4),) * 2, (0, 1))
    assert float(weights.changed("averaged", setting).halves[0].mean()) == 0.5
    assert float(weights.changed("averaged over prompts", setting).halves[0].mean()) == 0.5


def distance_judge(reference: SampledImages) -> Any:
    """Scores images by how near they are to those of the hypernetwork."""

    def judge(images: SampledImages) -> dict[str, Any]:
        away = (images.images - reference.images).square().mean(dim=(1, 2, 3, 4))
        return {"nearness": -away.double().numpy()}

    return judge


def test_weights_that_depend_on_nothing_have_no_gain(base: Tiny) -> None:
    setting = setting_of(base, random_hypernetwork("S", constant=True))
    images, _ = own_weights(setting)
    gain = conditioning_gain(setting, distance_judge(images), {})
    assert list(gain) == list(CHANGES)
    for change in CHANGES:
        assert gain[change]["nearness"]["gain"] == pytest.approx(0.0, abs=1e-9)
    assert weight_shares(setting, steps=3)["same"] == pytest.approx(1.0, abs=1e-6)


def test_weights_that_depend_on_prompt_and_time_have_one(base: Tiny) -> None:
    setting = setting_of(base, random_hypernetwork("S"))
    images, _ = own_weights(setting)
    rounds: list[None] = []
    gain = conditioning_gain(setting, distance_judge(images), {}, lambda: rounds.append(None))
    for change in CHANGES:
        found = gain[change]["nearness"]
        assert 1e-7 < found["low"] <= found["gain"] <= found["high"]
    assert len(rounds) == 1 + len(CHANGES)
    shares = weight_shares(setting, steps=3)
    assert sum(shares.values()) == pytest.approx(1.0)
    assert min(shares.values()) > 1e-4


def test_weights_generated_once_have_no_share_of_time(base: Tiny) -> None:
    shares = weight_shares(setting_of(base, random_hypernetwork("I")), steps=3)
    assert shares["time"] == shares["interaction"] == 0.0
    assert shares["prompt"] > 1e-4


def test_a_mean_of_groups_has_no_interval_where_a_group_has_one_prompt(base: Tiny) -> None:
    setting = setting_of(base, random_hypernetwork("I", constant=True))
    values = iter([np.array([1.0, 3.0, 11.0]), *[np.zeros(3)] * 4])
    gain = conditioning_gain(setting, lambda _: {"x": next(values)}, {"x": [[0, 1], [2]]})
    assert gain["averaged"]["x"] == {"gain": 6.5}  # (2 + 11) / 2; one prompt alone has no interval


def test_one_prompt_has_nothing_to_differ_from(base: Tiny) -> None:
    alone = dataclasses.replace(setting_of(base, random_hypernetwork("S")), prompts=PROMPTS[:1])
    for measure in (lambda: weight_shares(alone), lambda: conditioning_gain(alone, dict, {})):  # type: ignore[arg-type]
        with pytest.raises(HyperAlignError, match="Found 1 prompt; what depends on the prompt shows over 2"):
            measure()
    assert conditioning(alone, dict, {}, with_gain=True) == {}  # type: ignore[arg-type]


def test_a_sampler_without_a_hypernetwork_is_one_sentence(base: Tiny) -> None:
    setting = Setting(Sampler(base, base, None, STEPS, 4.0), PROMPTS, (0,), 4)
    with pytest.raises(HyperAlignError, match="the sampler has no hypernetwork"):
        own_weights(setting)


# The command


def command(*arguments: object) -> int:
    recipe = ROOT / "train" / "recipes" / "tiny_s.toml"
    return analyse.main(["conditioning", "--recipe", str(recipe), *map(str, arguments)])


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS), encoding="utf-8")
    return path


def test_the_command_measures_a_file_and_stores_the_figures_in_it(
    tmp_path: Path, prompt_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "mine.safetensors", tmp_path / "out"
    file.write_bytes((HYPERNETWORKS / "tiny_i.safetensors").read_bytes())
    before = checkpoint.load(file)
    arguments = ("--hypernetwork", file, "--prompts", prompt_file, "--steps", STEPS, "--out", out)
    assert command(*arguments) == 0
    assert file.read_bytes() == (HYPERNETWORKS / "tiny_i.safetensors").read_bytes()
    assert command(*arguments, "--store") == 0
    report = json.loads((out / "conditioning.json").read_text())
    assert set(report["shares"]) == set(PARTS)
    assert set(report["gain"]["averaged"]) == {"geneval", "validation_reward"}
    after = checkpoint.load(file)
    training = after.header.training
    assert training["conditioning"] == {"shares": report["shares"], "gain": report["gain"]}
    assert training["conditioning"] != before.header.training["conditioning"]
    assert dataclasses.replace(after.header, training=before.header.training) == before.header
    state = after.network.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in before.network.state_dict().items())
    printed, card = capsys.readouterr().out, file.with_suffix(".md").read_text(encoding="utf-8")
    for sentence in sentences(training):
        assert sentence in printed
        assert sentence in card
    with Image.open(out / "conditioning.png") as plot:
        assert min(plot.size) > 300


def test_a_static_lora_and_a_single_prompt_are_refused_before_anything_is_sampled(
    tmp_path: Path, prompt_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    static, s = HYPERNETWORKS / "tiny_static.safetensors", HYPERNETWORKS / "tiny_s.safetensors"
    out = ("--prompts", prompt_file, "--out", tmp_path)
    assert command("--hypernetwork", static, *out) == 2
    assert "is a static LoRA" in capsys.readouterr().err
    assert command("--hypernetwork", s, *out, "--count", 1) == 2
    assert "the figures need 2 or more" in capsys.readouterr().err
    assert command("--hypernetwork", s, *out, "--seeds", 0) == 2
    assert "--seeds is 0; expected 1 or more" in capsys.readouterr().err
