"""Runs a diffusers U-Net or transformer with generated weights; cores are an explicit argument.

Training needs them so: a backward pass replays blocks after the forward has ended.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...checkpoint import HyperAlign, check_base
from ...errors import HyperAlignError
from ...families import flux, sd3, unet
from ...families.dit import TransformerSpec
from ...perception import Perceived, pool_text
from ...schedule import Schedule
from ...targets import BaseSpec, Place
from ..features import FeatureMap, ImageTokens, PerceptionDone, collecting, first_output, stop_forward
from ..generation import Generator
from ..layers import AdaptedLayers, LayerWeights
from ..merging import Merging
from ..run_state import Chunk, Run, Time
from ..weights import Place as WeightsPlace
from ..weights import Weights
from .parts import layers_in_parts, with_whole_batches

Call = Mapping[str, Any]
"""The keyword arguments of one forward of a base model."""

CONTROL = frozenset(
    {
        "down_block_additional_residuals",
        "mid_block_additional_residual",
        "down_intrablock_additional_residuals",
        "controlnet_block_samples",
        "controlnet_single_block_samples",
        "block_controlnet_hidden_states",
    }
)
"""The arguments by which control nets and adapters reach a base model."""


def is_a(model: nn.Module, name: str) -> bool:
    """Returns whether a model is of the class of that name, or of one derived from it, as FSDP derives."""
    return any(kind.__name__ == name for kind in type(model).__mro__)


def spec_of(model: nn.Module) -> BaseSpec:
    """Returns the dimensions of a diffusers model. Raises HyperAlignError if its class is not known."""
    config: dict[str, Any] = getattr(model, "config", {})
    for family in (unet, flux, sd3):
        if is_a(model, family.DIFFUSERS_CLASS):
            return family.from_diffusers(config)
    name, known = type(model).__name__, ", ".join(family.DIFFUSERS_CLASS for family in (unet, flux, sd3))
    raise HyperAlignError(f"The base model is a {name}; HyperAlign knows {known}. Pass one of those.")


def unet_call(x_BCHW: Tensor, t_B: Tensor, context_BLC: Tensor, **more: Any) -> Call:
    """Returns the call of a U-Net without further conditions (SD 1.5 and the tiny model)."""
    return {"sample": x_BCHW, "timestep": t_B, "encoder_hidden_states": context_BLC, **more}


def _has_gradient(values: Iterable[Any]) -> bool:
    return any(isinstance(value, Tensor) and value.requires_grad for value in values)


class Adapter:
    """Runs a frozen base model with generated weights; nothing of it is changed between calls."""

    def __init__(
        self,
        base: nn.Module,
        hyperalign: HyperAlign,
        schedule: Schedule | None = None,
        merging: Merging = "additive",
        capture: bool = False,
    ) -> None:
        """Resolves the targets. Raises HyperAlignError for another base model.

        Args:
            base: the base model.
            hyperalign: a hypernetwork for it.
            schedule: when weights are generated; None as the hypernetwork was trained.
            merging: whether runs without a gradient merge weights, as for `attach`.
            capture: whether they replay generations as CUDA graphs, as for `attach`.
        """
        spec = spec_of(base)
        check_base(hyperalign.header, spec)
        self.base = base
        self.network = hyperalign.network
        self.header = hyperalign.header
        self._spec = spec
        names = [target.name for target in hyperalign.header.targets]
        self._layers = AdaptedLayers(hyperalign.network, [Place(name) for name in names], _like(base, names))
        self.run_base: Callable[..., Any] = base
        """Evaluates the base model; a session that replaces its forward calls the one that was there."""
        self._inside: dict[nn.Module, list[int]] = {}
        self._find_modules()
        self._weights: list[LayerWeights] | None = None
        """Of the running forward: one entry, once generated. None while no adapted forward runs."""
        self._every_step = (schedule or hyperalign.header.schedule).variant == "S"
        self._generator = Generator(self.network, self._layers, Weights(self._layers, merging), capture)

    def checkpoint_activations(self) -> None:
        """Makes backward passes recompute the base model's blocks, weights and all, to save memory.

        A block is replayed when its forward, and its adapted layers with it, are long gone. So each replay
        adapts the block's layers anew, with the weights its forward ran with. A block that runs before there
        are weights is never replayed: the hypernetwork generates them inside the last of these.
        """

        def run(block: nn.Module, *args: Any) -> Any:
            weights = self._weights
            inside = self._layers_inside(block)
            if not weights or not (_has_gradient(args) or inside):
                return block(*args)

            def contexts() -> tuple[Any, Any]:
                return contextlib.nullcontext(), self._replaying(weights, inside)

            return checkpoint(block, *args, use_reentrant=False, context_fn=contexts)

        base: Any = self.base
        base.enable_gradient_checkpointing(run)

    def begin_run(self) -> None:
        """Forgets weights; the hypernetwork must stay as it is during the run.

        Raises:
            HyperAlignError: an adapted layer is no longer there.
        """
        self._find_modules()
        self._generator.begin_run()

    def end_run(self) -> None:
        """Frees the memory of a run."""
        self._generator.end_run()

    def time(self, call: Call) -> Time:
        """Returns the time of a call, whose u is read from the device once something asks for it."""
        t, last = call["timestep"], self._spec.last_timestep
        return Time(lambda: float(torch.as_tensor(t).flatten()[0]) / last)

    @property
    def targets_reached(self) -> int:
        """How many targets' layers ran in the last adapted forward."""
        return self._layers.targets_reached

    def predict(self, run: Run, chunk: Chunk, call: Call, u: float | Time, strength: float = 1.0) -> Tensor:
        """Returns the prediction of one evaluation of a run, generating weights when its schedule says so.

        Args:
            run: decides whether the chunk's weights are generated or reused, and keeps them.
            chunk: the identity of the call's samples within the run.
            call: the base model's arguments.
            u: its timestep in [0, 1], which is compared with key times exactly.
            strength: of the change; 0 is the base model.
        """
        chunks = run.enter_call([chunk], u)
        if not run.due(chunks, u):
            return self.forward(call, run.cores(chunks), strength)
        prediction, cores = self._generate_and_forward(call, strength)
        if cores:
            run.write(chunks[0], cores[0], u)
        return prediction

    @torch.no_grad()
    def perceive(self, call: Call) -> Perceived:
        """Returns what the hypernetwork reads of a call: unadapted features and the prompt.

        Control of others is left out, so that features are what the hypernetwork was trained on; adapters'
        control would also be lost to the first of two forwards.
        """
        collector = collecting(self._perception_blocks, self._feature_map(call), stop_forward)
        with collector as features, contextlib.suppress(PerceptionDone):
            self.run_base(**{key: value for key, value in call.items() if key not in CONTROL})
        return Perceived(features, pool_text(call["encoder_hidden_states"]))

    def forward(self, call: Call, cores_BMDA: Tensor | None, strength: float = 1.0) -> Tensor:
        """Returns the adapted prediction; `cores_BMDA` None is the base model, bit for bit."""
        if cores_BMDA is None or strength == 0.0:
            return self.run_base(**call)[0]
        weights = self._generator.weights(cores_BMDA, strength, self._place(call))
        with self._adapted([weights], len(call[latents_argument(self.base)])):
            return self.run_base(**call)[0]

    def generate_and_forward(self, call: Call, strength: float = 1.0) -> tuple[Tensor, Tensor]:
        """Returns the prediction and the cores it was made with, generated from this very input.

        In `prefix` mode the hypernetwork runs in the middle of one forward; in `separate` mode the
        perception blocks run once more before it (the paper).
        """
        prediction, cores = self._generate_and_forward(call, strength)
        return prediction, cores[0]

    def _generate_and_forward(self, call: Call, strength: float) -> tuple[Tensor, list[Tensor]]:
        """Returns the prediction, and its cores unless a cache skipped the perception blocks."""
        text_BLC, place = call["encoder_hidden_states"], self._place(call)
        cores: list[Tensor] = []
        weights: list[LayerWeights] = []

        def generate(features: Sequence[Tensor]) -> None:
            cores_BMDA, made = self._generator.generate(features, text_BLC, strength, place)
            cores.append(cores_BMDA)
            weights.append(made)
            self._layers.give(made)

        x = call[latents_argument(self.base)]
        if self.header.mode == "separate":
            generate(self.perceive(call).features)
            with self._adapted(weights, len(x)):
                return self.run_base(**call)[0], cores
        collector = collecting(self._perception_blocks, self._feature_map(call), generate)
        with collector, self._adapted(weights, len(x)):
            self._layers.give_constant(len(x), x.dtype, x.device)
            prediction = self.run_base(**call)[0]
        return prediction, cores

    def _place(self, call: Call) -> WeightsPlace:
        self._find_exchanged_modules()
        dtype = call[latents_argument(self.base)].dtype
        return WeightsPlace(self._modules, dtype, self._every_step, torch.is_grad_enabled())

    @contextlib.contextmanager
    def _adapted(self, weights: list[LayerWeights], samples: int) -> Iterator[None]:
        """Adapts a forward with the weights in `weights[0]`, which may be generated in the middle of it."""
        self._layers.reset()
        self._weights = weights
        try:
            parts = with_whole_batches(self._in_parts, samples)
            with self._layers.installed(self._modules), parts:
                if weights:
                    self._layers.give(weights[0])
                yield
        finally:
            self._weights = None

    @contextlib.contextmanager
    def _replaying(self, weights: Sequence[LayerWeights], inside: Sequence[int]) -> Iterator[None]:
        """Adapts the layers inside a block again, for its replay in the backward pass."""
        with self._layers.installed(self._modules, inside):
            self._layers.give(weights[0], inside)
            yield

    def _find_modules(self) -> None:
        """Finds layers and perception blocks. Raises HyperAlignError if one is gone."""
        split = [path.rpartition(".") for path in self._layers.paths]
        try:
            holders: list[Any] = [self.base.get_submodule(path) for path, _, _ in split]
            self._holders = [
                (holder._modules, name) for holder, (_, _, name) in zip(holders, split, strict=True)
            ]
            self._modules = [self.base.get_submodule(path) for path in self._layers.paths]
            self._perception_blocks = _perception_blocks(self.base, self._spec, self.header.perception_blocks)
        except AttributeError as error:
            raise HyperAlignError(
                f"The {type(self.base).__name__} has lost a layer ({error}); expected those it was attached "
                "with. Attach HyperAlign after the model was changed."
            ) from error
        self._inside.clear()
        adapted = set(self._modules)
        self._in_parts = [layer for layer in layers_in_parts(self.base) if layer in adapted]

    def _find_exchanged_modules(self) -> None:
        """Finds layers again where one was exchanged, as by a LoRA that is loaded or unloaded."""
        pairs = zip(self._holders, self._modules, strict=True)
        if any(held.get(name) is not module for (held, name), module in pairs):
            self._find_modules()
            self._generator.forget_weights()

    def _layers_inside(self, part: nn.Module) -> list[int]:
        if part not in self._inside:
            modules = set(part.modules())
            self._inside[part] = [i for i, module in enumerate(self._modules) if module in modules]
        return self._inside[part]

    def _feature_map(self, call: Call) -> FeatureMap:
        spec = self._spec
        if isinstance(spec, TransformerSpec):
            return ImageTokens(_grid(spec, call), index=1)
        return first_output


