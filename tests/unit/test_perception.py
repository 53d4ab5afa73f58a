"""Maps become memory tokens: pooling, place encodings and projections, by numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from hyperalign.perception import (
    MAX_IMAGE_TOKENS,
    Perceived,
    Perception,
    grid_encoding,
    index_encoding,
    pool_features,
    pool_text,
    sinusoidal_encoding,
    token_map,
)

CPU = torch.device("cpu")


def by_hand(position: float, width: int) -> list[float]:
    """Sines, then cosines, of the position times 1 ... 1/10000, evenly spread in the logarithm."""
    half = width // 2
    steps = [10_000 ** -(i / max(1, half - 1)) for i in range(half)]
    return [math.sin(position * step) for step in steps] + [math.cos(position * step) for step in steps]


def sizes(maps: list[Tensor]) -> list[tuple[int, int]]:
    return [(one.shape[-2], one.shape[-1]) for one in maps]


def test_tokens_become_a_map_row_by_row_and_what_follows_stays_out() -> None:
    tokens_BLC = torch.arange(2 * 8 * 3.0).reshape(2, 8, 3)
    maps_BCHW = token_map(tokens_BLC, (2, 3))
    expected = [[[[tokens_BLC[b, 3 * row + column, c].item() for column in range(3)] for row in range(2)]
                 for c in range(3)] for b in range(2)]  # fmt: skip
    assert maps_BCHW.tolist() == expected


def test_maps_within_the_limit_stay_as_they_are() -> None:
    maps = [torch.zeros(1, 2, 12, 16), torch.zeros(1, 2, 8, 8)]  # 192 + 64 = 256
    assert all(one is other for one, other in zip(pool_features(maps), maps, strict=True))
    assert MAX_IMAGE_TOKENS == 256


def test_one_cell_too_many_halves_the_largest_map() -> None:
    assert sizes(pool_features([torch.zeros(1, 2, 1, 257), torch.zeros(1, 2, 1, 1)])) == [(1, 129), (1, 1)]
    assert sizes(pool_features([torch.zeros(1, 2, 16, 16), torch.zeros(1, 2, 1, 1)])) == [(8, 8), (1, 1)]


def test_the_largest_map_is_that_of_most_cells_not_of_the_longest_side() -> None:
    tall, wide, square = torch.zeros(1, 1, 20, 2), torch.zeros(1, 1, 2, 20), torch.zeros(1, 1, 9, 9)
    assert sizes(pool_features([tall, wide, square], 110)) == [(20, 2), (2, 20), (5, 5)]
    assert sizes(pool_features([torch.zeros(1, 1, 6, 6), torch.zeros(1, 1, 5, 8)], 60)) == [(6, 6), (3, 4)]
    assert sizes(pool_features([torch.zeros(1, 1, 6, 6), torch.zeros(1, 1, 8, 5)], 60)) == [(6, 6), (4, 3)]


def test_pooling_averages_squares_of_four_and_keeps_odd_edges() -> None:
    pooled = pool_features([torch.arange(9.0).view(1, 1, 3, 3)], 4)[0]
    assert pooled.tolist() == [[[[(0 + 1 + 3 + 4) / 4, (2 + 5) / 2], [(6 + 7) / 2, 8.0]]]]


def test_a_map_one_cell_wide_or_high_is_halved_too() -> None:
    assert sizes(pool_features([torch.zeros(1, 1, 300, 1)])) == [(150, 1)]
    assert sizes(pool_features([torch.zeros(1, 1, 1, 300)])) == [(1, 150)]


def test_maps_of_one_cell_cannot_be_halved() -> None:
    maps = [torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 2)]
    assert sizes(pool_features(maps, 2)) == [(1, 1), (1, 1), (1, 1)]


@pytest.mark.parametrize("width", [2, 4, 8])
def test_encodings_are_sines_then_cosines_at_frequencies_from_1_to_a_ten_thousandth(width: int) -> None:
    found = sinusoidal_encoding(torch.tensor([0, 1, 7]), width)
    expected = torch.tensor([by_hand(position, width) for position in (0, 1, 7)])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_encodings_are_computed_in_single_precision() -> None:
    assert sinusoidal_encoding(torch.tensor([0.5], dtype=torch.float64), 4).dtype == torch.float32


def test_indices_are_encoded_from_0_on_and_kept() -> None:
    found = index_encoding(3, 4, CPU)
    torch.testing.assert_close(found, torch.tensor([by_hand(i, 4) for i in range(3)]), atol=1e-5, rtol=0)
    assert index_encoding(3, 4, CPU) is found


def test_a_cell_is_encoded_by_its_centre_half_a_cell_in_of_64() -> None:
    """Two rows of three: the centres lie at 16 and 48, and at 32/3, 32 and 160/3."""
    found = grid_encoding(2, 3, 8, CPU)
    expected = [by_hand(row, 4) + by_hand(column, 4) for row in (16, 48) for column in (32 / 3, 32, 160 / 3)]
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-4, rtol=0)
    assert grid_encoding(2, 3, 8, CPU) is found


def test_a_cell_of_every_resolution_says_the_same_part_of_the_image() -> None:
    coarse, fine = grid_encoding(1, 1, 8, CPU), grid_encoding(3, 5, 8, CPU).view(3, 5, 8)
    torch.testing.assert_close(fine[1, 2], coarse[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("encode", [lambda: index_encoding(5, 12, CPU), lambda: grid_encoding(5, 4, 12, CPU)])
def test_what_an_inference_kept_may_be_trained_on(encode) -> None:
    with torch.inference_mode():
        kept = encode()
    weight = torch.ones(12, requires_grad=True)
    (encode() * weight).sum().backward()
    assert encode() is kept
    assert weight.grad is not None


def test_memory_is_each_standardised_cell_projected_plus_its_place_level_after_level() -> None:
    torch.manual_seed(0)
    perception = Perception([2, 3], 5, 8)
    for name, buffer in perception.named_buffers():
        nn.init.uniform_(buffer, *((0.5, 2.0) if name.endswith("deviation") else (-1.0, 1.0)))
    maps = [torch.randn(2, 2, 3, 4), torch.randn(2, 3, 2, 1, dtype=torch.float64)]
    memory, _ = perception(Perceived(maps, torch.zeros(2, 5)))
    expected = []
    for level, one in enumerate(maps):
        statistics, project = perception.feature_statistics[level], perception.projections[level]
        places = grid_encoding(one.shape[2], one.shape[3], 8, CPU)
        for row in range(one.shape[2]):
            for column in range(one.shape[3]):
                cell_BC = one[:, :, row, column].float()
                standard = (cell_BC - statistics.mean) / statistics.deviation
                expected.append(standard @ project.weight.T + 0.25 * places[row * one.shape[3] + column])
    torch.testing.assert_close(memory, torch.stack(expected, dim=1), atol=1e-5, rtol=1e-5)


def test_memory_has_at_most_256_tokens() -> None:
    memory, modulation = Perception([2], 5, 8)(Perceived([torch.zeros(1, 2, 20, 20)], torch.zeros(1, 5)))
    assert (memory.shape, modulation.shape) == ((1, 100, 8), (1, 8))


def test_the_prompt_s_standardised_mean_modulates() -> None:
    torch.manual_seed(0)
    perception = Perception([2], 5, 8)
    nn.init.uniform_(perception.text_statistics.mean)
    nn.init.uniform_(perception.text_statistics.deviation, 0.5, 2.0)
    tokens = torch.randn(3, 7, 5)
    _, found = perception(Perceived([torch.zeros(3, 2, 1, 1)], pool_text(tokens)))
    standard = (tokens.mean(1) - perception.text_statistics.mean) / perception.text_statistics.deviation
    projected = standard @ perception.project_text.weight.T
    torch.testing.assert_close(found, projected * projected.sigmoid())


def test_repeated_text_tokens_say_the_same() -> None:
    tokens = torch.randn(2, 7, 5)
    torch.testing.assert_close(pool_text(tokens.repeat(1, 3, 1)), pool_text(tokens))
    assert pool_text(tokens.half()).dtype == torch.float32


def test_projections_keep_the_variance_of_what_is_standardised() -> None:
    torch.manual_seed(0)
    perception = Perception([320], 768, 256)
    for project, channels in ((perception.projections[0], 320), (perception.project_text, 768)):
        assert project.bias is None
        assert float(project(torch.randn(400, channels)).detach().var()) == pytest.approx(1.0, rel=0.05)


def test_another_number_of_maps_than_levels_is_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        Perception([2, 2], 5, 8)(Perceived([torch.zeros(1, 2, 2, 2)], torch.zeros(1, 5)))
