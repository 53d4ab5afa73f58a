"""HyperAlign inside the host's own samplers."""

from __future__ import annotations

import weakref

import pytest
import torch
from compiling import compiled, with_traceable_attention
from small_families import MIDDLE_SD15

SAMPLERS = ["euler", "heun", "dpmpp_2m", "dpmpp_sde", "dpm_adaptive", "lcm"]
MODES = ["prefix", "separate"]


@pytest.fixture
def apply():
    from hyperalign.hosts.comfy.model import apply

    return apply


def test_strength_zero_is_bit_identical_to_no_node(tiny, sample, make_hyperalign, apply):
    assert torch.equal(sample(apply(tiny.model, make_hyperalign(), strength=0.0)), sample(tiny.model))


@pytest.mark.parametrize("mode", MODES)
def test_it_changes_the_image_and_leaves_the_base_bit_identical(tiny, sample, make_hyperalign, apply, mode):
    before = sample(tiny.model)
    aligned = sample(apply(tiny.model, make_hyperalign(mode=mode)))
    assert (aligned - before).abs().mean() > 0.01
    assert torch.equal(sample(tiny.model), before)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_works(tiny, sample, make_hyperalign, apply, sampler, runs):
    """dpm_adaptive chooses its own number of evaluations, none of them at a scheduled sigma."""
    latents = sample(apply(tiny.model, make_hyperalign()), sampler=sampler, steps=3)
    assert torch.isfinite(latents).all()
    assert int(runs()[0]["generations"]) == int(runs()[0]["evaluations"]) >= 3
    assert runs()[0]["targets"] == "56/56"


def test_a_second_run_gives_the_same_latents(tiny, sample, make_hyperalign, apply):
    model = apply(tiny.model, make_hyperalign())
    assert torch.equal(sample(model), sample(model))


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_of_two_equals_two_single_runs(tiny, sample, make_hyperalign, apply, mode):
    model = apply(tiny.model, make_hyperalign(mode=mode))
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    together = sample(model, noise=noise)
    alone = torch.cat([sample(model, noise=noise[:1]), sample(model, noise=noise[1:])])
    # An untrained model leaves the first noise's deviation of 15 in place; a trained one gives 1. Each of the
    # run's evaluations rounds anew: 1e-4 as for any two runs of the same computation.
    torch.testing.assert_close(together / alone.std(), alone / alone.std(), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("variant", "generations"), [("S", "25"), ("I", "1"), ("P", "3")]
)  # P: the first evaluation and one at or below each of the key times 0.8 and 0.5
@pytest.mark.parametrize("mode", MODES)
def test_generations_are_what_the_variant_promises(
    tiny, sample, make_hyperalign, apply, runs, variant, generations, mode
):
    sample(apply(tiny.model, make_hyperalign(mode=mode, variant=variant)), steps=25)
    targets = "56/56" if mode == "prefix" else "80/80"
    assert runs() == [
        {"variant": variant, "targets": targets, "evaluations": "25", "generations": generations}
    ]


def test_a_second_order_sampler_counts_evaluations_not_steps(tiny, sample, make_hyperalign, apply, runs):
    sample(apply(tiny.model, make_hyperalign()), steps=3, sampler="heun")
    assert runs()[0]["evaluations"] == runs()[0]["generations"] == "5"


def test_variants_of_one_hypernetwork_differ(tiny, sample, make_hyperalign, apply):
    hyperalign = make_hyperalign(variant="P")
    latents = [sample(apply(tiny.model, hyperalign, variant=v), steps=6) for v in ("S", "P", "I")]
    assert not torch.equal(latents[0], latents[1])
    assert not torch.equal(latents[1], latents[2])
    assert torch.equal(sample(apply(tiny.model, hyperalign), steps=6), latents[1]), (
        "auto is the trained variant"
    )


def test_cfg_1_runs_without_an_unconditional_row(tiny, sample, make_hyperalign, apply, runs):
    latents = sample(apply(tiny.model, make_hyperalign()), cfg=1.0)
    assert not torch.equal(latents, sample(tiny.model, cfg=1.0))
    assert runs()[0]["generations"] == "4"


def test_prompts_of_different_length_work(tiny, sample, make_hyperalign, apply):
    long = "a picture of a red heart and a blue square and a green circle and a yellow heart and a dog"
    latents = sample(apply(tiny.model, make_hyperalign()), prompt=long)
    assert not torch.equal(latents, sample(tiny.model, prompt=long))


@pytest.mark.parametrize("variant", ["S", "I"])
def test_area_conditioning_works(tiny, sample, make_hyperalign, apply, variant, runs):
    left = tiny.condition("a dog", area=(16, 8, 0, 0), strength=1.0)
    right = tiny.condition("a cat", area=(16, 8, 0, 8), strength=1.0)
    both = left + right + tiny.condition("a dog and a cat")
    latents = sample(apply(tiny.model, make_hyperalign(variant=variant)), prompt=both)
    assert torch.isfinite(latents).all()
    assert not torch.equal(latents, sample(tiny.model, prompt=both))
    assert runs()[0]["generations"] == {"S": "4", "I": "1"}[variant]


