"""The losses against the formulas they stand for, and which predictions' gradient they carry."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from hyperalign.rewards import clip
from hyperalign.rewards.loading import random_weights
from hyperalign.schedule import Schedule
from train.noise import DiffusionSchedule, FlowSchedule, NoiseSchedule, alphas_cumprod
from train.objective import (
    NoisedImages,
    Rewards,
    States,
    adapted_prediction,
    guided_prediction,
    noised_states,
    preference_loss,
    reward_loss,
    rollout_states,
)
from train.rollout import Trajectory

SCHEDULES = [Schedule("S"), Schedule("P", (0.6,)), Schedule("I")]
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.variant)
INFINITE = float("inf")
PROMPTS = ["a dog", "two cats", ""]
TIMESTEPS = torch.tensor([20.0, 400.0, 900.0])


def some_states(base: Any, normal: Any, schedule: Schedule = SCHEDULES[0], t_B: Tensor = TIMESTEPS) -> States:
    cond, uncond = base.conditions(PROMPTS), base.conditions([""] * 3)
    x0, eps, eps_gen = normal(3), normal(3, 1), normal(3, 2)
    return noised_states(base, schedule, NoisedImages(x0, eps, eps_gen, t_B, PROMPTS), cond, uncond)


def brightness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Scores the mean of an image, and a tenth for each letter of its prompt."""
    return images.mean(dim=(1, 2, 3)) + torch.tensor([0.1 * len(prompt) for prompt in prompts])


BRIGHT = Rewards({"bright": brightness}, {"bright": 1.0})


def by_hand(base: Any, adapter: Any, states: States, texts: Any) -> Tensor:
    """Returns the output with weights generated at (x_gen, t_gen), first one, then the other."""
    read = base.call(states.x_gen, states.t_gen_B, texts)
    cores = adapter.network(adapter.perceive(read))
    return adapter.forward(base.call(states.x, states.t_B, texts), cores)


def gradient(loss: Tensor, adapter: Any) -> Tensor:
    found = torch.autograd.grad(loss, list(adapter.network.parameters()), allow_unused=True)
    return torch.cat([part.flatten() for part in found if part is not None])


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-3)


# Rewards


def test_rewards_are_added_up_with_their_weights() -> None:
    images = torch.rand(2, 3, 4, 4)
    models = {"a": lambda x, _: x.mean(dim=(1, 2, 3)), "b": lambda x, _: x.amax(dim=(1, 2, 3)).half()}
    total, each = Rewards(models, {"a": 2.0, "b": -0.5})(images, ["", ""])
    assert set(each) == {"a", "b"}
    torch.testing.assert_close(each["a"], images.mean(dim=(1, 2, 3)))
    assert each["b"].dtype == torch.float32
    torch.testing.assert_close(total, 2.0 * each["a"] - 0.5 * each["b"])


# States


def numbered_states() -> States:
    """Three samples that say where they come from."""
    samples = torch.tensor([0.0, 1.0, 2.0])
    cond, uncond = {"context": samples + 40}, {"context": samples + 50}
    return States(
        samples,
        samples + 10,
        samples + 20,
        samples + 30,
        cond,
        uncond,
        ["zero", "one", "two"],
        [True, False, True],
    )


def test_which_samples_generate_their_own_weights_follows_the_samples() -> None:
    states = numbered_states()
    assert states[slice(1, 3)].generates == [False, True]
    assert states.twice().generates == [True, False, True] * 2


def numbers(states: States) -> list[list[float]]:
    uncond = states.uncond or {"context": torch.tensor([])}
    parts = (states.x, states.t_B, states.x_gen, states.t_gen_B, states.cond["context"], uncond["context"])
    return [part.tolist() for part in parts]


def test_some_samples_of_states() -> None:
    part = numbered_states()[slice(1, 3)]
    assert numbers(part) == [[1, 2], [11, 12], [21, 22], [31, 32], [41, 42], [51, 52]]
    assert part.prompts == ["one", "two"]
    assert (len(part), len(numbered_states())) == (2, 3)


