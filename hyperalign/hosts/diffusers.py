"""HyperAlign on diffusers' U-Nets and transformers.

`Adapter` is functional: cores are an explicit argument, as training needs them. `attach` patches a
base model in place for a pipeline and restores it at the end of the `with` block.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NoReturn

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from ..checkpoint import HyperAlign, check_base
from ..errors import HyperAlignError
from ..factors import forward_delta
from ..families import flux, sd3, unet
from ..families.dit import TransformerSpec
from ..perception import token_map
from ..schedule import Schedule, Variant
from ..targets import BaseSpec

Call = Mapping[str, Any]
"""The keyword arguments of one forward of a base model."""


class _PerceptionDone(Exception):
    """Ends a forward once the down path has been seen."""


def spec_of(model: nn.Module) -> BaseSpec:
    """Returns the dimensions of a diffusers model. Raises HyperAlignError if its class is not known."""
    config: dict[str, Any] = getattr(model, "config", {})
    name = type(model).__name__
    for family in (unet, flux, sd3):
        if name == family.DIFFUSERS_CLASS:
            return family.from_diffusers(config)
    known = ", ".join(family.DIFFUSERS_CLASS for family in (unet, flux, sd3))
    raise HyperAlignError(f"The base model is a {name}; HyperAlign knows {known}. Pass one of those.")


def unet_call(x_BCHW: Tensor, t_B: Tensor, context_BLC: Tensor, **more: Any) -> Call:
    """Returns the call of a U-Net without further conditions (SD 1.5 and the tiny model)."""
    return {"sample": x_BCHW, "timestep": t_B, "encoder_hidden_states": context_BLC, **more}


class Adapter:
    """Runs a frozen base model with generated weights; nothing of it is changed between calls."""

    def __init__(self, base: nn.Module, hyperalign: HyperAlign) -> None:
        """Resolves the targets. Raises HyperAlignError if the hypernetwork is for another base."""
        spec = spec_of(base)
        check_base(hyperalign.header, spec)
        self.base = base
        self.network = hyperalign.network
        self.header = hyperalign.header
        self._spec = spec
        self._modules = [base.get_submodule(target.name) for target in hyperalign.header.targets]
        self._levels = _perception_modules(base, spec, hyperalign.header.perception_blocks)

    def time(self, call: Call) -> float:
        """Returns u in [0, 1] of a call, 1 being pure noise."""
        return float(torch.as_tensor(call["timestep"]).flatten()[0]) / self._spec.last_timestep

    @torch.no_grad()
    def perceive(self, call: Call) -> list[Tensor]:
        """Returns the unadapted features of a call, one map (B, C, H, W) per level."""
        features: list[Tensor] = []

        def stop(_: list[Tensor]) -> NoReturn:
            raise _PerceptionDone

        with self._collecting(call, features, stop), contextlib.suppress(_PerceptionDone):
            self.base(**call)
        return features

    def forward(self, call: Call, cores_BMDA: Tensor | None, strength: float = 1.0) -> Tensor:
        """Returns the adapted prediction; `cores_BMDA` None is the base model, bit for bit."""
        if cores_BMDA is None or strength == 0.0:
            return self.base(**call)[0]
        with self._adapted([cores_BMDA], strength):
            return self.base(**call)[0]

    def generate_and_forward(self, call: Call, strength: float = 1.0) -> tuple[Tensor, Tensor]:
        """Returns the prediction and the cores it was made with, generated from this very input.

        In `prefix` mode the hypernetwork runs in the middle of one forward; in `separate` mode the
        perception blocks run once more before it (the paper).
        """
        if self.header.mode == "separate":
            cores_BMDA = self.network(self.perceive(call))
            return self.forward(call, cores_BMDA, strength), cores_BMDA
        slot: list[Tensor] = []
        features: list[Tensor] = []

        def generate(seen: list[Tensor]) -> None:
            slot.append(self.network([f.detach() for f in seen]))

        with self._collecting(call, features, generate), self._adapted(slot, strength):
            prediction = self.base(**call)[0]
        return prediction, slot[0]

    @contextlib.contextmanager
    def _collecting(
        self, call: Call, features: list[Tensor], done: Callable[[list[Tensor]], None]
    ) -> Iterator[None]:
        """Gathers each level's feature and calls `done` after the last one."""

        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            features.append(_feature_map(self._spec, call, output))
            if len(features) == len(self._levels):
                done(features)

        handles = [module.register_forward_hook(hook) for module in self._levels]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextlib.contextmanager
    def _adapted(self, slot: Sequence[Tensor], strength: float) -> Iterator[None]:
        """Adds each target's delta with the cores in `slot[0]`, which may arrive mid-forward."""

        def hook_for(index: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
            def hook(_module: nn.Module, inputs: tuple[Tensor, ...], y_BNO: Tensor) -> Tensor:
                x_BNI = inputs[0]
                a_aux, b_aux = self.network.aux(index)
                core_BDA = slot[0][:, index]
                delta = forward_delta(x_BNI, a_aux.to(x_BNI), b_aux.to(x_BNI), core_BDA.to(x_BNI))
                return y_BNO + strength * delta

            return hook

        handles = [module.register_forward_hook(hook_for(i)) for i, module in enumerate(self._modules)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class Session:
    """One attached U-Net: counts evaluations and generations, keeps the weights of I and P."""

    def __init__(self, adapter: Adapter, schedule: Schedule, strength: float) -> None:
        self.adapter = adapter
        self.schedule = schedule
        self.strength = strength
        self.new_run()

    def new_run(self) -> None:
        """Forgets the weights at hand; call it between two runs inside one `with` block."""
        self.evaluations = 0
        self.generations = 0
        self._cores: Tensor | None = None
        self._segment: int | None = None

    def predict(self, call: Call) -> Tensor:
        """Returns the adapted prediction, generating weights when they are due."""
        self.evaluations += 1
        u, rows = self.adapter.time(call), len(call[_first_argument(self.adapter.base)])
        stale = self._cores is None or self._cores.shape[0] != rows
        if stale or self.schedule.is_due(u, self._segment):
            self.generations += 1
            self._segment = self.schedule.segment(u)
            prediction, self._cores = self.adapter.generate_and_forward(call, self.strength)
            return prediction
        return self.adapter.forward(call, self._cores, self.strength)


@contextlib.contextmanager
def attach(
    base: nn.Module,
    hyperalign: HyperAlign,
    strength: float = 1.0,
    variant: Variant | Literal["auto"] = "auto",
) -> Iterator[Session]:
    """Aligns a pipeline's U-Net or transformer inside a `with` block, one run per block.

    Args:
        base: `pipe.unet` or `pipe.transformer`; its weights are never touched.
        hyperalign: what `hyperalign.checkpoint.load` returned.
        strength: 0 is the base model bit for bit, 1 as trained.
        variant: S, P or I; `auto` takes the one the hypernetwork was trained for.

    Raises:
        HyperAlignError: another base model, or P without key times.
    """
    if not torch.isfinite(torch.tensor(strength)):
        raise HyperAlignError(f"strength is {strength}; expected a number, 0 for off and 1 as trained.")
    schedule = hyperalign.header.schedule
    if variant != "auto":
        schedule = Schedule(variant, schedule.key_times)
    session = Session(Adapter(base, hyperalign), schedule, strength)
    original = base.forward
    signature = inspect.signature(original)
    inside = False

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal inside
        if inside or strength == 0.0:
            return original(*args, **kwargs)
        call = dict(signature.bind(*args, **kwargs).arguments)
        wants_output = call.pop("return_dict", True)
        inside = True
        try:
            prediction = session.predict(call)
        finally:
            inside = False
        return Transformer2DModelOutput(sample=prediction) if wants_output else (prediction,)

    base.forward = forward
    try:
        yield session
    finally:
        del base.forward


def _first_argument(base: nn.Module) -> str:
    """Returns the name by which a base model takes its latents."""
    return "sample" if type(base).__name__ == unet.DIFFUSERS_CLASS else "hidden_states"


def _perception_modules(base: nn.Module, spec: BaseSpec, perception_blocks: int) -> list[nn.Module]:
    """Returns the modules whose outputs are the features, in forward order."""
    if isinstance(spec, TransformerSpec):
        return [base.get_submodule(spec.perception_paths(perception_blocks)[0])]
    blocks: Any = base.get_submodule("down_blocks")
    return [_last_of(block) for block in blocks]


def _feature_map(spec: BaseSpec, call: Call, output: Any) -> Tensor:
    """Returns the map (B, C, H, W) in the output of a perception module."""
    if isinstance(spec, TransformerSpec):
        return token_map(output[1], _grid(spec, call))
    return output if isinstance(output, Tensor) else output[0]


def _grid(spec: TransformerSpec, call: Call) -> tuple[int, int]:
    """Returns rows and columns of a call's image tokens; FLUX's are packed and carry their places."""
    if isinstance(spec, flux.FluxSpec):
        own = call["img_ids"][call["img_ids"][:, 0] == 0]
        return int(own[:, 1].max()) + 1, int(own[:, 2].max()) + 1
    height, width = call["hidden_states"].shape[-2:]
    return height // spec.patch, width // spec.patch


def _last_of(block: Any) -> nn.Module:
    """Returns the layer whose output is a down block's last feature before downsampling."""
    layers = getattr(block, "attentions", None) or block.resnets
    return layers[-1]