def test_a_prompt_that_starts_late_gets_weights_on_first_sight(tiny, sample, make_hyperalign, apply, runs):
    late = tiny.condition("a dog", start_percent=0.5, end_percent=1.0)
    early = tiny.condition("a cat", start_percent=0.0, end_percent=0.5)
    sample(apply(tiny.model, make_hyperalign(variant="I")), prompt=early + late, steps=8)
    assert runs()[0]["generations"] == "2"


def test_cond_and_uncond_in_two_calls_are_one_evaluation(
    tiny, sample, make_hyperalign, apply, runs, monkeypatch
):
    import comfy.samplers

    model = apply(tiny.model, make_hyperalign())
    together = sample(model)
    monkeypatch.setattr(comfy.samplers, "can_concat_cond", lambda first, second: first is second)
    apart = sample(model)
    torch.testing.assert_close(together / apart.std(), apart / apart.std(), atol=1e-5, rtol=0)
    assert runs()[0] == runs()[1]


def test_applying_twice_replaces_the_first(tiny, sample, make_hyperalign, apply, runs):
    first, second = make_hyperalign(seed=1), make_hyperalign(seed=2)
    twice = apply(apply(tiny.model, first), second)
    assert torch.equal(sample(twice), sample(apply(tiny.model, second)))
    assert torch.equal(sample(apply(twice, first, strength=0.0)), sample(tiny.model))
    assert len(runs()) == 2


def test_two_branches_of_one_base_keep_their_own_hypernetworks(tiny, sample, make_hyperalign, apply):
    one, other = (apply(tiny.model, make_hyperalign(seed=seed, mode=mode)) for seed, mode in enumerate(MODES))
    alone = sample(one), sample(other)
    assert not torch.equal(*alone)
    assert torch.equal(sample(one), alone[0])
    assert torch.equal(sample(other), alone[1])
    assert torch.equal(sample(one), alone[0])


def test_it_acts_only_between_start_and_end_percent(tiny, sample, make_hyperalign, apply, runs):
    hyperalign = make_hyperalign()
    whole = sample(apply(tiny.model, hyperalign), steps=8)
    late = sample(apply(tiny.model, hyperalign, start_percent=0.5), steps=8)
    assert not torch.equal(whole, late)
    assert runs()[0]["generations"] == "8"
    assert 0 < int(runs()[1]["generations"]) < 8


def test_denoise_below_one_and_a_start_step_work(tiny, sample, make_hyperalign, apply, runs):
    model = apply(tiny.model, make_hyperalign(variant="P"))
    sample(model, steps=10, denoise=0.5)
    sample(model, steps=10, start_step=5, last_step=8)
    assert [run["evaluations"] for run in runs()] == ["10", "3"]
    assert all(int(run["generations"]) >= 1 for run in runs())


@pytest.mark.parametrize("mode", MODES)
def test_after_an_exception_the_base_is_bit_identical(tiny, sample, make_hyperalign, apply, mode):
    before = sample(tiny.model)
    model = apply(tiny.model, make_hyperalign(mode=mode))
    aligned = sample(model)

    def fail(layer, *_):
        if fail.count == 2:
            raise RuntimeError("out of memory")
        fail.count += 1
        return layer

    fail.count = 0
    broken = model.clone()
    broken.set_model_output_block_patch(lambda h, hsp, options: (fail(h), hsp))
    with pytest.raises(RuntimeError, match="out of memory"):
        sample(broken)
    assert not any("forward" in module.__dict__ for module in tiny.model.model.modules())
    assert torch.equal(sample(tiny.model), before)
    assert torch.equal(sample(model), aligned)


def test_after_an_interrupt_the_base_is_bit_identical(tiny, sample, make_hyperalign, apply):
    import comfy.model_management as management

    before = sample(tiny.model)
    model = apply(tiny.model, make_hyperalign())
    aligned = sample(model)

    def interrupt(step, *_):
        if step == 1:
            raise management.InterruptProcessingException

    with pytest.raises(management.InterruptProcessingException):
        sample(model, callback=interrupt)
    assert torch.equal(sample(tiny.model), before)
    assert torch.equal(sample(model), aligned)


