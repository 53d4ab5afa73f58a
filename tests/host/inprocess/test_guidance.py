"""Reward guidance on the committed tiny model, in the host's inference mode."""

from __future__ import annotations

import gc
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hyperalign.errors import HyperAlignError

PROMPT = "a red heart left of a blue square"
WHOLE = (0.0, 1.0)
GRADIENTS = ("prediction", "through model")


@pytest.fixture(scope="module")
def parts(comfy: ModuleType) -> Any:
    """The committed model and both rewards, loaded as the host's nodes do."""
    from hyperalign.hosts.comfy.rewards import hosted
    from hyperalign.hosts.comfy.tiny import load_tiny
    from hyperalign.rewards import tiny

    with torch.inference_mode():
        model, clip, vae = load_tiny()
        reward, validation = (hosted(tiny.load(name)) for name in tiny.NAMES)
    return SimpleNamespace(model=model, clip=clip, vae=vae, reward=reward, validation=validation)


@pytest.fixture(scope="module")
def guide(parts: Any) -> Any:
    from hyperalign.hosts.comfy.guidance import apply_guidance

    def run(
        strength: float = 0.1,
        window: tuple[float, float] = WHOLE,
        decode_size: int = 512,
        gradient: Any = "prediction",
        **changes: Any,
    ) -> Any:
        inputs = {
            "patcher": parts.model,
            "vae": parts.vae,
            "reward": parts.reward,
            "prompt": PROMPT,
            **changes,
        }
        with torch.inference_mode():
            return apply_guidance(
                **inputs, strength=strength, window=window, decode_size=decode_size, gradient=gradient
            )

    return run


@pytest.fixture(scope="module")
def draw(parts: Any) -> Any:
    """Latents of two seeds after eight steps."""
    from hyperalign.hosts.comfy.sampling import ksample

    def run(model: Any, cfg: float = 4.0) -> Tensor:
        with torch.inference_mode():
            positive, negative = (
                parts.clip.encode_from_tokens_scheduled(parts.clip.tokenize(text)) for text in (PROMPT, "")
            )
            start = {"samples": torch.zeros(2, 4, 16, 16)}
            return ksample(model, 3, 8, cfg, "euler", "normal", positive, negative, start, 1.0)["samples"]

    return run


@pytest.fixture(scope="module")
def base(draw: Any, parts: Any) -> Tensor:
    return draw(parts.model)


class Redness:
    """A reward that is smooth: the real ones let gradients through their clamp, which no difference shows."""

    name, combination, patchers = "redness", "sum", ()

    def differentiable(self, images: Tensor, _prompts: Any) -> Tensor:
        red, green, blue = images.double().unbind(1)
        return (red - green * blue).sin().sum(dim=(1, 2))


def score(parts: Any, latents: Tensor) -> float:
    with torch.inference_mode():
        scores = parts.reward.score(parts.vae.decode(latents), [PROMPT] * len(latents))
    return sum(scores) / len(scores)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_the_reward_rises_with_strength_and_falls_below_zero(parts, guide, draw, base, gradient):
    scores = [score(parts, draw(guide(strength, gradient=gradient))) for strength in (-0.15, 0.1, 0.3)]
    assert scores[0] < score(parts, base) < scores[1] < scores[2]


