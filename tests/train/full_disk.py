"""Writes to a disk that is full after the first file, and prints the error: work for `in_processes`."""

from __future__ import annotations

import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from hyperalign.errors import HyperAlignError
from train.checkpoints import TrainingCheckpoints
from train.data.embeddings import EmbeddingCache


def checkpoints(folder: Path) -> None:
    saved = TrainingCheckpoints(folder, keep=2)
    saved.save({"step": 1, "x": torch.zeros(10)}, 1)
    _on_a_full_disk(lambda: saved.save({"step": 2, "x": torch.zeros(100_000)}, 2))


def embeddings(folder: Path) -> None:
    cache = EmbeddingCache(folder)
    cache.add(["a"], {"prompt_embeds": torch.zeros(1, 8, 4)})
    _on_a_full_disk(lambda: cache.add(["b"], {"prompt_embeds": torch.zeros(1, 80_000, 4)}))


def _on_a_full_disk(write: Callable[[], object]) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        write()
    except HyperAlignError as error:
        sys.stdout.write(str(error))
