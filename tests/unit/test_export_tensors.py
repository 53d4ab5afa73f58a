"""A row's weights as a LoRA's tensors, by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from hyperalign.errors import HyperAlignError
from hyperalign.export import ORIGIN_KEY, Origin, check_time, lora_tensors, save_lora
from hyperalign.hypernetwork import HyperNetwork, HyperNetworkConfig
from hyperalign.perception import Perceived
from hyperalign.targets import LoraNames, Target

KOHYA, PEFT = LoraNames("k_"), LoraNames("p.", ".", "lora_A", "lora_B", has_alpha=False)


def made() -> tuple[HyperNetwork, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    config = HyperNetworkConfig(rank=2, a=3, b=4, conditioning="none")
    network = HyperNetwork(config, [Target("x.q", 5, 6), Target("y", 7, 3)], [1], 2).requires_grad_(False)
    for b_aux in network.b_aux:
        nn.init.normal_(b_aux)
    return network, network.factors(Perceived([torch.zeros(1, 1, 1, 1)], torch.zeros(1, 2)))


@pytest.mark.parametrize("strength", [1.0, -0.5])
def test_each_target_has_its_two_matrices_and_an_alpha_that_changes_nothing(strength: float) -> None:
    network, (b_hyper, a_hyper) = made()
    tensors = lora_tensors(network, KOHYA, (b_hyper, a_hyper), strength, torch.float32)
    assert list(tensors) == [f"k_{layer}.{part}" for layer in ("x_q", "y")
                             for part in ("lora_down.weight", "lora_up.weight", "alpha")]  # fmt: skip
    for index, layer in enumerate(("x_q", "y")):
        a_aux, b_aux = network.aux(index)
        torch.testing.assert_close(tensors[f"k_{layer}.lora_down.weight"], a_hyper[0, index] @ a_aux)
        torch.testing.assert_close(tensors[f"k_{layer}.lora_up.weight"], strength * b_aux @ b_hyper[0, index])
        assert tensors[f"k_{layer}.alpha"].item() == 2.0


def test_strength_1_and_half_precision_are_the_default_and_some_files_have_no_alpha() -> None:
    network, factors = made()
    tensors = lora_tensors(network, PEFT, factors)
    exact = lora_tensors(network, PEFT, factors, 1.0, torch.float32)
    assert list(tensors) == [
        "p.x.q.lora_A.weight",
        "p.x.q.lora_B.weight",
        "p.y.lora_A.weight",
        "p.y.lora_B.weight",
    ]
    assert all(torch.equal(value, exact[key].half()) for key, value in tensors.items())
    assert lora_tensors(network, KOHYA, factors)["k_y.alpha"].dtype == torch.float16


def test_matrices_are_multiplied_in_single_precision() -> None:
    network, factors = made()
    halves = tuple(factor.half() for factor in factors)
    found = lora_tensors(network.half(), PEFT, halves, 1.0, torch.float32)  # type: ignore[arg-type]
    expected = halves[1][0, 0].float() @ network.aux(0)[0].float()
    torch.testing.assert_close(found["p.x.q.lora_A.weight"], expected)


def test_weights_of_several_rows_and_numbers_that_overflow_are_refused() -> None:
    network, (b_hyper, a_hyper) = made()
    with pytest.raises(HyperAlignError, match="2 samples"):
        lora_tensors(network, KOHYA, (b_hyper.expand(2, -1, -1, -1), a_hyper.expand(2, -1, -1, -1)))
    with pytest.raises(HyperAlignError, match=r"2 tensors .*k_x_q.lora_up.weight"):
        lora_tensors(network, KOHYA, (b_hyper, a_hyper), 1e9)
    assert lora_tensors(network, KOHYA, (b_hyper, a_hyper), 1e9, torch.float32)


def test_times_from_0_to_1_are_taken_and_below_1_with_a_image_alone() -> None:
    for time in (0.0, 0.5, 1.0):
        check_time(time, has_samples=True)
    check_time(1.0, has_samples=False)
    for time in (0.0, 0.999):
        with pytest.raises(HyperAlignError, match="no image"):
            check_time(time, has_samples=False)
    for time in (-0.001, 1.001, math.nan, math.inf, -math.inf):
        with pytest.raises(HyperAlignError, match="expected a number from 0"):
            check_time(time, has_samples=True)


def test_the_header_tells_the_origin_the_host_s_words_and_nothing_unknown(tmp_path: Path) -> None:
    path = tmp_path / "new" / "lora.safetensors"
    tensors = {"a": torch.arange(3.0)}
    assert save_lora(path, tensors, Origin("h", None, 3, 0.5, 0.0), {"host": "words", "format": "np"}) == path
    with safe_open(str(path), framework="pt") as file:
        assert file.metadata() == {
            "format": "np", "host": "words",
            ORIGIN_KEY: json.dumps({"hypernetwork": "h", "seed": 3, "time": 0.5, "strength": 0.0}),
        }  # fmt: skip
        assert torch.equal(file.get_tensor("a"), tensors["a"])
    save_lora(path, tensors, Origin("h", "a cat", 3, 0.5, 1.0))
    with safe_open(str(path), framework="pt") as file:
        assert set(file.metadata()) == {"format", ORIGIN_KEY}
        assert file.metadata()["format"] == "pt"
        assert json.loads(file.metadata()[ORIGIN_KEY])["prompt"] == "a cat"
