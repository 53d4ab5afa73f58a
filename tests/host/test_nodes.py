"""The nodes as an artist meets them: through a running server, with the committed weights."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
from PIL import Image, ImageChops
from safetensors import safe_open

from hyperalign.cli.sample.client import ComfyError, ComfyInterrupted
from hyperalign.cli.sample.convert import to_prompt
from hyperalign.cli.sample.files import load

WORKFLOWS = Path(__file__).resolve().parents[2] / "example_workflows"
# The others need large files that nobody has here; test_example_workflows.py checks them all.
OF_THE_TINY_MODEL = [
    path
    for path in sorted(WORKFLOWS.glob("*.json"))
    if "HyperAlignTinyModel" in path.read_text(encoding="utf-8")
]
DISPLAY_NAMES = {
    "HyperAlignLoader": "HyperAlign Loader",
    "HyperAlignApply": "Apply HyperAlign",
    "HyperAlignSampler": "HyperAlign Sampler (S/P/I)",
    "HyperAlignStrength": "HyperAlign Strength Curve",
    "HyperAlignTrace": "HyperAlign Trace",
    "HyperAlignTracePca": "HyperAlign Trace PCA",
    "HyperAlignExportLora": "Export HyperAlign as LoRA",
    "HyperAlignRewardLoader": "Reward Model Loader",
    "HyperAlignRewardScore": "Reward Score",
    "HyperAlignSelect": "Select by Reward",
    "HyperAlignBestOfN": "Best-of-N Sampler",
    "HyperAlignGuidance": "Reward Guidance",
    "HyperAlignCompare": "Compare",
    "HyperAlignTinyModel": "HyperAlign Tiny Model",
    "HyperAlignTinyLatent": "HyperAlign Tiny Empty Latent",
}
MODEL, POSITIVE, NEGATIVE, LATENT, HYPERNETWORK = "1", "2", "3", "4", "5"


@pytest.fixture(scope="module")
def info(server):
    return server.client.object_info()


def graph(
    steps: int = 4, strength: float = 1.0, prompt: str = "a red heart", file: str = "tiny_s.safetensors"
):
    """Apply HyperAlign and the stock nodes, saving one image at node 9."""
    return {
        MODEL: {"class_type": "HyperAlignTinyModel", "inputs": {}},
        POSITIVE: {"class_type": "CLIPTextEncode", "inputs": {"clip": [MODEL, 1], "text": prompt}},
        NEGATIVE: {"class_type": "CLIPTextEncode", "inputs": {"clip": [MODEL, 1], "text": ""}},
        LATENT: {"class_type": "HyperAlignTinyLatent", "inputs": {"batch_size": 1}},
        HYPERNETWORK: {"class_type": "HyperAlignLoader", "inputs": {"hypernetwork": file}},
        "6": {
            "class_type": "HyperAlignApply",
            "inputs": {
                "model": [MODEL, 0], "hypernetwork": [HYPERNETWORK, 0], "strength": strength,
                "start_percent": 0.0, "end_percent": 1.0, "variant": "auto",
            },
        },
        "7": {"class_type": "KSampler", "inputs": {"model": ["6", 0], **sampling(steps)}},
        "8": {"class_type": "VAEDecode", "inputs": {"samples": ["7", 0], "vae": [MODEL, 2]}},
        "9": {"class_type": "SaveImage", "inputs": {"images": ["8", 0], "filename_prefix": "test"}},
    }  # fmt: skip


def sampling(steps: int):
    return {
        "positive": [POSITIVE, 0], "negative": [NEGATIVE, 0], "latent_image": [LATENT, 0], "seed": 5,
        "steps": steps, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0,
    }  # fmt: skip


def base_graph(**options):
    nodes = graph(**options)
    nodes["7"]["inputs"]["model"] = [MODEL, 0]
    return {key: node for key, node in nodes.items() if key not in (HYPERNETWORK, "6")}


def sampler_graph(steps: int = 4, strength: float = 1.0):
    nodes = graph(steps=steps)
    inputs = {"model": [MODEL, 0], "hypernetwork": [HYPERNETWORK, 0], "variant": "auto", "strength": strength}
    nodes["7"] = {"class_type": "HyperAlignSampler", "inputs": {**inputs, **sampling(steps)}}
    del nodes["6"]
    return nodes


def image(server, nodes) -> Image.Image:
    result = server.client.run(nodes)
    return Image.open(io.BytesIO(server.client.image(result.outputs["9"]["images"][0]))).convert("RGB")


def same(first: Image.Image, second: Image.Image) -> bool:
    return ImageChops.difference(first, second).getbbox() is None


def test_every_node_is_there_under_its_name(info):
    assert {key: info[key]["display_name"] for key in DISPLAY_NAMES} == DISPLAY_NAMES
    assert {info[key]["category"] for key in DISPLAY_NAMES} == {"HyperAlign"}


def test_every_input_has_a_tooltip(info):
    for key in DISPLAY_NAMES:
        for group in ("required", "optional"):  # hidden ones are the host's own
            for name, (_, options) in info[key]["input"].get(group, {}).items():
                assert options.get("tooltip"), f"{key}.{name} has no tooltip"


def test_every_output_has_a_tooltip(info):
    for key in DISPLAY_NAMES:
        for name, tooltip in zip(info[key]["output_name"], info[key]["output_tooltips"], strict=True):
            assert tooltip, f"{key}.{name} has no tooltip"


def test_every_node_has_a_help_page():
    docs = WORKFLOWS.parent / "web" / "docs"
    assert {page.stem for page in docs.glob("*.md")} == set(DISPLAY_NAMES)


def in_few_steps(prompt):
    """A shipped workflow takes 25 steps; a test learns as much from 6."""
    for node in prompt.values():
        if "steps" in node["inputs"]:
            node["inputs"]["steps"] = 6
    return prompt


@pytest.mark.parametrize("path", OF_THE_TINY_MODEL, ids=lambda path: path.stem)
def test_an_example_workflow_runs(server, info, path):
    prompt = in_few_steps(to_prompt(load(path), info))
    result = server.client.run(prompt)
    showing = {"SaveImage", "PreviewImage", "HyperAlignRewardScore", "HyperAlignCompare"}
    showing |= {"HyperAlignTrace", "HyperAlignTracePca", "HyperAlignStrength"}
    expected = {key for key, node in prompt.items() if node["class_type"] in showing}
    assert {key for key, output in result.outputs.items() if output.get("images")} == expected


def test_scores_come_one_per_image_with_their_table(server, info):
    result = server.client.run(in_few_steps(to_prompt(load(WORKFLOWS / "score_rewards.json"), info)))
    tables = [output["text"][0] for output in result.outputs.values() if "text" in output]
    assert len([table for table in tables if table.count("a black circle and") == 4 and "mean" in table]) >= 2


def test_alignment_changes_the_image_and_strength_zero_does_not(server):
    base = image(server, base_graph())
    assert not same(base, image(server, graph()))
    assert same(base, image(server, graph(strength=0.0)))


def test_the_sampler_node_is_apply_and_ksampler_in_one(server):
    assert same(image(server, graph()), image(server, sampler_graph()))


def test_an_exported_lora_is_offered_by_load_lora_and_draws_what_variant_i_draws(server):
    nodes = base_graph()
    nodes["7"] = {
        "class_type": "HyperAlignExportLora",
        "inputs": {
            "model": [MODEL, 0], "hypernetwork": [HYPERNETWORK, 0], "positive": [POSITIVE, 0],
            "latent_image": [LATENT, 0], "seed": 5, "time": 1.0, "strength": 1.0,
            "filename_prefix": "loras/hyperalign",
        },
    }  # fmt: skip
    nodes[HYPERNETWORK] = graph()[HYPERNETWORK]
    path = Path(server.client.run({key: nodes[key] for key in "123457"}).outputs["7"]["text"][0])
    with safe_open(str(path), framework="pt") as file:
        assert "HyperAlignExportLora" in file.metadata()["prompt"]

    def without_guidance(nodes):
        nodes["7"]["inputs"]["cfg"] = 1.0
        return nodes

    live = graph()
    live["6"]["inputs"]["variant"] = "I"
    loaded = graph()
    loaded["6"] = {
        "class_type": "LoraLoaderModelOnly",
        "inputs": {"model": [MODEL, 0], "lora_name": path.name, "strength_model": 1.0},
    }
    expected, drawn, base = (image(server, without_guidance(nodes)) for nodes in (live, loaded, base_graph()))
    extremes = ImageChops.difference(expected, drawn).getextrema()
    assert max(high for _, high in extremes) <= 3  # of 255: the file is float16
    assert not same(expected, base)


def test_after_an_interrupt_the_same_graph_gives_the_same_images(server):
    before = image(server, base_graph()), image(server, graph())

    def interrupt(event):
        if event["type"] == "progress" and event["data"]["value"] >= 3:
            server.client.interrupt()

    with pytest.raises(ComfyInterrupted):
        server.client.run(graph(steps=5000), on_event=interrupt)
    server.client.free()
    assert same(before[0], image(server, base_graph()))
    assert same(before[1], image(server, graph()))


def test_cancelling_best_of_n_saves_the_best_so_far(server, info):
    nodes = to_prompt(load(WORKFLOWS / "best_of_n.json"), info)
    (key,) = (key for key, node in nodes.items() if node["class_type"] == "HyperAlignBestOfN")
    nodes[key]["inputs"] |= {"count": 1000, "steps": 4, "keep": 1}
    for _ in range(2):  # the second run draws anew
        cancelled = []

        def cancel(event, cancelled=cancelled):
            if event["type"] == "progress" and event["data"]["value"] >= 4 * 3 and not cancelled:
                cancelled.append(True)
                server.client.interrupt()

        outputs = server.client.run(nodes, on_event=cancel).outputs
        assert [len(output["images"]) for output in outputs.values() if "images" in output] == [1]
        assert "of 1000 (cancelled, best so far)" in outputs[key]["text"][0]
        assert cancelled


def test_what_no_image_reaches_ends_quietly(server, info):
    nodes = to_prompt(load(WORKFLOWS / "select_by_reward.json"), info)
    (select,) = (node for node in nodes.values() if node["class_type"] == "HyperAlignSelect")
    select["inputs"] |= {"mode": "threshold", "threshold": 5.0}
    titles = {key: node["_meta"]["title"] for key, node in nodes.items()}
    shown = {titles[key] for key, output in server.client.run(nodes).outputs.items() if output.get("images")}
    assert "The others" in shown
    assert "The best three" not in shown


def test_missing_weights_are_refused_before_anything_runs(server, info):
    nodes = to_prompt(load(WORKFLOWS / "best_of_n.json"), info)
    (loader,) = (node for node in nodes.values() if node["class_type"] == "HyperAlignRewardLoader")
    loader["inputs"]["reward"] = "hpsv2.1"
    with pytest.raises(ComfyError, match=r"HPS_v2.1.*GB\) in .*hyperalign_rewards; get it from"):
        server.client.run(nodes)


def test_an_unknown_word_is_named(server):
    with pytest.raises(ComfyError, match="CLIPTextEncode: The prompt has the word 'zebra'.*does not know"):
        server.client.run(graph(prompt="a zebra"))


def test_a_missing_file_is_refused_before_anything_runs(server):
    with pytest.raises(
        ComfyError, match="no hypernetwork 'gone.safetensors'.*Put the .safetensors file into"
    ):
        server.client.run(graph(file="gone.safetensors"))


def test_a_damaged_file_is_refused_before_anything_runs(server):
    (server.server.models / "broken.safetensors").write_bytes(b"not a tensor")
    assert "broken.safetensors" in json.dumps(server.client.get("/object_info/HyperAlignLoader"))
    with pytest.raises(ComfyError, match="broken.safetensors is not a whole safetensors file"):
        server.client.run(graph(file="broken.safetensors"))


def test_a_strength_that_is_no_number_is_refused(server):
    with pytest.raises(ComfyError, match="strength is nan; expected a number"):
        server.client.run(graph(strength=math.nan))


def test_zero_steps_are_refused(server):
    with pytest.raises(ComfyError, match="HyperAlignSampler: Value 0 smaller than min of 1"):
        server.client.run(sampler_graph(steps=0))


def test_the_run_is_reported_in_the_log(server):
    server.client.run(sampler_graph(steps=6, strength=0.9))
    assert "evaluations=6 generations=6" in server.server.log()