def _like(base: nn.Module, adapted: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Returns input and output features of a compiled block's layers that are adapted in blocks of its class.

    torch.compile makes one graph for all blocks of a class whose layers run the same code. A block before the
    first adapted layer would be another kind of block, with a graph of its own.
    """
    modules: dict[str, Any] = dict(base.named_modules())
    blocks = {name: block for name, block in modules.items() if block._compiled_call_impl is not None}
    kinds: dict[type[nn.Module], set[str]] = {}
    for name, block in blocks.items():
        inside = {path.removeprefix(f"{name}.") for path in adapted if path.startswith(f"{name}.")}
        kinds.setdefault(type(block), set()).update(inside)
    paths = {f"{name}.{layer}" for name, block in blocks.items() for layer in kinds[type(block)]}
    layers = {path: modules[path] for path in sorted(paths - set(adapted)) if modules.get(path) is not None}
    return {path: (layer.in_features, layer.out_features) for path, layer in layers.items()}


def latents_argument(base: nn.Module) -> str:
    """Returns the name by which a base model takes its latents."""
    return "sample" if is_a(base, unet.DIFFUSERS_CLASS) else "hidden_states"


def _perception_blocks(base: nn.Module, spec: BaseSpec, perception_blocks: int) -> list[nn.Module]:
    """Returns the modules whose outputs are the features, in forward order."""
    if isinstance(spec, TransformerSpec):
        return [base.get_submodule(spec.perception_paths(perception_blocks)[0])]
    blocks: Any = base.get_submodule("down_blocks")
    return [_last_of(block) for block in blocks]


def _grid(spec: TransformerSpec, call: Call) -> tuple[int, int]:
    """Returns rows and columns of a call's image tokens; FLUX's are packed and carry their places."""
    if isinstance(spec, flux.FluxSpec):
        return _packed_grid(call["img_ids"])
    height, width = call["hidden_states"].shape[-2:]
    return height // spec.patch, width // spec.patch


@functools.lru_cache(maxsize=1)
def _packed_grid(img_ids_N3: Tensor) -> tuple[int, int]:
    """Returns rows and columns; kept for a run, as a look at the values waits for the device."""
    own = img_ids_N3[img_ids_N3[:, 0] == 0]
    return int(own[:, 1].max()) + 1, int(own[:, 2].max()) + 1


def _last_of(block: Any) -> nn.Module:
    """Returns the layer whose output is a down block's last feature before downsampling."""
    layers = getattr(block, "attentions", None) or block.resnets
    return layers[-1]
