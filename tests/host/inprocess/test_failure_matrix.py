"""Ten ways in which packs that patch a model fail: a naive adapter that does, and ours that does not.

Further tests of a class: 1 test_sampling.py (exceptions, interrupts), 3 and 10 test_core_nodes.py (caches,
guidance nodes), 4 and 5 test_sampling.py, test_row_order.py and test_core_nodes.py, 8 test_compiled.py,
9 test_merged.py. Threads: test_threads.py.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from functools import partial

import pytest
import torch
from torch import nn

LAYER = "output_blocks.5.1.transformer_blocks.0.attn1.to_q"
EVERY_CALL = "apply_model"


@pytest.fixture
def apply():
    from hyperalign.hosts.comfy.model import apply

    return apply


def noise(samples=2):
    return torch.randn(samples, 4, 16, 16, generator=torch.Generator().manual_seed(5))


def assert_close(found, expected):
    """Each of a run's evaluations rounds anew: 1e-4 as for any two runs of the same computation."""
    torch.testing.assert_close(found / expected.std(), expected / expected.std(), atol=1e-4, rtol=0)


def differ(found, expected):
    return bool((found - expected).abs().max() > 1e-3 * expected.std())


def wrapped(patcher, kind, wrapper):
    clone = patcher.clone()
    clone.add_wrapper_with_key(kind, "naive", wrapper)
    return clone


def layer_of(patcher):
    return patcher.model.diffusion_model.get_submodule(LAYER)


@contextlib.contextmanager
def changed(module, delta):
    """Adds something to a layer's output."""

    def forward(x):
        return type(module).forward(module, x) + delta(x)

    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def test_class_1_a_patch_that_outlives_its_run(tiny, sample, make_hyperalign, apply, copied):
    base = tiny.model.clone()
    base.model = copied(tiny.model.model)
    before, layer = sample(base), layer_of(base)

    def naive(executor, *args, **kwargs):
        layer.forward = lambda x: 2 * type(layer).forward(layer, x)
        return executor(*args, **kwargs)

    sample(wrapped(base, EVERY_CALL, naive))
    assert differ(sample(base), before)
    del layer.forward
    assert differ(sample(apply(base, make_hyperalign())), before)
    assert torch.equal(sample(base), before)
    assert not any("forward" in module.__dict__ for module in base.model.modules())


def test_class_2_fixed_signatures(tiny, sample, make_hyperalign, apply):
    def naive(executor, noise, latent, sampler, sigmas, mask=None, callback=None, quiet=False, seed=None):
        return executor(noise, latent, sampler, sigmas, mask, callback, quiet, seed)

    def later_host(executor, *args, **kwargs):
        return executor(*args, **kwargs, of_a_later_host=None)

    with pytest.raises(TypeError, match="latent_shapes"):
        sample(wrapped(tiny.model, "outer_sample", naive))
    aligned = apply(wrapped(tiny.model, EVERY_CALL, later_host), make_hyperalign())
    assert torch.equal(sample(aligned), sample(apply(tiny.model, make_hyperalign())))


def test_class_3_steps_are_not_evaluations(tiny, sample, make_hyperalign, apply, runs):
    """heun evaluates 5 times in 3 steps; some take the sixth evaluation for the next run's beginning."""
    generations, calls = [], []

    def naive(executor, *args, **kwargs):
        if len(calls) % 3 == 0:  # a run's first step
            generations.append(len(calls))
        calls.append(1)
        return executor(*args, **kwargs)

    counting = wrapped(tiny.model, "predict_noise", naive)
    for model in (counting, apply(tiny.model, make_hyperalign(variant="I"))):
        for _ in range(2):
            sample(model, steps=3, sampler="heun")
    assert generations != [0, 5]
    assert [(run["evaluations"], run["generations"]) for run in runs()] == [("5", "1")] * 2


def test_class_4_which_rows_are_the_positive_prompt_s(tiny, sample, make_hyperalign, apply):
    """Without CFG a batch holds no negative half."""

    def naive(executor, *args, **kwargs):
        def positive_half(x):
            return torch.cat(
                [torch.zeros_like(half) if i == 0 else half for i, half in enumerate(x.chunk(2))]
            )

        with changed(executor.class_obj.diffusion_model.get_submodule(LAYER), positive_half):
            return executor(*args, **kwargs)

    before = sample(tiny.model, noise=noise(), cfg=1.0)
    half = sample(wrapped(tiny.model, EVERY_CALL, naive), noise=noise(), cfg=1.0)
    assert not differ(half[0], before[0]) and differ(half[1], before[1])
    aligned = sample(apply(tiny.model, make_hyperalign()), noise=noise(), cfg=1.0)
    assert differ(aligned[0], before[0]) and differ(aligned[1], before[1])


def test_class_5_a_batch_of_several(tiny, sample, make_hyperalign, apply):
    def naive(executor, *args, **kwargs):
        with changed(executor.class_obj.diffusion_model.get_submodule(LAYER), lambda x: x.mean(0)):
            return executor(*args, **kwargs)

    def alone(model):
        return torch.cat([sample(model, noise=each[None], steps=2) for each in noise()])

    averaging = wrapped(tiny.model, EVERY_CALL, naive)
    assert differ(sample(averaging, noise=noise(), steps=2), alone(averaging))
    aligned = apply(tiny.model, make_hyperalign(variant="I"))
    assert_close(sample(aligned, noise=noise(), steps=2), alone(aligned))


