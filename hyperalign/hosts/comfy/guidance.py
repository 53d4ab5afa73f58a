"""Reward guidance on a ComfyUI MODEL: a PREDICT_NOISE wrapper moves the guider's one-step prediction."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import HyperAlignError
from ...guidance import Score, guidance_size, guided, guided_through, prediction_size
from ...prompts import LINES, prompts_for
from .gradient import differentiable, normal_weights, with_attention
from .model import network_patcher
from .rewards import HostReward, load_models

LOG = logging.getLogger(__name__)
KEY = "hyperalign_guidance"
MEMORY = ("dynamic_vbars", "dynamic_pins", "dynamic_patchers", "_v", "_v_block", "_pin_state")
"""Attributes by which a host of 2026 keeps native memory for a network that it loads piece by piece."""
Gradient = Literal["prediction", "through model"]
GRADIENTS: tuple[Gradient, ...] = ("prediction", "through model")


def apply_guidance(
    patcher: ModelPatcher,
    vae: Any,
    reward: HostReward,
    prompt: str,
    strength: float,
    window: tuple[float, float],
    decode_size: int,
    gradient: Gradient = "prediction",
    lines: str = LINES[0],
) -> ModelPatcher:
    """Returns a clone of the MODEL that samples towards a higher reward; a second call replaces the first.

    Args:
        patcher: the MODEL; it is not changed.
        vae: decodes the one-step predictions; copied, because the host's own weights have no gradient.
        reward: scores them.
        prompt: of all samples of the batch, or one per sample in its lines.
        strength: size of the correction; 0 turns guidance off.
        window: start and end of guidance as fractions of the noise range; 0 is pure noise.
        decode_size: maximum side length in pixels at which predictions are decoded.
        gradient: whether it ends at the one-step prediction or goes through the model.
        lines: what the lines of the prompt are, as in `prompts_for`.

    Raises:
        HyperAlignError: a value out of range, combination rank, or a VAE that is not for images.
    """
    _check(strength, window, decode_size, reward)
    clone = patcher.clone()
    for wrapper in (WrappersMP.OUTER_SAMPLE, WrappersMP.SAMPLER_SAMPLE, WrappersMP.PREDICT_NOISE):
        clone.remove_wrappers_with_key(wrapper, KEY)
    clone.remove_additional_models(KEY)
    if strength == 0.0:
        return clone
    kind = GuidanceThroughModel if gradient == "through model" else Guidance
    prompts = partial(prompts_for, prompt, lines=lines)
    kind(DecoderCopy(vae, decode_size), reward, prompts, strength, window).add_to(clone)
    return clone


def _copied(network: nn.Module) -> nn.Module:
    """Returns a copy without the host's memory: two would free it."""
    kept = [
        module.__dict__[name] for module in network.modules() for name in MEMORY if name in module.__dict__
    ]
    copied = copy.deepcopy(network, {id(value): value for value in kept})
    for module in copied.modules():
        for name in MEMORY:
            module.__dict__.pop(name, None)
    return copied


