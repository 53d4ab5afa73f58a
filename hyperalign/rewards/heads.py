"""What the aesthetic predictors share: a linear head on an image's unit embedding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from .network_reward import NetworkReward
from .networks import at_least_float32

SIZES = (1024, 128, 64, 16, 1)


class ScoreHead(nn.Module):
    """Linear layers without activations, down to one number.

    It always computes in float32 or better: in bfloat16 a score of 5.43 would become 5.44.

    Args:
        width: of the embedding.
        indices: of the five layers in the published files, which count dropout too.
    """

    def __init__(self, width: int, indices: tuple[int, ...] = (0, 2, 4, 6, 7)) -> None:
        super().__init__()
        sizes = zip(indices, (width, *SIZES[:-1]), SIZES, strict=True)
        self.layers = nn.ModuleDict(
            {str(index): nn.Linear(size_in, size_out) for index, size_in, size_out in sizes}
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
class HeadReward(NetworkReward[HeadNetwork]):
    """The head's score of an image, which does not depend on the prompt."""

    def _score(self, pixels_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.module.head(self._embed(pixels_BCHW))

    def _embed(self, pixels_BCHW: Tensor) -> Tensor:
        return self.module.embed_images(pixels_BCHW)