def test_class_6_quantised_weights(tiny, sample, make_hyperalign, apply, copied):
    """The host casts float8 when a layer runs; nothing can be added to it where it is kept."""
    base = tiny.model.clone()
    base.model = copied(tiny.model.model)
    for module in base.model.diffusion_model.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.to(torch.float8_e4m3fn), requires_grad=False)
            module.comfy_cast_weights = True
    before, weight = sample(base), layer_of(base).weight
    with pytest.raises((RuntimeError, NotImplementedError)), torch.inference_mode():
        weight += torch.randn(weight.shape)
    for merging in ("additive", "merged"):
        aligned = sample(apply(base, make_hyperalign(), merging=merging))
        assert torch.isfinite(aligned).all() and differ(aligned, before)
    assert torch.equal(sample(base), before)


def test_class_7_weights_that_are_elsewhere(tiny, sample, make_hyperalign, apply, copied):
    """Dynamic VRAM: a weight's device says nothing about where its layer computes."""
    base = tiny.model.clone()
    base.model = copied(tiny.model.model)
    expected = sample(apply(base, make_hyperalign(), merging="additive"))
    layer = layer_of(base)
    held = layer.weight
    layer.weight = nn.Parameter(torch.empty_like(held, device="meta"), requires_grad=False)
    layer.forward = lambda x: nn.functional.linear(x, held, layer.bias)

    def naive(executor, *args, **kwargs):
        added = torch.zeros(layer.out_features, device=layer.weight.device)
        original = layer.forward
        layer.forward = lambda x: torch.add(original(x), added, out=torch.empty_like(original(x)))
        try:
            return executor(*args, **kwargs)
        finally:
            layer.forward = original

    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        sample(wrapped(base, EVERY_CALL, naive))
    for merging in ("additive", "merged"):
        assert_close(sample(apply(base, make_hyperalign(), merging=merging)), expected)


def test_class_8_torch_compile_that_starts_anew_at_every_step(make_hyperalign):
    """A closure for each step is new code for each; ours is one function with new inputs."""
    from torch._dynamo.testing import CompileCounter

    from hyperalign.hosts.layers import AdaptedLayers
    from hyperalign.targets import Place

    network = make_hyperalign().hyperalign.network
    target, steps = network.targets[0], 4
    layer = nn.Linear(target.in_features, target.out_features)
    cores = torch.randn(2, len(network.targets), network.config.b, network.config.a)
    layers = AdaptedLayers(network, [Place(t.name) for t in network.targets])
    x = torch.randn(2, 5, target.in_features)
    counts = []
    with torch.inference_mode():
        for way in ("naive", "ours"):
            torch.compiler.reset()
            counter = CompileCounter()
            compiled = torch.compile(lambda x: layer(x), backend=counter)
            for step in range(steps):
                if way == "naive":
                    layer.forward = partial(
                        lambda x, scale: scale * nn.Linear.forward(layer, x), scale=step + 0.5
                    )
                    compiled(x)
                    del layer.forward
                    continue
                with layers.installed([layer], [0]):
                    layers.give(layers.fold(step * cores, 1.0, torch.float32), [0])
                    compiled(x)
            counts.append(counter.frame_count)
    torch.compiler.reset()
    assert counts[0] > counts[1] == 1


def test_class_9_memory_that_is_kept(tiny, sample, make_hyperalign, apply):
    kept, naive_made = [], []

    def naive(executor, *args, **kwargs):
        kept.append(torch.randn(8, 8))
        naive_made.append(weakref.ref(kept[-1]))
        return executor(*args, **kwargs)

    hyperalign, made = make_hyperalign(variant="I"), []
    network = hyperalign.hyperalign.network
    handle = network.register_forward_hook(lambda _m, _i, cores: made.append(weakref.ref(cores)))
    aligned = apply(tiny.model, hyperalign)
    for _ in range(3):
        sample(wrapped(tiny.model, EVERY_CALL, naive), steps=1)
        sample(aligned, steps=1)
    handle.remove()
    gc.collect()
    assert len(naive_made) == 3 and all(reference() is not None for reference in naive_made)
    assert len(made) == 3 and all(reference() is None for reference in made)


def test_class_10_a_slot_of_which_there_is_one(tiny, sample, make_hyperalign, apply):
    calls = []

    def theirs(apply_model, arguments):
        calls.append("theirs")
        return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

    def naive(apply_model, arguments):
        calls.append("naive")
        return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

    def with_slot(patcher, function):
        clone = patcher.clone()
        clone.set_model_unet_function_wrapper(function)
        return clone

    sample(with_slot(with_slot(tiny.model, naive), theirs), steps=1)
    assert "naive" not in calls
    expected = sample(apply(tiny.model, make_hyperalign()))
    for model in (
        apply(with_slot(tiny.model, theirs), make_hyperalign()),
        with_slot(apply(tiny.model, make_hyperalign()), theirs),
    ):
        calls.clear()
        assert torch.equal(sample(model), expected)
        assert calls == ["theirs"] * 4
