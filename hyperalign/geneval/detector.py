"""Object detection: Mask2Former with a small Swin, trained on COCO's instances.

The official GenEval uses mmdetection's weights of this architecture, transformers has Meta's, from another
training run; so metrics may differ slightly from published ones. Resizing, padding and postprocessing follow
mmdetection's configuration.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import HyperAlignError
from ..rewards.images import check_images, normalise, rgb
from ..rewards.networks import State, without_autocast
from ..rewards.weights import WeightFile, as_published, check_finite, check_names, find, read
from .prompts import NAMES
from .rules import THRESHOLD, Detection

WEIGHTS = WeightFile(
    "mask2former-swin-small-coco-instance/model.safetensors",
    "https://huggingface.co/facebook/mask2former-swin-small-coco-instance/resolve/main/model.safetensors",
    0.28,
    "",
    as_published,
)
SHORT_SIDE, LONG_SIDE, DIVISOR = 800, 1333, 32
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MAX_DETECTIONS = 100
"""Per image, over all classes."""
NOT_LEARNED = ("relative_position_index", "criterion.empty_weight")
"""The endings of buffers that only some releases of transformers save."""


@dataclass(frozen=True, slots=True)
class DetectorShape:
    """The sizes of a Mask2Former."""

    width: int = 96
    depths: tuple[int, ...] = (2, 2, 18, 2)
    heads: tuple[int, ...] = (3, 6, 12, 24)
    features: int = 256
    feedforward: int = 2048
    encoder_feedforward: int = 1024
    encoder_layers: int = 6
    decoder_layers: int = 10
    queries: int = 100


SWIN_SMALL = DetectorShape()


@dataclass(frozen=True, slots=True)
class SegmentedObject(Detection):
    """A detection with its mask."""

    mask_HW: Tensor | None = None
    """Whether a pixel of the image belongs to the object."""


def configuration(shape: DetectorShape) -> Any:
    """Returns transformers' configuration of a detector."""
    from transformers import Mask2FormerConfig, SwinConfig

    stages = [f"stage{number}" for number in range(1, len(shape.depths) + 1)]
    backbone: dict[str, Any] = {
        "embed_dim": shape.width,
        "depths": list(shape.depths),
        "num_heads": list(shape.heads),
        "window_size": 7,
        "out_features": stages,
    }
    sizes: dict[str, Any] = {
        "num_labels": len(NAMES),
        "feature_size": shape.features,
        "mask_feature_size": shape.features,
        "hidden_dim": shape.features,
        "dim_feedforward": shape.feedforward,
        "encoder_feedforward_dim": shape.encoder_feedforward,
        "encoder_layers": shape.encoder_layers,
        "decoder_layers": shape.decoder_layers,
        "num_queries": shape.queries,
    }
    return Mask2FormerConfig(backbone_config=cast(Any, SwinConfig(**backbone)), **sizes)


def network(shape: DetectorShape) -> nn.Module:
    """Returns the architecture with random weights."""
    from transformers import Mask2FormerForUniversalSegmentation

    return Mask2FormerForUniversalSegmentation(configuration(shape))


def load(folder: Path, device: torch.device | str = "cpu") -> nn.Module:
    """Loads the detector, frozen, in float32. Nothing is downloaded.

    Raises HyperAlignError: the file is missing, damaged or another model's.
    """
    path = find(WEIGHTS, folder)
    with torch.inference_mode(False):
        return _with_weights(path, read(path)).to(device, torch.float32).eval().requires_grad_(False)


