"""FSDP2 for frozen backbones that do not fit on one GPU, enabled by Accelerate's configuration."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator, DistributedType
from torch import nn
from torch.distributed.fsdp import fully_shard

from hyperalign.errors import HyperAlignError


def uses_fsdp(accelerator: Accelerator) -> bool:
    """Returns whether Accelerate's configuration asks for FSDP2. Raises HyperAlignError for FSDP1."""
    if accelerator.distributed_type != DistributedType.FSDP:
        return False
    if not accelerator.is_fsdp2:
        raise HyperAlignError(
            "Accelerate's configuration asks for FSDP version 1; expected fsdp_version: 2. Use "
            "train/recipes/accelerate/fsdp2.yaml."
        )
    return True


def shard_backbone(backbone: nn.Module) -> None:
    """Shards the weights of a backbone over the processes, block by block.

    Each block gathers its weights when it runs and drops them afterwards. The hypernetwork is small and
    stays whole in every process.
    """
    stacks: list[Any] = [module for module in backbone.modules() if isinstance(module, nn.ModuleList)]
    outer = [stack for stack in stacks if not any(stack in list(other.modules())[1:] for other in stacks)]
    for stack in outer:
        for block in stack:
            fully_shard(block)
    fully_shard(backbone)
