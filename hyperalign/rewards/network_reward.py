"""What every reward of one network does: check, preprocess, compute in the precision of its weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor, nn

from .images import Preprocess, check_form, check_images, network_pixels
from .networks import without_autocast
from .text import check_prompts

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True, slots=True)
class NetworkReward(ABC, Generic[Network]):
    """A `Reward` whose network scores preprocessed pixels."""

    name: str
    module: Network
    preprocess: Preprocess

    def score(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Returns one score (B,) per image, as `Reward.score`."""
        check_images(images_BCHW)
        return self.score_finite(images_BCHW, prompts)

    def score_finite(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Returns one score (B,) per image, as `Reward.score_finite`."""
        check_form(images_BCHW)
        check_prompts(prompts, images_BCHW.shape[0])
        with without_autocast(self.module):
            return self._score(network_pixels(images_BCHW, self.module, self.preprocess), prompts)

    def embed_images(self, images_BCHW: Tensor) -> Tensor:
        """Returns unit embeddings (B, D), as `Reward.embed_images`."""
        check_images(images_BCHW)
        with without_autocast(self.module):
            return self._embed(network_pixels(images_BCHW, self.module, self.preprocess))

    @abstractmethod
    def _score(self, pixels_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Returns one score (B,) per preprocessed image."""

    @abstractmethod
    def _embed(self, pixels_BCHW: Tensor) -> Tensor:
        """Returns unit embeddings (B, D) of preprocessed images."""
