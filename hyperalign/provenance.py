"""The sources of a hypernetwork: base model, rewards and preference dataset, with licences and known biases.

A file's header, its model card and the loader's text all take these facts from here. The sentences on biases
rest on these audits: arXiv 2604.13305 (CLIP, HPS, ImageReward and PickScore), 2601.09896 (LAION aesthetic),
2512.11883 (images that are ugly on purpose).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from .errors import shown
from .finite import is_finite

Kind = Literal["reward", "preference dataset", "base model"]
KINDS: tuple[Kind, ...] = get_args(Kind)
UNKNOWN_LICENCE = "unknown; ask the author of the file"
HUB = "https://huggingface.co"


@dataclass(frozen=True, slots=True)
class Source:
    """A base model, reward or preference dataset that a hypernetwork was trained with."""

    kind: Kind
    name: str
    """Published name and version."""
    licence: str
    page: str = ""
    """Address of its page; empty if it is the user's own."""
    biases: str = ""
    """What is known about its preferences, in one sentence."""
    weight: float | None = None
    """Of a reward in the weighted sum; None for datasets and base models."""

    def __post_init__(self) -> None:
        """Checks the values, which may come from a file's header. Raises ValueError."""
        if self.kind not in KINDS:
            raise ValueError(f"a source is {shown(self.kind)}, expected one of {', '.join(KINDS)}")
        texts = (self.name, self.licence, self.page, self.biases)
        if not all(isinstance(cast(Any, text), str) for text in texts) or not self.name.strip():
            raise ValueError(f"a source is {shown(texts)}, expected a name and three texts")
        if self.weight is not None and not is_finite(self.weight):
            raise ValueError(f"the weight of {shown(self.name)} is {shown(self.weight)}, expected a number")

    @property
    def title(self) -> str:
        """Weight and name, as `0.5 x CLIP score`; the name alone without a weight or with weight 1."""
        return self.name if self.weight in (None, 1.0) else f"{self.weight:g} x {self.name}"


PEOPLE = (
    "optimising it sexualises women, reinforces gender and racial stereotypes and narrows who is shown "
    "(arXiv 2604.13305)"
)
HPS = (
    "learned from annotators' choices between generated images (HPDv2); marks down what is ugly on purpose "
    f"(arXiv 2512.11883); {PEOPLE}"
)
TINY = "prefers Fluent emoji to Noto emoji by design, and knows 84 words"

REWARDS = {
    "hpsv2.1": Source(
        "reward", "HPSv2.1", "Apache-2.0", f"{HUB}/xswu/HPSv2", HPS,
    ),
    "hpsv2": Source(
        "reward", "HPSv2", "Apache-2.0", f"{HUB}/xswu/HPSv2", HPS,
    ),
    "pickscore": Source(
        "reward", "PickScore v1", "MIT (code; the model card names no other)",
        f"{HUB}/yuvalkirstain/PickScore_v1",
        f"learned from the choices of a web app's self-selected users, unsafe prompts among them; {PEOPLE}",
    ),
    "imagereward": Source(
        "reward", "ImageReward v1.0", "Apache-2.0", f"{HUB}/THUDM/ImageReward",
        f"learned from annotators' ratings of images for DiffusionDB prompts; {PEOPLE}",
    ),
    "clip": Source(
        "reward", "CLIP score (ViT-L/14)", "MIT", f"{HUB}/openai/clip-vit-large-patch14",
        f"learned from web images and English captions; counts and places things poorly; {PEOPLE}",
    ),
    "aesthetic": Source(
        "reward", "LAION aesthetic v2", "Apache-2.0",
        "https://github.com/christophschuhmann/improved-aesthetic-predictor",
        "reads no prompt; taste of English-speaking photographers and AI enthusiasts: realistic Western and "
        "Japanese art first, captions with women above those with men or LGBTQ+ people (arXiv 2601.09896)",
    ),
    "siglip-aesthetic": Source(
        "reward", "SigLIP aesthetic v2.5", "AGPL-3.0 (head), Apache-2.0 (SigLIP encoder)",
        "https://github.com/discus0434/aesthetic-predictor-v2-5",
        "reads no prompt; its training data is not published and no audit of it is known: expect an "
        "illustrator's and photographer's taste",
    ),
    "tiny reward": Source(
        "reward", "tiny preference reward", "Apache-2.0", "",
        TINY,
    ),
    "tiny validation reward": Source(
        "reward", "tiny validation reward", "Apache-2.0", "",
        TINY,
    ),
}  # fmt: skip
"""The rewards of `hyperalign.rewards.loading`, by the names they have there."""

