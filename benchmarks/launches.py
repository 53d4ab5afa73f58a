"""Operators and Python time that HyperAlign adds to a forward: what it costs where launches take the time.

    python -m benchmarks.launches

Stable Diffusion 1.5's layers, narrower, with random weights on a CPU: the counts are those of the full width
and of a GPU, where each operator is a launch (views are not counted). Prints a table and writes
results/launches.json.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal, cast

import torch
import tyro
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.bases import Size, build, random_hyperalign
from benchmarks.captured import Pipeline
from benchmarks.rounds import RESULTS, environment, save_json
from hyperalign.hosts.diffusers.session import attach
from hyperalign.hosts.layers import AdaptedLayers
from hyperalign.hosts.merging import Merged, Merging
from hyperalign.hypernetwork import HyperNetwork, HyperNetworkConfig
from hyperalign.perception import Perceived, pool_text
from hyperalign.prepared import PreparedHyperNetwork
from hyperalign.schedule import Variant
from hyperalign.targets import Place, Target

CPU = torch.device("cpu")
SIZE = Size(64, 7, 0, 0, narrow=10)
WAYS: tuple[Merging, ...] = ("additive", "merged")
VARIANTS: tuple[Variant, ...] = ("S", "I")


class Operators(TorchDispatchMode):
    """Counts what is dispatched, views apart: those launch nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.views = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Counts one operator and runs it."""
        if func.is_view or func is torch.ops.aten._unsafe_view.default:
            self.views += 1
        else:
            self.names[func.__name__.split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True, slots=True)
class Options:
    """Counts operators and times an adapted layer's call."""

    out: Path = RESULTS
    """Folder of the JSON file."""


def counted(call: Callable[[], object]) -> Counter[str]:
    """Returns how often a call dispatches each operator."""
    with torch.no_grad(), Operators() as operators:
        call()
    return operators.names


def forwards() -> dict[str, int]:
    """Returns the operators of a base forward, and those that each way and variant adds between others.

    The third step of a run: the weights of I were generated at its first.
    """
    base = build("sd15", SIZE, CPU, torch.float32)
    hyperalign = random_hyperalign(base.spec, "prefix", HyperNetworkConfig(), 0, CPU)
    times_T = torch.tensor([1.0, 0.6, 0.2]) * base.spec.last_timestep
    calls = [base.call(base.noise, t) for t in times_T]
    plain = counted(lambda: base.model(**calls[2])).total()
    found = {"base forward": plain}
    for merging in WAYS:
        for variant in VARIANTS:
            pipeline = Pipeline(base.model)
            pipeline.scheduler.timesteps = times_T
            with attach(cast(Any, pipeline), hyperalign, variant=variant, merging=merging), torch.no_grad():
                for call in calls[:2]:
                    base.model(**call)
                found[f"{variant} {merging}, beyond the base"] = (
                    counted(lambda: base.model(**calls[2])).total() - plain
                )
    return found


def generations() -> dict[str, int]:
    """Returns the operators of a generation, by the hypernetwork as it is trained and as it samples."""
    base = build("sd15", SIZE, CPU, torch.float32)
    network = random_hyperalign(base.spec, "prefix", HyperNetworkConfig(), 0, CPU).network
    sides = (SIZE.pixels // 8 >> level for level in range(4))
    features = [
        torch.randn(2, c, side, side) for c, side in zip(network.feature_channels, sides, strict=True)
    ]
    text_BLC = torch.randn(2, SIZE.text_tokens, network.text_channels)

    def perceived() -> Perceived:
        return Perceived(features, pool_text(text_BLC))

    prepared = PreparedHyperNetwork(network, CPU)
    counted(lambda: network(perceived()))  # encodings are kept from then on
    return {
        "generation as in training": counted(lambda: network(perceived())).total(),
        "generation": counted(lambda: prepared(perceived())).total(),
    }


def microseconds() -> dict[str, float]:
    """Returns the processor time of a layer's call on an input of 1 x 1 x 8, the least of several rounds.

    The ways are called in turn, so that a processor that slows down slows all of them.
    """
    x_BNI, config = torch.randn(1, 1, 8), HyperNetworkConfig(rank=2, a=4, b=4, width=16, layers=1)
    plain, *adapted = (nn.Linear(8, 8, bias=False) for _ in range(3))
    targets = [Target(name, 8, 8) for name in WAYS]
    layers = AdaptedLayers(HyperNetwork(config, targets, (3,), 2), [Place(name) for name in WAYS])
    with torch.inference_mode(), layers.installed(adapted):
        low_rank, _ = layers.fold(torch.randn(1, 2, 4, 4), 1.0, torch.float32)
        layers.give([low_rank, Merged(adapted[1].weight.t()[None].contiguous(), None)])
        ways = dict(zip(("plain", *WAYS), (plain, *adapted), strict=True))
        return least({name: partial(module, x_BNI) for name, module in ways.items()})


def least(ways: Mapping[str, Callable[[], Tensor]], calls: int = 1000, rounds: int = 40) -> dict[str, float]:
    """Returns the microseconds of a call of each way in its fastest of several rounds."""
    taken = dict.fromkeys(ways, math.inf)
    for _, (name, call) in product(range(rounds), ways.items()):
        started = time.process_time()
        for _ in range(calls):
            call()
        taken[name] = min(taken[name], 1e6 * (time.process_time() - started) / calls)
    return taken


def main(options: Options) -> dict[str, Any]:
    """Measures, prints a table, writes the file and returns the figures."""
    results: dict[str, Any] = {
        "setting": environment(CPU, ("diffusers",)),
        "operators": forwards() | generations(),
        "microseconds": microseconds(),
    }
    save_json(results, options.out / "launches.json")
    rows: list[tuple[Literal["operators", "microseconds"], str]] = [
        ("operators", "operators of"), ("microseconds", "us of a layer's call,")
    ]  # fmt: skip
    print("| | |\n|---|---|")
    for key, words in rows:
        for name, value in results[key].items():
            print(f"| {words} {name} | {round(value, 1):g} |")
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(tyro.cli(Options))