def test_all_samples_and_then_all_of_them_again() -> None:
    twice = numbered_states()[slice(0, 2)].twice()
    lists = [[0, 1, 0, 1], [10, 11, 10, 11], [20, 21, 20, 21], [30, 31, 30, 31], [40, 41, 40, 41]]
    assert numbers(twice) == [*lists, [50, 51, 50, 51]]
    assert twice.prompts == ["zero", "one", "zero", "one"]


def test_where_guidance_is_an_input_there_are_no_empty_prompts() -> None:
    states = dataclasses.replace(numbered_states(), uncond=None)
    assert states[slice(0, 1)].uncond is None
    assert states.twice().uncond is None


@pytest.mark.parametrize("record", [numbered_states(), BRIGHT], ids=["states", "rewards"])
def test_records_cannot_be_changed(record: Any) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(record, dataclasses.fields(record)[0].name, None)


def test_states_of_a_rollout_follow_pick_by_pick_with_the_states_their_weights_came_from() -> None:
    states = [torch.tensor([10.0 * i, 10.0 * i + 1]) for i in range(3)]
    path = Trajectory(states, [9.0, 7.0, 5.0], [0, 0, 2], 2, [], states[0])
    cond, uncond = {"context": torch.tensor([1.0, 2.0])}, {"context": torch.tensor([3.0, 4.0])}
    found = rollout_states(path, [1, 2], cond, uncond, ["a", "b"])
    assert numbers(found) == [
        [10, 11, 20, 21], [7, 7, 5, 5], [0, 1, 20, 21], [9, 9, 5, 5], [1, 2, 1, 2], [3, 4, 3, 4],
    ]  # fmt: skip
    assert found.prompts == ["a", "b", "a", "b"]
    assert rollout_states(path, [1, 2], cond, None, ["a", "b"]).uncond is None
    assert len(rollout_states(path, [0], cond, uncond, ["a", "b"])) == 2


@pytest.mark.parametrize(
    ("schedule", "generated"),
    [
        (Schedule("S"), [0.1, 0.5, 0.8]),
        (Schedule("P", (0.6, 0.3)), [0.3, 0.6, 1.0]),
        (Schedule("I"), [1.0, 1.0, 1.0]),
    ],
    ids=lambda value: getattr(value, "variant", ""),
)
def test_noised_images_take_the_weights_of_the_timestep_where_a_run_generates_them(
    make_base: Any, normal: Any, schedule: Schedule, generated: list[float]
) -> None:
    u_B, u_gen_B = torch.tensor([0.1, 0.5, 0.8]), torch.tensor(generated)
    states = some_states(make_base(FlowSchedule(10.0, 3.0)), normal, schedule, 10 * u_B)
    assert torch.equal(states.t_B, 10 * u_B)
    torch.testing.assert_close(states.t_gen_B, 10 * u_gen_B)
    own_noise = normal(3, 1 if schedule.variant == "S" else 2)
    for x, u, noise in ((states.x, u_B, normal(3, 1)), (states.x_gen, u_gen_B, own_noise)):
        u_B111 = u.view(-1, 1, 1, 1)
        torch.testing.assert_close(x, (1 - u_B111) * normal(3) + u_B111 * noise)
    assert states.prompts == PROMPTS
    assert states.uncond is not None
    assert not torch.equal(states.cond["context"], states.uncond["context"])


@pytest.mark.parametrize("schedule", SCHEDULES[1:], ids=lambda schedule: schedule.variant)
def test_the_hypernetwork_is_not_handed_the_noise_that_the_model_is_to_predict(
    make_base: Any, normal: Any, schedule: Schedule
) -> None:
    """At the start of a flow's run the latents are the noise: the same noise would be half of the target."""
    base, t_B = make_base(FlowSchedule(1000.0, 3.0)), torch.tensor([1000.0, 900.0, 750.0])
    cond, x0, eps_gen = base.conditions(PROMPTS), normal(3), normal(3, 2)
    one, other = (
        noised_states(base, schedule, NoisedImages(x0, normal(3, seed), eps_gen, t_B, PROMPTS), cond, None)
        for seed in (1, 5)
    )
    assert not torch.equal(one.x, other.x)
    assert torch.equal(one.x_gen, other.x_gen)


