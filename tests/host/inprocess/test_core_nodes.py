"""The host's own guidance nodes and step-skipping caches, before and after Apply HyperAlign."""

from __future__ import annotations

import re

import pytest
import torch

from hyperalign.errors import HyperAlignError

VARIANTS = ["S", "P", "I"]


@pytest.fixture
def apply():
    from hyperalign.hosts.comfy.model import apply

    return apply


def noise():
    return torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(5))


def perp_neg(model, tiny):
    from comfy_extras.nodes_perpneg import PerpNeg

    return PerpNeg.execute(model, tiny.condition(""), 1.0)[0]


def node(module, name, *values, method="execute"):
    """A node of comfy_extras that takes a MODEL and numbers."""

    def patched(model, _tiny):
        kind = getattr(__import__(f"comfy_extras.{module}", fromlist=[name]), name)
        return getattr(kind if method == "execute" else kind(), method)(model, *values)[0]

    return pytest.param(patched, id=name)


GUIDANCE = [
    node("nodes_cfg", "CFGZeroStar"),
    node("nodes_cfg", "CFGNorm", 1.0),
    node("nodes_model_advanced", "RescaleCFG", 0.7, method="patch"),
    node("nodes_apg", "APG", 1.0, 5.0, 0.0),
    node("nodes_tcfg", "TCFG"),
    node("nodes_eps", "EpsilonScaling", 1.01),
    node("nodes_eps", "TemporalScoreRescaling", 0.95, 1.0),
    node("nodes_fresca", "FreSca", 1.0, 1.25, 8),
    node("nodes_lumina2", "RenormCFG", 100.0, 1.0),
    node("nodes_mahiro", "Mahiro"),
    node("nodes_pag", "PerturbedAttentionGuidance", 3.0),
    node("nodes_sag", "SelfAttentionGuidance", 0.5, 2.0),
    pytest.param(perp_neg, id="PerpNeg"),
]
ALWAYS = 1e9
"""A threshold by which a cache skips all it can, whatever image it sees."""
CACHES = [
    node("nodes_easycache", "EasyCacheNode", ALWAYS, 0.0, 1.0, False),
    node("nodes_easycache", "LazyCacheNode", ALWAYS, 0.0, 1.0, False),
]
ONE_IMAGE = ("TemporalScoreRescaling", "RenormCFG")
"""The host's own nodes that fail with more than one."""


def dual_cfg(model, tiny):
    from comfy_extras.nodes_custom_sampler import DualCFGGuider

    texts = [tiny.condition(text) for text in ("a dog", "a cat", "")]
    return DualCFGGuider.execute(model, *texts, 4.0, 3.0, "regular")[0]


def perp_neg_guider(model, tiny):
    from comfy_extras.nodes_perpneg import PerpNegGuider

    texts = [tiny.condition(text) for text in ("a dog", "a cat", "")]
    return PerpNegGuider.execute(model, *texts, 4.0, 1.0)[0]


@pytest.fixture
def guided(sample, monkeypatch):
    """Samples two images, by default with all prompts in one call."""
    import comfy.samplers

    def run(model, samples=2, apart=False):
        with monkeypatch.context() as patch:
            if apart:
                patch.setattr(comfy.samplers, "can_concat_cond", lambda first, second: first is second)
            return sample(model, noise=noise()[:samples], steps=2)

    return run


def assert_close(found, expected):
    """Each of a run's evaluations rounds anew: 1e-4 as for any two runs of the same computation."""
    torch.testing.assert_close(found / expected.std(), expected / expected.std(), atol=1e-4, rtol=0)


def assert_complete(runs, caplog):
    assert all(run["targets"] == runs()[0]["targets"] for run in runs())
    reached, targets = runs()[0]["targets"].split("/")
    assert reached == targets and "reached only" not in caplog.text


@pytest.mark.parametrize("patched", GUIDANCE)
def test_guidance_nodes_do_the_same_before_and_after(
    tiny, guided, make_hyperalign, apply, runs, caplog, request, patched
):
    samples = 1 if any(name in request.node.name for name in ONE_IMAGE) else 2
    hyperalign, before = make_hyperalign(variant="I"), guided(tiny.model)
    first = guided(apply(patched(tiny.model, tiny), hyperalign), samples)
    last = patched(apply(tiny.model, hyperalign), tiny)
    assert torch.equal(guided(last, samples), first)
    assert_close(guided(last, samples, apart=True), first)
    assert (first - guided(patched(tiny.model, tiny), samples)).abs().max() > 1e-2 * first.std()
    assert torch.equal(guided(tiny.model), before)
    assert {run["generations"] for run in runs()} == {"1"}
    assert_complete(runs, caplog)


