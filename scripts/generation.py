"""Generates the demo's images: runs the shipped workflow in ComfyUI once per prompt, seed and method."""

from __future__ import annotations

import random
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hyperalign.cli.sample.client import ComfyClient
from hyperalign.cli.sample.convert import Graph, read, upstream
from hyperalign.cli.sample.files import Event, ObjectInfo, Prompt, load
from hyperalign.tiny.prompts import FAMILIES, Content, sample_prompt
from scripts.common import ROOT, ScriptError
from scripts.host import Server

WORKFLOW = ROOT / "example_workflows" / "base_versus_aligned.json"
BASE = "base"
HYPERNETWORKS = {
    "static": "tiny_static.safetensors",
    "hyperalign-i": "tiny_i.safetensors",
    "hyperalign-p": "tiny_p.safetensors",
    "hyperalign-s": "tiny_s.safetensors",
}
METHODS = (BASE, *HYPERNETWORKS)
SEEDS = (1, 2)
ALIGNING_NODES = ("HyperAlignApply", "HyperAlignSampler")
RUN_LINE = re.compile(r"HyperAlign run: variant=(\w) .*?\bgenerations=(\d+)")


@dataclass(frozen=True)
class Request:
    """A prompt with what an image of it must show."""

    prompt: str
    content: Content


@dataclass(frozen=True)
class GeneratedImage:
    """One image; `seconds` is the time from text to file, `generations` the reported weight generations."""

    request: Request
    seed: int
    method: str
    path: Path
    seconds: float
    generations: int


@dataclass(frozen=True)
class Demo:
    """All images of a demo, and the settings of their runs."""

    images: list[GeneratedImage]
    steps: int
    cfg: float
    host: dict[str, str]


@dataclass(frozen=True)
class Branch:
    """The node ids of one of the workflow's two branches, each from a sampler to a saved image."""

    sampler: str
    save: str


@dataclass(frozen=True)
class DemoGraph:
    """The workflow with the nodes that the demo sets."""

    graph: Graph
    base: Branch
    aligned: Branch
    text: str
    loader: str

    def variation(self, request: Request, seed: int, method: str) -> Graph:
        """Returns the workflow set to one prompt, seed and method."""
        changes: dict[tuple[str, str], Any] = {
            (self.text, "text"): request.prompt,
            (self.base.sampler, "seed"): seed,
            (self.aligned.sampler, "seed"): seed,
        }
        if method != BASE:
            changes[self.loader, "hypernetwork"] = HYPERNETWORKS[method]
        return self.graph.with_values(changes)


def choose_prompts(per_family: int) -> list[Request]:
    """Returns the demo's validation prompts: always the same ones, each once."""
    rng = random.Random(7)
    chosen: dict[str, Request] = {}
    for number, family in enumerate(FAMILIES, start=1):
        while len(chosen) < number * per_family:
            prompt, content = sample_prompt(rng, "test", family)
            chosen[prompt] = Request(prompt, content)
    return list(chosen.values())


def read_graph(info: ObjectInfo) -> DemoGraph:
    """Reads the shipped workflow and finds the nodes that the demo sets.

    Raises:
        ScriptError: one of those nodes is missing.
        HyperAlignError: the file is missing, or the server lacks one of its nodes.
    """
    graph = read(load(WORKFLOW), info)
    prompt = graph.prompt
    branches: dict[bool, Branch] = {}
    for save in _nodes_of(prompt, "SaveImage"):
        behind = list(upstream(prompt, save))
        samplers = [node for node in behind if "seed" in prompt[node]["inputs"]]
        aligned = any(prompt[node]["class_type"] in ALIGNING_NODES for node in behind)
        if samplers:
            branches.setdefault(aligned, Branch(samplers[0], save))
    loaders = _nodes_of(prompt, "HyperAlignLoader")
    if set(branches) != {False, True} or not loaders:
        raise ScriptError(
            f"{WORKFLOW} must save an image of the base and one of an aligned model: take the shipped file."
        )
    positive = prompt[branches[False].sampler]["inputs"]["positive"][0]
    text = next(node for node in upstream(prompt, positive) if "text" in prompt[node]["inputs"])
    return DemoGraph(graph, branches[False], branches[True], text, loaders[0])


def _nodes_of(prompt: Prompt, kind: str) -> list[str]:
    return [node for node, content in prompt.items() if content["class_type"] == kind]


def generate_all(server: Server, client: ComfyClient, requests: Sequence[Request], output: Path) -> Demo:
    """Generates every request's images with every seed and method.

    Raises:
        ScriptError: the workflow does not fit, or the pack reported no run.
        ComfyError: the server refused or failed.
    """
    graph = read_graph(client.object_info())
    folder = output / "images"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    images: list[GeneratedImage] = []
    # Method by method, so that ComfyUI loads each hypernetwork once.
    jobs = [(n, r, s, m) for m in METHODS for n, r in enumerate(requests, start=1) for s in SEEDS]
    often = 0.2 if sys.stderr.isatty() else 10.0
    for number, request, seed, method in tqdm(jobs, desc="Generating", unit="image", mininterval=often):
        path = folder / f"{number:02d}_seed{seed}_{method}.png"
        images.append(_generate(server, client, graph, request, seed, method, path))
    sampler = graph.graph.prompt[graph.base.sampler]["inputs"]
    return Demo(images, int(sampler["steps"]), float(sampler["cfg"]), _host(client))


def _generate(
    server: Server,
    client: ComfyClient,
    graph: DemoGraph,
    request: Request,
    seed: int,
    method: str,
    path: Path,
) -> GeneratedImage:
    """Runs the workflow's branch of one method and keeps the image, workflow embedded, at `path`."""
    branch = graph.base if method == BASE else graph.aligned
    variation = graph.variation(request, seed, method)
    logged_before = len(server.log())
    result = client.run(variation.prompt, _alive(server), variation.workflow, [branch.save])
    images = result.outputs[branch.save]["images"]
    path.write_bytes(client.image(images[0]))
    generations = 0 if method == BASE else _generations(server.log()[logged_before:])
    return GeneratedImage(request, seed, method, path, result.seconds / len(images), generations)


def _alive(server: Server) -> Callable[[Event], None]:
    def check(_event: Event) -> None:
        server.check_alive()

    return check


def _generations(log: str) -> int:
    lines = RUN_LINE.findall(log)
    if not lines:
        raise ScriptError("The server's log has no HyperAlign run; the workflow must use this pack's nodes.")
    return int(lines[-1][1])


def _host(client: ComfyClient) -> dict[str, str]:
    stats = client.get("/system_stats")
    system, device = stats["system"], stats["devices"][0]
    return {
        "comfyui": system["comfyui_version"],
        "torch": system["pytorch_version"],
        "device": device["name"],
    }
