"""One run's memory: evaluations counted, weights written when due, and found again by their chunk."""

from __future__ import annotations

import torch
from torch import Tensor

from hyperalign.hosts.run_state import Chunk, Run
from hyperalign.schedule import Schedule

SHAPE = (1, 4, 8, 8)
COND, UNCOND = Chunk("prompt", 0, SHAPE), Chunk("empty", 1, SHAPE)


def cores(value: float, rows: int = 1) -> Tensor:
    return torch.full((rows, 2, 3, 3), value)


def run(variant="S", keys: tuple[float, ...] = ()) -> Run:
    return Run(Schedule(variant, keys))


def test_a_run_starts_with_nothing() -> None:
    fresh = run()
    assert (fresh.evaluations, fresh.generations) == (0, 0)
    assert fresh.due([COND, UNCOND], 1.0) == [0, 1]


def test_calls_of_a_declared_evaluation_belong_to_it_even_when_a_chunk_or_the_time_changes() -> None:
    one = run()
    one.begin_evaluation()
    assert one.enter_call([COND], 0.9) == [COND]
    assert one.enter_call([COND, UNCOND], 0.8) == [Chunk("prompt", 0, SHAPE, 1), UNCOND]
    assert one.enter_call([COND], 0.8) == [Chunk("prompt", 0, SHAPE, 2)]
    assert one.evaluations == 1
    one.begin_evaluation()
    assert one.enter_call([COND], 0.8) == [COND]
    assert one.evaluations == 2


def test_a_chunk_twice_in_one_call_is_counted() -> None:
    one = run()
    assert [chunk.occurrence for chunk in one.enter_call([COND, COND, UNCOND], 0.5)] == [0, 1, 0]


def test_outside_a_declared_evaluation_the_time_tells_a_new_one() -> None:
    one = run()
    assert one.enter_call([COND], 0.9) == [COND]
    assert one.enter_call([UNCOND], 0.9) == [UNCOND]
    assert one.evaluations == 1
    one.enter_call([UNCOND], 0.8)
    assert one.evaluations == 2
    one.enter_call([COND], 0.8)
    assert one.evaluations == 2


def test_outside_a_declared_evaluation_a_chunk_that_comes_round_again_tells_a_new_one() -> None:
    one = run()
    one.enter_call([COND, UNCOND], 0.9)
    assert one.enter_call([UNCOND, Chunk("third", 0, SHAPE)], 0.9)[0] == UNCOND
    assert one.evaluations == 2


def test_calls_after_the_end_of_an_evaluation_open_their_own() -> None:
    one = run()
    one.begin_evaluation()
    one.enter_call([COND], 0.9)
    one.end_evaluation()
    one.enter_call([UNCOND], 0.9)
    assert one.evaluations == 2
    one.enter_call([COND], 0.9)
    assert one.evaluations == 2


def test_a_declared_evaluation_ends_a_guessed_one() -> None:
    one = run()
    one.enter_call([COND], 0.9)
    one.begin_evaluation()
    one.enter_call([COND], 0.9)
    one.enter_call([COND], 0.7)
    assert one.evaluations == 2


def test_an_evaluation_is_one_generation_however_many_chunks_are_written() -> None:
    one = run()
    for _ in range(2):
        one.begin_evaluation()
        one.write(COND, cores(1), 0.9)
        one.write(UNCOND, cores(2), 0.9)
    one.begin_evaluation()
    assert (one.evaluations, one.generations) == (3, 2)
    one.write(COND, cores(1), 0.9)
    assert one.generations == 3


def test_weights_written_before_any_evaluation_count_too() -> None:
    one = run()
    one.write(COND, cores(1), 0.9)
    assert one.generations == 1


def test_only_what_is_due_is_written_again() -> None:
    """Key time 0.5: weights of the upper segment serve until the time falls to it."""
    one = run("P", (0.5,))
    one.write(COND, cores(1), 0.9)
    assert one.due([COND, UNCOND], 0.6) == [1]
    assert one.due([UNCOND, COND], 0.5) == [0, 1]
    one.write(COND, cores(1), 0.5)
    assert one.due([UNCOND, COND], 0.5) == [0]
    assert one.due([COND], 0.1) == []


def test_weights_are_kept_by_source_role_shape_and_occurrence() -> None:
    one = run("I")
    one.write(COND, cores(1), 1.0)
    others = [
        Chunk("other", 0, SHAPE), Chunk("prompt", 1, SHAPE), Chunk("prompt", 0, (1, 4, 8, 9)),
        Chunk("prompt", 0, SHAPE, 1),
    ]  # fmt: skip
    assert one.due([COND, *others], 0.3) == [1, 2, 3, 4]


def test_cores_of_a_call_are_joined_in_its_order_and_kept_until_something_is_written() -> None:
    one = run("I")
    one.write(COND, cores(1, 2), 1.0)
    one.write(UNCOND, cores(2), 1.0)
    both = one.cores([UNCOND, COND])
    assert both[:, 0, 0, 0].tolist() == [2, 1, 1]
    assert one.cores([UNCOND, COND]) is both
    assert one.cores([COND, UNCOND])[:, 0, 0, 0].tolist() == [1, 1, 2]
    one.write(UNCOND, cores(3), 1.0)
    assert one.cores([COND, UNCOND])[:, 0, 0, 0].tolist() == [1, 1, 3]


def test_a_single_chunk_s_cores_are_not_copied() -> None:
    one, written = run(), cores(1)
    one.write(COND, written, 1.0)
    assert one.cores([COND]) is written


def test_variations_of_a_sample_begin_with_its_weights_and_leave_the_run_alone() -> None:
    one = run("P", (0.5,))
    (cond,) = one.enter_call([COND], 0.9)
    one.write(cond, cores(1.0), 0.9)
    three = Chunk("prompt", 0, (3, *SHAPE[1:]))
    tried = one.variations(3)
    tried.begin_evaluation()
    assert tried.due([three], 0.6) == []
    assert torch.equal(tried.cores([three]), cores(1.0, rows=3))
    assert tried.due([three], 0.4) == [0]
    tried.write(three, cores(2.0, rows=3), 0.4)
    assert one.due([COND], 0.6) == []
    assert one.due([COND], 0.4) == [0]
    assert torch.equal(one.cores([COND]), cores(1.0))
    assert (one.evaluations, one.generations) == (1, 1)
