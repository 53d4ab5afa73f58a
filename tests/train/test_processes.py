"""What processes exchange, with another process whose numbers are known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hyperalign.errors import HyperAlignError
from train.processes import any_process, average_gradients, gradient_of, mean_metrics, mean_number


class WithAnother:
    """An accelerator of two processes, of which the other one has these numbers."""

    num_processes = 2
    device = torch.device("cpu")

    def __init__(self, *numbers: float) -> None:
        self.numbers = torch.tensor(numbers)

    def reduce(self, values: Tensor, reduction: str) -> Tensor:
        assert reduction == "mean"
        return (values + self.numbers) / 2


class Alone:
    """An accelerator of one process, which has nothing to exchange."""

    num_processes = 1
    device = torch.device("cpu")


def parameters(*gradients: list[float] | None) -> list[nn.Parameter]:
    """Parameters (2, 1) with these gradients."""
    made = [nn.Parameter(torch.ones(2, 1)) for _ in gradients]
    for parameter, gradient in zip(made, gradients, strict=True):
        parameter.grad = None if gradient is None else torch.tensor(gradient).view(2, 1)
    return made


def test_metrics_are_averaged_over_the_processes() -> None:
    accelerator: Any = WithAnother(3.0, -2.0)
    here = {"reward": torch.tensor(1.0), "loss": torch.tensor(4.0)}
    found = mean_metrics(here, accelerator)
    assert {name: float(value) for name, value in found.items()} == {"reward": 2.0, "loss": 1.0}


def test_a_number_is_averaged_over_the_processes_and_a_lone_one_keeps_it() -> None:
    accelerator: Any = WithAnother(3.0)
    alone: Any = Alone()
    assert mean_number(1.0, accelerator) == 2.0
    assert mean_number(0.1, alone) == 0.1


def test_a_lone_process_keeps_its_metrics_and_exchanges_nothing() -> None:
    alone: Any = Alone()
    metrics = {"reward": torch.tensor(1.0)}
    assert mean_metrics(metrics, alone) == metrics
    assert mean_metrics(metrics, alone) is not metrics


@pytest.mark.parametrize(("here", "there"), [(True, True), (True, False), (False, True), (False, False)])
def test_what_holds_in_one_process_holds_in_any(here: bool, there: bool) -> None:
    accelerator: Any = WithAnother(float(there))
    assert any_process(here, accelerator) is (here or there)


def test_gradients_are_averaged_and_one_that_is_missing_counts_as_zero() -> None:
    here = parameters([1.0, 2.0], None, [5.0, 6.0])
    accelerator: Any = WithAnother(3.0, 4.0, 8.0, -2.0, 5.0, 0.0)
    average_gradients(here, accelerator)
    found = [parameter.grad.flatten().tolist() for parameter in here if parameter.grad is not None]
    assert found == [[2.0, 3.0], [4.0, -1.0], [5.0, 3.0]]


def test_a_lone_process_s_missing_gradient_becomes_zero_and_the_others_stay() -> None:
    here = parameters([1.0, 2.0], None)
    alone: Any = Alone()
    average_gradients(here, alone)
    assert [p.grad is not None and p.grad.flatten().tolist() for p in here] == [[1.0, 2.0], [0.0, 0.0]]


def test_the_gradient_is_one_vector_with_zeros_where_there_is_none() -> None:
    found = gradient_of(parameters([1.0, 2.0], None, [2.0, 4.0]))
    assert found.tolist() == [1.0, 2.0, *[0.0] * (len(found) - 4), 2.0, 4.0]
    assert not gradient_of(parameters(None)).any()


def test_a_reduction_that_is_no_tensor_is_refused() -> None:
    class Odd(WithAnother):
        def reduce(self, values: Tensor, reduction: str) -> Any:
            return [values]

    accelerator: Any = Odd()
    with pytest.raises(HyperAlignError, match="returned a list for a reduced tensor"):
        mean_number(1.0, accelerator)
