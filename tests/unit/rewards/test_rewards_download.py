"""Downloading from a local hub: once, resumed, with checksum, and with a clear message on errors."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from hyperalign.errors import HyperAlignError
from hyperalign.rewards.download import download
from hyperalign.rewards.weights import WeightFile, as_published, present

WEIGHTS = "HPS_v2.1_compressed.pt"
CONTENT = bytes(range(256)) * 20_000
HALF = len(CONTENT) // 2


class Hub(BaseHTTPRequestHandler):
    """Serves every file with the same bytes."""

    def do_GET(self) -> None:
        server: Counting = self.server  # type: ignore[assignment]
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        server.asked.append((self.path, start))
        if server.status != 200:
            self.send_error(server.status)
            return
        if start >= len(CONTENT):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(CONTENT)}")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if server.sends_length:
            self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        self.wfile.write(CONTENT[start : HALF if server.breaks and not start else None])

    def log_message(self, format: str, *args: object) -> None:
        """Keeps the test's output clean."""


class Counting(ThreadingHTTPServer):
    asked: list[tuple[str, int]]
    """Each path, and its first byte."""
    breaks = False
    """Whether the connection is lost in the middle of each file."""
    sends_length = True
    status = 200


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counting]:
    server = Counting(("127.0.0.1", 0), Hub)
    server.asked = []
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
    yield server
    server.shutdown()
    server.server_close()


def test_files_come_once_with_their_checksum_beside_them(hub: Counting, tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    paths = download("hpsv2.1", tmp_path, lambda *facts: calls.append(facts))
    assert paths == [tmp_path / WEIGHTS, tmp_path / "tokenizer/vocab.json", tmp_path / "tokenizer/merges.txt"]
    assert all(path.read_bytes() == CONTENT for path in paths)
    assert json.loads((tmp_path / f"{WEIGHTS}.json").read_text()) == {
        "file": WEIGHTS,
        "url": f"https://huggingface.co/xswu/HPSv2/resolve/main/{WEIGHTS}",
        "bytes": len(CONTENT),
        "sha256": hashlib.sha256(CONTENT).hexdigest(),
    }
    assert (WEIGHTS, len(CONTENT), len(CONTENT)) in calls
    assert hub.asked[0] == (f"/xswu/HPSv2/resolve/main/{WEIGHTS}", 0)
    hub.asked.clear()
    download("hpsv2.1", tmp_path)
    assert hub.asked == []


def test_by_default_a_bar_shows_the_size(
    hub: Counting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    download("imagereward", tmp_path)
    shown = capsys.readouterr().err
    assert "ImageReward.pt: " in shown
    assert "5.12M/5.12M" in shown


def test_an_interrupted_download_resumes_where_it_stopped(hub: Counting, tmp_path: Path) -> None:
    hub.breaks = True
    with pytest.raises(HyperAlignError, match=f"{WEIGHTS} could not be downloaded .* try again: it resumes"):
        download("hpsv2.1", tmp_path)
    assert not (tmp_path / WEIGHTS).exists()
    hub.breaks = False
    download("hpsv2.1", tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == CONTENT
    assert [start for path, start in hub.asked if path.endswith(WEIGHTS)] == [0, HALF]
    assert not list(tmp_path.rglob("*.partial"))


def test_a_partial_file_of_a_longer_file_is_discarded(hub: Counting, tmp_path: Path) -> None:
    (tmp_path / f"{WEIGHTS}.partial").write_bytes(CONTENT + b"more")
    download("hpsv2.1", tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == CONTENT
    assert [start for path, start in hub.asked if path.endswith(WEIGHTS)] == [len(CONTENT) + 4, 0]


def test_a_complete_file_that_was_not_renamed_is_kept(hub: Counting, tmp_path: Path) -> None:
    (tmp_path / f"{WEIGHTS}.partial").write_bytes(CONTENT)
    calls: list[tuple[str, int, int]] = []
    download("hpsv2.1", tmp_path, lambda *facts: calls.append(facts))
    assert (tmp_path / WEIGHTS).read_bytes() == CONTENT
    assert json.loads((tmp_path / f"{WEIGHTS}.json").read_text())["bytes"] == len(CONTENT)
    assert [start for path, start in hub.asked if path.endswith(WEIGHTS)] == [len(CONTENT)]
    assert calls[0] == (WEIGHTS, len(CONTENT), len(CONTENT))


def test_a_server_may_omit_the_length(hub: Counting, tmp_path: Path) -> None:
    hub.sends_length = False
    calls: list[tuple[str, int, int]] = []
    download("hpsv2.1", tmp_path, lambda *facts: calls.append(facts))
    assert (tmp_path / WEIGHTS).read_bytes() == CONTENT
    own = [(here, total) for name, here, total in calls if name == WEIGHTS]
    assert all(here < total for here, total in own[:-1])
    assert own[-1] == (len(CONTENT), len(CONTENT))


@pytest.mark.parametrize("place", ["file", "file/deeper"])
def test_a_file_instead_of_the_folder_is_reported_in_a_sentence(
    hub: Counting, tmp_path: Path, place: str
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HyperAlignError, match=rf"{WEIGHTS} cannot be written .*Choose a path"):
        download("hpsv2.1", tmp_path / place)
    assert hub.asked == []


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_reported_in_a_sentence(hub: Counting, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(HyperAlignError, match=rf"{WEIGHTS} cannot be written"):
        download("hpsv2.1", tmp_path)


def test_a_folder_instead_of_the_file_is_reported_in_a_sentence(hub: Counting, tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).mkdir()
    with pytest.raises(HyperAlignError, match=rf"{WEIGHTS} is a folder"):
        download("hpsv2.1", tmp_path)


def test_a_mirror_without_an_address_is_reported_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "somewhere")
    with pytest.raises(HyperAlignError, match="could not be downloaded from somewhere/xswu"):
        download("hpsv2.1", tmp_path)


def test_a_published_file_that_is_newer_than_what_was_made_of_it_is_read(tmp_path: Path) -> None:
    file = WeightFile("model.pt", "https://example.org", 0.1, "", as_published)
    published, converted = tmp_path / "model.pt", tmp_path / "model.safetensors"
    assert present(file, tmp_path) is None
    for number, path in enumerate((published, converted)):
        path.touch()
        os.utime(path, ns=(0, number))
    assert present(file, tmp_path) == converted
    os.utime(published, ns=(0, 2))
    assert present(file, tmp_path) == published


def test_weights_that_were_converted_are_not_fetched_again(hub: Counting, tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).with_suffix(".safetensors").touch()
    download("hpsv2.1", tmp_path)
    assert [path for path, _ in hub.asked if path.endswith(".pt")] == []


def test_a_server_that_refuses_is_reported_in_a_sentence(hub: Counting, tmp_path: Path) -> None:
    hub.status = 404
    with pytest.raises(HyperAlignError, match=r"could not be downloaded from http.*404.*by hand"):
        download("pickscore", tmp_path)


def test_no_network_is_reported_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # a closed port
    with pytest.raises(HyperAlignError, match="Check the network and try again"):
        download("pickscore", tmp_path)


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(HyperAlignError, match="no reward 'tiny'"):
        download("tiny", tmp_path)
