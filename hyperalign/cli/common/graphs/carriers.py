"""Nodes that carry positive and negative conditioning together: pairs, loaders, pipes and contexts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from .graph import Side

Carried = Literal["positive", "negative", "both"]


@dataclass(frozen=True, slots=True)
class Carrier:
    """What such a node's outputs carry, and from where."""

    outputs: Mapping[int, Carried]
    inputs: Mapping[Side, str] = field(
        default_factory=lambda: {"positive": "positive", "negative": "negative"}
    )
    """The inputs of each side; they go before a bundle's."""
    bundles: tuple[str, ...] = ()
    """The inputs that carry both; the first that is linked counts."""
    samples: bool = False
    """Whether the node also samples with them."""
    signs: tuple[str, ...] = ()
    """What the node replaces in its own texts, which are then not those that it encodes."""


_WILDCARDS = ("{", "__", "<lora:")
PAIR = Carrier({0: "positive", 1: "negative"})
_CONTEXT: Mapping[int, Carried] = {0: "both", 4: "positive", 5: "negative"}
_CONTEXTS = tuple(f"ctx_{number:02}" for number in range(1, 11))
_EASY_LOADER = Carrier({0: "both"}, signs=_WILDCARDS)
_EASY_PIPE = Carrier({0: "both"}, bundles=("pipe",))
_SIDES: Mapping[Side, str] = {"positive": "pos", "negative": "neg"}
_NEW: Mapping[Side, str] = {"positive": "positive_NEW", "negative": "negative_NEW"}

CARRIERS: Mapping[str, Carrier] = {
    "PairConditioningSetProperties": Carrier({0: "positive", 1: "negative"}, _NEW),
    # Efficiency Nodes
    "Efficient Loader": Carrier({1: "positive", 2: "negative"}),
    "KSampler (Efficient)": Carrier({1: "positive", 2: "negative"}, samples=True),
    "KSampler Adv. (Efficient)": Carrier({1: "positive", 2: "negative"}, samples=True),
    # Impact Pack
    "ToBasicPipe": Carrier({0: "both"}),
    "FromBasicPipe": Carrier({3: "positive", 4: "negative"}, bundles=("basic_pipe",)),
    "FromBasicPipe_v2": Carrier({0: "both", 4: "positive", 5: "negative"}, bundles=("basic_pipe",)),
    "EditBasicPipe": Carrier({0: "both"}, bundles=("basic_pipe",)),
    "ToDetailerPipe": Carrier({0: "both"}),
    "BasicPipeToDetailerPipe": Carrier({0: "both"}, bundles=("basic_pipe",)),
    "ImpactKSamplerBasicPipe": Carrier({0: "both"}, bundles=("basic_pipe",), samples=True),
    "ImpactKSamplerAdvancedBasicPipe": Carrier({0: "both"}, bundles=("basic_pipe",), samples=True),
    # rgthree
    "Context (rgthree)": Carrier(_CONTEXT, bundles=("base_ctx",)),
    "Context Big (rgthree)": Carrier(_CONTEXT, bundles=("base_ctx",)),
    "Context Switch (rgthree)": Carrier(_CONTEXT, bundles=_CONTEXTS),
    "Context Switch Big (rgthree)": Carrier(_CONTEXT, bundles=_CONTEXTS),
    # Easy Use
    "easy fullLoader": Carrier({0: "both", 4: "positive", 5: "negative"}, signs=_WILDCARDS),
    "easy a1111Loader": _EASY_LOADER,
    "easy comfyLoader": _EASY_LOADER,
    "easy preSampling": _EASY_PIPE,
    "easy preSamplingAdvanced": _EASY_PIPE,
    "easy kSampler": Carrier({0: "both"}, bundles=("pipe",), samples=True),
    "easy fullkSampler": Carrier({0: "both"}, bundles=("pipe",), samples=True),
    "easy pipeIn": Carrier({0: "both"}, _SIDES, ("pipe",)),
    "easy pipeOut": Carrier({0: "both", 2: "positive", 3: "negative"}, _SIDES, ("pipe",)),
} | dict.fromkeys(
    (  # ComfyUI
        "ControlNetApplyAdvanced", "ControlNetApplySD3", "ControlNetInpaintingAliMamaApply",
        "InpaintModelConditioning", "InstructPixToPixConditioning", "SD_4XUpscale_Conditioning",
        "LTXVConditioning", "LTXVImgToVideo", "LTXVAddGuide", "LTXVCropGuides", "ConditioningStableAudio",
        "WanImageToVideo", "WanFunControlToVideo", "WanFunInpaintToVideo", "WanFirstLastFrameToVideo",
        "WanVaceToVideo", "WanCameraImageToVideo", "WanTrackToVideo", "WanSoundImageToVideo",
        "WanHuMoImageToVideo", "WanAnimateToVideo", "Wan22FunControlToVideo", "HunyuanVideo15ImageToVideo",
    ),
    PAIR,
)  # fmt: skip
"""By class: the carriers whose outputs are known without the server's declarations."""

HANDED_ON: Mapping[str, tuple[str, ...]] = {
    "CLIPTextEncodeControlnet": ("conditioning",),
    "GLIGENTextBoxApply": ("conditioning_to",),
}
"""By class: where a conditioning comes from, of nodes that also have a text which is not the prompt."""

SWITCHES: Mapping[str, tuple[str, ...]] = {
    "Any Switch (rgthree)": tuple(f"any_{number:02}" for number in range(1, 21)),
}
"""By class: inputs of which the first that is linked is handed on."""

ERASES: Mapping[str, str] = {
    "ConditioningZeroOut": "it erases the text",
    "ImpactNegativeConditioningPlaceholder": "it has no text",
}
"""By class: why what a node returns has no text."""

GUIDERS = frozenset(("BasicGuider", "DualCFGGuider"))
"""Classes that take conditioning to sample with, without an input that is called positive."""
