"""Preprocessing: the same pixels as Pillow and PyTorch, a gradient for every pixel, clear refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from hyperalign.errors import HyperAlignError
from hyperalign.image_files import decode
from hyperalign.rewards import images as P
from hyperalign.rewards import loading

Pixels = NDArray[np.uint8]
SIDES = st.integers(1, 90)


def batch_of(image: Pixels) -> Tensor:
    return torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255


@settings(deadline=None)
@given(SIDES, SIDES, SIDES, SIDES)
def test_resizing_equals_pillow_s_bicubic_before_rounding(
    height: int, width: int, high: int, wide: int
) -> None:
    plane = torch.rand(height, width)
    expected = Image.fromarray(plane.numpy()).resize((wide, high), Image.Resampling.BICUBIC)
    found = P.resize_window(plane[None, None], (high, wide), (0, 0), (high, wide))[0, 0]
    assert torch.allclose(found, torch.from_numpy(np.array(expected)), atol=1e-5)


def test_resizing_equals_pytorch_s_antialiased_bicubic() -> None:
    """HPS v2 officially resizes with it."""
    images = torch.rand(2, 3, 400, 300)
    expected = F.interpolate(images, (224, 168), mode="bicubic", antialias=True)
    assert torch.allclose(P.resize_window(images, (224, 168), (0, 0), (224, 168)), expected, atol=1e-5)


@settings(deadline=None)
@given(SIDES, SIDES, st.integers(1, 32))
def test_the_window_is_the_crop_of_the_whole(height: int, width: int, side: int) -> None:
    images = torch.rand(1, 1, height, width)
    whole = P.resize_window(images, (side + 8, side + 5), (0, 0), (side + 8, side + 5))
    window = P.resize_window(images, (side + 8, side + 5), (3, 2), (side, side))
    assert torch.allclose(window, whole[..., 3 : 3 + side, 2 : 2 + side], atol=1e-6)


def test_pixels_are_pillow_s_to_the_rounding_of_bytes(images: list[Pixels]) -> None:
    for image in images:
        resized = Image.fromarray(image).resize((384, 384), Image.Resampling.BICUBIC)
        error = (P.stretch_to_square(batch_of(image), 384) - batch_of(np.asarray(resized))).abs()
        assert float(error.mean()) < 0.5 / 255


@settings(deadline=None)
@given(SIDES, SIDES, st.integers(1, 40))
def test_every_shape_becomes_a_square(height: int, width: int, side: int) -> None:
    images = torch.rand(2, 3, height, width)
    for prepare in (P.crop_to_square, P.pad_to_square, P.stretch_to_square):
        assert prepare(images, side).shape == (2, 3, side, side)


@pytest.mark.parametrize("shape", [(1, 1), (1, 20_000), (20_000, 3), (7, 20_000)])
def test_extreme_shapes_cost_no_more_than_their_window(shape: tuple[int, int]) -> None:
    """The whole resized strip of 20,000 x 1 pixels would be 4,480,000 wide."""
    images = torch.full((1, 3, *shape), 0.25)
    assert torch.allclose(P.crop_to_square(images, 224), torch.tensor(0.25), atol=1e-5)
    padded = P.pad_to_square(images, 224)
    assert float(padded.amax()) == pytest.approx(0.25, abs=1e-5)


def test_a_square_image_is_padded_nowhere_and_a_wide_one_above_and_below() -> None:
    assert bool((P.pad_to_square(torch.ones(1, 3, 50, 50), 32) > 0.99).all())
    wide = P.pad_to_square(torch.ones(1, 3, 20, 40), 32)
    assert bool((wide[..., :8, :] == 0).all())
    assert bool((wide[..., 24:, :] == 0).all())
    assert bool((wide[..., 8:24, :] > 0.99).all())


def test_descent_through_the_clamp_moves_a_pixel_back_and_never_further_out() -> None:
    x = torch.tensor([-3.0, -3.0, 0.5, 0.5, 7.0, 7.0, 0.0, 1.0], requires_grad=True)
    clamped = P.clamp_for_descent(x)
    clamped.backward(torch.tensor([-1.0, 2.0, -3.0, 4.0, 5.0, -6.0, 7.0, -8.0]))
    assert clamped.tolist() == [0.0, 0.0, 0.5, 0.5, 1.0, 1.0, 0.0, 1.0]
    assert x.grad is not None
    assert x.grad.tolist() == [-1.0, 0.0, -3.0, 4.0, 5.0, 0.0, 7.0, -8.0]


@given(st.lists(st.floats(-4.0, 4.0), min_size=1, max_size=9), st.floats(0.2, 0.8))
def test_descent_brings_saturated_pixels_to_any_wanted_grey(values: list[float], wanted: float) -> None:
    """With the clamp's own derivative they would stay where they are."""
    x = torch.tensor(values, requires_grad=True)
    for _ in range(60):
        (gradient,) = torch.autograd.grad((P.clamp_for_descent(x) - wanted).square().sum(), x)
        x = (x - 0.25 * gradient).detach().requires_grad_()
    assert torch.allclose(x, torch.full_like(x, wanted), atol=1e-3)


def test_grey_is_repeated_and_color_stays_as_it_is() -> None:
    grey, color = torch.rand(2, 1, 4, 4), torch.randn(2, 3, 4, 4)
    assert torch.equal(P.rgb(grey), torch.cat([grey] * 3, dim=1))
    assert torch.equal(P.rgb(color), color)


def test_transparency_lies_on_white_as_in_a_folder_s_images(tmp_path: Path) -> None:
    """One image has one score, in a node and in the folder scorer."""
    layers = np.random.default_rng(0).integers(0, 256, (40, 30, 4), dtype=np.uint8)
    Image.fromarray(layers, "RGBA").save(tmp_path / "clear.png")
    expected = decode(tmp_path, "clear.png")
    assert isinstance(expected, Tensor)
    found = P.rgb(batch_of(layers))
    assert torch.allclose(found[0], expected.float() / 255, atol=1.01 / 255)  # Pillow rounds to bytes
    judge = loading.load("tiny reward", tmp_path)
    as_node, as_folder = (
        judge.score(images, ["a dog"]) for images in (batch_of(layers), expected[None] / 255)
    )
    assert torch.allclose(as_node, as_folder, atol=0.01)


def test_what_left_zero_to_one_lies_on_white_as_if_it_had_been_saved() -> None:
    layers = torch.tensor([1.5, -0.5, 0.25, 0.5]).view(1, 4, 1, 1).requires_grad_()
    assert P.rgb(layers).flatten().tolist() == [1.0, 0.5, 0.625]
    P.rgb(layers).sum().backward()
    assert layers.grad is not None
    # Descent would make the second colour, below 0, still smaller: it has no gradient.
    assert layers.grad.flatten().tolist() == [0.5, 0.0, 0.5, (1 + 0 + 0.25) - 3]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(3, 8, 8), r"shape \(3, 8, 8\); expected \(images, channels, height, width\)"),
        (torch.rand(1, 8, 8, 3), "Move the channels to the second place"),
        (torch.rand(0, 3, 8, 8), "nothing empty"),
        (torch.rand(1, 3, 0, 8), "nothing empty"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "Divide by 255"),
        (torch.full((1, 3, 8, 8), float("nan")), "NaN or infinite pixels"),
        (torch.full((1, 3, 8, 8), float("inf")), "NaN or infinite pixels"),
    ],
)
def test_other_things_than_images_are_refused(images: Tensor, message: str) -> None:
    with pytest.raises(HyperAlignError, match=message):
        P.check_images(images)
