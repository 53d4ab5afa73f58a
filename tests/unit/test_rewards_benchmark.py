"""The reward benchmark with the smallest reward: every metric is measured and written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.best_of_n import growth
from benchmarks.rewards import Options, inside, main, peak_memory
from hyperalign.errors import HyperAlignError
from hyperalign.rewards import clip
from hyperalign.rewards.loading import random_weights

CPU = torch.device("cpu")


def test_every_figure_is_measured_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = clip.ClipShape(clip.Tower(1024, 6, 16), clip.Tower(512, 4, 8), 768, "quick_gelu", patch=32)
    monkeypatch.setattr(clip, "VIT_L_14", small)
    options = Options(
        rewards=("clip",),
        device="cpu",
        dtype="float32",
        batch=2,
        gradient_batch=1,
        pixels=256,
        repeats=1,
        out=tmp_path,
    )
    results = main(options)
    written = json.loads((tmp_path / "rewards_cpu.json").read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(results))
    assert str(tmp_path) not in json.dumps(written)
    row = results["rows"]["clip"]
    weights = sum(p.numel() * p.element_size() for p in random_weights("clip").module.parameters())
    assert 0.0 < row["score"]["outside_network"]["median"] < 1.0
    for label in ("score", "gradient, recomputing", "gradient"):
        assert row[label]["images_per_s"]["median"] > 0.0
        assert row[label]["peak_gib"] > weights / 2**30
    assert "| clip | " in capsys.readouterr().out


def test_time_inside_a_network_is_that_of_its_outermost_modules() -> None:
    network = nn.Sequential(nn.Linear(800, 800), nn.Sequential(nn.Linear(800, 800)))
    x = torch.randn(2000, 800)
    with inside(network, CPU) as clock:
        network(x)
        once = clock.seconds
        network[0](x)
    assert 0.0 < once < clock.seconds < 2.0 * once


def test_the_greatest_memory_is_seen() -> None:
    with peak_memory(CPU) as before:
        torch.zeros(1).repeat(20_000_000).sum().item()
    with peak_memory(CPU) as after:
        for _ in range(5):
            torch.ones(120_000_000).sum().item()
    assert after.peak - before.peak > 2e8


def test_growth_is_from_the_second_quarter_to_the_last() -> None:
    assert growth([0.0, 0.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0]) == 0.0
    assert growth([float(value) for value in range(16)]) == pytest.approx(8.0)
    assert growth([9.0, 8.0, 7.0, 6.0]) == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rewards": ("hps",)}, "no reward 'hps'"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"batch": 0}, "at least 1"),
        ({"batch": 2, "gradient_batch": 3}, "no larger gradient batch"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, message) -> None:
    with pytest.raises(HyperAlignError, match=message):
        main(Options(**{"device": "cpu", **options}))
