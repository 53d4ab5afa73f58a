"""The search over starting noise, on a reward that is a plain function of the noise."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hyperalign.errors import HyperAlignError
from hyperalign.search import MODES, SEEDS, Plan, Search, SearchMode, epsilon_greedy, near

NO_NUMBERS = (math.nan, math.inf, -math.inf)


def fresh(seed: int) -> Tensor:
    return torch.randn(1, 8, generator=torch.Generator().manual_seed(seed % (1 << 63)))


def height(noise: Tensor) -> float:
    return -float((noise - 1.0).square().sum())


def finished(plan: Plan, proposals: int = 1000) -> Search[Tensor]:
    search = Search[Tensor](plan, fresh)
    for _ in range(proposals):
        if not (batch := search.propose()):
            break
        search.record(batch, [height(one.noise) for one in batch], [one.noise for one in batch])
    return search


@given(
    st.sampled_from(MODES),
    st.integers(1, 12),
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(0, SEEDS - 1),
)
def test_every_seed_is_tried_once_and_the_best_are_kept(
    mode: SearchMode, count: int, batch: int, keep: int, seed: int
) -> None:
    search = finished(Plan(count, seed, mode, batch, keep))
    assert [seed for seed, _ in search.tried] == [(seed + index) % SEEDS for index in range(count)]
    best = sorted((score for _, score in search.tried), reverse=True)[:keep]
    assert [scored.score for scored in search.kept] == best
    assert all(height(scored.sample) == scored.score for scored in search.kept)


@pytest.mark.parametrize("mode", MODES)
def test_batches_change_nothing(mode: SearchMode) -> None:
    runs = [finished(Plan(12, 5, mode, batch)).tried for batch in (1, 3, 12)]
    assert runs[0] == runs[1] == runs[2]


def test_best_of_n_draws_each_seed_s_own_noise() -> None:
    search = Search[Tensor](Plan(4, seed=9, batch=4), fresh)
    assert all(torch.equal(one.noise, fresh(9 + index)) for index, one in enumerate(search.propose()))


def test_searching_near_the_best_climbs_higher_than_fresh_noise() -> None:
    plain, local = (
        sum(finished(Plan(64, seed, mode)).kept[0].score for seed in range(0, 6400, 640))
        for mode in ("best-of-N", "zero-order")
    )
    assert local > plain + 5.0


def test_epsilon_is_how_often_a_candidate_is_fresh() -> None:
    for epsilon, expected in ((0.0, 4), (1.0, 400), (0.25, 103)):
        search = Search[Tensor](Plan(400, 1, "epsilon-greedy", epsilon=epsilon), fresh)
        count = 0
        while batch := search.propose():
            count += torch.equal(batch[0].noise, fresh(batch[0].seed))
            search.record(batch, [height(batch[0].noise)], [batch[0].noise])
        assert count == pytest.approx(expected, abs=0 if epsilon in (0.0, 1.0) else 30)


def searched(plan: Plan, seed: int, tried: list[float] | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(seed)

    def rate(candidates: list[Tensor]) -> list[float]:
        scores = [height(candidate) for candidate in candidates]
        if tried is not None:
            tried.extend(scores)
        return scores

    return epsilon_greedy(plan, lambda: torch.randn(1, 8, generator=generator), rate, random.Random(seed))


def test_a_step_s_search_moves_to_the_best_of_each_round() -> None:
    tried: list[float] = []
    plan = Plan(1, mode="epsilon-greedy-steps", round_size=4, iterations=20, radius=0.15)
    found = searched(plan, 5, tried)
    assert len(tried) == 80
    assert height(found) == max(tried[-4:])
    assert torch.equal(found, searched(plan, 5))


def test_a_step_s_search_finds_better_noise_than_chance_and_keeps_its_variance() -> None:
    plan = Plan(1, mode="epsilon-greedy-steps", round_size=4, iterations=10, radius=0.5)
    heights = [height(searched(plan, seed)) for seed in range(30)]
    chance = [height(fresh(seed)) for seed in range(30)]
    assert sum(heights) / 30 > sum(chance) / 30 + 3.0
    flat = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(1, 5000, generator=flat)  # noqa: E731
    still = epsilon_greedy(plan, draw, lambda candidates: [0.0] * len(candidates), random.Random(0))
    assert float(still.std()) == pytest.approx(1.0, abs=0.05)


def test_it_stops_at_the_threshold() -> None:
    search = finished(Plan(100, stop_at=-9.0))
    assert search.kept[0].score >= -9.0
    assert all(score < -9.0 for _, score in search.tried[:-1])
    assert len(search.tried) < 100


def test_it_may_be_left_at_any_time() -> None:
    left, whole = finished(Plan(9, 3), proposals=4), finished(Plan(4, 3))
    assert left.tried == whole.tried
    assert left.kept[0].seed == whole.kept[0].seed


@given(st.floats(0.01, 10.0))
def test_noise_near_another_is_standard_normal_and_nearer_for_less_radius(radius: float) -> None:
    pivot, other = torch.randn(2, 20_000, generator=torch.Generator().manual_seed(0))
    found = near(pivot, other, radius)
    assert float(found.std()) == pytest.approx(1.0, abs=0.03)
    likeness = float(torch.nn.functional.cosine_similarity(found, pivot, dim=0))
    assert likeness == pytest.approx(1.0 / math.sqrt(1.0 + radius**2), abs=0.03)


@pytest.mark.parametrize(
    "values",
    [
        {"count": 0}, {"count": 1, "batch": 0}, {"count": 1, "keep": 0}, {"count": 1, "round_size": 0},
        {"count": 1, "radius": 0.0}, {"count": 1, "epsilon": 1.5}, {"count": 1, "stop_at": math.nan},
        {"count": 1, "iterations": 0},
    ],
)  # fmt: skip
def test_plans_that_make_no_sense_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(HyperAlignError, match="expected"):
        Plan(**values)  # type: ignore[arg-type]


@given(st.sampled_from(MODES), st.integers(1, 5), st.sets(st.integers(0, 11)), st.sampled_from(NO_NUMBERS))
def test_candidates_that_failed_are_tried_but_neither_kept_nor_searched_near(
    mode: SearchMode, batch: int, failing: set[int], no_number: float
) -> None:
    search = Search[Tensor](Plan(12, 5, mode, batch, keep=12, epsilon=0.0), fresh)
    noises: list[Tensor] = []
    while candidates := search.propose():
        scores = [no_number if one.seed - 5 in failing else height(one.noise) for one in candidates]
        search.record(candidates, scores, [one.noise for one in candidates])
        noises += [one.noise for one in candidates]
    assert [seed for seed, _ in search.tried] == list(range(5, 17))
    assert {seed - 5 for seed, score in search.tried if not math.isfinite(score)} == failing
    assert sorted(scored.seed - 5 for scored in search.kept) == sorted(set(range(12)) - failing)
    if mode in ("zero-order", "epsilon-greedy"):
        before = [at for at in range(8) if at not in failing]  # the last of three rounds has four
        pivot = max((noises[at] for at in before), key=height, default=None)
        last = fresh(16) if pivot is None else near(pivot, fresh(16), 0.5)
        assert torch.equal(noises[11], last)


@pytest.mark.parametrize("no_number", NO_NUMBERS)
def test_a_step_s_noise_whose_score_is_no_number_never_wins(no_number: float) -> None:
    tried: list[Tensor] = []

    def rate(candidates: list[Tensor]) -> list[float]:
        tried.extend(candidates)
        return [no_number, -2.0, -1.0, no_number]

    plan = Plan(1, mode="epsilon-greedy-steps", round_size=4, iterations=3)
    generator = torch.Generator().manual_seed(0)
    found = epsilon_greedy(plan, lambda: torch.randn(1, 8, generator=generator), rate, random.Random(0))
    assert torch.equal(found, tried[-2])


def test_the_settings_one_gets_without_asking() -> None:
    plan = Plan(3)
    assert (plan.seed, plan.mode, plan.batch, plan.keep) == (0, "best-of-N", 1, 1)
    assert (plan.stop_at, plan.round_size, plan.radius) == (math.inf, 4, 0.5)
    assert (plan.epsilon, plan.iterations) == (0.4, 4)
    assert SEEDS == 2**64


def test_the_least_and_the_greatest_settings_are_taken() -> None:
    Plan(1, batch=1, keep=1, round_size=1, iterations=1, radius=1e-9, epsilon=0.0, stop_at=-math.inf)
    Plan(1, epsilon=1.0, radius=2.0)
    for wrong in ({"epsilon": -0.1}, {"radius": math.inf}, {"radius": math.nan}, {"radius": -1.0},
                  {"epsilon": math.nan}, {"epsilon": 1.01}):  # fmt: skip
        with pytest.raises(HyperAlignError, match="radius"):
            Plan(1, **wrong)


def sizes(plan: Plan) -> list[int]:
    search, found = Search[Tensor](plan, fresh), []
    while batch := search.propose():
        found.append(len(batch))
        search.record(batch, [height(one.noise) for one in batch], [one.noise for one in batch])
    return found


def test_batches_end_with_a_round_and_with_the_last_candidate() -> None:
    assert sizes(Plan(7, batch=3)) == [3, 3, 1]
    assert sizes(Plan(10, mode="zero-order", batch=3)) == [3, 1, 3, 1, 2]
    assert sizes(Plan(5, mode="epsilon-greedy", batch=9, round_size=2)) == [2, 2, 1]
    assert sizes(Plan(3, mode="epsilon-greedy-steps", batch=3)) == [1, 1, 1]


def played(plan: Plan, scores: list[float]) -> tuple[list[Tensor], Search[int]]:
    """Returns each candidate's noise when candidates get these scores in turn."""
    search, noises = Search[int](plan, fresh), []
    while batch := search.propose():
        done = len(noises)
        noises += [one.noise for one in batch]
        search.record(batch, scores[done : len(noises)], list(range(done, len(noises))))
    return noises, search


