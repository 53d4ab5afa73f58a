"""One generation's low-rank weights, folded once and added by the adapted layers in two products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ..delta import add_delta_, folded
from ..hypernetwork import HyperNetwork
from ..targets import Target
from .forward_slots import SLOTS, replace_forward, take_out_forward


@dataclass(frozen=True, slots=True)
class LowRank:
    """The weight changes of all targets: y gets (x down) up."""

    down: tuple[Tensor, ...]
    """(K A_aux)^T, (B, I, b), of each target."""
    up: tuple[Tensor, ...]
    """s B_aux^T, (b, O), of each target."""


def fold(network: HyperNetwork, cores_BMDA: Tensor, strength: float, dtype: torch.dtype) -> LowRank:
    """Returns the weights of a forward; layers of the same width are folded and cast together.

    They lie where the cores do; the host may keep the network itself elsewhere.
    """
    cores, targets, device = cores_BMDA.unbind(1), network.targets, cores_BMDA.device
    down: dict[int, Tensor] = {}
    up: dict[int, Tensor] = {}
    for group in _groups(targets, lambda target: target.in_features):
        a_aux_MAI = torch.stack([network.aux(i)[0] for i in group]).to(device, cores_BMDA.dtype)
        down_BMDI = folded(a_aux_MAI, torch.stack([cores[i] for i in group], dim=1)).to(dtype)
        down |= zip(group, down_BMDI.transpose(-1, -2).unbind(1), strict=True)
    for group in _groups(targets, lambda target: target.out_features):
        up_MOD = (strength * torch.stack([network.aux(i)[1] for i in group])).to(device, dtype)
        up |= zip(group, up_MOD.transpose(-1, -2).unbind(0), strict=True)
    order = range(len(targets))
    return LowRank(tuple(down[i] for i in order), tuple(up[i] for i in order))


def install(module: nn.Module) -> Callable[..., Any]:
    """Lets a layer add what `give` gives it; returns what `remove` needs.

    Every layer gets the same function and reads its own weights from itself, so that torch.compile
    sees one code for all blocks and new weights as new inputs, not as new code.
    """
    # Past nn.Module's own __setattr__, which looks through parameters and buffers at every call.
    module.__dict__["hyperalign"] = None
    if any(slot in module.__dict__ for slot in SLOTS):
        original = replace_forward(module, MethodType(_over_another, module))
        module.__dict__["hyperalign_original"] = original  # an offload hook's, or another patch
        return original
    return replace_forward(module, MethodType(_adapted_forward, module))


def give(module: nn.Module, weights: LowRank, index: int) -> None:
    """Gives an installed layer its weights."""
    module.__dict__["hyperalign"] = weights.down[index], weights.up[index]


def remove(module: nn.Module, original: Callable[..., Any]) -> None:
    """Leaves a layer as it was before `install`."""
    for ours in (_adapted_forward, _over_another):
        take_out_forward(module, MethodType(ours, module), original)
    module.__dict__.pop("hyperalign", None)
    module.__dict__.pop("hyperalign_original", None)


def _adapted_forward(self: Any, x_BNI: Tensor) -> Tensor:
    return _with_delta(type(self).forward(self, x_BNI), x_BNI, self.hyperalign)


def _over_another(self: Any, x_BNI: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return _with_delta(self.hyperalign_original(x_BNI, *args, **kwargs), x_BNI, self.hyperalign)


def _with_delta(y_BNO: Tensor, x_BNI: Tensor, weights: tuple[Tensor, Tensor] | None) -> Tensor:
    if weights is not None:
        add_delta_(y_BNO, x_BNI, *weights)
    return y_BNO


def _groups(targets: Sequence[Target], width: Callable[[Target], int]) -> list[list[int]]:
    by_width: dict[int, list[int]] = {}
    for index, target in enumerate(targets):
        by_width.setdefault(width(target), []).append(index)
    return list(by_width.values())
