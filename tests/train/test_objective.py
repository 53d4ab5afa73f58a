"""The losses and the sampler's arithmetic against the formulas they stand for."""

from __future__ import annotations

import pytest
import torch

from hyperalign.hosts.diffusers.adapter import Adapter
from hyperalign.hosts.diffusers.tiny import load_tiny
from hyperalign.hypernetwork import HyperNetworkConfig
from hyperalign.schedule import Schedule
from train.config import TrainConfig
from train.models.tiny import Tiny
from train.noise import alphas_cumprod
from train.objective import (
    Rewards,
    States,
    guided_prediction,
    noised_states,
    preference_loss,
    reward_loss,
    rollout_states,
)
from train.rollout import rollout
from train.trainer import new_hyperalign


@pytest.fixture(scope="module")
def base() -> Tiny:
    return Tiny(load_tiny())


@pytest.fixture(scope="module")
def adapter(base: Tiny) -> Adapter:
    torch.manual_seed(0)
    config = TrainConfig(network=HyperNetworkConfig(layers=1))
    return Adapter(base.backbone, new_hyperalign(config, base.backbone, Schedule("S")))


def noise(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, 4, 16, 16, generator=torch.Generator().manual_seed(seed))


def some_states(base: Tiny, schedule: Schedule) -> States:
    prompts = ["a dog", "two cats", ""]
    cond, uncond = base.conditions(prompts), base.conditions([""] * 3)
    return noised_states(
        base, schedule, noise(3), noise(3, 1), torch.tensor([20.0, 400.0, 900.0]), cond, uncond, prompts
    )


@pytest.mark.parametrize("snr_gamma", [float("inf"), 5.0])
def test_the_preference_loss_is_the_weighted_denoising_error(
    base: Tiny, adapter: Adapter, snr_gamma: float
) -> None:
    states = some_states(base, Schedule("S"))
    with torch.no_grad():
        loss = preference_loss(adapter, base, noise(3), noise(3, 1), states, snr_gamma)
        # An untrained hypernetwork changes nothing, so this is the base model's error.
        eps = base.backbone(states.x, states.t_B, states.cond["context"]).sample
    error_B = (eps - noise(3, 1)).square().mean(dim=(1, 2, 3))
    alpha_bar = alphas_cumprod()[states.t_B.long()]
    snr_B = alpha_bar / (1 - alpha_bar)
    weight_B = torch.where(snr_B > snr_gamma, snr_gamma / snr_B, torch.ones(3))
    torch.testing.assert_close(loss, (weight_B * error_B).mean())


@pytest.mark.parametrize(("cap", "reached"), [(1e6, True), (-1e6, False)])
def test_only_scores_below_the_cap_move_the_weights(
    base: Tiny, adapter: Adapter, cap: float, reached: bool
) -> None:
    cond, uncond = base.conditions(["a dog"]), base.conditions([""])
    path = rollout(base, adapter, Schedule("S"), cond, uncond, noise(1), steps=3, guidance_scale=4.0)
    states = rollout_states(path, [1], cond, uncond, ["a dog"])
    adapter.network.zero_grad()
    bright = Rewards({"bright": lambda images, _: images.mean(dim=(1, 2, 3))}, {"bright": 1.0})
    loss, scores = reward_loss(adapter, base, bright, states, guidance_scale=4.0, cap=cap)
    loss.backward()
    gradient = torch.stack([p.grad.abs().max() for p in adapter.network.b_aux if p.grad is not None])
    assert bool(gradient.max() > 0) is reached
    assert set(scores) == {"bright", "reward"}


def test_rewards_are_added_up_with_their_weights() -> None:
    images = torch.rand(2, 3, 4, 4)
    total, each = Rewards(
        {"a": lambda x, _: x.mean(dim=(1, 2, 3)), "b": lambda x, _: x.amax(dim=(1, 2, 3))},
        {"a": 2.0, "b": -0.5},
    )(images, ["", ""])
    torch.testing.assert_close(total, 2.0 * each["a"] - 0.5 * each["b"])


@pytest.mark.parametrize(
    "schedule", [Schedule("S"), Schedule("P", (0.6,)), Schedule("I")], ids=lambda s: s.variant
)
def test_batches_taken_apart_predict_the_same(base: Tiny, adapter: Adapter, schedule: Schedule) -> None:
    states = some_states(base, schedule)
    with torch.no_grad():
        whole = guided_prediction(adapter, base, states, 4.0)
        rows = [guided_prediction(adapter, base, states[i : i + 1], 4.0) for i in range(3)]
    torch.testing.assert_close(torch.cat(rows), whole, atol=1e-4, rtol=1e-4)


def test_the_conditional_half_alone_gives_the_same_prediction_and_another_gradient(
    base: Tiny, adapter: Adapter
) -> None:
    states = some_states(base, Schedule("S"))

    def gradient(conditional_only: bool) -> tuple[torch.Tensor, torch.Tensor]:
        adapter.network.zero_grad()
        output = guided_prediction(adapter, base, states, 4.0, conditional_only)
        output.square().mean().backward()
        return output.detach(), torch.cat([p.grad.flatten() for p in adapter.network.b_aux])

    (both, of_both), (half, of_half) = gradient(False), gradient(True)
    torch.testing.assert_close(both, half, atol=1e-4, rtol=1e-4)
    assert of_half.abs().max() > 0
    assert not torch.allclose(of_both, of_half)


@pytest.mark.parametrize(("variant", "u"), [("I", 1.0), ("P", 0.6)])
def test_noised_images_take_the_weights_of_the_time_when_a_run_writes_them(
    base: Tiny, variant: str, u: float
) -> None:
    states = some_states(base, Schedule(variant, (0.6,) if variant == "P" else ()))
    assert states.t_gen_B[1].item() == round(u * 999)
    generated = base.noise_schedule.add_noise(noise(3), noise(3, 1), states.t_gen_B)
    torch.testing.assert_close(states.x_gen, generated)