def test_after_each_round_the_search_goes_on_near_the_best_so_far() -> None:
    """Rounds of two: the best is candidate 1, then, though 3 is as good, still 1, then 5."""
    plan = Plan(8, 20, "zero-order", round_size=2, radius=0.25)
    noises, search = played(plan, [1.0, 3.0, 2.0, 3.0, 2.0, 4.0, 9.0, 5.0])
    pivots = [None, None, 1, 1, 1, 1, 5, 5]
    for index, pivot in enumerate(pivots):
        wanted = fresh(20 + index)
        if pivot is not None:
            wanted = (noises[pivot] + 0.25 * wanted) / (1 + 0.25**2) ** 0.5
        assert torch.allclose(noises[index], wanted)
    assert [(one.score, one.seed, one.sample) for one in search.kept] == [(9.0, 26, 6)]


def test_a_candidate_of_epsilon_greedy_is_fresh_when_its_seed_s_chance_is_below_epsilon() -> None:
    noises, _ = played(Plan(30, 5, "epsilon-greedy", round_size=1, epsilon=0.4), [1.0] + [0.0] * 29)
    for index, noise in enumerate(noises):
        is_fresh = index == 0 or random.Random(5 + index).random() < 0.4
        wanted = fresh(5 + index) if is_fresh else near(noises[0], fresh(5 + index), 0.5)
        assert torch.equal(noise, wanted)


