"""Traces of runs in the host's own samplers, and the nodes that draw them."""

from __future__ import annotations

import importlib
import json
from types import ModuleType
from typing import Any

import pytest
import torch

from hyperalign.delta import merged_delta
from hyperalign.errors import HyperAlignError
from hyperalign.hosts.tracing import Recorder
from hyperalign.strength import StrengthCurve
from hyperalign.trace import as_json, block_strengths, dynamics, generated_at, strengths
from hyperalign.trace_energy import PARTS
from hyperalign.trace_pca import spread_of

MODES = ["prefix", "separate"]


@pytest.fixture
def traced(tiny, sample, make_hyperalign):
    """Samples with a recorder; returns the latents, the trace and the hypernetwork."""
    from hyperalign.hosts.comfy.model import apply

    def run(strength=1.0, start=0.0, end=1.0, curve=None, predictions=False, sampling=None, **options):
        loaded = make_hyperalign(**options)
        recorder = Recorder(keeps_predictions=predictions)
        model = apply(tiny.model, loaded, strength, start, end, "auto", curve, recorder)
        latents = sample(model, **(sampling or {}))
        return latents, recorder.select().trace(), loaded.hyperalign.network

    return run


@pytest.fixture
def trace_nodes(pack: ModuleType, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    import folder_paths

    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path))
    return importlib.import_module(f"{pack.__name__}.nodes.trace")


@pytest.fixture
def linked(comfy: ModuleType):
    """Puts a node with links to it into the place of the one that the host executes."""
    from comfy_execution.graph import DynamicPrompt
    from comfy_execution.progress import reset_progress_state
    from comfy_execution.utils import CurrentNodeContext

    def enter(*readers: tuple[str, dict[str, Any]]):
        prompt = {"7": {"class_type": "HyperAlignSampler", "inputs": {}}}
        prompt |= {
            str(20 + place): {"class_type": kind, "inputs": inputs}
            for place, (kind, inputs) in enumerate(readers)
        }
        reset_progress_state("prompt", DynamicPrompt(prompt))
        return CurrentNodeContext("prompt", "7", 0)

    yield enter
    reset_progress_state("", DynamicPrompt({}))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("variant", ["S", "P", "I"])
def test_recording_changes_no_image(tiny, sample, traced, make_hyperalign, mode, variant):
    from hyperalign.hosts.comfy.model import apply

    latents, trace, _ = traced(mode=mode, variant=variant, predictions=True)
    assert torch.equal(latents, sample(apply(tiny.model, make_hyperalign(mode=mode, variant=variant))))
    assert trace.times == pytest.approx([1.0, 0.667, 0.334, 0.0], abs=0.01)


@pytest.mark.parametrize(("variant", "written"), [("S", [0, 1, 2, 3]), ("P", [0, 1, 2]), ("I", [0])])
def test_weights_are_written_when_the_variant_says(traced, variant, written):
    _, trace, _ = traced(variant=variant)
    assert generated_at(trace) == written
    assert [track.name for track in trace.tracks] in (["cond", "uncond"], ["uncond", "cond"])


def test_the_strengths_are_the_lengths_of_the_changes_at_work(traced, monkeypatch):
    from hyperalign.hosts.folding import Folding

    calls: list[torch.Tensor] = []
    original = Folding.fold

    def spy(folding, cores_BMDA, *settings):
        calls.append(cores_BMDA.clone())
        return original(folding, cores_BMDA, *settings)

    monkeypatch.setattr(Folding, "fold", spy)
    curve = StrengthCurve((1.0, 0.5), groups=(1.0, 2.0, 0.5))
    _, trace, network = traced(strength=0.8, curve=curve, sampling={"cfg": 1.0})
    (track,) = trace.tracks
    measured = strengths(trace, track)
    assert len(calls) == 4
    for evaluation, cores_BMDA in enumerate(calls):
        for target in range(len(network.targets)):
            delta = 0.8 * merged_delta(*network.aux(target), cores_BMDA[0, target])
            assert float(measured[evaluation, 0, target]) == pytest.approx(float(delta.norm()), rel=1e-4)


def test_cosine_and_change_are_those_of_the_merged_weights(traced):
    _, trace, _ = traced(variant="S")
    for track in trace.tracks:
        moves = dynamics(trace, track)
        assert float(moves.cosines[0, 0]) == pytest.approx(1.0, abs=1e-5)
        assert float(moves.changes[0, 0]) == 0.0
        assert bool((moves.changes[1:] > 0).all())
    first, second = (dynamics(trace, track).norms for track in trace.tracks)
    assert not torch.allclose(first, second)  # cond and uncond have weights of their own


def test_a_curve_leaves_the_generated_weights_and_scales_their_strength(traced):
    _, full, _ = traced(variant="I")
    _, half, _ = traced(variant="I", curve=StrengthCurve((0.5,)))
    assert torch.allclose(block_strengths(half)[1], 0.5 * block_strengths(full)[1], rtol=1e-4)


