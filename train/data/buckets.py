"""Aspect-ratio buckets: the sizes to which images of other shapes than a square are encoded.

For 1,024 pixels they are those of SDXL (Podell et al. 2023, arXiv 2307.01952, appendix I) up to 1:2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Bucket = tuple[int, int]
"""Height and width in pixels."""

STEP = 64
"""Sides are multiples of this: U-Nets halve the eight times smaller latents three times."""
MAX_RATIO = 2
"""Of the longer side to the shorter one; SDXL's own list goes on to 4."""
LEAST_AREA = 0.9
"""Of the square's pixels. No bucket has more pixels than the square, so it takes no more memory."""


def buckets_of(resolution: int, step: int = STEP) -> list[Bucket]:
    """Returns the buckets for a resolution, the square among them."""
    sides, square = range(step, MAX_RATIO * resolution + 1, step), resolution**2
    return [
        (height, width)
        for height in sides
        for width in sides
        if LEAST_AREA * square <= height * width <= square
        and max(height, width) <= MAX_RATIO * min(height, width)
    ]


def nearest_bucket(height: int, width: int, buckets: Sequence[Bucket]) -> Bucket:
    """Returns the bucket of the nearest ratio, by the ratio of both ratios."""
    ratio = math.log(width / height)
    return min(buckets, key=lambda bucket: abs(math.log(bucket[1] / bucket[0]) - ratio))


def enlargement(height: int, width: int, bucket: Bucket) -> float:
    """Returns the factor by which an image is resized to cover a bucket; above 1 it is enlarged."""
    return max(bucket[0] / height, bucket[1] / width)
