"""Replaces the forward of adapted modules for the length of one call. No host inside."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ..errors import HyperAlignError
from ..factors import forward_delta
from ..hypernetwork import HyperNetwork
from ..targets import Place

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
        self._deltas.cores_BMDA = cores_BMDA

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
            made = (
                module,
                previous,
                _new_hook(self._deltas, index, module.forward, self._places[index].first_row),
            )
            self._made[index] = made
        return made[2]


class _Deltas:
    """What hooks read. They must not refer to TargetHooks: the cycle would keep a base model in memory."""

    def __init__(self, network: HyperNetwork, strength: float) -> None:
        self.network = network
        self.strength = strength
        self.cores_BMDA: Tensor | None = None
        self.called: set[int] = set()
        self._aux: dict[tuple[int, torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def drop(self) -> None:
        """Forgets a run."""
        self.cores_BMDA = None
        self.called.clear()
        self._aux.clear()

    def delta(self, index: int, x_BNI: Tensor) -> Tensor:
        """Returns the scaled weight change of one target at work, (B, N, O). Raises HyperAlignError."""
        if self.cores_BMDA is None:
            raise HyperAlignError(
                "An adapted layer ran before its weights were written; another patch reorders the model. "
                "Remove that patch."
            )
        core_BDA = self.cores_BMDA[:, index].to(x_BNI)
        tiles, rest = divmod(x_BNI.shape[0], core_BDA.shape[0])
        if rest:
            raise HyperAlignError(
                f"A model patch changed the batch of an attention layer to {x_BNI.shape[0]} rows; expected "
                f"a multiple of {core_BDA.shape[0]}. Remove that patch or HyperAlign from the model."
            )
        a_aux, b_aux = self._cast_aux(index, x_BNI)
        # A patch that tiles attention turns one row into several neighbours.
        core_BDA = core_BDA.repeat_interleave(tiles, dim=0)
        return self.strength * forward_delta(x_BNI, a_aux, b_aux, core_BDA)

    def _cast_aux(self, index: int, x_BNI: Tensor) -> tuple[Tensor, Tensor]:
        key = (index, x_BNI.device, x_BNI.dtype)
        if key not in self._aux:
            a_aux, b_aux = self.network.aux(index)
            self._aux[key] = (a_aux.to(x_BNI), b_aux.to(x_BNI))
        return self._aux[key]


def _new_hook(deltas: _Deltas, index: int, original: Forward, first_row: int | None) -> Forward:
    def forward(x_BNI: Tensor, *args: object, **kwargs: object) -> Tensor:
        deltas.called.add(index)
        y_BNO, delta_BNO = original(x_BNI, *args, **kwargs), deltas.delta(index, x_BNI)
        if first_row is None:
            return y_BNO + delta_BNO
        y_BNO[..., first_row : first_row + delta_BNO.shape[-1]] += delta_BNO
        return y_BNO

    return cast(Forward, torch.compiler.disable(forward))


def restore_forward(module: nn.Module, previous: Forward | None) -> None:
    """Puts back what `module.__dict__` held as `forward`; None where it held nothing."""
    if previous is None:
        module.__dict__.pop("forward", None)
    else:
        module.forward = previous
