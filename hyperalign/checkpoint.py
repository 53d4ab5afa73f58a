"""The hypernetwork file: one `.safetensors` with a versioned, validated JSON header.

Header key `hyperalign` contains the JSON of `Header`. A loader refuses fields and versions it does not know.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .errors import HyperAlignError, shortened, shown
from .files import cannot_write, first_line, replacing
from .finite import all_finite
from .hypernetwork import HyperNetwork, HyperNetworkConfig
from .provenance import Source
from .schedule import Schedule
from .targets import MAX_NAME, BaseSpec, PerceptionMode, Target, checked_width

FORMAT_VERSION = 2
"""1 had no statistics, no static part beside the conditional one, and did not read the prompt's tokens."""
HEADER_KEY = "hyperalign"
DTYPES = ("F16", "BF16", "F32", "F64")
MAX_BYTES = 2 << 30
"""Hypernetworks are far smaller than 2 GiB; a larger file is a base model in the wrong folder."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a host needs before it reads a tensor."""

    base: dict[str, Any]
    """`BaseSpec.fingerprint()` of the base model."""
    mode: PerceptionMode
    feature_channels: tuple[int, ...]
    text_channels: int
    targets: tuple[Target, ...]
    network: HyperNetworkConfig
    schedule: Schedule
    training: dict[str, Any] = field(default_factory=dict[str, Any])
    """How it was trained: recipe, reward, preference dataset and its licence, steps, metrics."""
    format_version: int = FORMAT_VERSION
    perception_blocks: int = 0
    """How many of a transformer's first blocks perceive; 0 for U-Nets, whose whole down path does."""
    sources: tuple[Source, ...] = ()
    """Base model, rewards and preference dataset with their licences and known biases."""

    @property
    def family(self) -> str:
        """The base model family, as `BaseSpec.family`."""
        return str(self.base.get("family", "unknown"))


@dataclass(frozen=True, slots=True)
class HyperAlign:
    """A hypernetwork with its header."""

    network: HyperNetwork
    header: Header


def new_network(header: Header, operations: ModuleType | Any = nn) -> HyperNetwork:
    """Returns an untrained hypernetwork of a header's sizes."""
    return HyperNetwork(
        header.network, header.targets, header.feature_channels, header.text_channels, operations
    )


def sized_network(header: Header, operations: ModuleType | Any = nn) -> HyperNetwork:
    """Returns a hypernetwork of a header's sizes on the meta device: wrong sizes allocate no memory."""
    with torch.device("meta"), _NoDrawing():
        return new_network(header, operations)


class _NoDrawing(TorchFunctionMode):
    """Leaves out the random initialisation of weights that a file replaces.

    On the meta device PyTorch draws numbers by Python functions, and the first of them imports its compiler:
    more than a second, ten times as long as everything else.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.randn:
            return torch.empty(*args, **kwargs)
        if func in (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def save(path: Path, network: HyperNetwork, header: Header, dtype: torch.dtype = torch.float16) -> None:
    """Writes the file atomically: a reader sees the old file or the whole new one."""
    statistics = dict(network.named_buffers())  # activations of a base may be beyond half precision
    tensors = {
        _file_name(key, header.targets): value.detach()
        .to("cpu", torch.float32 if key in statistics else dtype)
        .contiguous()
        for key, value in network.state_dict().items()
    }
    save_atomically(tensors, path, {HEADER_KEY: header_text(header)})


def save_atomically(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Writes a safetensors file beside its target and moves it into place. Raises OSError."""
    with replacing(path) as partial:
        try:
            save_file(tensors, partial, metadata)
        except SafetensorError as error:  # of a full disk, for one
            raise OSError(first_line(error)) from error
        partial.chmod(0o644)  # safetensors makes it readable by its owner alone


def store_training(path: Path, facts: Mapping[str, Any]) -> None:
    """Adds facts to the `training` of a file's header, in place of those of the same name.

    The file is written anew beside itself, so that a reader sees the old or the new one.

    Raises HyperAlignError.
    """
    header = read_header(path)
    header = replace(header, training=header.training | dict(facts))
    with safe_open(str(path), framework="pt") as file:
        tensors = {name: cast(Tensor, file.get_tensor(name)) for name in file.keys()}
    with cannot_write(path, "Make room, or copy the file to where you may write."):
        save_atomically(tensors, path, {HEADER_KEY: header_text(header)})


def read_header(path: Path) -> Header:
    """Returns the header without reading a tensor. Raises HyperAlignError."""
    return parse_header(_open_metadata(path), path)


def header_text(header: Header) -> str:
    """Returns the JSON of a header."""
    return json.dumps(asdict(header))


