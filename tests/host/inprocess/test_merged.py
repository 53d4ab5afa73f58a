"""Merged weights inside the host: the latents of added ones, wherever weights of a sample's own matter."""

from __future__ import annotations

import pytest
import torch

from hyperalign.strength import StrengthCurve

REGIONS = "regions"
GRAPHS = [
    {"variant": "S"},
    {"variant": "P", "mode": "separate", "steps": 6},
    {"variant": "I", "samples": 3},
    {"variant": "I", "prompt": REGIONS},
    {"variant": "S", "prompt": REGIONS, "cfg": 1.0},
    {"variant": "S", "curve": StrengthCurve((1.0, 0.0, 2.0), groups=(0.5, 0.0, -1.0))},
    {"variant": "I", "window": (0.3, 0.8)},
]


@pytest.fixture
def apply():
    from hyperalign.hosts.comfy.model import apply

    return apply


def regions(tiny):
    left = tiny.condition("a dog", area=(16, 8, 0, 0), strength=1.0)
    right = tiny.condition("a cat", area=(16, 8, 0, 8), strength=1.0)
    return left + right + tiny.condition("a dog and a cat")


def assert_close(merged, added) -> None:
    """Each of a run's evaluations rounds anew: 1e-4 as for any two runs of the same computation."""
    torch.testing.assert_close(merged / added.std(), added / added.std(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("graph", GRAPHS, ids=str)
def test_the_latents_are_those_of_added_weights(tiny, sample, make_hyperalign, apply, caplog, graph):
    caplog.set_level("INFO")
    settings = dict(graph)
    hyperalign = make_hyperalign(mode=settings.pop("mode", "prefix"), variant=settings["variant"])
    start, end = settings.pop("window", (0.0, 1.0))
    given = {"variant": settings.pop("variant"), "strength_curve": settings.pop("curve", None)}
    shape = (settings.pop("samples", 1), 4, 16, 16)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    if settings.get("prompt") is REGIONS:
        settings["prompt"] = regions(tiny)
    before = sample(tiny.model, noise=noise, **settings)
    latents = [
        sample(
            apply(tiny.model, hyperalign, 0.8, start, end, merging=merging, **given), noise=noise, **settings
        )
        for merging in ("additive", "merged")
    ]
    assert_close(latents[1], latents[0])
    assert not torch.equal(latents[1], before)
    assert torch.equal(sample(tiny.model, noise=noise, **settings), before)
    assert any("merged for each sample, because that was asked for" in line for line in caplog.messages)


def test_tiles_of_a_sample_get_its_weights(tiny, sample, make_hyperalign, apply):
    from comfy_extras.nodes_hypertile import HyperTile

    latents = []
    for merging in ("additive", "merged"):
        aligned = apply(tiny.model, make_hyperalign(variant="I"), merging=merging)
        latents.append(sample(HyperTile.execute(aligned, 32, 2, 1, False)[0]))
    assert_close(latents[1], latents[0])


def test_two_hypernetworks_in_one_graph_keep_their_own_weights(tiny, sample, make_hyperalign, apply):
    one, other = (apply(tiny.model, make_hyperalign(seed=seed), merging="merged") for seed in (1, 2))
    alone = sample(one), sample(other)
    assert not torch.equal(*alone)
    assert torch.equal(sample(one), alone[0]) and torch.equal(sample(other), alone[1])
    replaced = apply(one, make_hyperalign(seed=2), merging="merged")
    assert torch.equal(sample(replaced), alone[1])


def test_an_interrupt_in_the_middle_of_a_merge_leaves_the_base_alone(
    tiny, sample, make_hyperalign, apply, monkeypatch
):
    import comfy.model_management as management

    from hyperalign.hosts import merging

    before = sample(tiny.model)
    model = apply(tiny.model, make_hyperalign(), merging="merged")
    aligned, copy = sample(model), merging.foreach_copy_
    calls = []

    def interrupted(*tensors):
        copy(*tensors)
        calls.append(1)
        if len(calls) == 2:
            raise management.InterruptProcessingException

    with monkeypatch.context() as patch, pytest.raises(management.InterruptProcessingException):
        patch.setattr(merging, "foreach_copy_", interrupted)
        sample(model)
    assert torch.equal(sample(tiny.model), before)
    assert torch.equal(sample(model), aligned)


def test_weights_that_the_host_casts_are_added_to(tiny, sample, make_hyperalign, apply, caplog):
    caplog.set_level("INFO")
    model = apply(tiny.model, make_hyperalign(), merging="merged")
    layers = [module for module in tiny.model.model.modules() if hasattr(module, "comfy_cast_weights")]
    kept = [layer.comfy_cast_weights for layer in layers]
    try:
        for layer in layers:
            layer.comfy_cast_weights = True
        assert torch.isfinite(sample(model)).all()
    finally:
        for layer, value in zip(layers, kept, strict=True):
            layer.comfy_cast_weights = value
    reason = "added to the layers' outputs, because the host casts, moves or patches a layer's weights"
    assert any(reason in line for line in caplog.messages)


def test_memory_is_flat_over_a_hundred_runs(tiny, sample, make_hyperalign, apply):
    import gc

    model = apply(tiny.model, make_hyperalign(variant="I"), merging="merged")

    def tensors() -> int:
        gc.collect()
        return sum(isinstance(item, torch.Tensor) for item in gc.get_objects())

    counts = []
    for run in range(100):
        sample(model, steps=1)
        if run in (9, 99):
            counts.append(tensors())
    assert counts[1] <= counts[0]


def test_the_prompts_tokens_are_read_where_the_latents_are(tiny, make_hyperalign, apply):
    """The host moves them later, in its own `_apply_model`. A meta tensor cannot be moved at all."""
    (wrapper,) = apply(tiny.model, make_hyperalign()).get_all_wrappers("apply_model")

    class Executor:
        class_obj = tiny.model.model

        def __call__(self, x, *_, **__):
            return x

    elsewhere = torch.empty(1, 8, 64, device="meta")
    with pytest.raises(NotImplementedError, match="meta"):
        wrapper(Executor(), torch.randn(1, 4, 16, 16), torch.ones(1), c_crossattn=elsewhere)


def test_weights_that_hooks_change_meanwhile_are_added_to(tiny, sample, make_hyperalign, apply, caplog):
    """A LoRA of a hook comes and goes between the steps, where I would keep a copy from its first."""
    import comfy.hooks

    caplog.set_level("INFO")
    lora = {"diffusion_model.out.2.weight": ("diff", (torch.full((4, 64, 3, 3), 0.05),))}
    group = comfy.hooks.create_hook_lora(lora=lora, strength_model=1.0, strength_clip=0.0)
    hooked = tiny.condition("a red heart", hooks=group)
    aligned = apply(tiny.model, make_hyperalign(variant="I"), merging="merged")
    assert torch.isfinite(sample(aligned, prompt=hooked)).all()
    reason = "because hooks change the model's weights while it samples"
    assert any(reason in line for line in caplog.messages)
