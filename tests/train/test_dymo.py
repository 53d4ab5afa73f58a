"""DyMO: its two objectives, their weights and step sizes, and images by the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from hyperalign.errors import HyperAlignError
from hyperalign.hosts.diffusers.tiny import load_tiny
from hyperalign.rewards import loading
from hyperalign.schedule import Schedule
from train import generate
from train.generation.attention_maps import AttendingDenoiser, attention, recorded, semantic_loss
from train.generation.dymo import FLUX, SD15, SDXL, Dymo, Objective, Table, change, dynamic_weights
from train.generation.entities import Pairs, geneval_groups, pairs_of, pairs_of_prompts
from train.generation.gradients import Evaluated, ImageValue, evaluated, require_gradient, rms
from train.generation.models import token_counter
from train.generation.options import DymoOptions
from train.models.base import cfg_conditions
from train.models.tiny import Tiny
from train.noise import FlowSchedule
from train.recipe import load_recipe
from train.rollout import Denoiser, SampledModel
from train.sampling import Sampler, initial_noise, seed_of
from train.transitions import ddim

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "train" / "recipes" / "tiny_s.toml"
PROMPT, GROUPS = "a red heart and a blue circle", [("heart", "red"), ("circle", "blue")]
PAIRS = Pairs(together=((3, 2), (7, 6)), apart=((3, 7),))
CFG = 4.0
PLAIN = DymoOptions(optimised=(0.0, 0.0))


@pytest.fixture(scope="module")
def base() -> Tiny:
    return Tiny(load_tiny())


def dymo_of(base: Tiny, own: DymoOptions, pairs: Pairs = PAIRS, table: Table = SD15, steps: int = 6) -> Dymo:
    value = ImageValue(base, loading.load("tiny reward", Path()), [PROMPT], 16)
    return Dymo(Sampler(base, base, None, steps, CFG), value, pairs, table, own)


def words(text: str) -> int:
    return len(text.split())


def maps_of(*tokens: list[float]) -> Tensor:
    """Returns maps (1, Q, L) of the given tokens."""
    return torch.tensor(tokens).T[None]


def test_the_distance_of_equal_maps_is_0_and_of_disjoint_ones_1() -> None:
    maps = maps_of([0.2, 0.8, 0.0], [0.1, 0.4, 0.0], [0.0, 0.0, 0.5])
    assert float(semantic_loss(maps, Pairs(together=((0, 1),)))) == pytest.approx(0.0, abs=1e-6)
    assert float(semantic_loss(maps, Pairs(together=((0, 2),)))) == pytest.approx(1.0)
    assert float(semantic_loss(maps, Pairs(apart=((0, 2),)))) == pytest.approx(-1.0)
    both = Pairs(together=((0, 1), (0, 2)), apart=((1, 2), (0, 1)))
    assert float(semantic_loss(maps, both)) == pytest.approx(0.5 - 0.5)
    assert float(semantic_loss(maps, Pairs(together=((0, 9),)))) == 0.0


def test_a_prediction_that_stays_leaves_preference_alone() -> None:
    x0 = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert change(x0, None).tolist() == [0.0, 0.0]
    still = change(3.0 * x0 - 1.0, x0)  # brightness and contrast of channels do not count
    torch.testing.assert_close(still, torch.zeros(2), atol=1e-4, rtol=0)
    semantic, preference = dynamic_weights(torch.zeros(2))
    assert (semantic.tolist(), preference.tolist()) == ([0.0, 0.0], [1.0, 1.0])
    semantic, preference = dynamic_weights(torch.tensor([2.0]))
    assert float(preference) == pytest.approx(np.exp(-2.0))
    assert float(semantic + preference) == pytest.approx(1.0)
    other = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(change(other, x0), torch.full((2,), 2.0**0.5), atol=0.15, rtol=0)


SIZES = [
    (SD15, (0.2 * CFG, 1.0, 1.0)),
    (SDXL, (0.2 * CFG, 0.2 * CFG, 0.6 * CFG)),
]


@pytest.mark.parametrize(("table", "sizes"), SIZES, ids=["sd15", "sdxl"])
def test_a_shift_has_the_size_of_the_authors_table(base: Tiny, table: Table, sizes: Any) -> None:
    own = dymo_of(base, DymoOptions(strength=0.5), table=table)
    noise = torch.randn(3, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    found = Evaluated(noise[0], noise[0], noise[1], torch.zeros(1), 1e-5 * noise[2])
    for phase, size in zip(table.phases, sizes, strict=True):
        moved = own.shift(found, phase, 900.0, 800.0)
        torch.testing.assert_close(rms(moved), 0.5 * size * rms(noise[1]), rtol=1e-4, atol=0)
        assert torch.equal(moved.sign(), noise[2].sign())


def test_where_guidance_is_an_input_a_shift_is_a_share_of_the_step(base: Tiny) -> None:
    own = dymo_of(base, DymoOptions(), table=FLUX)
    flow: Any = Tiny(base.model)
    flow.noise_schedule = FlowSchedule(1000.0, 1.0)
    own = replace(own, sampler=replace(own.sampler, base=flow))
    noise = torch.randn(3, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    found = Evaluated(noise[0], noise[1], None, torch.zeros(1), noise[2])
    moved = own.shift(found, FLUX.phases[2], 900.0, 800.0)
    torch.testing.assert_close(rms(moved), 0.2 * 0.1 * rms(noise[1] - noise[0]), rtol=1e-4, atol=0)


def test_phases_follow_each_other_as_in_the_authors_table(base: Tiny) -> None:
    def objectives(own: Dymo) -> str:
        found = [own.phase(step / 50) for step in range(50)]
        return "".join("." if one is None else "-SPB"[one.semantic + 2 * one.preference] for one in found)

    assert objectives(dymo_of(base, DymoOptions())) == "S" * 8 + "B" * 17 + "P" * 25
    assert objectives(dymo_of(base, DymoOptions(), table=SDXL)) == "S" * 8 + "B" * 17 + "P" * 21 + "." * 4
    assert objectives(dymo_of(base, DymoOptions(), Pairs())) == "." * 8 + "P" * 42
    some = DymoOptions(optimised=(0.1, 0.6))
    assert objectives(dymo_of(base, some)) == "." * 5 + "S" * 3 + "B" * 17 + "P" * 5 + "." * 20


@torch.no_grad()
def ddpm_by_hand(base: Tiny, steps: int) -> Tensor:
    schedule, generator = base.noise_schedule, torch.Generator().manual_seed(seed_of(2, 5))
    text = {"context": torch.cat([base.conditions([PROMPT])["context"], base.conditions([""])["context"]])}
    x, timesteps = initial_noise(2, 5, base.latent_shape)[None], schedule.timesteps(steps)

    def predict(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        call = base.call(torch.cat([x, x]), torch.full((2,), t), text)
        cond, uncond = base.backbone(**call)[0].chunk(2)
        return schedule.predictions(x, uncond + CFG * (cond - uncond), torch.full((1,), t))

    for t, s in pairwise(timesteps):
        step = ddim(1.0)(schedule, x, *predict(x, t), t, s)
        x = step.sample(torch.randn(x.shape, generator=generator))
    return base.decode(predict(x, timesteps[-1])[0])[0].clamp(0.0, 1.0)


def test_without_moved_steps_it_is_plain_sampling(base: Tiny) -> None:
    found = dymo_of(base, PLAIN).draw(2, 5)
    torch.testing.assert_close(found, ddpm_by_hand(base, 6), atol=1e-5, rtol=1e-4)


def test_it_raises_the_reward_and_draws_the_same_image_for_the_same_seed(base: Tiny) -> None:
    own = DymoOptions(scale=1.0, most_repeats=1)
    reward = loading.load("tiny reward", Path())
    plain = torch.stack([dymo_of(base, PLAIN).draw(2, seed) for seed in range(3)])
    moved = torch.stack([dymo_of(base, own).draw(2, seed) for seed in range(3)])
    with torch.no_grad():
        gain = reward.score(moved, [PROMPT] * 3) - reward.score(plain, [PROMPT] * 3)
    assert float(gain.mean()) > 0.5
    assert torch.equal(moved[1], dymo_of(base, own).draw(2, 1))


@pytest.mark.parametrize(("scale", "cap", "repeats"), [(1e-9, 4, 0), (1e9, 3, 3), (1e9, 0, 0)])
def test_a_step_is_repeated_by_its_gradient_s_norm_up_to_the_cap(
    base: Tiny, scale: float, cap: int, repeats: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    times, whole = list[float](), Objective.evaluated

    def counted(self: Objective, x: Tensor, t: float, *rest: Any) -> Evaluated:
        times.append(t)
        return whole(self, x, t, *rest)

    monkeypatch.setattr(Objective, "evaluated", counted)
    dymo_of(base, DymoOptions(scale=scale, most_repeats=cap), Pairs(), steps=3).draw(0, 0)
    _, second, _ = base.noise_schedule.timesteps(3)  # a third is within, two thirds past the middle
    assert times == [second] * (1 + repeats)


def attending(base: Tiny) -> AttendingDenoiser:
    cond, uncond = cfg_conditions(base, base, [PROMPT], CFG)
    return AttendingDenoiser(SampledModel(base, None, Schedule("I"), 1.0), cond, uncond, CFG)


@torch.no_grad()
def test_maps_are_the_models_own_and_change_nothing(base: Tiny) -> None:
    x, t = initial_noise(0, 0, base.latent_shape)[None], 700.0
    denoiser = attending(base)
    found = denoiser.outputs(x, t)
    cond, uncond = cfg_conditions(base, base, [PROMPT], CFG)
    with recorded(base.backbone) as projections:
        plain = Denoiser(SampledModel(base, None, Schedule("I"), 1.0), cond, uncond, CFG).outputs(x, t)
    bare = Denoiser(SampledModel(base, None, Schedule("I"), 1.0), cond, uncond, CFG).outputs(x, t)
    for one, other, third in zip(found, plain, bare, strict=True):
        assert one is not None and other is not None and third is not None
        assert torch.equal(one, third)
        assert torch.equal(other, third)
    assert denoiser.maps_BQL.shape == (1, 16, 16)
    torch.testing.assert_close(denoiser.maps_BQL.sum(dim=2), torch.ones(1, 16))
    for layer, queries, keys in projections:
        own: Any = layer  # diffusers' own probabilities, which its fused attention never forms
        heads = [own.head_to_batch_dim(part[-1]) for part in (queries, keys)]
        expected = own.get_attention_scores(*heads).unflatten(0, (2, own.heads)).mean(dim=1)
        torch.testing.assert_close(attention(own, queries[-1], keys[-1]), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_semantic_gradient_is_that_of_finite_differences(checkpointing: bool) -> None:
    base = Tiny(load_tiny())
    if checkpointing:
        backbone: Any = base.backbone
        backbone.enable_gradient_checkpointing()
    x, t, denoiser = initial_noise(0, 0, base.latent_shape)[None], 700.0, attending(base)

    def value(x0: Tensor) -> Tensor:
        return -semantic_loss(denoiser.maps_BQL, PAIRS)

    gradient = evaluated(denoiser, base.noise_schedule, x, t, value).gradient
    direction = gradient / gradient.norm()

    @torch.no_grad()
    def at(offset: float) -> float:
        denoiser.outputs(x + offset * direction, t)
        return -float(semantic_loss(denoiser.maps_BQL, PAIRS))

    assert (at(0.05) - at(-0.05)) / 0.1 == pytest.approx(float(gradient.norm()), rel=0.05)


def test_pairs_are_those_of_each_entity_and_between_entities() -> None:
    found = pairs_of("a red sports car and a bench", [("sports car", "red"), ("bench",)], words)
    assert found == Pairs(together=((3, 2), (4, 2)), apart=((3, 7), (4, 7)))
    twice = pairs_of("A Red car, a blue car", [("car", "red"), ("car", "blue")], words)
    assert twice == Pairs(together=((3, 2), (6, 5)), apart=((3, 6),))
    assert not pairs_of("two cars", [("cars",)], words)


def test_genevals_metadata_tells_entities_and_colours() -> None:
    row: dict[str, Any] = {"tag": "color_attr", "prompt": "a photo of a red car and a blue hot dog"}
    row["include"] = [
        {"class": "car", "count": 1, "color": "red"}, {"class": "hot dog", "count": 1, "color": "blue"},
    ]  # fmt: skip
    assert geneval_groups(row) == [("car", "red"), ("hot dog", "blue")]
    counted = {"tag": "counting", "prompt": "three knives", "include": [{"class": "knife", "count": 3}]}
    assert geneval_groups(counted) == []
    assert geneval_groups({"prompt": "a red car"}) == []


def test_a_base_model_without_cross_attention_has_the_reward_alone() -> None:
    rows = [{"prompt": PROMPT}]
    assert pairs_of_prompts(DymoOptions(), rows, None) == [Pairs()]
    for own in (DymoOptions(semantic="on"), DymoOptions(entities=Path("entities.json"))):
        with pytest.raises(HyperAlignError, match="has no cross-attention"):
            pairs_of_prompts(own, rows, None)


def test_words_of_the_embedded_model_have_their_places() -> None:
    count = token_counter(load_recipe(RECIPE))
    assert count is not None
    assert pairs_of(PROMPT, GROUPS, count) == PAIRS


def test_a_reward_without_a_gradient_is_refused_before_anything_is_drawn() -> None:
    class Fixed:
        def score(self, images: Tensor, prompts: Any) -> Tensor:
            return torch.ones(len(images))

    reward: Any = Fixed()
    with pytest.raises(HyperAlignError, match="has no gradient to the image"):
        require_gradient(reward, "a red heart", torch.device("cpu"))
    require_gradient(loading.load("tiny reward", Path()), "a red heart", torch.device("cpu"))


Runs = Callable[..., int]


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    """Runs the command on two prompts into a folder with further options; returns its status."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{PROMPT}\ntwo dogs\n", encoding="utf-8")

    def run(out: str, *more: str) -> int:
        return generate.main(
            [
                "--recipe", str(RECIPE), "--prompts", str(prompts), "--out", str(tmp_path / out),
                "--steps", "4", "--images-per-prompt", "1", "--precision", "float32", "--test-time", "dymo",
                "--dymo.most-repeats", "1", *more,
            ]
        )  # fmt: skip

    return run


