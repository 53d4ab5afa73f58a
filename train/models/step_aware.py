"""The step-aware preference model of SPO (Liang et al. 2024, arXiv 2406.04314): a reward that knows the time.

It scores decoded one-step predictions x0-hat. The image tower of an existing reward is modulated by the
timestep (adaLN: Peebles and Xie 2023, arXiv 2212.09748): x (1 + scale) + shift after its normalisations,
and a gate on what is added to its residual stream. All of that starts at nothing, so that the untrained model
is the reward at every timestep. The score is in logits: a cosine is multiplied by CLIP's logit scale.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from hyperalign.checkpoint import not_finite, save_atomically
from hyperalign.errors import HyperAlignError
from hyperalign.families.unet import LAST_TIMESTEP
from hyperalign.files import cannot_write, first_line
from hyperalign.rewards import Reward, loading, tiny
from hyperalign.rewards.clip import ClipNetwork, ClipReward
from hyperalign.rewards.networks import State, encoder_weight, without_autocast
from hyperalign.tiny.evaluators import TinyReward
from hyperalign.tiny.weights import part_path
from train.config import TrainConfig
from train.models.fingerprint import files_digest
from train.models.load import PIPELINES, backbone_dtype, check_folder
from train.models.rewards import load_reward

HEADER_KEY, FORMAT_VERSION = "hyperalign_step_reward", 1
FREQUENCIES, MAX_PERIOD = 128, 10000.0
RETRAIN = "Train one for this recipe with train/step_reward.py, or set spo.step_reward to another file."


@dataclass(frozen=True, slots=True)
class Tower:
    """The image tower of a network, and what of it is modulated: the beginnings and endings of names."""

    weights: tuple[str, ...]
    modulated: tuple[str, ...]
    sublayers: tuple[str, ...]
    """What is added to the residual stream."""


TOWERS: dict[type[nn.Module], Tower] = {
    ClipNetwork: Tower(
        ("clip.vision_model.", "clip.visual_projection."),
        ("clip.vision_model.encoder.", "clip.vision_model.post_layernorm"),
        (".self_attn", ".mlp"),
    ),
    TinyReward: Tower(("stem.", "head."), ("stem.", "head."), (".body",)),
}


class Place(NamedTuple):
    """A module whose output is modulated."""

    module: nn.Module
    channels: int
    is_gate: bool


def places(network: nn.Module) -> Iterator[Place]:
    """Yields what is modulated of a network in `TOWERS`: normalisations and residual sublayers."""
    tower = TOWERS[type(network)]
    for name, module in network.named_modules():
        is_gate = name.endswith(tower.sublayers)
        if name.startswith(tower.modulated) and (is_gate or isinstance(module, (nn.LayerNorm, nn.GroupNorm))):
            yield Place(module, list(module.parameters())[-1].numel(), is_gate)  # the last bias


def sinusoid(u_B: Tensor) -> Tensor:
    """Returns cosines and sines (B, 256) in float32 of u in [0, 1], as timesteps 0 to 999."""
    steps = torch.arange(FREQUENCIES, device=u_B.device, dtype=torch.float32) / FREQUENCIES
    angles = LAST_TIMESTEP * u_B.float()[:, None] * torch.exp(-math.log(MAX_PERIOD) * steps)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class Modulation(nn.Module):
    """Shift, scale and gate of a network's places by the time, in float32; hooks apply them."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        found = list(places(network))
        width = max(place.channels for place in found)
        self.embed = nn.Sequential(
            nn.Linear(2 * FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.heads = nn.ModuleList(
            nn.Linear(width, place.channels * (1 if place.is_gate else 2)) for place in found
        )
        self._embedded = torch.zeros(0)
        self._start([place.is_gate for place in found])
        for head, place in zip(self.heads, found, strict=True):
            place.module.register_forward_hook(partial(self._modulated, head, place.is_gate))

    @torch.no_grad()
    def _start(self, gates: Sequence[bool]) -> None:
        for layer in (self.embed[0], self.embed[2]):
            nn.init.normal_(layer.get_parameter("weight"), std=0.02)
            nn.init.zeros_(layer.get_parameter("bias"))
        for head, is_gate in zip(self.heads, gates, strict=True):
            nn.init.zeros_(head.get_parameter("weight"))
            nn.init.constant_(head.get_parameter("bias"), float(is_gate))

    def at(self, u_B: Tensor) -> None:
        """Sets the time u of each image of the forward to come, and of its recomputation."""
        self._embedded = self.embed(sinusoid(u_B))

    def _modulated(self, head: nn.Module, is_gate: bool, _: nn.Module, __: Any, output: Any) -> Any:
        """Is a forward hook: returns the modulated output; attention's has the weights beside it."""
        x: Tensor = output[0] if isinstance(output, tuple) else output
        channels_first = x.dim() == 4
        shape = (len(x), -1, 1, 1) if channels_first else (len(x), *[1] * (x.dim() - 2), -1)
        values = head(self._embedded).to(x.dtype)
        if is_gate:
            x = values.view(shape) * x
        else:
            scale, shift = (part.reshape(shape) for part in values.chunk(2, dim=1))
            x = x * (1.0 + scale) + shift
        return (x, *output[1:]) if isinstance(output, tuple) else x


@dataclass(frozen=True, slots=True)
class StepAware:
    """A reward whose image tower knows the time; nothing else may use that reward."""

    reward: Reward
    modulation: Modulation
    tower: bool = False
    """Whether the tower's own weights are trained too."""

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[str], u_B: Tensor) -> Tensor:
        """Returns the scores (B,) in logits of one-step predictions.

        Args:
            images_BCHW: decoded x0-hat (B, 3, H, W), finite, about [0, 1].
            prompts: of each.
            u_B: the times they are predicted from, as fractions of the noise schedule (B,).
        """
        with without_autocast(self.reward.module):
            self.modulation.at(u_B.to(encoder_weight(self.reward.module).device))
            return logit_scale(self.reward) * self.reward.score_finite(images_BCHW, prompts)

    def trained(self) -> dict[str, nn.Parameter]:
        """Returns what is trained and saved, by its name in the file."""
        return trained_parameters(self.reward.module, self.modulation, self.tower)


def trained_parameters(network: nn.Module, modulation: Modulation, tower: bool) -> dict[str, nn.Parameter]:
    """Returns the modulation's parameters, with those of the image tower if `tower`, by names in a file."""
    own = {f"modulation.{name}": value for name, value in modulation.named_parameters()}
    if tower:
        starts = TOWERS[type(network)].weights
        named = network.named_parameters()
        own |= {f"tower.{name}": value for name, value in named if name.startswith(starts)}
    return own


def logit_scale(reward: Reward) -> Tensor | float:
    """Returns the factor that makes a reward's score logits: CLIP's for a plain cosine, else 1."""
    is_cosine = isinstance(reward, ClipReward) and not reward.scaled
    return reward.module.get_parameter("clip.logit_scale").detach().exp() if is_cosine else 1.0


def make_step_aware(reward: Reward, tower: bool = False) -> StepAware:
    """Returns an untrained model, which is the reward; its modulation, and the tower if asked, has gradients.

    Raises HyperAlignError if the reward's image tower cannot be modulated.
    """
    check_tower(reward.name, reward.module)
    modulation = Modulation(reward.module).to(encoder_weight(reward.module).device)
    model = StepAware(reward, modulation, tower)
    for parameter in model.trained().values():
        parameter.requires_grad_()
    return model


def meta_network(name: str) -> nn.Module:
    """Returns a reward's network without memory for its weights.

    Raises HyperAlignError if there is no such reward, or its image tower cannot be modulated.
    """
    with torch.device("meta"):
        network = TinyReward() if name in tiny.NAMES else loading.published_reward(name).network()
    check_tower(name, network)
    return network


def check_tower(name: str, network: nn.Module) -> None:
    """Raises HyperAlignError if a network's image tower cannot be modulated."""
    if type(network) not in TOWERS:
        raise HyperAlignError(
            f"The image tower of the reward {name!r} cannot be made step-aware; expected the tiny reward, or "
            "one of CLIP's encoders: pickscore, hpsv2.1, hpsv2 or clip. Choose one of them."
        )


# The file


@dataclass(frozen=True, slots=True)
class StepAwareHeader:
    """What a step-aware model belongs to, and how it was trained."""

    base: str
    """`base_fingerprint` of the base model whose predictions it knows."""
    reward: str
    tower: bool
    training: dict[str, Any] = field(default_factory=dict[str, Any])
    """Steps, pairs, guidance, learning rate, data, accuracy."""
    versions: dict[str, str] = field(default_factory=dict[str, str])
    format_version: int = FORMAT_VERSION


def base_fingerprint(config: TrainConfig) -> str:
    """Returns what identifies a recipe's U-Net or transformer. Raises HyperAlignError if it is not there."""
    name = config.model.base
    if name == "tiny":
        files = [part_path("unet")]
    else:
        folder = check_folder(config) / PIPELINES[name].subfolder
        files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    return f"{name}-{files_digest(name, files)[:12]}"


def save_step_aware(path: Path, model: StepAware, header: StepAwareHeader) -> None:
    """Writes the file whole or not at all, in float32. Raises HyperAlignError if the disk refuses."""
    tensors = {name: value.detach().float().cpu().contiguous() for name, value in model.trained().items()}
    with cannot_write(path, "Make room or choose another --out, and run the same command again."):
        save_atomically(tensors, path, {HEADER_KEY: json.dumps(asdict(header))})


def check_step_aware(config: TrainConfig) -> None:
    """Reads the file of a recipe that has one. Raises HyperAlignError as `read_step_aware`."""
    if config.step_reward is not None:
        read_step_aware(config.step_reward, config)


def random_step_aware(config: TrainConfig, device: torch.device) -> StepAware | None:
    """Returns an untrained model with random weights for a recipe that has a file, for smoke runs."""
    if config.step_reward is None:
        return None
    name = next(iter(config.objective.rewards))
    return make_step_aware(loading.random_weights(name, device=device, dtype=backbone_dtype(config)))


@torch.no_grad()
def load_step_aware(config: TrainConfig, device: torch.device) -> StepAware | None:
    """Returns a recipe's model, frozen, None if it has none. Raises HyperAlignError as `read_step_aware`."""
    if config.step_reward is None:
        return None
    header, state = read_step_aware(config.step_reward, config)
    model = make_step_aware(load_reward(config, header.reward, device), header.tower)
    for name, parameter in model.trained().items():
        parameter.requires_grad_(False).copy_(state[name])
    return model


def read_step_aware(path: Path, config: TrainConfig) -> tuple[StepAwareHeader, State]:
    """Returns header and tensors of a file.

    Raises:
        HyperAlignError: no such file, a damaged one, one of another base model or of a reward that the recipe
            does not name, or with tensors that do not fit or are not finite.
    """
    if not path.is_file():
        raise HyperAlignError(f"spo.step_reward is {path}, which is not there. {RETRAIN}")
    try:
        with safe_open(str(path), framework="pt") as file:
            text = (file.metadata() or {}).get(HEADER_KEY, "")
            state: State = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise HyperAlignError(
            f"{path} is not a whole safetensors file ({first_line(error)}). Copy it again. {RETRAIN}"
        ) from error
    header = _parsed(text, path)
    _check_fits(path, header, config)
    _check_tensors(path, header, state)
    return header, state


def _parsed(text: str, path: Path) -> StepAwareHeader:
    try:
        raw: dict[str, Any] = json.loads(text)
        known = {one.name for one in fields(StepAwareHeader)}
        if raw["format_version"] != FORMAT_VERSION or set(raw) != known:
            raise ValueError(f"format version {raw['format_version']}")
        return StepAwareHeader(**raw)
    except (ValueError, TypeError, KeyError) as error:
        raise HyperAlignError(
            f"{path} has no header of a step-aware preference model of format {FORMAT_VERSION} "
            f"({first_line(error)}). {RETRAIN}"
        ) from error


def _check_fits(path: Path, header: StepAwareHeader, config: TrainConfig) -> None:
    base = base_fingerprint(config)
    if header.base != base:
        raise HyperAlignError(
            f"{path} was trained on predictions of the base model {header.base}; the recipe's is {base}. "
            f"{RETRAIN}"
        )
    if header.reward not in config.objective.rewards:
        raise HyperAlignError(
            f"{path} was made from the reward {header.reward!r}; expected one of objective.rewards: "
            f"{', '.join(config.objective.rewards)}. {RETRAIN}"
        )


def _check_tensors(path: Path, header: StepAwareHeader, state: Mapping[str, Tensor]) -> None:
    network = meta_network(header.reward)
    with torch.device("meta"):
        expected = trained_parameters(network, Modulation(network), header.tower)
    wrong = [name for name in expected if name not in state or state[name].shape != expected[name].shape]
    wrong += [name for name in state if name not in expected]
    if wrong:
        raise HyperAlignError(
            f"{path} does not hold the tensors of a step-aware {header.reward}: {wrong[0]} and "
            f"{len(wrong) - 1} others are missing, unknown or of another shape. Copy it again. {RETRAIN}"
        )
    if bad := not_finite(state):
        raise HyperAlignError(f"{path} holds NaN or infinite values ({bad[0]}). Copy it again. {RETRAIN}")
