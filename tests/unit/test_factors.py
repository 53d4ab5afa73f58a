"""The factorised change: one definition, three uses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperalign.factors import add_delta_, core_matrix, folded, forward_delta, merged_delta, plain_lora

sizes = st.integers(1, 7)


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(sizes, sizes, sizes, sizes, sizes, sizes, sizes)
def test_merged_weight_equals_forward_delta(b: int, n: int, i: int, o: int, a: int, d: int, r: int) -> None:
    x, a_aux, b_aux = draw(1, b, n, i), draw(2, a, i), draw(3, o, d)
    core = core_matrix(draw(4, b, d, r), draw(5, b, r, a))
    merged = merged_delta(a_aux, b_aux, core)
    expected = torch.einsum("boi,bni->bno", merged, x)
    torch.testing.assert_close(forward_delta(x, a_aux, b_aux, core), expected)


@settings(max_examples=40, deadline=None)
@given(sizes, sizes, sizes, sizes, sizes)
def test_plain_lora_is_the_same_weight_of_the_promised_rank(i: int, o: int, a: int, d: int, r: int) -> None:
    a_aux, b_aux, b_hyper, a_hyper = draw(1, a, i), draw(2, o, d), draw(3, d, r), draw(4, r, a)
    down, up = plain_lora(a_aux, b_aux, a_hyper, b_hyper)
    assert down.shape == (r, i)
    assert up.shape == (o, r)
    torch.testing.assert_close(up @ down, merged_delta(a_aux, b_aux, core_matrix(b_hyper, a_hyper)))


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 5), st.integers(0, 4))
def test_a_row_is_changed_by_its_own_core_alone(rows: int, picked: int) -> None:
    picked %= rows
    x, a_aux, b_aux, core = draw(1, rows, 3, 6), draw(2, 4, 6), draw(3, 5, 2), draw(4, rows, 2, 4)
    whole = forward_delta(x, a_aux, b_aux, core)
    alone = forward_delta(x[picked : picked + 1], a_aux, b_aux, core[picked : picked + 1])
    torch.testing.assert_close(whole[picked : picked + 1], alone)


def test_a_zero_b_aux_changes_nothing() -> None:
    delta = forward_delta(
        draw(1, 2, 3, 6), draw(2, 4, 6), torch.zeros(5, 2, dtype=torch.float64), draw(4, 2, 2, 4)
    )
    assert torch.equal(delta, torch.zeros_like(delta))


def product(*matrices: list[list[float]]) -> list[list[float]]:
    """Returns the product of matrices, from the left, by the definition."""
    first, *rest = matrices
    for other in rest:
        first = [
            [sum(x * y for x, y in zip(row, c, strict=True)) for c in zip(*other, strict=True)]
            for row in first
        ]
    return first


A_AUX = [[1.0, 2.0, 0.0], [0.0, -1.0, 3.0]]
B_AUX = [[1.0, 0.5], [0.0, 2.0], [-1.0, 1.0], [4.0, 0.0]]
CORE = [[2.0, -1.0], [0.5, 3.0]]


def test_the_change_of_a_row_by_hand() -> None:
    x = [[1.0, -2.0, 4.0]]
    down = [list(column) for column in zip(*product(CORE, A_AUX), strict=True)]
    up = [list(column) for column in zip(*B_AUX, strict=True)]
    a_aux, b_aux, core = torch.tensor(A_AUX), torch.tensor(B_AUX), torch.tensor(CORE)
    expected = torch.tensor([product(x, down, up)])
    assert torch.equal(forward_delta(torch.tensor([x]), a_aux, b_aux, core[None]), expected)
    assert folded(a_aux, core).tolist() == product(CORE, A_AUX)
    assert merged_delta(a_aux, b_aux, core).tolist() == product(B_AUX, CORE, A_AUX)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("y_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_delta_is_added_in_place_whatever_the_layer_computes_in(
    rows: int, y_dtype: torch.dtype, x_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    """Small whole numbers, which every precision holds."""
    y = torch.arange(rows * 2 * 4.0).view(rows, 2, 4).to(y_dtype)
    x = (torch.arange(rows * 2 * 3.0) % 5).view(rows, 2, 3).to(x_dtype)
    down = (torch.arange(rows * 3 * 2.0) % 3 - 1).view(rows, 3, 2).to(dtype)
    up = torch.tensor([[1.0, 0.0, -1.0, 2.0], [3.0, 1.0, 0.0, -2.0]]).to(dtype)
    expected = torch.stack([y[i].float() + x[i].float() @ down[i].float() @ up.float() for i in range(rows)])
    kept = y.data_ptr()
    assert add_delta_(y, x, down, up) is None
    assert (y.data_ptr(), y.dtype) == (kept, y_dtype)
    assert torch.equal(y.float(), expected)
