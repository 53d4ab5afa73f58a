"""Workflow files of both formats, and graphs in images, with any damage."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from fuzzing import Case, damaged, fuzzed, json_texts
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from hyperalign.cli.common.prompts import find_prompts
from hyperalign.cli.sample.convert import read
from hyperalign.cli.sample.files import load
from hyperalign.cli.sample.settings import changes_of, describe

TEXT = ["STRING", {"multiline": True}]
PAIR = {"positive": ["CONDITIONING"], "negative": ["CONDITIONING"]}
INFO: dict[str, Any] = {
    "CLIPTextEncode": {"input": {"required": {"text": TEXT, "clip": ["CLIP"]}}, "output": ["CONDITIONING"]},
    "CheckpointLoaderSimple": {
        "input": {"required": {"ckpt_name": [["a", "b"]]}}, "output": ["MODEL", "CLIP"],
    },
    "KSampler": {
        "input": {
            "required": {
                "model": ["MODEL"],
                "seed": ["INT", {"control_after_generate": True, "min": 0, "max": 2**64 - 1}],
                "cfg": ["FLOAT", {"min": 0.0, "max": 100.0}],
                "sampler_name": [["euler", "heun"]],
                **PAIR,
            }
        },
        "output": ["LATENT"],
    },
    "SaveImage": {
        "input": {"required": {"images": ["IMAGE"], "filename_prefix": ["STRING", {}]}},
        "output": [],
        "output_node": True,
    },
    "StringConcatenate": {
        "input": {"required": {"string_a": TEXT, "string_b": TEXT, "delimiter": ["STRING", {}]}},
        "output": ["STRING"],
    },
    "LoadImage": {"input": {"required": {"image": [["x.png"], {"image_upload": True}]}}, "output": ["IMAGE"]},
    "Chooser": {
        "input": {
            "required": {
                "mode": [
                    "COMFY_DYNAMICCOMBO_V3",
                    {"options": [{"key": "ramp", "inputs": {"required": {"start": ["FLOAT", {}]}}}]},
                ]
            }
        },
        "output": ["FLOAT"],
    },
}  # fmt: skip


def node(number: int, kind: str, values: Any, links: dict[str, int | None], **more: Any) -> dict[str, Any]:
    sockets = [
        {"name": name, "type": "*", "link": link, "widget": {"name": name}} for name, link in links.items()
    ]
    outputs = [{"type": kind, "links": []} for kind in INFO.get(kind, {}).get("output", ["*"])]
    return {
        "id": number, "type": kind, "mode": 0, "title": kind, "widgets_values": values, "inputs": sockets,
        "outputs": outputs, "properties": {},
    } | more  # fmt: skip


SUBGRAPH = {
    "id": "sub", "name": "Encode", "inputs": [{"name": "clip"}, {"name": "text"}],
    "outputs": [{"name": "CONDITIONING"}],
    "nodes": [
        node(1, "CLIPTextEncode", ["inside"], {"clip": 1, "text": 2}),
        node(2, "SetNode", ["name"], {"*": 4}),
        node(3, "CLIPTextEncode", [""], {"clip": None, "text": None}, mode=4),
    ],
    "links": [
        {"id": 1, "origin_id": -10, "origin_slot": 0, "target_id": 1, "target_slot": 0, "type": "CLIP"},
        {"id": 2, "origin_id": -10, "origin_slot": 1, "target_id": 1, "target_slot": 1, "type": "STRING"},
        {"id": 3, "origin_id": 1, "origin_slot": 0, "target_id": -20, "target_slot": 0, "type": "*"},
        [4, 1, 0, 2, 0, "*"],
    ],
}  # fmt: skip
PAGE: dict[str, Any] = {
    "nodes": [
        node(1, "CheckpointLoaderSimple", ["a"], {}),
        node(2, "sub", ["a cat"], {"clip": 1, "text": 0}, properties={"proxyWidgets": [["-1", "text"]]}),
        node(3, "CLIPTextEncode", ["blurry"], {"clip": 2}),
        node(4, "KSampler", [5, "fixed", 4, "euler"], {"model": 3, "positive": 4, "negative": 5, "seed": 6}),
        node(5, "SaveImage", ["out"], {"images": 7}),
        node(6, "PrimitiveNode", [7, "fixed"], {}),
        node(7, "Reroute", None, {"": 8}),
        node(8, "SetNode", ["m"], {"": 9}),
        node(9, "GetNode", {"Constant": "m"}, {}),
        node(10, "StringConcatenate", ["a", "b", " "], {}),
        node(11, "Chooser", ["ramp", 0.5], {}, mode=2),
        node(12, "LoadImage", {"image": "x.png"}, {}, properties={"ue_properties": {}, "cnr_id": "core"}),
    ],
    "links": [
        [0, 10, 0, 2, 1, "STRING"], [1, 1, 1, 2, 0, "CLIP"], [2, 1, 1, 3, 0, "CLIP"], 
        [3, 9, 0, 4, 0, "MODEL"], [4, 2, 0, 4, 1, "CONDITIONING"], [5, 3, 0, 4, 2, "CONDITIONING"],
        [6, 6, 0, 4, 3, "INT"],
        [7, 7, 0, 5, 0, "LATENT"], [8, 4, 0, 7, 0, "LATENT"], [9, 1, 0, 8, 0, "MODEL"],
    ],
    "definitions": {"subgraphs": [SUBGRAPH]},
}  # fmt: skip
API = read(PAGE, INFO).prompt
SETTINGS = st.sampled_from(
    ["prompt=a dog", "negative=ugly", "seed=random", "cfg=3", "*.text=x", "#4.seed=2", "Encode.text=y",
     "sampler_name=heun", "image=none.png", "mode=ramp", "text=z", "nothing=1", "=", ""]
)  # fmt: skip


def use(path: Path, setting: str) -> None:
    """Does with a workflow what `sample` does before it sends it."""
    graph = read(load(path), INFO)
    changes = changes_of(graph, INFO, setting)
    describe(graph, changes)
    changed = graph.with_values(changes)
    json.dumps(changed.prompt), json.dumps(changed.workflow)


@fuzzed()
@given(st.sampled_from([PAGE, API]).flatmap(json_texts), SETTINGS)
def test_any_workflow_is_read_or_refused(case: Case, text: str, setting: str) -> None:
    case.check("case.json", text.encode("utf-8", "surrogatepass"), lambda path: use(path, setting))


def image(ending: str, name: str, text: str) -> bytes:
    """An image with a text in its metadata; EXIF holds less than 64 KiB."""
    stream, empty = io.BytesIO(), Image.new("RGB", (4, 4))
    if ending == "png":
        info = PngInfo()
        info.add_text(name, text.encode("utf-8", "replace").decode(), zip=len(text) > 500)
        empty.save(stream, "PNG", pnginfo=info)
    else:
        exif = Image.Exif()
        exif[0x010F] = f"{name}:{text}"[:60_000].encode("utf-8", "replace")
        empty.save(stream, {"webp": "WEBP", "jpg": "JPEG"}[ending], exif=exif)
    return stream.getvalue()


@st.composite
def images(draw: st.DrawFn) -> tuple[str, bytes]:
    ending, name = (
        draw(st.sampled_from(["png", "webp", "jpg"])),
        draw(st.sampled_from(["prompt", "workflow"])),
    )
    text = draw(json_texts(API if name == "prompt" else PAGE))
    content = image(ending, name, text)
    return ending, draw(damaged(content)) if draw(st.booleans()) else content


@fuzzed()
@given(images())
def test_any_image_has_a_prompt_or_is_named_with_the_reason(case: Case, drawn: tuple[str, bytes]) -> None:
    ending, content = drawn
    case.check(f"a.{ending}", content, lambda path: find_prompts(path.parent, [path.name], "comfyui"))
    (case.folder / f"a.{ending}").unlink()
