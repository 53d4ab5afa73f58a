"""Images on their way into a reward, with pixels worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hyperalign.errors import HyperAlignError
from hyperalign.rewards import images as P


def keys(distance: float) -> float:
    """Keys' cubic with a = -0.5, piece by piece as in his paper."""
    d = abs(distance)
    if d < 1:
        return 1.5 * d**3 - 2.5 * d**2 + 1
    return -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2 if d < 2 else 0.0


def weights(length: int, resized: int) -> list[list[float]]:
    """The whole matrix, pixel by pixel."""
    scale = length / resized
    rows = []
    for k in range(resized):
        row = [keys((pixel + 0.5 - (k + 0.5) * scale) / max(1.0, scale)) for pixel in range(length)]
        rows.append([one / sum(row) for one in row])
    return rows


@pytest.mark.parametrize(("length", "resized"), [(5, 5), (3, 8), (8, 3), (1, 4), (6, 1), (7, 5)])
def test_resizing_weights_are_keys_cubic_wider_as_it_shrinks(length: int, resized: int) -> None:
    found = P.bicubic_weights(length, resized, 0, resized)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, torch.tensor(weights(length, resized), dtype=torch.float64))


CPU = torch.device("cpu")


def test_some_rows_of_the_weights_are_those_of_the_whole_and_are_kept() -> None:
    part = P.kept_bicubic_weights(CPU, torch.float64, 7, 5, 2, 2)
    assert torch.equal(part, P.bicubic_weights(7, 5, 0, 5)[2:4])
    assert P.kept_bicubic_weights(CPU, torch.float64, 7, 5, 2, 2) is part
    assert P.kept_bicubic_weights(CPU, torch.float32, 7, 5, 2, 2).dtype == torch.float32


def test_what_is_kept_by_an_inference_may_be_trained_through() -> None:
    with torch.inference_mode():
        P.normalise(torch.ones(1, 3, 1, 1), (0.1, 0.2, 0.3), (2.0, 3.0, 4.0))
        P.kept_bicubic_weights(CPU, torch.float64, 9, 4, 0, 4)
    pixels = torch.ones(9, dtype=torch.float64, requires_grad=True)
    (P.kept_bicubic_weights(CPU, torch.float64, 9, 4, 0, 4) @ pixels).sum().backward()
    assert pixels.grad is not None
    images = torch.ones(1, 3, 1, 1, requires_grad=True)
    P.normalise(images, (0.1, 0.2, 0.3), (2.0, 3.0, 4.0)).sum().backward()
    assert images.grad is not None


