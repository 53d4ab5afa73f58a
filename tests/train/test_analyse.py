"""The analyses of Figures 8, 9 and 12: each figure against a few lines of its own, and the command."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from hyperalign import checkpoint
from hyperalign.delta import merged_delta
from hyperalign.errors import HyperAlignError
from hyperalign.hosts.diffusers.adapter import Adapter
from hyperalign.hosts.diffusers.tiny import load_tiny
from hyperalign.hosts.run_state import Run
from hyperalign.rewards import loading
from hyperalign.schedule import Schedule
from hyperalign.tiny.weights import HYPERNETWORKS
from hyperalign.trace import Trace
from hyperalign.trace_energy import PARTS
from train import analyse
from train.analysis import diversity, plots
from train.analysis.statistics import GROUPS, band, standard_error
from train.analysis.weights import (
    check_not_zero,
    division_of,
    dynamics_of,
    trace_prompts,
    variation_of,
)
from train.config import ModelConfig, ObjectiveConfig, TrainConfig, ValidationConfig
from train.models.base import cfg_conditions
from train.models.tiny import Tiny
from train.noise import FlowSchedule
from train.rollout import rollout
from train.sampling import initial_noise, sample

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "train" / "recipes" / "tiny_s.toml"
PROMPTS = ["a red heart", "two dogs", "a cat left of a dog", "a blue circle"]
STEPS, CFG = 6, 4.0
RUN: dict[str, Any] = {"steps": STEPS, "guidance_scale": CFG}


@pytest.fixture(scope="module")
def tiny() -> Tiny:
    torch.set_num_threads(1)
    return Tiny(load_tiny(torch.device("cpu")))


@pytest.fixture(scope="module")
def traced(tiny: Tiny) -> Callable[[str], list[Trace]]:
    """Returns the traces of PROMPTS with a committed hypernetwork, in batches of 3 and 1."""
    known: dict[str, list[Trace]] = {}

    def traces(name: str) -> list[Trace]:
        if name not in known:
            hyperalign = checkpoint.load(HYPERNETWORKS / f"{name}.safetensors")
            known[name] = list(trace_prompts(tiny, tiny, hyperalign, PROMPTS, batch=3, **RUN))
        return known[name]

    return traces


def merged_by_hand(tiny: Tiny, index: int) -> Tensor:
    """Returns all weight changes of S for one prompt as one vector a step (STEPS, numbers)."""
    hyperalign = checkpoint.load(HYPERNETWORKS / "tiny_s.safetensors")
    adapter, network = Adapter(tiny.backbone, hyperalign), hyperalign.network
    cond, uncond = cfg_conditions(tiny, tiny, [PROMPTS[index]], CFG)
    noise = initial_noise(index, 0, tiny.latent_shape)[None]
    path = rollout(tiny, adapter, Schedule("S"), cond, uncond, noise, **RUN)
    rows: list[Tensor] = []
    for x, t in zip(path.states, path.timesteps, strict=True):
        cores = network(adapter.perceive(tiny.call(x, torch.tensor([t]), cond)))[0]
        deltas = [merged_delta(*network.aux(m), core).flatten() for m, core in enumerate(cores)]
        rows.append(torch.cat(deltas))
    return torch.stack(rows)


@pytest.fixture(scope="module")
def merged(tiny: Tiny) -> Tensor:
    """The merged weights of S (prompts, STEPS, numbers)."""
    with torch.no_grad():
        return torch.stack([merged_by_hand(tiny, index) for index in range(len(PROMPTS))])


# Figure 8


def test_dynamics_are_angle_and_distance_to_the_first_steps_weights(
    traced: Callable[[str], list[Trace]], merged: Tensor
) -> None:
    found = dynamics_of(traced("tiny_s"))
    first = merged[:, :1]
    cosine = F.cosine_similarity(merged, first, dim=-1)
    change = (merged - first).norm(dim=-1) / first.norm(dim=-1)
    assert found.cosine.mean.tolist() == pytest.approx(cosine.mean(0).tolist(), abs=1e-3)
    assert found.relative_change.mean.tolist() == pytest.approx(change.mean(0).tolist(), abs=2e-3)
    assert found.relative_change.deviation.tolist() == pytest.approx(change.std(0).tolist(), abs=2e-3)
    assert found.length.mean.tolist() == pytest.approx(merged.norm(dim=-1).mean(0).tolist(), rel=1e-3)
    assert found.times == tuple(t / 999 for t in tiny_timesteps())
    assert found.generated_at == tuple(range(STEPS))


def tiny_timesteps() -> list[float]:
    return Tiny(load_tiny(torch.device("cpu"))).noise_schedule.timesteps(STEPS)


def test_weights_of_i_stay_as_they_are_and_those_of_p_until_a_key_time(
    traced: Callable[[str], list[Trace]],
) -> None:
    once, pieces = dynamics_of(traced("tiny_i")), dynamics_of(traced("tiny_p"))
    assert once.generated_at == (0,)
    assert once.cosine.low.tolist() == pytest.approx([1.0] * STEPS, abs=1e-5)
    assert once.relative_change.high.tolist() == [0.0] * STEPS
    assert 1 < len(pieces.generated_at) < STEPS
    kept = [step for step in range(1, STEPS) if step not in pieces.generated_at]
    changes = pieces.relative_change.mean
    assert all(changes[step] == changes[step - 1] for step in kept)
    assert all(changes[step] != changes[step - 1] for step in pieces.generated_at[1:])


# Figure 9


def test_variation_is_the_spread_over_prompts_in_one_plane_for_all_steps(
    traced: Callable[[str], list[Trace]], merged: Tensor
) -> None:
    found = variation_of(traced("tiny_s"), panels=3)
    away = (merged - merged.mean(0)).square().sum(dim=(0, 2))
    expected = (away / merged.square().sum(dim=(0, 2))).sqrt()
    assert found.spread_G.tolist() == pytest.approx(expected.tolist(), rel=5e-3)
    assert found.shown.evaluations == (0, 2, 5)
    points = merged[:, [0, 2, 5]].transpose(0, 1).flatten(0, 1)
    _, values, axes = torch.linalg.svd(points - points.mean(0), full_matrices=False)
    places = (points - points.mean(0)) @ axes[:2].T
    shown = found.shown.places_SN2.flatten(0, 1)
    for axis in range(2):
        sign = math.copysign(1.0, float((places[:, axis] * shown[:, axis]).sum()))
        assert torch.allclose(shown[:, axis], sign * places[:, axis], atol=0.01 * float(values[0]))
    explained = (values.square() / values.square().sum())[:2].tolist()
    assert found.shown.explained == pytest.approx(explained, abs=5e-3)


def test_prompts_that_share_their_noise_differ_less_at_the_start(tiny: Tiny) -> None:
    hyperalign = checkpoint.load(HYPERNETWORKS / "tiny_s.safetensors")
    spreads = []
    for same in (False, True):
        traces = list(
            trace_prompts(
                tiny, tiny, hyperalign, PROMPTS[:3], steps=2, guidance_scale=1.0, batch=3, same_noise=same
            )
        )
        spreads.append(float(variation_of(traces, 2).spread_G[0]))
    assert 0 < spreads[1] < spreads[0]


# The division of energy


@pytest.mark.parametrize("name", ["tiny_s", "tiny_p", "tiny_i", "tiny_static"])
def test_the_division_is_whole_for_every_variant(traced: Callable[[str], list[Trace]], name: str) -> None:
    found = division_of(traced(name))
    same, prompt, time, interaction = found.shares_4.tolist()
    assert same + prompt + time + interaction == pytest.approx(1.0)
    assert float(found.block_energy_K.sum()) == pytest.approx(1.0)
    assert found.block_shares_K4.sum(dim=1).tolist() == pytest.approx([1.0] * len(found.blocks))
    if name == "tiny_static":
        assert same == pytest.approx(1.0, abs=1e-6)
    elif name == "tiny_i":
        assert (time, interaction) == (pytest.approx(0.0, abs=1e-9), pytest.approx(0.0, abs=1e-9))
        assert prompt > 0
    else:
        assert min(prompt, time, interaction) > 0


def test_the_division_is_that_of_the_merged_weights(
    traced: Callable[[str], list[Trace]], merged: Tensor
) -> None:
    found = division_of(traced("tiny_s"))
    mean, by_prompt, by_time = merged.mean((0, 1)), merged.mean(1), merged.mean(0)
    whole = float(merged.square().mean((0, 1)).sum())
    expected = [
        float(mean.square().sum()),
        float((by_prompt - mean).square().sum(1).mean()),
        float((by_time - mean).square().sum(1).mean()),
    ]
    assert found.shares_4[:3].tolist() == pytest.approx([part / whole for part in expected], abs=1e-3)
    assert float(found.energies_K4.sum()) == pytest.approx(whole, rel=2e-3)


# Models without an unconditional branch


def test_a_flow_model_without_cfg_is_traced_alike(make_base: Callable[..., Any], adapted: Any) -> None:
    base = make_base(FlowSchedule(1000.0, 1.0))
    base.cfg = False
    adapter = adapted(base, std=0.3)
    hyperalign = checkpoint.HyperAlign(adapter.network, adapter.header)
    traces = list(
        trace_prompts(base, base, hyperalign, ["a", "b", "c"], steps=3, guidance_scale=3.5, batch=2)
    )
    assert [trace.shown[0].weights_GRMF.shape[:2] for trace in traces] == [(3, 2), (3, 1)]
    assert traces[0].times == pytest.approx((1.0, 2 / 3, 1 / 3))


def test_a_rollout_keeps_its_weights_in_the_run_it_is_given(
    small_base: Any, adapted: Any, normal: Any
) -> None:
    run = Run(Schedule("S"))
    cond = small_base.conditions(["a"])
    adapter = adapted(small_base)
    path = rollout(
        small_base, adapter, Schedule("S"), cond, None, normal(1), steps=3, guidance_scale=1.0, run=run
    )
    assert run.evaluations == run.generations == path.generations == 3


# Spread over prompts


def test_a_band_has_mean_deviation_and_quantiles_of_the_prompts() -> None:
    values = torch.stack([torch.arange(21.0), torch.full((21,), 3.0)])
    found = band(values)
    assert found.mean.tolist() == [10.0, 3.0]
    assert found.deviation.tolist() == pytest.approx([math.sqrt(38.5), 0.0])
    assert found.low.tolist() == pytest.approx([1.0, 3.0])
    assert found.high.tolist() == pytest.approx([19.0, 3.0])


@pytest.mark.parametrize("prompts", [5, GROUPS, 40])
def test_the_standard_error_of_a_mean_is_the_usual_one(prompts: int) -> None:
    values = torch.randn(prompts, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = standard_error(lambda chosen: values[[*chosen]].mean(), prompts)
    groups = min(GROUPS, prompts)
    means = values.view(-1, groups).mean(dim=0)  # groups of equal size, whose means are independent
    assert float(found) == pytest.approx(float(means.std() / math.sqrt(groups)))


# Figure 12


def test_diversity_is_the_mean_distance_of_a_prompts_images(tiny: Tiny) -> None:
    judge = loading.load("tiny validation reward", Path())
    hyperalign = checkpoint.load(HYPERNETWORKS / "tiny_i.safetensors")
    counted: list[int] = []
    found = diversity.diversity_of(
        "I", tiny, tiny, hyperalign, judge.embed_images, PROMPTS[:3], seeds=3, batch=4, first_seed=7,
        shown=2, progress=counted.append, **RUN,
    )  # fmt: skip
    images = sample(tiny, tiny, hyperalign, PROMPTS[:3], seeds=(7, 8, 9), **RUN).images
    for prompt in range(3):
        units = judge.embed_images(images[prompt])
        pairs = [1.0 - float(units[i] @ units[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
        assert float(found.values_P[prompt]) == pytest.approx(sum(pairs) / 3, abs=1e-3)
    assert torch.allclose(found.shown_RS3HW, images[:2], atol=1e-3)
    assert sum(counted) == 9
    assert found.not_finite == 0.0


def test_a_method_is_compared_with_the_base_prompt_by_prompt() -> None:
    def method(name: str, *values: float) -> diversity.Diversity:
        return diversity.Diversity(name, torch.tensor(values), torch.zeros(1, 2, 3, 8, 8), 0.0)

    base, other = diversity.as_json([method("base", 0.2, 0.4, 0.6), method("mine", 0.1, 0.3, 0.5)])
    assert "ratio_to_base" not in base
    assert base["diversity"]["mean"] == pytest.approx(0.4)
    assert other["ratio_to_base"]["value"] == pytest.approx(0.75)
    assert other["difference_from_base"] == {
        "value": pytest.approx(-0.1), "standard_error": pytest.approx(0.0, abs=1e-7)
    }  # fmt: skip
    assert other["of_each_prompt"] == pytest.approx([0.1, 0.3, 0.5])


def test_images_are_reduced_for_the_figure() -> None:
    large = torch.rand(2, 3, 768, 384)
    assert diversity._smaller(large).shape == (2, 3, 384, 192)
    assert torch.equal(diversity._smaller(large[..., :64, :64]), large[..., :64, :64])


def recipe_with(rewards: dict[str, float], measured: dict[str, float], base: Any = "sd15") -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(base=base), objective=ObjectiveConfig(rewards=rewards),
        validation=ValidationConfig(rewards=measured),
    )  # fmt: skip


def test_diversity_is_judged_by_a_reward_that_is_not_optimised() -> None:
    config = recipe_with({"hpsv2.1": 1.0, "clip": 1.0}, {"clip": 1.0, "pickscore": 1.0})
    assert diversity.encoder_name(config, "") == "pickscore"
    assert diversity.encoder_name(config, "aesthetic") == "aesthetic"
    with pytest.raises(HyperAlignError, match="'clip' is a reward that the recipe optimises.*such as pick"):
        diversity.encoder_name(config, "clip")
    with pytest.raises(HyperAlignError, match="Name one with --encoder"):
        diversity.encoder_name(recipe_with({"clip": 1.0}, {"clip": 1.0}), "")
    tiny = recipe_with({"tiny reward": 1.0}, {}, "tiny")
    assert diversity.encoder_name(tiny, "") == "tiny validation reward"


# The command


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS), encoding="utf-8")
    return path


def command(kind: str, *arguments: object, recipe: Path = RECIPE) -> int:
    return analyse.main([kind, "--recipe", str(recipe), *(str(argument) for argument in arguments)])


def test_weights_are_written_as_three_figures_with_their_numbers(
    tmp_path: Path, prompt_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, file = tmp_path / "deep" / "out", HYPERNETWORKS / "tiny_p.safetensors"
    arguments = ("--hypernetwork", file, "--prompts", prompt_file, "--steps", STEPS, "--out", out)
    assert command("weights", *arguments, "--panels", 2) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        f"{name}.{kind}" for name in sorted(analyse.WEIGHT_FILES) for kind in ("json", "png")
    ]
    assert capsys.readouterr().out.count("Wrote ") == 6
    reports = {name: json.loads((out / f"{name}.json").read_text()) for name in analyse.WEIGHT_FILES}
    for report in reports.values():
        assert report["prompts"] == PROMPTS
        assert report["variant"] == "P"
    assert len(reports["dynamics"]["cosine"]["mean"]) == STEPS
    assert reports["dynamics"]["generated_at"] == reports["variation"]["spread"]["generated_at"]
    assert torch.tensor(reports["variation"]["plane"]["points"]).shape == (2, len(PROMPTS), 2)
    assert sum(reports["division"]["shares"].values()) == pytest.approx(1.0, abs=1e-5)
    assert reports["division"]["standard_error"].keys() == set(PARTS)
    for name in analyse.WEIGHT_FILES:
        with Image.open(out / f"{name}.png") as plot:
            assert min(plot.size) > 300
            assert len(plot.convert("RGB").getcolors(1 << 20) or []) > 20


def test_diversity_is_written_with_the_images_of_every_method(tmp_path: Path, prompt_file: Path) -> None:
    files = [HYPERNETWORKS / f"tiny_{variant}.safetensors" for variant in "si"]
    sizes = ("--steps", 2, "--seeds", 2, "--count", 3, "--shown", 2)
    arguments = ("--prompts", prompt_file, "--out", tmp_path / "out", *sizes)
    assert command("diversity", "--hypernetworks", *files, *arguments) == 0
    report = json.loads((tmp_path / "out" / "diversity.json").read_text())
    assert [row["method"] for row in report["methods"]] == ["base", "tiny_s", "tiny_i"]
    assert report["encoder"] == "tiny validation reward"
    assert len(report["prompts"]) == 3
    assert set(report["prompts"]) < set(PROMPTS)
    with Image.open(tmp_path / "out" / "diversity.png") as plot:
        assert min(plot.size) > 300


def refused(capsys: pytest.CaptureFixture[str], kind: str, *arguments: object, recipe: Path = RECIPE) -> str:
    """Returns the one sentence with which the command refuses."""
    assert command(kind, *arguments, recipe=recipe) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    return message


S = HYPERNETWORKS / "tiny_s.safetensors"


def test_bad_inputs_are_one_sentence_before_anything_is_sampled(
    tmp_path: Path, prompt_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(analyse, "sampling_inputs", lambda *_: pytest.fail("it went on"))
    monkeypatch.chdir(tmp_path)
    few, blocked = tmp_path / "few.txt", tmp_path / "file"
    few.write_text("a red heart\ntwo dogs\n")
    blocked.write_text("")
    weights = ("weights", "--hypernetwork")
    listed = ("--prompts", prompt_file)
    assert "gives 2 prompts" in refused(capsys, *weights, S, "--prompts", few)
    assert "gives 2 prompts with --count 2" in refused(capsys, *weights, S, *listed, "--count", 2)
    assert "--steps is 1; expected 2 or more" in refused(capsys, *weights, S, *listed, "--steps", 1)
    assert "--panels is 1" in refused(capsys, *weights, S, *listed, "--panels", 1)
    assert "Choose another --out" in refused(capsys, *weights, S, *listed, "--out", blocked)
    assert "no file" in refused(capsys, *weights, tmp_path / "none.safetensors", *listed)
    assert "no prompt file" in refused(capsys, *weights, S, "--prompts", tmp_path / "none.txt")
    assert "no recipe" in refused(capsys, *weights, S, *listed, recipe=tmp_path / "none.toml")
    images = ("diversity", "--hypernetworks", S, *listed)
    assert "--seeds is 1; expected 2 or more" in refused(capsys, *images, "--seeds", 1)
    assert "recipe optimises" in refused(capsys, *images, "--encoder", "tiny reward")
    assert "There is no reward 'nobody'" in refused(capsys, *images, "--encoder", "nobody")


def test_a_hypernetwork_of_another_base_or_before_training_is_refused(
    tmp_path: Path, prompt_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = checkpoint.load(S)
    other, fresh = tmp_path / "other.safetensors", tmp_path / "fresh.safetensors"
    header = dataclasses.replace(loaded.header, base=loaded.header.base | {"family": "sd15"})
    checkpoint.save(other, loaded.network, header)
    message = refused(capsys, "weights", "--hypernetwork", other, "--prompts", prompt_file)
    assert str(other) in message
    assert "family 'sd15'" in message
    for matrix in loaded.network.b_aux:
        matrix.zero_()
    checkpoint.save(fresh, loaded.network, loaded.header)
    message = refused(capsys, "weights", "--hypernetwork", fresh, "--prompts", prompt_file)
    assert "weights of zero" in message
    with pytest.raises(HyperAlignError, match="Name one that was trained"):
        check_not_zero(loaded)


def test_an_unknown_word_is_refused_before_sampling(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = tmp_path / "words.txt"
    words.write_text("a red heart\na blue heart\na zeppelin\n")
    assert "zeppelin" in refused(
        capsys, "weights", "--hypernetwork", S, "--prompts", words, "--out", tmp_path / "out"
    )


def test_a_recipe_without_a_list_takes_its_validation_prompts(tmp_path: Path) -> None:
    listed = tmp_path / "validation.txt"
    listed.write_text("one\ntwo\nthree\nfour\n")
    options = analyse.Weights(recipe=RECIPE, hypernetwork=S, count=3)
    config = TrainConfig(
        model=ModelConfig(base="sd15"), validation=ValidationConfig(prompts=listed, prompt_count=4)
    )
    drawn = analyse.chosen_prompts(options, config, 3)
    assert len(set(drawn)) == 3
    assert set(drawn) < {"one", "two", "three", "four"}
    assert analyse.chosen_prompts(options, config, 3) == drawn
    every = dataclasses.replace(options, count=0)
    assert analyse.chosen_prompts(every, config, 3) == ["one", "two", "three", "four"]
    tiny = analyse.chosen_prompts(every, TrainConfig(), 3)
    assert len(tiny) == analyse.TINY_PROMPTS


def test_prompts_of_t5_are_all_padded_to_its_longest_length() -> None:
    assert analyse.one_padding(TrainConfig()).data.text_lengths == (512,)


def test_an_interrupted_figure_leaves_the_old_one(tmp_path: Path) -> None:
    class Broken:
        def savefig(self, path: Path, **_: Any) -> None:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")

    path = tmp_path / "figure.png"
    path.write_bytes(b"old")
    figure: Any = Broken()
    with pytest.raises(HyperAlignError, match="cannot be written.*Free the disk"):
        analyse.write(tmp_path / "figure", {"a": 1}, figure)
    assert path.read_bytes() == b"old"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["figure.json", "figure.png"]
    with pytest.raises(OSError, match="No space"):
        plots.save(figure, path)