def _with_weights(path: Path, state: State) -> nn.Module:
    """Returns the network with the published tensors; transformers converts names of older releases."""
    from transformers import Mask2FormerForUniversalSegmentation

    check_finite(path, state)
    try:
        with _without_progress_bar():
            loaded: Any = Mask2FormerForUniversalSegmentation.from_pretrained(
                cast(Any, None), config=configuration(SWIN_SMALL), state_dict=state, output_loading_info=True
            )
    except (RuntimeError, ValueError) as error:
        raise HyperAlignError(
            f"{path} does not fit Mask2Former with a small Swin for COCO's instances; get the published file."
        ) from error
    detector, report = loaded
    missing, extra = (
        [key for key in report[kind] if not key.endswith(NOT_LEARNED)]
        for kind in ("missing_keys", "unexpected_keys")
    )
    check_names(path, missing, extra)
    return detector


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    """Hides transformers' progress bar, which here counts tensors that are in memory already."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def detect(detector: nn.Module, image_CHW: Tensor) -> list[SegmentedObject]:
    """Returns the objects in an image (1, 3 or 4, H, W) in [0, 1] that score above `rules.THRESHOLD`.

    Raises HyperAlignError on an image of another form.
    """
    check_images(image_CHW[None])
    device = next(detector.parameters()).device
    image_BCHW = rgb(image_CHW[None]).to(device, torch.float32).clamp(0.0, 1.0)
    padded_BCHW, inner = preprocess(image_BCHW)
    with torch.no_grad(), without_autocast(detector):
        output: Any = detector(pixel_values=padded_BCHW)
    return postprocess(
        output.class_queries_logits[0],
        output.masks_queries_logits[0],
        (padded_BCHW.shape[-2], padded_BCHW.shape[-1]),
        inner,
        (image_CHW.shape[-2], image_CHW.shape[-1]),
    )


def preprocess(image_BCHW: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Returns the input of the detector, and the height and width of the image at its top left.

    The short side becomes 800, or the long side 1333 where it would be longer. The mean colour pads the
    image to multiples of 32.
    """
    height, width = image_BCHW.shape[-2:]
    scale = min(SHORT_SIDE / min(height, width), LONG_SIDE / max(height, width))
    size = (max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5)))
    resized_BCHW = F.interpolate(image_BCHW, size=size, mode="bilinear", align_corners=False)
    below, right = (-length % DIVISOR for length in size)
    return F.pad(normalise(resized_BCHW, IMAGENET_MEAN, IMAGENET_STD), (0, right, 0, below)), size


def postprocess(
    classes_QK: Tensor,
    masks_Qhw: Tensor,
    padded: tuple[int, int],
    inner: tuple[int, int],
    original: tuple[int, int],
) -> list[SegmentedObject]:
    """Returns detections from the network's logits.

    The score of an object is the probability of its class times the mean probability of its pixels; its box
    is that of its mask. A query may give objects of several classes.

    Args:
        classes_QK: logits per query, for the classes and for no object.
        masks_Qhw: logits per query, at a quarter of the padded size.
        padded: height and width of the network's input.
        inner: height and width of the resized image in it.
        original: height and width of the image.
    """
    probabilities_QK = classes_QK.float().softmax(dim=-1)[:, :-1]
    best = probabilities_QK.flatten().topk(min(MAX_DETECTIONS, probabilities_QK.numel()))
    found: list[SegmentedObject] = []
    for probability, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        if probability <= THRESHOLD:  # the mask can only lower it
            break
        query, label = divmod(index, probabilities_QK.shape[1])
        logits_HW = _at_original_size(masks_Qhw[query].float(), padded, inner, original)
        mask_HW = logits_HW > 0
        if not bool(mask_HW.any()):
            continue
        score = probability * float(logits_HW[mask_HW].sigmoid().mean())
        if score > THRESHOLD:
            found.append(SegmentedObject(NAMES[label], score, box_of(mask_HW), mask_HW=mask_HW))
    return found


def _at_original_size(
    mask_hw: Tensor, padded: tuple[int, int], inner: tuple[int, int], original: tuple[int, int]
) -> Tensor:
    whole = F.interpolate(mask_hw[None, None], size=padded, mode="bilinear", align_corners=False)
    image = whole[..., : inner[0], : inner[1]]
    return F.interpolate(image, size=original, mode="bilinear", align_corners=False)[0, 0]


def box_of(mask_HW: Tensor) -> tuple[float, float, float, float]:
    """Returns left, top, right and bottom of a mask; right and bottom are just outside it."""
    rows, columns = (mask_HW.any(dim=axis).nonzero().flatten().tolist() for axis in (1, 0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)