@pytest.mark.parametrize(("variant", "u"), [("I", 1.0), ("P", 0.6)])
def test_a_diffusion_generates_at_a_whole_timestep(
    small_base: Any, normal: Any, variant: Any, u: float
) -> None:
    states = some_states(small_base, normal, Schedule(variant, (0.6,) if variant == "P" else ()))
    assert states.t_gen_B[1].item() == round(u * 999)
    assert states.t_gen_B.dtype == states.t_B.dtype


def test_s_generates_from_the_samples_themselves_however_timesteps_are_rounded(
    small_base: Any, normal: Any
) -> None:
    states = some_states(small_base, normal, t_B=torch.tensor([20.0, 400.00003, 899.99994]))
    assert all(states.generates)
    assert states.x_gen is states.x
    assert states.t_gen_B is states.t_B


# Predictions


@each_schedule
def test_weights_come_from_the_state_that_generated_them(
    small_base: Any, adapted: Any, normal: Any, schedule: Schedule
) -> None:
    adapter, states = adapted(small_base, schedule), some_states(small_base, normal, schedule)
    found = adapted_prediction(adapter, small_base, states, states.cond)
    expected = by_hand(small_base, adapter, states, states.cond)
    close(found, expected)
    close(gradient(found.square().mean(), adapter), gradient(expected.square().mean(), adapter))


@pytest.mark.parametrize("conditional_only", [False, True])
@each_schedule
def test_guidance_starts_from_the_unconditional_output(
    small_base: Any, adapted: Any, normal: Any, schedule: Schedule, conditional_only: bool
) -> None:
    adapter, states = adapted(small_base, schedule), some_states(small_base, normal, schedule)
    found = guided_prediction(adapter, small_base, states, 4.0, conditional_only)
    cond = by_hand(small_base, adapter, states, states.cond)
    uncond = by_hand(small_base, adapter, states, states.uncond)
    if conditional_only:
        uncond = uncond.detach()
    close(found, uncond + 4.0 * (cond - uncond))
    expected = gradient((uncond + 4.0 * (cond - uncond)).square().mean(), adapter)
    close(gradient(found.square().mean(), adapter), expected)
    assert expected.abs().max() > 0


def test_both_halves_carry_the_gradient_unless_told_otherwise(
    small_base: Any, adapted: Any, normal: Any
) -> None:
    adapter, states = adapted(small_base), some_states(small_base, normal)

    def of(**options: bool) -> tuple[Tensor, Tensor]:
        output = guided_prediction(adapter, small_base, states, 4.0, **options)
        loss, _ = reward_loss(adapter, small_base, BRIGHT, states, guidance_scale=4.0, cap=1e6, **options)
        return gradient(output.square().mean(), adapter), gradient(loss, adapter)

    for plain, both, half in zip(of(), of(conditional_only=False), of(conditional_only=True), strict=True):
        assert torch.equal(plain, both)
        assert not torch.allclose(plain, half, atol=1e-3, rtol=1e-2)


def test_where_guidance_is_an_input_nothing_is_mixed(small_base: Any, adapted: Any, normal: Any) -> None:
    adapter = adapted(small_base)
    states = dataclasses.replace(some_states(small_base, normal), uncond=None)
    close(
        guided_prediction(adapter, small_base, states, 4.0), by_hand(small_base, adapter, states, states.cond)
    )


