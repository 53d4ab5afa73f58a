"""Kernels on the meta device run once for the same arguments, and every tensor is as without that."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from train.preflight import costs
from train.preflight.costs import MetaKernels, Tally, cost_of

META = torch.device("meta")
ADD = torch.ops.aten.add.Tensor


class EveryKernel(MetaKernels):
    """Remembers nothing."""

    def run(self, kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return kernel(*args, **kwargs)


class Counted:
    """A kernel that counts its runs."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self._schema, self.runs = kernel, kernel._schema, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.runs += 1
        return self.kernel(*args, **kwargs)


def layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.untyped_storage().nbytes()


def block(channels: int) -> nn.Module:
    """Norms, a convolution, products and activations, each twice with the same shapes."""
    half = [nn.Conv2d(channels, channels, 3, padding=1), nn.GroupNorm(2, channels), nn.SiLU()]
    return nn.Sequential(
        *half, nn.Conv2d(channels, channels, 3, padding=1), nn.GroupNorm(2, channels), nn.GELU()
    )


@settings(deadline=None, max_examples=15)
@given(
    channels=st.sampled_from([2, 4, 8]),
    side=st.integers(2, 9),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_a_model_costs_the_same_whether_kernels_are_remembered_or_not(
    channels: int, side: int, dtype: torch.dtype
) -> None:
    with META:
        model = block(channels).to(dtype).requires_grad_(False)
        x_BCHW = torch.zeros(2, channels, side, side, dtype=dtype)

    def forward() -> Tensor:
        y_BNC = model(model(x_BCHW.detach().requires_grad_())).flatten(2).transpose(1, 2)
        return F.scaled_dot_product_attention(y_BNC[:, None], y_BNC[:, None], y_BNC[:, None])

    remembered = cost_of(forward)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(costs, "MetaKernels", EveryKernel)
        assert cost_of(forward) == remembered
    assert remembered.forward > 0
    assert remembered.backward > 0


def test_a_kernel_runs_once_for_the_same_layouts() -> None:
    kernels, add = MetaKernels(), Counted(ADD)
    a, b = torch.zeros(3, 4, device=META), torch.zeros(4, device=META)
    first, second = kernels.run(add, (a, b), {}), kernels.run(add, (torch.ones_like(a), b), {})
    assert add.runs == 1
    assert layout(first) == layout(second)
    assert first.untyped_storage() is not second.untyped_storage()
    for others in ((a.t().contiguous().t(), b), (a.bfloat16(), b), (a[:2], b)):
        assert layout(kernels.run(add, others, {})) == layout(ADD(*others))
    assert add.runs == 4


def test_arguments_that_are_equal_and_of_other_types_are_told_apart() -> None:
    kernels, whole = MetaKernels(), torch.zeros(3, dtype=torch.int64, device=META)
    scalar = torch.ops.aten.mul.Scalar
    assert kernels.run(scalar, (whole, 2), {}).dtype == torch.int64
    assert kernels.run(scalar, (whole, 2.0), {}).dtype == torch.float32


def test_scalar_tensors_and_tensors_with_values_are_not_remembered() -> None:
    add = Counted(ADD)
    kernels, scalar = MetaKernels(), torch.zeros((), device=META)
    for _ in range(2):
        kernels.run(add, (torch.zeros(2, device=META), scalar), {})
        kernels.run(add, (torch.zeros(2), torch.ones(2)), {})
    assert add.runs == 4
    assert kernels.run(add, (torch.zeros(2), torch.ones(2)), {}).tolist() == [1.0, 1.0]


def test_what_shares_memory_stays_shared() -> None:
    kernels, x = MetaKernels(), torch.zeros(4, 6, device=META)
    for _ in range(2):
        view = kernels.run(torch.ops.aten._unsafe_view.default, (x, (24,)), {})
        assert view.untyped_storage()._cdata == x.untyped_storage()._cdata
        assert kernels.run(torch.ops.aten.add_.Tensor, (x, x), {}) is x
        halves = kernels.run(torch.ops.aten.split.Tensor, (x, 2), {})
        assert {half.untyped_storage()._cdata for half in halves} == {x.untyped_storage()._cdata}


def test_bytes_of_a_remembered_result_are_given_back() -> None:
    with Tally() as tally:
        a = torch.zeros(8, device=META)
        for _ in range(3):
            a + a
        assert tally.bytes == a.nbytes
    assert tally.peak == 2 * a.nbytes