def test_lines_are_one_prompt_or_one_for_each_image(guide, draw):
    class Noting(Redness):
        def differentiable(self, images: Tensor, prompts: Any) -> Tensor:
            noted.add(tuple(prompts))
            return super().differentiable(images, prompts)

    for lines, expected in (("one prompt", ("a\nb", "a\nb")), ("one per image", ("a", "b"))):
        noted: set[tuple[str, ...]] = set()
        draw(guide(window=(0.4, 0.6), reward=Noting(), prompt="a\nb", lines=lines))
        assert noted == {expected}
    with pytest.raises(Exception, match="3 lines of prompts for 2 images"):
        draw(guide(reward=Redness(), prompt="a\nb\nc", lines="one per image"))


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_strength_zero_is_the_model_bit_for_bit(guide, draw, base, gradient):
    assert torch.equal(draw(guide(0.0, gradient=gradient)), base)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_the_model_itself_and_its_vae_stay_as_they_were(parts, guide, draw, base, gradient):
    decoded = score(parts, base)
    before = dict(parts.model.model.named_parameters())
    draw(guide(gradient=gradient))
    assert all(before[name] is weight for name, weight in parts.model.model.named_parameters())
    assert not any("forward" in module.__dict__ for module in parts.model.model.modules())
    assert torch.equal(draw(parts.model), base)
    assert score(parts, base) == decoded


def test_a_second_one_replaces_the_first(guide, draw):
    first = guide(0.3, gradient="through model")
    assert torch.equal(draw(guide(0.1, patcher=first)), draw(guide(0.1)))


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_guidance_acts_inside_its_window_and_nowhere_else(parts, guide, draw, gradient):
    from comfy.patcher_extension import WrappersMP

    moved: list[tuple[float, bool]] = []
    plain: list[Tensor] = []

    def inner(executor: Any, *args: Any) -> Tensor:
        plain.append(executor(*args).detach().clone())
        return (
            plain[-1].requires_grad_(args[0].requires_grad) if gradient == "prediction" else executor(*args)
        )

    def outer(executor: Any, x: Tensor, sigma: Tensor, *args: Any) -> Tensor:
        found = executor(x, sigma, *args)
        moved.append((float(sigma[0]), not torch.allclose(found, plain[-1], atol=1e-5)))
        return found

    watched = parts.model.clone()
    watched.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "outer", outer)
    model = guide(window=(0.2, 0.6), patcher=watched, gradient=gradient)
    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "inner", inner)
    draw(model)
    start, end = (float(model.model.model_sampling.percent_to_sigma(each)) for each in (0.2, 0.6))
    assert [was for _, was in moved] == [end <= sigma <= start for sigma, _ in moved]
    assert 0 < sum(was for _, was in moved) < len(moved)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("variant", ["s", "i"])
def test_it_goes_with_a_hypernetwork(parts, guide, draw, gradient, variant):
    from hyperalign.hosts.comfy.model import apply, load
    from hyperalign.tiny.weights import HYPERNETWORKS

    with torch.inference_mode():
        aligned = apply(parts.model, load(HYPERNETWORKS / f"tiny_{variant}.safetensors"))
    before = score(parts, draw(aligned))
    # Steps before the window generate weights in inference mode, or keep them over it.
    assert score(parts, draw(guide(0.3, (0.3, 0.8), patcher=aligned, gradient=gradient))) > before


