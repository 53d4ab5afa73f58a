"""The file format: round trip, and one sentence for whatever is wrong with a file."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from hyperalign import checkpoint
from hyperalign.checkpoint import HEADER_KEY, Header, HyperAlign
from hyperalign.errors import HyperAlignError
from hyperalign.families.unet import TINY
from hyperalign.hypernetwork import HyperNetwork, HyperNetworkConfig
from hyperalign.provenance import Source
from hyperalign.schedule import Schedule


@pytest.fixture
def saved(make_hyperalign: Any, tmp_path: Path) -> Path:
    hyperalign = make_hyperalign()
    path = tmp_path / "one.safetensors"
    checkpoint.save(path, hyperalign.network, hyperalign.header, torch.float32)
    return path


def rewritten(path: Path, change: dict[str, Any] | None = None, drop: str = "", tensors: Any = None) -> Path:
    header = json.loads(checkpoint._open_metadata(path)) | (change or {})
    state = load_file(path) if tensors is None else tensors
    state.pop(drop, None)
    target = path.with_name("changed.safetensors")
    save_file(state, target, {HEADER_KEY: json.dumps(header)})
    return target


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 9), st.sampled_from(["full", "constant", "none"]))
def test_a_saved_hypernetwork_loads_exactly(
    tmp_path: Path, rank: int, a: int, b: int, conditioning: Any
) -> None:
    config = HyperNetworkConfig(rank=rank, a=a, b=b, width=32, layers=1, heads=2, conditioning=conditioning)
    targets = TINY.targets("prefix")
    network = HyperNetwork(config, targets, TINY.feature_channels, TINY.text_channels)
    header = Header(
        TINY.fingerprint(),
        "prefix",
        TINY.feature_channels,
        TINY.text_channels,
        targets,
        config,
        Schedule("P", (0.5,)),
        {"steps": 3},
    )
    checkpoint.save(tmp_path / "x.safetensors", network, header, torch.float32)
    loaded = checkpoint.load(tmp_path / "x.safetensors")
    assert loaded.header == header
    for key, value in network.state_dict().items():
        assert torch.equal(loaded.network.state_dict()[key], value)


def test_every_tensor_is_named_after_its_module(saved: Path) -> None:
    assert "targets.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.b_aux" in load_file(saved)


def test_an_interrupted_save_leaves_the_old_file(
    make_hyperalign: Any, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved.read_bytes()

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_file", interrupted)
    hyperalign = make_hyperalign()
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(saved, hyperalign.network, hyperalign.header)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def refused(path: Path, match: str) -> None:
    with pytest.raises(HyperAlignError, match=match):
        checkpoint.load(path)


def test_the_first_file_of_a_process_loads_without_pytorch_s_compiler(saved: Path) -> None:
    """Importing it would take longer than everything else that loading does."""
    code = (
        "import sys; from pathlib import Path; from hyperalign import checkpoint; before = set(sys.modules); "
        f"checkpoint.load(Path({str(saved)!r})); "
        "assert not {'torch._dynamo', 'sympy'} & (set(sys.modules) - before)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("conditioning", ["full", "none"])
def test_sizes_without_weights_are_those_of_a_new_network(saved: Path, conditioning: Any) -> None:
    header = checkpoint.read_header(saved)
    header = dataclasses.replace(
        header, network=dataclasses.replace(header.network, conditioning=conditioning)
    )
    sized, drawn = checkpoint.sized_network(header), checkpoint.new_network(header)
    assert all(value.is_meta for value in sized.state_dict().values())
    shapes = [{key: value.shape for key, value in one.state_dict().items()} for one in (sized, drawn)]
    assert shapes[0] == shapes[1]


def test_missing_file(tmp_path: Path) -> None:
    refused(tmp_path / "none.safetensors", "There is no file")


def test_truncated_file(saved: Path) -> None:
    saved.write_bytes(saved.read_bytes()[:-1000])
    refused(saved, "not a whole safetensors file")


def test_other_format(tmp_path: Path) -> None:
    path = tmp_path / "pickle.safetensors"
    torch.save({"a": torch.zeros(1)}, path)
    refused(path, r"other formats \(.pt, .ckpt\) are not read")


def test_oversized_file(tmp_path: Path) -> None:
    path = tmp_path / "large.safetensors"
    with path.open("wb") as file:
        file.truncate(checkpoint.MAX_BYTES + 1)
    refused(path, "probably a base model")


def test_lora_without_header(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    save_file({"a": torch.zeros(1)}, path)
    refused(path, "without a HyperAlign header")


def test_other_version(saved: Path) -> None:
    refused(rewritten(saved, {"format_version": 99}), "format version 99; this release reads version 2")


def test_a_file_of_the_first_format(saved: Path) -> None:
    refused(rewritten(saved, {"format_version": 1}), "format version 1; .*Train it again with its recipe")


def test_statistics_of_another_base_model(saved: Path) -> None:
    state = load_file(saved)
    state["perception.text_statistics.mean"] = torch.zeros(768)
    refused(rewritten(saved, tensors=state), r"statistics of another base model: .*\(768,\).*\(128,\)")


def test_statistics_that_are_no_numbers_or_cannot_divide(saved: Path) -> None:
    state = load_file(saved)
    state["perception.feature_statistics.1.mean"][3] = float("nan")
    refused(
        rewritten(saved, tensors=state), r"NaN or infinite statistics \(perception.feature_statistics.1.mean"
    )
    state = load_file(saved)
    state["token_statistics.deviation"][2, 5] = 0.0
    refused(
        rewritten(saved, tensors=state), "token_statistics.deviation has a value of 0; expected deviations"
    )


def test_a_conditional_part_of_zeros(saved: Path, make_hyperalign: Any, tmp_path: Path) -> None:
    state = load_file(saved)
    state["head.weight"].zero_()
    refused(rewritten(saved, tensors=state), "The conditional part of .* is all zeros")
    static = make_hyperalign(conditioning="none")
    checkpoint.save(tmp_path / "static.safetensors", static.network, static.header)
    assert checkpoint.load(tmp_path / "static.safetensors").network.is_static


def test_unknown_header_field(saved: Path) -> None:
    refused(rewritten(saved, {"colour": 1}), r"unknown fields \['colour'\]")


@pytest.mark.parametrize(
    "change", [{"mode": "sideways"}, {"targets": 3}, {"network": {"rnak": 4}}, {"schedule": None}]
)
def test_unreadable_header(saved: Path, change: dict[str, Any]) -> None:
    refused(rewritten(saved, change), "cannot be read")


def with_text(path: Path, text: str) -> Path:
    target = path.with_name("changed.safetensors")
    save_file(load_file(path), target, {HEADER_KEY: text})
    return target


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schedule": {"variant": "P", "key_times": [10**400]}}, "expected falling numbers"),
        ({"text_channels": float("inf")}, "a width is inf, expected a whole number from 1"),
        ({"feature_channels": [64.5, 128, 128]}, "a width is 64.5"),
        ({"perception_blocks": -1}, "perception_blocks is -1"),
        ({"base": [["family", "tiny"]]}, "base is .*, expected an object"),
        ({"targets": [{"name": "a", "in_features": 2**62, "out_features": 4}]}, "a width is 4611"),
        ({"targets": [{"name": 3, "in_features": 4, "out_features": 4}]}, "a layer is called 3"),
        ({"targets": 2 * [{"name": "a", "in_features": 4, "out_features": 4}]}, "the layer a is there twice"),
        ({"sources": [{"kind": "reward", "name": "x", "licence": "y", "weight": 10**400}]}, "the weight of"),
    ],
)
def test_values_that_no_header_has_are_named(saved: Path, change: dict[str, Any], said: str) -> None:
    refused(rewritten(saved, change), said)


def test_a_header_that_no_parser_or_message_can_hold_is_refused_in_a_few_lines(saved: Path) -> None:
    refused(with_text(saved, "[" * 100_000), "RecursionError")
    refused(with_text(saved, '{"format_version": ' + "9" * 5000 + "}"), "cannot be read")
    with pytest.raises(HyperAlignError) as raised:
        checkpoint.load(rewritten(saved, {"format_version": "x" * 10**6}))
    assert len(str(raised.value)) < 500


def test_a_header_of_thousands_of_layers_is_refused_before_they_are_built(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A minute and a gigabyte on the meta device, from one number in a small file."""
    monkeypatch.setattr(checkpoint, "sized_network", lambda *_: pytest.fail("it was built"))
    network = json.loads(checkpoint._open_metadata(saved))["network"]
    refused(
        rewritten(saved, {"network": network | {"layers": 8192}}), "tensors, its header states .* or more"
    )