def load(path: Path, operations: ModuleType | Any = nn) -> HyperAlign:
    """Reads a hypernetwork in float32, on the CPU, ready for inference.

    Args:
        path: the `.safetensors` file.
        operations: where Linear and LayerNorm come from; a host may pass its own.

    Raises:
        HyperAlignError: not such a file, another version, shapes that contradict the header, or
            values that are not finite.
    """
    header = read_header(path)
    with safe_open(str(path), framework="pt") as file:
        found = {name: tuple(cast("list[int]", file.get_slice(name).get_shape())) for name in file.keys()}
        _check_count(path, header, len(found))
        network = sized_network(header, operations)
        wanted = network.state_dict()
        expected = {_file_name(key, header.targets): key for key in wanted}
        _check_shapes(path, found, {name: tuple(wanted[key].shape) for name, key in expected.items()})
        _check_types(path, {name: str(file.get_slice(name).get_dtype()) for name in expected})
        # Copies: a tensor at any place of the mapped file is computed with by other instructions.
        state = {
            key: cast(Tensor, file.get_tensor(name)).to(torch.float32, copy=True)
            for name, key in expected.items()
        }
    _check_finite(path, state)
    network.load_state_dict(state, assign=True)
    _check_conditional_part(path, network)
    return HyperAlign(network.eval().requires_grad_(False), header)


def check_base(header: Header, found: BaseSpec) -> None:
    """Raises HyperAlignError unless the hypernetwork was trained for a base of these dimensions."""
    expected = header.base
    actual = found.fingerprint()
    if expected == actual:
        return
    if expected.get("family") != actual["family"]:
        raise HyperAlignError(
            f"This hypernetwork was trained for the base model family {shown(expected.get('family'))}, but "
            f"the MODEL is {actual['family']!r}. Load a hypernetwork trained for {actual['family']!r}, or "
            f"connect a {shown(expected.get('family'))} model."
        )
    wrong = [key for key in actual if expected.get(key) != actual[key]]
    details = "; ".join(f"{key} is {actual[key]} and should be {shown(expected.get(key))}" for key in wrong)
    raise HyperAlignError(
        f"This hypernetwork fits another {actual['family']} model: {details}. "
        "Load the base model it was trained on, or a hypernetwork trained for this one."
    )


def _file_name(key: str, targets: Sequence[Target]) -> str:
    """Names A_aux and B_aux in the file after the module they belong to."""
    kind, _, index = key.partition(".")
    return f"targets.{targets[int(index)].name}.{kind}" if kind in ("a_aux", "b_aux") else key


def _open_metadata(path: Path) -> str:
    if not path.is_file():
        raise HyperAlignError(f"There is no file {path}. Put the hypernetwork there or choose another.")
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise HyperAlignError(
            f"{path.name} has {size / 2**30:.1f} GiB; a HyperAlign hypernetwork has less than "
            f"{MAX_BYTES >> 30} GiB. It is probably a base model: put it into models/checkpoints."
        )
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise HyperAlignError(
            f"{path.name} is not a whole safetensors file ({shortened(first_line(error))}). Download or copy "
            "it again; other formats (.pt, .ckpt) are not read."
        ) from error
    if HEADER_KEY not in metadata:
        raise HyperAlignError(
            f"{path.name} is a safetensors file without a HyperAlign header, so it is not a hypernetwork. "
            "A LoRA belongs into models/loras, a base model into models/checkpoints."
        )
    return metadata[HEADER_KEY]


def parse_header(text: str, path: Path) -> Header:
    """Returns the header of its JSON, which is from `path`. Raises HyperAlignError."""
    try:
        raw = json.loads(text)
        version = raw["format_version"]
        if version != FORMAT_VERSION:
            raise HyperAlignError(
                f"{path.name} has format version {shown(version)}; this release reads version "
                f"{FORMAT_VERSION}. "
                + ("Train it again with its recipe: its weights do not fit the hypernetwork of this release."
                   if version == 1 else "Update HyperAlign.")
            )  # fmt: skip
        unknown = set(raw) - {f.name for f in fields(Header)}
        if unknown:
            raise HyperAlignError(
                f"The header of {path.name} has unknown fields {shown(sorted(unknown))}. Update HyperAlign."
            )
        if raw["mode"] not in ("separate", "prefix"):
            raise ValueError(f"perception mode is {shown(raw['mode'])}")
        return Header(
            base=_table(raw, "base"),
            mode=raw["mode"],
            feature_channels=tuple(map(checked_width, raw["feature_channels"])),
            text_channels=checked_width(raw["text_channels"]),
            targets=_targets(raw["targets"]),
            network=HyperNetworkConfig(**_table(raw, "network")),
            schedule=Schedule(raw["schedule"]["variant"], tuple(raw["schedule"]["key_times"])),
            training=_table(raw, "training"),
            perception_blocks=_block_count(raw.get("perception_blocks", 0)),
            sources=tuple(Source(**source) for source in raw.get("sources", ())),
        )
    except HyperAlignError:
        raise
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise HyperAlignError(
            f"The HyperAlign header of {path.name} cannot be read ({shown(error)}). Download or export it "
            "again."
        ) from error