def entities(tmp_path: Path, found: object) -> tuple[str, str]:
    path = tmp_path / "entities.json"
    path.write_text(found if isinstance(found, str) else json.dumps(found), encoding="utf-8")
    return "--dymo.entities", str(path)


def test_the_command_draws_the_same_images_in_any_batch_and_records_its_settings(
    tmp_path: Path, runs: Runs, caplog: pytest.LogCaptureFixture
) -> None:
    chosen = entities(tmp_path, {PROMPT: GROUPS, "not here": [["dog"]]})
    assert runs("all", *chosen) == 0
    assert "DyMO steers 1 of 2 prompts by the reward alone" in caplog.text
    assert runs("each", *chosen, "--batch", "1") == 0
    assert runs("reward", "--dymo.semantic", "off", "--limit", "1") == 0
    drawn = {
        name: [
            np.asarray(Image.open(path)).astype(int) for path in sorted((tmp_path / name).glob("*/*/*.png"))
        ]
        for name in ("all", "each", "reward")
    }
    for first, second in zip(drawn["all"], drawn["each"], strict=True):
        assert np.abs(first - second).max() <= 1
    assert np.abs(drawn["all"][0] - drawn["reward"][0]).max() > 10
    options = json.loads((tmp_path / "all" / "run.json").read_text(encoding="utf-8"))["settings"]["options"]
    assert len(options.pop("entities")) == 64
    assert options == {
        "rewards": {"tiny reward": 1.0}, "semantic": "auto", "semantic_prompts": 1, "scale": 100.0,
        "strength": 1.0, "optimised": [0.0, 1.0], "most_repeats": 1, "eta": 1.0,
    }  # fmt: skip


