"""One image: its bytes become upright RGB, and the dataset's column marks whether it is unsafe."""

from __future__ import annotations

import dataclasses
import io
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hyperalign.errors import HyperAlignError
from train.config import DataConfig, TrainConfig
from train.data.preference import UnsafeFilter
from train.data.preference.dataset import BadImage, ImageFile
from train.data.preference.decoding import DecodedImage, decode
from train.encode import Options, unsafe_filter

RED = (220, 30, 30)


def encoded(colour: tuple[int, ...], kind: str = "JPEG", mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, (16, 12), colour).save(file, kind)
    return file.getvalue()


def test_images_come_upright_and_transparency_turns_white() -> None:
    file = io.BytesIO()
    turned = Image.new("RGB", (20, 10), RED)
    exif = turned.getexif()
    exif[0x0112] = 6  # rotate by 90 degrees to view
    turned.save(file, "JPEG", exif=exif)
    upright = decode(ImageFile("a", file.getvalue(), "a"))
    assert isinstance(upright, DecodedImage)
    assert upright.image.size == (10, 20)
    clear = decode(ImageFile("a", encoded((0, 0, 0, 0), "PNG", "RGBA"), "a"))
    assert isinstance(clear, DecodedImage)
    assert clear.image.getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bits_of_grey_keep_their_brightness() -> None:
    ramp, file = Image.new("I;16", (256, 1)), io.BytesIO()
    for x in range(256):
        ramp.putpixel((x, 0), x * 257)
    ramp.save(file, "PNG")
    found = decode(ImageFile("a", file.getvalue(), "a"))
    assert isinstance(found, DecodedImage)
    assert [found.image.getpixel((x, 0)) for x in (0, 100, 255)] == [(0,) * 3, (100,) * 3, (255,) * 3]


def test_an_image_with_an_empty_caption_is_bad() -> None:
    assert decode(ImageFile(" \n", encoded(RED), "x")) == BadImage("x", "its caption is empty")


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(["JPEG", "PNG", "WEBP", "GIF"]),
    keep=st.floats(0, 1),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6),
)
def test_damaged_bytes_never_end_a_run(kind: str, keep: float, changes: list[tuple[float, int]]) -> None:
    data = bytearray(encoded(RED, kind))
    for place, value in changes:
        data[int(place * len(data))] = value
    found = decode(ImageFile("a", bytes(data[: int(keep * len(data))]), "a"))
    assert isinstance(found, DecodedImage | BadImage)


@pytest.mark.parametrize("mark", [True, 1, 0.7, math.nan, "NSFW", "true", "unsafe", "0.9", "1"])
def test_marks_that_mean_unsafe(mark: object) -> None:
    assert UnsafeFilter("nsfw").matches(mark, "here")


@pytest.mark.parametrize("mark", [False, 0, 0.5, "", "safe", "false", None, "UNLIKELY", "0.1"])
def test_marks_that_mean_safe(mark: object) -> None:
    assert not UnsafeFilter("nsfw").matches(mark, "here")


@given(st.floats(-1, 1), st.floats(-1, 1))
def test_a_number_is_unsafe_above_the_limit(mark: float, above: float) -> None:
    assert UnsafeFilter("nsfw", above).matches(mark, "here") == (mark > above)


@pytest.mark.parametrize("mark", ["maybe", [1], {"nsfw": 1}])
def test_an_unknown_mark_is_refused(mark: object) -> None:
    with pytest.raises(HyperAlignError, match="row 3: rating is .*; expected true or false"):
        UnsafeFilter("rating").matches(mark, "row 3")


def test_the_command_line_overrides_the_filter_of_the_recipe(tmp_path: Path) -> None:
    config = TrainConfig(data=DataConfig(unsafe_column="nsfw", unsafe_above=0.3))
    options = Options(recipe=tmp_path, source=tmp_path, out=tmp_path)
    assert unsafe_filter(options, config) == UnsafeFilter("nsfw", 0.3)
    assert unsafe_filter(options, TrainConfig()) is None
    chosen = dataclasses.replace(options, unsafe_column="punsafe", unsafe_above=0.9)
    assert unsafe_filter(chosen, config) == UnsafeFilter("punsafe", 0.9)
    assert unsafe_filter(dataclasses.replace(options, unsafe_column=""), config) is None
