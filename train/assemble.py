"""Puts a run's materials together."""

from __future__ import annotations

import logging

from accelerate import Accelerator

from train.config import TrainConfig
from train.materials import Materials

logger = logging.getLogger("hyperalign.train")


def materials(config: TrainConfig, accelerator: Accelerator, smoke: bool = False) -> Materials:
    """Returns what a recipe's run works with. Raises HyperAlignError for whatever is missing.

    `smoke` takes random weights of the true shape instead of the base model, rewards and data.
    """
    if config.model.base == "tiny":
        from train.tiny.inputs import tiny_materials

        with accelerator.main_process_first():
            return tiny_materials(config, accelerator.device, accelerator.is_main_process)
    if smoke:
        from train.preflight.smoke import described, smoke_shape, smoke_world

        shape = smoke_shape(config, accelerator.device)
        logger.warning("smoke run: %s", described(config, shape))
        return smoke_world(config, accelerator, shape)
    from train.inputs import world

    return world(config, accelerator)