def test_steps_outside_the_window_are_off(traced):
    _, trace, _ = traced(variant="I", start=0.3, sampling={"steps": 6})
    off = block_strengths(trace)[1].isnan().all(dim=1).tolist()
    assert off == [True, True, False, False, False, False]
    numbers = as_json(trace)["tracks"][0]
    assert numbers["norm"][0][0] is None
    assert numbers["norm"][0][-1] > 0
    assert len(trace.times) == 6
    assert not any(time != time for time in trace.times)


def test_every_evaluation_of_a_second_order_sampler_is_a_column(traced):
    _, trace, _ = traced(variant="S", sampling={"sampler": "heun"})
    assert len(trace.times) == 7
    assert generated_at(trace) == list(range(7))


def test_predictions_are_the_images_foreseen(traced, tiny):
    latents, trace, _ = traced(predictions=True, sampling={"noise": torch.randn(2, 4, 16, 16)})
    predictions = trace.predictions_EBCHW
    assert predictions is not None
    assert predictions.shape == (4, 2, 4, 16, 16)
    assert torch.allclose(predictions[-1], latents, atol=1e-4)  # the last step lands on its prediction


def test_an_interrupted_run_is_not_kept(tiny, sample, make_hyperalign):
    from hyperalign.hosts.comfy.model import apply

    def stop(step, *_):
        if step == 1:
            raise KeyboardInterrupt

    recorder = Recorder()
    model = apply(tiny.model, make_hyperalign(), recorder=recorder)
    with pytest.raises(KeyboardInterrupt):
        sample(model, callback=stop)
    assert recorder.recordings == []


def test_a_run_is_found_by_what_it_sampled(tiny, sample, make_hyperalign):
    from hyperalign.hosts.comfy.model import apply
    from hyperalign.hosts.comfy.trace import select, select_all

    recorder = Recorder()
    model = apply(tiny.model, make_hyperalign(), recorder=recorder)
    first, second = (sample(model, prompt=prompt) for prompt in ("a red heart", "a blue square"))
    assert len(recorder.recordings) == 2
    assert select(recorder, {"samples": first}) is recorder.recordings[0]
    assert select(recorder, {"samples": second.half().float()}) is recorder.recordings[1]
    assert select(recorder, None) is recorder.recordings[1]
    assert select_all([recorder], [{"samples": first}, {"samples": second}]) == recorder.recordings
    assert select_all([recorder, recorder], []) == recorder.recordings[1:]


def test_old_runs_are_let_go(tiny, sample, make_hyperalign, monkeypatch):
    from hyperalign.hosts import tracing
    from hyperalign.hosts.comfy.model import apply

    recorder = Recorder()
    model = apply(tiny.model, make_hyperalign(), recorder=recorder)
    sample(model)
    monkeypatch.setattr(tracing, "KEPT_BYTES", 2 * recorder.recordings[0].bytes)
    for _ in range(3):
        sample(model)
    assert len(recorder.recordings) == 2
    monkeypatch.setattr(tracing, "KEPT_BYTES", 0)
    sample(model)
    assert len(recorder.recordings) == 1


def test_nothing_is_recorded_unless_the_output_is_linked(comfy, linked):
    from hyperalign.hosts.comfy.trace import recorder_for, wanted

    assert recorder_for(1) is None  # no node is executed
    with linked(("VAEDecode", {"samples": ["7", 0]}), ("HyperAlignTrace", {"trace": ["8", 1]})):
        assert wanted(1) == ""
        assert recorder_for(1) is None


@pytest.mark.parametrize(
    ("reader", "predictions"),
    [
        (("HyperAlignTrace", {"trace": ["7", 1]}), False),
        (("HyperAlignTrace", {"trace": ["7", 1], "reward": ["9", 0]}), True),
        (("HyperAlignTracePca", {"trace_1": ["7", 1]}), False),
        (("SomeonesListMaker", {"item": ["7", 1]}), True),
    ],
)
def test_predictions_are_recorded_if_a_reward_may_score_them(comfy, linked, reader, predictions):
    from hyperalign.hosts.comfy.trace import recorder_for

    with linked(reader):
        recorder = recorder_for(1)
    assert recorder is not None
    assert recorder.keeps_predictions is predictions


def test_apply_and_sampler_change_their_fingerprint_with_the_link(pack, linked):
    nodes = importlib.import_module(f"{pack.__name__}.nodes.hypernetwork")
    sampler = importlib.import_module(f"{pack.__name__}.nodes.sampler")
    for node in (nodes.HyperAlignApply, sampler.HyperAlignSampler):
        with linked():
            without = node.fingerprint_inputs(strength=1.0)
        with linked(("HyperAlignTrace", {"trace": ["7", 1]})):
            assert node.fingerprint_inputs(strength=1.0) != without