class FromTheCpu(TorchDispatchMode):
    """Counts the tensors that are made on the CPU, to be copied to the device of the images."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.count += any(isinstance(x, Tensor) and x.device.type == "cpu" for x in (found, *args))
        return found


@pytest.mark.parametrize("prepare", [P.crop_to_square, P.pad_to_square, P.stretch_to_square])
def test_the_second_batch_of_a_size_waits_for_no_copy_to_its_device(prepare: Any) -> None:
    images = torch.empty(1, 3, 12, 10, device="meta")
    counts: list[int] = []
    P.kept_bicubic_weights.cache_clear()
    for _ in range(2):
        with FromTheCpu() as made:
            P.normalise(prepare(images, 8), P.CLIP_MEAN, P.CLIP_STD)
        counts.append(made.count)
    assert counts[0] > 0 and counts[1] == 0


def test_a_window_of_each_axis_is_its_own() -> None:
    image = torch.arange(2 * 3 * 4.0).view(1, 2, 3, 4)
    rows, columns = torch.tensor(weights(3, 5)), torch.tensor(weights(4, 6))
    whole = torch.einsum("hi,bcij,wj->bchw", rows, image, columns)
    found = P.resize_window(image, (5, 6), (1, 2), (3, 4))
    torch.testing.assert_close(found, whole[:, :, 1:4, 2:6], atol=1e-5, rtol=1e-5)


def ramp(height: int, width: int) -> Tensor:
    return torch.linspace(0.2, 0.8, height * width).view(1, 1, height, width)


@pytest.mark.parametrize(
    ("shape", "size", "corner"),
    [((4, 8), (4, 8), (0, 2)), ((8, 4), (8, 4), (2, 0)), ((3, 8), (4, 10), (0, 3)), ((8, 3), (10, 4), (3, 0)),
     ((2, 3), (4, 6), (0, 1)), ((5, 5), (4, 4), (0, 0)), ((4, 7), (4, 7), (0, 2)), ((4, 9), (4, 9), (0, 2))],
)  # fmt: skip
def test_the_centre_is_cropped_with_clip_s_rounding(shape, size, corner) -> None:
    """8/3 of 4 is 10.67, cut to 10; half of an odd rest is rounded to the even number."""
    image = ramp(*shape)
    expected = P.resize_window(image, size, corner, (4, 4))
    assert torch.equal(P.crop_to_square(image, 4), expected)


@pytest.mark.parametrize(
    ("shape", "size", "edges"),
    [((4, 8), (4, 8), (2, 2, 0, 0)), ((8, 4), (8, 4), (0, 0, 2, 2)), ((3, 8), (3, 8), (2, 3, 0, 0)),
     ((8, 3), (8, 3), (0, 0, 2, 3)), ((1, 99), (1, 8), (3, 4, 0, 0)), ((99, 1), (8, 1), (0, 0, 3, 4)),
     ((3, 5), (5, 8), (1, 2, 0, 0)), ((2, 2), (8, 8), (0, 0, 0, 0))],
)  # fmt: skip
def test_what_is_padded_is_black_and_the_odd_row_lies_below_or_right(shape, size, edges) -> None:
    top, bottom, left, right = edges
    found = P.pad_to_square(ramp(*shape), 8)[0, 0]
    assert found.shape == (8, 8)
    inside = found[top : 8 - bottom, left : 8 - right]
    assert inside.shape == size
    torch.testing.assert_close(inside, P.resize_window(ramp(*shape), size, (0, 0), size)[0, 0])
    black = found.clone()
    black[top : 8 - bottom, left : 8 - right] = 0
    assert not black.any()


def test_cropping_and_stretching_clamp_what_the_cubic_overshoots_and_padding_does_not() -> None:
    edge = torch.zeros(1, 1, 8, 8)
    edge[..., 4:] = 1.0
    for prepare in (P.crop_to_square, P.stretch_to_square):
        assert (float(prepare(edge, 16).min()), float(prepare(edge, 16).max())) == (0.0, 1.0)
    assert float(P.pad_to_square(edge, 16).min()) < -0.01
    assert float(P.pad_to_square(edge, 16).max()) > 1.01


def test_stretching_scales_each_axis_on_its_own() -> None:
    expected = P.resize_window(ramp(3, 9), (6, 6), (0, 0), (6, 6))
    assert torch.equal(P.stretch_to_square(ramp(3, 9), 6), expected)


def test_each_channel_is_normalised_by_its_own_mean_and_deviation() -> None:
    images = torch.tensor([[[[1.0]], [[2.0]], [[3.0]]]])
    assert P.normalise(images, (0.5, 1.0, 5.0), (0.5, 4.0, 0.25)).flatten().tolist() == [1.0, 0.25, -8.0]
    assert P.normalise(images.double(), (0.0,) * 3, (1.0,) * 3).dtype == torch.float64


def test_clip_s_mean_and_deviation_are_the_published_ones() -> None:
    assert P.CLIP_MEAN == (0.48145466, 0.4578275, 0.40821073)
    assert P.CLIP_STD == (0.26862954, 0.26130258, 0.27577711)


@pytest.mark.parametrize(
    ("weight", "pixels", "wanted"),
    [(torch.float32, torch.float16, torch.float32), (torch.bfloat16, torch.float64, torch.float32),
     (torch.float64, torch.float32, torch.float64)],
)  # fmt: skip
def test_pixels_are_prepared_in_single_precision_and_read_in_the_network_s(weight, pixels, wanted) -> None:
    seen: list[Tensor] = []

    def prepare(images: Tensor) -> Tensor:
        seen.append(images)
        return images + 1

    images = torch.tensor([-1.0, 0.5, 2.0], dtype=pixels).view(1, 1, 1, 3)
    found = P.network_pixels(images, nn.Linear(1, 1).to(weight), prepare)
    assert (seen[0].dtype, found.dtype) == (wanted, weight)
    assert seen[0].tolist() == [[[[0.0, 0.5, 1.0]]] * 3]
    assert found.tolist() == [[[[1.0, 1.5, 2.0]]] * 3]


def test_one_three_or_four_channels_of_any_floating_point_are_images() -> None:
    for channels in (1, 3, 4):
        for dtype in (torch.float16, torch.bfloat16, torch.float64):
            P.check_images(torch.zeros(1, channels, 1, 1, dtype=dtype))
            P.check_images(torch.zeros(5, channels, 6, 7, dtype=dtype))


@pytest.mark.parametrize(
    "shape", [(1, 2, 3, 8), (1, 5, 8, 8), (1, 1, 3, 8, 8), (8, 3), (0, 3, 8, 8), (1, 3, 8, 0), (1, 0, 8, 8)]
)
def test_other_shapes_are_no_images(shape: tuple[int, ...]) -> None:
    with pytest.raises(HyperAlignError, match="shape"):
        P.check_images(torch.zeros(shape))


def test_one_pixel_that_is_no_number_is_enough_to_refuse() -> None:
    images = torch.zeros(2, 3, 4, 4)
    images[1, 2, 3, 3] = -torch.inf
    with pytest.raises(HyperAlignError, match="infinite"):
        P.check_images(images)
    with pytest.raises(HyperAlignError, match="floating"):
        P.check_images(torch.zeros(2, 3, 4, 4, dtype=torch.int64))


class Greatest(TorchDispatchMode):
    """Notes the most numbers that an operation puts into memory of its own."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor) and not found._is_view() and func is not torch.ops.aten.detach.default:
            self.numbers = max(self.numbers, found.numel())
        return found


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_pixels_are_found_finite_without_a_tensor_of_their_size(dtype: torch.dtype) -> None:
    images = torch.rand(2, 3, 8, 8, dtype=dtype)
    with Greatest() as greatest:
        P.check_images(images)
    assert greatest.numbers == 1


def test_colours_are_left_alone_and_transparency_lies_on_white() -> None:
    grey, colour = torch.rand(2, 1, 2, 2), torch.rand(2, 3, 2, 2) * 3 - 1
    assert torch.equal(P.rgb(grey), grey.repeat(1, 3, 1, 1))
    assert P.rgb(colour) is colour
    clear = torch.tensor([0.2, 0.4, 1.0, 0.25]).view(1, 4, 1, 1)
    assert P.rgb(clear).flatten().tolist() == pytest.approx([0.8, 0.85, 1.0])


def test_what_is_clamped_has_the_gradient_that_leads_back() -> None:
    x = torch.tensor([-2.0, -2.0, 0.25, 3.0, 3.0], requires_grad=True)
    found = P.clamp_for_descent(x)
    found.backward(torch.tensor([1.0, -1.0, -2.0, 4.0, -4.0]))
    assert found.tolist() == [0.0, 0.0, 0.25, 1.0, 1.0]
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, -1.0, -2.0, 4.0, 0.0]
