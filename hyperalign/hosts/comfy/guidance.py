"""Reward guidance on a ComfyUI MODEL: a PREDICT_NOISE wrapper moves the guider's one-step prediction."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
from collections.abc import Iterator
from typing import Any, Literal

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import HyperAlignError
from ...guidance import Score, guidance_size, guided, guided_through, prediction_size
from .gradient import differentiable, normal_weights, with_attention
from .model import network_patcher
from .rewards import HostReward, load_models, prompts_for

LOG = logging.getLogger(__name__)
KEY = "hyperalign_guidance"
Gradient = Literal["prediction", "through model"]
GRADIENTS: tuple[Gradient, ...] = ("prediction", "through model")


def apply_guidance(
    patcher: ModelPatcher,
    vae: Any,
    reward: HostReward,
    prompt: str,
    strength: float,
    window: tuple[float, float],
    side: int,
    gradient: Gradient = "prediction",
) -> ModelPatcher:
    """Returns a clone of the MODEL that samples towards a greater reward; a second one replaces the first.

    Args:
        patcher: the MODEL; it is not changed.
        vae: decodes the one-step predictions; copied, as the host's own weights take part in no gradient.
        reward: judges them.
        prompt: one line for all rows, or one per row.
        strength: 0 is the model itself.
        window: from where to where in the noise range it acts, as fractions; 0 is pure noise.
        side: latents larger than this on their longer side, in pixels, are decoded at this size.
        gradient: whether it ends at the one-step prediction or goes through the model.

    Raises:
        HyperAlignError: a value out of range, ranks, or a VAE that does not make images.
    """
    _check(strength, window, reward)
    clone = patcher.clone()
    for kind in (WrappersMP.OUTER_SAMPLE, WrappersMP.SAMPLER_SAMPLE, WrappersMP.PREDICT_NOISE):
        clone.remove_wrappers_with_key(kind, KEY)
    clone.remove_additional_models(KEY)
    if strength == 0.0:
        return clone
    way = GuidanceThroughModel if gradient == "through model" else Guidance
    way(DecoderCopy(vae, side), reward, prompt, strength, window).add_to(clone)
    return clone


class DecoderCopy:
    """A VAE's network whose weights can take part in a gradient, decoding at a bounded size."""

    def __init__(self, vae: Any, side: int) -> None:
        if getattr(vae, "latent_dim", 2) != 2:
            raise HyperAlignError("The VAE makes video or sound; expected one that makes images.")
        with torch.inference_mode(False):
            network: nn.Module = copy.deepcopy(vae.first_stage_model).eval().requires_grad_(False)
        self.patcher = network_patcher(network)
        self._network: Any = network
        self._dtype: torch.dtype = vae.vae_dtype
        self._largest = max(1, side // int(vae.spacial_compression_decode()))

    def __call__(self, latents_BCHW: Tensor) -> Tensor:
        """Returns images (B, 3, H, W), in [0, 1] but for overshoots."""
        longer = max(latents_BCHW.shape[-2:])
        if longer > self._largest:
            latents_BCHW = F.interpolate(latents_BCHW, scale_factor=self._largest / longer, mode="area")
        return self._network.decode(latents_BCHW.to(self._dtype)).float() / 2 + 0.5


class Guidance:
    """The two wrappers of one application, the gradient ending at the one-step prediction."""

    def __init__(
        self,
        decode: DecoderCopy,
        reward: HostReward,
        prompt: str,
        strength: float,
        window: tuple[float, float],
    ) -> None:
        self.patchers = [decode.patcher, *reward.patchers]
        self._decode = decode
        self._reward = reward
        self._prompt = prompt
        self._strength = strength
        self._window = window

    def add_to(self, clone: ModelPatcher) -> None:
        """Adds the wrappers, and the networks that the host shall load beside the model."""
        clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, self.outer_sample)
        clone.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, self.predict_noise)
        clone.set_additional_models(KEY, self.patchers)

    def outer_sample(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Loads decoder and reward outside inference mode; the host then keeps them beside the model."""
        load_models(self.patchers)
        return executor(*args, **kwargs)

    def predict_noise(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Moves the one-step prediction of an evaluation inside the window."""
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
        """Returns what scores one-step predictions. Raises HyperAlignError on another number of prompts."""
        prompts = prompts_for(self._prompt, count)

        def score(latents_BCHW: Tensor) -> Tensor:
            images_BCHW = self._decode(model.process_latent_out(latents_BCHW))
            return self._reward.differentiable(images_BCHW, prompts)

        return score


class GuidanceThroughModel(Guidance):
    """Guidance with the gradient going on through the model, to the noisy latent."""

    def add_to(self, clone: ModelPatcher) -> None:
        """Adds one wrapper more."""
        super().add_to(clone)
        clone.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, self.sampler_sample)

    def sampler_sample(self, executor: Any, guider: Any, sigmas: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Samples outside inference mode: what one step keeps (generated weights), another may need."""
        active = [self._is_active(guider.inner_model, float(sigma)) for sigma in sigmas[:-1]]
        LOG.info(
            "Reward Guidance goes through the model in %d of %d steps: 3 to 4 times a plain step's work each "
            "and memory for what the model's blocks read. A shorter window and smaller images cost less.",
            sum(active),
            len(active),
        )
        with torch.inference_mode(False), torch.no_grad():
            tensors = [value.clone() if isinstance(value, Tensor) else value for value in (sigmas, *args)]
            return executor(guider, *tensors, **kwargs)

    def predict_noise(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Moves the one-step prediction of an evaluation inside the window."""
        guider, sigma = executor.class_obj, float(args[1].flatten()[0])
        networks: list[nn.Module] = [guider.inner_model, *(each.model for each in guider.loaded_models)]
        # Also outside the window, as a hypernetwork's patch keeps weights over the steps.
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
    """Returns options with a differentiable attention, and which note the size of the host's guidance."""

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
    """Says what to do where a network of the host or of another patch has no gradient."""
    try:
        yield
    except comfy.model_management.OOM_EXCEPTION:
        raise  # the host has its own way with it
    except RuntimeError as error:
        raise HyperAlignError(
            f"The gradient cannot go through this MODEL: {error} Set gradient to `prediction`, or use a "
            "model that is not quantised and has no such patch."
        ) from error


def _check(strength: float, window: tuple[float, float], reward: HostReward) -> None:
    if not math.isfinite(strength):
        raise HyperAlignError(f"strength is {strength}; expected a number, 0 for off. 0.05 to 0.3 is usual.")
    if not 0.0 <= window[0] < window[1] <= 1.0:
        raise HyperAlignError(
            f"start_percent is {window[0]} and end_percent is {window[1]}; expected "
            "0 <= start_percent < end_percent <= 1. Use 0.1 and 0.7."
        )
    if reward.combination == "rank":
        raise HyperAlignError("Ranks have no gradient. Combine the rewards as sum or z-score.")
