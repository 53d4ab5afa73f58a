"""Patches that change the batch inside an attention: each row is adapted with its own sample's weights.

Expected is what the host samples image by image with a call for each prompt, where there is one sample only.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from hyperalign.errors import HyperAlignError

WAYS = [("prefix", "additive"), ("separate", "merged")]
MERGINGS = ["additive", "merged"]
COPIES = 3
UNCOND = 1


@pytest.fixture
def apply():
    from hyperalign.hosts.comfy.model import apply

    return apply


class Tiled:
    """Repeats the whole batch, as attention couple does where it repeats a prompt's chunk."""

    def enlarge(self, x):
        return x.repeat(COPIES, 1, 1)

    def reduce(self, x):
        return x.unflatten(0, (COPIES, -1)).mean(0)


class Interleaved:
    """Repeats each row next to itself."""

    def enlarge(self, x):
        return x.repeat_interleave(COPIES, dim=0)

    def reduce(self, x):
        return x.unflatten(0, (-1, COPIES)).mean(1)


class Reversed(Tiled):
    """An order that no rule guesses."""

    def enlarge(self, x):
        return super().enlarge(x).flip(0)

    def reduce(self, x):
        return super().reduce(x.flip(0))


ORDERS = [Tiled(), Interleaved(), Reversed()]


def copying(model, order, attention="attn2"):
    """A MODEL that attends to every row several times over; what comes out is the same."""
    clone = model.clone()
    clone.set_model_patch(
        lambda q, k, v, _: (order.enlarge(q), order.enlarge(k), order.enlarge(v)), f"{attention}_patch"
    )
    clone.set_model_patch(lambda x, _: order.reduce(x), f"{attention}_output_patch")
    return clone


def coupled(model, regions):
    """Attention couple, as the packs have it: the positive prompt's samples meet the text of each region."""

    def enlarge(q, k, v, options):
        roles, texts = options["cond_or_uncond"], torch.cat(regions).to(k)
        rows = []
        for role, q_BNC, k_BLC, v_BLC in zip(roles, *(x.chunk(len(roles)) for x in (q, k, v)), strict=True):
            if role == UNCOND:
                rows.append((q_BNC, k_BLC, v_BLC))
                continue
            added = texts.repeat_interleave(len(q_BNC), dim=0)
            copies = (q_BNC.repeat(1 + len(regions), 1, 1), torch.cat([k_BLC, added]))
            rows.append((*copies, torch.cat([v_BLC, added])))
        return tuple(torch.cat(part) for part in zip(*rows, strict=True))

    def reduce(x, options):
        roles = options["cond_or_uncond"]
        counts = [1 if role == UNCOND else 1 + len(regions) for role in roles]
        samples = len(x) // sum(counts)
        parts = x.split([count * samples for count in counts])
        return torch.cat([part.unflatten(0, (-1, samples)).mean(0) for part in parts])

    clone = model.clone()
    clone.set_model_attn2_patch(enlarge)
    clone.set_model_attn2_output_patch(reduce)
    return clone


def negative_attention(model, text_1LC):
    """Negative guidance in the text attention, as NAG has it: rows of text without rows of the image."""
    from comfy.ldm.modules.attention import optimized_attention

    def forward(attention, x, context=None, value=None, mask=None, transformer_options=None):
        added = len(context) // len(x) * len(x)
        context = torch.cat([context, text_1LC.to(context).expand(added, -1, -1)])
        q, k, v = attention.to_q(x), attention.to_k(context), attention.to_v(context)
        y = optimized_attention(torch.cat([q, q[-added:]]), k, v, attention.heads)
        return attention.to_out(1.5 * y[: len(x)] - 0.5 * y[-added:])

    def around(executor, *args, **kwargs):
        modules = executor.class_obj.named_modules()
        attentions = [module for name, module in modules if name.endswith(".attn2")]
        for attention in attentions:
            attention.forward = partial(forward, attention)
        try:
            return executor(*args, **kwargs)
        finally:
            for attention in attentions:
                del attention.forward

    clone = model.clone()
    clone.add_wrapper_with_key("diffusion_model", "negative attention", around)
    return clone


@pytest.fixture
def one_by_one(sample, monkeypatch):
    """Samples image by image, and each prompt in a call of its own."""
    import comfy.samplers

    def run(model, noise, **settings):
        with monkeypatch.context() as patch:
            patch.setattr(comfy.samplers, "can_concat_cond", lambda first, second: first is second)
            return torch.cat([sample(model, noise=each[None], **settings) for each in noise])

    return run


def noise(samples=2):
    return torch.randn(samples, 4, 16, 16, generator=torch.Generator().manual_seed(5))


