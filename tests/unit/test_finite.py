"""The quick check of finite numbers agrees with looking at every one of them."""

from __future__ import annotations

import pytest
import torch

from hyperalign.finite import all_finite

TYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", TYPES)
def test_one_value_that_is_no_number_is_found_anywhere(dtype: torch.dtype) -> None:
    for value in (torch.nan, torch.inf, -torch.inf):
        for at in (0, 57, 999):
            x = torch.randn(1000).to(dtype)
            x[at] = value
            assert not all_finite(x)
            assert not all_finite(x.view(10, 100).T)


def test_infinities_that_would_cancel_are_found() -> None:
    assert not all_finite(torch.tensor([torch.inf, 1.0, -torch.inf]))


@pytest.mark.parametrize("dtype", TYPES)
def test_finite_numbers_whose_sum_overflows_are_finite(dtype: torch.dtype) -> None:
    greatest = torch.full((40,), torch.finfo(dtype).max, dtype=dtype)
    assert not greatest.sum().isfinite()
    assert all_finite(greatest) and all_finite(-greatest)


def test_nothing_whole_numbers_and_numbers_with_a_gradient_are_finite() -> None:
    assert all_finite(torch.empty(0, 3))
    assert all_finite(torch.arange(5))
    assert all_finite(torch.randn(3, requires_grad=True) * 2.0)
