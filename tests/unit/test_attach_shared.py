"""Pipelines that share an attached base model: every run is its own, whoever runs the model, and when."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

import hyperalign
from hyperalign.errors import HyperAlignError
from hyperalign.hosts.diffusers.session import denoiser_of
from hyperalign.hosts.run_state import Run
from hyperalign.schedule import Schedule, Variant

KINDS = pytest.mark.parametrize("pipe", ["sd15", "flux"], indirect=True)


@pytest.fixture
def second(pipe: Any) -> Any:
    """Another pipeline with the same components but a scheduler of its own."""
    scheduler = pipe.scheduler.from_config(pipe.scheduler.config)
    other = type(pipe)(**{**pipe.components, "scheduler": scheduler})
    other.set_progress_bar_config(disable=True)
    return other


@pytest.fixture
def made(pipe: Any, make_for: Any) -> Any:
    return make_for(pipe, schedule=Schedule("P", (0.5,)))


@KINDS
@pytest.mark.parametrize("variant", ["I", "P"])
@pytest.mark.parametrize("steps", [1, 3])
def test_a_second_pipeline_never_samples_with_the_first_one_s_weights(
    pipe: Any, second: Any, made: Any, draw: Any, variant: Variant, steps: int
) -> None:
    with hyperalign.attach(second, made, variant=variant):
        expected = draw(second, prompt=4, steps=steps)
    for target in (pipe, denoiser_of(pipe)):
        with hyperalign.attach(target, made, variant=variant) as session:
            draw(pipe, prompt=5, steps=steps)
            assert torch.equal(draw(second, prompt=4, steps=steps), expected)
            assert session.evaluations == steps


@KINDS
def test_runs_inside_of_a_run_are_as_they_are_alone(pipe: Any, second: Any, made: Any, draw: Any) -> None:
    """A callback draws a preview with another pipeline, and with the very same one."""

    def inside(*_: Any) -> dict[str, Any]:
        images.append(draw(inner, prompt=6, steps=2))
        return {}

    base = draw(pipe)
    with hyperalign.attach(pipe, made, variant="I"):
        alone, alone_inside = draw(pipe, prompt=5), draw(pipe, prompt=6, steps=2)
    for inner in (second, pipe) if isinstance(pipe.scheduler, DDIMScheduler) else (second,):
        images: list[torch.Tensor] = []
        steps = 2 if inner is pipe else 3  # the scheduler itself goes by the last number of steps
        with hyperalign.attach(pipe, made, variant="I") as session:
            expected = alone if steps == 3 else draw(pipe, prompt=5, steps=2)
            image = draw(pipe, prompt=5, steps=steps, callback_on_step_end=inside)
            assert session.generations == 1
        assert torch.equal(image, expected)
        assert len(images) == steps and all(torch.equal(each, alone_inside) for each in images)
    assert torch.equal(draw(pipe), base)


@KINDS
def test_runs_in_two_threads_are_as_they_are_alone(pipe: Any, second: Any, made: Any, draw: Any) -> None:
    with hyperalign.attach(pipe, made, variant="I"):
        expected = [draw(each, prompt=prompt) for each, prompt in ((pipe, 5), (second, 6))]
    images: dict[int, torch.Tensor] = {}
    together = threading.Barrier(2)

    def sample(number: int, pipeline: Any) -> None:
        def wait(*_: Any) -> dict[str, Any]:
            together.wait(20)  # both are between the same two steps
            return {}

        images[number] = draw(pipeline, prompt=5 + number, callback_on_step_end=wait)

    with hyperalign.attach(pipe, made, variant="I"):
        threads = [threading.Thread(target=sample, args=pair) for pair in enumerate((pipe, second))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert all(torch.equal(images[number], image) for number, image in enumerate(expected))


def test_an_evaluation_waits_for_that_of_another_thread(sd15_pipe: Any, make_for: Any) -> None:
    """Layers have the weights of one evaluation at a time."""
    generator = torch.Generator().manual_seed(2)
    calls = [
        (torch.randn(1, 4, 8, 8, generator=generator), 999, torch.randn(1, 8, 48, generator=generator))
        for _ in range(2)
    ]
    unet, results = sd15_pipe.unet, dict[int, torch.Tensor]()
    started = threading.Event()

    def pause(*_: Any) -> None:
        started.set()
        threading.Event().wait(0.2)

    handle = unet.mid_block.register_forward_hook(pause)
    with torch.no_grad(), hyperalign.attach(unet, make_for(sd15_pipe)):
        expected = [unet(*call).sample for call in calls]

        def sample(number: int) -> None:
            with torch.no_grad():
                results[number] = unet(*calls[number]).sample

        started.clear()
        first = threading.Thread(target=sample, args=(0,))
        first.start()
        started.wait(20)
        sample(1)
        first.join(20)
    handle.remove()
    assert all(torch.equal(results[number], each) for number, each in enumerate(expected))


def _by_hand(pipe: Any, scheduler: Any, arguments: dict[str, Any], steps: int) -> torch.Tensor:
    """Samples with the pipeline's U-Net alone, as many scripts do."""
    context = torch.cat([arguments["negative_prompt_embeds"], arguments["prompt_embeds"]])
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    scheduler.set_timesteps(steps)
    with torch.no_grad():
        for t in scheduler.timesteps:
            both = pipe.unet(torch.cat([x, x]), t, encoder_hidden_states=context).sample.chunk(2)
            x = scheduler.step(both[0] + 7.5 * (both[1] - both[0]), t, x).prev_sample
    return x


