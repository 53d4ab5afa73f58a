"""benchmarks/alignment.py from its options to its table, on two prompts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.alignment import Options, compare, main, methods_of
from hyperalign.errors import HyperAlignError
from train.tiny.evaluate import Scores


def test_hypernetworks_of_any_name_are_methods(tmp_path: Path) -> None:
    with pytest.raises(HyperAlignError, match="no hypernetwork .* in"):
        methods_of(tmp_path)
    for name in ("other", "tiny_p", "tiny_s", "another"):
        (tmp_path / f"{name}.safetensors").touch()
    assert list(methods_of(tmp_path)) == ["base", "tiny_s", "tiny_p", "another", "other"]


def test_differences_are_paired_and_geneval_is_the_mean_of_its_families() -> None:
    def scores(correct: list[float], reward: float, diversity: list[float]) -> Scores:
        own_PS = torch.tensor(correct)[:, None]
        rewards_PS = torch.full_like(own_PS, reward)
        return Scores(rewards_PS, rewards_PS, own_PS.bool(), rewards_PS, torch.tensor(diversity))

    own = scores([1.0, 1.0, 1.0, 0.0, 0.0], 3.0, [0.1, 0.2, 0.3, 0.1, 0.3])
    other = scores([0.0, 0.0, 1.0, 0.0, 0.0], 1.0, [0.2, 0.4, 0.6, 0.2, 0.6])
    found = compare(own, other, ["one", "one", "two", "two", "two"])
    assert found["geneval_overall"] == pytest.approx({"difference": 0.5, "low": 0.5, "high": 0.5})
    assert found["reward"] == pytest.approx({"difference": 2.0, "low": 2.0, "high": 2.0})
    assert found["diversity_ratio"] == pytest.approx({"difference": 0.5, "low": 0.5, "high": 0.5})
    assert found["diversity"]["low"] < found["diversity"]["difference"] < found["diversity"]["high"] < 0


def test_it_measures_prints_and_writes(tmp_path: Path, capsys) -> None:
    out = tmp_path / "alignment.json"
    main(Options(prompts=6, seeds=(0,), steps=2, out=out))
    methods = json.loads(out.read_text(encoding="utf-8"))["methods"]
    assert list(methods) == ["base", "tiny_s", "tiny_p", "tiny_i", "tiny_static"]
    assert methods["tiny_s"]["generations_per_run"] == 2
    assert methods["tiny_i"]["generations_per_run"] == 1
    assert [name for name, row in methods.items() if "versus_other" in row] == ["tiny_s", "tiny_p", "tiny_i"]
    printed = capsys.readouterr().out
    assert "tiny_p against tiny_static: geneval overall " in printed
    for name, row in methods.items():
        assert f"| {name} | {row['geneval']['overall']:.3f}" in printed
