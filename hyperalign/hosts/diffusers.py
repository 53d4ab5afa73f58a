"""HyperAlign on a diffusers UNet2DConditionModel.

`Adapter` is functional: cores are an explicit argument, as training needs them. `attach` patches a
U-Net in place for a pipeline and restores it at the end of the `with` block.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NoReturn

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

from ..checkpoint import HyperAlign, check_base
from ..errors import HyperAlignError
from ..factors import forward_delta
from ..schedule import Schedule, Variant
from ..targets import BaseSpec

LAST_TIMESTEP = 999.0
"""u = t / 999 for models with 1,000 timesteps."""


class _PerceptionDone(Exception):
    """Ends a forward once the down path has been seen."""


def spec_of(unet: UNet2DConditionModel) -> BaseSpec:
    """Returns the dimensions of a diffusers U-Net."""
    config: dict[str, Any] = unet.config
    channels = tuple(config["block_out_channels"])
    depth = config.get("transformer_layers_per_block", 1)
    depths = tuple(depth) if isinstance(depth, (list, tuple)) else (depth,) * len(channels)
    attends = ["CrossAttn" in kind for kind in config["down_block_types"]]
    context = config["cross_attention_dim"]
    families = {128: "tiny", 768: "sd15", 2048: "sdxl"}
    return BaseSpec(
        family=families.get(context, "unknown"),
        in_channels=config["in_channels"],
        block_out_channels=channels,
        layers_per_block=config["layers_per_block"],
        cross_attention_dim=context,
        transformer_layers=tuple(d if a else 0 for d, a in zip(depths, attends, strict=True)),
    )


class Adapter:
    """Runs a frozen U-Net with generated weights; nothing of the U-Net is changed between calls."""

    def __init__(self, unet: UNet2DConditionModel, hyperalign: HyperAlign) -> None:
        """Resolves the targets. Raises HyperAlignError if the hypernetwork is for another base."""
        check_base(hyperalign.header, spec_of(unet))
        self.unet = unet
        self.network = hyperalign.network
        self.header = hyperalign.header
        self._modules = [unet.get_submodule(target.name) for target in hyperalign.header.targets]
        self._levels = [_last_of(block) for block in unet.down_blocks]

    @torch.no_grad()
    def perceive(self, x_BCHW: Tensor, t_B: Tensor, context_BLC: Tensor) -> list[Tensor]:
        """Returns the unadapted features (B, C, H, W) of each resolution level."""
        features: list[Tensor] = []

        def stop(_: list[Tensor]) -> NoReturn:
            raise _PerceptionDone

        with self._collecting(features, stop), contextlib.suppress(_PerceptionDone):
            self.unet(x_BCHW, t_B, context_BLC)
        return features

    def forward(
        self,
        x_BCHW: Tensor,
        t_B: Tensor,
        context_BLC: Tensor,
        cores_BMDA: Tensor | None,
        strength: float = 1.0,
    ) -> Tensor:
        """Returns the adapted prediction; `cores_BMDA` None is the base model, bit for bit."""
        if cores_BMDA is None or strength == 0.0:
            return self.unet(x_BCHW, t_B, context_BLC).sample
        with self._adapted([cores_BMDA], strength):
            return self.unet(x_BCHW, t_B, context_BLC).sample

    def generate_and_forward(
        self, x_BCHW: Tensor, t_B: Tensor, context_BLC: Tensor, strength: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Returns the prediction and the cores it was made with, generated from this very input.

        In `prefix` mode the hypernetwork runs in the middle of one forward; in `separate` mode the
        down path runs once more before it (the paper).
        """
        if self.header.mode == "separate":
            cores_BMDA = self.network(self.perceive(x_BCHW, t_B, context_BLC))
            return self.forward(x_BCHW, t_B, context_BLC, cores_BMDA, strength), cores_BMDA
        slot: list[Tensor] = []
        features: list[Tensor] = []

        def generate(seen: list[Tensor]) -> None:
            slot.append(self.network([f.detach() for f in seen]))

        with self._collecting(features, generate), self._adapted(slot, strength):
            prediction = self.unet(x_BCHW, t_B, context_BLC).sample
        return prediction, slot[0]

    @contextlib.contextmanager
    def _collecting(self, features: list[Tensor], done: Callable[[list[Tensor]], None]) -> Iterator[None]:
        """Gathers each level's last feature and calls `done` after the last one."""

        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            features.append(_feature(output))
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

    def predict(self, x_BCHW: Tensor, t_B: Tensor, context_BLC: Tensor) -> Tensor:
        """Returns the adapted prediction, generating weights when they are due."""
        self.evaluations += 1
        u = float(t_B.flatten()[0]) / LAST_TIMESTEP
        stale = self._cores is None or self._cores.shape[0] != x_BCHW.shape[0]
        if stale or self.schedule.is_due(u, self._segment):
            self.generations += 1
            self._segment = self.schedule.segment(u)
            prediction, self._cores = self.adapter.generate_and_forward(
                x_BCHW, t_B, context_BLC, self.strength
            )
            return prediction
        return self.adapter.forward(x_BCHW, t_B, context_BLC, self._cores, self.strength)


@contextlib.contextmanager
def attach(
    unet: UNet2DConditionModel,
    hyperalign: HyperAlign,
    strength: float = 1.0,
    variant: Variant | Literal["auto"] = "auto",
) -> Iterator[Session]:
    """Aligns a pipeline's U-Net inside a `with` block, one run per block.

    Args:
        unet: `pipe.unet`; its weights are never touched.
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
    session = Session(Adapter(unet, hyperalign), schedule, strength)
    original = unet.forward
    inside = False

    def forward(
        sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        nonlocal inside
        if inside or strength == 0.0:
            return original(sample, timestep, encoder_hidden_states, *args, **kwargs)
        inside = True
        try:
            t_B = torch.as_tensor(timestep, device=sample.device).expand(sample.shape[0])
            prediction = session.predict(sample, t_B, encoder_hidden_states)
        finally:
            inside = False
        return UNet2DConditionOutput(sample=prediction) if kwargs.get("return_dict", True) else (prediction,)

    unet.forward = forward
    try:
        yield session
    finally:
        del unet.forward


def _last_of(block: Any) -> nn.Module:
    """Returns the layer whose output is a down block's last feature before downsampling."""
    layers = getattr(block, "attentions", None) or block.resnets
    return layers[-1]


def _feature(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]
