"""What the client makes of a server's answers and of its websocket messages."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from aiohttp import web

from hyperalign.cli.sample import client as client_module
from hyperalign.cli.sample import command
from hyperalign.cli.sample.client import ComfyClient, ComfyError, ComfyInterrupted, _reasons
from hyperalign.cli.sample.server import ComfyServer, free_port
from hyperalign.errors import HyperAlignError
from hyperalign.openmp import WAITING, wait_passively

GRAPH = {"1": {"class_type": "Save", "inputs": {}, "_meta": {"title": "Mine"}}}
OUTPUTS = {"1": {"images": [{"filename": "a b.png", "subfolder": "", "type": "output"}]}}
Talk = Callable[["FakeComfyUI", web.WebSocketResponse], Awaitable[None]]


class FakeComfyUI:
    """The part of ComfyUI's interface that the client uses. `talk` is its side of the websocket."""

    def __init__(self, talk: Talk) -> None:
        self.talk = talk
        self.queued = asyncio.Event()
        self.requests: list[tuple[str, object]] = []
        self.run = ""
        self.history: dict[str, object] = {}

    async def websocket(self, request: web.Request) -> web.WebSocketResponse:
        end = web.WebSocketResponse(autoping=True)
        await end.prepare(request)
        await self.queued.wait()
        await self.talk(self, end)
        return end

    async def post(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.requests.append((request.path, body))
        if request.path == "/prompt":
            self.run = body["prompt_id"]
            self.queued.set()
        return web.json_response({"prompt_id": self.run})

    async def get(self, request: web.Request) -> web.Response:
        answers = {"/queue": {"queue_running": [[0, self.run]]}, f"/history/{self.run}": self.history}
        return web.json_response(answers[request.path])

    def message(self, kind: str, **data: object) -> str:
        return json.dumps({"type": kind, "data": {"prompt_id": self.run, **data}})

    def ends(self) -> None:
        self.history = {self.run: {"outputs": OUTPUTS, "status": {"messages": []}}}


@contextmanager
def comfyui(talk: Talk) -> Iterator[tuple[ComfyClient, FakeComfyUI]]:
    """A server in a thread of its own, and a client of it."""
    port, started = free_port(), threading.Event()
    running: list[tuple[FakeComfyUI, asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def serve() -> None:
        fake, stopped = FakeComfyUI(talk), asyncio.Event()
        app = web.Application()
        app.router.add_get("/ws", fake.websocket)
        app.router.add_get("/{path:.*}", fake.get)
        app.router.add_post("/{path:.*}", fake.post)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        running.append((fake, asyncio.get_running_loop(), stopped))
        started.set()
        await stopped.wait()
        await runner.cleanup()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    started.wait(10)
    fake, loop, stopped = running[0]
    yield ComfyClient(f"http://127.0.0.1:{port}"), fake
    loop.call_soon_threadsafe(stopped.set)
    thread.join(10)


async def succeed(fake: FakeComfyUI, end: web.WebSocketResponse) -> None:
    await end.send_bytes(b"preview")
    await end.send_str(fake.message("execution_start", timestamp=1000))
    await end.ping()
    await end.send_str(json.dumps({"type": "status", "data": {}}))
    await end.send_str(
        fake.message("progress", value=1, max=2, text="x" * 5_000_000)
    )  # above aiohttp's default
    await end.send_str(fake.message("execution_success", timestamp=3500))
    fake.ends()
    await end.send_str(fake.message("executing", node=None))


def test_a_run_is_followed_to_its_end():
    seen: list[str] = []
    with comfyui(succeed) as (client, fake):
        result = client.run(GRAPH, lambda event: seen.append(event["type"]), {"nodes": []}, ["1"])
    assert (result.outputs, result.seconds) == (OUTPUTS, 2.5)
    assert seen == ["execution_start", "progress", "execution_success", "executing"]
    ((path, body),) = fake.requests
    assert (path, body["prompt"], body["partial_execution_targets"]) == ("/prompt", GRAPH, ["1"])
    assert body["extra_data"] == {"extra_pnginfo": {"workflow": {"nodes": []}}}


def test_silence_asks_the_history(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(client_module, "SILENT_SECONDS", 0.2)

    async def lose_the_last_message(fake: FakeComfyUI, end: web.WebSocketResponse) -> None:
        await asyncio.sleep(0.5)
        fake.ends()
        await asyncio.sleep(5)

    with comfyui(lose_the_last_message) as (client, _):
        assert client.run(GRAPH).outputs == OUTPUTS


def test_failures_and_interrupts_name_the_node():
    async def fail(fake: FakeComfyUI, end: web.WebSocketResponse) -> None:
        await end.send_str(
            fake.message("execution_error", node_id="1", node_type="Save", exception_message="No\nspace")
        )

    async def stop(fake: FakeComfyUI, end: web.WebSocketResponse) -> None:
        await end.send_str(fake.message("execution_interrupted", node_id="1", node_type="Save"))

    with comfyui(fail) as (client, _), pytest.raises(ComfyError, match=r"'Mine' \(Save, #1\): No space"):
        client.run(GRAPH)
    with comfyui(stop) as (client, _), pytest.raises(ComfyInterrupted, match="interrupted at 'Mine'"):
        client.run(GRAPH)


def test_a_closed_connection_is_an_error():
    async def close(_fake: FakeComfyUI, end: web.WebSocketResponse) -> None:
        await end.close()

    with comfyui(close) as (client, _), pytest.raises(ComfyError, match="broke: the server closed"):
        client.run(GRAPH)


def test_a_callback_may_use_the_client():
    with comfyui(succeed) as (client, fake):
        client.run(GRAPH, lambda event: client.interrupt() if event["type"] == "progress" else None)
    assert [path for path, _ in fake.requests] == ["/prompt", "/interrupt"]


def test_ctrl_c_while_waiting_cancels_the_run(caplog: pytest.LogCaptureFixture):
    async def wait(_fake: FakeComfyUI, _end: web.WebSocketResponse) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(5)

    with comfyui(wait) as (client, fake), pytest.raises(KeyboardInterrupt):
        client.run(GRAPH)
    assert not caplog.records, caplog.text
    run = fake.run
    assert fake.requests[1:] == [("/queue", {"delete": [run]}), ("/interrupt", {"prompt_id": run})]


@contextmanager
def answering(answer: bytes) -> Iterator[str]:
    """Something that gives every connection the same answer; yields its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread.join(10)


def test_each_error_is_reported_once_and_whole():
    long = "There is no hypernetwork; " + "put it there. " * 60
    errors = [{"message": "Custom validation failed for node", "details": f"{x} - {long}"} for x in "abc"]
    other = {"message": "Value not in list", "details": "reward: 'x' not in [...]"}
    node_errors = {
        "3": {"class_type": "HyperAlignLoader", "errors": errors},
        "5": {"class_type": "HyperAlignRewardLoader", "errors": [other]},
    }
    first, second = _reasons(node_errors, {"3": {"_meta": {"title": "Mine"}}}).split("\n")
    assert first == f"'Mine' (HyperAlignLoader, #3): Custom validation failed for node: {long.strip()}"
    assert second == "HyperAlignRewardLoader: Value not in list: reward: 'x' not in [...]"


def test_a_server_without_websocket_is_refused():
    with answering(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n") as url:
        with pytest.raises(ComfyError, match="broke: 404"):
            ComfyClient(url).run(GRAPH)
    with answering(b"220 mail\r\n") as url, pytest.raises(ComfyError, match="broke"):
        ComfyClient(url).run(GRAPH)


def test_another_server_is_no_comfyui():
    page = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n<html>"
    with answering(page) as url, pytest.raises(ComfyError, match="is no ComfyUI"):
        ComfyClient(url).object_info()
    with answering(b"HTTP/1.1 500 Oh\r\nContent-Length: 2\r\n\r\nno") as url:
        with pytest.raises(ComfyError, match=r"answered 500 to .*/object_info: no"):
            ComfyClient(url).object_info()
    with pytest.raises(ComfyError, match="does not answer: Cannot connect"):
        ComfyClient("http://127.0.0.1:9").object_info()
    with pytest.raises(ComfyError, match="does not answer"):
        ComfyClient("127.0.0.1:9").object_info()


def test_a_missing_package_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(command.sys.modules, "aiohttp", None)
    monkeypatch.delitem(command.sys.modules, "hyperalign.cli.sample.client")
    assert command.main(["--workflow", "x.json"]) == 2
    assert "aiohttp is not installed; sample needs aiohttp and tqdm: run" in capsys.readouterr().err


def test_a_server_that_ends_shows_its_last_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in WAITING:
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "comfy").mkdir()
    (tmp_path / "main.py").write_text(
        "import os; raise SystemExit('policy ' + os.environ['OMP_WAIT_POLICY'])"
    )
    server = ComfyServer(tmp_path, tmp_path / "log", tmp_path / "database", advice="Try again.")
    with pytest.raises(
        HyperAlignError, match="ended while starting. Try again. Its last lines were:\npolicy PASSIVE"
    ):
        server.__enter__()
    with pytest.raises(HyperAlignError, match="is no ComfyUI: expected main.py"):
        ComfyServer(tmp_path / "comfy", tmp_path / "log", tmp_path / "database")


def test_the_users_choice_of_waiting_stays():
    for chosen in ({"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "ACTIVE"}):
        environment = dict(chosen)
        wait_passively(environment)
        assert environment == chosen
