"""What shaped a hypernetwork: rewards and preference dataset, with their licences and known biases.

The facts stand here once; a file's header, its model card and the loader's text repeat them.
Audits that the sentences on biases rest on: arXiv 2604.13305 (CLIP, HPS, ImageReward and PickScore),
2601.09896 (LAION aesthetic), 2512.11883 (images that are ugly on purpose).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

Kind = Literal["reward", "preference dataset", "base model"]
KINDS: tuple[Kind, ...] = ("reward", "preference dataset", "base model")
UNKNOWN_LICENCE = "unknown; ask whoever trained it"
HUB = "https://huggingface.co"


@dataclass(frozen=True, slots=True)
class Source:
    """One thing that shaped a hypernetwork."""

    kind: Kind
    name: str
    """Published name and version."""
    licence: str
    page: str = ""
    """Where it comes from; empty if it is the user's own."""
    biases: str = ""
    """What is known about its preferences, in a sentence."""
    weight: float | None = None
    """Of a reward in the weighted sum; None for data and base models."""

    def __post_init__(self) -> None:
        """Checks what a file's header may say. Raises ValueError."""
        if self.kind not in KINDS:
            raise ValueError(f"a source is {self.kind!r}, expected one of {', '.join(KINDS)}")
        texts = (self.name, self.licence, self.page, self.biases)
        if not all(isinstance(cast(Any, text), str) for text in texts) or not self.name.strip():
            raise ValueError(f"a source is {texts!r}, expected a name and three texts")
        if self.weight is not None and not math.isfinite(self.weight):
            raise ValueError(f"the weight of {self.name} is {self.weight}, expected a number")

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

REWARDS = {
    "hpsv2.1": Source(
        "reward", "HPSv2.1", "Apache-2.0", "https://huggingface.co/xswu/HPSv2", HPS,
    ),
    "hpsv2": Source(
        "reward", "HPSv2", "Apache-2.0", "https://huggingface.co/xswu/HPSv2", HPS,
    ),
    "pickscore": Source(
        "reward", "PickScore v1", "MIT (code; the model card names no other)",
        "https://huggingface.co/yuvalkirstain/PickScore_v1",
        f"learned from the choices of a web app's self-selected users, unsafe prompts among them; {PEOPLE}",
    ),
    "imagereward": Source(
        "reward", "ImageReward v1.0", "Apache-2.0", "https://huggingface.co/THUDM/ImageReward",
        f"learned from annotators' ratings of images for DiffusionDB prompts; {PEOPLE}",
    ),
    "clip": Source(
        "reward", "CLIP score (ViT-L/14)", "MIT", "https://huggingface.co/openai/clip-vit-large-patch14",
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
        "reads no prompt; its training data is not published and nobody has audited it: expect an "
        "illustrator's and photographer's taste",
    ),
    "tiny reward": Source(
        "reward", "tiny preference reward", "Apache-2.0", "",
        "prefers Fluent emoji to Noto emoji by design, and knows 84 words",
    ),
    "tiny validation reward": Source(
        "reward", "tiny validation reward", "Apache-2.0", "",
        "prefers Fluent emoji to Noto emoji by design, and knows 84 words",
    ),
}  # fmt: skip
"""The rewards of `hyperalign.rewards.loading`, by the names they have there."""

DATA_SETS = {
    "pickapicv2": Source(
        "preference dataset", "Pick-a-Pic v2", "none named on its card; the images were made by its users",
        "https://huggingface.co/datasets/yuvalkirstain/pickapic_v2",
        "English prompts and choices of a web app's self-selected users; unsafe images are in it and no "
        "column marks them",
    ),
    "hpdv2": Source(
        "preference dataset", "HPDv2", "Apache-2.0", "https://huggingface.co/datasets/ymhao/HPDv2",
        "paid annotators' choices; prompts of DiffusionDB users, rewritten by ChatGPT, and of COCO; images "
        "of 2022's generators; no column marks unsafe ones",
    ),
    "emojiscenes": Source(
        "preference dataset", "EmojiScenes", "Apache-2.0 (Noto Emoji), MIT (Fluent Emoji)", "",
        "drawn by rule: Fluent style is preferred; no people but emoji faces",
    ),
}  # fmt: skip
"""Known preference dataset, by what the letters and digits of its description contain."""