def test_entities_that_do_not_fit_are_one_sentence(
    tmp_path: Path, runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*more: str) -> str:
        assert runs("wrong", *more) == 2
        assert not (tmp_path / "wrong" / "run.json").exists()
        return capsys.readouterr().err

    assert "cannot be read" in said("--dymo.entities", str(tmp_path / "none.json"))
    assert "cannot be read" in said(*entities(tmp_path, "{"))
    for other in ([PROMPT], {PROMPT: "heart"}, {PROMPT: ["heart"]}, {PROMPT: [[]]}, {PROMPT: [["heart", 1]]}):
        assert "has another form" in said(*entities(tmp_path, other))
    assert "none of those of the list" in said(*entities(tmp_path, {"a heart": [["heart"]]}))
    assert "has 'dog', which the prompt" in said(*entities(tmp_path, {PROMPT: [["dog"]]}))
    assert "or not as often" in said(*entities(tmp_path, {PROMPT: [["heart"], ["heart"]]}))
    assert "no prompt has two entities" in said("--dymo.semantic", "on")
    assert "--dymo.semantic is off" in said(*entities(tmp_path, {}), "--dymo.semantic", "off")


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (DymoOptions(most_repeats=-1), "--dymo.most-repeats is -1; expected 0 or more"),
        (DymoOptions(scale=0.0), "--dymo.scale is 0.0; expected above 0"),
        (DymoOptions(strength=-1.0), "--dymo.strength is -1.0; expected above 0"),
        (DymoOptions(optimised=(0.7, 0.3)), "--dymo.optimised is"),
        (DymoOptions(eta=2.0), "--dymo.eta is 2.0; expected 0 to 1"),
    ],
)
def test_options_out_of_range_are_one_sentence(own: DymoOptions, message: str) -> None:
    with pytest.raises(HyperAlignError, match=message):
        own.check()
