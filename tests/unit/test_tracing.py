"""The recording of a traced run, without a host."""

from __future__ import annotations

import torch

from hyperalign.hosts.run_state import Chunk, Run
from hyperalign.hosts.tracing import Recorder, TracedRun
from hyperalign.hypernetwork import HyperNetwork, HyperNetworkConfig
from hyperalign.schedule import Schedule
from hyperalign.targets import Target

COND, UNCOND = Chunk("cond", 0, (1, 4, 2, 2)), Chunk("uncond", 1, (1, 4, 2, 2))
TIMES = (1.0, 0.6, 0.3)


def network() -> HyperNetwork:
    torch.manual_seed(0)
    targets = [Target("mid_block.attentions.0.to_q", 6, 5), Target("mid_block.attentions.0.to_k", 6, 5)]
    made = HyperNetwork(HyperNetworkConfig(rank=2, a=3, b=2, width=16, heads=2, layers=1), targets, (4,), 5)
    for b_aux in made.b_aux:
        torch.nn.init.normal_(b_aux)
    return made.requires_grad_(False)


def sampled(run: Run, active: tuple[bool, ...] = (True, True, True)) -> None:
    """Runs three evaluations as the adapter does."""
    for u, acts in zip(TIMES, active, strict=True):
        run.begin_evaluation()
        if acts:
            chunks = run.enter_call([UNCOND, COND], u)
            for index in run.due(chunks, u):
                run.write(chunks[index], torch.full((1, 2, 2, 3), u + index), u)
        run.end_evaluation()
        if isinstance(run, TracedRun):
            run.note_time(torch.tensor(u))


def test_a_traced_run_writes_as_a_plain_one():
    schedule = Schedule("P", (0.5,))
    plain, traced = Run(schedule), Recorder().open(schedule)
    for run in (plain, traced):
        sampled(run)
    assert (traced.evaluations, traced.generations) == (plain.evaluations, plain.generations) == (3, 2)
    assert torch.equal(traced.cores([COND, UNCOND]), plain.cores([COND, UNCOND]))


def test_conditionings_are_tracks_with_the_weights_in_force():
    recorder = Recorder()
    run = recorder.open(Schedule("P", (0.5,)))
    sampled(run)
    recorder.keep(run, network(), 0.5, None)
    trace = recorder.select().trace()
    used = {track.name: track.generation_used for track in trace.tracks}
    assert used == {"uncond": (0, 0, 1), "cond": (0, 0, 1)}
    assert [track.generated_at for track in trace.tracks] == [(0, 2), (0, 2)]
    assert trace.times == tuple(torch.tensor(TIMES).tolist())
    assert torch.equal(trace.strengths_EM, torch.full((3, 2), 0.5))


def test_evaluations_without_weights_are_columns_too():
    recorder = Recorder()
    run = recorder.open(Schedule("S"))
    sampled(run, active=(False, True, True))
    recorder.keep(run, network(), 1.0, None)
    assert [track.generation_used for track in recorder.select().trace().tracks] == [(-1, 0, 1)] * 2


def test_undeclared_evaluations_have_their_time():
    recorder = Recorder()
    run = recorder.open(Schedule("S"))
    for u in TIMES:
        (chunk,) = run.enter_call([COND], u)
        run.write(chunk, torch.zeros(1, 2, 2, 3), u)
    recorder.keep(run, network(), 1.0, None)
    assert recorder.select().trace().times == TIMES


def test_runs_that_wrote_nothing_are_not_kept():
    recorder = Recorder()
    run = recorder.open(Schedule("S"))
    sampled(run, active=(False, False, False))
    recorder.keep(run, network(), 1.0, None)
    assert recorder.recordings == []


def test_a_run_is_known_by_its_latents_in_any_precision():
    recorder, latents = Recorder(), torch.randn(1, 4, 2, 2)
    for samples in (latents, latents + 1):
        run = recorder.open(Schedule("S"))
        sampled(run)
        recorder.keep(run, network(), 1.0, samples)
    first, second = recorder.recordings
    assert recorder.select(latents) is first
    assert recorder.select(latents.half()) is first
    assert recorder.select() is second
    assert recorder.select(torch.zeros(1, 4, 3, 3)) is second  # another size: changed since


def test_predictions_of_different_shapes_are_not_kept():
    recorder = Recorder(keeps_predictions=True)
    for rows in (1, 2):
        run = recorder.open(Schedule("S"))
        sampled(run)
        for count in (1, 1, rows):
            run.note_prediction(torch.zeros(count, 4, 2, 2))
        recorder.keep(run, network(), 1.0, None)
    assert [kept.predictions_EBCHW is None for kept in recorder.recordings] == [False, True]
