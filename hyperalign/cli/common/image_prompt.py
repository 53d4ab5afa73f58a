"""The prompt in the metadata of an image from ComfyUI, its savers and AUTOMATIC1111's web UI."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, cast

from PIL import Image, PngImagePlugin

from ...image_files import DECODING_ERRORS
from .graphs.graph import Output
from .graphs.prompt import Found, positive_prompt
from .parameters import is_parameters, prompt_of

EXIF_IFD = 0x8769
MOST_NODES = 10_000
"""A few subgraphs that use each other twice are millions of nodes."""
JSON_KEYS = ("prompt", "workflow")
CODES = {b"ASCII\0\0\0": ("utf-8",), b"UNICODE\0": ("utf-16-be", "utf-16-le"), bytes(8): ("utf-8",)}
"""The encodings of EXIF's UserComment by its first eight bytes; UNICODE does not say the order of bytes."""


@dataclass(slots=True)
class Metadata:
    """What the texts in a file say about how it was made."""

    prompts: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """Graphs as the server ran them."""
    workflow: dict[str, Any] = field(default_factory=dict[str, Any])
    """The page's graph, empty without one."""
    parameters: list[str] = field(default_factory=list[str])

    def add(self, name: str, text: str) -> None:
        """Adds a text that a file stores under a name."""
        if name in JSON_KEYS:
            self._add_json(name, text)
            return
        head, colon, rest = text.partition(":")
        if colon and head.lower() in JSON_KEYS and rest.lstrip().startswith("{"):
            self._add_json(head.lower(), rest)
        elif text.lstrip().startswith("{"):
            for key, value in _object(text).items():
                self._add_value(key, value)
        elif name == "parameters" or is_parameters(text):
            self.parameters.append(text)

    def _add_value(self, key: str, value: Any) -> None:
        if isinstance(value, str) and key in (*JSON_KEYS, "parameters"):
            self.add(key, value)
        elif isinstance(value, dict):
            self._add_graph(key, cast("dict[str, Any]", value))

    def _add_json(self, key: str, text: str) -> None:
        self._add_graph(key, _object(text))

    def _add_graph(self, key: str, graph: dict[str, Any]) -> None:
        if key == "prompt" and graph and graph not in self.prompts:
            self.prompts.append(graph)
        elif key == "workflow":
            self.workflow = self.workflow or graph


def embedded_prompt(path: Path) -> Found:
    """Returns the positive prompt in an image's metadata, or why there is none.

    The graph goes before `parameters`, which the node that saves the image takes from whatever is linked
    to it; they count where the graph does not say the prompt.
    """
    try:
        with Image.open(path) as opened:
            found = _read(opened)
    except DECODING_ERRORS as error:
        return Found(None, f"it cannot be decoded ({type(error).__name__})")
    try:
        return _prompt_in(found)
    except RecursionError:
        return Found(None, "its metadata has too many lists in lists")


def _prompt_in(found: Metadata) -> Found:
    outputs = declared_outputs(found.workflow)
    answers = [positive_prompt(prompt, outputs) for prompt in found.prompts]
    if len(texts := {answer.text for answer in answers} - {None}) > 1:
        return Found(None, "its metadata has two graphs with different prompts")
    if texts:
        return Found(texts.pop())
    answers += [prompt_of(text) for text in dict.fromkeys(found.parameters)]
    if len(texts := {answer.text for answer in answers} - {None}) > 1:
        return Found(None, "its metadata has two parameters with different prompts")
    if texts:
        return Found(texts.pop())
    if not answers and found.workflow:
        return Found(None, "its metadata has ComfyUI's workflow only, not the prompt that was run")
    return answers[0] if answers else Found(None, "its metadata has no prompt")


def declared_outputs(workflow: Mapping[str, Any]) -> dict[str, list[Output]]:
    """Returns the outputs by node of a graph as the page saves it; in subgraphs, ids are like `12:3`."""
    definitions = cast("Any", workflow.get("definitions"))
    subgraphs = definitions.get("subgraphs") if isinstance(definitions, dict) else None
    inner = {one["id"]: one for one in _objects(subgraphs) if isinstance(one.get("id"), str)}
    return dict(islice(_declared(workflow, inner, "", ()), MOST_NODES))


def _declared(
    graph: Mapping[str, Any], inner: Mapping[str, Mapping[str, Any]], prefix: str, around: tuple[str, ...]
) -> Iterator[tuple[str, list[Output]]]:
    for node in _objects(graph.get("nodes")):
        key, kind = f"{prefix}{node.get('id')}", str(node.get("type"))
        if kind in inner and kind not in around:
            yield from _declared(inner[kind], inner, f"{key}:", (*around, kind))
        outputs = _objects(node.get("outputs"))
        yield key, [Output(str(one.get("type")), str(one.get("name", ""))) for one in outputs]


def _objects(values: Any) -> list[dict[str, Any]]:
    items = cast("list[Any]", values) if isinstance(values, list) else []
    return [cast("dict[str, Any]", item) for item in items if isinstance(item, dict)]


def _read(image: Image.Image) -> Metadata:
    found = Metadata()
    for name, text in _texts(image):
        found.add(name, text)
    return found


def _texts(image: Image.Image) -> Iterator[tuple[str, str]]:
    """Yields the texts in an image's metadata with their names. Raises as Pillow's decoders."""
    if isinstance(image, PngImagePlugin.PngImageFile):
        info = cast("dict[Any, Any]", image.info)
        before = {str(name): text for name, text in info.items() if isinstance(text, str)}
        yield from before.items()
        if before.keys() & {"prompt", "parameters"}:
            return
        image.load()  # texts may also stand behind the pixels
        yield from ((name, str(text)) for name, text in image.text.items())
        for kind, data, *_ in image.private_chunks:
            name, zero, text = data.partition(b"\0")
            if kind == b"comf" and zero:  # of Save Animated PNG
                yield name.decode("latin-1"), text.decode("latin-1")
    exif = image.getexif()
    for value in (*exif.values(), *exif.get_ifd(EXIF_IFD).values(), image.info.get("comment")):
        for text in _decoded(value):
            yield "", text


def _decoded(value: Any) -> Iterator[str]:
    """Yields what a value of EXIF may say as text."""
    if isinstance(value, str):
        value = value.encode("latin-1", "replace")  # as Pillow has decoded it, whatever it is
    if not isinstance(value, bytes):
        return
    codes = CODES.get(value[:8])
    text = value[8:] if codes else value
    for code in codes or ("utf-8",):
        try:
            yield text.decode(code).strip("\0\ufeff")
        except UnicodeDecodeError:
            if code == "utf-8":
                yield text.decode("latin-1").strip("\0")


def _object(text: str) -> dict[str, Any]:
    """Returns the JSON object at the start of a text, an empty one without it."""
    try:
        value, _ = json.JSONDecoder().raw_decode(text.strip())
    except (ValueError, RecursionError):
        return {}
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}