BASES = {
    "tiny": Source("base model", "embedded tiny model", "Apache-2.0", "", "draws emoji only"),
    "sd15": Source(
        "base model", "Stable Diffusion 1.5", "CreativeML Open RAIL-M",
        "https://huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5",
        "learned from LAION's web images with English captions, chosen by LAION aesthetic",
    ),
    "sdxl": Source(
        "base model", "SDXL 1.0", "CreativeML Open RAIL++-M",
        "https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0",
        "its training data is not published; its card names social biases",
    ),
    "flux": Source(
        "base model", "FLUX.1 [dev]", "FLUX.1 [dev] Non-Commercial License",
        "https://huggingface.co/black-forest-labs/FLUX.1-dev",
        "its training data is not published; its card names social biases",
    ),
    "sd3": Source(
        "base model", "Stable Diffusion 3.5 medium", "Stability AI Community License",
        "https://huggingface.co/stabilityai/stable-diffusion-3.5-medium",
        "its training data is not published; its card names social biases",
    ),
}  # fmt: skip
"""Base models by their family."""


def reward_source(name: str, weight: float) -> Source:
    """Returns what is known about a reward; one that is not known is its user's own."""
    known = REWARDS.get(name)
    if known is None:
        return Source("reward", name, UNKNOWN_LICENCE, weight=weight)
    return Source("reward", known.name, known.licence, known.page, known.biases, weight)


def data_source(text: str) -> list[Source]:
    """Returns the known data sets that a description names, else the description as the user's own data.

    Args:
        text: such as `Pick-a-Pic v2, preference images`; empty or `none` for no data.
    """
    if text.strip().lower() in ("", "none"):
        return []
    letters = "".join(character for character in text.lower() if character.isalnum())
    known = [source for key, source in DATA_SETS.items() if key in letters]
    return known or [Source("preference dataset", text, "as its user says in its name, if there")]


def base_source(family: str, hub: str = "") -> Source:
    """Returns what is known about a base model: of that name on the Hugging Face hub, else of its family."""
    known = BASES.get(family)
    if hub and (known is None or not known.page.endswith(f"/{hub}")):
        return Source("base model", hub, "see its page", f"{HUB}/{hub}")
    return known or Source("base model", family, UNKNOWN_LICENCE)


def sources(family: str, rewards: Mapping[str, float], data: str, hub: str = "") -> tuple[Source, ...]:
    """Returns everything that shapes a hypernetwork.

    Args:
        family: of the base model.
        rewards: weights by the names of `hyperalign.rewards.loading`, or others.
        data: the preference dataset in words, as `data_source` takes it.
        hub: the base model's name on the Hugging Face hub, where it is known.
    """
    judged = [reward_source(name, weight) for name, weight in rewards.items() if weight]
    return (base_source(family, hub), *judged, *data_source(data))


def remembered(family: str, training: Mapping[str, Any]) -> tuple[Source, ...]:
    """Returns the sources of a file whose header names them in words only, as older ones do."""
    text = str(training.get("reward", ""))
    terms = [term.strip() for term in text.split(" + ") if term.strip()]
    rewards: dict[str, float] = {}
    for term in terms:
        weight, times, name = term.partition(" x ")
        number = _number(weight) if times else None
        rewards[_key(name if number is not None else term)] = 1.0 if number is None else number
    if not training:
        return ()
    return sources(family, rewards, str(training.get("preference_data", "")))


def _key(name: str) -> str:
    """Returns a reward's short name, also where its published name was followed by a remark."""
    return next((key for key, known in REWARDS.items() if name == key or name.startswith(known.name)), name)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
