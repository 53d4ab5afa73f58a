"""Downloads the two emoji art sets from the npm registry and renders them to sprites.

Noto Emoji is Apache-2.0, Fluent Emoji Flat is MIT. The art is downloaded at build time and stays
outside version control.
"""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import resvg_py
from PIL import Image

from hyperalign.files import write_bytes
from hyperalign.tiny.prompts import COLORS, SHAPES, THINGS

Style = Literal["noto", "fluent"]
STYLES: tuple[Style, ...] = ("noto", "fluent")
PACKAGES: dict[Style, str] = {
    "noto": "@iconify-json/noto@1.2.9",
    "fluent": "@iconify-json/fluent-emoji-flat@1.2.6",
}
SPRITE_SIZES = tuple(range(18, 45, 2))
ICON_OF_THING = {
    "dog": "dog-face", "cat": "cat-face", "apple": "red-apple", "tree": "evergreen-tree",
    "car": "automobile", "moon": "crescent-moon", "donut": "doughnut", "pig": "pig-face",
}  # fmt: skip

Sprite = npt.NDArray[np.float32]
"""Height x width x RGBA in [0, 1]."""


@dataclass(frozen=True, slots=True)
class Art:
    """Every sprite by (style, noun, colour, size)."""

    sprites: dict[tuple[Style, str, str | None, int], Sprite]


def icon_name(noun: str, color: str | None) -> str:
    """Returns the icon's name in both art sets."""
    if color is None:
        return ICON_OF_THING.get(noun, noun)
    if noun == "square" and color == "black":
        return "black-large-square"
    return f"{color}-{noun}"


def download_icons(style: Style, cache: Path) -> dict[str, Any]:
    """Downloads one art package with `npm pack` unless it is in `cache`, and returns its icons."""
    target = cache / f"{style}.json"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", "--silent", PACKAGES[style]]
        packed = subprocess.run(command, cwd=cache, check=True, capture_output=True, text=True)
        archive = cache / packed.stdout.strip().splitlines()[-1]
        with tarfile.open(archive) as tar:
            member = tar.extractfile("package/icons.json")
            if member is None:
                raise FileNotFoundError(f"{PACKAGES[style]} holds no package/icons.json")
            write_bytes(target, member.read())
        archive.unlink(missing_ok=True)  # another run may download the same art
    return json.loads(target.read_text(encoding="utf-8"))


def svg_of(icons: dict[str, Any], name: str) -> str:
    """Returns an icon of a package as SVG text."""
    while name in icons.get("aliases", {}):
        name = icons["aliases"][name]["parent"]
    icon = icons["icons"][name]
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}" width="{width}" height="{height}">{icon["body"]}</svg>'
    )


def render_svg(svg: str, size: int) -> Sprite:
    """Returns an SVG as a sprite (size, size, 4)."""
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size))
    rgba = Image.open(io.BytesIO(png)).convert("RGBA").resize((size, size))
    return np.asarray(rgba, dtype=np.float32) / 255.0


def load_art(cache: Path) -> Art:
    """Renders every noun in every style, colour and size (about 1,500 small images)."""
    looks = [(thing, None) for thing in THINGS] + [(s, c) for s in SHAPES for c in COLORS]
    sprites: dict[tuple[Style, str, str | None, int], Sprite] = {}
    for style in STYLES:
        icons = download_icons(style, cache)
        for noun, color in looks:
            svg = svg_of(icons, icon_name(noun, color))
            for size in SPRITE_SIZES:
                sprites[style, noun, color, size] = render_svg(svg, size)
    return Art(sprites)