def test_tensors_of_whole_numbers_are_refused(saved: Path) -> None:
    state = load_file(saved)
    state["queries"] = state["queries"].to(torch.int64)
    refused(rewritten(saved, tensors=state), "queries is stored as I64; expected one of F16")


def test_header_that_lies_about_shapes(saved: Path) -> None:
    network = json.loads(checkpoint._open_metadata(saved))["network"]
    refused(rewritten(saved, {"network": network | {"a": 8}}), "its header states")


def test_header_that_claims_enormous_widths_allocates_nothing(saved: Path) -> None:
    network = json.loads(checkpoint._open_metadata(saved))["network"]
    refused(rewritten(saved, {"network": network | {"width": 8192}}), "its header states")
    refused(rewritten(saved, {"network": network | {"width": 10**9}}), "width is 1000000000")


def test_missing_tensor(saved: Path) -> None:
    refused(rewritten(saved, drop="queries"), "1 missing")


def test_nan_weights(saved: Path) -> None:
    state = load_file(saved)
    state["queries"][0, 0] = float("nan")
    refused(rewritten(saved, tensors=state), "NaN or infinite")


def test_another_family_is_named(saved: Path) -> None:
    loaded: HyperAlign = checkpoint.load(saved)
    other = dataclasses.replace(loaded.header, base={"family": "sdxl"})
    with pytest.raises(
        HyperAlignError, match="trained for the base model family 'sdxl', but the MODEL is 'tiny'"
    ):
        checkpoint.check_base(other, TINY)