@pytest.mark.parametrize("hypernetwork", [None, "tiny_i"])
def test_the_gradient_through_the_model_is_that_of_finite_differences(parts, guide, draw, hypernetwork):
    from comfy.patcher_extension import WrappersMP

    from hyperalign.hosts.comfy.guidance import DecoderCopy
    from hyperalign.hosts.comfy.model import apply, load
    from hyperalign.tiny.weights import HYPERNETWORKS

    decode, seen = DecoderCopy(parts.vae, 512), SimpleNamespace(plain=None, slopes=[])

    def outer(executor: Any, x: Tensor, *args: Any) -> Tensor:
        found, before = executor(x, *args), seen.plain
        if before is not None and not hasattr(seen, "step"):
            seen.step = found - before
        return found

    def inner(executor: Any, x: Tensor, *args: Any) -> Tensor:
        def value(noisy: Tensor) -> Tensor:
            images = decode(parts.model.model.process_latent_out(executor(noisy, *args)))
            return Redness().differentiable(images, [])

        if x.requires_grad and seen.plain is None:
            with torch.no_grad():
                seen.plain = executor(x, *args).clone()
                size = 5e-3 * float(x.square().mean().sqrt())
                generator = torch.Generator().manual_seed(0)
                for _ in range(6):
                    way = torch.randn(x.shape, generator=generator)
                    near, far = (value(x + n * size * way) - value(x - n * size * way) for n in (1, 2))
                    seen.slopes.append((way, (8 * near - far) / (12 * size)))
        return executor(x, *args)

    watched = parts.model.clone()
    watched.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "outer", outer)
    guided = guide(1.0, (0.3, 0.5), patcher=watched, gradient="through model", reward=Redness())
    guided.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "inner", inner)
    if hypernetwork is not None:
        # Innermost, so that each difference is an evaluation of its own; weak, as at full strength the image
        # turns into another one within such a difference.
        with torch.inference_mode():
            guided = apply(guided, load(HYPERNETWORKS / f"{hypernetwork}.safetensors"), strength=0.3)
    draw(guided)
    measured = torch.stack([slope for _, slope in seen.slopes])
    foretold = torch.stack([(seen.step * way).sum(dim=(1, 2, 3)) for way, _ in seen.slopes])
    # The step has the gradient's direction but a length of its own, in each row.
    factor = (measured * foretold).sum(0) / foretold.square().sum(0)
    assert bool((factor > 0).all())
    error = (measured - factor * foretold).norm(dim=0) / measured.norm(dim=0)
    assert float(error.max()) < 0.01, error


def test_the_step_through_the_model_is_a_part_of_what_cfg_adds(parts, guide, draw):
    from comfy.patcher_extension import WrappersMP

    parts_of: list[Tensor] = []

    def outer(executor: Any, x: Tensor, sigma: Tensor, options: Any, seed: Any) -> Tensor:
        last: list[Any] = []
        record = {"sampler_pre_cfg_function": [lambda args: last.append(args) or args["conds_out"]]}
        found = executor(x, sigma, {**options, **record}, seed)
        cond, uncond = (each.detach() for each in last[-1]["conds_out"])
        step = found - (uncond + 4.0 * (cond - uncond))
        parts_of.append(
            step.square().mean((1, 2, 3)).sqrt() / (4.0 * (cond - uncond)).square().mean((1, 2, 3)).sqrt()
        )
        return found

    watched = parts.model.clone()
    watched.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "outer", outer)
    draw(guide(0.25, patcher=watched, gradient="through model"))
    assert torch.allclose(torch.stack(parts_of[:-1]), torch.tensor(0.25), rtol=1e-3)


def test_without_cfg_the_step_is_relative_to_the_prediction(parts, guide, draw):
    plain = draw(parts.model, cfg=1.0)
    assert score(parts, draw(guide(0.2, gradient="through model"), cfg=1.0)) > score(parts, plain)


def test_a_patch_that_cuts_the_gradient_off_is_named(parts, guide, draw):
    cut = parts.model.clone()
    cut.set_model_unet_function_wrapper(
        lambda apply, given: apply(given["input"], given["timestep"], **given["c"]).detach()
    )
    with pytest.raises(HyperAlignError, match="a patch cuts it off"):
        draw(guide(patcher=cut, gradient="through model"))


def test_blocks_are_computed_again_in_the_backward_pass_with_the_same_gradient(parts):
    from hyperalign.hosts.comfy.gradient import differentiable, normal_weights

    model = parts.model.model
    context = parts.clip.encode_from_tokens_scheduled(parts.clip.tokenize(PROMPT))[0][0].clone()
    noisy = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)) * 3.0

    def gradient() -> tuple[Tensor, int]:
        kept: list[int] = []
        x = noisy.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
            value = model.apply_model(x, torch.tensor([2.0]), c_crossattn=context, transformer_options={})
        return torch.autograd.grad(value.square().sum(), x)[0], sum(kept)

    with normal_weights([model]):
        plain, whole = gradient()
        with differentiable([model]):
            recomputed, inputs = gradient()
    assert torch.allclose(recomputed, plain, rtol=1e-4, atol=1e-5)
    assert inputs < 0.3 * whole