DATASETS = {
    "pickapicv2": Source(
        "preference dataset", "Pick-a-Pic v2", "none named on its card; the images were made by its users",
        f"{HUB}/datasets/yuvalkirstain/pickapic_v2",
        "English prompts and choices of a web app's self-selected users; unsafe images are in it and no "
        "column marks them",
    ),
    "hpdv2": Source(
        "preference dataset", "HPDv2", "Apache-2.0", f"{HUB}/datasets/ymhao/HPDv2",
        "paid annotators' choices; prompts of DiffusionDB users, rewritten by ChatGPT, and of COCO; images "
        "of 2022's generators; no column marks unsafe ones",
    ),
    "emojiscenes": Source(
        "preference dataset", "EmojiScenes", "Apache-2.0 (Noto Emoji), MIT (Fluent Emoji)", "",
        "rendered by rule: Fluent style is preferred; no people but emoji faces",
    ),
}  # fmt: skip
"""Known preference datasets; the key is a part of the letters and digits of a description."""

BASES = {
    "tiny": Source("base model", "embedded tiny model", "Apache-2.0", "", "generates emoji only"),
    "sd15": Source(
        "base model", "Stable Diffusion 1.5", "CreativeML Open RAIL-M",
        f"{HUB}/stable-diffusion-v1-5/stable-diffusion-v1-5",
        "learned from LAION's web images with English captions, chosen by LAION aesthetic",
    ),
    "sdxl": Source(
        "base model", "SDXL 1.0", "CreativeML Open RAIL++-M",
        f"{HUB}/stabilityai/stable-diffusion-xl-base-1.0",
        "its training data is not published; its card names social biases",
    ),
    "flux": Source(
        "base model", "FLUX.1 [dev]", "FLUX.1 [dev] Non-Commercial License",
        f"{HUB}/black-forest-labs/FLUX.1-dev",
        "its training data is not published; its card names social biases",
    ),
    "sd3": Source(
        "base model", "Stable Diffusion 3.5 medium", "Stability AI Community License",
        f"{HUB}/stabilityai/stable-diffusion-3.5-medium",
        "its training data is not published; its card names social biases",
    ),
}  # fmt: skip
"""Base models by their family."""


def reward_source(name: str, weight: float) -> Source:
    """Returns what is known about a reward; an unknown one is taken for the user's own."""
    known = REWARDS.get(name)
    if known is None:
        return Source("reward", name, UNKNOWN_LICENCE, weight=weight)
    return Source("reward", known.name, known.licence, known.page, known.biases, weight)


def dataset_sources(text: str) -> list[Source]:
    """Returns the known datasets that a description names, else the description as the user's own dataset.

    Args:
        text: such as `Pick-a-Pic v2, preference images`; empty or `none` for no dataset.
    """
    if text.strip().lower() in ("", "none"):
        return []
    letters = "".join(character for character in text.lower() if character.isalnum())
    known = [source for key, source in DATASETS.items() if key in letters]
    return known or [Source("preference dataset", text, "as stated in its name, if there")]


def base_source(family: str, hub: str = "") -> Source:
    """Returns what is known about a base model, by its name on the Hugging Face hub or else by its family."""
    known = BASES.get(family)
    if hub and (known is None or not known.page.endswith(f"/{hub}")):
        return Source("base model", hub, "see its page", f"{HUB}/{hub}")
    return known or Source("base model", family, UNKNOWN_LICENCE)


def sources(family: str, rewards: Mapping[str, float], data: str, hub: str = "") -> tuple[Source, ...]:
    """Returns the sources of a hypernetwork.

    Args:
        family: of the base model.
        rewards: weights by the names of `hyperalign.rewards.loading`, or others.
        data: description of the preference dataset, as for `dataset_sources`.
        hub: the base model's name on the Hugging Face hub, where it is known.
    """
    used = [reward_source(name, weight) for name, weight in rewards.items() if weight]
    return (base_source(family, hub), *used, *dataset_sources(data))