def test_the_trace_node_draws_and_tells_all_rows(trace_nodes, tiny, sample, make_hyperalign):
    from hyperalign.hosts.comfy.model import apply

    recorder = Recorder()
    model = apply(tiny.model, make_hyperalign(variant="P"), recorder=recorder)
    sample(model, noise=torch.randn(3, 4, 16, 16))
    output = trace_nodes.HyperAlignTrace.execute(recorder)
    image, text = output.result
    assert image.shape[0] == 1
    assert image.shape[2:] == (1000, 3)
    numbers = json.loads(text)
    assert numbers["variant"] == "P"
    assert numbers["key_times"] == [0.8, 0.5]
    assert sum(numbers["shares"].values()) == pytest.approx(1.0)
    by_name = {track["name"]: track for track in numbers["tracks"]}
    assert set(by_name) == {"cond", "uncond"}
    assert len(by_name["cond"]["cosine"]) == 3  # rows
    assert len(by_name["cond"]["block_strength"]) == len(numbers["blocks"])
    assert output.ui.as_dict()["images"]


def test_a_reward_scores_every_step(pack, trace_nodes, tiny, sample, make_hyperalign):
    from hyperalign.hosts.comfy.model import apply

    rewards = importlib.import_module(f"{pack.__name__}.hyperalign.hosts.comfy.rewards")
    reward = rewards.hosted(
        importlib.import_module(f"{pack.__name__}.hyperalign.rewards.tiny").load("tiny reward")
    )
    recorder = Recorder(keeps_predictions=True)
    latents = sample(apply(tiny.model, make_hyperalign(), recorder=recorder), noise=torch.randn(2, 4, 16, 16))
    prompt = "a red heart"
    with torch.inference_mode():
        node = trace_nodes.HyperAlignTrace
        image, text = node.execute(recorder, {"samples": latents}, reward, tiny.vae, prompt).result
        plain = node.execute(recorder).result[0]
        final = reward.score(tiny.vae.decode(latents), [prompt] * 2)
    scores = json.loads(text)["reward"]["scores"]
    assert [len(row) for row in scores] == [4, 4]
    assert [row[-1] for row in scores] == pytest.approx(final, abs=1e-3)
    assert image.shape[1] > plain.shape[1]
    with pytest.raises(Exception, match="no vae"):
        node.execute(recorder, None, reward, None, prompt)
    lines = ["a red circle", "a blue heart"]
    with torch.inference_mode():
        text = node.execute(recorder, None, reward, tiny.vae, "\n".join(lines), "one per image").result[1]
        expected = reward.score(tiny.vae.decode(latents), lines)
    scores = json.loads(text)["reward"]["scores"]
    assert [row[-1] for row in scores] == pytest.approx(expected, abs=1e-3)


def test_an_empty_trace_says_what_to_connect(trace_nodes):
    with pytest.raises(Exception, match="Connect the sampler's LATENT"):
        trace_nodes.HyperAlignTrace.execute(Recorder())
    with pytest.raises(Exception, match="Connect the sampler's LATENT"):
        trace_nodes.HyperAlignTracePca.execute(trace_1=[Recorder()])


def test_a_pca_has_a_point_for_each_image(trace_nodes, tiny, sample, make_hyperalign):
    from hyperalign.hosts.comfy.model import apply

    loaded, recorders = make_hyperalign(), []
    for prompt in ("a red heart", "a blue square", "two dogs"):
        recorders.append(Recorder())
        sample(
            apply(tiny.model, loaded, recorder=recorders[-1]), prompt=prompt, noise=torch.randn(2, 4, 16, 16)
        )
    image, text = trace_nodes.HyperAlignTracePca.execute(trace_1=recorders[:2], trace_2=recorders[2:]).result
    numbers = json.loads(text)
    assert image.shape[0] == 1
    assert numbers["trace_of_point"] == [0, 0, 1, 1, 2, 2]
    assert numbers["evaluations"] == [1, 2, 3, 4]
    assert [len(step) for step in numbers["points"]] == [6] * 4
    assert set(numbers["shares"]) == set(PARTS)
    assert sum(numbers["shares"].values()) == pytest.approx(1.0, abs=1e-5)
    assert min(numbers["shares"].values()) > 0.0


def test_traces_that_do_not_belong_together_are_refused(traced):
    _, first, _ = traced(variant="S")
    _, shorter, _ = traced(variant="S", sampling={"steps": 3})
    _, other, _ = traced(variant="S", mode="separate")
    with pytest.raises(HyperAlignError, match="same steps"):
        spread_of([first, shorter])
    with pytest.raises(HyperAlignError, match="another hypernetwork"):
        spread_of([first, other])


def test_regions_are_tracks_of_their_own(tiny, sample, make_hyperalign):
    from hyperalign.hosts.comfy.model import apply

    whole = tiny.condition("a red heart")
    half = [
        [cond, {**extra, "area": (8, 16, 0, 0), "strength": 1.0}] for cond, extra in tiny.condition("a dog")
    ]
    recorder = Recorder()
    sample(apply(tiny.model, make_hyperalign(), recorder=recorder), prompt=[*whole, *half])
    trace = recorder.select().trace()
    assert sorted(track.name for track in trace.tracks) == ["cond", "cond", "uncond", "uncond"]
    assert bool(block_strengths(trace)[1].isfinite().all())
