"""Values of units in fixed batches, shared out over processes, so that their number changes no value."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from hyperalign.errors import HyperAlignError
from hyperalign.files import first_line
from hyperalign.image_files import BadImage, decode
from hyperalign.threads import Threads
from train.config import RunConfig
from train.evaluation.cache import Cache
from train.evaluation.image_sets import Metadata
from train.evaluation.scorers import Scorer
from train.models.kernels import attention_kernels


@dataclass(frozen=True, slots=True)
class Unit:
    """What gets one value: an image, or all images of a prompt."""

    images: tuple[Path, ...]
    metadata: Metadata


@dataclass(frozen=True, slots=True)
class Work:
    """How values are computed, which decides none of them but for rounding."""

    accelerator: Accelerator
    cache: Path
    batch: int
    """Images of a batch."""
    threads: int
    """How many decode."""


def values_of(scorer: Scorer, units: Sequence[Unit], digests: Mapping[Path, str], work: Work) -> list[float]:
    """Returns the value of every unit; those on disk are not computed again.

    Equal images with equal metadata are one unit. Batches are cut from the list of distinct units, whatever
    the number of processes, and computed whole: neither it nor an interruption changes a value's rounding.

    Raises HyperAlignError, in all processes, if one of them cannot go on.
    """
    keys = [_key(scorer, unit, digests) for unit in units]
    distinct = list(dict(zip(keys, units, strict=True)).items())
    size = max(1, work.batch // max(len(unit.images) for unit in units))
    batches = [dict(distinct[start : start + size]) for start in range(0, len(distinct), size)]
    accelerator = work.accelerator
    name = f"{re.sub(r'[^A-Za-z0-9.]+', '-', scorer.name)}-{scorer.identity}"
    with Cache(work.cache, name, accelerator.process_index) as cache:
        accelerator.wait_for_everyone()  # all see the same values on disk before one adds to them
        todo = [batch for batch in batches if not cache.values.keys() >= batch.keys()]
        own = todo[accelerator.process_index :: accelerator.num_processes]
        failure: list[str] = []
        try:
            _compute(scorer, own, cache, work)
        except HyperAlignError as error:
            failure.append(str(error))
        if failures := gather_object(failure):
            raise HyperAlignError(failures[0])
        found = dict(gather_object([(key, cache.values[key]) for batch in own for key in batch]))
        values = cache.values | found
        return [values[key] for key in keys]


def _compute(scorer: Scorer, batches: Sequence[dict[str, Unit]], cache: Cache, work: Work) -> None:
    """Computes batches and writes their values to the cache. Raises HyperAlignError."""
    if not batches:
        return
    device, quiet = work.accelerator.device, not work.accelerator.is_main_process
    units = [unit for batch in batches for unit in batch.values()]
    count = sum(len(unit.images) for unit in units)
    bar: tqdm[Any] = tqdm(total=count, desc=scorer.name, unit="image", disable=quiet)
    with _memory_errors(scorer, work), _float32(device), Threads(work.threads) as decoders, bar:
        score = scorer.load(device)
        paths = chain.from_iterable(unit.images for unit in units)
        decoded = decoders.in_order(_decode, paths, ahead=work.batch + work.threads)
        pixels = (_checked(*one) for one in decoded)
        for batch in batches:
            images = [list(islice(pixels, len(unit.images))) for unit in batch.values()]
            with torch.no_grad():
                values = score(images, [unit.metadata for unit in batch.values()])
            _check_finite(scorer, list(batch.values()), values)
            cache.append(dict(zip(batch, values, strict=True)))
            bar.update(sum(map(len, images)))


@contextlib.contextmanager
def _float32(device: torch.device) -> Iterator[None]:
    """Computes float32 in float32: cuDNN would take TF32's ten bits by default."""
    kernels = attention_kernels(RunConfig().attention_kernels, device)
    flags = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    with flags, kernels:
        yield


@contextlib.contextmanager
def _memory_errors(scorer: Scorer, work: Work) -> Iterator[None]:
    """Makes a sentence of a GPU that is too small."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        fix = f"Lower --batch from {work.batch} to {work.batch // 2}"
        if work.batch == 1:
            fix = "--batch is 1 already: end other programs on the GPU, or add --cpu"
        raise HyperAlignError(
            f"The GPU's memory is too small for {scorer.name} ({first_line(error)}). {fix}, and run the same "
            "command again: it resumes from the values so far."
        ) from error


def _decode(path: Path) -> Tensor | BadImage:
    return decode(path.parent, path.name)


def _checked(path: Path, image: Tensor | BadImage) -> Tensor:
    if isinstance(image, BadImage):
        raise HyperAlignError(
            f"{path} was readable when the evaluation began; now {image.reason}. Let nothing write to it, "
            "and run the same command again."
        )
    return image


def _check_finite(scorer: Scorer, units: Sequence[Unit], values: Sequence[float]) -> None:
    for unit, value in zip(units, values, strict=True):
        if not isfinite(value):
            raise HyperAlignError(
                f"{scorer.name} gave {value} to {unit.images[0]}; expected a number. Its weights may be "
                "damaged: get them again."
            )


def _key(scorer: Scorer, unit: Unit, digests: Mapping[Path, str]) -> str:
    """Returns what decides a value: the images' contents, and what the scorer reads beside them."""
    parts = [[digests[path] for path in unit.images], scorer.reads(unit.metadata)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