def _table(raw: dict[str, Any], key: str) -> dict[str, Any]:
    if not isinstance(raw[key], dict):
        raise TypeError(f"{key} is {shown(raw[key])}, expected an object")
    return raw[key]


def _targets(raw: Any) -> tuple[Target, ...]:
    targets = tuple(Target(**target) for target in raw)
    if twice := [name for name, times in Counter(target.name for target in targets).items() if times > 1]:
        raise ValueError(f"the layer {twice[0]} is there twice")
    return targets


def _block_count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"perception_blocks is {shown(value)}, expected a whole number from 0 on")
    return value


def _check_count(path: Path, header: Header, found: int) -> None:
    """Raises HyperAlignError if a header states more than a file holds, before it is built in memory."""
    stated = 2 * len(header.targets)
    if header.network.conditioning != "none":
        stated += header.network.layers + len(header.feature_channels)
    if stated > found:
        raise HyperAlignError(
            f"{path.name} has {found} tensors, its header states {stated} or more "
            f"({len(header.targets)} layers of the model, {header.network.layers} of the decoder). Download "
            "or export it again."
        )


def _check_types(path: Path, found: Mapping[str, str]) -> None:
    """Raises HyperAlignError if weights are not stored as floating-point numbers."""
    if wrong := [name for name, kind in found.items() if kind not in DTYPES]:
        raise HyperAlignError(
            f"{path.name}: {wrong[0]} is stored as {found[wrong[0]]}; expected one of {', '.join(DTYPES)} "
            f"({len(wrong)} such tensors). Download or export it again."
        )


def _check_shapes(
    path: Path, found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]
) -> None:
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    wrong = [name for name in expected if name in found and found[name] != expected[name]]
    if missing or extra:
        raise HyperAlignError(
            f"{path.name} does not contain the tensors that its header states: {len(missing)} missing "
            f"({_first(missing)}), {len(extra)} unexpected ({_first(extra)}). Download or export it again."
        )
    if wrong:
        name = wrong[0]
        if "_statistics." in name:
            raise HyperAlignError(
                f"{path.name} has the statistics of another base model: {name} has shape {found[name]}, its "
                f"header states {expected[name]}. Download it again, or train it again on its own base model."
            )
        raise HyperAlignError(
            f"{path.name}: {name} has shape {found[name]}, its header states {expected[name]} "
            f"({len(wrong)} such tensors). Download or export it again."
        )


def _first(names: list[str]) -> str:
    return ", ".join(name[:MAX_NAME] for name in names[:2]) or "none"


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Returns the names of the tensors that contain NaN or infinite values."""
    return [name for name, value in tensors.items() if not all_finite(value)]


def _check_conditional_part(path: Path, network: HyperNetwork) -> None:
    """Raises HyperAlignError if statistics cannot standardise, or the conditional part is missing."""
    if network.config.conditioning != "full":
        return
    for name, buffer in network.named_buffers():
        if name.endswith("deviation") and bool((buffer <= 0).any()):
            raise HyperAlignError(
                f"{path.name}: {name} has a value of {float(buffer.min()):g}; expected deviations above 0. "
                "The statistics are damaged: download the file again, or train it again."
            )
    if not network.head.weight.any():
        raise HyperAlignError(
            f"The conditional part of {path.name} is all zeros, so its weights are the same for every prompt "
            "and time. Download or export it again; for weights that are meant to be so, train with "
            'network.conditioning = "none".'
        )


def _check_finite(path: Path, state: dict[str, Tensor]) -> None:
    bad = not_finite(state)
    if statistics := [name for name in bad if "_statistics." in name]:
        raise HyperAlignError(
            f"{path.name} contains NaN or infinite statistics ({statistics[0]}). The base model's features "
            "were not finite when they were measured, or the file is damaged: download it again, or train it "
            "again."
        )
    if bad:
        raise HyperAlignError(
            f"{path.name} contains NaN or infinite weights ({bad[0]}, {len(bad)} tensors). "
            "The training diverged or the file is damaged; use an earlier checkpoint."
        )
