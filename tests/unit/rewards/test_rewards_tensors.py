"""What a weight file may hold: names, and dense numbers of the usual precisions; all else is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hyperalign.errors import HyperAlignError
from hyperalign.geneval import detector
from hyperalign.rewards import hpsv2, loading

Published = Callable[[str], Path]
FUSED = "visual.transformer.resblocks.0.attn.in_proj_weight"
PROJECTION = "visual.proj"


def quantised(value: Tensor) -> Tensor:
    return torch.quantize_per_tensor(value, 0.1, 0, torch.qint8)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("key", [FUSED, PROJECTION])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: value.to(torch.int32), "of torch.int32"),
        (lambda value: value.to(torch.int64), "of torch.int64"),
        (lambda value: value > 0, "of torch.bool"),
        (lambda value: value.to(torch.complex64), "of torch.complex64"),
        (lambda value: value.to(torch.float8_e4m3fn), "of torch.float8_e4m3fn"),
        (lambda value: value.to_sparse(), "torch.sparse_coo"),
        (lambda value: value.to("meta"), "on meta"),
        (quantised, "of torch.qint8"),
    ],
)
def test_other_things_than_dense_numbers_are_refused(
    published: Published, key: str, change: Callable[[Tensor], Tensor], message: str
) -> None:
    folder = published("hpsv2.1")
    path = folder / hpsv2.V2_1.path
    state = torch.load(path, weights_only=True)["state_dict"]
    torch.save(state | {key: change(state[key])}, path)
    with pytest.raises(HyperAlignError, match=f"{path.name}: {key} is .*{message}.*; expected dense"):
        loading.load("hpsv2.1", folder)
    assert not path.with_suffix(".safetensors").exists()


def test_a_safetensors_file_with_quarter_precision_is_refused(published: Published) -> None:
    folder = published("pickscore")
    path = folder / loading.PUBLISHED["pickscore"].files[0].path
    save_file({key: value.to(torch.float8_e5m2) for key, value in load_file(path).items()}, path)
    with pytest.raises(HyperAlignError, match="of torch.float8_e5m2, torch.strided, on cpu; expected dense"):
        loading.load("pickscore", folder)


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_usual_precisions_are_read(published: Published, precision: torch.dtype) -> None:
    folder = published("hpsv2.1")
    path = folder / hpsv2.V2_1.path
    state = torch.load(path, weights_only=True)["state_dict"]
    torch.save({key: value.to(precision) for key, value in state.items()}, path)
    assert loading.load("hpsv2.1", folder).name == "hpsv2.1"


@pytest.mark.parametrize("key", [0, ("a", 1), None, b"weight"])
def test_names_that_are_no_strings_are_refused(published: Published, key: Any) -> None:
    folder = published("hpsv2.1")
    path = folder / hpsv2.V2_1.path
    state = torch.load(path, weights_only=True)["state_dict"]
    torch.save(state | {key: torch.ones(1)}, path)
    with pytest.raises(HyperAlignError, match=r"contains a Tensor named .* among its tensors"):
        loading.load("hpsv2.1", folder)


@pytest.mark.parametrize("key", [FUSED, FUSED.replace("weight", "bias"), PROJECTION, "text_projection"])
@pytest.mark.parametrize("shape", [(), (2,), (3, 2, 1), (0, 4)])
@pytest.mark.filterwarnings("ignore")
def test_a_tensor_of_any_other_shape_is_refused(
    published: Published, key: str, shape: tuple[int, ...]
) -> None:
    folder = published("hpsv2.1")
    path = folder / hpsv2.V2_1.path
    state = torch.load(path, weights_only=True)["state_dict"]
    torch.save(state | {key: torch.ones(shape)}, path)
    with pytest.raises(HyperAlignError, match="another model's file; get the published one"):
        loading.load("hpsv2.1", folder)


def test_the_detector_s_file_is_held_to_the_same(tmp_path: Path) -> None:
    path = tmp_path / detector.WEIGHTS.path
    path.parent.mkdir(parents=True)
    counts = {"relative_position_index": torch.zeros(2, dtype=torch.int64)}
    save_file({**counts, "class_predictor.bias": torch.ones(3).to(torch.float8_e4m3fn)}, path)
    with pytest.raises(HyperAlignError, match="class_predictor.bias is of torch.float8_e4m3fn"):
        detector.load(tmp_path)