def test_weights_cast_into_one_buffer_are_cast_again_for_the_backward_pass(comfy):
    import comfy.ops

    from hyperalign.hosts.comfy.gradient import differentiable, normal_weights

    buffer = torch.empty(8, 8)
    with torch.inference_mode():
        layers = torch.nn.Sequential(*(comfy.ops.manual_cast.Linear(8, 8, bias=False) for _ in range(3)))
        for layer in layers:
            layer.weight.copy_(torch.randn(8, 8))
            layer.weight_function = [lambda weight: buffer.copy_(weight)]
    x = torch.randn(2, 8, requires_grad=True)
    with normal_weights([layers]), differentiable([layers]):
        (found,) = torch.autograd.grad(layers(x).sum(), x)
    expected = torch.ones(2, 8)
    for layer in reversed(layers):
        expected = expected @ layer.weight.clone()
    assert torch.allclose(found, expected, atol=1e-4)
    assert not any("forward" in layer.__dict__ for layer in layers)


def test_a_weighted_sum_of_rewards_guides(parts, guide, draw, base):
    from hyperalign.hosts.comfy.rewards import chained

    both = chained(parts.validation, parts.reward, 1.0, "sum", {})
    assert score(parts, draw(guide(reward=both))) > score(parts, base)


def test_the_copied_decoder_is_the_vae_s_and_bounded_in_size(comfy, parts):
    from hyperalign.hosts.comfy.guidance import DecoderCopy

    latents = torch.randn(1, 4, 16, 16)
    with torch.inference_mode():
        expected = parts.vae.decode(latents).movedim(-1, 1)
    assert torch.allclose(DecoderCopy(parts.vae, 512)(latents).clamp(0, 1), expected, atol=1e-5)
    small = DecoderCopy(parts.vae, 64)(torch.randn(1, 4, 64, 32))
    assert max(small.shape) == 64
    assert small.shape[2] == 2 * small.shape[3]


def test_the_copied_decoder_does_not_share_the_hosts_memory(comfy, parts):
    """Hosts of 2026 keep native buffers in a network that they load piece by piece, and free them with it."""
    from hyperalign.hosts.comfy.guidance import DecoderCopy

    freed = list[str]()

    class Buffer:
        def __init__(self, name: str) -> None:
            self.name = name

        def __del__(self) -> None:
            freed.append(self.name)

    network = parts.vae.first_stage_model
    layer = network.decoder.conv_in
    network.dynamic_vbars, network.dynamic_pins = (
        {"cuda": Buffer("vbar")},
        {"cuda": {"buffer": Buffer("pins")}},
    )
    layer._v, layer._pin_state = (Buffer("block"), 0, 16), network.dynamic_pins["cuda"]
    try:
        copied = DecoderCopy(parts.vae, 512)
        assert not any("_v" in module.__dict__ for module in copied._network.modules())
        del copied
        gc.collect()
        assert freed == []
        assert layer._v[0].name == "block" and network.dynamic_vbars["cuda"].name == "vbar"
    finally:
        del network.dynamic_vbars, network.dynamic_pins, layer._v, layer._pin_state


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": float("nan")}, "strength is nan; expected a number"),
        ({"window": (0.5, 0.5)}, "0 <= start_percent < end_percent <= 1"),
        ({"vae": SimpleNamespace(latent_dim=3)}, "video or audio; expected a VAE for images"),
    ],
)
def test_what_cannot_guide_is_refused(guide, options, message):
    with pytest.raises(HyperAlignError, match=message):
        guide(**options)


def test_ranks_are_refused(parts, guide):
    from hyperalign.hosts.comfy.rewards import chained

    with pytest.raises(HyperAlignError, match="Ranks have no gradient"):
        guide(reward=chained(parts.validation, parts.reward, 1.0, "rank", {}))
