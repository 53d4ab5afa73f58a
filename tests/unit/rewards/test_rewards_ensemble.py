"""Ensembles: the three ways to combine scores, their calibration, their refusals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from hyperalign.errors import HyperAlignError
from hyperalign.rewards import ensemble
from hyperalign.rewards.ensemble import Calibration, Ensemble, calibrate, ranks


@dataclass(frozen=True)
class Brightness:
    """A reward that a test can foresee: the mean of one channel."""

    name: str
    channel: int
    module: nn.Module = field(default_factory=lambda: nn.Linear(1, 1))

    def score(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        return images_BCHW[:, self.channel].mean(dim=(1, 2))

    def embed_images(self, images_BCHW: Tensor) -> Tensor:
        return F.normalize(images_BCHW.mean(dim=(2, 3)), dim=1)


RED, GREEN = Brightness("red", 0), Brightness("green", 1)
COLORS = torch.tensor([[0.1, 0.9, 0.0], [0.5, 0.5, 0.0], [0.9, 0.4, 0.0]])
IMAGES = COLORS[..., None, None].expand(-1, -1, 4, 4)
PROMPTS = [""] * 3


def test_a_sum_is_weighted() -> None:
    scores = Ensemble([(RED, 2.0), (GREEN, -1.0)]).score(IMAGES, PROMPTS)
    assert scores.tolist() == pytest.approx([-0.7, 0.5, 1.4])


def test_z_scores_are_measured_from_the_stored_calibration() -> None:
    calibrations = {"red": Calibration(0.5, 0.2), "green": Calibration(0.4, 0.1), "blue": Calibration(0, 1)}
    scores = Ensemble([(RED, 1.0), (GREEN, 0.5)], "z-score", calibrations).score(IMAGES, PROMPTS)
    assert scores.tolist() == pytest.approx([-2.0 + 2.5, 0.5, 2.0])


def test_ranks_are_averaged_over_members() -> None:
    scores = Ensemble([(RED, 3.0), (GREEN, 1.0)], "rank").score(IMAGES, PROMPTS)
    assert scores.tolist() == pytest.approx([0.25, 0.5, 0.75])


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=2, max_size=8))
def test_ranks_lie_in_0_to_1_around_one_half_and_equals_share(values: list[float]) -> None:
    column = ranks(torch.tensor(values)[:, None])[:, 0]
    assert 0.0 <= float(column.min()) <= float(column.max()) <= 1.0
    assert float(column.mean()) == pytest.approx(0.5, abs=1e-6)
    for i, a in enumerate(values):
        for j, b in enumerate(values):
            assert (a < b) == bool(column[i] < column[j] - 1e-6)


def test_a_image_alone_has_the_middle_rank() -> None:
    assert Ensemble([(RED, 1.0)], "rank").score(IMAGES[:1], [""]).tolist() == [0.5]


def test_the_breakdown_names_each_member_s_own_scores() -> None:
    both = Ensemble([(RED, 2.0), (GREEN, 1.0)])
    parts = both.breakdown(IMAGES, PROMPTS)
    assert list(parts) == ["red", "green"]
    assert parts["green"].tolist() == pytest.approx([0.9, 0.5, 0.4])
    assert torch.equal(both.combine(parts), both.score(IMAGES, PROMPTS))


def test_sums_have_a_gradient_and_ranks_say_that_they_have_none() -> None:
    images = IMAGES.clone().requires_grad_()
    Ensemble([(RED, 1.0), (GREEN, 0.5)]).score(images, PROMPTS).sum().backward()
    assert images.grad is not None
    assert float(images.grad[0, 1, 0, 0]) == pytest.approx(0.5 / 16)
    with pytest.raises(HyperAlignError, match="Ranks have no gradient"):
        Ensemble([(RED, 1.0)], "rank").score(images, PROMPTS)
    with torch.no_grad():
        assert len(Ensemble([(RED, 1.0)], "rank").score(images, PROMPTS)) == 3


def test_its_module_holds_every_network_so_that_a_host_can_move_them() -> None:
    both = Ensemble([(RED, 1.0), (GREEN, 1.0)])
    both.module.to(torch.float64)
    assert RED.module.weight.dtype == GREEN.module.weight.dtype == torch.float64
    both.module.to(torch.float32)


def test_a_calibration_survives_its_file(tmp_path: Path) -> None:
    found = {"hpsv2.1": calibrate(torch.tensor([0.2, 0.3, 0.25])), "clip": Calibration(0.26, 0.01)}
    ensemble.save_calibrations(tmp_path / "calibration.json", found)
    assert ensemble.load_calibrations(tmp_path / "calibration.json") == found
    assert [path.name for path in tmp_path.iterdir()] == ["calibration.json"]


@pytest.mark.parametrize(
    "text", ["", "[]", '{"clip": 3}', '{"clip": {"mean": 1}}', '{"clip": {"mean": "x", "std": 1}}']
)
def test_a_damaged_calibration_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(HyperAlignError, match="not a file of calibrations"):
        ensemble.load_calibrations(path)


def test_wrong_members_and_calibrations_are_refused() -> None:
    with pytest.raises(HyperAlignError, match="at least one, and none twice"):
        Ensemble([])
    with pytest.raises(HyperAlignError, match="none twice"):
        Ensemble([(RED, 1.0), (RED, 2.0)])
    with pytest.raises(HyperAlignError, match="expected finite numbers"):
        Ensemble([(RED, float("nan"))])
    with pytest.raises(HyperAlignError, match="for ranks with a sum above 0"):
        Ensemble([(RED, 1.0), (GREEN, -1.0)], "rank")
    with pytest.raises(HyperAlignError, match="no calibration for green; found red"):
        Ensemble([(RED, 1.0), (GREEN, 1.0)], "z-score", {"red": Calibration(0, 1)})
    with pytest.raises(HyperAlignError, match="a std above 0"):
        Ensemble([(RED, 1.0)], "z-score", {"red": Calibration(0, 0)})
    with pytest.raises(HyperAlignError, match="1 scores to calibrate with"):
        calibrate(torch.ones(1))
    with pytest.raises(HyperAlignError, match="3 scores to calibrate with, all equal"):
        calibrate(torch.ones(3))
    for value in ("nan", "inf", "-inf"):
        with pytest.raises(HyperAlignError, match="whose deviation is nan; expected finite"):
            calibrate(torch.tensor([0.2, float(value), 0.3]))
