"""Gradient guidance on latents with scores whose best direction is known."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hyperalign.errors import HyperAlignError
from hyperalign.guidance import guidance_size, guided, guided_through, prediction_size

GOAL_BCHW = torch.linspace(-1, 1, 2 * 4 * 3 * 3).view(2, 4, 3, 3)


def nearness(x0_BCHW: Tensor) -> Tensor:
    return -(x0_BCHW - GOAL_BCHW).square().sum(dim=(1, 2, 3))


def prediction() -> Tensor:
    return torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))


@given(st.floats(0.01, 0.3), st.floats(0.01, 20.0))
def test_a_step_goes_along_the_gradient_with_a_size_relative_to_each_row(
    strength: float, sigma: float
) -> None:
    x0 = prediction() * torch.tensor([1.0, 5.0]).view(2, 1, 1, 1)
    step = guided(x0, sigma, strength, nearness) - x0
    relative = step.square().mean(dim=(1, 2, 3)).sqrt() / x0.square().mean(dim=(1, 2, 3)).sqrt()
    assert relative.tolist() == pytest.approx([strength * sigma / (1 + sigma)] * 2, rel=1e-2)
    likeness = torch.nn.functional.cosine_similarity(step.flatten(1), (GOAL_BCHW - x0).flatten(1))
    assert bool((likeness > 0.999).all())


def test_scores_rise_and_fall_with_the_sign() -> None:
    before = nearness(prediction())
    assert bool((nearness(guided(prediction(), 5.0, 0.2, nearness)) > before).all())
    assert bool((nearness(guided(prediction(), 5.0, -0.2, nearness)) < before).all())


@pytest.mark.parametrize(("sigma", "strength"), [(5.0, 0.0), (0.0, 0.2)])
def test_nothing_happens_at_no_strength_and_at_no_noise(sigma: float, strength: float) -> None:
    x0 = prediction()
    assert guided(x0, sigma, strength, nearness) is x0


def test_it_works_within_inference_mode() -> None:
    outside = guided(prediction(), 5.0, 0.2, nearness)
    with torch.inference_mode():
        assert torch.equal(guided(prediction(), 5.0, 0.2, nearness), outside)


def test_gradients_too_small_for_half_precision_count() -> None:
    def faint(x0_BCHW: Tensor) -> Tensor:
        return nearness(x0_BCHW).mul(1e-6).half().float()

    assert not torch.equal(guided(prediction(), 5.0, 0.2, faint), prediction())


def test_a_flat_score_moves_nothing() -> None:
    assert torch.equal(guided(prediction(), 5.0, 0.2, lambda x: x.flatten(1).sum(1) * 0.0), prediction())


def test_scores_without_a_gradient_are_refused() -> None:
    with pytest.raises(HyperAlignError, match="no gradient"):
        guided(prediction(), 5.0, 0.2, lambda x: x.detach().flatten(1).sum(1))


def test_a_gradient_that_is_no_number_is_refused() -> None:
    with pytest.raises(HyperAlignError, match="NaN or infinite"):
        guided(prediction(), 5.0, 0.2, lambda x: (x - x).sqrt().flatten(1).sum(1))


def test_a_step_by_hand() -> None:
    """rms of the row is 5; sigma / (1 + sigma) = 3/4; the gradient (1, 7) has an rms of 5."""
    x0 = torch.tensor([[[[1.0, -7.0]]]])
    slope = torch.tensor([1.0, 7.0])
    found = guided(x0, 3.0, 0.2, lambda x: (x * slope).sum(dim=(1, 2, 3)))
    torch.testing.assert_close(found, x0 + 0.2 * 0.75 * 5.0 * slope / 5.0)
    assert prediction_size(x0, 3.0).tolist() == [[[[3.75]]]]


def test_rows_are_measured_apart_in_any_rank() -> None:
    x0 = torch.tensor([[3.0, -3.0], [0.5, 0.5]])
    assert prediction_size(x0, 1.0).tolist() == [[1.5], [0.25]]
    assert guidance_size(x0, torch.zeros(2, 2), -2.0).tolist() == [[6.0], [1.0]]
    assert guidance_size(torch.zeros(2, 2), x0, 0.5).tolist() == [[1.5], [0.25]]
    found = guided(x0, 1.0, 1.0, lambda x: (x * torch.tensor([[1.0, 1.0], [0.0, -4.0]])).sum(dim=1))
    torch.testing.assert_close(found, x0 + torch.tensor([[1.5, 1.5], [0.0, -0.25 * 2**0.5]]))


def test_a_step_through_the_model_by_hand() -> None:
    """x0 = 2 x with n = 3: the score's slope (4, 3) in x0 is (8, 6) in x, of rms 50 ** 0.5."""
    x = torch.tensor([[[[1.0, -1.0]]]])

    def predict(latents: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * latents, torch.full((1, 1, 1, 1), 3.0)

    found = guided_through(x, predict, 0.5, lambda x0: (x0 * torch.tensor([4.0, 3.0])).sum(dim=(1, 2, 3)))
    torch.testing.assert_close(found, 2 * x + 0.5 * 3.0 * torch.tensor([8.0, 6.0]) / 50**0.5)
    assert not found.requires_grad


def test_a_step_has_the_precision_of_the_latents_and_leaves_them_alone() -> None:
    x = torch.ones(1, 1, 1, 2, dtype=torch.bfloat16)
    kept = x.clone()

    def predict(latents: Tensor) -> tuple[Tensor, Tensor]:
        return latents.float() * 2, torch.ones(1, 1, 1, 1)

    def score(x0: Tensor) -> Tensor:
        return x0.float().sum(dim=(1, 2, 3))

    assert guided_through(x, predict, 0.5, score).dtype == torch.bfloat16
    assert guided(x, 1.0, 0.5, score).dtype == torch.bfloat16
    assert torch.equal(x, kept)


def test_a_score_may_change_what_it_is_given() -> None:
    x0 = torch.ones(1, 1, 1, 2, dtype=torch.float32)
    guided(x0, 1.0, 0.5, lambda x: x.detach().zero_().sum() + x.sum(dim=(1, 2, 3)))
    assert x0.tolist() == [[[[1.0, 1.0]]]]


def test_a_step_through_the_model_works_in_inference_mode_and_without_gradients() -> None:
    def predict(latents: Tensor) -> tuple[Tensor, Tensor]:
        return latents.square(), torch.ones(2, 1, 1, 1)

    outside = guided_through(prediction(), predict, 0.1, nearness)
    with torch.inference_mode():
        assert torch.equal(guided_through(prediction(), predict, 0.1, nearness), outside)
    with torch.no_grad():
        assert torch.equal(guided_through(prediction(), predict, 0.1, nearness), outside)
        assert torch.equal(guided(prediction(), 5.0, 0.2, nearness), guided(prediction(), 5.0, 0.2, nearness))


def test_a_model_that_cuts_the_gradient_off_is_refused() -> None:
    with pytest.raises(HyperAlignError, match="prediction has no gradient"):
        guided_through(prediction(), lambda x: (x.detach(), torch.ones(2, 1, 1, 1)), 0.1, nearness)


def test_one_infinite_gradient_is_refused() -> None:
    with pytest.raises(HyperAlignError, match="gradient is NaN"):
        guided(torch.zeros(1, 1, 1, 2), 5.0, 0.2, lambda x: x[..., :1].sqrt().flatten(1).sum(1))
    with pytest.raises(HyperAlignError, match="gradient is NaN"):
        guided(torch.ones(1, 1, 1, 2), 5.0, 0.2, lambda x: (x[..., :1] - 1).sqrt().flatten(1).sum(1))


def test_sizes_carry_no_gradient_and_are_measured_in_single_precision() -> None:
    x0 = torch.full((1, 4), 300.0, requires_grad=True)
    assert not prediction_size(x0, 1.0).requires_grad
    assert not guidance_size(x0, 2 * x0, 1.0).requires_grad
    assert guidance_size(x0, torch.full((1, 4), 100.0), 2.0).tolist() == [[400.0]]
    assert prediction_size(x0.half(), 1.0).tolist() == [[150.0]]  # 300 squared is beyond half precision


@pytest.mark.parametrize("slope", [1e-3, 1e-14])
def test_a_faint_slope_makes_a_whole_step(slope: float) -> None:
    x0 = torch.ones(1, 1, 1, 2)
    found = guided(x0, 1.0, 0.5, lambda x: slope * x.sum(dim=(1, 2, 3)))
    torch.testing.assert_close(found, x0 + 0.5 * 0.5)