def test_a_file_is_written_in_half_precision_readable_by_all_and_read_in_single(
    make_hyperalign: Any, tmp_path: Path
) -> None:
    made = make_hyperalign()
    path = tmp_path / "deep" / "er" / "x.safetensors"
    checkpoint.save(path, made.network, made.header)
    dtypes = {name: value.dtype for name, value in load_file(path).items()}
    assert {dtypes.pop(name) for name in dict(made.network.named_buffers())} == {torch.float32}, "statistics"
    assert set(dtypes.values()) == {torch.float16}
    assert path.stat().st_mode & 0o777 == 0o644
    loaded = checkpoint.load(path)
    assert {p.dtype for p in loaded.network.parameters()} == {torch.float32}
    assert not loaded.network.training and not any(p.requires_grad for p in loaded.network.parameters())
    checkpoint.save(path, made.network, made.header)  # over itself, into a folder that exists
    assert [one.name for one in path.parent.iterdir()] == ["x.safetensors"]


def test_a_header_s_family_and_version(saved: Path) -> None:
    header = checkpoint.read_header(saved)
    assert (header.family, dataclasses.replace(header, base={}).family) == ("tiny", "unknown")
    source = Source(kind="base model", name="mine", licence="none")
    assert dataclasses.replace(header, sources=(source,)).sources == (source,)
    assert (header.format_version, header.perception_blocks, checkpoint.FORMAT_VERSION) == (2, 0, 2)


def test_a_file_as_large_as_allowed_is_opened(tmp_path: Path) -> None:
    assert checkpoint.MAX_BYTES == 2 * 1024**3
    path = tmp_path / "large.safetensors"
    with path.open("wb") as file:
        file.truncate(checkpoint.MAX_BYTES)
    refused(path, "not a whole safetensors file")


def test_a_file_of_an_older_release_without_the_later_fields_is_read(saved: Path) -> None:
    header = json.loads(checkpoint._open_metadata(saved))
    del header["perception_blocks"], header["sources"]
    older = saved.with_name("older.safetensors")
    save_file(load_file(saved), older, {HEADER_KEY: json.dumps(header)})
    assert (checkpoint.read_header(older).perception_blocks, checkpoint.read_header(older).sources) == (0, ())
    read = checkpoint.read_header(rewritten(saved, {"perception_blocks": 3, "mode": "separate"}))
    assert (read.perception_blocks, read.mode) == (3, "separate")


def test_tensors_more_or_of_another_shape_than_promised_are_refused(saved: Path) -> None:
    state = load_file(saved)
    refused(rewritten(saved, tensors=state | {"extra": torch.zeros(1)}), "0 missing .*1 unexpected .*extra")
    state = load_file(saved)
    state["queries"] = state["queries"][1:].contiguous()
    refused(rewritten(saved, tensors=state), r"queries has shape .*\(1 such")


def test_one_infinite_weight_is_refused(saved: Path) -> None:
    state = load_file(saved)
    state["queries"][0, 0] = float("inf")
    refused(rewritten(saved, tensors=state), r"queries, 1 tensors")


def test_another_base_of_the_family_is_refused_by_its_dimensions(saved: Path) -> None:
    header = checkpoint.load(saved).header
    checkpoint.check_base(header, TINY)
    other = dataclasses.replace(TINY, layers_per_block=2)
    with pytest.raises(HyperAlignError, match="another tiny model: layers_per_block is 2 and should be 1[.]"):
        checkpoint.check_base(header, other)
