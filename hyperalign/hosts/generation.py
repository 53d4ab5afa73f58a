"""From what was perceived to cores, and from these to the weights of adapted layers. No host inside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..hypernetwork import HyperNetwork
from ..perception import Perceived, pool_text
from ..prepared import PreparedHyperNetwork
from ..strength import scaled
from .capture import Captured
from .folding import Folded
from .layers import AdaptedLayers, LayerWeights
from .weights import Place, Weights


class Generator:
    """Generates the weights of one hypernetwork's layers, run after run."""

    def __init__(
        self, network: HyperNetwork, layers: AdaptedLayers, weights: Weights, capture: bool = False
    ) -> None:
        """Generates nothing yet.

        Args:
            network: the hypernetwork.
            layers: the adapted layers.
            weights: makes the layers' weights of cores.
            capture: replay the generations of variant S as a CUDA graph, where that is possible.
        """
        self._network, self._layers, self._weights = network, layers, weights
        self._captured = Captured() if capture else None
        self._prepared: dict[torch.device, PreparedHyperNetwork] = {}
        self._network_state: tuple[tuple[int, int], ...] | None = None
        """Of the declared run; None outside of one."""

    def begin_run(self) -> None:
        """Forgets the last run's weights. The hypernetwork must stay as it is until the next run."""
        self._weights.begin_run()
        state = tuple((tensor.data_ptr(), _version(tensor)) for tensor in self._network.state_dict().values())
        if state != self._network_state:  # else what was made of it is still right
            self._drop_graphs()
            self._prepared.clear()
            self._layers.folding.begin_run()
        self._network_state = state

    def forget_weights(self) -> None:
        """Forgets weights that were made for other modules; cores stay."""
        self._weights.begin_run()

    def end_run(self) -> None:
        """Frees all memory."""
        self._network_state = None
        self._weights.end_run()
        self._drop_graphs()
        self._prepared.clear()
        self._layers.folding.end_run()

    def _drop_graphs(self) -> None:
        if self._captured is not None:
            self._captured.clear()

    def generate(
        self,
        features: Sequence[Tensor],
        text_BLC: Tensor,
        strength: float,
        place: Place,
        strengths_M: Tensor | None = None,
    ) -> tuple[Tensor, LayerWeights]:
        """Returns new cores and the weights of each layer.

        Args:
            features: of each level, unadapted.
            text_BLC: the prompt's tokens.
            strength: of the change.
            place: where the weights go.
            strengths_M: a factor on each target's strength; the cores that are returned are without it.
        """
        captured = self._captured if self._may_capture(place) else None
        if captured is None:
            cores_BMDA = self.cores(features, text_BLC)
            return cores_BMDA, self.weights(cores_BMDA, strength, place, strengths_M)

        def launch(inputs: Sequence[Tensor]) -> list[Tensor]:
            cores_BMDA = self.cores(inputs[: len(features)], inputs[len(features)])
            factors_M = inputs[len(features) + 1 :]
            used_BMDA = scaled(cores_BMDA, factors_M[0]) if factors_M else cores_BMDA
            folded = self._layers.folding.fold(used_BMDA, strength, place.dtype)
            return [cores_BMDA, *(tensor for each in folded for tensor in (each.down_LBIK, each.up_LKO))]

        inputs = [*features, text_BLC]
        if strengths_M is not None:
            inputs.append(strengths_M.to(text_BLC.device))
        key = (strength, place.dtype, *((tensor.shape, tensor.dtype, tensor.stride()) for tensor in inputs))
        (cores_BMDA, *tensors), overwritten = captured.run(key, launch, inputs)
        folded = [Folded(down, up) for down, up in zip(tensors[::2], tensors[1::2], strict=True)]
        cores_BMDA = cores_BMDA.clone() if overwritten else cores_BMDA
        return cores_BMDA, self._weights.of_folded(folded, len(cores_BMDA), place)

    def cores(self, features: Sequence[Tensor], text_BLC: Tensor) -> Tensor:
        """Returns new cores (B, M, b, a), without a gradient to the base model."""
        perceived = Perceived(features, pool_text(text_BLC)).detached()
        prepared = self.prepare(text_BLC.device) if self._may_prepare() else None
        if prepared is not None:
            return prepared(perceived)
        return self._network(perceived).to(text_BLC.device)  # a static network may be kept elsewhere

    def prepare(self, device: torch.device) -> PreparedHyperNetwork | None:
        """Returns what a declared run generates with on a device; compiled graphs take what is there."""
        if device not in self._prepared and not torch.compiler.is_compiling() and self._may_prepare():
            with torch.inference_mode(False), torch.no_grad():
                self._prepared[device] = PreparedHyperNetwork(self._network, device)
        return self._prepared.get(device)

    def _may_prepare(self) -> bool:
        network: Any = self._network
        watched = bool(network._forward_hooks or network._forward_pre_hooks)  # they want to see it run
        in_run = self._network_state is not None
        return in_run and not (network.is_static or watched or torch.is_grad_enabled())

    def _may_capture(self, place: Place) -> bool:
        in_run = self._network_state is not None
        return in_run and place.every_step and not place.gradient and not torch.compiler.is_compiling()

    def weights(
        self, cores_BMDA: Tensor, strength: float, place: Place, strengths_M: Tensor | None = None
    ) -> LayerWeights:
        """Returns the weights of each layer for cores that a run keeps."""
        if strengths_M is not None:
            cores_BMDA = scaled(cores_BMDA, strengths_M)
        return self._weights.of(cores_BMDA, strength, place)


def _version(tensor: Tensor) -> int:
    """Returns a number that grows when a tensor is written; inference tensors keep none."""
    return 0 if tensor.is_inference() else tensor._version
