"""The paper's Figures 8, 9 and 12 over a prompt list: what is measured, against independent computations."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hyperalign import checkpoint
from hyperalign.delta import merged_delta
from hyperalign.hosts.diffusers.adapter import Adapter
from hyperalign.hosts.diffusers.tiny import load_tiny
from hyperalign.hosts.run_state import Run
from hyperalign.rewards import loading
from hyperalign.schedule import Schedule
from hyperalign.tiny.weights import HYPERNETWORKS
from hyperalign.trace import Trace
from train.analysis import diversity
from train.analysis.statistics import GROUPS, band, standard_error
from train.analysis.weights import division_of, dynamics_of, trace_prompts, variation_of
from train.models.base import cfg_conditions
from train.models.tiny import Tiny
from train.noise import FlowSchedule
from train.rollout import rollout
from train.sampling import initial_noise, sample

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
