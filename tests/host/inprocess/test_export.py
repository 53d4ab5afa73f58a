"""A LoRA written from a hypernetwork, read back by the host's own loader."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from hyperalign.errors import HyperAlignError

PROMPT = "two blue hearts"


@pytest.fixture
def export(tiny, tmp_path, monkeypatch):
    """Writes below tmp_path; returns the path."""
    import folder_paths

    from hyperalign.hosts.comfy.export import export_lora

    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))

    def write(loaded, latent, prompt=PROMPT, **options):
        settings = {"seed": 5, "time": 1.0, "strength": 1.0, "filename_prefix": "loras/mine"} | options
        positive = tiny.condition(prompt) if isinstance(prompt, str) else prompt
        with torch.inference_mode():
            latent = latent if isinstance(latent, dict) else {"samples": latent}
            return export_lora(tiny.model, loaded, positive, latent, **settings)

    return write


@pytest.fixture
def with_lora(caplog):
    """Loads a LoRA as the host's Load LoRA node does, all of it."""
    import comfy.sd
    import comfy.utils

    def load(model, path, strength=1.0):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            patched, _ = comfy.sd.load_lora_for_models(
                model, None, comfy.utils.load_torch_file(str(path)), strength, 0.0
            )
        assert caplog.messages == []  # the host warns of keys it does not know
        return patched

    return load


@pytest.mark.parametrize("mode", ["prefix", "separate"])
def test_a_run_with_the_lora_is_a_run_of_variant_i(tiny, sample, make_hyperalign, export, with_lora, mode):
    from hyperalign.hosts.comfy.model import apply

    loaded = make_hyperalign(mode=mode)
    noise = torch.randn(1, 4, 16, 16, generator=torch.manual_seed(5))
    base = sample(tiny.model, PROMPT, cfg=1.0, noise=noise)
    live = sample(apply(tiny.model, loaded, 0.7, variant="I"), PROMPT, cfg=1.0, noise=noise)
    path = export(loaded, torch.zeros(1, 4, 16, 16), strength=0.7)
    lora = sample(with_lora(tiny.model, path), PROMPT, cfg=1.0, noise=noise)
    effect = (live - base).abs().max()
    assert effect > 1e-2
    assert (lora - live).abs().max() < 5e-3 * effect  # float16
    assert torch.equal(sample(tiny.model, PROMPT, cfg=1.0, noise=noise), base)


def test_an_empty_latent_gets_the_size_that_ksampler_gives_it(tiny, make_hyperalign, export):
    from safetensors.torch import load_file

    from nodes import common_ksampler

    loaded, empty = make_hyperalign(), {"samples": torch.zeros(1, 4, 8, 8), "downscale_ratio_spacial": 8}
    words = tiny.condition(PROMPT)
    with torch.inference_mode():
        sampled = common_ksampler(tiny.model, 5, 1, 1.0, "euler", "normal", words, words, empty)[0]["samples"]
    found, expected = (load_file(export(loaded, latent)) for latent in (empty, torch.zeros_like(sampled)))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("time", [1.0, 0.999, 0.5, 0.0])
def test_the_weights_are_the_live_ones_at_that_time(tiny, make_hyperalign, time):
    """Against diffusers: the same seed, prompt and image give the same weights."""
    from hyperalign.hosts.comfy.export import factors_at
    from hyperalign.hosts.diffusers.adapter import Adapter, unet_call
    from hyperalign.hosts.diffusers.tiny import tiny_scheduler

    loaded = make_hyperalign()
    image = torch.randn(1, 4, 16, 16, generator=torch.manual_seed(1))
    with torch.inference_mode():
        b_hyper, a_hyper = factors_at(tiny.model, loaded, tiny.condition(PROMPT), image, 5, time)

    noise = torch.randn(1, 4, 16, 16, generator=torch.manual_seed(5))
    t = torch.tensor([round(time * 999)])
    scaled = tiny.model.model.process_latent_in(image)
    x = noise if time == 1.0 else tiny_scheduler().add_noise(scaled, noise, t)
    adapter = Adapter(tiny.unet, loaded.hyperalign)
    with torch.no_grad():
        features = adapter.perceive(unet_call(x, t, tiny.condition(PROMPT)[0][0].clone()))
        expected = adapter.network.factors(features)
    torch.testing.assert_close(b_hyper, expected[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(a_hyper, expected[1], atol=1e-4, rtol=1e-4)


def test_files_are_numbered_and_tell_their_origin(make_hyperalign, export):
    loaded, latent = make_hyperalign(variant="P"), torch.zeros(2, 4, 16, 16)
    first = export(loaded, latent, strength=0.5, metadata={"workflow": "{}"})
    second = export(loaded, latent)
    assert [path.name for path in (first, second)] == ["mine_00001_.safetensors", "mine_00002_.safetensors"]
    with safe_open(str(first), framework="pt") as file:
        header = file.metadata()
    assert header["workflow"] == "{}"
    assert json.loads(header["hyperalign_export"]) == {
        "hypernetwork": "tiny P", "seed": 5, "time": 1.0, "strength": 0.5
    }  # fmt: skip


def test_bad_requests_are_refused_and_nothing_is_written(tiny, make_hyperalign, export, tmp_path):
    loaded, empty = make_hyperalign(), torch.zeros(1, 4, 16, 16)
    with pytest.raises(HyperAlignError, match="time is 2.0; expected a number from 0"):
        export(loaded, empty, time=2.0)
    with pytest.raises(HyperAlignError, match="time is 0.5, but there is no image to put noise on"):
        export(loaded, empty, time=0.5)
    with pytest.raises(HyperAlignError, match="strength is nan"):
        export(loaded, empty, strength=float("nan"))
    two = [*tiny.condition("a red heart"), *tiny.condition("a blue circle")]
    with pytest.raises(HyperAlignError, match="holds 2 prompts.*Export one prompt at a time"):
        export(loaded, empty, prompt=two)
    late = tiny.condition("a red heart", start_percent=0.5, end_percent=1.0)
    with pytest.raises(HyperAlignError, match="not active at time 1.0.*Remove its time range"):
        export(loaded, empty, prompt=late)
    assert list(tmp_path.rglob("*.safetensors")) == []


def test_the_node_writes_the_file_and_names_it(pack, tiny, make_hyperalign, tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    from importlib import import_module

    node = import_module(f"{pack.__name__}.nodes.export").HyperAlignExportLora
    loader = import_module(f"{pack.__name__}.hyperalign.hosts.comfy.model")
    names = import_module(f"{pack.__name__}.hyperalign.tiny.weights")
    loaded = loader.load(names.HYPERNETWORKS / "tiny_s.safetensors")
    inputs = [item.id for item in node.define_schema().inputs]
    values = [
        tiny.model, loaded, tiny.condition(PROMPT), {"samples": torch.zeros(1, 4, 16, 16)}, 5, 1.0, 1.0, "x"
    ]  # fmt: skip
    with torch.inference_mode():
        output = node.PREPARE_CLASS_CLONE(None).execute(**dict(zip(inputs, values, strict=True)))
    assert Path(output.args[0]).parent == tmp_path and Path(output.args[0]).is_file()
