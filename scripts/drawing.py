"""Draws the demo's pictures by running the shipped workflow in ComfyUI, once per prompt, seed and method."""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hyperalign.tiny.prompts import FAMILIES, Content, sample_prompt
from scripts.comfy_client import ComfyClient, Event, Prompt, Result
from scripts.common import ROOT, ScriptError
from scripts.host import Server
from scripts.workflow import ObjectInfo, Workflow, load, to_prompt, upstream, widget_names, with_values

WORKFLOW = ROOT / "example_workflows" / "base_versus_aligned.json"
BASE = "base"
HYPERNETWORKS = {
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
    """A prompt with what a picture of it must show."""

    prompt: str
    content: Content


@dataclass(frozen=True)
class Picture:
    """One drawn picture; `seconds` is its sampling time, `generations` what the pack reported."""

    request: Request
    seed: int
    method: str
    path: Path
    seconds: float
    generations: int


@dataclass(frozen=True)
class Drawing:
    """All pictures of a demo, and the settings they were drawn with."""

    pictures: list[Picture]
    steps: int
    cfg: float
    host: dict[str, str]


@dataclass(frozen=True)
class Branch:
    """One of the workflow's two ways from a sampler to a saved picture; node ids."""

    sampler: str
    save: str


@dataclass(frozen=True)
class Graph:
    """The workflow with the nodes that the demo sets."""

    workflow: Workflow
    info: ObjectInfo
    base: Branch
    aligned: Branch
    text: str
    loader: str
    prompt: Prompt

    def variation(self, request: Request, seed: int, method: str) -> Workflow:
        """Returns the workflow set to one prompt, seed and hypernetwork."""
        file_widget = widget_names(self.info["HyperAlignLoader"])[0] or ""
        changes: dict[tuple[str, str], Any] = {
            (self.text, "text"): request.prompt,
            (self.base.sampler, "seed"): seed,
            (self.aligned.sampler, "seed"): seed,
            (self.aligned.save, "filename_prefix"): method,
            (self.loader, file_widget): HYPERNETWORKS[method],
        }
        return with_values(self.workflow, self.info, changes)


def choose_prompts(per_family: int) -> list[Request]:
    """Returns the demo's held-out prompts: always the same ones, each once."""
    rng = random.Random(7)
    chosen: dict[str, Request] = {}
    for number, family in enumerate(FAMILIES, start=1):
        while len(chosen) < number * per_family:
            prompt, content = sample_prompt(rng, "test", family)
            chosen[prompt] = Request(prompt, content)
    return list(chosen.values())


def read_graph(info: ObjectInfo) -> Graph:
    """Reads the shipped workflow and finds the nodes that the demo sets.

    Raises:
        ScriptError: the file or one of those nodes is missing.
    """
    workflow = load(WORKFLOW)
    prompt = to_prompt(workflow, info)
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
            f"{WORKFLOW} must save a picture of the base and one of an aligned model: take the shipped file."
        )
    positive = prompt[branches[False].sampler]["inputs"]["positive"][0]
    text = next(node for node in upstream(prompt, positive) if "text" in prompt[node]["inputs"])
    return Graph(workflow, info, branches[False], branches[True], text, loaders[0], prompt)


def _nodes_of(prompt: Prompt, kind: str) -> list[str]:
    return [node for node, content in prompt.items() if content["class_type"] == kind]


def draw_all(server: Server, client: ComfyClient, requests: Sequence[Request], output: Path) -> Drawing:
    """Draws every request with every seed and method.

    Raises:
        ScriptError: the workflow does not fit, or the pack reported no run.
        ComfyError: the server refused or failed.
    """
    graph = read_graph(client.object_info())
    folder = output / "images"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    pictures: list[Picture] = []
    total = len(requests) * len(SEEDS) * len(METHODS)
    with tqdm(total=total, desc="Drawing", unit="picture", smoothing=0.1) as progress:
        for number, request in enumerate(requests, start=1):
            for seed in SEEDS:
                drawn = _draw(server, client, graph, request, seed)
                for method, (data, seconds, generations) in drawn.items():
                    path = folder / f"{number:02d}_seed{seed}_{method}.png"
                    path.write_bytes(data)
                    pictures.append(Picture(request, seed, method, path, seconds, generations))
                progress.update(len(drawn))
    sampler = graph.prompt[graph.base.sampler]["inputs"]
    return Drawing(pictures, int(sampler["steps"]), float(sampler["cfg"]), _host(server))


def _draw(
    server: Server, client: ComfyClient, graph: Graph, request: Request, seed: int
) -> dict[str, tuple[bytes, float, int]]:
    """Returns per method the picture's file, its sampling seconds and its generations.

    The base branch is the same in all three runs: ComfyUI draws it in the first and remembers it.
    """
    drawn: dict[str, tuple[bytes, float, int]] = {}
    for method in HYPERNETWORKS:
        workflow = graph.variation(request, seed, method)
        said_before = len(server.log())
        result = client.run(to_prompt(workflow, graph.info), _alive(server), workflow)
        if BASE not in drawn:
            drawn[BASE] = (*_picture(client, result, graph.base), 0)
        drawn[method] = (*_picture(client, result, graph.aligned), _generations(server.log()[said_before:]))
    return drawn


def _alive(server: Server) -> Any:
    def check(_event: Event) -> None:
        server.check_alive()

    return check


def _picture(client: ComfyClient, result: Result, branch: Branch) -> tuple[bytes, float]:
    images = result.outputs[branch.save]["images"]
    return client.image(images[0]), result.seconds[branch.sampler] / len(images)


def _generations(said: str) -> int:
    lines = RUN_LINE.findall(said)
    if not lines:
        raise ScriptError("The pack reported no HyperAlign run in the server's log, so it was not at work.")
    return int(lines[-1][1])


def _host(server: Server) -> dict[str, str]:
    stats = server.system_stats()
    system, device = stats["system"], stats["devices"][0]
    return {
        "comfyui": system["comfyui_version"],
        "torch": system["pytorch_version"],
        "device": device["name"],
    }
