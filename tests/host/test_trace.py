"""Traces in a running server: what is recorded when links come and go."""

from __future__ import annotations

import io
import json

import pytest
from PIL import Image

from hyperalign.cli.sample.client import ComfyError

SAMPLING = {
    "positive": ["2", 0], "negative": ["3", 0], "latent_image": ["4", 0], "steps": 3,
    "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0,
}  # fmt: skip


def graph(seed, sampler):
    """An image by HyperAlign Sampler, or by Apply HyperAlign and KSampler; the trace is output 1 of 6."""
    model = {"model": ["1", 0], "hypernetwork": ["5", 0], "variant": "auto", "strength": 1.0}
    nodes = {
        "1": {"class_type": "HyperAlignTinyModel", "inputs": {}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "a red heart"}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": ""}},
        "4": {"class_type": "HyperAlignTinyLatent", "inputs": {"batch_size": 1}},
        "5": {"class_type": "HyperAlignLoader", "inputs": {"hypernetwork": "tiny_s.safetensors"}},
        "8": {"class_type": "VAEDecode", "inputs": {"samples": ["7", 0], "vae": ["1", 2]}},
        "9": {"class_type": "PreviewImage", "inputs": {"images": ["8", 0]}},
    }
    if sampler:
        nodes["6"] = {"class_type": "HyperAlignSampler", "inputs": {**model, **SAMPLING, "seed": seed}}
        nodes["8"]["inputs"]["samples"] = ["6", 0]
    else:
        window = {"start_percent": 0.0, "end_percent": 1.0}
        nodes["6"] = {"class_type": "HyperAlignApply", "inputs": {**model, **window}}
        nodes["7"] = {"class_type": "KSampler", "inputs": {"model": ["6", 0], **SAMPLING, "seed": seed}}
    return nodes


def with_trace(nodes, **inputs):
    """Adds a trace and its numbers as text."""
    if "7" in nodes:
        inputs["latent"] = ["7", 0]
    trace = {"class_type": "HyperAlignTrace", "inputs": {"trace": ["6", 1], **inputs}}
    return {**nodes, "10": trace, "11": {"class_type": "PreviewAny", "inputs": {"source": ["10", 1]}}}


def with_reward(nodes):
    widgets = {"weight": 1.0, "combination": "sum", "download": False}
    reward = {"class_type": "HyperAlignRewardLoader", "inputs": {"reward": "tiny reward", **widgets}}
    return with_trace({**nodes, "12": reward}, reward=["12", 0], vae=["1", 2], prompt="a red heart")


def numbers(result):
    return json.loads(result.outputs["11"]["text"][0])


def runs(server):
    return sum("HyperAlign run:" in line for line in server.server.log().splitlines())


@pytest.mark.parametrize("sampler", [True, False])
def test_links_that_come_later_make_the_host_sample_again(server, sampler):
    nodes, before = graph(101, sampler), runs(server)
    server.client.run(nodes)
    server.client.run(nodes)
    assert runs(server) == before + 1  # the second time from the cache
    traced = server.client.run(with_trace(nodes))
    assert runs(server) == before + 2
    assert len(numbers(traced)["u"]) == 3
    assert numbers(traced)["reward"] is None
    scored = server.client.run(with_reward(nodes))
    assert runs(server) == before + 3
    assert [len(row) for row in numbers(scored)["reward"]["scores"]] == [3]
    server.client.run(with_reward(nodes))
    assert runs(server) == before + 3


@pytest.mark.parametrize("sampler", [True, False])
def test_the_trace_follows_the_seed(server, sampler):
    first = numbers(server.client.run(with_trace(graph(102, sampler))))
    second = numbers(server.client.run(with_trace(graph(103, sampler))))
    assert first["tracks"][0]["norm"] != second["tracks"][0]["norm"]


def test_the_image_is_shown_in_the_node(server):
    result = server.client.run(with_trace(graph(104, True)))
    shown = server.client.image(result.outputs["10"]["images"][0])
    image = Image.open(io.BytesIO(shown))
    assert image.width == 1000
    assert len(image.convert("RGB").getcolors(1 << 24)) > 50


def test_apply_without_the_sampled_latent_is_explained(server):
    nodes = with_trace(graph(105, False))
    del nodes["10"]["inputs"]["latent"]
    nodes["7"]["inputs"]["model"] = ["1", 0]  # nobody samples with the aligned model
    with pytest.raises(ComfyError, match="Connect the sampler's LATENT"):
        server.client.run(nodes)
