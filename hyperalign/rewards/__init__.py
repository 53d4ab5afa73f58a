"""Reward models, which score how well images fit their prompts; one file per reward.

`loading.load` reads one from its weights, `loading.random_weights` makes one without.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor, nn


class Reward(Protocol):
    """The interface of rewards for training, evaluation and nodes.

    Images are (B, 1, 3 or 4, H, W) of any size with values in [0, 1]; one channel is grey, a fourth
    is alpha, composited on white. Both methods are differentiable to the pixels, also where a value is
    outside [0, 1], unless `torch.no_grad()` is active. Parameters are frozen.
    """

    @property
    def name(self) -> str:
        """A short name for tables and logs."""
        ...

    @property
    def module(self) -> nn.Module:
        """The network, so that a host can move it between devices; images follow it."""
        ...

    def score(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Returns one score (B,) per image in float32; greater is better.

        A float64 network scores in float64.

        Raises:
            HyperAlignError: images of another form or with NaN, numbers of images and prompts differ,
                or a prompt cannot be tokenized.
        """
        ...

    def score_finite(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Returns `score` of images that are known to be finite, without waiting for a GPU to tell."""
        ...

    def embed_images(self, images_BCHW: Tensor) -> Tensor:
        """Returns unit embeddings (B, D), for metrics such as diversity. Raises as `score`."""
        ...
