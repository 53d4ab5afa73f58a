"""Trains with whole copies of a backbone and with one spread over the processes: work for `in_processes`."""

from __future__ import annotations

from pathlib import Path

from accelerate import Accelerator
from smoke_recipes import RECIPES, cut_down

import train.inputs
from train.inputs import smoke_inputs
from train.models.architectures import descending_sizes
from train.trainer import Trainer


def copies_and_shards(folder: Path, recipes: tuple[str, ...]) -> None:
    """Writes a run of either kind for each recipe, and the share of the backbone in this process."""
    accelerator = Accelerator()
    accelerator.end_training = lambda: None  # or the first run would end the processes' group
    for recipe in recipes:
        for kind in ("copies", "shards"):
            out = folder / recipe / kind
            config = cut_down(RECIPES / recipe, out)
            # Accelerate itself speaks of FSDP on GPUs alone; the sharding works on CPUs too.
            train.inputs.uses_fsdp = lambda _, kind=kind: kind == "shards"
            shape = list(descending_sizes(config.model.base))[-1]
            inputs = smoke_inputs(config, accelerator, shape)
            weights = list(inputs.base.backbone.parameters())
            own = sum((p.to_local() if kind == "shards" else p).numel() for p in weights)
            Trainer(config, inputs, accelerator).fit()
            if accelerator.is_main_process:
                (out / "own").write_text(str(own / sum(p.numel() for p in weights)))
