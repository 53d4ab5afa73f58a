"""The order of encoded images in training: shuffled epochs, and batches of one bucket alone."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]


class ImageOrder:
    """The endless stream of images, decided by the seed and by how many images each shard has in each bucket.

    Images are numbered by shard, within it by bucket. Every image comes once an epoch, as far as batches of
    one bucket allow: what is left of a bucket at the end of an epoch begins its next batch.
    """

    def __init__(self, counts_SK: Numbers, window: int) -> None:
        """`counts_SK` are the images of each shard in each bucket; `window` shards are mixed."""
        shards, buckets = counts_SK.shape
        self.counts_SK = counts_SK
        self.sizes_K: Numbers = counts_SK.sum(axis=0)
        """Images of each bucket."""
        self.total = int(counts_SK.sum())
        self.window = window
        self._bucket_N = np.repeat(np.tile(np.arange(buckets), shards), counts_SK.reshape(-1))
        self._in_buckets = lru_cache(maxsize=4)(self._by_bucket)
        self._in_batches = lru_cache(maxsize=4)(self._batches)

    def epoch(self, seed: int, epoch: int) -> Numbers:
        """Returns the numbers of all images, shuffled so that any stretch of them touches few shards.

        The shards are permuted; an image of the k-th is sorted by k plus a uniform share of the window.
        """
        rng = np.random.default_rng((seed, epoch))
        places = np.repeat(rng.permutation(len(self.counts_SK)), self.counts_SK.sum(axis=1))
        return np.argsort(places + self.window * rng.random(self.total), kind="stable")

    def batch(self, position: int, count: int, seed: int) -> list[int]:
        """Returns the numbers of `count` images of one bucket.

        Args:
            position: how many images were read before.
            count: of the whole batch of all processes.
            seed: of the run.
        """
        if len(self.sizes_K) == 1:
            return self._stretch(0, position, count, seed)
        bucket, number = self._batch_at(position // count, count, seed)
        return self._stretch(bucket, number * count, count, seed)

    def _stretch(self, bucket: int, position: int, count: int, seed: int) -> list[int]:
        """Returns positions [position, position + count) of one bucket's own stream, epoch after epoch."""
        found: list[int] = []
        while len(found) < count:
            epoch, start = divmod(position + len(found), int(self.sizes_K[bucket]))
            found += self._in_buckets(seed, epoch)[bucket][start : start + count - len(found)].tolist()
        return found

    def _by_bucket(self, seed: int, epoch: int) -> list[Numbers]:
        order = self.epoch(seed, epoch)
        buckets = self._bucket_N[order]
        return [order[buckets == bucket] for bucket in range(len(self.sizes_K))]

    def _batch_at(self, index: int, count: int, seed: int) -> tuple[int, int]:
        """Returns the bucket of a batch and its number among that bucket's batches."""
        epoch = index * count // self.total  # the batch is in this epoch, or rounding puts it later
        while self._ended(epoch, count).sum() <= index:
            epoch += 1
        bucket, number = self._in_batches(seed, epoch, count)[
            index - int(self._ended(epoch - 1, count).sum())
        ]
        return int(bucket), int(number)

    def _ended(self, epoch: int, count: int) -> Numbers:
        """Returns how many batches of each bucket have ended when an epoch ends."""
        return (epoch + 1) * self.sizes_K // count

    def _batches(self, seed: int, epoch: int, count: int) -> Numbers:
        """Returns bucket and number of each batch of an epoch; a bucket's are spread over it, in order."""
        before = self._ended(epoch - 1, count)
        each = self._ended(epoch, count) - before
        buckets = np.repeat(np.arange(len(each)), each)
        ranks = np.arange(len(buckets)) - np.repeat(np.cumsum(each) - each, each)
        shares = np.random.default_rng((seed, epoch, count)).random(len(buckets))
        order = np.argsort((ranks + shares) / each[buckets], kind="stable")
        return np.stack([buckets, before[buckets] + ranks], axis=1)[order]
