"""Base models whose forwards are captured as CUDA graphs, with HyperAlign attached or without."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from hyperalign.hosts.diffusers.adapter import Call
from hyperalign.hosts.diffusers.session import Session

WARM_UPS = 3


@dataclass(slots=True)
class Pipeline:
    """What `attach` reads of a diffusers pipeline: the base model, and the timesteps of a run."""

    unet: nn.Module
    scheduler: Any = field(default_factory=lambda: SimpleNamespace(timesteps=None))

    @property
    def components(self) -> dict[str, Any]:
        """The pipeline's parts."""
        return {"unet": self.unet, "scheduler": self.scheduler}


class CapturedForward:
    """Replays a model's forward. P until its last generation, and I until its only one, runs as it is.

    The generation of S is captured with the forward. After the last generation the graph of I and P goes on
    reading the weights where that wrote them.
    """

    def __init__(self, model: nn.Module, session: Session | None) -> None:
        self._model, self._session = model, session
        self._inputs: dict[str, Tensor] = {}
        self._graph: torch.cuda.CUDAGraph | None = None
        self._output: Tensor | None = None
        self.generations = 0
        """How often the last run generated weights."""

    def begin(self) -> None:
        """Begins a run."""
        self.generations = 0

    def __call__(self, call: Call) -> Tensor:
        """Returns the prediction; the next call overwrites it."""
        session = self._session
        if session is not None and session.schedule.variant == "S":
            self.generations += 1
        elif session is not None and self._may_be_due(session):
            prediction = self._forward(call)
            self.generations = session.generations
            return prediction
        if self._graph is None:
            self._graph = self._captured(call)
        for name, tensor in self._inputs.items():
            tensor.copy_(call[name])
        self._graph.replay()
        assert self._output is not None
        return self._output

    def _may_be_due(self, session: Session) -> bool:
        """Returns whether generations are still to come: a captured forward cannot look at the time."""
        return self.generations <= session.schedule.last_segment

    def _forward(self, call: Call) -> Tensor:
        return self._model(**call, return_dict=False)[0]

    def _captured(self, call: Call) -> torch.cuda.CUDAGraph:
        """Captures a forward. Latents and time are inputs; prompts stay where they are."""
        latents = "sample" if "sample" in call else "hidden_states"
        self._inputs = {name: call[name].clone() for name in (latents, "timestep")}
        fixed = {**call, **self._inputs}
        graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                self._forward(fixed)
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph, stream=side):
            self._output = self._forward(fixed)
        return graph
