"""Replaces the forward of adapted modules for the length of one call. No host inside."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ..delta import add_delta_
from ..errors import HyperAlignError
from ..hypernetwork import HyperNetwork
from ..targets import Place
from .lowrank import LowRank, fold

Forward = Callable[..., Tensor]


class TargetHooks:
    """The adapted forwards of one hypernetwork's targets.

    Hooks are made once per module and kept: torch.compile guards on their identity, and new ones
    would recompile at every call. They run outside the compiled graph.
    """

    def __init__(self, network: HyperNetwork, strength: float, places: Sequence[Place]) -> None:
        self._deltas = _Deltas(network, strength)
        self._places = tuple(places)
        self._made: dict[int, tuple[nn.Module, Forward | None, Forward]] = {}

    @property
    def called(self) -> set[int]:
        """The targets that ran since `new_run`, by index."""
        return self._deltas.called

    def set_cores(self, cores_BMDA: Tensor) -> None:
        """Gives the call its weights: before the first adapted module runs, at the latest mid-forward."""
        self._deltas.take(cores_BMDA)

    def new_run(self) -> None:
        """Forgets what was called and drops every tensor of the last run."""
        self._deltas.drop()

    @contextlib.contextmanager
    def installed(self, model: nn.Module) -> Iterator[None]:
        """Replaces `forward` of every target's module; restores all of them, whatever happens."""
        replaced: list[tuple[nn.Module, Forward | None]] = []
        try:
            for index, place in enumerate(self._places):
                module = model.get_submodule(place.path)
                previous: Forward | None = module.__dict__.get("forward")
                replaced.append((module, previous))
                module.forward = self._hook(index, module, previous)
            yield
        finally:
            for module, previous in reversed(replaced):
                restore_forward(module, previous)
            self._deltas.cores_BMDA = None

    def _hook(self, index: int, module: nn.Module, previous: Forward | None) -> Forward:
        made = self._made.get(index)
        if made is None or made[0] is not module or made[1] is not previous:
            rows = self._deltas.network.targets[index].out_features, self._places[index].first_row
            made = (module, previous, _new_hook(self._deltas, index, module.forward, *rows))
            self._made[index] = made
        return made[2]


class _Deltas:
    """What hooks read. They must not refer to TargetHooks: the cycle would keep a base model in memory."""

    def __init__(self, network: HyperNetwork, strength: float) -> None:
        self.network = network
        self.strength = strength
        self.cores_BMDA: Tensor | None = None
        self.called: set[int] = set()
        self._folded: tuple[Tensor, dict[torch.dtype, LowRank]] | None = None

    def drop(self) -> None:
        """Forgets a run."""
        self.cores_BMDA = self._folded = None
        self.called.clear()

    def take(self, cores_BMDA: Tensor) -> None:
        """Takes a call's weights; the same tensor again, as in I and P, is not folded again."""
        self.cores_BMDA = cores_BMDA
        if self._folded is None or self._folded[0] is not cores_BMDA:
            self._folded = (cores_BMDA, {})

    def add_(self, y_BNO: Tensor, index: int, x_BNI: Tensor) -> None:
        """Adds the weight change of the target at work to y in place. Raises HyperAlignError."""
        down_BID, up_DO = self._weights(index, x_BNI.dtype)
        tiles, rest = divmod(x_BNI.shape[0], down_BID.shape[0])
        if rest:
            raise HyperAlignError(
                f"A model patch changed the batch of an attention layer to {x_BNI.shape[0]} rows; expected "
                f"a multiple of {down_BID.shape[0]}. Remove that patch or HyperAlign from the model."
            )
        if tiles > 1:  # a patch that tiles attention turns one row into several neighbours
            down_BID = down_BID.repeat_interleave(tiles, dim=0)
        add_delta_(y_BNO, x_BNI, down_BID, up_DO)

    def _weights(self, index: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if self.cores_BMDA is None or self._folded is None:
            raise HyperAlignError(
                "An adapted layer ran before its weights were generated; another patch reorders the model. "
                "Remove that patch."
            )
        made = self._folded[1]
        if dtype not in made:
            # Guidance takes gradients through the layers, which no tensor of an inference mode lets pass.
            with torch.inference_mode(False), torch.no_grad():
                made[dtype] = fold(self.network, self.cores_BMDA, self.strength, dtype)
        return made[dtype].down[index], made[dtype].up[index]


def _new_hook(
    deltas: _Deltas, index: int, original: Forward, out_features: int, first_row: int | None
) -> Forward:
    def forward(x_BNI: Tensor, *args: object, **kwargs: object) -> Tensor:
        deltas.called.add(index)
        y_BNO = original(x_BNI, *args, **kwargs)
        rows_BNO = y_BNO if first_row is None else y_BNO[..., first_row : first_row + out_features]
        deltas.add_(rows_BNO, index, x_BNI)
        return y_BNO

    return cast(Forward, torch.compiler.disable(forward))


def restore_forward(module: nn.Module, previous: Forward | None) -> None:
    """Puts back what `module.__dict__` held as `forward`; None where it held nothing."""
    if previous is None:
        module.__dict__.pop("forward", None)
    else:
        module.forward = previous