def test_a_loop_of_one_s_own_is_a_run_of_its_own(
    sd15_pipe: Any, make_for: Any, draw: Any, prompt_of: Any
) -> None:
    made = make_for(sd15_pipe)
    arguments = prompt_of(sd15_pipe, seed=4)
    scheduler = DPMSolverMultistepScheduler.from_config(sd15_pipe.scheduler.config)
    with hyperalign.attach(sd15_pipe.unet, made, variant="I"):
        expected = _by_hand(sd15_pipe, scheduler, arguments, 3)
    with hyperalign.attach(sd15_pipe, made, variant="I") as session:
        for before in (5, 4):
            draw(sd15_pipe, prompt=before)
            for _ in range(2):
                assert torch.equal(_by_hand(sd15_pipe, scheduler, arguments, 3), expected)
        assert (session.evaluations, session.generations) == (3, 1)


def test_a_loop_over_the_same_timesteps_again_is_another_run(
    sd15_pipe: Any, make_for: Any, prompt_of: Any
) -> None:
    scheduler, arguments = sd15_pipe.scheduler, prompt_of(sd15_pipe)
    scheduler.set_timesteps(3)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    with torch.no_grad(), hyperalign.attach(sd15_pipe, make_for(sd15_pipe), variant="I") as session:
        for _ in range(2):
            for t in scheduler.timesteps:
                sd15_pipe.unet(x, t, encoder_hidden_states=arguments["prompt_embeds"])
            assert (session.evaluations, session.generations) == (3, 1)


@KINDS
def test_a_stopped_run_leaves_nothing_to_the_next(pipe: Any, second: Any, made: Any, draw: Any) -> None:
    """Pipelines stop at `_interrupt`, and at an error in a callback."""

    def interrupt(pipeline: Any, step: int, *_: Any) -> dict[str, Any]:
        pipeline._interrupt = step == 1
        return {}

    def fail(*_: Any) -> None:
        raise ValueError("stop")

    base = draw(pipe)
    with hyperalign.attach(pipe, made, variant="I"):
        expected = draw(pipe)
    with hyperalign.attach(pipe, made, variant="I") as session:
        draw(second, prompt=5, steps=4, callback_on_step_end=interrupt)
        assert session.evaluations == 2
        assert torch.equal(draw(pipe), expected)
        with pytest.raises(ValueError, match="stop"):
            draw(second, prompt=5, callback_on_step_end=fail)
        assert torch.equal(draw(pipe), expected)
    assert torch.equal(draw(pipe), base)


def test_a_prompt_keeps_its_weights_when_the_batch_shrinks(sd15_pipe: Any, make_for: Any, draw: Any) -> None:
    """A callback ends guidance: the prompt's samples go on alone. Guided and not, they are the same."""
    made = make_for(sd15_pipe)
    written: list[torch.Tensor] = []

    def see(_module: Any, _inputs: Any, cores: torch.Tensor) -> None:
        written.append(cores)

    def unguided(pipeline: Any, step: int, _t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step:
            return {}
        pipeline._guidance_scale = 0.0
        return {"prompt_embeds": tensors["prompt_embeds"].chunk(2)[1]}

    handle = made.network.register_forward_hook(see)
    with hyperalign.attach(sd15_pipe, made, variant="I") as session:
        draw(
            sd15_pipe, rows=2, callback_on_step_end=unguided,
            callback_on_step_end_tensor_inputs=["prompt_embeds"],
        )  # fmt: skip
        assert (session.evaluations, session.generations, len(written)) == (3, 1, 1)
    handle.remove()


def test_what_has_ended_is_no_longer_kept(sd15_pipe: Any, make_for: Any, draw: Any) -> None:
    made = make_for(sd15_pipe)

    def runs() -> int:
        gc.collect()
        return sum(isinstance(each, Run) for each in gc.get_objects())

    with hyperalign.attach(sd15_pipe, made, variant="I"):
        before = runs()
        for prompt in range(3, 6):
            draw(sd15_pipe, prompt=prompt)
        assert runs() == before


def test_a_lost_layer_is_named(sd15_pipe: Any, make_for: Any, draw: Any) -> None:
    with hyperalign.attach(sd15_pipe, make_for(sd15_pipe)):
        sd15_pipe.unet.mid_block.attentions = torch.nn.ModuleList()
        with pytest.raises(HyperAlignError, match="has lost a layer .*; expected .* Attach"):
            draw(sd15_pipe)
