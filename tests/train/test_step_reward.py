"""SPO's step-aware preference model: what it computes, its training by the command, and its file."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from tiny_runs import ROOT, curve, of_method, small, trainer
from torch import Tensor
from torch.nn import functional as F

from hyperalign.errors import HyperAlignError
from hyperalign.rewards import clip, loading
from hyperalign.rewards.networks import set_checkpointing
from hyperalign.tiny.evaluators import TinyReward
from train import step_reward, train
from train.config import TrainConfig
from train.inputs import RunInputs, load_inputs
from train.methods.pairs import Pairs
from train.models import step_aware
from train.models.step_aware import StepAware, make_step_aware, places, sinusoid
from train.objective import NoisedImages
from train.preflight.check import check
from train.randomness import StepRandomness
from train.step_reward import main, noised_pairs, pair_loss, predicted_images

PROMPTS = ["a red heart", "two dogs", "a blue circle"]


@pytest.fixture
def small_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    small_shape = clip.ClipShape(clip.Tower(64, 2, 4), clip.Tower(48, 2, 4), 32, "quick_gelu", patch=32)
    monkeypatch.setattr(clip, "VIT_L_14", small_shape)
    monkeypatch.setattr(clip, "VIT_H_14", small_shape)


def step_aware_of(name: str, tower: bool = False) -> StepAware:
    torch.manual_seed(0)
    return make_step_aware(loading.random_weights(name, dtype=torch.float32), tower)


def images(count: int = 3, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


# What it computes


@pytest.mark.usefixtures("small_clip")
@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize(
    ("name", "factor"), [("tiny reward", 1.0), ("pickscore", 1.0), ("hpsv2.1", 100.0), ("clip", 100.0)]
)
def test_untrained_it_is_the_reward_in_logits_at_every_time(
    name: str, factor: float, recomputes: bool
) -> None:
    expected = loading.random_weights(name, dtype=torch.float32).score(images(), PROMPTS)
    model = step_aware_of(name)
    set_checkpointing(model.reward.module, recomputes)
    for u in (0.0, 0.2, 0.77, 1.0):
        found = model(images(), PROMPTS, torch.full((3,), u))
        torch.testing.assert_close(found.detach(), factor * expected, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("small_clip")
@pytest.mark.parametrize(("name", "count"), [("tiny reward", 8 + 3), ("clip", 2 * 4 + 1)])
def test_each_normalisation_and_sublayer_of_the_image_tower_is_modulated(name: str, count: int) -> None:
    found = list(places(loading.random_weights(name).module))
    assert len(found) == count
    assert sum(place.is_gate for place in found) == {"tiny reward": 3, "clip": 4}[name]


def moved(model: StepAware) -> StepAware:
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for head in model.modulation.heads:
            head.get_parameter("weight").normal_(std=0.05, generator=generator)
    return model


@pytest.mark.usefixtures("small_clip")
@pytest.mark.parametrize("name", ["tiny reward", "clip"])
@pytest.mark.parametrize("tower", [False, True])
@pytest.mark.parametrize("recomputes", [False, True])
def test_the_gradient_reaches_what_is_trained_alone(name: str, tower: bool, recomputes: bool) -> None:
    model = moved(step_aware_of(name, tower))
    set_checkpointing(model.reward.module, recomputes)
    model(images(), PROMPTS, torch.tensor([0.1, 0.5, 0.9])).sum().backward()
    trained = {id(parameter) for parameter in model.trained().values()}
    network = model.reward.module
    for key, parameter in [*network.named_parameters(), *model.modulation.named_parameters()]:
        assert (parameter.grad is not None) == (id(parameter) in trained), key
    of_texts = ("text_model", "transformer", "token_embedding", "logit_scale", "log_scale")
    assert not any(text in key for key in model.trained() for text in of_texts)
    assert any(key.startswith("tower.") for key in model.trained()) == tower


@pytest.mark.usefixtures("small_clip")
@pytest.mark.parametrize("name", ["tiny reward", "clip"])
def test_it_knows_the_time_of_each_image_and_nothing_of_the_others(name: str) -> None:
    model = moved(step_aware_of(name))
    one = images(1)
    same = [one.expand(3, -1, -1, -1), ["a red heart"] * 3]
    scores = model(*same, torch.tensor([0.1, 0.5, 0.9])).detach()
    assert len({round(score, 4) for score in scores.tolist()}) == 3
    alone = [model(one, ["a red heart"], torch.tensor([u])).item() for u in (0.1, 0.5, 0.9)]
    torch.testing.assert_close(scores, torch.tensor(alone), rtol=1e-4, atol=1e-4)


def test_modulation_is_shift_scale_and_gate() -> None:
    """The tiny reward's last normalisation and last residual sublayer, by hand."""
    model = step_aware_of("tiny reward")
    network = model.reward.module
    assert isinstance(network, TinyReward)
    found = list(places(network))
    generator = torch.Generator().manual_seed(1)
    scale, shift, gate = torch.randn(3, 96, generator=generator)
    (last,) = [n for n, place in enumerate(found) if place.module is network.head[2]]
    (body,) = [n for n, place in enumerate(found) if place.module is network.head[1].get_submodule("body")]
    model.modulation.at(torch.full((3,), 0.5))
    x = network.head[0](network.feature_map(images() * 2.0 - 1.0))
    expected = x + gate[:, None, None] * (network.head[1](x) - x)
    expected = network.head[2](expected) * (1.0 + scale[:, None, None]) + shift[:, None, None]
    expected = F.normalize(network.head[3:](expected), dim=-1)
    with torch.no_grad():
        model.modulation.heads[last].get_parameter("bias").copy_(torch.cat([scale, shift]))
        model.modulation.heads[body].get_parameter("bias").copy_(gate)
        torch.testing.assert_close(network.embed_images(images()), expected, rtol=1e-4, atol=1e-5)