@pytest.mark.parametrize("make_guider", [dual_cfg, perp_neg_guider])
@pytest.mark.parametrize("variant", VARIANTS)
def test_guiders_of_three_prompts(
    tiny, make_hyperalign, apply, runs, caplog, monkeypatch, make_guider, variant
):
    import comfy.samplers

    def run(model):
        sampler, sigmas = comfy.samplers.sampler_object("heun"), torch.tensor([14.6, 3.0, 1.0, 0.0])
        with torch.inference_mode():
            guider = make_guider(model, tiny)
            return guider.sample(
                noise(), torch.zeros_like(noise()), sampler, sigmas, disable_pbar=True, seed=1
            )

    before = run(tiny.model)
    aligned = apply(tiny.model, make_hyperalign(variant=variant))
    together = run(aligned)
    monkeypatch.setattr(comfy.samplers, "can_concat_cond", lambda first, second: first is second)
    assert_close(run(aligned), together)
    monkeypatch.undo()
    assert torch.equal(run(tiny.model), before) and not torch.equal(together, before)
    assert {run["generations"] for run in runs()} == {{"S": "5", "P": "3", "I": "1"}[variant]}
    assert_complete(runs, caplog)


@pytest.mark.parametrize("patched", CACHES)
@pytest.mark.parametrize(("variant", "mode"), [("S", "prefix"), ("P", "separate"), ("I", "prefix")])
def test_caches_that_skip_steps(tiny, sample, make_hyperalign, apply, runs, caplog, patched, variant, mode):
    def run(model, start=None):
        return sample(model, noise=noise() if start is None else start, steps=4, sampler="heun")

    hyperalign = make_hyperalign(variant=variant, mode=mode)
    aligned = apply(tiny.model, hyperalign)
    first, last = apply(patched(tiny.model, tiny), hyperalign), patched(aligned, tiny)
    whole, found = run(aligned), run(first)
    assert torch.equal(run(last), found) and not torch.equal(whole, found)
    skipped = re.findall(r"skipped (\d+)/", caplog.text)
    assert len(skipped) == 2 and int(skipped[0]) >= 3
    assert_close(torch.cat([run(last, noise()[:1]), run(last, noise()[1:])]), found)
    assert_complete(runs, caplog)


def test_a_skipped_layer_of_a_guidance_pass_is_no_warning(comfy, make_hyperalign, apply, runs, caplog):
    from comfy_extras.nodes_slg import SkipLayerGuidanceDiT
    from small_families import SD3, SIGMAS, conditioning, euler_in_comfyui, sd3_models

    torch.manual_seed(3)
    with torch.no_grad():
        _, base = sd3_models()
    positive = conditioning(SD3)[2]

    def run(model):
        start = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(4))
        return euler_in_comfyui(model, start, positive, SIGMAS, cfg=3.0)

    def skipping(model, layer):
        return SkipLayerGuidanceDiT.execute(model, 3.0, 0.0, 1.0, str(layer))[0]

    hyperalign = make_hyperalign(spec=SD3, perception_blocks=2, variant="S")
    before, aligned = run(base), apply(base, hyperalign)
    found = run(skipping(aligned, 3))
    assert torch.equal(run(apply(skipping(base, 3), hyperalign)), found)
    assert not torch.equal(found, run(aligned))
    assert torch.equal(run(base), before)
    assert_complete(runs, caplog)
    with pytest.raises(HyperAlignError, match="before its weights were generated"):
        run(skipping(aligned, 1))  # the block that the hypernetwork sees through
    assert torch.equal(run(base), before)


@pytest.mark.parametrize("mode", ["prefix", "separate"])
def test_a_model_that_never_runs_is_a_warning(tiny, sample, make_hyperalign, apply, caplog, mode):
    """A cache or a replaced forward that leaves all of our layers out, in every step."""
    replaced = tiny.model.clone()
    replaced.add_wrapper_with_key("diffusion_model", "another", lambda _, x, *args, **kwargs: 0 * x)
    sample(apply(replaced, make_hyperalign(mode=mode)))
    assert re.search(r"reached only 0 of \d+ layers", caplog.text)
