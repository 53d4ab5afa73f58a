"""The losses and the sampler's arithmetic against the formulas they stand for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperalign.hosts.diffusers import Adapter
from hyperalign.hosts.diffusers_tiny import TinyBase, load_tiny
from hyperalign.hypernetwork import HyperNetworkConfig
from hyperalign.schedule import Schedule
from train.config import TrainConfig
from train.loop import new_hyperalign
from train.objective import preference_loss, reward_loss
from train.rollout import add_noise, alphas_cumprod, predict_x0, rollout


@pytest.fixture(scope="module")
def base() -> TinyBase:
    return load_tiny()


@pytest.fixture(scope="module")
def adapter(base: TinyBase) -> Adapter:
    torch.manual_seed(0)
    config = TrainConfig(network=HyperNetworkConfig(layers=1))
    return Adapter(base.unet, new_hyperalign(config, base, Schedule("S")))


@given(t=st.integers(0, 999), seed=st.integers(0, 2**31 - 1))
def test_x0_hat_undoes_the_noise(t: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x0, noise = torch.randn(2, 1, 4, 4, 4, generator=generator, dtype=torch.float64).unbind()
    alpha_bar = alphas_cumprod().double()[t]
    torch.testing.assert_close(predict_x0(add_noise(x0, noise, alpha_bar), noise, alpha_bar), x0)


@pytest.mark.parametrize("snr_cap", [float("inf"), 5.0])
def test_the_preference_loss_is_the_weighted_denoising_error(
    base: TinyBase, adapter: Adapter, snr_cap: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 3, 4, 16, 16, generator=generator).unbind()
    t_B, context = torch.tensor([20, 400, 900]), base.encode_prompts(["a dog", "two cats", ""])
    alpha_bar = alphas_cumprod()[t_B].view(-1, 1, 1, 1)
    with torch.no_grad():
        loss = preference_loss(adapter, Schedule("S"), x0, noise, t_B, context, snr_cap)
        # An untrained hypernetwork changes nothing, so this is the base model's error.
        eps = base.unet(add_noise(x0, noise, alpha_bar), t_B, context).sample
    error_B = (eps - noise).square().mean(dim=(1, 2, 3))
    snr_B = (alpha_bar / (1 - alpha_bar)).flatten()
    weight_B = torch.where(snr_B > snr_cap, snr_cap / snr_B, torch.ones(3))
    torch.testing.assert_close(loss, (weight_B * error_B).mean())


@pytest.mark.parametrize(("cap", "reached"), [(1e6, True), (-1e6, False)])
def test_only_scores_below_the_cap_move_the_weights(
    base: TinyBase, adapter: Adapter, cap: float, reached: bool
) -> None:
    context = base.encode_prompts(["a dog", ""])
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    path = rollout(base.unet, adapter, Schedule("S"), context, noise, steps=3, guidance=4.0)
    adapter.network.zero_grad()
    loss, _ = reward_loss(
        adapter, base.decode, lambda images, _: images.mean(dim=(1, 2, 3)), path, context,
        torch.zeros(1, 16, dtype=torch.long), [1], guidance=4.0, cap=cap,
    )  # fmt: skip
    loss.backward()
    gradient = torch.stack([p.grad.abs().max() for p in adapter.network.b_aux if p.grad is not None])
    assert bool(gradient.max() > 0) is reached