@pytest.mark.parametrize("order", ["apply first", "compile first"])
@pytest.mark.parametrize("mode", MODES)
def test_torch_compile_gives_the_same_latents(tiny, sample, make_hyperalign, apply, mode, order):
    hyperalign, base = make_hyperalign(mode=mode), with_traceable_attention(tiny.model)
    expected = sample(apply(base, hyperalign))
    model = compiled(apply(base, hyperalign)) if order == "apply first" else apply(compiled(base), hyperalign)
    torch.testing.assert_close(sample(model) / expected.std(), expected / expected.std(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("window", [(0.0, 0.3), (0.3, 1.0)])
def test_torch_compile_gives_the_same_latents_in_and_out_of_the_window(
    shallow_unet, make_hyperalign, apply, window
):
    """With the attention that the host chooses on a CPU, which breaks every graph."""
    unet = shallow_unet(MIDDLE_SD15)
    model = apply(unet.model, make_hyperalign(spec=MIDDLE_SD15), 1.0, *window)
    expected = unet.sample(model)
    found = unet.sample(compiled(model))
    torch.testing.assert_close(found / expected.std(), expected / expected.std(), atol=1e-6, rtol=0)
    assert (expected - unet.sample(unet.model)).abs().max() > 1e-3 * expected.std()


def test_other_patches_on_the_model_keep_working(tiny, sample, make_hyperalign, apply):
    calls = []
    patched = tiny.model.clone()
    patched.set_model_input_block_patch(lambda h, options: calls.append(options["block"]) or h)
    plain = sample(apply(tiny.model, make_hyperalign()))
    assert torch.equal(sample(apply(patched, make_hyperalign())), plain)
    assert len(calls) == 4 * 6


def test_perturbed_attention_guidance_works(tiny, sample, make_hyperalign, apply, runs):
    from comfy_extras.nodes_pag import PerturbedAttentionGuidance

    model = apply(tiny.model, make_hyperalign(variant="I"))
    guided = PerturbedAttentionGuidance.execute(model, 3.0)[0]
    assert torch.isfinite(sample(guided)).all()
    assert runs()[0]["generations"] == "1"


def test_a_static_core_serves_every_row(tiny, sample, make_hyperalign, apply, runs):
    latents = sample(apply(tiny.model, make_hyperalign(conditioning="none", variant="I")))
    assert not torch.equal(latents, sample(tiny.model))
    assert runs()[0]["generations"] == "1"


def test_layers_out_of_reach_are_reported(tiny, sample, make_hyperalign, apply, caplog, monkeypatch):
    """A host that fuses projections would bypass our layers without an error."""
    from hyperalign.hosts import layers

    monkeypatch.setattr(layers, "_adapted_forward", lambda layer, x: type(layer).forward(layer, x))
    sample(apply(tiny.model, make_hyperalign()))
    assert "HyperAlign reached only 0 of 56 layers" in caplog.text


def test_a_dropped_model_leaves_nothing_behind(tiny, sample, make_hyperalign, apply, caplog):
    """The host warns about a leak when a network outlives its patcher or hides in a cycle."""
    hyperalign = make_hyperalign()
    for _ in range(2):
        sample(apply(tiny.model, hyperalign), steps=1)
    adapter = weakref.ref(next(iter(apply(tiny.model, hyperalign).get_all_wrappers("apply_model"))).__self__)
    assert adapter() is None, "a cycle keeps the adapter, and with it the base model, in memory"
    assert "leak" not in caplog.text


def test_the_time_of_a_continuous_noise_range_goes_from_1_to_0(comfy):
    """Its timesteps are log(sigma) / 4, which key times cannot be compared with."""
    from comfy.model_sampling import EDM, ModelSamplingContinuousEDM

    from hyperalign.hosts.comfy.adapter import _time_of

    class Continuous(ModelSamplingContinuousEDM, EDM):
        pass

    sampling = Continuous()
    ends = [
        float(_time_of(sampling, sigma[None], 999.0)) for sigma in (sampling.sigma_max, sampling.sigma_min)
    ]
    assert ends == pytest.approx([1.0, 0.0], abs=1e-5)
    middle = sampling.percent_to_sigma(0.25)
    assert float(_time_of(sampling, torch.tensor([middle]), 999.0)) == pytest.approx(0.75, abs=1e-4)


def test_an_empty_latent_gets_the_size_that_ksampler_gives_it(tiny):
    """Newer hosts resize it: Empty Latent Image has 8 pixels per latent, this model 4."""
    from hyperalign.hosts.comfy.sampling import ksample
    from hyperalign.hosts.comfy.search import Sampling
    from nodes import common_ksampler

    latent = {"samples": torch.zeros(1, 4, 8, 8), "downscale_ratio_spacial": 8, "downscale_ratio_temporal": 1}
    conditions = tiny.condition("a red heart"), tiny.condition("")
    settings = {"steps": 2, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    with torch.inference_mode():
        (theirs,) = common_ksampler(tiny.model, 5, *list(settings.values())[:4], *conditions, latent)
        ours = ksample(
            tiny.model, 5, **settings, positive=conditions[0], negative=conditions[1], latent=latent
        )
    assert torch.equal(ours["samples"], theirs["samples"])
    start = Sampling(tiny.model, *conditions, latent, **settings).start()
    assert start.shape == theirs["samples"].shape


def test_a_sampled_latent_keeps_what_is_not_about_empty_ones(tiny):
    from hyperalign.hosts.comfy.sampling import sampled

    latent = {
        "samples": torch.zeros(1), "noise_mask": torch.ones(1), "downscale_ratio_spacial": 8,
        "downscale_ratio_temporal": 4,
    }  # fmt: skip
    found = sampled(latent, torch.ones(1))
    assert found.keys() == {"samples", "noise_mask"}
    assert found["samples"].tolist() == [1.0]
    assert latent["samples"].tolist() == [0.0] and "downscale_ratio_spacial" in latent
