"""What a run begins with: a new hypernetwork, or the weights of another one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hyperalign import checkpoint
from hyperalign.checkpoint import Header, HyperAlign
from hyperalign.errors import HyperAlignError
from hyperalign.families.dit import TransformerSpec
from hyperalign.hosts.diffusers.adapter import spec_of
from hyperalign.provenance import Source
from hyperalign.schedule import Schedule
from hyperalign.targets import BaseSpec, Target
from train.config import TrainConfig


@dataclass(frozen=True, slots=True)
class Origin:
    """The hypernetwork whose weights a run began with."""

    facts: dict[str, Any]
    """File, hash, variant, steps and rewards, for the headers of what the run writes."""
    sources: tuple[Source, ...]
    """What it was trained with itself."""

    def as_table(self) -> dict[str, Any]:
        """Returns JSON types, as a training checkpoint holds them."""
        return {"facts": self.facts, "sources": [asdict(source) for source in self.sources]}


def origin_of(table: Mapping[str, Any]) -> Origin:
    """Returns the origin of `Origin.as_table`."""
    return Origin(dict(table["facts"]), tuple(Source(**source) for source in table["sources"]))


def new_header(config: TrainConfig, spec: BaseSpec, schedule: Schedule) -> Header:
    """Returns the header of a recipe's hypernetwork for a base model, without its training."""
    blocks = config.model.perception_blocks if isinstance(spec, TransformerSpec) else 0
    return Header(
        base=spec.fingerprint(),
        mode=config.model.mode,
        feature_channels=spec.feature_channels,
        text_channels=spec.text_channels,
        targets=spec.targets(config.model.mode, blocks),
        network=config.network,
        schedule=schedule,
        perception_blocks=blocks,
    )


def trained_numbers(config: TrainConfig, spec: BaseSpec) -> int:
    """Returns how many numbers a recipe's training changes."""
    with torch.device("meta"):
        network = checkpoint.new_network(new_header(config, spec, Schedule("S")))
    return sum(parameter.numel() for parameter in network.parameters())


def new_hyperalign(config: TrainConfig, backbone: nn.Module, schedule: Schedule) -> HyperAlign:
    """Returns an untrained hypernetwork for a base model; it changes nothing yet."""
    header = new_header(config, spec_of(backbone), schedule)
    return HyperAlign(checkpoint.new_network(header), header)


def begin_from(path: Path, hyperalign: HyperAlign) -> Origin:
    """Fills a new hypernetwork with the weights of a file; when weights are generated may differ.

    Raises:
        HyperAlignError: no hypernetwork, a damaged one, or one of another architecture.
    """
    check_architecture(path, hyperalign.header)
    loaded = checkpoint.load(path)
    hyperalign.network.load_state_dict(loaded.network.state_dict())
    known = ("steps", "reward", "preference_data")
    facts = {name: loaded.header.training[name] for name in known if name in loaded.header.training}
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    named = {"file": path.name, "sha256": digest, "variant": loaded.header.schedule.variant}
    return Origin(named | facts, loaded.header.sources)


def check_architecture(path: Path, expected: Header) -> None:
    """Reads a hypernetwork's header. Raises HyperAlignError unless its weights fit the expected one."""
    found, wanted = _architecture(checkpoint.read_header(path)), _architecture(expected)
    names = [name for name in (*wanted, *found) if found.get(name) != wanted.get(name)]
    if names:
        listed = "; ".join(
            f"{name} is {_shown(found.get(name))} and should be {_shown(wanted.get(name))}"
            for name in dict.fromkeys(names)
        )
        raise HyperAlignError(
            f"The weights of run.init_from = {path} do not fit this recipe: {listed}. Choose a hypernetwork "
            "of the same architecture, or change the recipe to its."
        )


def _architecture(header: Header) -> dict[str, Any]:
    """Returns what decides whether weights fit, by dotted name."""
    return {
        **{f"base.{name}": value for name, value in header.base.items()},
        "mode": header.mode,
        "perception_blocks": header.perception_blocks,
        "feature_channels": header.feature_channels,
        "text_channels": header.text_channels,
        "targets": header.targets,
        **{f"network.{name}": value for name, value in asdict(header.network).items()},
    }


def _shown(value: Any) -> str:
    """Returns a value for a sentence; of the many targets their number and the first one."""
    if isinstance(value, tuple) and value and isinstance(first := value[0], Target):  # pyright: ignore
        return f"{len(value)} layers from {first.name}"  # pyright: ignore
    return str(value)  # pyright: ignore