def test_times_are_told_apart_as_timesteps_are() -> None:
    rows = sinusoid(torch.tensor([0.0, 1 / 999, 1.0]))
    torch.testing.assert_close(rows[0], torch.cat([torch.ones(128), torch.zeros(128)]))
    assert rows[1, [0, 128]].tolist() == pytest.approx([math.cos(1), math.sin(1)], abs=1e-5)
    assert float(rows[2, 1]) == pytest.approx(math.cos(999 * 10000 ** (-1 / 128)), abs=1e-3)
    assert sinusoid(torch.tensor([0.3], dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.usefixtures("small_clip")
def test_a_reward_without_a_known_image_tower_is_refused() -> None:
    with pytest.raises(HyperAlignError, match=r"'aesthetic' cannot be made step-aware; expected the tiny"):
        step_aware_of("aesthetic")


# Its training


def tiny_pairs() -> RunInputs:
    config = small(Path("unused"))
    config = dataclasses.replace(config, objective=dataclasses.replace(config.objective, method="dpo"))
    return load_inputs(config, Accelerator(cpu=True))


def test_the_loss_is_the_cross_entropy_of_both_scores() -> None:
    scores = torch.tensor([[1.3, 0.2], [-0.4, 0.9]])
    expected = F.cross_entropy(scores, torch.zeros(2, dtype=torch.long))
    gap_B = scores[:, 0] - scores[:, 1]
    finite_B = torch.tensor([True, True])
    torch.testing.assert_close(pair_loss(gap_B, finite_B), expected)
    torch.testing.assert_close(pair_loss(gap_B, ~finite_B), torch.tensor(0.0))


def test_both_images_of_a_pair_have_one_noise_and_processes_share_the_batch() -> None:
    inputs = tiny_pairs()
    assert inputs.pairs is not None
    whole = noised_pairs(inputs.pairs, inputs, 4, 0, StepRandomness(0, 3)).both()
    assert torch.equal(whole.eps[:4], whole.eps[4:])
    assert torch.equal(whole.t_B[:4], whole.t_B[4:])
    assert not torch.equal(whole.x0[:4], whole.x0[4:])
    second = noised_pairs(inputs.pairs, inputs, 2, 0, StepRandomness(0, 3, 1, 2)).both()
    for name in ("x0", "eps", "t_B"):
        assert torch.equal(getattr(second, name)[:2], getattr(whole, name)[2:4])


def test_a_few_steps_raise_the_accuracy_on_noised_pairs() -> None:
    """With noise and timesteps that were not trained on."""
    inputs = tiny_pairs()

    def predicted(step: int, count: int) -> tuple[Tensor, list[str], Tensor]:
        assert inputs.pairs is not None
        found = noised_pairs(inputs.pairs, inputs, count, 0, StepRandomness(0, step))
        one, generator = found.preferred, torch.Generator().manual_seed(step)
        t_B = (999 * (0.5 + 0.4 * torch.rand(count, generator=generator))).round()
        noisy = Pairs(NoisedImages(one.x0, one.eps, one.eps, t_B, one.captions), found.rejected)
        return predicted_images(inputs, noisy, 4.0)[0], noisy.both().captions, noisy.both().t_B / 999

    def gaps(seen: tuple[Tensor, list[str], Tensor]) -> Tensor:
        preferred_B, rejected_B = model(*seen).chunk(2)
        return preferred_B - rejected_B

    trained, other = predicted(0, 48), predicted(1, 32)
    torch.manual_seed(0)
    model = make_step_aware(loading.load("tiny reward", Path()), tower=True)
    optimiser = torch.optim.AdamW(model.trained().values(), 3e-4)
    before = gaps(other).detach()
    for _ in range(10):
        optimiser.zero_grad()
        pair_loss(gaps(trained), torch.ones(48, dtype=torch.bool)).backward()
        optimiser.step()
    after = gaps(other).detach()
    assert (after > 0).float().mean() > (before > 0).float().mean()
    assert -F.logsigmoid(after).mean() < -0.7 * F.logsigmoid(before).mean()


# The command


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "spo.toml"
    path.write_text(
        f'extends = "{(ROOT / "train/recipes/methods/tiny_spo.toml").as_posix()}"\n'
        f'[spo]\nstep_reward = "{(tmp_path / "model.safetensors").as_posix()}"\n'
        f'[data]\nscenes = 16\ncache = "{(ROOT / "build/tiny").as_posix()}"\n'
        "[objective]\npreference_batch = 4\n",
        encoding="utf-8",
    )
    return path


def arguments(recipe: Path, out: Path, **options: object) -> list[str]:
    given = {"steps": 4, "batch": 2, "lr": 1e-3, "warmup": 1, "checkpoint-every": 2} | options
    pairs = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    return ["--recipe", str(recipe), "--out", str(out), *pairs]


def test_the_command_trains_resumes_exactly_and_spo_reads_its_file(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, parts = tmp_path / "model.safetensors", tmp_path / "parts.safetensors"
    assert main(arguments(recipe, whole)) == 0
    assert "Wrote" in capsys.readouterr().out
    take = step_reward.StepRewardTraining._train_step

    def interrupted(self: Any) -> Any:
        if self.step == 3:
            raise KeyboardInterrupt
        return take(self)

    with monkeypatch.context() as context:
        context.setattr(step_reward.StepRewardTraining, "_train_step", interrupted)
        assert main(arguments(recipe, parts)) == 130
    assert not parts.exists()
    assert main(arguments(recipe, parts, lr=1e-2)) == 2
    assert "holds another training: lr was 0.001 and is 0.01" in capsys.readouterr().err
    assert main(arguments(recipe, parts)) == 0
    resumed, expected = load_file(parts), load_file(whole)
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(resumed[key], expected[key]) for key in expected)
    assert not list(tmp_path.glob("*.checkpoints"))
    assert main(arguments(recipe, whole)) == 2
    assert "is there already" in capsys.readouterr().err
    spo_reads(whole, recipe, tmp_path / "run")


def spo_reads(file: Path, recipe: Path, out: Path) -> None:
    """A run of SPO scores with the file, and its hypernetwork says so."""
    config = train.load_recipe(recipe)
    assert "recipe is sound" in check(config)
    run = trainer(short(config, file, out))
    assert run.inputs.step_reward is not None
    assert not any(parameter.requires_grad for parameter in run.inputs.step_reward.trained().values())
    assert run.results.header(0).training["reward"].endswith(f"), step-aware ({file.name})")
    scores, times = run.inputs.step_reward, list[float]()

    def noted(images_BCHW: Tensor, prompts: Any, u_B: Tensor) -> Tensor:
        times.append(float(u_B[0]))
        return scores(images_BCHW, prompts, u_B)

    run.inputs = dataclasses.replace(run.inputs, step_reward=noted)  # type: ignore[arg-type]
    run.fit()
    (row,) = curve(out)
    assert not row["skipped"]
    timesteps = run.base.noise_schedule.timesteps(4)
    assert times == pytest.approx([t / 999 for t in timesteps[2:] for _ in range(3)])


def short(config: TrainConfig, file: Path, out: Path) -> TrainConfig:
    run = of_method("spo", out)
    run = dataclasses.replace(run, optim=dataclasses.replace(run.optim, steps=1))
    return dataclasses.replace(run, spo=dataclasses.replace(run.spo, step_reward=file))


@pytest.mark.usefixtures("small_clip")
def test_the_command_runs_on_real_architectures_with_random_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from train.models.architectures import descending_sizes

    monkeypatch.setattr(
        step_reward, "smoke_shape", lambda config, device: list(descending_sizes(config.model.base))[-1]
    )
    path, out = ROOT / "train/recipes/methods/sd15_spo.toml", tmp_path / "model.safetensors"
    assert main([*arguments(path, out, batch=1), "--smoke", "--no-tower"]) == 0
    assert all(name.startswith("modulation.") for name in load_file(out))


def test_the_models_numbers_are_checked(recipe: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "other.safetensors"
    for options, message in (
        ({"steps": 0}, "--steps is 0; expected 1 or more"),
        ({"reward": "aesthetic"}, "The image tower of the reward 'aesthetic' cannot be made step-aware"),
        ({"reward": "beauty"}, "There is no reward 'beauty'"),
        ({"checkpoint-every": 0}, "--checkpoint-every is 0"),
    ):
        assert main(arguments(recipe, out, **options)) == 2
        assert message in capsys.readouterr().err
    assert main(arguments(recipe, tmp_path / "model.bin")) == 2
    assert "expected a file that ends in .safetensors" in capsys.readouterr().err


# Its file


def saved(path: Path, config: TrainConfig, **header: Any) -> Path:
    model = step_aware_of("tiny reward", tower=True)
    facts = step_aware.StepAwareHeader(step_aware.base_fingerprint(config), "tiny reward", True)
    step_aware.save_step_aware(path, model, dataclasses.replace(facts, **header))
    return path


def with_tensor(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def rewrite(path: Path) -> None:
        from safetensors import safe_open

        with safe_open(str(path), "pt") as file:
            header = file.metadata()
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, header)

    return rewrite


FIRST = "modulation.embed.0.weight"


@pytest.mark.parametrize(
    ("header", "damage", "message"),
    [
        (
            {"base": "sd15-123456789abc"},
            None,
            "predictions of the base model sd15-123456789abc; the recipe's",
        ),
        (
            {"reward": "pickscore"},
            None,
            "made from the reward 'pickscore'; expected one of objective.rewards: t",
        ),
        ({"format_version": 9}, None, "no header of a step-aware preference model of format 1"),
        ({}, lambda path: path.write_bytes(path.read_bytes()[:1000]), "is not a whole safetensors file"),
        ({}, lambda path: save_file({"a": torch.zeros(1)}, path), "no header of a step-aware"),
        ({}, with_tensor(lambda state: state[FIRST].fill_(math.nan)), f"NaN or infinite values ({FIRST})"),
        ({}, with_tensor(lambda state: state.update({FIRST: torch.zeros(2)})), f"{FIRST} and 0 others"),
        ({}, with_tensor(lambda state: state.pop(FIRST)), f"{FIRST} and 0 others are missing"),
        ({}, with_tensor(lambda state: state.update(more=torch.zeros(2))), "more and 0 others"),
        ({}, lambda path: path.unlink(), "which is not there"),
    ],
)
def test_a_file_that_does_not_fit_is_one_sentence_before_anything_starts(
    tmp_path: Path, header: dict[str, Any], damage: Any, message: str
) -> None:
    config = of_method("spo", tmp_path / "run")
    path = saved(tmp_path / "model.safetensors", config, **header)
    if damage is not None:
        damage(path)
    config = dataclasses.replace(config, spo=dataclasses.replace(config.spo, step_reward=path))
    for start in (check, trainer):
        with pytest.raises(HyperAlignError, match=re.escape(message)):
            start(config)
    assert not (tmp_path / "run").exists()


def test_a_file_gives_the_model_back(tmp_path: Path) -> None:
    config = of_method("spo", tmp_path)
    model = moved(step_aware_of("tiny reward", tower=True))
    with torch.no_grad():
        for name, parameter in model.trained().items():
            if name.startswith("tower."):
                parameter.add_(0.01)
    path = tmp_path / "model.safetensors"
    facts = step_aware.StepAwareHeader(step_aware.base_fingerprint(config), "tiny reward", True, {"steps": 1})
    step_aware.save_step_aware(path, model, facts)
    config = dataclasses.replace(config, spo=dataclasses.replace(config.spo, step_reward=path))
    header, _ = step_aware.read_step_aware(path, config)
    assert header == facts
    loaded = step_aware.load_step_aware(config, torch.device("cpu"))
    assert loaded is not None
    u_B = torch.tensor([0.1, 0.5, 0.9])
    found, expected = (each(images(), PROMPTS, u_B).detach() for each in (loaded, model))
    torch.testing.assert_close(found, expected)
    other = dataclasses.replace(config, objective=dataclasses.replace(config.objective, method="dance_grpo"))
    assert step_aware.load_step_aware(other, torch.device("cpu")) is None
