"""Merged weights: the predictions of added ones with as many operators as the plain model; who gets them."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.bases import Base, Size, build, random_hyperalign
from benchmarks.captured import CapturedForward, Pipeline
from benchmarks.launches import Operators, main, microseconds
from benchmarks.launches import Options as LaunchOptions
from hyperalign.checkpoint import HyperAlign
from hyperalign.errors import HyperAlignError
from hyperalign.hosts import weights as weights_module
from hyperalign.hosts.diffusers.adapter import Adapter
from hyperalign.hosts.diffusers.session import Session, attach
from hyperalign.hosts.merging import MergedWeights, obstacle
from hyperalign.hosts.weights import Choice
from hyperalign.hypernetwork import HyperNetworkConfig
from hyperalign.perception import Perceived, pool_text
from hyperalign.prepared import PreparedHyperNetwork

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]

SIZES = {
    "sd15": Size(64, 7, 0, 0, narrow=10),
    "sdxl": Size(64, 7, 0, 0, narrow=10),
    "flux": Size(64, 7, 5, 3, narrow=12),
    "sd35": Size(64, 7, 6, 0, narrow=12),
}
GENERATION, FOLDING_AND_MERGING = 60, 40
"""Operators, views apart."""


class Aligned:
    """A base model with random weights and a hypernetwork, run as a pipeline runs it."""

    def __init__(
        self, name: Any, device: str = "cpu", dtype: torch.dtype = torch.float32, mode: Any = "prefix"
    ) -> None:
        torch.backends.cudnn.allow_tf32 = False  # else it rounds convolutions more coarsely than is compared
        self.base: Base = build(name, SIZES[name], torch.device(device), dtype)
        self.hyperalign: HyperAlign = random_hyperalign(
            self.base.spec, mode, HyperNetworkConfig(), 2, torch.device(device)
        )
        self.times = torch.tensor([1.0, 0.6, 0.2], device=device) * self.base.spec.last_timestep

    def attach(
        self, merging: Any, variant: Any = "S", strength: float = 1.0, capture: bool = False
    ) -> Session:
        self.pipeline = Pipeline(self.base.model)
        self.begin()
        return attach(cast(Any, self.pipeline), self.hyperalign, strength, variant, merging, capture)

    def begin(self) -> None:
        self.times = self.times.clone()
        self.pipeline.scheduler.timesteps = self.times

    def predict(self, step: int = 0) -> Tensor:
        t = list(self.times)[step]
        with torch.no_grad():
            return self.base.model(**self.base.call(self.base.noise, t), return_dict=False)[0]

    def run(self) -> list[Tensor]:
        return [self.predict(step) for step in range(len(self.times))]

    def operators(self, step: int) -> Counter[str]:
        with Operators() as counted:
            self.predict(step)
        return counted.names


def relative(some: Tensor, others: Tensor) -> float:
    return float((some.double() - others.double()).norm() / others.double().norm())


@pytest.fixture(scope="module")
def sd15() -> Aligned:
    return Aligned("sd15")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", ["prefix", "separate"])
@pytest.mark.parametrize("name", SIZES)
def test_both_ways_give_the_same_predictions(name, mode, device) -> None:
    aligned = Aligned(name, device, mode=mode)
    base = aligned.attach("additive", strength=0.0)
    plain = aligned.predict()
    base.detach()
    for variant in ("S", "I"):
        found = {}
        for merging in ("additive", "merged"):
            with aligned.attach(merging, variant, strength=0.7):
                found[merging] = [*aligned.run(), *aligned.run()]
        for added, merged in zip(found["additive"], found["merged"], strict=True):
            assert relative(merged, added) < 1e-5
            assert relative(merged, plain) > 1e-4
    assert torch.equal(aligned.predict(), plain)


@pytest.mark.parametrize("device", DEVICES)
def test_merging_in_bfloat16_loses_no_more_of_the_change_than_adding_in_it(device) -> None:
    exact = Aligned("sd15", device)
    half = Aligned("sd15", device, torch.bfloat16)
    half.base.model.load_state_dict(exact.base.model.state_dict())
    half.hyperalign.network.load_state_dict(exact.hyperalign.network.state_dict())
    changes = {}
    for name, aligned, merging in (
        ("exact", exact, "additive"),
        ("added", half, "additive"),
        ("merged", half, "merged"),
    ):
        aligned.base.noise.copy_(exact.base.noise.bfloat16())
        for key, value in exact.base.conditions.items():
            aligned.base.conditions[key].copy_(value.bfloat16())
        with aligned.attach(merging):
            with_change = aligned.predict()
        changes[name] = with_change.float()
    errors = {name: relative(changes[name], changes["exact"]) for name in ("added", "merged")}
    assert errors["merged"] < 1.5 * errors["added"] < 0.1


def test_between_generations_no_operator_is_added(sd15: Aligned) -> None:
    session = sd15.attach("merged", "I", strength=0.0)
    base = sd15.operators(1)
    session.detach()
    with sd15.attach("merged", "I"):
        sd15.predict(0)
        between = sd15.operators(1)
    assert between.total() == base.total()
    assert not between["_local_scalar_dense"]
    products = ("mm", "addmm", "bmm", "baddbmm")
    assert sum(between[name] for name in products) == sum(base[name] for name in products)


def test_s_adds_a_generation_and_a_merge_of_few_operators_and_reads_no_value(sd15: Aligned) -> None:
    session = sd15.attach("merged", strength=0.0)
    base = sd15.operators(2)
    session.detach()
    with sd15.attach("merged"):
        sd15.run()
        merged = sd15.operators(2)
    with sd15.attach("additive"):
        sd15.run()
        added = sd15.operators(2)
    assert merged.total() - base.total() <= GENERATION + FOLDING_AND_MERGING
    layers = len({target.name for target in sd15.hyperalign.header.targets})
    assert added.total() - base.total() <= GENERATION + FOLDING_AND_MERGING + 2 * layers
    assert not merged["_local_scalar_dense"] and not added["_local_scalar_dense"]


@pytest.mark.parametrize("variant", ["S", "I"])
@pytest.mark.parametrize("merging", ["merged", "additive"])
def test_a_step_frees_all_that_it_allocates(sd15: Aligned, merging, variant) -> None:
    held = list[int]()
    with sd15.attach(merging, variant):
        for step in range(3):  # what was allocated before is freed unseen, so the second step is watched too
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
                sd15.predict(step)
            held.append(sum(event.self_cpu_memory_usage for event in watched.key_averages()))
    assert held[0] > 0
    assert held[2] == 0


@pytest.mark.parametrize("name", SIZES)
def test_the_prepared_hypernetwork_generates_the_same_cores_in_fewer_operators(name) -> None:
    aligned = Aligned(name)
    network = aligned.hyperalign.network
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
        for path, buffer in network.named_buffers():
            noise = torch.rand(buffer.shape, generator=generator)
            buffer.copy_(noise - 0.5 if path.endswith("mean") else noise + 0.5)
        call = aligned.base.call(aligned.base.noise, aligned.times[0])
        features = Adapter(aligned.base.model, aligned.hyperalign).perceive(call).features
        perceived = Perceived(features, pool_text(call["encoder_hidden_states"]))
        prepared = PreparedHyperNetwork(network, torch.device("cpu"))
        expected = network(perceived)
        assert relative(prepared(perceived), expected) < 1e-5
        with Operators() as few:
            prepared(perceived)
        with Operators() as many:
            network(perceived)
    assert few.names.total() <= GENERATION < many.names.total()


def test_buffers_keep_their_addresses_from_run_to_run(sd15: Aligned, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[MergedWeights] = []
    write = MergedWeights.write

    def spy(weights: MergedWeights, folded: Any) -> None:
        made.append(weights)
        write(weights, folded)

    monkeypatch.setattr(MergedWeights, "write", spy)
    with sd15.attach("merged", "I"):
        sd15.run()
        sd15.begin()
        sd15.run()
    assert len(made) == 2 and made[0] is made[1]


def test_the_base_is_untouched_when_a_merge_is_interrupted(
    sd15: Aligned, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = sd15.attach("merged", strength=0.0)
    plain = sd15.predict()
    session.detach()

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    session = sd15.attach("merged")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Tensor, "baddbmm_", interrupted)
        sd15.predict()
    assert sd15.predict().isfinite().all()
    session.detach()
    assert torch.equal(sd15.predict(), plain)


def test_a_gradient_goes_through_added_weights(sd15: Aligned) -> None:
    with sd15.attach("merged", "I"):
        merged = sd15.predict()
        x = sd15.base.noise.clone().requires_grad_()
        prediction = sd15.base.model(**sd15.base.call(x, list(sd15.times)[1]), return_dict=False)[0]
        prediction.square().sum().backward()
        assert x.grad is not None and x.grad.abs().max() > 0
        assert relative(sd15.predict(1), prediction.detach()) < 1e-5
    assert merged.isfinite().all()


# Who gets merged weights


def chosen(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if "HyperAlign weights:" in record.message]


@pytest.mark.parametrize("merging", ["auto", "merged", "additive"])
def test_the_choice_and_its_reason_are_told_once_a_run(sd15: Aligned, caplog, merging) -> None:
    caplog.set_level(logging.INFO)
    with sd15.attach(merging):
        sd15.run()
        (first,) = chosen(caplog)
        sd15.begin()
        sd15.run()
    assert chosen(caplog) == [first, first]
    expected = {
        "auto": "added to the layers' outputs, because a processor launches nothing",
        "merged": "merged for each sample, because that was asked for",
        "additive": "added to the layers' outputs, because that was asked for",
    }
    assert first == f"HyperAlign weights: {expected[merging]}."


def test_what_does_not_fit_is_added(sd15: Aligned, caplog, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(weights_module, "device_free_bytes", lambda _: 1000)
    with sd15.attach("merged"):
        sd15.run()
    assert "merged ones take" in chosen(caplog)[0] and "GiB are free" in chosen(caplog)[0]


def test_memory_that_runs_out_meanwhile_is_no_error(sd15: Aligned, caplog, monkeypatch) -> None:
    caplog.set_level(logging.INFO)

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr("hyperalign.hosts.merging._empty_like", full)
    with sd15.attach("merged"):
        assert all(prediction.isfinite().all() for prediction in sd15.run())
    assert "the memory for merged ones could not be had" in chosen(caplog)[0]


def test_layers_that_cannot_be_merged_say_why() -> None:
    plain, cpu = nn.Linear(4, 4), torch.device("cpu")
    assert obstacle([plain], torch.float32, cpu) is None
    assert obstacle([plain], torch.float64, cpu) == "the model computes in torch.float64"
    assert "Parameter of torch.float32" in str(obstacle([plain], torch.bfloat16, cpu))
    assert "on cpu, and the inputs on meta" in str(obstacle([plain], torch.float32, torch.device("meta")))
    assert "a layer is a Conv2d" in str(obstacle([nn.Conv2d(1, 1, 1)], torch.float32, cpu))

    class Quantised(Tensor):
        pass

    quantised = nn.Linear(4, 4)
    del quantised.weight
    quantised.weight = torch.zeros(4, 4).as_subclass(Quantised)
    assert "kept as Quantised" in str(obstacle([quantised], torch.float32, cpu))


def test_a_layer_with_another_forward_is_added_to(sd15: Aligned, caplog) -> None:
    caplog.set_level(logging.INFO)
    layer = sd15.base.model.get_submodule(sd15.hyperalign.header.targets[0].name)
    layer.forward = lambda x: nn.Linear.forward(cast(nn.Linear, layer), x)
    try:
        with sd15.attach("merged"):
            assert sd15.predict().isfinite().all()
    finally:
        del layer.forward
    assert "another patch has replaced a layer's forward" in chosen(caplog)[0]


def test_autocast_is_added_to(sd15: Aligned, caplog) -> None:
    caplog.set_level(logging.INFO)
    with sd15.attach("merged"), torch.autocast("cpu", torch.bfloat16):
        sd15.predict()
    assert "under autocast" in chosen(caplog)[0]


@pytest.mark.parametrize(
    ("gib", "layers", "every_step", "merged"),
    [(0.24, 80, True, True), (4.0, 80, True, False), (4.0, 80, False, True), (0.24, 4, True, False)],
)
def test_auto_merges_on_a_gpu_where_it_takes_less_time(gib, layers, every_step, merged) -> None:
    choice = weights_module._cheaper(int(gib * 2**30), layers, torch.device("cuda"), every_step)
    assert isinstance(choice, Choice) and choice.merged == merged


def test_an_unknown_way_is_refused(sd15: Aligned) -> None:
    with pytest.raises(HyperAlignError, match="merging is 'fused'; expected one of auto, merged, additive"):
        sd15.attach("fused")


@GPU
@pytest.mark.parametrize("merging", ["merged", "additive"])
@pytest.mark.parametrize("name", SIZES)
def test_a_captured_generation_gives_the_predictions_of_one_that_is_not(name, merging) -> None:
    aligned = Aligned(name, "cuda")
    with aligned.attach(merging, capture=True):
        captured = [*aligned.run(), *aligned.run()]
    with aligned.attach(merging):
        eager = [*aligned.run(), *aligned.run()]
    for ours, theirs in zip(captured, eager, strict=True):
        assert relative(ours, theirs) < 1e-5


@GPU
@pytest.mark.parametrize("variant", ["S", "I"])
def test_a_forward_that_is_captured_reads_the_weights_of_the_next_run(variant) -> None:
    aligned = Aligned("sd15", "cuda")
    with aligned.attach("merged", variant) as session, torch.no_grad():
        expected = aligned.run()
        replayed = CapturedForward(aligned.base.model, session)
        for latents in (aligned.base.noise, aligned.base.noise.flip(-1)):
            aligned.begin()
            replayed.begin()
            calls = [aligned.base.call(latents, t) for t in list(aligned.times)]
            found = [replayed(call).clone() for call in calls]
            if latents is aligned.base.noise:
                assert all(relative(a, b) < 1e-5 for a, b in zip(found, expected, strict=True))
        aligned.begin()
        flipped = [aligned.base.model(**call, return_dict=False)[0] for call in calls]
        assert all(relative(a, b) < 1e-5 for a, b in zip(found, flipped, strict=True))


def test_the_benchmark_counts_what_the_ways_promise(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.launches.least", lambda ways: dict.fromkeys(ways, 0.0))
    found = main(LaunchOptions(tmp_path))["operators"]
    assert found["I merged, beyond the base"] == 0
    assert found["I additive, beyond the base"] == 2 * 80
    assert found["S merged, beyond the base"] <= found["generation"] + FOLDING_AND_MERGING
    assert found["generation"] <= GENERATION < found["generation as in training"]


def test_an_added_layer_calls_for_less_than_two_plain_ones_and_a_merged_for_less_than_one() -> None:
    found = microseconds()
    assert found["merged"] < found["plain"] < found["additive"] < 2 * found["plain"]