@each_schedule
def test_batches_taken_apart_predict_the_same(
    small_base: Any, adapted: Any, normal: Any, schedule: Schedule
) -> None:
    adapter, states = adapted(small_base, schedule), some_states(small_base, normal, schedule)
    with torch.no_grad():
        whole = guided_prediction(adapter, small_base, states, 4.0)
        samples = [guided_prediction(adapter, small_base, states[slice(i, i + 1)], 4.0) for i in range(3)]
    close(torch.cat(samples), whole)


# Losses


@pytest.mark.parametrize("reached_by", [None, "none of them", "one", "all"])
@pytest.mark.parametrize(
    "noise_schedule", [DiffusionSchedule(), FlowSchedule(1000.0, 3.0)], ids=["diffusion", "flow"]
)
def test_the_reward_loss_by_hand(
    make_base: Any, adapted: Any, normal: Any, noise_schedule: NoiseSchedule, reached_by: str | None
) -> None:
    base = make_base(noise_schedule)
    adapter, states = adapted(base), some_states(base, normal)
    cond, uncond = (by_hand(base, adapter, states, texts) for texts in (states.cond, states.uncond))
    x0, _ = noise_schedule.predictions(states.x, uncond + 4.0 * (cond - uncond), states.t_B)
    images = x0[:, :3] / 2 + 0.5
    total = 2.0 * brightness(images, PROMPTS) + images[:, 0].mean(dim=(1, 2))
    low, middle, high = sorted(total.tolist())
    caps = {None: INFINITE, "none of them": high + 1, "one": (middle + high) / 2, "all": low - 1}
    cap = caps[reached_by]
    losses = [cap - score if score < cap else 0.0 * score for score in total]
    expected = -total.mean() if cap == INFINITE else torch.stack(losses).mean()

    rewards = Rewards(
        {"bright": brightness, "first": lambda x, _: x[:, 0].mean(dim=(1, 2))}, {"bright": 2.0, "first": 1.0}
    )
    loss, scores = reward_loss(adapter, base, rewards, states, guidance_scale=4.0, cap=cap)
    assert set(scores) == {"bright", "first", "reward"}
    close(scores["reward"], total.detach())
    close(scores["bright"], brightness(images, PROMPTS).detach())
    assert not any(score.requires_grad for score in scores.values())
    close(loss, expected)
    found, of_expected = gradient(loss, adapter), gradient(expected, adapter)
    assert (found - of_expected).norm() <= 1e-3 * of_expected.norm()
    assert bool(found.abs().max() > 0) is (reached_by != "all")


@pytest.mark.parametrize(
    ("noise_schedule", "signals"),
    [
        (DiffusionSchedule(), [float(abar) for abar in alphas_cumprod()[TIMESTEPS.long()]]),
        (FlowSchedule(1000.0, 3.0), [0.98**2 / (0.98**2 + 0.02**2), 0.36 / 0.52, 0.01 / 0.82]),
    ],
    ids=["diffusion", "flow"],
)
def test_the_reward_loss_is_weighted_by_the_signals_share(
    make_base: Any, adapted: Any, normal: Any, noise_schedule: NoiseSchedule, signals: list[float]
) -> None:
    base = make_base(noise_schedule)
    adapter, states = adapted(base), some_states(base, normal)
    given: dict[str, Any] = {"guidance_scale": 4.0, "cap": INFINITE}
    each = [reward_loss(adapter, base, BRIGHT, states[slice(i, i + 1)], **given)[0] for i in range(3)]
    found, scores = reward_loss(adapter, base, BRIGHT, states, weighting="signal", **given)
    expected = torch.stack([signal * loss for signal, loss in zip(signals, each, strict=True)]).mean()
    close(found, expected)
    assert scores["reward"].mean().item() == pytest.approx(-torch.stack(each).mean().item(), rel=1e-4)


