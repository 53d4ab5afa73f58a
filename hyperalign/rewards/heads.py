"""What the aesthetic predictors share: a linear head on an image's unit embedding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from .images import Preparation, check_images, network_pixels
from .networks import at_least_float32, own_precision
from .text import check_prompts

SIZES = (1024, 128, 64, 16, 1)


class ScoreHead(nn.Module):
    """Linear layers without activations, down to one number.

    It always computes in float32 or better: a bfloat16 score of 5.43 would read 5.44.

    Args:
        width: of the embedding.
        places: the five layers' indices in the published files, which count dropout too.
    """

    def __init__(self, width: int, places: tuple[int, ...] = (0, 2, 4, 6, 7)) -> None:
        super().__init__()
        sizes = zip(places, (width, *SIZES[:-1]), SIZES, strict=True)
        self.layers = nn.ModuleDict(
            {str(place): nn.Linear(size_in, size_out) for place, size_in, size_out in sizes}
        )

    def forward(self, x_BD: Tensor) -> Tensor:
        """Returns scores (B,)."""
        x_BD = at_least_float32(x_BD)
        for layer in self.layers.values():
            x_BD = layer(x_BD)
        return x_BD.squeeze(-1)


class HeadNetwork(nn.Module):
    """An image encoder with a head."""

    head: ScoreHead

    def embed_images(self, pixels_BCHW: Tensor) -> Tensor:
        """Returns unit embeddings (B, D)."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class HeadReward:
    """The head's score of an image; the prompt does not matter."""

    name: str
    module: HeadNetwork
    prepare: Preparation

    def score(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Returns one score (B,) per image, as `Reward.score`."""
        check_images(images_BCHW)
        check_prompts(prompts, images_BCHW.shape[0])
        with own_precision(self.module):
            return self.module.head(self._embed(images_BCHW))

    def embed_images(self, images_BCHW: Tensor) -> Tensor:
        """Returns unit embeddings (B, D), as `Reward.embed_images`."""
        check_images(images_BCHW)
        with own_precision(self.module):
            return self._embed(images_BCHW)

    def _embed(self, images_BCHW: Tensor) -> Tensor:
        return self.module.embed_images(network_pixels(images_BCHW, self.module, self.prepare))
