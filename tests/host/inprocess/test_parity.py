"""ComfyUI and diffusers give the same cores and latents for the same weights, noise and schedule."""

from __future__ import annotations

import pytest
import torch
from recorded_cores import assert_same_cores, recorded_cores

STEPS = [999, 800, 600, 400, 200]
CFG = 4.0


def alphas() -> torch.Tensor:
    from diffusers import DDIMScheduler

    from hyperalign.tiny.weights import NOISE_SCHEDULE

    return DDIMScheduler(**NOISE_SCHEDULE).alphas_cumprod


def ddim_with_diffusers(unet, x, context, empty):
    """Deterministic DDIM with guidance, as a diffusers pipeline runs it: uncond row first."""
    table = alphas()
    for t, following in zip(STEPS, [*STEPS[1:], None], strict=True):
        rows = torch.cat([empty, context])
        eps_uncond, eps_cond = unet(torch.cat([x, x]), t, rows).sample.chunk(2)
        eps = eps_uncond + CFG * (eps_cond - eps_uncond)
        x0 = (x - (1 - table[t]).sqrt() * eps) / table[t].sqrt()
        alpha = table[following] if following is not None else torch.tensor(1.0)
        x = alpha.sqrt() * x0 + (1 - alpha).sqrt() * eps
    return x


def euler_in_comfyui(model, noise, positive, negative):
    """The same steps as sigmas; Euler in sigma space is DDIM in the host's scaling."""
    import comfy.samplers

    table = alphas()
    sigmas = torch.tensor([float(((1 - table[t]) / table[t]).sqrt()) for t in STEPS] + [0.0])
    # The host scales noise by sqrt(1 + sigma^2) at the greatest sigma and back, so it is x_T itself.
    with torch.inference_mode():
        return comfy.samplers.sample(
            model, noise, positive, negative, CFG, model.load_device,
            comfy.samplers.sampler_object("euler"), sigmas, model_options=model.model_options,
            latent_image=torch.zeros_like(noise), disable_pbar=True, seed=0,
        )  # fmt: skip


@pytest.mark.parametrize("variant", ["S", "P", "I"])
@pytest.mark.parametrize("mode", ["prefix", "separate"])
def test_cores_agree_to_1e_5_and_latents_to_1e_4(tiny, make_hyperalign, mode, variant):
    from hyperalign.hosts.comfy.model import apply
    from hyperalign.hosts.diffusers.session import attach

    hyperalign = make_hyperalign(mode=mode, variant=variant)
    positive, negative = tiny.condition("two blue hearts"), tiny.condition("")
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(11))
    with recorded_cores(hyperalign) as from_comfyui:
        in_comfyui = euler_in_comfyui(apply(tiny.model, hyperalign), noise, positive, negative)

    context, empty = (cond[0][0].clone().expand(2, -1, -1) for cond in (positive, negative))
    with (
        recorded_cores(hyperalign) as from_diffusers,
        torch.no_grad(),
        attach(tiny.unet, hyperalign.hyperalign) as session,
    ):
        in_diffusers = ddim_with_diffusers(tiny.unet, noise, context, empty)
    assert session.generations == {"S": 5, "P": 3, "I": 1}[variant]
    assert_same_cores(from_comfyui, from_diffusers, session.generations)
    scaled = tiny.model.model.process_latent_in(in_comfyui)
    # An untrained model leaves its noise standing; compare in units of the latents' deviation.
    torch.testing.assert_close(
        scaled / in_diffusers.std(), in_diffusers / in_diffusers.std(), atol=1e-4, rtol=0
    )
