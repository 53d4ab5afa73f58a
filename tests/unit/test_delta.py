"""The factorised change: one definition, three uses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperalign.delta import add_delta_, core_matrix, down_matrix, merged_delta, plain_lora, up_matrix

sizes = st.integers(1, 7)


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def change(
    x: torch.Tensor, a_aux: torch.Tensor, b_aux: torch.Tensor, core: torch.Tensor, strength: float = 1.0
) -> torch.Tensor:
    """What an adapted layer adds to an output of zeros."""
    y = x.new_zeros(*x.shape[:2], b_aux.shape[0])
    add_delta_(y, x, down_matrix(a_aux, core), up_matrix(b_aux, strength).expand(len(x), -1, -1))
    return y


@settings(max_examples=40, deadline=None)
@given(sizes, sizes, sizes, sizes, sizes, sizes, sizes)
def test_the_merged_weight_is_the_change(b: int, n: int, i: int, o: int, a: int, d: int, r: int) -> None:
    x, a_aux, b_aux = draw(1, b, n, i), draw(2, a, i), draw(3, o, d)
    core = core_matrix(draw(4, b, d, r), draw(5, b, r, a))
    merged = merged_delta(a_aux, b_aux, core)
    expected = torch.einsum("boi,bni->bno", merged, x)
    torch.testing.assert_close(change(x, a_aux, b_aux, core), expected)


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
    whole = change(x, a_aux, b_aux, core)
    alone = change(x[picked : picked + 1], a_aux, b_aux, core[picked : picked + 1])
    torch.testing.assert_close(whole[picked : picked + 1], alone)


def test_a_zero_b_aux_changes_nothing() -> None:
    delta = change(draw(1, 2, 3, 6), draw(2, 4, 6), torch.zeros(5, 2, dtype=torch.float64), draw(4, 2, 2, 4))
    assert torch.equal(delta, torch.zeros_like(delta))


@settings(max_examples=20, deadline=None)
@given(st.floats(-3, 3), sizes, sizes)
def test_the_change_is_added_and_follows_the_strength_with_its_sign(s: float, i: int, o: int) -> None:
    x, a_aux, b_aux, core = draw(1, 2, 3, i), draw(2, 4, i), draw(3, o, 5), draw(4, 2, 5, 4)
    y = draw(6, 2, 3, o)
    expected = y + s * torch.einsum("od,bda,ai,bni->bno", b_aux, core, a_aux, x)
    add_delta_(y, x, down_matrix(a_aux, core), up_matrix(b_aux, s).expand(len(x), -1, -1))
    torch.testing.assert_close(y, expected)


def test_an_input_of_another_precision_gets_the_change_in_the_output_s_precision() -> None:
    x, a_aux, b_aux, core = draw(1, 2, 3, 6), draw(2, 4, 6), draw(3, 5, 2), draw(4, 2, 2, 4)
    expected = change(x, a_aux, b_aux, core)
    down, up = down_matrix(a_aux, core).float(), up_matrix(b_aux, 1.0).float().expand(len(x), -1, -1)
    for kind, output in ((torch.float64, torch.bfloat16), (torch.float32, torch.float64)):
        y = torch.zeros(2, 3, 5, dtype=output)
        add_delta_(y, x.to(kind), down, up)
        assert y.dtype == output
        torch.testing.assert_close(y.double(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("x_type", "y_type", "factor_type"),
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float32, torch.float32, torch.bfloat16),
    ],
)
def test_input_output_and_factors_may_have_other_precisions(
    x_type: torch.dtype, y_type: torch.dtype, factor_type: torch.dtype
) -> None:
    # [1, 2] down to [1 + 4, 0 + 2] = [5, 2], up to [5 + 2, 10 - 2], added to [1, 1].
    y = torch.ones(1, 1, 2, dtype=y_type)
    x = torch.tensor([[[1.0, 2.0]]], dtype=x_type)
    down = torch.tensor([[[1.0, 0.0], [2.0, 1.0]]], dtype=factor_type)
    up = torch.tensor([[[1.0, 2.0], [1.0, -1.0]]], dtype=factor_type)
    add_delta_(y, x, down, up)
    assert y.dtype == y_type
    assert y.tolist() == [[[8.0, 9.0]]]
