"""The hypernetwork against a few plain lines, its start, and the sizes it takes."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hyperalign.errors import HyperAlignError
from hyperalign.hypernetwork import MAX_SIZE, Attention, DecoderLayer, HyperNetwork, HyperNetworkConfig
from hyperalign.perception import Perceived, index_encoding
from hyperalign.targets import Target

SMALL = HyperNetworkConfig(rank=2, a=3, b=5, width=16, layers=2, heads=2)
TARGETS = (Target("one", 6, 7), Target("two", 4, 9), Target("three", 6, 4))


def network(config: HyperNetworkConfig = SMALL) -> HyperNetwork:
    """A hypernetwork none of whose numbers is a special one."""
    torch.manual_seed(0)
    made = HyperNetwork(config, TARGETS, [2, 3], 6)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5)
    for name, buffer in made.named_buffers():
        nn.init.uniform_(buffer, *((0.5, 2.0) if name.endswith("deviation") else (-1.0, 1.0)))
    return made


def perceived(rows: int = 2) -> Perceived:
    generator = torch.Generator().manual_seed(1)
    shapes = (rows, 2, 3, 4), (rows, 3, 2, 2), (rows, 6)
    first, second, prompt = (torch.randn(shape, generator=generator) for shape in shapes)
    return Perceived([first, second], prompt)


def attended(attention: Attention, x_BMC: Tensor, memory_BLC: Tensor) -> Tensor:
    """Each head by itself: softmax(q k^T / sqrt(d)) v of its own columns."""
    q, k, v = attention.to_q(x_BMC), attention.to_k(memory_BLC), attention.to_v(memory_BLC)
    heads = []
    for q_h, k_h, v_h in zip(*(part.chunk(attention.heads, dim=-1) for part in (q, k, v)), strict=True):
        weights = (q_h @ k_h.transpose(1, 2) / math.sqrt(q_h.shape[-1])).softmax(dim=-1)
        heads.append(weights @ v_h)
    return attention.to_out(torch.cat(heads, dim=-1))


def decoded(layer: DecoderLayer, x_BMC: Tensor, memory_BLC: Tensor, modulation_BC: Tensor) -> Tensor:
    """The prompt's six vectors: scale and shift of the tokens, of the memory's queries, of feed-forward."""
    width = x_BMC.shape[-1]
    by = (modulation_BC @ layer.modulate.weight.T)[:, None]
    scale_1, shift_1, scale_2, shift_2, scale_3, shift_3 = (
        by[..., width * i : width * (i + 1)] for i in range(6)
    )
    normed = layer.norm_self(x_BMC) * (1 + scale_1) + shift_1
    x_BMC = x_BMC + attended(layer.attend_self, normed, normed)
    x_BMC = x_BMC + attended(
        layer.attend_memory, layer.norm_memory(x_BMC) * (1 + scale_2) + shift_2, memory_BLC
    )
    hidden = layer.feed_in(layer.norm_feed(x_BMC) * (1 + scale_3) + shift_3)
    return x_BMC + layer.feed_out(F.gelu(hidden))


def test_attention_is_that_of_each_head_alone() -> None:
    torch.manual_seed(0)
    attention = Attention(12, 3, nn)
    x, memory = torch.randn(2, 5, 12), torch.randn(2, 7, 12)
    torch.testing.assert_close(attention(x, memory), attended(attention, x, memory), atol=1e-6, rtol=1e-5)


def test_a_layer_looks_at_the_tokens_then_at_the_memory_then_feeds_forward() -> None:
    layer = network().decoder[0]
    x, memory, prompt = torch.randn(2, 3, 16), torch.randn(2, 7, 16), torch.randn(2, 16)
    expected = decoded(layer, x, memory, prompt)
    torch.testing.assert_close(layer(x, memory, prompt), expected, atol=1e-3, rtol=1e-4)
    assert (layer.feed_in.out_features, layer.feed_out.in_features) == (64, 64)


def test_cores_are_a_static_part_and_one_decoded_from_queries_and_places_row_by_row() -> None:
    made = network()
    tokens = made.queries + index_encoding(3, 16, torch.device("cpu"))
    numbers = []
    for memory, prompt in zip(*made.perception(perceived()), strict=True):
        x = tokens[None]
        for layer in made.decoder:
            x = decoded(layer, x, memory[None], prompt[None])
        standard = (made.head_norm(x)[0] - made.token_statistics.mean) / made.token_statistics.deviation
        numbers.append((made.static_factors + standard @ made.head.weight.T) / 2**0.25)
    b_hyper, a_hyper = made.factors(perceived())
    assert (b_hyper.shape, a_hyper.shape) == ((2, 3, 5, 2), (2, 3, 2, 3))
    flat = torch.cat([b_hyper.flatten(2), a_hyper.flatten(2)], dim=-1)
    torch.testing.assert_close(flat, torch.stack(numbers), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(made(perceived()), b_hyper @ a_hyper)


def test_it_has_the_layers_it_was_asked_for_over_the_levels_it_was_given() -> None:
    made = network()
    assert len(made.decoder) == 2
    assert [project.in_features for project in made.perception.projections] == [2, 3]
    assert made.head.out_features == 2 * (3 + 5)
    assert (made.feature_channels, made.text_channels) == ((2, 3), 6)
    assert made.targets == TARGETS


def test_each_target_has_its_own_aux_matrices() -> None:
    made = network()
    for index, target in enumerate(TARGETS):
        a_aux, b_aux = made.aux(index)
        assert (a_aux.shape, b_aux.shape) == ((3, target.in_features), (target.out_features, 5))
        assert a_aux is made.a_aux[index] and b_aux is made.b_aux[index]


@pytest.mark.parametrize("conditioning", ["full", "none"])
def test_only_b_aux_and_the_queries_start_at_zero(conditioning) -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(SMALL, rank=16, a=64, conditioning=conditioning)
    made = HyperNetwork(config, (Target("x", 400, 8),) * 40, [2], 6)
    assert not any(b_aux.any() for b_aux in made.b_aux)
    assert float(made.a_aux[0].detach().std()) == pytest.approx(1 / 20, rel=0.05)  # 400 ** -0.5
    assert float(made.static_factors.detach().std()) == pytest.approx(1.0, rel=0.05)
    if conditioning != "none":
        assert not made.queries.any()


def test_static_and_conditional_part_start_with_the_same_energy() -> None:
    torch.manual_seed(0)
    config = HyperNetworkConfig(rank=4, width=64)
    made = HyperNetwork(config, (Target("x", 40, 8),) * 40, [2], 6)
    standard = torch.randn(8, 40, 64)
    conditional, static = made.head(standard).detach(), made.static_factors.detach()
    assert float(conditional.square().mean() / static.square().mean()) == pytest.approx(1.0, rel=0.1)


def test_what_is_not_perceived_gives_every_row_the_same_decoded_core() -> None:
    made = network(dataclasses.replace(SMALL, conditioning="constant"))
    assert made.is_static
    b_hyper, a_hyper = made.factors(perceived(3))
    assert torch.equal(b_hyper[0], b_hyper[2]) and torch.equal(a_hyper[0], a_hyper[2])
    full = network()
    same = {
        name: value.numel()
        for name, value in full.named_parameters()
        if name in dict(made.named_parameters())
    }
    assert sum(same.values()) == sum(value.numel() for value in full.parameters())
    assert not torch.allclose(b_hyper[0].flatten(1), made.static_factors[:, :10] / 2**0.25)


def test_a_static_hypernetwork_gives_every_row_its_one_core() -> None:
    made = network(dataclasses.replace(SMALL, conditioning="none"))
    assert made.is_static and not network().is_static
    assert not hasattr(made, "perception")
    b_hyper, a_hyper = made.double().factors(perceived(3))
    assert b_hyper.dtype == a_hyper.dtype == torch.float32
    assert len(b_hyper) == len(a_hyper) == 3
    for row in range(3):
        torch.testing.assert_close(b_hyper[row].flatten(1), made.static_factors[:, :10].float() / 2**0.25)
        torch.testing.assert_close(a_hyper[row].flatten(1), made.static_factors[:, 10:].float() / 2**0.25)


def test_factors_are_in_single_precision_whatever_the_host_s_head_computes_in() -> None:
    made = network()
    made.head.register_forward_hook(lambda module, inputs, output: output.bfloat16())
    assert {factor.dtype for factor in made.factors(perceived())} == {torch.float32}


def test_a_host_may_bring_its_own_layers() -> None:
    class Linear(nn.Linear):
        pass

    class LayerNorm(nn.LayerNorm):
        pass

    made = HyperNetwork(SMALL, TARGETS, [2, 3], 6, SimpleNamespace(Linear=Linear, LayerNorm=LayerNorm))
    kinds = {type(module) for module in made.modules() if isinstance(module, (nn.Linear, nn.LayerNorm))}
    assert kinds == {Linear, LayerNorm}


def test_the_default_sizes_are_those_of_the_published_recipes() -> None:
    plain = HyperNetworkConfig()
    assert (plain.rank, plain.a, plain.b) == (4, 16, 16)
    assert (plain.width, plain.layers, plain.heads, plain.conditioning) == (128, 3, 4, "full")


def test_sizes_from_1_to_8192_are_taken() -> None:
    assert MAX_SIZE == 8192
    small = HyperNetworkConfig(rank=1, a=1, b=1, width=4, layers=1, heads=1)
    large = HyperNetworkConfig(rank=8192, a=8192, b=8192, width=8192, layers=8192, heads=2048)
    assert (small.rank, large.rank) == (1, 8192)


@pytest.mark.parametrize("name", ["rank", "a", "b", "width", "layers", "heads"])
@pytest.mark.parametrize("value", [0, -1, 8193, 2.0, "4", None])
def test_other_sizes_are_refused_by_name(name: str, value) -> None:
    with pytest.raises(HyperAlignError, match=rf"^{name} is "):
        HyperNetworkConfig(**{name: value})


@pytest.mark.parametrize(("width", "heads"), [(8, 4), (24, 4), (12, 2), (17, 4)])
def test_the_width_must_be_a_multiple_of_four_times_the_heads(width: int, heads: int) -> None:
    with pytest.raises(HyperAlignError, match="multiple"):
        HyperNetworkConfig(width=width, heads=heads)
    assert HyperNetworkConfig(width=4 * heads * 3, heads=heads).width == 12 * heads


def test_an_unknown_conditioning_is_refused() -> None:
    with pytest.raises(HyperAlignError, match="conditioning"):
        HyperNetworkConfig(conditioning="some")  # pyright: ignore[reportArgumentType]