class DecoderCopy:
    """A differentiable copy of a VAE's network that decodes at a bounded size."""

    def __init__(self, vae: Any, decode_size: int) -> None:
        if getattr(vae, "latent_dim", 2) != 2:
            raise HyperAlignError(
                "The VAE is for video or audio; expected a VAE for images. Connect the VAE of an image model."
            )
        with torch.inference_mode(False):
            network = _copied(vae.first_stage_model).eval().requires_grad_(False)
        self.patcher = network_patcher(network)
        self._network: Any = network
        self._dtype: torch.dtype = vae.vae_dtype
        self._largest = max(1, decode_size // int(vae.spacial_compression_decode()))

    def __call__(self, latents_BCHW: Tensor) -> Tensor:
        """Returns images (B, 3, H, W), in [0, 1] except for overshoot."""
        longer = max(latents_BCHW.shape[-2:])
        if longer > self._largest:
            latents_BCHW = F.interpolate(latents_BCHW, scale_factor=self._largest / longer, mode="area")
        return self._network.decode(latents_BCHW.to(self._dtype)).float() / 2 + 0.5


class Guidance:
    """Guidance as two wrappers of a MODEL, with the gradient ending at the one-step prediction."""

    def __init__(
        self,
        decode: DecoderCopy,
        reward: HostReward,
        prompts: Callable[[int], list[str]],
        strength: float,
        window: tuple[float, float],
    ) -> None:
        self.patchers = [decode.patcher, *reward.patchers]
        self._decode = decode
        self._reward = reward
        self._prompts = prompts
        self._strength = strength
        self._window = window

    def add_to(self, clone: ModelPatcher) -> None:
        """Adds the wrappers, and the networks that the host has to load together with the model."""
        clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, self.outer_sample)
        clone.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, self.predict_noise)
        clone.set_additional_models(KEY, self.patchers)

    def outer_sample(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Loads decoder and reward outside inference mode; the host then keeps them loaded with the model."""
        load_models(self.patchers)
        return executor(*args, **kwargs)

    def predict_noise(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Corrects the one-step prediction of an evaluation inside the window."""
        x0_BCHW: Tensor = executor(*args, **kwargs)
        model, sigma = executor.class_obj.inner_model, float(args[1].flatten()[0])
        if not self._is_active(model, sigma):
            return x0_BCHW
        comfy.model_management.throw_exception_if_processing_interrupted()
        return guided(x0_BCHW, sigma, self._strength, self._score(model, len(x0_BCHW)))

    def _is_active(self, model: Any, sigma: float) -> bool:
        start, end = (float(model.model_sampling.percent_to_sigma(percent)) for percent in self._window)
        return end <= sigma <= start

    def _score(self, model: Any, count: int) -> Score:
        """Returns the score function of predictions. Raises HyperAlignError on a wrong number of prompts."""
        prompts = self._prompts(count)

        def score(latents_BCHW: Tensor) -> Tensor:
            images_BCHW = self._decode(model.process_latent_out(latents_BCHW))
            return self._reward.differentiable(images_BCHW, prompts)

        return score


class GuidanceThroughModel(Guidance):
    """Guidance with the gradient through the model, to the noisy latent."""

    def add_to(self, clone: ModelPatcher) -> None:
        """Adds a third wrapper."""
        super().add_to(clone)
        clone.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, self.sampler_sample)

    def sampler_sample(self, executor: Any, guider: Any, sigmas: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Samples outside inference mode: generated weights kept from one step may be used in another."""
        active = [self._is_active(guider.inner_model, float(sigma)) for sigma in sigmas[:-1]]
        LOG.info(
            "Reward Guidance goes through the model in %d of %d steps: each needs 3 to 4 times the compute "
            "of a plain step, and memory for the inputs of the model's blocks. A shorter range and smaller "
            "images cost less.",
            sum(active),
            len(active),
        )
        with torch.inference_mode(False), torch.no_grad():
            tensors = [value.clone() if isinstance(value, Tensor) else value for value in (sigmas, *args)]
            return executor(guider, *tensors, **kwargs)

    def predict_noise(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Corrects the one-step prediction of an evaluation inside the window."""
        guider, sigma = executor.class_obj, float(args[1].flatten()[0])
        networks: list[nn.Module] = [guider.inner_model, *(each.model for each in guider.loaded_models)]
        # Also outside the window, because a hypernetwork's patch keeps weights over the steps.
        with normal_weights(networks):
            if not self._is_active(guider.inner_model, sigma):
                return executor(*args, **kwargs)
            comfy.model_management.throw_exception_if_processing_interrupted()
            with differentiable(networks), _explained():
                return self._guided(executor, sigma, *args, **kwargs)

    def _guided(
        self, executor: Any, sigma: float, x_BCHW: Tensor, timestep_B: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        def predict(leaf_BCHW: Tensor) -> tuple[Tensor, Tensor]:
            sizes: list[Tensor] = []
            options = _recording(args[0] if args else kwargs.pop("model_options", {}), sizes)
            x0_BCHW: Tensor = executor(leaf_BCHW, timestep_B.clone(), options, *args[1:], **kwargs)
            return x0_BCHW, sizes[-1] if sizes else prediction_size(x0_BCHW, sigma)

        score = self._score(executor.class_obj.inner_model, len(x_BCHW))
        return guided_through(x_BCHW, predict, self._strength, score)


def _recording(model_options: dict[str, Any], sizes: list[Tensor]) -> dict[str, Any]:
    """Returns options with a differentiable attention that record the size of the CFG term in `sizes`."""

    def record(arguments: dict[str, Any]) -> Any:
        cond_BCHW, uncond_BCHW, *_ = arguments["conds_out"]
        if arguments["conds"][1] is not None:  # there is a negative prompt, and cfg is not 1
            sizes.append(guidance_size(cond_BCHW, uncond_BCHW, arguments["cond_scale"]))
        return arguments["conds_out"]

    return {
        **model_options,
        "transformer_options": with_attention(model_options.get("transformer_options", {})),
        "sampler_pre_cfg_function": [*model_options.get("sampler_pre_cfg_function", []), record],
    }


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Explains the error if a network of the host or of another patch has no gradient."""
    try:
        yield
    except comfy.model_management.OOM_EXCEPTION:
        raise  # the host handles it itself
    except RuntimeError as error:
        raise HyperAlignError(
            f"The gradient cannot go through this MODEL: {error} Set gradient to `prediction`, or use a "
            "model without quantisation and without such a patch."
        ) from error


def _check(strength: float, window: tuple[float, float], decode_size: int, reward: HostReward) -> None:
    if not math.isfinite(strength):
        raise HyperAlignError(
            f"strength is {strength}; expected a number, 0 for off. Typical values are 0.05 to 0.3."
        )
    if not 0.0 <= window[0] < window[1] <= 1.0:
        raise HyperAlignError(
            f"start_percent is {window[0]} and end_percent is {window[1]}; expected "
            "0 <= start_percent < end_percent <= 1. Use 0.1 and 0.7."
        )
    if decode_size < 1:
        raise HyperAlignError(f"decode_size is {decode_size}; expected at least 1. 512 is usual.")
    if reward.combination == "rank":
        raise HyperAlignError(
            "The rewards have combination rank; expected sum or z-score. Ranks have no gradient: choose "
            "another combination in the last Reward Model Loader."
        )
