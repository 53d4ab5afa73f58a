"""The factorised change: one definition, three uses."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperalign.delta import core_matrix, forward_delta, merged_delta, plain_lora

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