def assert_close(found, expected):
    """Each of a run's evaluations rounds anew: 1e-4 as for any two runs of the same computation."""
    torch.testing.assert_close(found / expected.std(), expected / expected.std(), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("mode", "merging"), WAYS)
@pytest.mark.parametrize("order", ORDERS, ids=lambda order: type(order).__name__)
def test_copies_of_a_row_get_its_weights(
    tiny, sample, one_by_one, make_hyperalign, apply, order, merging, mode
):
    aligned = apply(tiny.model, make_hyperalign(mode=mode), merging=merging)
    patched = apply(copying(tiny.model, order), make_hyperalign(mode=mode), merging=merging)
    assert_close(sample(patched, noise=noise(), steps=2), one_by_one(aligned, noise(), steps=2))


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: type(order).__name__)
def test_copies_in_self_attention_get_its_weights(tiny, sample, one_by_one, make_hyperalign, apply, order):
    aligned = apply(tiny.model, make_hyperalign(variant="I"))
    patched = copying(aligned, order, "attn1")
    assert_close(sample(patched, noise=noise(), steps=2), one_by_one(aligned, noise(), steps=2))


@pytest.mark.parametrize("variant", ["S", "I"])
@pytest.mark.parametrize(("mode", "merging"), WAYS)
def test_attention_couple(tiny, sample, one_by_one, make_hyperalign, apply, mode, merging, variant):
    regions = [tiny.condition(text)[0][0] for text in ("a dog", "a cat")]
    coupling = coupled(tiny.model, regions)
    aligned = apply(coupling, make_hyperalign(mode=mode, variant=variant), merging=merging)
    found = sample(aligned, noise=noise(), steps=2)
    assert_close(found, one_by_one(aligned, noise(), steps=2))
    assert (found - sample(coupling, noise=noise(), steps=2)).abs().max() > 1e-2 * found.std()


def test_attention_couple_where_both_prompts_are_empty(tiny, sample, one_by_one, make_hyperalign, apply):
    """Their samples cannot be told apart, and need not be: equal inputs have equal weights."""
    aligned = apply(coupled(tiny.model, [tiny.condition("a dog")[0][0]]), make_hyperalign())
    settings = {"prompt": "", "negative": "", "steps": 2}
    assert_close(sample(aligned, noise=noise(), **settings), one_by_one(aligned, noise(), **settings))


@pytest.mark.parametrize(("mode", "merging"), WAYS)
def test_tiles_of_a_batch(tiny, sample, one_by_one, make_hyperalign, apply, merging, mode):
    from comfy_extras.nodes_hypertile import HyperTile

    aligned = apply(tiny.model, make_hyperalign(mode=mode), merging=merging)
    tiled = HyperTile.execute(aligned, 32, 2, 1, False)[0]
    torch.manual_seed(0)  # the tiles' sizes are drawn from the global generator
    assert_close(sample(tiled, noise=noise(), steps=2), one_by_one(tiled, noise(), steps=2))


@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_text_rows_of_nobody_are_refused(tiny, sample, make_hyperalign, apply, cfg):
    before = sample(tiny.model)
    patched = negative_attention(tiny.model, tiny.condition("a blue square")[0][0])
    aligned = apply(patched, make_hyperalign())
    with pytest.raises(HyperAlignError, match="4 rows for 2 samples|8 rows for 4 samples") as caught:
        sample(aligned, noise=noise(), cfg=cfg)
    assert "one image" in str(caught.value)
    assert torch.equal(sample(tiny.model), before)


@pytest.mark.parametrize("merging", MERGINGS)
def test_text_rows_of_one_sample_are_its_own(tiny, sample, make_hyperalign, apply, merging):
    patched = negative_attention(tiny.model, tiny.condition("a blue square")[0][0])
    aligned = apply(patched, make_hyperalign(), merging=merging)
    assert not torch.equal(sample(aligned, cfg=1.0), sample(patched, cfg=1.0))


def test_one_core_for_all_serves_rows_of_nobody(tiny, sample, make_hyperalign, apply):
    patched = negative_attention(tiny.model, tiny.condition("a blue square")[0][0])
    aligned = apply(patched, make_hyperalign(conditioning="none"))
    assert torch.isfinite(sample(aligned, noise=noise())).all()


def test_rows_that_another_mixed_are_refused(tiny, sample, make_hyperalign, apply):
    class Mixed(Tiled):
        """Copies that are no sample's: they were scaled."""

        def enlarge(self, x):
            return super().enlarge(1.5 * x)

    with pytest.raises(HyperAlignError, match="12 rows for 4 samples"):
        sample(apply(copying(tiny.model, Mixed()), make_hyperalign()), noise=noise())
