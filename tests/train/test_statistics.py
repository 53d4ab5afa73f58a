"""Statistics of what a hypernetwork perceives: measured once on the base model, then fixed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperalign import checkpoint
from hyperalign.hosts.diffusers.adapter import Adapter
from hyperalign.hosts.diffusers.tiny import load_tiny
from hyperalign.hypernetwork import Conditioning, HyperNetwork, HyperNetworkConfig
from hyperalign.perception import Perceived, Statistics
from hyperalign.schedule import Schedule
from hyperalign.targets import Target
from train.config import ModelConfig, ObjectiveConfig, TrainConfig
from train.inputs import SamplingInputs
from train.models.tiny import Tiny
from train.start import new_hyperalign
from train.statistics import LEAST_DEVIATION, Moments, base_calls, measure_statistics, standardise
from train.tiny.inputs import GrammarPrompts
from train.trainer import Trainer


def measured(*batches: torch.Tensor) -> Statistics:
    moments, statistics = Moments(), Statistics(*batches[0].shape[1:])
    for batch in batches:
        moments.add(batch)
    moments.write(statistics)
    return statistics


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 40), st.integers(1, 6), st.floats(-1e4, 1e4), st.integers(0, 1000))
def test_mean_and_deviation_are_those_of_all_rows_however_they_come(
    rows: int, cut: int, far: float, seed: int
) -> None:
    values = torch.randn(rows, 3, 2, generator=torch.Generator().manual_seed(seed)) + far
    found = measured(values[:cut], values[cut:]) if cut < rows else measured(values)
    exact = values.double().numpy()
    np.testing.assert_allclose(found.mean, exact.mean(axis=0), rtol=1e-6, atol=1e-6)
    deviations = exact.std(axis=0)
    least = LEAST_DEVIATION * np.sqrt((deviations**2).mean())
    np.testing.assert_allclose(found.deviation, np.maximum(deviations, least), rtol=1e-3)


def test_a_channel_that_hardly_differs_is_not_blown_up() -> None:
    values = torch.randn(100, 2) * torch.tensor([1.0, 0.0]) + 5.0
    found = measured(values)
    assert float(found.deviation[1]) == pytest.approx(LEAST_DEVIATION * 0.5**0.5, rel=0.2)
    assert measured(torch.ones(4, 2)).deviation.tolist() == [1.0, 1.0], "nothing differs"


def network() -> HyperNetwork:
    torch.manual_seed(0)
    sizes = HyperNetworkConfig(rank=1, a=2, b=2, width=16, heads=2, layers=1)
    return HyperNetwork(sizes, [Target(str(i), 3, 3) for i in range(4)], [5], 6)


def watch() -> Iterator[Perceived]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        yield Perceived(
            [3.0 * torch.randn(4, 5, 2, 3, generator=generator) + 7.0],
            0.1 * torch.randn(4, 6, generator=generator) - 2.0,
        )


def test_features_text_and_tokens_are_standard_per_channel_where_they_were_measured() -> None:
    made = network()
    standardise(made, watch)
    perceived = list(watch())
    cells = torch.cat([one.features[0].transpose(0, 1).flatten(1).T for one in perceived])
    standard = {
        "cells": made.perception.feature_statistics[0](cells),
        "text": made.perception.text_statistics(torch.cat([one.prompt_BC for one in perceived])),
        "tokens": made.token_statistics(torch.cat([made.tokens(one) for one in perceived])).detach(),
    }
    for name, values in standard.items():
        assert values.mean(dim=0).abs().max() < 1e-4, name
        assert (values.std(dim=0, correction=0) - 1.0).abs().max() < 1e-3, name


@pytest.fixture(scope="module")
def inputs() -> SamplingInputs:
    base = Tiny(load_tiny())
    return SamplingInputs(base, base, GrammarPrompts())


def config_of(prompts: int = 32, conditioning: Conditioning = "full", micro_batch: int = 0) -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(statistics_prompts=prompts),
        network=HyperNetworkConfig(width=16, layers=1, conditioning=conditioning),
        objective=ObjectiveConfig(micro_batch=micro_batch, rollout_steps=3),
    )


def adapter_of(inputs: SamplingInputs, config: TrainConfig) -> Adapter:
    torch.manual_seed(0)
    return Adapter(inputs.base.backbone, new_hyperalign(config, inputs.base.backbone, Schedule("S")))


def test_they_are_measured_with_the_prompts_and_the_empty_one_along_whole_rollouts(
    inputs: SamplingInputs,
) -> None:
    calls = list(base_calls(inputs, config_of(6, micro_batch=4)))
    assert [len(call["timestep"]) for call in calls] == [4, 2] * 3 + [2, 1] * 3, (
        "chunks, steps, prompt or none"
    )
    assert [int(call["timestep"][0]) for call in calls[:6:2]] == [999, 666, 332]
    empty = inputs.encoder.conditions([""])["context"]
    assert torch.equal(calls[1]["encoder_hidden_states"], empty.expand(2, -1, -1))
    assert not torch.equal(calls[0]["encoder_hidden_states"][:1], empty)


def test_the_prompt_s_share_of_new_weights_is_no_trifle(inputs: SamplingInputs) -> None:
    """Without statistics the conditional part is nearly the same for all prompts."""
    config = config_of(8)
    adapter = adapter_of(inputs, config)
    call = next(iter(base_calls(inputs, config)))

    def differing() -> float:
        with torch.no_grad():
            cores = adapter.network(adapter.perceive(call))
        return float((cores - cores.mean(dim=0)).square().mean() / cores.square().mean())

    before = differing()
    measure_statistics(inputs, adapter, config, Accelerator(cpu=True))
    assert differing() > 3 * before
    assert differing() > 0.1


@pytest.mark.parametrize("conditioning", ["constant", "none"])
def test_what_perceives_nothing_has_nothing_to_measure(
    inputs: SamplingInputs, conditioning: Conditioning
) -> None:
    config = config_of(conditioning=conditioning)
    adapter = adapter_of(inputs, config)
    before = {name: value.clone() for name, value in adapter.network.state_dict().items()}
    measure_statistics(inputs, adapter, config, Accelerator(cpu=True))
    assert all(torch.equal(value, before[name]) for name, value in adapter.network.state_dict().items())


def test_the_statistics_do_not_depend_on_the_batch(inputs: SamplingInputs) -> None:
    found: list[torch.Tensor] = []
    for micro_batch in (0, 3):
        config = config_of(8, micro_batch=micro_batch)
        adapter = adapter_of(inputs, config)
        measure_statistics(inputs, adapter, config, Accelerator(cpu=True))
        found.append(adapter.network.perception.feature_statistics[0].mean.clone())
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-3)


def test_a_new_run_measures_and_one_that_goes_on_keeps_them(small_run: Callable[..., Trainer]) -> None:
    first = small_run()
    found = first.network.perception.text_statistics.mean.clone()
    assert found.any()
    assert torch.equal(first.average.perception.text_statistics.mean, found)
    first.fit()
    assert torch.equal(small_run().network.perception.text_statistics.mean, found)
    saved = checkpoint.load(first.path).network
    assert torch.equal(saved.perception.text_statistics.mean, found)
