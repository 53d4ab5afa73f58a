"""Runs in threads at the same time: the host's multi-GPU nodes call copies of one model side by side.

A barrier in the model's own blocks makes both threads stand in the middle of a forward together.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
import torch

from hyperalign.hosts.tracing import Recorder

WAYS = [("prefix", "S", "additive"), ("prefix", "I", "merged"), ("separate", "P", "merged")]
STEPS = 3


@pytest.fixture
def apply():
    from hyperalign.hosts.comfy.model import apply

    return apply


@dataclass
class Meeting:
    """Where as many threads as there are parties meet."""

    barrier: threading.Barrier = field(default_factory=lambda: threading.Barrier(1))

    def of(self, parties):
        self.barrier = threading.Barrier(parties, timeout=60)

    def __call__(self, *_):
        self.barrier.wait()


def meeting_in_blocks(patcher, meeting):
    def meet(h, *_):
        meeting()
        return h

    clone = patcher.clone()
    clone.set_model_input_block_patch(meet)
    clone.set_model_output_block_patch(lambda h, hsp, _: (meet(h), hsp))
    return clone


@pytest.fixture
def loading_in_turn():
    """The host's list of loaded models is made for one thread."""
    lock = threading.Lock()

    def prepare(executor, *args, **kwargs):
        with lock:
            return executor(*args, **kwargs)

    def add(patcher):
        patcher.add_wrapper_with_key("prepare_sampling", "in turn", prepare)
        return patcher

    return add


def noise(seed):
    return torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed))


def at_the_same_time(jobs):
    with ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result() for future in [pool.submit(job) for job in jobs]]


def assert_same_traces(found, expected):
    for ours, theirs in zip(found.stretches, expected.stretches, strict=True):
        assert torch.equal(ours.cores_GRMDA, theirs.cores_GRMDA)
        assert (ours.written, ours.in_force) == (theirs.written, theirs.in_force)


@pytest.mark.parametrize(("mode", "variant", "merging"), WAYS)
def test_clones_on_copies_of_the_base_sample_as_each_alone(
    tiny, sample, make_hyperalign, apply, copied, loading_in_turn, runs, mode, variant, merging
):
    recorder, meeting, before = Recorder(), Meeting(), sample(tiny.model)
    base = meeting_in_blocks(tiny.model, meeting)
    hyperalign = make_hyperalign(mode=mode, variant=variant)
    one = loading_in_turn(apply(base, hyperalign, merging=merging, recorder=recorder))
    other = one.clone()
    other.model = copied(one.model)
    jobs = [
        lambda: sample(one, noise=noise(5), steps=STEPS),
        lambda: sample(other, prompt="a blue square", noise=noise(6), steps=STEPS),
    ]
    alone = [job() for job in jobs]
    meeting.of(2)
    together = at_the_same_time(jobs)
    assert torch.equal(together[0], alone[0]) and torch.equal(together[1], alone[1])
    for latents in alone:
        first, second = (recorded for recorded in recorder.recordings if recorded.is_of(latents))
        assert_same_traces(second, first)
    assert [run["targets"] for run in runs()] == [runs()[0]["targets"]] * 4
    assert len({(run["evaluations"], run["generations"]) for run in runs()}) == 1
    assert torch.equal(sample(tiny.model), before)


@pytest.mark.parametrize(("mode", "variant", "merging"), WAYS)
def test_a_run_whose_prompts_are_worked_on_by_two_threads(
    tiny, sample, make_hyperalign, apply, copied, runs, mode, variant, merging
):
    """The host's work units of a run: the positive prompt on one GPU, the negative one on another."""
    meeting = Meeting()
    base = meeting_in_blocks(tiny.model, meeting)
    aligned = apply(base, make_hyperalign(mode=mode, variant=variant), merging=merging)
    models = [aligned.model, copied(aligned.model)]

    def in_workers(parties):
        meeting.of(parties)

        def calculate(executor, model, conds, *args):
            def work(index):
                with torch.inference_mode():
                    own = [cond if role == index else None for role, cond in enumerate(conds)]
                    return executor(models[index], own, *args)[index]

            models[1].current_patcher = model.current_patcher
            if parties == 1:
                return [work(0), work(1)]
            return at_the_same_time([lambda: work(0), lambda: work(1)])

        clone = aligned.clone()
        clone.add_wrapper_with_key("calc_cond_batch", "workers", calculate)
        return clone

    in_turn = sample(in_workers(1), steps=STEPS)
    assert torch.equal(sample(in_workers(2), steps=STEPS), in_turn)
    assert runs()[0] == runs()[1]


@pytest.mark.parametrize("merging", ["additive", "merged"])
def test_clones_with_the_same_layers_take_turns(
    tiny, sample, make_hyperalign, apply, loading_in_turn, merging
):
    before = sample(tiny.model)
    first = loading_in_turn(apply(tiny.model, make_hyperalign(variant="I"), merging=merging))
    clones = first, first.clone(), loading_in_turn(apply(tiny.model, make_hyperalign(seed=2)))
    meeting = Meeting()
    jobs = [
        lambda model=model, seed=seed: sample(model, noise=noise(seed), steps=STEPS, callback=meeting)
        for seed, model in enumerate(clones)
    ]
    alone = [job() for job in jobs]
    meeting.of(len(jobs))
    for found, expected in zip(at_the_same_time(jobs), alone, strict=True):
        assert torch.equal(found, expected)
    assert torch.equal(sample(tiny.model), before)