def test_equals_are_kept_in_the_order_in_which_they_came() -> None:
    _, search = played(Plan(4, keep=3), [1.0, 2.0, 2.0, 1.0])
    assert [one.sample for one in search.kept] == [1, 2, 0]
    assert search.tried == [(0, 1.0), (1, 2.0), (2, 2.0), (3, 1.0)]


def test_the_threshold_itself_ends_the_search() -> None:
    _, search = played(Plan(9, stop_at=2.0), [1.0, 1.999, 2.0])
    assert len(search.tried) == 3


def test_near_by_hand() -> None:
    assert near(torch.tensor([3.0]), torch.tensor([4.0]), 0.75).item() == pytest.approx(6.0 / 1.25)


def test_a_step_s_candidates_by_hand() -> None:
    """Chance in turn: below epsilon a fresh one, else the next number times the radius from the pivot."""
    numbers = iter(float(value) for value in range(1, 100))
    rated: list[list[float]] = []

    class Chance:
        def __init__(self) -> None:
            self.given = iter([0.3, 0.5, 0.5, 0.4, 1.0, 0.1, 0.39])

        def random(self) -> float:
            return next(self.given)

    def rate(candidates: list[Tensor]) -> list[float]:
        rated.append([float(one) for one in candidates])
        return [0.0, 1.0] if len(rated) == 1 else [math.nan, -5.0]

    plan = Plan(1, round_size=2, iterations=2, radius=2.0, epsilon=0.4)
    found = epsilon_greedy(plan, lambda: torch.tensor([next(numbers)]), rate, Chance())  # type: ignore[arg-type]
    second = (1 + 1.0 * 3) / 2**0.5  # from pivot 1, by 2 * 0.5
    assert rated[0] == pytest.approx([2.0, second])
    assert rated[1] == pytest.approx([(second + 2.0 * 4) / 5**0.5, 5.0])
    assert found.item() == 5.0
