"""`python -m hyperalign sample`, as a person runs it, on a real ComfyUI."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image, ImageChops

from hyperalign.cli.sample.client import ComfyClient
from hyperalign.cli.sample.convert import to_prompt
from hyperalign.cli.sample.files import load

ROOT = Path(__file__).resolve().parents[2]
WORKFLOW = ROOT / "example_workflows" / "base_versus_aligned.json"
BLANK = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 255}},
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "blank"}},
}
FEW_STEPS = ("--set", "*.steps=2")


# ComfyUI's own process drops PYTHONPATH: the repository's nodes/ would shadow its nodes.py there.
ENVIRONMENT = os.environ | {"COMFYUI_PATH": "", "PYTHONPATH": str(ROOT)}


def sample(*arguments: str, url: str | None = None, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hyperalign", "sample", *arguments]
    command += ["--url", url] if url else []
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=ENVIRONMENT)


def same(first: Path, second: Path) -> bool:
    images = [Image.open(path).convert("RGB") for path in (first, second)]
    return ImageChops.difference(*images).getbbox() is None


def test_a_workflow_runs_with_its_settings_and_its_images_hold_them(server, tmp_path):
    settings = ("--set", "prompt=a green heart", "--set", "*.seed=11", *FEW_STEPS)
    done = sample("--workflow", str(WORKFLOW), *settings, "--out", "images", url=server.url, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    paths = [tmp_path / line for line in done.stdout.splitlines()]
    assert len(paths) == 2
    assert all(path.parent == tmp_path / "images" for path in paths)
    assert not same(*paths), "base and aligned must differ"
    assert "text of 'Prompt' (#2) = a green heart" in done.stderr
    assert "KSampler" in done.stderr or "Base" in done.stderr, "progress names the nodes"
    held = Image.open(paths[0]).info
    assert json.loads(held["prompt"])["2"]["inputs"]["text"] == "a green heart"
    nodes = {node["id"]: node for node in json.loads(held["workflow"])["nodes"]}
    assert nodes[2]["widgets_values"] == ["a green heart"]
    assert nodes[6]["widgets_values"][:3] == [11, "fixed", 2]


def test_the_exported_workflow_gives_the_same_image_and_overwrites_nothing(server, tmp_path):
    info = server.client.object_info()
    (tmp_path / "api.json").write_text(json.dumps(to_prompt(load(WORKFLOW), info)))
    runs = [
        sample("--workflow", str(path), "--set", "#6.seed=3", *FEW_STEPS, url=server.url, cwd=tmp_path)
        for path in (WORKFLOW, tmp_path / "api.json")
    ]
    first, second = ([tmp_path / line for line in done.stdout.splitlines()] for done in runs)
    assert not set(first) & set(second)
    assert sum(same(a, b) for a in first for b in second) == 2


def test_a_muted_output_is_reported_and_does_not_run(server, tmp_path):
    workflow = load(WORKFLOW)
    muted = next(node for node in workflow["nodes"] if node["type"] in ("SaveImage", "PreviewImage"))
    muted["mode"] = 2
    (tmp_path / "muted.json").write_text(json.dumps(workflow))
    done = sample("--workflow", "muted.json", *FEW_STEPS, url=server.url, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert f"(#{muted['id']}) is muted and does not run." in done.stderr
    for node in workflow["nodes"]:
        node["mode"] = 2 if node["type"] in ("SaveImage", "PreviewImage") else 0
    (tmp_path / "muted.json").write_text(json.dumps(workflow))
    done = sample("--workflow", "muted.json", *FEW_STEPS, url=server.url, cwd=tmp_path)
    assert (done.returncode, "nothing to run: " in done.stderr) == (2, True), done.stderr


def test_a_failing_node_is_named_by_its_title_in_one_sentence(server, tmp_path):
    settings = ("--set", "prompt=a dragon", *FEW_STEPS)
    done = sample("--workflow", str(WORKFLOW), *settings, url=server.url, cwd=tmp_path)
    assert done.returncode == 2
    assert not done.stdout
    said = done.stderr.splitlines()[-1]
    assert said.startswith("error: 'Prompt' (CLIPTextEncode, #2): "), said
    assert "dragon" in said


def test_a_refused_graph_is_named_by_its_title(server, tmp_path):
    graph = json.loads(json.dumps(BLANK))
    graph["1"]["inputs"]["width"] = 0
    graph["1"]["_meta"] = {"title": "Canvas"}
    (tmp_path / "graph.json").write_text(json.dumps(graph))
    done = sample("--workflow", "graph.json", url=server.url, cwd=tmp_path)
    assert done.returncode == 2
    assert "error: 'Canvas' (EmptyImage, #1): " in done.stderr


def test_a_graph_of_which_the_host_would_run_a_half_is_refused_whole(server, tmp_path):
    graph = BLANK | {
        "7": {"class_type": "HyperAlignLoader", "inputs": {"hypernetwork": "gone.safetensors"}},
        "8": {"class_type": "PreviewAny", "inputs": {"source": ["7", 1]}},
    }
    (tmp_path / "graph.json").write_text(json.dumps(graph))
    done = sample("--workflow", "graph.json", url=server.url, cwd=tmp_path)
    assert done.returncode == 2
    assert "no hypernetwork 'gone.safetensors'" in done.stderr
    assert done.stderr.count("gone.safetensors") == 1
    assert not list(tmp_path.glob("**/*.png"))


def test_a_wrong_value_is_refused_before_anything_is_queued(server, tmp_path):
    before = len(server.client.get("/history"))
    for setting, said in (
        ("cfg=high", "could mean 2 widgets"),
        ("#6.cfg=high", "expected a number"),
        ("*.sampler_name=eular", "expected one of euler"),
        ("sed=4", "nearest are seed"),
    ):
        done = sample("--workflow", str(WORKFLOW), "--set", setting, url=server.url, cwd=tmp_path)
        assert (done.returncode, said in done.stderr) == (2, True), done.stderr
    assert len(server.client.get("/history")) == before


def test_an_image_is_uploaded_where_a_node_wants_one(server, tmp_path):
    Image.new("RGB", (24, 16), (10, 200, 30)).save(tmp_path / "a photo.png")
    graph = {
        "1": {"class_type": "LoadImage", "inputs": {"image": "nothing.png"}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "copy"}},
    }
    (tmp_path / "graph.json").write_text(json.dumps(graph))
    done = sample("--workflow", "graph.json", "--set", "image=a photo.png", url=server.url, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / done.stdout.strip()).getpixel((0, 0)) == (10, 200, 30)
    missing = sample("--workflow", "graph.json", "--set", "image=none.png", url=server.url, cwd=tmp_path)
    assert missing.returncode == 2
    assert "image of 'LoadImage' (#1) is set to 'none.png'; expected one of" in missing.stderr


def test_ctrl_c_takes_the_run_from_the_server(server, tmp_path):
    command = [sys.executable, "-m", "hyperalign", "sample", "--workflow", str(WORKFLOW), "--url", server.url]
    command += ["--set", "*.steps=2000"]
    with subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    ) as process:
        while not (server.client.get("/queue")["queue_running"]):
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Stopped" in said
    deadline = time.monotonic() + 30
    while server.client.get("/queue")["queue_running"] and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not server.client.get("/queue")["queue_running"]


def test_a_comfyui_is_started_from_its_folder_and_ended(comfyui_path, tmp_path):
    (tmp_path / "graph.json").write_text(json.dumps(BLANK))
    more = ("--set", "color=16711680", "--", "--cpu", "--disable-all-custom-nodes", "--disable-api-nodes")
    done = sample("--workflow", "graph.json", "--comfyui", str(comfyui_path), *more, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / done.stdout.strip()).getpixel((0, 0)) == (255, 0, 0)
    assert not list(comfyui_path.glob("output/blank*"))


def test_no_comfyui_anywhere_says_how_to_get_one(tmp_path):
    (tmp_path / "graph.json").write_text(json.dumps(BLANK))
    done = sample("--workflow", "graph.json", url="http://127.0.0.1:9", cwd=tmp_path)
    assert done.returncode == 2
    assert "No ComfyUI answers at http://127.0.0.1:9. Start one" in done.stderr


def test_something_else_that_answers_is_no_comfyui(server, tmp_path):
    with pytest.raises(ValueError, match=r"no ComfyUI|answered 404"):
        ComfyClient(f"{server.url}/extensions").object_info()
