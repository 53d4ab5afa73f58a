"""The prompt in image files as ComfyUI, its popular savers and AUTOMATIC1111's web UI write them."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from hyperalign.cli.common.image_prompt import embedded_prompt
from hyperalign.cli.common.parameters import prompt_of
from hyperalign.cli.common.prompts import find_prompts
from hyperalign.errors import HyperAlignError

TEXT = "ein Füchslein 🦊 in „snow“,\nlines"
SETTINGS = "Steps: 20, Sampler: euler, CFG scale: 7, Seed: 1, Size: 64x64"
PARAMETERS = f"{TEXT}\nNegative prompt: blurry,\nugly\n{SETTINGS}"
DESCRIPTION, MAKE, MODEL, COMMENT, EXIF = 0x010E, 0x010F, 0x0110, 0x9286, 0x8769


def graph(text: Any = TEXT, kind: str = "ControlNetApplyAdvanced") -> dict[str, Any]:
    """A graph whose conditioning goes through a pair."""
    nodes: dict[str, tuple[str, dict[str, Any]]] = {
        "2": ("CLIPTextEncode", {"text": text}),
        "3": ("CLIPTextEncode", {"text": "blurry"}),
        "7": (kind, {"positive": ["2", 0], "negative": ["3", 0]}),
        "4": ("KSampler", {"positive": ["7", 0], "negative": ["7", 1]}),
    }
    return {key: {"class_type": kind, "inputs": inputs} for key, (kind, inputs) in nodes.items()}


UNKNOWN = graph(["8", 0])


def png(path: Path, **texts: Any) -> Path:
    info = PngInfo()
    for name, value in texts.items():
        info.add_text(name, value if isinstance(value, str) else json.dumps(value))
    Image.new("RGB", (4, 4)).save(path, pnginfo=info)
    return path


def with_exif(path: Path, comment: Any = None, **tags: Any) -> Path:
    exif = Image.Exif()
    for name, value in tags.items():
        exif[globals()[name]] = value
    if comment is not None:
        exif.get_ifd(EXIF)[COMMENT] = comment
    Image.new("RGB", (4, 4)).save(path, exif=exif)
    return path


def user_comment(text: str, code: str = "utf-16-be") -> bytes:
    return b"UNICODE\0" + text.encode(code)


def both(**more: Any) -> str:
    return json.dumps({"prompt": graph(), "workflow": {"nodes": []}, **more})


@pytest.mark.parametrize("ending", ["webp", "jpg"])
@pytest.mark.parametrize(
    ("comment", "tags"),
    [
        (None, {"MODEL": f"prompt:{json.dumps(graph())}", "MAKE": 'workflow:{"nodes": []}'}),
        (None, {"MAKE": f"Prompt:{json.dumps(graph())}", "DESCRIPTION": 'Workflow:{"nodes": []}{"a": 1}'}),
        (None, {"MAKE": f"Prompt: {json.dumps(graph(), ensure_ascii=False)}".encode()}),
        (both(), {}),
        (b"ASCII\0\0\0" + both().encode(), {}),
        (user_comment(both()), {}),
        (bytes(8) + json.dumps({"prompt": json.dumps(graph())}).encode(), {}),
        (user_comment(PARAMETERS), {}),
        (user_comment(PARAMETERS, "utf-16-le"), {}),
        (user_comment(PARAMETERS), {"DESCRIPTION": 'Workflow:{"nodes": []}'}),
        (None, {"DESCRIPTION": json.dumps({"parameters": PARAMETERS})}),
    ],
    ids=["ComfyUI", "WAS", "UTF-8", "text", "ASCII", "UNICODE", "JSON in JSON", "A1111", "LE", "KJ", "JSON"],
)
def test_exif_of_webp_and_jpeg(tmp_path: Path, ending: str, comment: Any, tags: dict[str, Any]) -> None:
    found = embedded_prompt(with_exif(tmp_path / f"a.{ending}", comment, **tags))
    assert found.text == TEXT, found


def test_png_texts(tmp_path: Path) -> None:
    for texts in (
        {"prompt": graph()},
        {"parameters": PARAMETERS},
        {"prompt": UNKNOWN, "parameters": PARAMETERS},
    ):
        assert embedded_prompt(png(tmp_path / "a.png", **texts)).text == TEXT
    other = png(tmp_path / "b.png", prompt=graph(), parameters=f"unknown\n{SETTINGS}")
    assert embedded_prompt(other).text == TEXT, "the graph goes before what a saver was told"
    assert "has no prompt" in embedded_prompt(png(tmp_path / "c.png")).why


def test_an_animated_png_of_comfyui(tmp_path: Path) -> None:
    """Its texts stand in chunks of their own, behind the pixels of the first frame."""
    path = png(tmp_path / "a.png")
    body, kind = b"prompt\0" + json.dumps(graph()).encode("latin-1"), b"comf"
    chunk = struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    data = path.read_bytes()
    path.write_bytes(data[:-12] + chunk + data[-12:])
    assert embedded_prompt(path).text == TEXT


def test_the_page_s_graph_names_the_outputs_of_packs_also_in_subgraphs(tmp_path: Path) -> None:
    prompt = {f"5:{key}" if key == "7" else key: value for key, value in graph(kind="Styler").items()}
    prompt["4"]["inputs"] |= {"positive": ["5:7", 0], "negative": ["5:7", 1]}
    outputs = [{"name": name, "type": "CONDITIONING"} for name in ("positive", "negative")]
    inner = {"id": "abc", "nodes": [{"id": 7, "type": "Styler", "outputs": outputs}]}
    workflow = {"nodes": [{"id": 5, "type": "abc"}], "definitions": {"subgraphs": [inner]}}
    assert "Styler (#5:7)" in embedded_prompt(png(tmp_path / "a.png", prompt=prompt)).why
    assert embedded_prompt(png(tmp_path / "a.png", prompt=prompt, workflow=workflow)).text == TEXT


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ({"prompt": UNKNOWN}, "takes text from #8, which is missing"),
        ({"workflow": {"nodes": []}}, "ComfyUI's workflow only"),
        ({"parameters": TEXT}, "no line that starts with 'Steps: '"),
        ({"prompt": "[1, 2"}, "its metadata has no prompt"),
        ({"prompt": "[" * 100_000}, "its metadata has no prompt"),
    ],
)
def test_files_without_one_prompt_say_why(tmp_path: Path, texts: dict[str, Any], said: str) -> None:
    found = embedded_prompt(png(tmp_path / "a.png", **texts))
    assert found.text is None
    assert said in found.why


def test_declarations_of_subgraphs_that_use_each_other_twice_are_not_opened_for_ever(tmp_path: Path) -> None:
    subgraphs = [
        {"id": f"s{n}", "nodes": [{"id": i, "type": f"s{n + 1}"} for i in (1, 2)]} for n in range(40)
    ]
    workflow = {"nodes": [{"id": 5, "type": "s0"}], "definitions": {"subgraphs": subgraphs}}
    assert embedded_prompt(png(tmp_path / "a.png", prompt=graph(), workflow=workflow)).text == TEXT


def test_two_prompts_in_one_file_are_refused(tmp_path: Path) -> None:
    tags = {"MODEL": f"prompt:{json.dumps(graph())}", "MAKE": f"Prompt:{json.dumps(graph('else'))}"}
    assert "two graphs" in embedded_prompt(with_exif(tmp_path / "a.webp", **tags)).why


def test_the_scorer_names_the_image_and_the_node(tmp_path: Path) -> None:
    png(tmp_path / "a.png", prompt=graph())
    png(tmp_path / "b.png", prompt=UNKNOWN | {"8": {"class_type": "Ollama", "inputs": {}}})
    (tmp_path / "c.png").write_bytes(b"no image")
    assert find_prompts(tmp_path, ["a.png"], "comfyui") == [TEXT]
    with pytest.raises(
        HyperAlignError, match=r"1 of them.*b\.png \(it goes through Ollama \(#8\).*c\.png \(it c"
    ):
        find_prompts(tmp_path, ["a.png", "b.png", "c.png"], "comfyui")


# --- parameters


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        (f"a\nb\nNegative prompt: c\n{SETTINGS}", "a\nb"),
        (f"a\r\nb\r\nNegative prompt: c\r\n{SETTINGS}", "a\nb"),
        (f"a\n{SETTINGS}\nTemplate: b", "a"),
        (f"a\nNegative prompt: c\nSteps: d\n{SETTINGS}", "a"),
        (f"\nNegative prompt: c\n{SETTINGS}", ""),
        (f"a\nNegative prompt: b\nNegative prompt: c\n{SETTINGS}", None),
        (f"a\nSteps: b\n{SETTINGS}", None),
        (f"a\nSteps: b\nNegative prompt: c\n{SETTINGS}", None),
        ("a\nNegative prompt: c", None),
        (f"unknown\nNegative prompt: unknown\n{SETTINGS}", None),
    ],
)
def test_the_prompt_in_parameters(text: str, prompt: str | None) -> None:
    found = prompt_of(text)
    assert found.text == prompt
    assert (found.text is None) == bool(found.why)


LINES = st.lists(st.sampled_from(["a", "", "Steps: 1", "Negative prompt: b", "Negative prompt:"]), max_size=3)


@given(LINES, LINES)
def test_the_negative_part_of_parameters_is_never_the_prompt(
    positive: list[str], negative: list[str]
) -> None:
    written = "\n".join([*positive, "Negative prompt: no", *negative, SETTINGS])
    assert "no" not in (prompt_of(written).text or "").split()
