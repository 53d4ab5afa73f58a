"""The commands' --download: missing files come from a hub on this machine, and then the command runs."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hyperalign.cli.main import main
from hyperalign.geneval import detector
from hyperalign.geneval.detector import DetectorShape

DOG = {"tag": "single_object", "prompt": "a dog", "include": [{"class": "dog", "count": 1}]}
CLIP_FILES = {"clip-vit-large-patch14/model.safetensors", "tokenizer/vocab.json", "tokenizer/merges.txt"}


class Hub(ThreadingHTTPServer):
    """Serves the files of a rewards' folder under their published addresses."""

    folder: Path
    asked: list[str]


class Answer(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        hub: Hub = self.server  # type: ignore[assignment]
        hub.asked.append(self.path)
        owner, name, _, _, file = self.path.lstrip("/").split("/", 4)
        places = (hub.folder / name / file, hub.folder / "tokenizer" / file)
        content = next(place.read_bytes() for place in places if place.is_file())
        self.send_response(200 if owner else 404)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Keeps the test's output clean."""


@pytest.fixture
def hub(published: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub(("127.0.0.1", 0), Answer)
    server.folder, server.asked = published("clip"), []
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for color in ("red", "blue"):
        Image.new("RGB", (40, 30), color).save(folder / f"{color}.png")
    return folder


def arrived(folder: Path) -> set[str]:
    files = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {name for name in files if not name.endswith(("safetensors.json", "txt.json", "json.json"))}


def test_the_folder_scorer_fetches_what_is_missing_once(hub: Hub, images: Path, tmp_path: Path) -> None:
    weights = tmp_path / "new/weights"
    arguments = [str(images), "--reward", "clip", "--prompt", "a dog", "--device", "cpu", "--weights"]
    assert main(["score", *arguments, str(weights)]) == 2
    assert hub.asked == []
    assert main(["score", *arguments, str(weights), "--download"]) == 0
    assert arrived(weights) == CLIP_FILES
    assert len(hub.asked) == 3
    assert main(["score", *arguments, str(weights), "--download"]) == 0
    assert len(hub.asked) == 3
    fetched = (images / "scores.csv").read_text()
    assert main(["score", *arguments, str(hub.folder), "--out", str(tmp_path / "own.csv")]) == 0
    assert (tmp_path / "own.csv").read_text() == fetched


def test_nothing_is_downloaded_for_wrong_arguments(
    hub: Hub, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [str(images), "--reward", "clip", "--download", "--weights", str(tmp_path / "new")]
    assert main(["score", *common, "--prompts", "txt"]) == 2
    assert main(["score", *common, "--prompt", "a \ud83d cat"]) == 2
    assert main(["score", *common, "--reward", "beauty", "--prompt", "a cat"]) == 2
    assert main(["audit", *common, "--template", "a {red|blue \udc00} cat"]) == 2
    said = capsys.readouterr().err
    assert said.count("half a character") == 2
    assert hub.asked == []
    assert not (tmp_path / "new").exists()


def test_the_audit_fetches_what_is_missing(hub: Hub, images: Path, tmp_path: Path) -> None:
    weights = tmp_path / "new"
    arguments = [str(images), "--reward", "clip", "--template", "a {red|blue} dog", "--device", "cpu"]
    assert main(["audit", *arguments, "--weights", str(weights), "--download"]) == 0
    assert arrived(weights) == CLIP_FILES


def test_geneval_fetches_its_detector_too(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = DetectorShape(
        width=12, depths=(1, 1, 1, 1), heads=(1, 1, 2, 2), features=32, feedforward=32,
        encoder_feedforward=32, encoder_layers=1, decoder_layers=3, queries=7,
    )  # fmt: skip
    monkeypatch.setattr(detector, "SWIN_SMALL", small)
    monkeypatch.setattr(detector, "SHORT_SIDE", 64)
    network: Any = detector.network(small)
    network.save_pretrained((hub.folder / detector.WEIGHTS.path).parent)
    samples = tmp_path / "images/00000/samples"
    samples.mkdir(parents=True)
    Image.new("RGB", (64, 64), "red").save(samples / "0000.png")
    (samples.parent / "metadata.jsonl").write_text(json.dumps(DOG))
    arguments = [str(tmp_path / "images"), "--weights", str(tmp_path / "new"), "--device", "cpu"]
    assert main(["geneval", *arguments]) == 2
    assert main(["geneval", *arguments, "--download"]) == 0
    assert arrived(tmp_path / "new") == {*CLIP_FILES, detector.WEIGHTS.path}
    assert (tmp_path / "images/results.jsonl").read_text().count("\n") == 1