def test_images_are_scored_in_full_precision(small_base: Any, adapted: Any, normal: Any) -> None:
    seen: list[torch.dtype] = []

    def look(images: Tensor, _: Sequence[str]) -> Tensor:
        seen.append(images.dtype)
        return images.mean(dim=(1, 2, 3))

    class Half(type(small_base)):
        def decode(self, latents_BCHW: Tensor) -> Tensor:
            return super().decode(latents_BCHW).half()

    base = Half(small_base.noise_schedule)
    reward_loss(
        adapted(base), base, Rewards({"look": look}, {"look": 1.0}), some_states(base, normal),
        guidance_scale=1.0, cap=INFINITE,
    )  # fmt: skip
    assert seen == [torch.float32]


def test_an_image_that_is_not_finite_costs_its_sample_alone(
    small_base: Any, adapted: Any, normal: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Published rewards refuse NaN: they would otherwise return it as a score."""
    small = clip.ClipShape(clip.Tower(64, 2, 4), clip.Tower(48, 2, 4), 32, "quick_gelu", patch=32)
    monkeypatch.setattr(clip, "VIT_L_14", small)
    reward = random_weights("clip", dtype=torch.float32)

    class Diverging(type(small_base)):
        def decode(self, latents_BCHW: Tensor) -> Tensor:
            images = super().decode(latents_BCHW)
            return torch.cat([images[:1].detach() * float("nan"), images[1:]])

    base = Diverging(small_base.noise_schedule)
    adapter, states = adapted(base), some_states(base, normal)
    chosen = Rewards({"clip": reward.score}, {"clip": 1.0})
    loss, scores = reward_loss(adapter, base, chosen, states, guidance_scale=1.0, cap=INFINITE)
    others, _ = reward_loss(
        adapted(small_base), small_base, chosen, states[slice(1, 3)], guidance_scale=1.0, cap=INFINITE
    )
    assert scores["clip"].isnan().tolist() == scores["reward"].isnan().tolist() == [True, False, False]
    close(loss, others * 2 / 3)
    assert bool(gradient(loss, adapter).isfinite().all())


@pytest.mark.parametrize("snr_gamma", [INFINITE, 5.0])
@pytest.mark.parametrize("schedule", SCHEDULES[::2], ids=lambda schedule: schedule.variant)
def test_the_preference_loss_is_the_weighted_denoising_error(
    small_base: Any, adapted: Any, normal: Any, schedule: Schedule, snr_gamma: float
) -> None:
    adapter, states = adapted(small_base, schedule), some_states(small_base, normal, schedule)
    loss = preference_loss(adapter, small_base, normal(3), normal(3, 1), states, snr_gamma)
    eps = by_hand(small_base, adapter, states, states.cond)
    snr_B = [abar / (1 - abar) for abar in alphas_cumprod()[[20, 400, 900]].tolist()]
    assert snr_B[0] > 5.0 > snr_B[1]
    weights = [min(1.0, snr_gamma / snr) for snr in snr_B]
    errors = [(eps[i] - normal(3, 1)[i]).square().mean() for i in range(3)]
    expected = sum(weight * error for weight, error in zip(weights, errors, strict=True)) / 3
    close(loss, torch.as_tensor(expected))
    close(gradient(loss, adapter), gradient(torch.as_tensor(expected), adapter))


def test_the_preference_loss_weighs_all_timesteps_alike_unless_told_otherwise(
    small_base: Any, adapted: Any, normal: Any
) -> None:
    given = (adapted(small_base), small_base, normal(3), normal(3, 1), some_states(small_base, normal))
    assert torch.equal(preference_loss(*given), preference_loss(*given, INFINITE))
    assert not torch.equal(preference_loss(*given), preference_loss(*given, 5.0))


def test_a_flows_preference_loss_is_the_velocitys_error(make_base: Any, adapted: Any, normal: Any) -> None:
    base = make_base(FlowSchedule(1000.0, 3.0))
    adapter, states = adapted(base), some_states(base, normal)
    loss = preference_loss(adapter, base, normal(3), normal(3, 1), states, 5.0)
    error = by_hand(base, adapter, states, states.cond) - (normal(3, 1) - normal(3))
    close(loss, error.square().mean())
